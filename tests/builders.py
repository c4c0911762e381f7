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
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn, TypeVar

import psycopg
import pytest
from sqlalchemy import Connection, Engine, Pool, event, make_url, text

from kkt_buffer import Receipt, ReceiptRepository, ReceiptStatus, create_buffer_engine
from kkt_buffer.backend import backend_of
from kkt_buffer.testing import NOON as NOON  # noqa: PLC0414 (for the tests)
from kkt_buffer.testing import Clock as Clock  # noqa: PLC0414

T = TypeVar("T")

STATUSES = tuple(str(status) for status in ReceiptStatus)
# For what takes long and does not depend on the database.
on_sqlite_alone = pytest.mark.parametrize("engine", ["memory_engine"], ids=["sqlite"], indirect=True)
# For what a terminal shows, whatever the database.
on_a_file_alone = pytest.mark.parametrize("buffer", ["path"], ids=["sqlite"], indirect=True)
PROOF = bool(os.environ.get("KKT_BUFFER_PROOF"))  # `make proof`: deeper, and nothing may be left out


def a_document(**fields: Any) -> dict[str, Any]:
    """A small ФФД 1.2 document."""
    return {"code": 3, "fiscalDocumentFormatVer": 4, "totalSum": 6490, "user": 'ООО "Ромашка"', **fields}


def new_receipt(**fields: Any) -> dict[str, Any]:
    """What `insert_receipt` takes."""
    return {"pos_id": "till-1", "fiscal_doc": json.dumps(a_document(), ensure_ascii=False), **fields}


def a_foreign_receipt(engine: Engine, receipt_id: str, **columns: Any) -> None:
    """A row as a program writes it that knows no more than the columns which the first schema demanded."""
    row = {"pos_id": "till-1", "created_at": 5, "hlc_local_time": 5, "hlc_logical_counter": 0, "fiscal_doc": "{}"}
    row |= {"id": receipt_id, **columns}
    names, values = ", ".join(row), ", ".join(f":{name}" for name in row)
    with engine.begin() as connection:
        connection.execute(text(f"INSERT INTO receipts ({names}) VALUES ({values})"), row)


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


def fill(buffer: Path | str) -> None:
    """Store a receipt of every status."""
    engine = create_buffer_engine(buffer)
    repository = ReceiptRepository(engine, now=Clock())
    for status in STATUSES:
        a_receipt(repository, status)
    engine.dispose()


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


def drop_trigger(connection: Connection, name: str) -> None:
    """Drop a trigger of receipts; SQLite takes no name of a table."""
    table = "" if connection.dialect.name == "sqlite" else " ON receipts"
    connection.execute(text(f"DROP TRIGGER {name}{table}"))


def snapshot(engine: Engine) -> dict[str, list[tuple[object, ...]]]:
    """All rows of the tables, and the counts: what a refused call must leave as it was."""
    tables = {"receipts": "id", "dlq": "id", "buffer_events": "id", "config": "key", "v_buffer_status": "pending"}
    with engine.connect() as connection:
        return {
            table: [tuple(row) for row in connection.execute(text(f"SELECT * FROM {table} ORDER BY {key}"))]
            for table, key in tables.items()
        }


def stamps(receipts: Iterable[Receipt]) -> list[tuple[int, int]]:
    return [(receipt.hlc_local_time, receipt.hlc_logical_counter) for receipt in receipts]


def story(repository: ReceiptRepository, receipt_id: str) -> list[str]:
    """The types of a receipt's events, oldest first."""
    return [event.event_type for event in reversed(repository.get_events(receipt_id=receipt_id))]


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
    """
    Start a program in a fresh interpreter, under the command `before`; what it prints is read from `stdout`.

    Its coverage is not measured: most of these are killed, or run many times.
    """
    return subprocess.Popen(
        [*before, sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        **{"env": unmeasured(), **options},
    )


@functools.cache
def driver() -> ModuleType:
    """The SQLite library that the package uses. A second library in one process would cancel the locks of the first."""
    engine = create_buffer_engine(":memory:")
    try:
        return backend_of(engine).driver
    finally:
        engine.dispose()


def is_server(buffer: Path | str) -> bool:
    """Is the buffer named by the URL of a server, not by its path?"""
    return str(buffer).startswith("postgresql")


def shown(buffer: Path | str) -> str:
    """The name of a buffer as it is printed: a URL without its password."""
    return make_url(str(buffer)).render_as_string() if is_server(buffer) else str(buffer)


@contextlib.contextmanager
def another_program(buffer: Path | str, **options: Any) -> Iterator[Any]:
    """A connection as another program opens it: the driver's own, in autocommit, closed at the end of the block."""
    if is_server(buffer):
        connection = psycopg.connect(str(buffer).replace("+psycopg", ""), autocommit=True)
    else:
        connection = driver().connect(buffer, isolation_level=None, **options)
    with contextlib.closing(connection):
        yield connection


@contextlib.contextmanager
def commits(engine: Engine) -> Iterator[list[str]]:
    """The COMMITs that the database runs meanwhile; in SQLite, by whatever way they reach it."""
    seen: list[str] = []

    def committed(_connection: object) -> None:
        seen.append("COMMIT")

    def trace(connection: Any, *_: object) -> None:
        connection.set_trace_callback(lambda statement: seen.append(statement) if statement == "COMMIT" else None)

    def untrace(connection: Any, *_: object) -> None:
        connection.set_trace_callback(None)

    if engine.dialect.name != "sqlite":
        event.listen(engine, "commit", committed)
        yield seen
        event.remove(engine, "commit", committed)
        return
    event.listen(engine, "checkout", trace)
    event.listen(engine, "checkin", untrace)
    yield seen
    event.remove(engine, "checkout", trace)
    event.remove(engine, "checkin", untrace)


@contextlib.contextmanager
def checkouts() -> Iterator[list[object]]:
    """The pooled connections that are in use, of those taken since the block began, from whichever pool."""
    taken: list[object] = []

    def took(_connection: object, record: object, _proxy: object) -> None:
        taken.append(record)

    def gave(_connection: object, record: object) -> None:
        if record in taken:
            taken.remove(record)

    event.listen(Pool, "checkout", took)
    event.listen(Pool, "checkin", gave)
    try:
        yield taken
    finally:
        event.remove(Pool, "checkout", took)
        event.remove(Pool, "checkin", gave)


def open_files(path: Path) -> list[str]:
    """The database's files that this process has open, once for each descriptor."""
    names = []
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one that listed them
            names.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    return sorted(name for name in names if name.startswith(str(path)))


def everything(buffer: Path | str) -> list[str]:
    """All that a database holds, as SQL, read by a process of its own; of a server, the rows of each table."""
    if is_server(buffer):
        with another_program(buffer) as db:
            tables = db.execute("SELECT tablename FROM pg_tables WHERE schemaname = current_schema() ORDER BY 1")
            return [
                f"{table}: {row}"
                for (table,) in tables.fetchall()
                for row in sorted(map(str, db.execute(f"TABLE {table}")))
            ]
    program = """
        import contextlib, sqlite3, sys
        with contextlib.closing(sqlite3.connect(sys.argv[1])) as db:
            print(*db.iterdump(), sep="\\n")
    """
    return run_python(program, buffer).stdout.splitlines()
