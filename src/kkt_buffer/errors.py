"""
The errors of this package: one tree under `ReceiptBufferError`, with the facts as attributes.

A wrong argument raises a plain `ValueError` or `TypeError` that names the argument (see `arguments`).
"""

from collections.abc import Iterable
from typing import Any, Self


class ReceiptBufferError(Exception):
    """Base class of the errors of this package."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Errors of worker processes are pickled. The default would call __init__ with the message alone.
        return _restore, (type(self), self.args, self.__dict__)

    @classmethod
    def _restored(cls, args: tuple[Any, ...], facts: dict[str, Any]) -> Self:
        error = cls.__new__(cls, *args)
        error.__dict__.update(facts)
        return error


def _restore(cls: type[ReceiptBufferError], args: tuple[Any, ...], facts: dict[str, Any]) -> ReceiptBufferError:
    return cls._restored(args, facts)


def with_traceback(error: Exception) -> Exception | None:
    """The error, if a log needs its traceback. The message of an error of this package says what to do."""
    return None if isinstance(error, ReceiptBufferError) else error


class BufferFullError(ReceiptBufferError, ValueError):
    """The buffer holds as many undelivered receipts as `buffer_capacity` allows; nothing was changed."""

    def __init__(self, undelivered: int, capacity: int, wanted: int = 1) -> None:
        super().__init__(
            f"Buffer full: {undelivered} of {capacity} receipts are waiting for delivery, so {wanted} more cannot be "
            "taken. Nothing was changed; the waiting receipts are safe. Deliver receipts, or raise buffer_capacity."
        )
        self.undelivered = undelivered
        self.capacity = capacity
        self.wanted = wanted


class DuplicateReceiptError(ReceiptBufferError):
    """A receipt with this id is in the buffer already; it was not changed."""

    def __init__(self, receipt_id: str, *, same_pos_id: bool, same_document: bool) -> None:
        if same_pos_id and same_document:
            difference = "with the same pos_id and document, so this is a replay and nothing is missing"
        else:
            differs = [name for name, same in (("pos_id", same_pos_id), ("fiscal_doc", same_document)) if not same]
            difference = f"but with another {' and another '.join(differs)}; give a new receipt a new id"
        super().__init__(f"receipt {receipt_id} is in this buffer already, {difference}")
        self.receipt_id = receipt_id
        self.same_pos_id = same_pos_id
        self.same_document = same_document

    @property
    def identical(self) -> bool:
        """Whether the stored receipt has the same `pos_id` and the same document text."""
        return self.same_pos_id and self.same_document


class ReceiptNotFoundError(ReceiptBufferError, LookupError):
    """No receipt has this id."""

    def __init__(self, receipt_id: str) -> None:
        super().__init__(f"no receipt {receipt_id!r} in this buffer")
        self.receipt_id = receipt_id


class InvalidTransitionError(ReceiptBufferError, ValueError):
    """The status of a receipt does not allow the requested change; nothing was changed."""

    def __init__(
        self,
        receipt_id: str,
        status: str,
        wanted: str,
        advice: str = "Synced is final, and only an operator's requeue makes a failed receipt pending.",
    ) -> None:
        super().__init__(f"receipt {receipt_id} is {status} and cannot become {wanted}; it was not changed. {advice}")
        self.receipt_id = receipt_id
        self.status = status
        self.wanted = wanted


class AcknowledgedReceiptError(ReceiptBufferError):
    """A statement tried to change the acknowledged content of a receipt; the database refused it."""

    def __init__(self) -> None:
        super().__init__(
            "an acknowledged receipt does not change: its id, pos_id, created_at, timestamp and document stay as they "
            "were stored. Nothing was changed. Store a new receipt with a new id instead."
        )


class BufferMovedError(ReceiptBufferError):
    """A move of the buffer to a server has begun. This file keeps every row, and takes no more changes."""

    def __init__(self, target: str) -> None:
        super().__init__(
            f"this buffer was moved to {target}. Nothing was changed here; the file can only be read. Keep it, and use "
            "the buffer there; if the move was interrupted (see `kkt-buffer status`), run it again first."
        )
        self.target = target


class LeaseLostError(ReceiptBufferError):
    """The lease token is not the current one; nothing was changed."""

    def __init__(self, receipt_id: str, status: str) -> None:
        super().__init__(
            f"the lease on receipt {receipt_id} is over, the receipt is {status} now; nothing was changed. "
            "Another worker may have it: do not send it again. If it was sent, record that with mark_synced."
        )
        self.receipt_id = receipt_id
        self.status = status


class InvalidDocumentError(ReceiptBufferError, ValueError):
    """The stored `fiscal_doc` of a receipt is not JSON; its text is kept and can be delivered unchanged."""

    def __init__(self, receipt_id: str, problem: str) -> None:
        super().__init__(f"the fiscal_doc of receipt {receipt_id} is not JSON ({problem}); its text is kept unchanged")
        self.receipt_id = receipt_id
        self.problem = problem


class InvalidConfigError(ReceiptBufferError, ValueError):
    """The stored value of a setting is invalid."""

    def __init__(self, key: str, value: str, expected: str) -> None:
        super().__init__(f"config {key} is {value!r}, expected {expected}; correct it with set_config({key!r}, …)")
        self.key = key
        self.value = value
        self.expected = expected


class ClockDriftError(ReceiptBufferError, ValueError):
    """A remote timestamp is too far in the future to be adopted."""

    def __init__(self, ahead: int, max_drift: int) -> None:
        super().__init__(
            f"the remote clock is {ahead} s ahead of ours, more than the {max_drift} s allowed; "
            "our clock was not moved. Check the time on both machines."
        )
        self.ahead = ahead
        self.max_drift = max_drift


class SchemaError(ReceiptBufferError):
    """The schema of the database is not the one that this release works with."""


class BufferStorageError(ReceiptBufferError):
    """
    The database cannot be opened, read or written; the current transaction was not committed.

    Receipts that were acknowledged before are not affected. `problem` is the message without the name of the buffer
    and the advice; empty if the database was not the cause.
    """

    problem = ""


class BufferBusyError(BufferStorageError):
    """Others kept the write lock, or all connections of the pool, for longer than the timeout; try again."""


class ConnectionLostError(BufferStorageError):
    """The connection to the server was lost, or it led to a server that takes no writes. Try again."""

    is_outcome_known = False  # True: nothing was stored, even if it was lost at the commit


class TransactionConflictError(BufferStorageError):
    """The server gave this transaction up for a concurrent one; nothing in it was stored. Try again, all of it."""


class OutcomeUnknownError(BufferStorageError):
    """
    A commit was sent, and it was not confirmed: it is stored, or it is not.

    `receipt_ids`: the receipts that this operation or transaction has added or changed, as far as it is known.
    """

    def __init__(self, buffer: object, receipt_ids: Iterable[str], problem: str) -> None:
        self.receipt_ids = tuple(dict.fromkeys(receipt_ids))
        self.problem = problem
        about = f" Receipts: {', '.join(self.receipt_ids)}." if self.receipt_ids else ""
        super().__init__(
            f"{buffer}: a commit was sent, but {problem}: this operation may be stored or not. What was acknowledged "
            "before is safe. Try again: a receipt with the same id and exist_ok=True is stored once; otherwise look "
            f"first.{about}"
        )


class BufferDamagedError(BufferStorageError):
    """The file is not a database, or it is damaged; it was not changed."""

    @classmethod
    def found(cls, buffer: object, what: str) -> Self:
        """The error for a stored value that this package never writes."""
        return cls(
            f"{buffer}: {what}: the file is damaged. Nothing was written. Stop every program that uses it, keep a copy "
            "of all its files, and restore a backup."
        )


class DeliveryRejected(ReceiptBufferError):  # noqa: N818 (named for the OFD's answer)
    """Raised by a sender: the OFD has rejected this receipt for good. It is dead-lettered at once."""


class DeliveryUnavailable(ReceiptBufferError):  # noqa: N818 (named for the state of the connection)
    """
    Raised by a sender: the OFD cannot be reached. This is not a fault of the receipt, so no attempt is counted.

    `retry_after` is the number of seconds for which the OFD asks not to be called again, if it does.
    """

    retry_after: float | None = None

    def __init__(self, message: object = "", *, retry_after: float | None = None) -> None:
        super().__init__(message)
        if not isinstance(retry_after, int | float | None):
            raise TypeError(f"retry_after: expected seconds as a number, got {retry_after!r}")
        self.retry_after = retry_after
