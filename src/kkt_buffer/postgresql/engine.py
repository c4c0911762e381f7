"""
The PostgreSQL backend: an engine that refuses a commit unless it is durable, on as many machines as it must be.

One receipt or one batch is stored with one statement, outside of a transaction. Everything else begins one.
"""

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NoReturn, cast

import psycopg
from sqlalchemy import URL, Connection, CursorResult, Dialect, Engine, ExceptionContext, create_engine, event, text
from sqlalchemy.exc import DBAPIError, DisconnectionError, IntegrityError

from kkt_buffer.arguments import NewReceipt, whole_number
from kkt_buffer.backend import OPTION, READ_ONLY, Backend, Objects, Parameters, Reference, RefusedError, place_of
from kkt_buffer.errors import BufferStorageError, ConnectionLostError, ReceiptBufferError
from kkt_buffer.postgresql import catalog
from kkt_buffer.postgresql.connection import MIGRATING, ServerConnection, Texts, TextsDumper
from kkt_buffer.postgresql.errors import first_line, statement_error, storage_error

OLDEST = 15
ONE_STATEMENT = "kkt_buffer_one_statement"

INSERT = """\
SELECT kkt_insert_receipts(
    %(ids)s, %(pos_ids)s, %(documents)s, %(digests)s, %(held)s::boolean[],
    %(now)s::bigint, %(replicas)s::integer, %(lock_timeout)s::text)"""

# The warning by which a cancelled wait for a replica is known, then what makes the commit wait.
CONFIRM = "SELECT set_config('client_min_messages', 'warning', true), pg_logical_emit_message(true, 'kkt_buffer', '')"

REFERENCES = text(
    """\
SELECT conrelid::regclass::text, quote_ident(origin.attname), quote_ident(target.attname)
FROM pg_constraint
JOIN pg_attribute AS origin ON origin.attrelid = conrelid AND origin.attnum = conkey[1]
JOIN pg_attribute AS target ON target.attrelid = confrelid AND target.attnum = confkey[1]
WHERE contype = 'f' AND confrelid = 'receipts'::regclass"""
)

_OURS = "IN ('receipts'::regclass, 'dlq'::regclass, 'buffer_events'::regclass, 'buffer_changes'::regclass)"
OFF = f"""\
SELECT 'the trigger ' || tgname || ' is disabled' FROM pg_trigger WHERE tgenabled <> 'O' AND tgrelid {_OURS}
UNION ALL
SELECT 'the index ' || indexrelid::regclass || ' is not valid' FROM pg_index WHERE NOT indisvalid AND indrelid {_OURS}
UNION ALL
SELECT 'the constraint ' || conname || ' is not validated' FROM pg_constraint
WHERE NOT convalidated AND conrelid {_OURS}"""


def create(
    url: URL,
    *,
    read_only: bool,
    busy_timeout: float,
    answer_timeout: float,
    require_replicas: int,
    **options: Any,  # noqa: ANN401 (passed on to create_engine)
) -> Engine:
    """Create an engine on the first schema of `search_path`, and connect once to check that it can be used."""
    if "isolation_level" in {**options, **options.get("execution_options", {})}:
        raise ValueError("isolation_level: a buffer needs READ COMMITTED, and begins its transactions itself")
    whole_number("require_replicas", require_replicas, 0)
    if busy_timeout >= answer_timeout:
        raise ValueError(f"answer_timeout={answer_timeout:g}: expected more than busy_timeout ({busy_timeout:g})")
    url = url.set(drivername="postgresql+psycopg")
    server = Server(url, lock_timeout=busy_timeout, answer_timeout=answer_timeout, replicas=require_replicas)
    engine = create_engine(
        url,
        execution_options={**options.pop("execution_options", {}), OPTION: server, READ_ONLY: read_only},
        **options,
    )
    server.watch(engine)
    try:
        with engine.connect() as connection:
            server.refuse_others(connection)
    except DBAPIError as error:
        engine.dispose()
        raise BufferStorageError(f"{server}: {first_line(error.orig)}. Nothing was opened. Check the URL.") from error
    except BaseException:
        engine.dispose()
        raise
    return engine


def driver_connection(connection: Connection) -> ServerConnection:
    """The driver connection of an SQLAlchemy connection."""
    return cast("ServerConnection", connection.connection.dbapi_connection)


@cache
def _pyformat(sql: str) -> str:
    return re.sub(r"(?<!:):(\w+)", r"%(\1)s", sql.replace("%", "%%"))


class Server(Backend):
    """What the connections of one engine share."""

    driver = psycopg
    json_array = "json_build_array({})::text"
    unix_time = "floor(extract(epoch FROM clock_timestamp()))::bigint"
    is_server = True

    def __init__(self, url: URL, *, lock_timeout: float, answer_timeout: float, replicas: int) -> None:
        super().__init__()
        self._name = place_of(url)
        self._lock_milliseconds = max(1, round(lock_timeout * 1000))  # 0 is for ever
        self._answer_timeout = answer_timeout
        self._replicas = replicas

    def __str__(self) -> str:
        return self._name

    # Called by SQLAlchemy.

    def watch(self, engine: Engine) -> None:
        """Listen to the events of the engine."""
        event.listen(engine, "do_connect", self._open)
        event.listen(engine, "checkout", self._checkout)
        event.listen(engine, "begin", self._begin)
        event.listen(engine, "handle_error", self._handle_error)

    def _open(self, _dialect: Dialect, _record: object, cargs: list[Any], cparams: dict[str, Any]) -> ServerConnection:
        """Open one connection. It is ended when the network has been silent for `answer_timeout`."""
        defaults = {
            "fallback_application_name": "kkt-buffer",
            "connect_timeout": 10,
            "tcp_user_timeout": round(self._answer_timeout * 1000),
            "keepalives_idle": 10,
            "keepalives_interval": 10,
            "keepalives_count": 3,
            "prepare_threshold": None,  # behind pgbouncer another session would not know a prepared statement
        }
        connection = ServerConnection.connect(*cargs, **{**defaults, **cparams, "autocommit": True})
        if connection.info.parameter_status("crdb_version"):  # SQLAlchemy fails to read its version
            connection.close()
            raise self._another("CockroachDB")
        connection.buffer = self
        connection.replicas = self._replicas
        connection.lock_milliseconds = self._lock_milliseconds
        connection.answer_timeout = self._answer_timeout
        connection.adapters.register_dumper(Texts, TextsDumper)
        connection.add_notice_handler(connection.notice)
        connection.pid = os.getpid()
        return connection

    def _checkout(self, connection: ServerConnection, record: Any, proxy: Any) -> None:  # noqa: ANN401 (SQLAlchemy's own)
        if connection.pid != os.getpid():
            # Not closed: that would end the session of the parent process. The pool opens another one.
            record.dbapi_connection = proxy.dbapi_connection = None
            raise DisconnectionError("a connection of the parent process")

    def _begin(self, connection: Connection) -> None:
        options = connection.get_execution_options()
        if options.get(ONE_STATEMENT):
            return
        try:
            driver_connection(connection).begin(options)
        except psycopg.Error as error:
            refused = storage_error(self, error) or BufferStorageError(f"{self}: {error}. Nothing was stored.")
            if isinstance(refused, ConnectionLostError):  # pragma: no branch (BEGIN knows no other errors)
                connection.invalidate()
                connection.engine.dispose()  # the idle connections are those of the same server
            raise refused from error

    def _handle_error(self, context: ExceptionContext) -> BaseException | None:
        refused = storage_error(self, context.original_exception, is_connecting=context.connection is None)
        if isinstance(refused, ConnectionLostError):
            cast("Any", context).is_disconnect = True  # SQLAlchemy 2.0 declares it as fixed
        return refused

    def refuse_others(self, connection: Connection) -> None:
        """Raise unless this is a server that keeps what it promises, and a schema that exists."""
        has_citus = "EXISTS (SELECT 1 FROM pg_extension WHERE extname = 'citus')"
        version, encoding, schema, citus = connection.exec_driver_sql(
            f"SELECT version(), current_setting('server_encoding'), current_schema(), {has_citus}"
        ).one()
        if citus or "-YB-" in version:
            raise self._another("Citus" if citus else "YugabyteDB")
        if driver_connection(connection).pgconn.server_version < OLDEST * 10_000:
            raise BufferStorageError(f"{self}: PostgreSQL {OLDEST} or newer is needed, this is {version}.")
        if encoding != "UTF8":
            raise BufferStorageError(f"{self}: its encoding is {encoding}; a buffer needs a database in UTF8.")
        if schema is None:
            raise BufferStorageError(
                f"{self}: none of the schemas in search_path exists, or this user may not use it. Nothing was changed. "
                "Create it (CREATE SCHEMA), or let the user in (GRANT USAGE ON SCHEMA)."
            )

    def _another(self, name: str) -> BufferStorageError:
        return BufferStorageError(
            f"{self}: this is {name}, on which a buffer was never tested: its locks and triggers differ. Nothing was "
            "changed. Use PostgreSQL itself."
        )

    # Called by operations.

    def connect(self, engine: Engine, *, write: bool, one_statement: bool = False) -> Connection:
        """A connection of the engine's pool; only to read, it is refused every write."""
        connection = engine.connect()
        if not write and not connection.get_execution_options()[READ_ONLY]:
            connection = connection.execution_options(**{READ_ONLY: True})
        elif one_statement:
            connection = connection.execution_options(**{ONE_STATEMENT: True})
        return connection

    def now(self, connection: Connection) -> float:
        """The server's clock, at the beginning of the transaction."""
        return driver_connection(connection).moment

    def insert(self, connection: Connection, many: Sequence[NewReceipt], now: int | None) -> None:
        """Insert all of them with one statement, and one round trip."""
        ids, pos_ids, documents, digests, _, held = zip(*many, strict=True)
        parameters = {
            "ids": Texts(ids),
            "pos_ids": Texts(pos_ids),
            "documents": Texts(documents),
            "digests": Texts(digests),
            "held": Texts(map(str, held)),
            "now": now,
            "replicas": self._replicas,
            "lock_timeout": f"{self._lock_milliseconds}ms",
        }
        try:
            is_stored = connection.exec_driver_sql(INSERT, parameters).scalar_one()
        except IntegrityError as error:
            if len(many) == 1:
                raise  # neither the id nor the room: the server has looked at both
            raise RefusedError(error) from error
        if not is_stored:
            raise RefusedError
        if connection.get_execution_options().get(ONE_STATEMENT):
            driver_connection(connection).refuse_unconfirmed()

    def lock(self, connection: Connection) -> None:
        """Take the lock that every insert takes."""
        connection.execute(text("SELECT kkt_lock_buffer()"))

    def confirm(self, connection: Connection) -> None:
        """Write something, so that the commit waits for the replicas: what was read may not be on them yet."""
        if not self._replicas:
            return
        connection.exec_driver_sql(CONFIRM)
        if connection.get_execution_options().get(ONE_STATEMENT):
            driver_connection(connection).refuse_unconfirmed()

    def run(self, connection: Connection, sql: str, parameters: Parameters) -> CursorResult[Any]:
        """Run the text with the driver's own marks for parameters."""
        return connection.exec_driver_sql(_pyformat(sql), parameters)

    def explain(self, error: DBAPIError) -> ReceiptBufferError | None:
        """The domain error for a statement that the server refused."""
        return statement_error(self, error)

    def references(self, connection: Connection) -> list[Reference]:
        """The foreign keys that refer to receipts, from the catalogue."""
        return [Reference(*row) for row in connection.execute(REFERENCES)]

    def checks(self) -> Mapping[str, Callable[[Connection], list[str]]]:
        """The check of the settings, and of what may be switched off: triggers, indexes, constraints."""
        return {
            "safety of commits": lambda connection: [*filter(None, [self._ask(connection, "unsafe_commit")])],
            "schema": lambda connection: list(connection.scalars(text(OFF))),
        }

    def why_refused(self, connection: Connection) -> str | None:
        """What makes commits unsafe or impossible; or that a move into this buffer has begun."""
        return self._ask(connection, "why_refused")

    def _ask(self, connection: Connection, what: str) -> str | None:
        found: str | None = connection.scalar(text(f"SELECT kkt_{what}({self._replicas})"))
        return found

    def refuse_backup(self) -> NoReturn:
        """Raise: a server has its own tools, which can restore a moment."""
        raise BufferStorageError(
            f"{self}: a buffer on a server is backed up by the server's own tools: pg_basebackup with an archive of "
            "the WAL, or pg_dump. Nothing was copied; a worker needs no backup_to here."
        )

    def objects(self, connection: Connection, made_by: Callable[[str], list[str]]) -> tuple[Objects, Objects]:
        """The objects of the schema, as the server describes them."""
        return catalog.objects(connection, made_by)

    @contextlib.contextmanager
    def migrating(self, engine: Engine) -> Iterator[Connection]:
        """A connection whose transaction waits for that of another migration, however long that takes."""
        with (
            engine.connect().execution_options(**{READ_ONLY: False, MIGRATING: True}) as connection,
            self.patience(connection),
        ):
            yield connection

    @contextlib.contextmanager
    def patience(self, connection: Connection) -> Iterator[None]:
        """Wait for answers without a limit."""
        driver = driver_connection(connection)
        driver.is_limited = False
        try:
            yield
        finally:
            driver.is_limited = True
