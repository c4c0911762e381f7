"""
The short way to the database: statements that SQLAlchemy has compiled once, run by the driver.

SQLAlchemy's layers (session, transaction, connection, result) cost a single receipt more than storing it does. So the
operations that a till runs all day go past them: `Direct` is a transaction on a pooled connection, `Driver` runs the
statements on it. Inside `transaction()` the same `Driver` stands on the session's connection. What SQLAlchemy offers to
those who watch an engine (`echo`, events on cursors and commits) does not see these statements; pool events do.
"""

import sqlite3
import threading
import weakref
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, cast

from sqlalchemy import ClauseElement, Engine, PoolProxiedConnection
from sqlalchemy.dialects import sqlite
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from kkt_buffer.errors import BufferStorageError
from kkt_buffer.sqlite.engine import GuardedConnection, translated
from kkt_buffer.sqlite.refusals import explanation

Parameters = Mapping[str, object]

# The driver's SQL and the parameters that a statement itself gives, of each statement that was run here.
_compiled: dict[ClauseElement, tuple[str, Parameters]] = {}


def _compile(statement: ClauseElement) -> tuple[str, Parameters]:
    compiled = statement.compile(dialect=sqlite.dialect(paramstyle="named"))
    given = {name: value for name, value in (compiled.params or {}).items() if value is not None}
    _compiled[statement] = found = (str(compiled), given)
    return found


class Driver:
    """Runs statements on the driver's connection of a transaction that is open."""

    __slots__ = ("connection",)

    def __init__(self, connection: GuardedConnection) -> None:
        self.connection = connection

    @classmethod
    def of(cls, session: Session) -> "Driver":
        """The driver below a session, within its transaction."""
        return cls(cast("GuardedConnection", session.connection().connection.dbapi_connection))

    def execute(self, statement: ClauseElement, parameters: Parameters | Sequence[Parameters]) -> sqlite3.Cursor:
        """
        Run a statement that is a constant (it is compiled once and kept), for one set of parameters or for several.

        Raises what SQLAlchemy would raise.
        """
        connection = self.connection
        _require_transaction(connection)
        sql, given = _compiled.get(statement) or _compile(statement)
        try:
            if not isinstance(parameters, Mapping):
                cursor = connection.executemany(sql, parameters)
            else:
                cursor = connection.execute(sql, {**given, **parameters} if given else parameters)
        except (UnicodeDecodeError, connection.database.driver.Error) as error:
            raise _told(connection, error, sql) from error
        return cast("sqlite3.Cursor", cursor)

    def first(self, statement: ClauseElement, parameters: Parameters) -> Any:  # noqa: ANN401 (a row is a tuple of whatever was asked for)
        """Run it, and return its first row, or None."""
        cursor = self.execute(statement, parameters)
        try:
            return cursor.fetchone()
        except (UnicodeDecodeError, self.connection.database.driver.Error) as error:
            raise _told(self.connection, error, str(statement)) from error


class Place(threading.local):
    """Where a thread notes the write that it has under way, so that the next one finds what a signal has left of it."""

    # Weakly: a connection that was given back to the pool, by whatever way, is no business of ours any more.
    fairy: "weakref.ref[PoolProxiedConnection] | None" = None

    def tidy(self) -> None:
        """End the write that an exception out of a signal handler has left open."""
        fairy = self.fairy and self.fairy()
        if fairy:
            # It is not given back to the pool: whoever keeps it must not meet another thread's transaction there.
            cast("GuardedConnection", fairy.dbapi_connection).rollback()
            self.fairy = None


class Direct:
    """
    A transaction of one operation, on a connection of the pool: committed at the end of the block, or rolled back.

    `committed` says whether it was; an exception may come after that.
    """

    __slots__ = ("_engine", "_fairy", "_place", "_write", "committed")

    def __init__(self, engine: Engine, place: Place, *, write: bool) -> None:
        self._engine = engine
        self._place = place
        self._write = write
        self.committed = False

    def __enter__(self) -> Driver:
        self._fairy = self._engine.raw_connection()
        connection = cast("GuardedConnection", self._fairy.dbapi_connection)
        try:
            if self._write:
                self._place.fairy = weakref.ref(self._fairy)
            connection.begin(write=self._write)
        except BaseException:
            self._leave(connection)
            raise
        return Driver(connection)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        connection = cast("GuardedConnection", self._fairy.dbapi_connection)
        try:
            if kind is None and self._write:
                self._commit(connection)
        finally:
            self._leave(connection)
        if isinstance(error, DBAPIError):
            raise explanation(connection.database, error) or error

    def _commit(self, connection: GuardedConnection) -> None:
        _require_transaction(connection)
        try:
            connection.commit()
        except connection.database.driver.Error as error:
            raise _told(connection, error, "COMMIT") from error
        self.committed = True

    def _leave(self, connection: GuardedConnection) -> None:
        if self._write:
            if not self.committed:
                connection.rollback()
            self._place.fairy = None  # before the pool can give the connection to another thread
        self._fairy.close()


def _require_transaction(connection: GuardedConnection) -> None:
    """Raise if the transaction is over already: what comes after its end would be committed statement by statement."""
    connection.refuse_lost()
    if not connection.in_transaction:
        raise BufferStorageError(
            f"{connection.database}: an operation that was called from within this one, by `now` or a signal handler, "
            "has ended its transaction. Nothing of it was stored. Try again."
        )


def _told(connection: GuardedConnection, error: Exception, sql: str) -> BaseException:
    """What SQLAlchemy would make of the driver's error."""
    connection.notice_loss()
    database = connection.database
    return translated(database, error) or cast(
        "DBAPIError", DBAPIError.instance(sql, None, error, database.driver.Error, hide_parameters=True)
    )
