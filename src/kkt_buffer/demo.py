"""
`kkt-buffer demo`: a day of two tills and a worker on a real database file, with processes killed in the middle.

Only the registers and the OFD (ОФД) are simulated, by files in a temporary folder, which all processes see.
"""

import contextlib
import logging
import multiprocessing
import os
import signal
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from sqlalchemy import func, select

from kkt_buffer.engine import create_buffer_engine
from kkt_buffer.errors import BufferFullError, DeliveryRejected, DeliveryUnavailable
from kkt_buffer.migrate import current, upgrade
from kkt_buffer.models import Receipt
from kkt_buffer.repository import ReceiptData, ReceiptRepository
from kkt_buffer.worker import DeliveryWorker

TILLS = ("demo-till-1", "demo-till-2")
SALES = 20  # of each till
KILL_TILL_AFTER = 8
KILL_WORKER_AFTER = 15  # in the middle of its second batch
REJECTED_SALE = 15  # the number of the sale that the OFD rejects
UNKNOWN_TAX = 99
SETTINGS = {"lease_seconds": 2, "circuit_breaker_threshold": 2, "circuit_breaker_timeout": 1}
SECONDS_TO_ANSWER = 0.02
TIMEOUT_SECONDS = 60.0

GOODS = (("Хлеб «Дарницкий» 700 г", 6490), ('Сыр "Российский" 45%', 79900), ("Вода пит. негаз. 0,5Л", 4500))

Say = Callable[[str], None]


def plain_receipt(number: int) -> dict[str, Any]:
    """A plausible ФФД 1.2 document that is not printed yet; money is whole kopecks."""
    tax = UNKNOWN_TAX if number == REJECTED_SALE else 2
    items = [
        {"name": name, "price": price, "quantity": 1, "sum": price, "nds": tax, "paymentType": 4, "productType": 1}
        for name, price in GOODS[: 1 + number % len(GOODS)]
    ]
    total = sum(price for _, price in GOODS[: len(items)])
    return {
        "code": 3,
        "dateTime": f"2026-03-01T12:{number % 60:02d}:00",
        "fiscalDocumentFormatVer": 4,
        "fiscalDocumentNumber": None,
        "operationType": 1,
        "taxationType": 1,
        "user": 'ООО "Ромашка"',
        "items": items,
        "totalSum": total,
        "cashTotalSum": total,
        "ecashTotalSum": 0,
    }


class Journal:
    """A file with a line for each thing that happened, which survives the process that writes it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.touch()

    def append(self, line: str) -> None:
        """Add a line."""
        with self._path.open("a") as file:
            file.write(f"{line}\n")

    @property
    def lines(self) -> list[str]:
        """All lines, oldest first."""
        return self._path.read_text().splitlines()


class Ofd:
    """The simulated OFD, as a sender."""

    def __init__(self, folder: Path) -> None:
        self.received = Journal(folder / "received")
        self._offline, self._corrected = folder / "offline", folder / "corrected"

    def __call__(self, receipt: Receipt) -> int:
        """Accept a receipt; returns the OFD's time."""
        time.sleep(SECONDS_TO_ANSWER)
        if self._offline.exists():
            raise DeliveryUnavailable("no route to the OFD")  # pragma: no cover (this process is always killed)
        if receipt.document["items"][0]["nds"] == UNKNOWN_TAX and not self._corrected.exists():
            raise DeliveryRejected("unknown tax rate")
        self.received.append(receipt.id)
        return int(time.time())

    def go_offline(self) -> None:
        """Answer nobody."""
        self._offline.touch()

    def come_back(self) -> None:
        """Answer again."""
        self._offline.unlink()

    def correct_tax_table(self) -> None:
        """Accept the poisonous receipt from now on."""
        self._corrected.touch()


def _sell(path: str, folder: Path, till: str, sales: dict[str, int], sold: Connection) -> None:
    """The process of a till: store each receipt, print it, complete it, and only then tell that it is sold."""
    printed = Journal(folder / till)  # the memory of the fiscal drive
    with _open(path) as repository:
        for receipt_id, number in sales.items():
            receipt: ReceiptData = {"id": receipt_id, "pos_id": till, "fiscal_doc": plain_receipt(number)}
            # If the till does not know whether an insert succeeded, it repeats it with the same id: it is stored once.
            repository.insert_receipt(receipt, hold=True, exist_ok=True)
            # What an earlier process has left is held too. Ask the drive first: it may have printed that.
            for held in repository.list_held(pos_id=till):
                if held.id not in printed.lines:  # pragma: no branch (a kill seldom falls between print and completion)
                    printed.append(held.id)
                fields = {"fiscalDocumentNumber": printed.lines.index(held.id) + 1, "fiscalSign": 3141592653}
                repository.update_receipt_fiscal_doc(held.id, fields)
            sold.send(receipt_id)


def _work(path: str, ofd: Ofd) -> None:
    """The process of a worker: deliver until SIGTERM."""
    with _open(path) as repository:
        DeliveryWorker(repository, ofd, batch=10, poll_seconds=0.1).run()


@contextlib.contextmanager
def _open(path: str) -> Iterator[ReceiptRepository]:
    engine = create_buffer_engine(path)
    try:
        yield ReceiptRepository(engine)
    finally:
        engine.dispose()


def run(path: str, operate: Callable[..., None], say: Say = print) -> None:
    """
    Play the day on the buffer at `path`, created if missing, and print each step.

    `operate` runs a command of the command line, given as words. Raises `BufferFullError` if the buffer has no room.
    """
    say("A day at two tills. The buffer, the files and the kills are real; registers and OFD (ОФД) are simulated.\n")
    if path == ":memory:":
        raise ValueError("path: the demo needs a file, because several processes open it")
    with contextlib.ExitStack() as stack:
        repository = stack.enter_context(_open(path))
        upgrade(repository.engine)
        _refuse_real_receipts(repository)
        _refuse_full(repository)
        say(f"1. The buffer is {path}, its schema is {current(repository.engine)}.")
        for key, value in SETTINGS.items():
            stack.callback(repository.set_config, key, repository.get_config(key) or value)
            repository.set_config(key, value)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        _Day(path, repository, folder, stack, say).play(operate)


def _refuse_real_receipts(repository: ReceiptRepository) -> None:
    with repository.reading() as session:
        real = session.scalar(select(func.count()).where(Receipt.pos_id.not_in(TILLS)))
    if real:
        raise ValueError(
            f"path: this buffer holds {real} receipts that are not the demo's, and the demo would mark them as "
            "delivered. Nothing was changed. Use another file for the demo."
        )


def _refuse_full(repository: ReceiptRepository) -> None:
    status = repository.get_buffer_status()
    waiting, wanted = status.undelivered, len(TILLS) * SALES
    if waiting + wanted > status.capacity:
        raise BufferFullError(waiting, status.capacity, wanted)


class _Day:
    def __init__(
        self, path: str, repository: ReceiptRepository, folder: Path, stack: contextlib.ExitStack, say: Say
    ) -> None:
        self._path = path
        self._repository = repository
        self._folder = folder
        self._stack = stack
        self._say = say
        self._ofd = Ofd(folder)
        numbers = iter(range(len(TILLS) * SALES))
        self._sales = {till: {str(uuid.uuid4()): next(numbers) for _ in range(SALES)} for till in TILLS}
        self._sold: list[str] = []

    def play(self, operate: Callable[..., None]) -> None:
        self._sell_offline()
        worker = self._deliver_with_a_kill()
        self._decide(operate)
        os.kill(worker.pid or 0, signal.SIGTERM)
        self._finish(worker)
        self._say("   The service stops: on SIGTERM the worker ends, with status 0.")
        self._settle_accounts()

    def _sell_offline(self) -> None:
        self._ofd.go_offline()
        self._worker = self._start(_work, self._ofd)
        self._say("2. The OFD is offline. Two tills sell: each receipt is stored, then printed, then completed.")
        first, second = (self._start_till(till) for till in TILLS)
        self._await("sales", lambda: len(self._of(TILLS[0])) >= KILL_TILL_AFTER or not first.is_alive())
        _kill(first)
        self._say(f"   After {len(self._of(TILLS[0]))} sales of {TILLS[0]} its process is killed with SIGKILL.")
        again = self._start_till(TILLS[0])
        self._finish(again, second)
        missing = [sold for sold in self._sold if self._repository.get_receipt_by_id(sold) is None]
        if missing:
            raise RuntimeError(f"{len(missing)} acknowledged receipts are not in the buffer: {missing}")
        self._say("   It starts again, asks its register what is printed already, and goes on.")
        self._say(f"3. All {len(set(self._sold))} receipts that were acknowledged are there.")
        self._await("circuit_opened", lambda: self._repository.get_buffer_status().circuit_opened_at is not None)
        self._say("   The worker has opened its circuit: it only asks now and then. No attempt is counted.")

    def _deliver_with_a_kill(self) -> SpawnProcess:
        self._ofd.come_back()
        self._await("deliveries", lambda: len(self._ofd.received.lines) >= KILL_WORKER_AFTER)
        _kill(self._worker)
        received, leased = len(self._ofd.received.lines), self._repository.get_buffer_status().syncing
        self._say(
            f"4. The OFD is back. It has {received} when the worker is killed with SIGKILL, with {leased} leased."
        )
        worker = self._start(_work, self._ofd)
        self._say(f"   Another worker starts. In {SETTINGS['lease_seconds']} s (here; usually 60) the leases are over.")
        self._await("an empty buffer", self._is_empty)
        failed = self._repository.get_buffer_status().failed
        self._say(
            f"5. It has delivered the rest; {failed} is rejected, and a dead letter now. Anna operates the tills:\n"
        )
        return worker

    def _decide(self, operate: Callable[..., None]) -> None:
        operate("dead-letters", self._path)
        self._ofd.correct_tax_table()
        corrected = "the OFD has corrected its table"
        operate("requeue", "--db", self._path, "--error", "tax rate", "--actor", "Anna", "--reason", corrected)
        self._await("an empty buffer", self._is_empty)
        self._say("6. The worker delivers it at once.")

    def _settle_accounts(self) -> None:
        received = Counter(self._ofd.received.lines)
        printed = Counter(line for till in TILLS for line in Journal(self._folder / till).lines)
        sold = {receipt_id for sales in self._sales.values() for receipt_id in sales}
        if not sold <= received.keys() or not sold <= printed.keys() or max(printed.values()) > 1:
            raise RuntimeError(f"{len(sold)} sold, {printed.total()} printed, {len(received)} at the OFD: {printed}")
        twice = received.total() - len(received)
        self._say(f"7. {len(sold)} sales: each was printed once, and the OFD has all of them.")
        self._say(f"   Sent twice, because of the kill: {twice}. The OFD knows a receipt by its fiscal number.\n")

    def _is_empty(self) -> bool:
        return self._repository.get_buffer_status().undelivered == 0

    def _of(self, till: str) -> list[str]:
        return [sold for sold in self._sold if sold in self._sales[till]]

    def _start_till(self, till: str) -> SpawnProcess:
        receiver, sender = multiprocessing.get_context("spawn").Pipe(duplex=False)
        process = self._start(_sell, self._folder, till, self._sales[till], sender)
        sender.close()
        reader = threading.Thread(target=self._read, args=(receiver,))
        reader.start()
        self._stack.callback(reader.join)
        return process

    def _read(self, receiver: Connection) -> None:
        with receiver, contextlib.suppress(EOFError):
            while True:
                self._sold.append(receiver.recv())

    def _start(self, work: Callable[..., None], *arguments: object) -> SpawnProcess:
        process = multiprocessing.get_context("spawn").Process(target=_quietly, args=(work, self._path, *arguments))
        process.start()
        self._stack.callback(process.join)
        self._stack.callback(process.kill)  # does nothing once it has ended
        return process

    def _finish(self, *processes: SpawnProcess) -> None:
        for process in processes:
            process.join()
            if process.exitcode != 0:
                raise RuntimeError(f"a process of the demo has failed, with status {process.exitcode}")

    def _await(self, what: str, is_there: Callable[[], bool]) -> None:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not is_there():
            if time.monotonic() > deadline:
                raise RuntimeError(f"the demo has waited {TIMEOUT_SECONDS:g} s for {what}")
            time.sleep(0.02)


def _kill(process: SpawnProcess) -> None:
    process.kill()
    process.join()


def _quietly(work: Callable[..., None], *arguments: object) -> None:
    logging.getLogger("kkt_buffer").setLevel(logging.CRITICAL)  # the story is told by the parent
    work(*arguments)
