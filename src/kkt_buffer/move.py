"""
`move`: an SQLite buffer to a PostgreSQL server, whole. The file keeps every row, and takes no more changes.

Everything on the server is done in one transaction: a move that was interrupted has left nothing there, and begins anew
when it is run again. The mark of the move, `move_id`, is a setting of both buffers: it tells an unfinished move from a
finished one. Of a finished one the source has `moved_at` too: it is a copy from then on, and not moved again.
"""

import hashlib
import textwrap
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy import Connection, Engine, Integer, text
from sqlalchemy.exc import DBAPIError

from kkt_buffer.backend import READ_ONLY, backend_of
from kkt_buffer.config import MOVED_AT, MOVED_TO
from kkt_buffer.errors import BufferDamagedError, BufferMovedError, BufferStorageError
from kkt_buffer.migrate import RELEASE_KEY, current, require, upgrade
from kkt_buffer.models import metadata
from kkt_buffer.operations.settings import VALUE
from kkt_buffer.progress import progress
from kkt_buffer.repository import ReceiptRepository
from kkt_buffer.sqlite.schema import moved_triggers

if TYPE_CHECKING:
    import sqlite3

_MOVING = "trg_moving"  # known to kkt_why_refused() too
MOVE_ID = "move_id"  # key in `config`
ROWS_AT_ONCE = 100
_WITH_TRIGGERS = ("receipts", "dlq", "buffer_events")

Row = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Moved:
    """What was moved: the number of rows of each table. `is_repeated`: by an earlier run; this one changed nothing."""

    rows: Mapping[str, int]
    seconds: float = 0.0
    is_repeated: bool = False


class _Part:
    """One table of the source, the table of the target that takes its rows, and the rows that are moved."""

    def __init__(self, name: str, *, into: str = "", columns: str = "", where: str = "") -> None:
        self.name = name
        self.into = into or name
        self.where = where
        table = metadata.tables[name]
        self.columns = columns.split() or [column.name for column in table.columns]
        self.types = [int if isinstance(table.columns[column].type, Integer) else str for column in self.columns]

    def count(self, connection: Connection) -> int:
        """The number of rows."""
        return connection.scalar(text(f"SELECT COUNT(*) FROM {self.name}{self.where}")) or 0

    def rows(self, connection: Connection, what: str) -> Iterator[Row]:
        """The rows, on either engine, a few at a time."""
        total = self.count(connection)
        query = text(f"SELECT {', '.join(self.columns)} FROM {self.name}{self.where}")
        with (
            progress(f"{what} {self.name}", total) as report,
            connection.execute(query.execution_options(yield_per=ROWS_AT_ONCE)) as found,
        ):
            for number, row in enumerate(found, start=1):
                report(number)
                yield tuple(row)

    def refuse_unfit(self, connection: Connection) -> None:
        """Raise `BufferStorageError` for a value of the source that a server cannot store."""
        for row in self.rows(connection, "checking"):
            for column, kind, value in zip(self.columns, self.types, row, strict=True):
                if value is None or (type(value) is kind and (kind is int or "\0" not in str(value))):
                    continue
                raise BufferStorageError(
                    f"{backend_of(connection.engine)}: {column} of the row {row[0]!r} of {self.name} is no "
                    f"{'whole number' if kind is int else 'text in UTF-8 without NUL characters'}, which a server "
                    "cannot store. Nothing was changed or moved. Deliver and prune it, or correct it; then move again."
                )


# A dead letter refers to its receipt, so it comes later.
_PARTS = (
    _Part("receipts"),
    _Part("dlq"),
    _Part("buffer_events"),
    _Part("config", where=f" WHERE key NOT IN ('{RELEASE_KEY}', 'adopted_rows', '{MOVED_TO}', '{MOVED_AT}')"),
    # The counts; and the greatest timestamp, also that of a receipt which was pruned.
    _Part(
        "buffer_state",
        into="buffer_changes",
        columns="pending syncing synced failed open_dead_letters hlc_local_time hlc_logical_counter last_synced_at",
    ),
)
_LOCK = text(  # readers are not kept out
    "LOCK TABLE receipts, dlq, buffer_events, config IN SHARE ROW EXCLUSIVE MODE"
)
_IS_EMPTY = text(
    f"SELECT hlc_local_time = 0 AND NOT EXISTS (SELECT 1 FROM config WHERE key = '{MOVE_ID}')"
    " AND NOT EXISTS (SELECT 1 FROM receipts) AND NOT EXISTS (SELECT 1 FROM dlq)"
    " AND NOT EXISTS (SELECT 1 FROM buffer_events) FROM buffer_state"
)
_IS_MOVING = text(
    f"SELECT EXISTS (SELECT 1 FROM pg_trigger WHERE tgname = '{_MOVING}' AND tgrelid = 'receipts'::regclass)"
)
_LAST_EVENT = text(
    "SELECT MAX(COALESCE((SELECT MAX(id) FROM buffer_events), 0),"
    " COALESCE((SELECT seq FROM sqlite_sequence WHERE name = 'buffer_events'), 0))"
)
_NEXT_EVENT = text("SELECT setval(pg_get_serial_sequence('buffer_events', 'id'), :next, false)")


class _Content:
    """The number and the digest of the rows that have passed; their order does not matter."""

    def __init__(self) -> None:
        self.rows = self.digest = 0

    def of(self, rows: Iterable[Row]) -> Iterator[Row]:
        """The same rows."""
        for row in rows:
            self.rows += 1
            values = "\0".join(["" if value is None else f"={value}" for value in row])
            self.digest += int.from_bytes(hashlib.sha256(values.encode()).digest())
            yield row


def move(source: Engine, target: Engine) -> Moved:
    """
    Move an SQLite buffer into a PostgreSQL buffer, which is empty or not made yet.

    From the moment at which the copying begins, every change of the source is refused. A move that was interrupted has
    left nothing on the server: repeat it with the same target.

    Raises `BufferMovedError` if the source was moved to another target, `BufferStorageError` if it cannot be moved to
    this one, `BufferDamagedError` if it is damaged, `SchemaError` if it has not the schema of this release.
    """
    began = time.monotonic()
    name = str(backend_of(target))
    require(source)
    with _reading(source) as here, _bytes_if_invalid(here):
        move_id = _move_of(here, name)
        if move_id is None:  # all problems are found before anything is changed
            _refuse_damaged(source)
            for part in _PARTS:
                part.refuse_unfit(here)
        elif _setting(here, MOVED_AT) is not None:
            _refuse_if_gone(source, target, move_id)
    upgrade(target)
    _refuse_inserts(target)
    try:
        with backend_of(target).migrating(target) as there, there.begin():
            there.execute(_LOCK)
            with _reading(source) as here:
                move_id = _move_of(here, name)  # another run may have begun meanwhile
            is_repeated = move_id is not None and move_id == _setting(there, MOVE_ID)
            if is_repeated:
                backend_of(target).confirm(there)
                rows = {part.name: part.count(there) for part in _PARTS}
            elif not there.scalar(_IS_EMPTY):
                raise BufferStorageError(
                    f"{name} is not empty: it holds another buffer than {backend_of(source)}, or did so. Nothing was "
                    "changed. Give an empty database or schema."
                )
            else:
                _switch_triggers(there, "DISABLE")
                _close(source, name)  # not before everything is known that could refuse the move
                with _reading(source) as here:
                    rows = _copy(here, there)
                _switch_triggers(there, "ENABLE")
                for table in _WITH_TRIGGERS:
                    there.execute(text(f"DROP TRIGGER {_MOVING} ON {table}"))
    except (DBAPIError, backend_of(target).driver.Error) as error:
        what = str(getattr(error, "orig", None) or error).split("\n", 1)[0]
        raise BufferStorageError(
            f"{name}: the server refused to go on ({what}). Nothing was moved, and the file keeps every row. Run the "
            "same command again."
        ) from error
    _note_complete(source)
    return Moved(rows, time.monotonic() - began, is_repeated=is_repeated)


def _reading(engine: Engine) -> Connection:
    return engine.connect().execution_options(**{READ_ONLY: True})


@contextmanager
def _bytes_if_invalid(here: Connection) -> Iterator[None]:
    """Read text that is not UTF-8 as bytes."""
    driver = cast("sqlite3.Connection", here.connection.dbapi_connection)
    before, driver.text_factory = driver.text_factory, _text_or_bytes
    try:
        yield
    finally:
        driver.text_factory = before


def _text_or_bytes(raw: bytes) -> str | bytes:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw


def _setting(connection: Connection, key: str) -> str | None:
    value: str | None = connection.scalar(VALUE, {"name": key})
    return value


def _move_of(here: Connection, name: str) -> str | None:
    """The mark of the move to this target; None if the source was not moved. Raises if it was moved elsewhere."""
    moved_to = _setting(here, MOVED_TO)
    if moved_to not in {None, name}:
        raise BufferMovedError(str(moved_to))
    return _setting(here, MOVE_ID)


def _refuse_damaged(source: Engine) -> None:
    report = ReceiptRepository(source).check_integrity()
    if report.is_damaged:
        raise BufferDamagedError(
            f"{backend_of(source)} is damaged ({textwrap.shorten(str(report), 200)}). Nothing was changed or moved. "
            "Run `kkt-buffer verify PATH`, and restore a backup."
        )


def _refuse_if_gone(source: Engine, target: Engine, move_id: str) -> None:
    if current(target) is not None:
        with _reading(target) as there:
            if move_id == _setting(there, MOVE_ID):
                return
    raise BufferStorageError(
        f"{backend_of(source)} was moved to {backend_of(target)} completely, and is not there any more. Nothing was "
        "changed. Restore the server from its backup: the file does not know what was delivered since, and would send "
        "it again."
    )


def _close(source: Engine, name: str) -> None:
    """Refuse every change of the source from now on, also those of other programs."""
    with source.begin() as here:
        if _move_of(here, name) is not None:
            return
        for key, value in ((MOVED_TO, name), (MOVE_ID, str(uuid.uuid4()))):
            here.execute(
                text("INSERT INTO config (key, value, updated_at) VALUES (:key, :value, unixepoch())"),
                {"key": key, "value": value},
            )
        for trigger in moved_triggers(name).values():
            here.exec_driver_sql(trigger)


def _note_complete(source: Engine) -> None:
    with source.begin() as here:
        here.execute(
            text("INSERT OR IGNORE INTO config (key, value, updated_at) VALUES (:key, unixepoch(), unixepoch())"),
            {"key": MOVED_AT},
        )


def _refuse_inserts(target: Engine) -> None:
    """Refuse every insert until the move is complete: a service could take the empty buffer for the moved one."""
    guard = "EXECUTE FUNCTION kkt_guard('a move into this buffer has begun', '55K02')"
    with target.begin() as there:
        there.execute(_LOCK)
        if there.scalar(_IS_EMPTY) and not there.scalar(_IS_MOVING):
            for table in _WITH_TRIGGERS:
                there.execute(text(f"CREATE TRIGGER {_MOVING} BEFORE INSERT ON {table} FOR EACH STATEMENT {guard}"))


def _switch_triggers(there: Connection, enable_or_disable: str) -> None:
    """Disable or enable all triggers of the target: they would write new events, and count the rows once more."""
    for table in _WITH_TRIGGERS:
        there.execute(text(f"ALTER TABLE {table} {enable_or_disable} TRIGGER USER"))


def _copy(here: Connection, there: Connection) -> dict[str, int]:
    """Copy everything, and compare what has arrived; returns the number of rows of each table."""
    config = next(part for part in _PARTS if part.name == "config")
    there.execute(text(f"DELETE FROM config{config.where}"))  # the defaults
    sent = {part.name: _Content() for part in _PARTS}
    for part in _PARTS:
        columns = ", ".join(part.columns)
        cursor: Any = there.connection.cursor()
        with cursor, cursor.copy(f"COPY {part.into} ({columns}) FROM STDIN") as copy:
            for row in sent[part.name].of(part.rows(here, "moving")):
                copy.write_row(row)
    there.execute(_NEXT_EVENT, {"next": here.execute(_LAST_EVENT).scalar_one() + 1})
    for part in _PARTS:
        arrived = _Content()
        for _ in arrived.of(part.rows(there, "comparing")):
            pass
        if (arrived.rows, arrived.digest) != (sent[part.name].rows, sent[part.name].digest):
            raise BufferStorageError(
                f"{backend_of(there.engine)}: the rows of {part.name} are not those that were sent. Nothing was moved, "
                "and the file keeps every row. A type or a trigger was changed by hand there: give an empty schema."
            )
    return {name: content.rows for name, content in sent.items()}
