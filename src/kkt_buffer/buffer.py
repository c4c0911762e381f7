"""
The functional interface: the operations of one default repository, for services that need no more than one buffer.

Every function here does what the `ReceiptRepository` method of the same name does; that is where it is documented.
"""

import os
import threading
import uuid
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from sqlalchemy import URL, Engine
from sqlalchemy.orm import Session

from kkt_buffer import delivery, migrate
from kkt_buffer.delivery import DeliveryReport, Send
from kkt_buffer.models import BufferEvent, DeadLetter, Receipt
from kkt_buffer.repository import BufferStatus, ReceiptRepository
from kkt_buffer.sqlite.engine import create_buffer_engine

DEFAULT_PATH = "data/buffer.db"
PATH_VARIABLE = "BUFFER_DB_PATH"

_lock = threading.RLock()
_engine: Engine | None = None
_repository: ReceiptRepository | None = None
_refused: str | os.PathLike[str] | URL | None = (
    None  # the buffer that could not be opened: no other one stands in for it
)


def init_buffer_db(db_path: str | os.PathLike[str] | URL | None = None, *, upgrade: bool = True) -> Engine:
    """
    Open the default buffer, made and upgraded where needed, and return its engine.

    `db_path` is a path, an SQLite URL or `":memory:"`; without it, the environment's BUFFER_DB_PATH, else
    `data/buffer.db`. Safe when several processes start at once. A second call closes the first engine. With
    `upgrade=False` the schema must be that of this release already.

    Raises `BufferStorageError`, `BufferDamagedError` or `SchemaError` if this buffer cannot be used; the one that was
    open before stays.
    """
    global _engine, _repository, _refused  # noqa: PLW0603 (as in close_buffer_db)
    with _lock:
        path = os.environ.get(PATH_VARIABLE) or DEFAULT_PATH if db_path is None else db_path
        _refused = path
        engine = _opened(path, upgrade=upgrade)
        close_buffer_db()
        _engine, _repository = engine, ReceiptRepository(engine)
        return engine


def _opened(path: str | os.PathLike[str] | URL, *, upgrade: bool) -> Engine:
    if not upgrade:
        # For reading at first: what is not there must not be made.
        engine = create_buffer_engine(path, read_only=True)
        try:
            migrate.require(engine)
        finally:
            engine.dispose()
    engine = create_buffer_engine(path)
    try:
        migrate.upgrade(engine)
    except BaseException:
        engine.dispose()
        raise
    return engine


def get_db() -> Engine:
    """The engine of the default buffer, opened on first use; raises again if that was refused."""
    with _lock:
        return _engine or init_buffer_db(_refused)


def close_buffer_db() -> None:
    """Close the default buffer; the next use opens it again. Twice is once."""
    global _engine, _repository, _refused  # noqa: PLW0603 (the default repository is what this module is for)
    with _lock:
        if _engine is not None:
            _engine.dispose()
        _engine = _repository = _refused = None


def _default() -> ReceiptRepository:
    repository = _repository
    if repository is None:
        with _lock:
            get_db()
            repository = _repository
            assert repository is not None  # noqa: S101 (get_db has just set it, under the same lock)
    return repository


def insert_receipt(receipt_data: Mapping[str, Any], *, exist_ok: bool = False) -> str:
    """See `ReceiptRepository.insert_receipt`."""
    return _default().insert_receipt(receipt_data, exist_ok=exist_ok)


def insert_receipts(many: Iterable[Mapping[str, Any]], *, exist_ok: bool = False) -> list[str]:
    """See `ReceiptRepository.insert_receipts`."""
    return _default().insert_receipts(many, exist_ok=exist_ok)


def get_pending_receipts(limit: int = 50) -> list[Receipt]:
    """See `ReceiptRepository.get_pending_receipts`."""
    return _default().get_pending_receipts(limit)


def get_receipt_by_id(receipt_id: str | uuid.UUID) -> Receipt | None:
    """See `ReceiptRepository.get_receipt_by_id`."""
    return _default().get_receipt_by_id(receipt_id)


def mark_synced(receipt_id: str | uuid.UUID, server_time: int) -> bool:
    """See `ReceiptRepository.mark_synced`."""
    return _default().mark_synced(receipt_id, server_time)


def increment_retry_count(receipt_id: str | uuid.UUID, error: str) -> int:
    """See `ReceiptRepository.increment_retry_count`."""
    return _default().increment_retry_count(receipt_id, error)


def move_to_dlq(receipt_id: str | uuid.UUID, reason: str) -> bool:
    """See `ReceiptRepository.move_to_dlq`."""
    return _default().move_to_dlq(receipt_id, reason)


def update_receipt_status(receipt_id: str | uuid.UUID, status: str) -> bool:
    """See `ReceiptRepository.update_receipt_status`."""
    return _default().update_receipt_status(receipt_id, status)


def get_buffer_status() -> BufferStatus:
    """See `ReceiptRepository.get_buffer_status`."""
    return _default().get_buffer_status()


def transaction() -> AbstractContextManager[Session]:
    """See `ReceiptRepository.transaction`."""
    return _default().transaction()


def log_event(
    event_type: str, *, receipt_id: str | uuid.UUID | None = None, metadata: Mapping[str, Any] | None = None
) -> int:
    """See `ReceiptRepository.log_event`."""
    return _default().log_event(event_type, receipt_id=receipt_id, metadata=metadata)


def get_events(
    limit: int = 100, *, event_type: str | None = None, receipt_id: str | uuid.UUID | None = None
) -> list[BufferEvent]:
    """See `ReceiptRepository.get_events`."""
    return _default().get_events(limit, event_type=event_type, receipt_id=receipt_id)


def get_config(key: str) -> int | str | None:
    """See `ReceiptRepository.get_config`."""
    return _default().get_config(key)


def set_config(key: str, value: int | str) -> None:
    """See `ReceiptRepository.set_config`."""
    _default().set_config(key, value)


def deliver_pending(send: Send, limit: int = 50) -> DeliveryReport:
    """See `kkt_buffer.deliver_pending`."""
    return delivery.deliver_pending(_default(), send, limit)


def list_dead_letters(open_only: bool = True, *, limit: int = 100) -> list[DeadLetter]:  # noqa: FBT001, FBT002 (the design's signature)
    """See `ReceiptRepository.list_dead_letters`."""
    return _default().list_dead_letters(open_only, limit=limit)


def requeue(receipt_id: str | uuid.UUID, *, actor: str, reason: str) -> None:
    """See `ReceiptRepository.requeue`."""
    _default().requeue(receipt_id, actor=actor, reason=reason)


def resolve(receipt_id: str | uuid.UUID, *, actor: str, reason: str) -> None:
    """See `ReceiptRepository.resolve`."""
    _default().resolve(receipt_id, actor=actor, reason=reason)
