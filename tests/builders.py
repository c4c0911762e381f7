"""What tests are made of: receipts, a clock to turn by hand, programs to run beside us."""

import contextlib
import faulthandler
import functools
import json
import os
import subprocess
import sys
import textwrap
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import pytest
from sqlalchemy import Engine, event

from kkt_buffer import Receipt, ReceiptRepository, ReceiptStatus, create_buffer_engine
from kkt_buffer.sqlite.engine import driver_of

if TYPE_CHECKING:
    import sqlite3

T = TypeVar("T")

NOON = 1_772_366_400  # 2026-03-01 12:00 UTC
PROOF = bool(os.environ.get("KKT_BUFFER_PROOF"))  # `make proof`: deeper, and nothing may be left out


@dataclass
class Clock:
    """A wall clock that stands still until a test moves it."""

    seconds: float = NOON

    def __call__(self) -> float:
        return self.seconds


def a_document(**fields: Any) -> dict[str, Any]:
    """A small ФФД 1.2 document."""
    return {"code": 3, "fiscalDocumentFormatVer": 4, "totalSum": 6490, "user": 'ООО "Ромашка"', **fields}


def new_receipt(**fields: Any) -> dict[str, Any]:
    """What `insert_receipt` takes."""
    return {"pos_id": "till-1", "fiscal_doc": json.dumps(a_document(), ensure_ascii=False), **fields}


def a_receipt(repository: ReceiptRepository, status: str = "pending", **fields: Any) -> Receipt:
    """A stored receipt, brought to `status` in the way that a service would."""
    receipt_id = repository.insert_receipt(new_receipt(**fields))
    if status == ReceiptStatus.FAILED:
        repository.move_to_dlq(receipt_id, "rejected")
    elif status == ReceiptStatus.SYNCED:
        repository.mark_synced(receipt_id, NOON + 5)
    elif status != ReceiptStatus.PENDING:
        repository.update_receipt_status(receipt_id, status)
    receipt = repository.get_receipt_by_id(receipt_id)
    assert receipt is not None
    return receipt


def together(n: int, work: Callable[[int], T]) -> list[T]:
    """
    Run work(0) … work(n - 1) in threads that begin at one moment; returns their results in this order.

    Raises what the first of them raised. A thread that hangs for a minute is a failure that shows every stack.
    """
    start = threading.Barrier(n)

    def run(number: int) -> T:
        start.wait()
        return work(number)

    executor = ThreadPoolExecutor(n)
    try:
        futures = [executor.submit(run, number) for number in range(n)]
        _, hanging = wait(futures, timeout=60)
        if hanging:
            faulthandler.dump_traceback()
            os._exit(70)  # not pytest.fail: the interpreter would wait for the threads at exit
        return [future.result() for future in futures]
    finally:
        executor.shutdown()


def an_id() -> str:
    return str(uuid.uuid4())


def unproven(reason: str) -> NoReturn:
    """Say loudly what this machine cannot show; where everything has to be shown, that is a failure."""
    if PROOF:
        pytest.fail(f"NOT PROVEN: {reason}")
    pytest.skip(f"NOT PROVEN: {reason}")


def unmeasured() -> dict[str, str]:
    """The environment of a program whose coverage is not measured."""
    return {name: value for name, value in os.environ.items() if not name.startswith("COV")}


def run_python(program: str, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program in a fresh interpreter, and fail with what it printed if it fails."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **options,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def start_python(program: str, *arguments: object, before: Iterable[str] = (), **options: Any) -> subprocess.Popen[str]:
    """Start a program in a fresh interpreter, under the command `before`; what it prints is read from `stdout`."""
    return subprocess.Popen(
        [*before, sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        **options,
    )


@functools.cache
def driver() -> ModuleType:
    """The SQLite library that the package uses. A second library in one process would cancel the locks of the first."""
    engine = create_buffer_engine(":memory:")
    try:
        return driver_of(engine)
    finally:
        engine.dispose()


@contextlib.contextmanager
def another_program(path: Path, **options: Any) -> "Iterator[sqlite3.Connection]":
    """A connection as another program opens it: of plain SQLite, in autocommit, closed at the end of the block."""
    with contextlib.closing(driver().connect(path, isolation_level=None, **options)) as connection:
        yield connection


@contextlib.contextmanager
def commits(engine: Engine) -> Iterator[list[str]]:
    """The COMMITs that SQLite runs meanwhile, by whatever way they reach it."""
    seen: list[str] = []

    def trace(connection: Any, *_: object) -> None:
        connection.set_trace_callback(lambda statement: seen.append(statement) if statement == "COMMIT" else None)

    engine.pool.dispose()  # so that every connection comes by
    event.listen(engine, "connect", trace)
    yield seen
    event.remove(engine, "connect", trace)
    engine.pool.dispose()


def open_files(path: Path) -> list[str]:
    """The database's files that this process has open, once for each descriptor."""
    names = []
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one that listed them
            names.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    return sorted(name for name in names if name.startswith(str(path)))


def everything(path: Path) -> list[str]:
    """All that a database holds, as SQL, read by a process of its own."""
    program = "import sqlite3, sys; print(*sqlite3.connect(sys.argv[1]).iterdump(), sep='\\n')"
    return run_python(program, path).stdout.splitlines()
