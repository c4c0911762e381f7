"""
`kkt-buffer demo`: one shift of a till on a real database file, with processes killed in the middle.

Only the OFD (ОФД) and the goods are simulated.
"""

import contextlib
import logging
import multiprocessing
import os
import signal
import time
import uuid
from collections.abc import Callable
from typing import Any

from sqlalchemy import func, select

from kkt_buffer.backend import READ_ONLY
from kkt_buffer.config import CONFIG_RULES
from kkt_buffer.delivery import Outcome, deliver_pending
from kkt_buffer.engine import create_buffer_engine
from kkt_buffer.errors import BufferFullError, DeliveryRejected, DeliveryUnavailable
from kkt_buffer.migrate import current, upgrade
from kkt_buffer.models import Receipt
from kkt_buffer.repository import ReceiptData, ReceiptRepository

RECEIPTS_PER_SHIFT = 60
KILL_AFTER = 40
ALL = 1_000_000
TILL = "demo-till"
LEASE_SECONDS = 2
SECONDS_TO_ANSWER = 0.005

GOODS = (("Хлеб «Дарницкий» 700 г", 6490), ('Сыр "Российский" 45%', 79900), ("Вода пит. негаз. 0,5Л", 4500))


def plain_receipt(number: int) -> dict[str, Any]:
    """A plausible ФФД 1.2 document: one to three goods, paid in cash; money is whole kopecks."""
    items = [
        {"name": name, "price": price, "quantity": 1, "sum": price, "nds": 2, "paymentType": 4, "productType": 1}
        for name, price in GOODS[: 1 + number % len(GOODS)]
    ]
    total = sum(price for _, price in GOODS[: len(items)])
    return {
        "code": 3,
        "dateTime": f"2026-03-01T12:{number % 60:02d}:00",
        "fiscalDocumentFormatVer": 4,
        "fiscalDocumentNumber": 48_000 + number,
        "operationType": 1,
        "taxationType": 1,
        "user": 'ООО "Ромашка"',
        "items": items,
        "totalSum": total,
        "cashTotalSum": total,
        "ecashTotalSum": 0,
    }


Receipts = list[ReceiptData]


def _sell(path: str, receipts: Receipts, acknowledge: Callable[[str], None]) -> None:
    """The till's process: store each receipt in the buffer before the next customer."""
    with contextlib.closing(_Buffer(path)) as buffer:
        for receipt in receipts:
            # If the till does not know whether an insert succeeded, it repeats it with the same id: it is stored once.
            acknowledge(buffer.repository.insert_receipt(receipt, exist_ok=True))


def _work(path: str, receive: Callable[[str], None]) -> None:  # pragma: no cover (its process is always killed)
    """The worker's process: deliver the receipts that are due to a simulated OFD that needs some time for each."""

    def send(receipt: Receipt) -> int:
        receive(receipt.id)
        time.sleep(SECONDS_TO_ANSWER)
        return int(time.time())

    with contextlib.closing(_Buffer(path)) as buffer:
        deliver_pending(buffer.repository, send, ALL)


class _Buffer:
    def __init__(self, path: str) -> None:
        self.engine = create_buffer_engine(path)
        self.repository = ReceiptRepository(self.engine)

    def close(self) -> None:
        self.engine.dispose()


def run(path: str, say: Callable[[str], None] = print) -> None:
    """
    Run the shift on the buffer at `path`, created if missing, and print each step.

    Raises `BufferFullError` if the buffer has no room for a shift.
    """
    say("A shift at the till. The buffer, the files and the kills are real; only the OFD (ОФД) is simulated.\n")
    with contextlib.closing(_Buffer(path)) as buffer:
        if buffer.engine.url.database == ":memory:":
            raise ValueError("path: the demo needs a file, because several processes open it")
        upgrade(buffer.engine)
        _refuse_real_receipts(buffer)
        say(f"1. The buffer is {path}, its schema is {current(buffer.engine)}.")
        _refuse_full(buffer.repository, say)
        usual = buffer.repository.get_config("lease_seconds")
        buffer.repository.set_config("lease_seconds", LEASE_SECONDS)
        try:
            _play(path, buffer.repository, say)
        finally:
            buffer.repository.set_config("lease_seconds", usual or LEASE_SECONDS)


def _refuse_real_receipts(buffer: "_Buffer") -> None:
    with buffer.engine.execution_options(**{READ_ONLY: True}).connect() as connection:
        real = connection.scalar(select(func.count()).where(Receipt.pos_id != TILL))
    if real:
        raise ValueError(
            f"path: this buffer holds {real} receipts that are not the demo's, and the demo would mark them as "
            "delivered. Nothing was changed. Use another file for the demo."
        )


def _refuse_full(repository: ReceiptRepository, say: Callable[[str], None]) -> None:
    before = repository.get_buffer_status()
    waiting = before.pending + before.syncing
    if waiting:
        say(f"   {waiting} receipts of an earlier run are still waiting in it.")
    if waiting + RECEIPTS_PER_SHIFT > before.capacity:
        raise BufferFullError(waiting, before.capacity, RECEIPTS_PER_SHIFT)


def _play(path: str, repository: ReceiptRepository, say: Callable[[str], None]) -> None:
    receipts: Receipts = [
        {"id": str(uuid.uuid4()), "pos_id": TILL, "fiscal_doc": plain_receipt(number)}
        for number in range(RECEIPTS_PER_SHIFT)
    ]
    say("2. The OFD is offline. The till sells, and every receipt is on disk before the customer leaves.")
    acknowledged = _until_killed(_sell, (path, receipts), KILL_AFTER)
    say(f"   After {len(acknowledged)} receipts its process is killed with SIGKILL while it works.")
    missing = [receipt_id for receipt_id in acknowledged if repository.get_receipt_by_id(receipt_id) is None]
    if missing:
        raise RuntimeError(f"{len(missing)} acknowledged receipts are not in the buffer: {missing}")
    say(f"3. A new process checks: all {len(acknowledged)} acknowledged receipts are there, none is missing.")
    _sell(path, receipts[len(acknowledged) :], acknowledged.append)
    say(f"   The till goes on and finishes the shift with {len(acknowledged)} receipts.")

    def offline(_receipt: Receipt) -> int:
        raise DeliveryUnavailable("no route to the OFD")

    report = deliver_pending(repository, offline, ALL)
    say(f"4. A worker tries to deliver: {report.outage}.")
    say(f"   All {len(report.outcomes)} receipts are released, and no attempt is counted.")

    say("5. The OFD is back. A worker starts to deliver, in the order in which the receipts were made.")
    received = _until_killed(_work, (path,), KILL_AFTER // 2)
    leased = repository.get_buffer_status().syncing
    say(f"   The OFD has {len(received)} when the worker is killed with SIGKILL; it had leased {leased} more.")
    usually = CONFIG_RULES["lease_seconds"].default
    say(f"   Nothing is stuck: in {LEASE_SECONDS} s (here; usually {usually}) its leases expire.")
    time.sleep(LEASE_SECONDS + 1)

    fixed: list[str] = []
    rejected = min(set(acknowledged) - set(received))

    def online(receipt: Receipt) -> int:
        if receipt.id == rejected and not fixed:
            raise DeliveryRejected("unknown tax rate")
        received.append(receipt.id)
        return int(time.time())

    report = deliver_pending(repository, online, ALL)
    say(f"6. Another worker delivers {report.count(Outcome.SYNCED)}; one is rejected, and becomes a dead letter.")
    fixed.append("the tax table")
    repository.requeue(rejected, actor="Anna, support", reason="the OFD has corrected its tax table")
    report = deliver_pending(repository, online)
    say("7. Anna, who operates the tills, asks the OFD to correct its tax table.")
    say(f"   Then she requeues it: {report.count(Outcome.SYNCED)} more delivered.")
    left = repository.get_buffer_status()
    if left.pending or left.syncing:
        raise RuntimeError(f"the buffer should be empty, but {left.pending + left.syncing} receipts are waiting")
    twice = len(received) - len(set(received))
    say(f"   The OFD has all of them, {twice} of them twice: those being sent when the worker was killed.\n")


def _quietly(work: Callable[..., None], *arguments: object) -> None:
    logging.getLogger("kkt_buffer").setLevel(logging.ERROR)  # the parent has logged the same warnings already
    work(*arguments)


def _until_killed(work: Callable[..., None], arguments: tuple[Any, ...], count: int) -> list[str]:
    """Run the work in another process, kill it when it has reported `count` ids, and return all ids it reported."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_quietly, args=(work, *arguments, sender.send))
    process.start()
    sender.close()
    reported: list[str] = []
    # It may report a few more ids before the signal arrives.
    with contextlib.suppress(EOFError):
        while True:
            reported.append(receiver.recv())
            if len(reported) == count:
                os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    if process.exitcode not in {0, -signal.SIGKILL}:
        raise RuntimeError(f"the process failed before it could be killed, with status {process.exitcode}")
    return reported
