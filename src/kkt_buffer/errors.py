"""
What this package raises: one tree under `ReceiptBufferError`, the facts kept as attributes.

An argument of the wrong kind is a plain `ValueError` or `TypeError` that names the argument; those are raised where
the argument is read.
"""

from typing import Any, Self


class ReceiptBufferError(Exception):
    """Root of everything that this package raises on its own account."""

    def __reduce__(self) -> tuple[Any, ...]:
        # An error must survive the way back from a worker process; the default would call __init__ with the message.
        return _restore, (type(self), self.args, self.__dict__)

    @classmethod
    def _restored(cls, args: tuple[Any, ...], facts: dict[str, Any]) -> Self:
        error = cls.__new__(cls, *args)
        error.__dict__.update(facts)
        return error


def _restore(cls: type[ReceiptBufferError], args: tuple[Any, ...], facts: dict[str, Any]) -> ReceiptBufferError:
    return cls._restored(args, facts)


class BufferFullError(ReceiptBufferError, ValueError):
    """The buffer holds as many undelivered receipts as `buffer_capacity` allows; nothing was stored."""

    def __init__(self, undelivered: int, capacity: int, wanted: int = 1) -> None:
        super().__init__(
            f"Buffer full: {undelivered} of {capacity} receipts are waiting for delivery, so {wanted} more cannot be "
            "taken. Nothing was stored and what waits is safe. Deliver receipts, or raise buffer_capacity."
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
    """A receipt may not go from the status it has to the one that was asked for; nothing was changed."""

    def __init__(self, receipt_id: str, status: str, wanted: str) -> None:
        super().__init__(
            f"receipt {receipt_id} is {status} and cannot become {wanted}; it was not changed. "
            "Synced is final, and a failed receipt goes back only when an operator requeues it."
        )
        self.receipt_id = receipt_id
        self.status = status
        self.wanted = wanted


class AcknowledgedReceiptError(ReceiptBufferError):
    """Something tried to change what was acknowledged of a receipt; the database refused it."""

    def __init__(self) -> None:
        super().__init__(
            "an acknowledged receipt does not change: its id, pos_id, created_at, timestamp and document stay as they "
            "were stored. Nothing was changed. Store a new receipt with a new id instead."
        )


class LeaseLostError(ReceiptBufferError):
    """The lease token is not the present one; nothing was changed."""

    def __init__(self, receipt_id: str, status: str) -> None:
        super().__init__(
            f"the lease on receipt {receipt_id} is over, the receipt is {status} now; nothing was changed. "
            "Another worker may have it: do not send it again. If it was sent, record that with mark_synced."
        )
        self.receipt_id = receipt_id
        self.status = status


class InvalidDocumentError(ReceiptBufferError, ValueError):
    """The stored `fiscal_doc` of a receipt is not JSON; its text is kept and can be delivered as it is."""

    def __init__(self, receipt_id: str, problem: str) -> None:
        super().__init__(f"the fiscal_doc of receipt {receipt_id} is not JSON ({problem}); its text is kept unchanged")
        self.receipt_id = receipt_id
        self.problem = problem


class InvalidConfigError(ReceiptBufferError, ValueError):
    """The config table holds a value that cannot be used."""

    def __init__(self, key: str, value: str, expected: str) -> None:
        super().__init__(f"config {key} is {value!r}, expected {expected}; put it right with set_config({key!r}, …)")
        self.key = key
        self.value = value
        self.expected = expected


class ClockDriftError(ReceiptBufferError, ValueError):
    """A remote timestamp lies too far in the future to be taken over."""

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
    The database cannot be opened, read or written; the transaction at hand was not committed.

    Whatever was acknowledged before is not affected by this error.
    """


class BufferBusyError(BufferStorageError):
    """Somebody else kept the write lock for longer than the timeout; try again."""


class BufferDamagedError(BufferStorageError):
    """The file is not a database, or it was found damaged; it is left as it is."""

    @classmethod
    def found(cls, buffer: object, what: str) -> Self:
        """The error for a value that this package never stores."""
        return cls(
            f"{buffer}: {what}: the file is damaged. Nothing was written. Stop every program that uses it, keep a copy "
            "of all its files, and restore a backup."
        )


class DeliveryRejected(ReceiptBufferError):  # noqa: N818 (what the operator did, not what failed)
    """For a sender to raise: the operator refused this receipt for good. It is dead-lettered at once."""


class DeliveryUnavailable(ReceiptBufferError):  # noqa: N818 (a state of the line, not an error of ours)
    """For a sender to raise: the operator cannot be reached. No receipt is to blame, so no attempt is counted."""
