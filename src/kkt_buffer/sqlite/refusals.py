"""
What it means when SQLite refuses a statement of ours.

The operations ask before they write, so no statement of theirs breaks a rule of the tables or names a column that is
not there, unless the tables or their rows are not what this package has made of them. What a trigger of the service's
own raises is left as it is.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError

from kkt_buffer.errors import BufferDamagedError, BufferStorageError, SchemaError
from kkt_buffer.sqlite.schema import SQLITE_TRIGGERS

_RAISED = {message for sql in SQLITE_TRIGGERS.values() for message in re.findall(r"RAISE\(ABORT, '([^']+)'\)", sql)}
_RULE = re.compile(r"(CHECK constraint failed: ck_|UNIQUE constraint failed: (receipts|dlq)\.|FOREIGN KEY)")
_TRANSACTION = re.compile("transaction|savepoint")  # a statement out of its place, not out of the schema
_SQLITE_ERROR = 1


def explanation(buffer: object, error: DBAPIError) -> BufferStorageError | SchemaError | None:
    """Our error for one of SQLAlchemy's that a statement of ours has met; None if it is not for us to explain."""
    said, code = str(error.orig), getattr(error.orig, "sqlite_errorcode", None)
    if isinstance(error, OperationalError) and code == _SQLITE_ERROR and not _TRANSACTION.search(said):
        return SchemaError(
            f"{buffer}: the schema is not that of this release ({said}). The operation changed nothing. Somebody "
            "changed a table or a trigger by hand, or the file is damaged; `python -m kkt_buffer verify PATH` tells. "
            "Put that back, or restore a backup."
        )
    if isinstance(error, IntegrityError) and (said in _RAISED or _RULE.match(said)):
        return BufferDamagedError(
            f"{buffer}: its rows contradict each other ({said}). The operation changed nothing. Unless a trigger of "
            "your own did it, the file is damaged: run `python -m kkt_buffer verify PATH`, keep a copy of all its "
            "files, and restore a backup."
        )
    return None


@contextmanager
def explained(buffer: object) -> Iterator[None]:
    """Raise our errors for what the statements of this block, all of them ours, are refused for."""
    try:
        yield
    except DBAPIError as error:
        raise explanation(buffer, error) or error from error.orig
