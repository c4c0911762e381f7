"""
Convert errors of SQLite and of the operating system into the errors of this package.

`storage_error` explains errors of the file, for every statement on the engine. `statement_error` explains errors of the
statements of operations. These check before they write, so SQLite refuses one only if the tables or rows were changed
by another program or are damaged.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError

from kkt_buffer.backend import Fault
from kkt_buffer.errors import (
    AcknowledgedReceiptError,
    BufferBusyError,
    BufferDamagedError,
    BufferMovedError,
    BufferStorageError,
    ReceiptBufferError,
    SchemaError,
)
from kkt_buffer.sqlite.schema import MOVED, SQLITE_TRIGGERS

_SAFE = "This operation was not stored; what was acknowledged before is safe."
_KEPT = "The file was not changed."

# By primary result code, https://www.sqlite.org/rescode.html
_FAULTS = {
    3: Fault(BufferStorageError, "access to the file was denied", f"{_SAFE} Check its owner and permissions."),
    5: Fault(BufferBusyError, "another program has kept it locked", f"{_SAFE} Try again; close that program."),
    6: Fault(BufferBusyError, "another connection has kept it locked", f"{_SAFE} Try again."),
    8: Fault(BufferStorageError, "it is read-only here", f"{_SAFE} Check folder, file and mount."),
    10: Fault(
        BufferStorageError, "the disk reported an error", f"{_SAFE} Check the disk and its free space; try again."
    ),
    11: Fault(
        BufferDamagedError, "SQLite found it damaged", f"{_KEPT} Stop, keep a copy of all its files, restore a backup."
    ),
    13: Fault(BufferStorageError, "the disk is full", f"{_SAFE} Make room and try again; no restart is needed."),
    14: Fault(
        BufferStorageError, "the file cannot be opened", f"{_SAFE} Folder and file must exist and be accessible."
    ),
    26: Fault(BufferDamagedError, "the file is not an SQLite database", f"{_KEPT} Check the path."),
}
_DAMAGED = _FAULTS[11]
_SQLITE_ERROR = 1


def storage_error(buffer: object, error: BaseException | None) -> ReceiptBufferError | None:
    """The domain error for an error of the file; None if the error is not about the file."""
    message = str(error)
    if isinstance(error, UnicodeDecodeError) or message.startswith("Could not decode to UTF-8"):
        return _DAMAGED.error(f"{buffer} contains text that is not UTF-8 ({error}). {_DAMAGED.advice}")
    if isinstance(error, OSError):
        return BufferStorageError(
            f"{buffer} cannot be used: {error.strerror or error}. Nothing was written. Check that the folder exists "
            "and that this user may read and write it."
        )
    if message == "cannot commit - no transaction is active":
        return BufferStorageError(
            f"{buffer}: SQLite had to roll the transaction back (see the error before this one). {_SAFE} Try again."
        )
    if message == "an acknowledged receipt does not change":
        return AcknowledgedReceiptError()
    if message.startswith(MOVED):
        return BufferMovedError(message.removeprefix(MOVED))
    fault = _FAULTS.get(getattr(error, "sqlite_errorcode", 0) & 0xFF)
    return fault and fault.as_error(buffer, error)


@contextmanager
def storage_errors(buffer: object, driver: ModuleType) -> Iterator[None]:
    """Raise the domain errors for errors of the driver and the operating system."""
    try:
        yield
    except (OSError, UnicodeDecodeError, driver.Error) as error:
        raise storage_error(buffer, error) or BufferStorageError(
            f"{buffer}: SQLite refused to go on ({error}). Nothing was written."
        ) from error


_RAISED = {message for sql in SQLITE_TRIGGERS.values() for message in re.findall(r"RAISE\(ABORT, '([^']+)'\)", sql)}
_CONSTRAINT = re.compile(
    r"(CHECK constraint failed: ck_|UNIQUE constraint failed: (receipts|dlq)\."
    r"|NOT NULL constraint failed: (receipts|dlq|buffer_events|buffer_state)\."
    r"|cannot store \w+ value in INTEGER column buffer_state|FOREIGN KEY)"
)


def statement_error(buffer: object, error: DBAPIError) -> ReceiptBufferError | None:
    """The domain error for a refused statement of an operation; None if a trigger of the service itself refused it."""
    message, code = str(error.orig), getattr(error.orig, "sqlite_errorcode", None)
    if isinstance(error, OperationalError) and code == _SQLITE_ERROR:
        return SchemaError(
            f"{buffer}: the schema is not that of this release ({message}). The operation changed nothing. A "
            "table or trigger was changed by hand, or the file is damaged; run `kkt-buffer verify PATH`. Undo the "
            "change, or restore a backup."
        )
    if isinstance(error, IntegrityError) and (message in _RAISED or _CONSTRAINT.match(message)):
        return BufferDamagedError(
            f"{buffer}: its rows contradict each other ({message}). The operation changed nothing. Unless a trigger of "
            "your own did it, the file is damaged: run `kkt-buffer verify PATH`, keep a copy of all its files, and "
            "restore a backup."
        )
    return None
