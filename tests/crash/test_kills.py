"""
SIGKILL at random moments of a mixed load, round after round on one file; the books are kept outside the database.

A launcher imports the package once and forks the workers of each round from itself, before anything is opened. Each
worker writes to a log of its own what it is about to insert, what was acknowledged, and what the operator took from
it; what the logs say is held against what the database says. `KKT_BUFFER_PROOF=1` plays 200 rounds.
"""

import contextlib
import random
import shutil
import sqlite3
import time
from collections import Counter
from itertools import pairwise

import pytest
from builders import PROOF, start_python

from kkt_buffer import ReceiptRepository, create_buffer_engine, deliver_pending

PROCESSES = 4
CAPACITY = 40
ROUNDS = 200 if PROOF else 15

# Lines of a log are "thread kind receipt": T tries to insert, A acknowledged, S the operator has it, E an operation is
# over, P something was pruned, X what nobody expected. What a thread writes after an S says that the send is recorded.
LAUNCHER = """
import os, random, signal, sys, threading, time, uuid
from kkt_buffer import (
    BufferFullError, DeliveryRejected, DeliveryUnavailable, InvalidTransitionError, LeaseLostError,
    ReceiptNotFoundError, ReceiptRepository, create_buffer_engine, DeliveryWorker,
)
from kkt_buffer.sqlite import database

path, logs, fault = sys.argv[1:]
EXPECTED = (BufferFullError, InvalidTransitionError, LeaseLostError, ReceiptNotFoundError)
WHO = {"actor": "Anna", "reason": "because"}


class Worker(threading.Thread):
    def __init__(self, repository, log, seed):
        super().__init__(daemon=True)
        self.repository, self.log, self.chance = repository, log, random.Random(seed)
        self.worker = DeliveryWorker(repository, self.send, batch=6)

    def write(self, kind, receipt_id="-"):
        os.write(self.log, f"{self.name} {kind} {receipt_id}\\n".encode())

    def run(self):
        inserts = 40 if fault == "has no guard" else 6
        work = [self.insert] * inserts + [self.deliver] * 3 + [self.by_hand] * 3 + [self.requeue, self.prune, self.look]
        while True:
            try:
                self.chance.choice(work)()
            except EXPECTED:
                pass
            except BaseException as error:
                self.write("X", repr(error)[:300].replace(" ", "_"))
            self.write("E")

    def insert(self):
        size = self.chance.choice((1, 1, 3))
        many = [str(uuid.UUID(int=self.chance.getrandbits(128), version=4)) for _ in range(size)]
        for receipt_id in many:
            self.write("T", receipt_id)
            if fault == "acknowledges early":
                self.write("A", receipt_id)
        document = {"text": "x" * self.chance.choice((10, 1000, 9000))}
        new = [{"id": receipt_id, "pos_id": "till-1", "fiscal_doc": document} for receipt_id in many]
        self.repository.insert_receipts(new) if len(new) > 1 else self.repository.insert_receipt(new[0])
        for receipt_id in many:
            self.write("A", receipt_id)

    def take(self, receipt):
        if self.chance.random() < 0.1:
            time.sleep(0.005)
        self.write("S", receipt.id)
        return int(time.time())

    def send(self, receipt):
        what = self.chance.random()
        if what < 0.05:
            raise DeliveryRejected("no such tax")
        if what < 0.1:
            raise DeliveryUnavailable("no route")
        if what < 0.2:
            raise RuntimeError("strange answer")
        return self.take(receipt)

    def deliver(self):
        self.worker.wake()  # a breaker that is open makes no load
        self.worker.tick()

    def by_hand(self):
        for receipt in self.repository.claim_pending(self.chance.choice((1, 5))):
            what = self.chance.random()
            if what < 0.5:
                server_time = self.take(receipt)
                if fault == "does not record":
                    self.repository.release(receipt.id, receipt.lease_token)
                else:
                    self.repository.mark_synced(receipt.id, server_time)
            elif what < 0.7:
                self.repository.record_failure(receipt.id, "strange answer", receipt.lease_token)
            elif what < 0.8:
                self.repository.release(receipt.id, receipt.lease_token)
            elif what < 0.9:
                self.repository.move_to_dlq(receipt.id, "given up")
            elif fault == "believes itself":
                self.repository.mark_synced(receipt.id, 1)

    def requeue(self):
        for letter in self.repository.list_dead_letters(limit=5):
            self.repository.requeue(letter.original_receipt_id, **WHO)

    def prune(self):
        self.write("P", self.repository.prune().receipts)

    def look(self):
        self.repository.get_buffer_status(), self.repository.get_pending_receipts(3)
        self.repository.recover_expired_leases()


def work(number, seed, offset):
    if fault == "forgets the clock":
        database.INSERT = (
            "INSERT INTO receipts (id, pos_id, created_at, hlc_local_time, hlc_logical_counter, fiscal_doc, digest)"
            " VALUES (:id, :pos_id, :now, :now, 0, :fiscal_doc, :digest)"
        )
    log = os.open(f"{logs}/{seed}-{number}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    engine = create_buffer_engine(path)
    if fault == "has no guard":
        with engine.begin() as connection:
            connection.exec_driver_sql("DROP TRIGGER IF EXISTS trg_guard_capacity")
    repository = ReceiptRepository(engine, now=lambda: time.time() + offset)
    workers = [Worker(repository, log, f"{seed} {number} {thread}") for thread in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


for line in sys.stdin:
    seed, offset, *moments = line.split()
    workers = []
    for number, _ in enumerate(moments):
        worker = os.fork()
        if worker == 0:
            try:
                work(number, seed, int(offset))
            finally:
                os._exit(1)
        workers.append(worker)
    began = time.monotonic()
    for moment, worker in sorted(zip(map(float, moments), workers)):
        time.sleep(max(0, began + moment - time.monotonic()))
        os.kill(worker, signal.SIGKILL)
    print(*(os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) for worker in workers), flush=True)
"""


class Shop:
    """One buffer, the workers that are killed over it, and the books about both."""

    def __init__(self, stack, path, folder, seed, fault="nothing"):
        engine = create_buffer_engine(path)
        repository = ReceiptRepository(engine)
        settings = {"buffer_capacity": CAPACITY, "retry_backoff_initial": 0, "retry_backoff_max": 0}
        settings |= {"retention_synced_days": 0, "retention_dlq_days": 0, "max_retry_attempts": 3}
        for key, value in settings.items():
            repository.set_config(key, value)
        engine.dispose()
        self.path, self.folder, self.chance, self.seed = path, folder, random.Random(seed), seed
        self.logs = folder / "logs"
        self.logs.mkdir()
        self.launcher = stack.enter_context(start_python(LAUNCHER, path, self.logs, fault, stdin=-1))
        stack.callback(self.launcher.kill)
        self.rounds = 0
        self.clock = 0  # how far the clock of the last round was ahead
        self.tried, self.acknowledged, self.pruned = set(), [], 0
        self.sent = []  # (receipt, whether the kill came before the worker said anything more)
        self.last_hlc = (0, 0)

    def play(self):
        """One round: the load, the kills, and what the logs say."""
        self.rounds += 1
        seed = f"{self.seed}.{self.rounds}"
        # By turns the clock has gone on, or was set back; either way the leases of the dead are over, and no lease of
        # the living ends in the middle of a round.
        self.clock += self.chance.choice((1000, 1000, -1500))
        first = self.chance.choice((0.02, 0.2, 0.4)) + self.chance.random() * 0.3
        moments = [first + self.chance.choice((0, 0, 0.1)) * self.chance.random() for _ in range(PROCESSES)]
        self.launcher.stdin.write(f"{seed} {self.clock} {' '.join(map(str, moments))}\n")
        self.launcher.stdin.flush()
        assert self.launcher.stdout.readline().split() == ["-9"] * PROCESSES
        for log in self.logs.glob(f"{seed}-*"):
            self.read(log)

    def read(self, log):
        """Enter a log into the books."""
        in_flight = {}
        for line in log.read_text().splitlines():
            thread, kind, what = line.split(" ")
            if thread in in_flight:
                self.sent.append((in_flight.pop(thread), False))
            match kind:
                case "T":
                    self.tried.add(what)
                case "A":
                    self.acknowledged.append(what)
                case "S":
                    in_flight[thread] = what
                case "P":
                    self.pruned += int(what)
                case "X":
                    pytest.fail(f"a worker met {what}")
        self.sent += [(receipt, True) for receipt in in_flight.values()]

    @contextlib.contextmanager
    def copy(self):
        """A copy of what the dead left behind. Reading the original would put it in order for the next round."""
        folder = self.folder / "copy"
        folder.mkdir()
        for name in (self.path.name, f"{self.path.name}-wal"):
            if (self.path.parent / name).exists():
                shutil.copy(self.path.parent / name, folder)
        with contextlib.closing(sqlite3.connect(folder / self.path.name)) as connection:
            yield connection
        shutil.rmtree(folder)

    def check(self):
        """Hold the database against the books."""
        with self.copy() as connection:

            def column(statement):
                return [row[0] for row in connection.execute(statement)]

            assert column("PRAGMA integrity_check") == ["ok"]
            assert column("PRAGMA foreign_key_check") == []
            statuses = dict(connection.execute("SELECT id, status FROM receipts"))
            stamps = connection.execute(
                "SELECT hlc_local_time, hlc_logical_counter FROM receipts ORDER BY rowid"
            ).fetchall()
            state = connection.execute("SELECT pending, syncing, synced, failed, open_dead_letters FROM buffer_state")
            counts = dict(
                zip(("pending", "syncing", "synced", "failed", "open_dead_letters"), state.fetchone(), strict=True)
            )
            open_letters = column("SELECT original_receipt_id FROM dlq WHERE resolved_at IS NULL")
            added = column("SELECT receipt_id FROM buffer_events WHERE event_type = 'receipt_added'")
            synced = column("SELECT receipt_id FROM buffer_events WHERE event_type = 'receipt_synced'")
        sent = {receipt for receipt, _ in self.sent}
        actual = Counter(statuses.values())
        assert actual["pending"] + actual["syncing"] <= CAPACITY, "more than the capacity"
        assert set(self.acknowledged) <= set(added), "an acknowledged receipt was never stored"
        assert set(self.acknowledged) - set(statuses) <= sent, "an acknowledged receipt is gone that was never sent"
        assert len(set(added)) == len(added), "a receipt was stored twice"
        assert set(statuses) <= set(added) <= self.tried, "a receipt that nobody made"
        assert set(added) - set(statuses) <= set(synced), "pruned without being delivered"
        assert set(synced) <= sent, "delivered, but the operator does not have it"
        assert len(set(synced)) == len(synced), "delivered twice"
        assert counts == {
            **dict.fromkeys(("pending", "syncing", "synced", "failed"), 0),
            **actual,
            "open_dead_letters": len(open_letters),
        }
        assert sorted(open_letters) == sorted(name for name, status in statuses.items() if status == "failed")
        assert all(one < other for one, other in pairwise(stamps)), "HLC does not increase"
        assert not stamps or stamps[-1] >= self.last_hlc, "HLC went back"
        self.last_hlc = max([self.last_hlc, *stamps])
        recorded = Counter(receipt for receipt, killed in self.sent if not killed)
        again = [receipt for receipt, times in recorded.items() if times > 1]
        assert again == [], "sent again although the first send was recorded"
        return len(self.sent) - len(sent)

    def drain(self):
        """Deliver all that is left, as the next worker would."""
        engine = create_buffer_engine(self.path)
        repository = ReceiptRepository(engine, now=lambda: time.time() + self.clock + 5000)

        def send(receipt):
            self.sent.append((receipt.id, False))
            return int(time.time())

        while True:
            left = repository.get_buffer_status()
            if left.failed and left.pending + left.syncing < CAPACITY:
                repository.requeue_all(actor="Anna", reason="the end")
            if not deliver_pending(repository, send).outcomes:
                break
        left = repository.get_buffer_status()
        engine.dispose()
        assert (0, 0, 0, 0) == (left.pending, left.syncing, left.failed, left.dlq_size)
        assert set(self.acknowledged) <= {receipt for receipt, _ in self.sent}, "never delivered"


@pytest.mark.slow
class TestKills:
    def test_nothing_lost(self, path, tmp_path):
        """Whatever moment the kills fall into: nothing lost, doubled, stuck or out of order, never one too many."""
        seed = random.randrange(10**6)
        print(f"seed {seed}")
        with contextlib.ExitStack() as stack:
            shop = Shop(stack, path, tmp_path, seed)
            began = time.monotonic()
            acknowledged = [0]
            for number in range(ROUNDS):
                shop.play()
                shop.check()
                acknowledged.append(len(shop.acknowledged))
                if number % 10 == 9:
                    print(f"round {number + 1}: {len(shop.acknowledged)} acknowledged, {len(shop.sent)} sent")
            # Not in each round: some are over after 20 ms.
            assert all(before < after for before, after in zip(acknowledged, acknowledged[7:], strict=False))
            seconds = (time.monotonic() - began) / ROUNDS
            shop.drain()
            repeated = shop.check()
        in_flight = sum(killed for _, killed in shop.sent)
        print(
            f"{ROUNDS} rounds of {seconds:.2f} s: {len(shop.acknowledged)} acknowledged, none lost; "
            f"{len(shop.tried) - len(set(shop.acknowledged))} tried without an answer or refused; "
            f"{len(shop.sent)} sends, {in_flight} cut off by a kill, {repeated} sent again; {shop.pruned} pruned"
        )
        assert repeated <= in_flight
        assert shop.pruned

    @pytest.mark.parametrize(
        ("fault", "found"),
        [
            ("acknowledges early", "an acknowledged receipt was never stored"),
            ("does not record", "sent again although the first send was recorded"),
            ("believes itself", "that was never sent|the operator does not have it"),
            ("has no guard", "more than the capacity"),
            ("forgets the clock", "HLC does not increase"),
        ],
    )
    def test_would_be_found(self, path, tmp_path, fault, found):
        """The same check does find a worker that is wrong."""
        with contextlib.ExitStack() as stack:
            shop = Shop(stack, path, tmp_path, 1, fault)
            with pytest.raises(AssertionError, match=found):
                for _ in range(60):
                    shop.play()
                    shop.check()
            print(f"{fault}: found in round {shop.rounds}")
