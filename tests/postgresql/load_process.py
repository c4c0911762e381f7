"""
The tills or the workers of the load: `python load_process.py JSON`, which says how many.

They are forked once everything is imported. Each prints "ready" when it has opened the buffer, and stops at the end of
the standard input. Each line of a log is written whole, with one call, before anything else happens: "seconds kind key
receipt", by the monotonic clock, which all processes of a machine share.
"""

import json
import logging
import os
import sys
import threading
import time
import uuid
from typing import Any

from kkt_buffer import (
    BufferFullError,
    DeliveryWorker,
    OutcomeUnknownError,
    ReceiptRepository,
    create_buffer_engine,
)
from kkt_buffer.errors import BufferStorageError

RETRY_SECONDS = 0.02


class Log:
    """The log of one process."""

    def __init__(self, path: str) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def write(self, *words: object) -> None:
        line = " ".join([f"{time.monotonic():.4f}", *map(str, words)]).replace("\n", " ")
        os.write(self._descriptor, f"{line}\n".encode())


class Till:
    """Threads that insert receipts one after the other, as services do: half of them give each receipt an id."""

    def __init__(self, repository: ReceiptRepository, log: Log, name: str) -> None:
        self._repository = repository
        self._log = log
        self._name = name
        self._is_stopping = threading.Event()

    def run(self, threads: int) -> None:
        sellers = [threading.Thread(target=self._sell_all, args=[number]) for number in range(threads)]
        for seller in sellers:
            seller.start()
        sys.stdin.read()
        self._is_stopping.set()
        for seller in sellers:
            seller.join()

    def _sell_all(self, thread: int) -> None:
        number = 0
        while not self._is_stopping.is_set():
            self._sell(f"{self._name}/{thread}/{number}", has_id=thread % 2 == 0)
            number += 1

    def _sell(self, key: str, *, has_id: bool) -> None:
        """With an id of its own a receipt is sent until it is acknowledged; without one, once: a repeat is another."""
        receipt = {"pos_id": self._name, "fiscal_doc": {"key": key, "items": "x" * 500}}
        if has_id:
            receipt["id"] = str(uuid.uuid4())
        while not self._is_stopping.is_set():
            try:
                self._log.write("acknowledged", key, self._repository.insert_receipt(receipt, exist_ok=True))
            except (BufferStorageError, OutcomeUnknownError) as error:
                self._log.write("failed", key, f"{type(error).__name__}: {error}")
                self._is_stopping.wait(RETRY_SECONDS)
                if has_id:
                    continue
            except BufferFullError:
                self._is_stopping.wait(RETRY_SECONDS)
                continue
            except Exception as error:  # noqa: BLE001 (told by the log, and the test fails)
                self._log.write("unexpected", key, repr(error))
            return


def work(repository: ReceiptRepository, log: Log) -> None:
    """Deliver until the end of the standard input."""

    def send(receipt):
        log.write("delivered", receipt.document["key"], receipt.id)
        return int(time.time())

    with DeliveryWorker(repository, send, poll_seconds=0.1):
        sys.stdin.read()


def run(task: dict[str, Any], name: str) -> None:
    """One process."""
    repository = ReceiptRepository(create_buffer_engine(task["url"], **task["options"]))
    repository.get_buffer_status()
    log = Log(f"{task['folder']}/{name}.log")
    logging.getLogger("kkt_buffer").addHandler(logging.NullHandler())  # a worker tells of every connection that is lost
    os.write(1, b"ready\n")
    if threads := task["threads"]:
        Till(repository, log, name).run(threads)
    else:
        work(repository, log)


def main() -> None:
    task = json.loads(sys.argv[1])
    children = []
    for number in range(task["processes"]):
        child = os.fork()
        if child == 0:
            run(task, f"{task['name']}-{number}")
            os._exit(0)
        children.append(child)
    sys.exit(max(os.waitpid(child, 0)[1] for child in children) and 1)


if __name__ == "__main__":
    main()
