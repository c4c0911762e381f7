"""
Convert errors of PostgreSQL into the errors of this package, by SQLSTATE.

https://www.postgresql.org/docs/current/errcodes-appendix.html
"""

import psycopg
from sqlalchemy.exc import DBAPIError

from kkt_buffer.backend import Fault
from kkt_buffer.errors import (
    AcknowledgedReceiptError,
    BufferBusyError,
    BufferDamagedError,
    BufferStorageError,
    ConnectionLostError,
    ReceiptBufferError,
    SchemaError,
    TransactionConflictError,
)
from kkt_buffer.models import metadata

# SQLSTATEs of the guards. In class 23 the driver raises an IntegrityError; class 55 is "not in prerequisite state".
ACKNOWLEDGED, REFUSED, UNSAFE, MOVING = "23K01", "23K02", "55K01", "55K02"

_SAFE = "This operation was not stored; what was acknowledged before is safe."
_MAYBE = "What was acknowledged before is safe."


_LOST = Fault(ConnectionLostError, "the connection to the server was lost", f"{_MAYBE} Try again.")

# psycopg gives no SQLSTATE for any of these.
_UNREACHABLE = Fault(
    ConnectionLostError,
    "no connection can be opened",
    "Nothing was done here. Does the server run? Check host, port, database, user, password, and its max_connections.",
)
UNSAFE_SETTINGS = Fault(
    BufferStorageError,
    "a commit would not be safe here",
    f"{_SAFE} Correct this setting of the server, the role or the session, and try again.",
)
UNCONFIRMED = Fault(
    ConnectionLostError,
    "the confirmation of a replica is missing",
    "It may be on the primary alone, and is lost if that fails now. Try again.",
)
_DAMAGED = Fault(
    BufferDamagedError, "the server found it damaged", "Stop, keep a copy of the server's files, restore a backup."
)

# By SQLSTATE, or by its class.
_FAULTS = {
    "08": _LOST,
    "25006": Fault(
        ConnectionLostError,
        "this server takes no writes: it is a replica, or set to read only",
        f"{_SAFE} Try again; a URL with several hosts needs target_session_attrs=read-write.",
    ),
    "25P03": Fault(
        ConnectionLostError, "the transaction was open and idle for too long", f"{_SAFE} Do no other work inside it."
    ),
    "40": Fault(TransactionConflictError, "another transaction was in the way", f"{_SAFE} Try again, all of it."),
    "42501": Fault(BufferStorageError, "this user may not do that", f"{_SAFE} Grant it what the README lists."),
    "53": Fault(BufferStorageError, "the server is out of room or connections", f"{_SAFE} Make room; try again."),
    "55P03": Fault(BufferBusyError, "another transaction has kept it locked", f"{_SAFE} Try again."),
    "57014": Fault(BufferStorageError, "the statement was cancelled", f"{_SAFE} Try again."),
    "57P": _LOST,
    "58": Fault(BufferStorageError, "the server's system reported an error", f"{_SAFE} Look into the server's log."),
    "XX": Fault(BufferStorageError, "the server reported an internal error", f"{_SAFE} Look into the server's log."),
    "XX001": _DAMAGED,
    "XX002": _DAMAGED,
    MOVING: Fault(
        BufferStorageError, "it takes no receipts yet", "Nothing was stored. Let the move end, or run it again."
    ),
    UNSAFE: UNSAFE_SETTINGS,
}


def storage_error(
    buffer: object, error: BaseException | None, *, is_connecting: bool = False
) -> ReceiptBufferError | None:
    """The domain error for an error of the server or of the connection to it; None if it is about a statement."""
    if not isinstance(error, psycopg.Error):
        return None
    state = error.sqlstate or ""
    if state == ACKNOWLEDGED:
        return AcknowledgedReceiptError()
    fault = next((_FAULTS[state[:n]] for n in (5, 3, 2) if state[:n] in _FAULTS), None)
    if fault is None and not state and isinstance(error, psycopg.OperationalError):
        fault = _UNREACHABLE if is_connecting else _LOST
    found = fault and fault.as_error(buffer, first_line(error))
    if isinstance(found, ConnectionLostError):
        found.is_outcome_known = state in {"25006", "25P03"}  # refused before the commit
    return found


def statement_error(buffer: object, error: DBAPIError) -> ReceiptBufferError | None:
    """The domain error for a refused statement of an operation; None if a trigger of the service itself refused it."""
    cause = error.orig
    state = getattr(cause, "sqlstate", None) or ""
    if state in {"42P01", "42703", "42883", "3F000"}:
        return SchemaError(
            f"{buffer}: the schema is not that of this release ({first_line(cause)}). The operation changed nothing. A "
            "table, function or trigger was changed by hand, or search_path names another schema; run `kkt-buffer "
            "verify URL`."
        )
    table = cause.diag.table_name if isinstance(cause, psycopg.Error) else None
    if state == REFUSED or (state.startswith("23") and table in metadata.tables):
        return BufferDamagedError(
            f"{buffer}: its rows contradict each other ({first_line(cause)}). The operation changed nothing. Unless a "
            "trigger of your own did it, it is damaged: run `kkt-buffer verify URL`, and restore a backup."
        )
    return None


def first_line(error: BaseException | None) -> str:
    """The message, without the lines that quote a statement or a row."""
    return str(error).split("\n", 1)[0]
