"""
What must hold after a power loss: the buffer opens, is whole, has all that was acknowledged, nothing by halves, and
goes on.
"""

import pickle
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from crash.disk import Disk
from crash.facts import Facts, found
from crash.images import CORNERS, draw, fingerprint, put
from crash.operations import Recording
from sqlalchemy import Engine, text

from kkt_buffer import ReceiptRepository, buffer, create_buffer_engine, migrate

LONG_AGO = 1_000_000_000  # the power loss has set the clock back too
MEMORY = Path("/dev/shm")  # a real disk would only be slower: whatever is on it by now is on it

# Invariants of the design, from the rows themselves.
BROKEN = text("""
    SELECT 'synced' FROM receipts
        WHERE (status = 'synced') <> (synced_at IS NOT NULL AND hlc_server_time IS NOT NULL)
    UNION ALL SELECT 'failed' FROM receipts WHERE (status = 'failed') <> COALESCE(
        (SELECT COALESCE(resolution, 'open') IN ('open', 'resolved') FROM dlq
            WHERE original_receipt_id = receipts.id ORDER BY rowid DESC LIMIT 1), 0)
    UNION ALL SELECT 'lease' FROM receipts WHERE (status = 'syncing') <> (lease_token IS NOT NULL)
    UNION ALL SELECT 'count of pending' FROM buffer_state
        WHERE pending <> (SELECT COUNT(*) FROM receipts WHERE status = 'pending')
    UNION ALL SELECT 'count of syncing' FROM buffer_state
        WHERE syncing <> (SELECT COUNT(*) FROM receipts WHERE status = 'syncing')
    UNION ALL SELECT 'count of synced' FROM buffer_state
        WHERE synced <> (SELECT COUNT(*) FROM receipts WHERE status = 'synced')
    UNION ALL SELECT 'count of failed' FROM buffer_state
        WHERE failed <> (SELECT COUNT(*) FROM receipts WHERE status = 'failed')
    UNION ALL SELECT 'count of open dead letters' FROM buffer_state
        WHERE open_dead_letters <> (SELECT COUNT(*) FROM dlq WHERE resolved_at IS NULL)
    UNION ALL SELECT 'greatest HLC' FROM buffer_state WHERE EXISTS (SELECT 1 FROM receipts
        WHERE (receipts.hlc_local_time, receipts.hlc_logical_counter)
            > (buffer_state.hlc_local_time, buffer_state.hlc_logical_counter))
    UNION ALL SELECT 'buffer_state' WHERE (SELECT COUNT(*) FROM buffer_state) <> 1
    UNION ALL SELECT 'foreign key' FROM pragma_foreign_key_check
    UNION ALL SELECT integrity_check FROM pragma_integrity_check WHERE integrity_check <> 'ok'
""")


@dataclass(frozen=True)
class Finding:
    """One image, and what was wrong with it."""

    moment: int
    seed: int
    fingerprint: bytes
    complaints: list[str]

    def __str__(self):
        return f"moment {self.moment}, seed {self.seed}: {'; '.join(self.complaints)}"


class Ledger:
    """What was acknowledged up to a moment, and what had perhaps been done by then; `known` was there before."""

    def __init__(self, recording: Recording, known: Facts) -> None:
        self._acknowledgements = recording.acknowledgements
        self._known = known

    def said(self, moment: float) -> int:
        """How many acknowledgements there were."""
        return sum(one.began < moment for one in self._acknowledgements)

    def at(self, moment: float) -> tuple[Facts, list[list[Facts]]]:
        """The facts, and the transactions of calls that may have been under way."""
        facts = dict(self._known)
        under_way = []
        touched: set[str] = set()
        for one in self._acknowledgements:
            if one.began < moment:
                for changes in one.transactions:
                    facts |= changes
            else:
                # What comes later for the same receipt has not begun: its thread was still waiting here.
                keys = {key for changes in one.transactions for key in changes}
                if touched.isdisjoint(keys):
                    under_way.append(one.transactions)
                touched |= keys
        return facts, under_way


def compare(facts: Facts, under_way: list[list[Facts]], there: Facts) -> Iterator[str]:
    """What is not as it was acknowledged, or by halves."""
    allowed = {key: [value] for key, value in facts.items()}
    for transactions in under_way:
        for number, changes in enumerate(transactions):
            done = set()
            for key, value in changes.items():
                before = allowed.setdefault(key, [None])
                later = [following[key] for following in transactions[number:] if key in following]
                if value not in before:
                    done.add(there.get(key) in later)
                before.append(value)
            if len(done) == 2:
                yield f"half of a transaction of {sorted(changes)}"
    for key in allowed.keys() | there.keys():
        if there.get(key) not in allowed.get(key, [None]):
            yield f"{key} is {there.get(key)}, acknowledged was {allowed.get(key, [None])}"
    stamps = [value for key, value in there.items() if key.startswith("hlc:")]
    if sorted(map(tuple, stamps)) != [*map(tuple, stamps)] or len(set(map(tuple, stamps))) != len(stamps):
        yield f"HLC does not increase: {stamps}"


def judge(path: Path, facts: Facts, under_way: list[list[Facts]]) -> list[str]:
    """Open the buffer as a service does after a power loss, and say all that is wrong with it."""
    revisions = []

    def spying_current(engine: Engine, look: Callable[[Engine], str | None] = migrate.current) -> str | None:
        # `upgrade` looks first of all; afterwards nobody could tell a lost upgrade from one that was never lost.
        revisions.append(look(engine))
        return revisions[-1]

    try:
        with mock.patch.object(migrate, "current", spying_current):
            engine = buffer.init_buffer_db(path)
        there = found(engine) | {"schema": revisions[0]}
        complaints = list(compare(facts, under_way, there)) + _broken(engine)
        complaints += _go_on(engine, [value for key, value in (there | facts).items() if key.startswith("hlc:")])
        complaints += _broken(engine)
    except Exception as error:  # noqa: BLE001 (whatever it is, the buffer cannot be used)
        complaints = [f"{type(error).__name__}: {error}"]
    finally:
        buffer.close_buffer_db()
    return complaints


def _broken(engine: Engine) -> list[str]:
    with engine.execution_options(kkt_buffer_read_only=True).connect() as connection:
        return list(connection.scalars(BROKEN))


def _go_on(engine: Engine, stamps: list[list[int] | None]) -> list[str]:
    """New work is accepted, and comes after all that was acknowledged."""
    repository = ReceiptRepository(engine, now=lambda: LONG_AGO)
    receipt_id = repository.insert_receipt({"pos_id": "till-9", "fiscal_doc": '{"after": "the power loss"}'})
    receipt = repository.get_receipt_by_id(receipt_id)
    stamp = [receipt.hlc_local_time, receipt.hlc_logical_counter]
    late = [one for one in stamps if one is not None and one >= stamp]
    claimed = repository.claim_pending(1000)
    if receipt_id not in {one.id for one in claimed}:
        return ["a new receipt cannot be claimed"]
    repository.mark_synced(receipt_id, LONG_AGO)
    return [f"a new receipt has HLC {stamp}, before {late}"] if late else []


def share(saved: Path, moments: list[int], each: int) -> list[Finding]:
    """`examine` for a worker process."""
    return list(examine(*pickle.loads(saved.read_bytes()), moments, each))


def examine(recording: Recording, known: Facts, moments: list[int], each: int) -> Iterator[Finding]:
    """Look at `each` different images at each of the moments, or at as many as there are."""
    disk, ledger = Disk(recording), Ledger(recording, known)
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as name:
        folder = Path(name, "disk")
        seen = set()
        for moment in sorted(set(moments)):
            disk.advance(moment)
            expected = ledger.at(moment)
            looked = 0
            others = random.Random(moment)
            for seed in (*range(CORNERS), *(others.getrandbits(40) for _ in range(3 * each))):
                image = draw(disk, seed)
                mark = fingerprint(image)
                if (mark, ledger.said(moment)) in seen:
                    continue  # the same image, of which the same is to be asked
                seen.add((mark, ledger.said(moment)))
                folder.mkdir()
                put(image, folder)
                yield Finding(moment, seed, mark, judge(folder / recording.database, *expected))
                shutil.rmtree(folder)
                looked += 1
                if looked == each:
                    break


def known_facts(path: Path) -> Facts:
    """What a buffer holds that was made, or upgraded, without any power loss."""
    revision = None
    if path.exists():
        engine = create_buffer_engine(path)
        revision = migrate.current(engine)
        engine.dispose()
    try:
        return found(buffer.init_buffer_db(path)) | {"schema": revision}
    finally:
        buffer.close_buffer_db()
