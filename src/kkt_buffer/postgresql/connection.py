"""
`ServerConnection`: its `commit()` returns only when the commit is durable, on as many replicas as are required.

It is in autocommit mode: a statement outside of `begin` and `commit` is a transaction by itself, in one round trip.
"""

import os
import struct
from collections.abc import Mapping
from typing import Any, TypeVar

import psycopg
from psycopg.abc import PQGen
from psycopg.adapt import Dumper
from psycopg.pq import Format, TransactionStatus

from kkt_buffer.backend import READ_ONLY
from kkt_buffer.errors import BufferStorageError
from kkt_buffer.postgresql.errors import UNCONFIRMED, UNSAFE, UNSAFE_SETTINGS, first_line

R = TypeVar("R")

# Execution options of a transaction: it migrates; it is always rolled back.
MIGRATING, SCRATCH = "kkt_buffer_migrating", "kkt_buffer_scratch"

# What makes a commit unsafe, in words; NULL if it is safe. `replicas`: how many must confirm it.
# https://www.postgresql.org/docs/current/runtime-config-wal.html, runtime-config-replication.html
_UNSAFE = """\
CASE
    WHEN current_setting('fsync') <> 'on' THEN 'fsync is off'
    WHEN current_setting('full_page_writes') <> 'on' THEN 'full_page_writes is off'
    WHEN current_setting('synchronous_commit') = 'off' THEN 'synchronous_commit is off'
    WHEN replicas > 0 AND current_setting('synchronous_commit') = 'local' THEN 'synchronous_commit is local'
    WHEN replicas > CASE WHEN current_setting('synchronous_standby_names') = '' THEN 0 ELSE COALESCE((regexp_match(
        current_setting('synchronous_standby_names'), '^\\s*(?:ANY|FIRST)?\\s*(\\d+)\\s*\\(', 'i'))[1]::integer, 1) END
        THEN format('synchronous_standby_names is %L, and require_replicas is %s',
            current_setting('synchronous_standby_names'), replicas)
END"""


def unsafe_commit(replicas: int) -> str:
    """The SQL term that tells what makes a commit unsafe, with which `replicas` must confirm it."""
    return _UNSAFE.replace(" replicas", f" {replicas}")


_COMMIT_IF_SAFE = f"""\
DO $do$
DECLARE
    problem text := {{}};
BEGIN
    IF problem IS NOT NULL THEN
        RAISE EXCEPTION '%', problem USING ERRCODE = '{UNSAFE}';
    END IF;
END $do$;
COMMIT"""

# Migrations take a lock before the tables exist, and do not see those of the same names in a later schema of the path.
_MIGRATING = """\
SELECT pg_advisory_xact_lock(hashtext('kkt_buffer ' || current_schema()));
SELECT set_config('search_path', quote_ident(current_schema()), true);"""


class Texts(tuple[str, ...]):
    """Texts that are sent as one array."""

    __slots__ = ()


class TextsDumper(Dumper):
    """Sends `Texts` in the binary format. For lists, the driver first looks for a type that fits all their items."""

    format = Format.BINARY
    oid = psycopg.postgres.types["text"].array_oid
    _item = psycopg.postgres.types["text"].oid

    def dump(self, obj: Texts) -> bytes:
        """One dimension from 1 on without NULL, and each text after its length."""
        texts = [text.encode() for text in obj]
        head = struct.pack("!5i", 1, 0, self._item, len(texts), 1)
        return head + b"".join(part for text in texts for part in (len(text).to_bytes(4, "big"), text))


class ServerConnection(psycopg.Connection[Any]):
    """
    One connection to the server; `buffer` is named in messages.

    `answer_timeout` is in seconds. `replicas`: how many must confirm a commit.
    """

    buffer: object = None
    lock_milliseconds = 0
    answer_timeout = 0.0
    replicas = 0
    moment = 0.0  # the server's clock at the beginning of the transaction
    pid = 0
    is_write = False
    is_limited = True
    not_confirmed: str | None = None  # why no replica has confirmed the last commit

    def wait(self, gen: PQGen[R], interval: float = 0.1, timeout: float | None = None) -> R:
        """Send, and wait for the answer, for a limited time: the server may stand still, or wait for a replica."""
        if self.pid not in {0, os.getpid()}:  # a forked child
            raise psycopg.OperationalError("it belongs to the parent process")
        if timeout is None and self.is_limited:
            timeout = self.answer_timeout
        try:
            return super().wait(gen, interval, timeout)
        except psycopg.OperationalError as error:
            if self.pgconn.transaction_status != TransactionStatus.ACTIVE:
                raise
            self.pgconn.finish()  # an answer that comes later must not be taken for that of another statement
            waited = f"no answer for {timeout or 0:g} s: it stands still, is busy, or waits for a replica"
            raise psycopg.OperationalError(waited) from error

    def begin(self, options: Mapping[str, Any]) -> None:
        """
        Begin, with one round trip. A write transaction is refused if its commit would not be safe.

        SET LOCAL, and each time: behind pgbouncer, other clients use the same session. JIT takes longer than our
        statements; a cancelled wait for a replica is a warning. A writer that does nothing for `answer_timeout` is
        ended, because others wait for its locks.
        """
        self.is_write = write = not options[READ_ONLY]
        migrating = MIGRATING in options
        # Without READ WRITE, which a replica refuses as it would any statement that it does not know.
        mode = "READ COMMITTED" if write else "REPEATABLE READ, READ ONLY"
        timeout = 0 if migrating else self.lock_milliseconds
        idle = round(self.answer_timeout * 1000) if write and not migrating else 0
        unsafe = unsafe_commit(self.replicas) if write and SCRATCH not in options else "NULL"
        cursor = self.execute(
            f"BEGIN ISOLATION LEVEL {mode}; SET LOCAL jit = off; SET LOCAL client_min_messages = warning;"
            f"SET LOCAL lock_timeout = {timeout};"
            f"SET LOCAL idle_in_transaction_session_timeout = {idle};"
            f"{_MIGRATING if migrating else ''}"
            f"SELECT extract(epoch FROM clock_timestamp())::float8, pg_is_in_recovery(), {unsafe}".encode()
        )
        while cursor.nextset():
            pass
        self.moment, is_replica, problem = cursor.fetchone() or (0.0, True, None)
        if is_replica:
            self.rollback()
            raise psycopg.errors.ReadOnlySqlTransaction("it is in recovery")
        if problem:
            self.rollback()
            raise UNSAFE_SETTINGS.as_error(self.buffer, problem)

    def commit(self) -> None:
        """Commit. Fails if the server has rolled back, or if a replica that must confirm did not."""
        if self.pgconn.transaction_status == TransactionStatus.INERROR:
            self.rollback()  # COMMIT would roll back too, and report success
            raise BufferStorageError(
                f"{self.buffer}: a statement in this transaction has failed, and the server rolled all of it back. "
                "Nothing in it was stored; what was acknowledged before is safe. Try again, and put a statement that "
                "may fail into a savepoint (session.begin_nested())."
            )
        if self.is_write and self.pgconn.transaction_status == TransactionStatus.INTRANS:
            self._commit_if_safe()
            self.refuse_unconfirmed()
        else:
            super().commit()

    def _commit_if_safe(self) -> None:
        """Look at the settings and commit, in one message: a server takes new settings between two messages only."""
        try:
            cursor = self.execute(_COMMIT_IF_SAFE.format(unsafe_commit(self.replicas)).encode())
            while cursor.nextset():
                pass
        except psycopg.Error:
            if self.pgconn.transaction_status == TransactionStatus.INERROR:
                self.rollback()
            raise

    def refuse_unconfirmed(self) -> None:
        """Raise `ConnectionLostError` if the replicas that must confirm did not confirm the last commit."""
        cause, self.not_confirmed = self.not_confirmed, None
        # If the replicas were taken out of the settings during the wait, it ended as if they had confirmed.
        if self.replicas and cause is None:
            try:
                [cause] = self.execute(f"SELECT {unsafe_commit(self.replicas)}".encode()).fetchone() or [None]
            except psycopg.Error as error:
                cause = f"the connection was lost before it could be asked: {first_line(error)}"
        if cause is not None:
            raise UNCONFIRMED.as_error(self.buffer, cause)

    def notice(self, diagnostic: psycopg.errors.Diagnostic) -> None:
        """Note that a wait for a replica was cancelled: the commit reports success all the same."""
        if (diagnostic.source_function or "").startswith("SyncRep"):
            self.not_confirmed = diagnostic.message_primary or ""

    def close(self) -> None:
        """Close; but in a forked child do nothing, because that would end the session of the parent process."""
        if self.pid in {0, os.getpid()}:
            super().close()
