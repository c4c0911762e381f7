"""
The offline buffer of fiscal receipts of a cash-register (ККТ) adapter.

A receipt that the buffer acknowledged is never lost, never duplicated and never stuck. The operations are methods of
`ReceiptRepository`; `kkt_buffer.buffer` has them as functions over one default buffer.
"""

import importlib.metadata

from kkt_buffer.delivery import DeliveryReport, Outcome, Send, deliver_pending
from kkt_buffer.engine import create_buffer_engine
from kkt_buffer.errors import (
    AcknowledgedReceiptError,
    BufferBusyError,
    BufferDamagedError,
    BufferFullError,
    BufferMovedError,
    BufferStorageError,
    ClockDriftError,
    ConnectionLostError,
    DeliveryRejected,
    DeliveryUnavailable,
    DuplicateReceiptError,
    InvalidConfigError,
    InvalidDocumentError,
    InvalidTransitionError,
    LeaseLostError,
    OutcomeUnknownError,
    ReceiptBufferError,
    ReceiptNotFoundError,
    SchemaError,
    TransactionConflictError,
)
from kkt_buffer.hlc import HybridLogicalClock, HybridTimestamp
from kkt_buffer.migrate import check, current, upgrade
from kkt_buffer.models import (
    BufferEvent,
    ConfigEntry,
    DeadLetter,
    EventType,
    Receipt,
    ReceiptStatus,
    Resolution,
    metadata,
)
from kkt_buffer.repository import BufferStatus, IntegrityReport, PruneReport, ReceiptData, ReceiptRepository
from kkt_buffer.worker import DeliveryWorker, WorkerStatus

__all__ = [
    "AcknowledgedReceiptError",
    "BufferBusyError",
    "BufferDamagedError",
    "BufferEvent",
    "BufferFullError",
    "BufferMovedError",
    "BufferStatus",
    "BufferStorageError",
    "ClockDriftError",
    "ConfigEntry",
    "ConnectionLostError",
    "DeadLetter",
    "DeliveryRejected",
    "DeliveryReport",
    "DeliveryUnavailable",
    "DeliveryWorker",
    "DuplicateReceiptError",
    "EventType",
    "HybridLogicalClock",
    "HybridTimestamp",
    "IntegrityReport",
    "InvalidConfigError",
    "InvalidDocumentError",
    "InvalidTransitionError",
    "LeaseLostError",
    "Outcome",
    "OutcomeUnknownError",
    "PruneReport",
    "Receipt",
    "ReceiptBufferError",
    "ReceiptData",
    "ReceiptNotFoundError",
    "ReceiptRepository",
    "ReceiptStatus",
    "Resolution",
    "SchemaError",
    "Send",
    "TransactionConflictError",
    "WorkerStatus",
    "check",
    "create_buffer_engine",
    "current",
    "deliver_pending",
    "metadata",
    "upgrade",
]

__version__ = importlib.metadata.version("kkt-buffer")
