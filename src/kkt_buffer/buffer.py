"""
The functional interface: the operations of one default repository, for services that need only one buffer.

Each function has the signature and the docstring of the `ReceiptRepository` method with the same name. The names that
services of the `sqlite3` version import are all here.
"""

import functools
import inspect
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from sqlalchemy import URL, Engine

from kkt_buffer import delivery, migrate
from kkt_buffer.engine import create_buffer_engine
from kkt_buffer.errors import BufferFullError, ReceiptNotFoundError
from kkt_buffer.models import Receipt
from kkt_buffer.repository import BufferStatus, ReceiptRepository

__all__ = [
    "BufferFullError",
    "BufferStatus",
    "Receipt",
    "ReceiptNotFoundError",
    "close_buffer_db",
    "deliver_pending",
    "get_buffer_status",
    "get_config",
    "get_db",
    "get_events",
    "get_pending_receipts",
    "get_receipt_by_id",
    "increment_retry_count",
    "init_buffer_db",
    "insert_receipt",
    "insert_receipts",
    "list_dead_letters",
    "log_event",
    "mark_synced",
    "move_to_dlq",
    "repository",
    "requeue",
    "resolve",
    "set_config",
    "transaction",
    "update_receipt_fiscal_doc",
    "update_receipt_status",
]

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

DEFAULT_PATH = "data/buffer.db"
PREDECESSORS_PATH = "kkt_adapter/data/buffer.db"
PATH_VARIABLE = "BUFFER_DB_PATH"

_lock = threading.RLock()
_engine: Engine | None = None
_repository: ReceiptRepository | None = None
# The buffer that could not be opened. The next use tries it again, instead of opening another one.
_refused: str | os.PathLike[str] | URL | None = None


def init_buffer_db(db_path: str | os.PathLike[str] | URL | None = None, *, upgrade: bool = True) -> Engine:
    """
    Open the default buffer, create and upgrade it if needed, and return its engine.

    `db_path` is a path, a URL or `":memory:"`; without it, the environment's BUFFER_DB_PATH, else
    `data/buffer.db`. Safe when several processes start at once. A second call closes the first engine. With
    `upgrade=False` the file must exist and have the schema of this release.

    Raises `BufferStorageError`, `BufferDamagedError` or `SchemaError` if this buffer cannot be used; the one that was
    open before stays open.
    """
    global _engine, _repository, _refused  # noqa: PLW0603 (as in close_buffer_db)
    with _lock:
        path = os.environ.get(PATH_VARIABLE) or DEFAULT_PATH if db_path is None else db_path
        _refused = path
        engine = _opened(path, upgrade=upgrade)
        close_buffer_db()
        _engine, _repository = engine, ReceiptRepository(engine)
        _warn_of_predecessor(_repository, Path(str(engine.url.database)))
        return engine


def _warn_of_predecessor(repository: ReceiptRepository, path: Path) -> None:
    """The default path of the `sqlite3` version is another one: what waits there would stay there."""
    old = Path(PREDECESSORS_PATH)
    if not old.is_file() or not path.is_file() or old.samefile(path):
        return
    if not repository.get_buffer_status().total_receipts:
        logger.warning(
            "%s is empty, but there is a buffer of the sqlite3 version at %s. What waits there is not delivered from "
            "here. To go on with it, stop the old program and set BUFFER_DB_PATH=%s (or give this path to "
            "init_buffer_db). If it is empty, move it away.",
            path,
            old.resolve(),
            old,
        )


def _opened(path: str | os.PathLike[str] | URL, *, upgrade: bool) -> Engine:
    if not upgrade:
        # Read-only first: a missing file must not be created.
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
    """The engine of the default buffer, opened on first use. If opening failed before, it is tried again."""
    with _lock:
        return _engine or init_buffer_db(_refused)


def close_buffer_db() -> None:
    """Close the default buffer; the next use opens it again. Idempotent."""
    global _engine, _repository, _refused  # noqa: PLW0603 (the default repository is what this module is for)
    with _lock:
        if _engine is not None:
            _engine.dispose()
        _engine = _repository = _refused = None


def repository() -> ReceiptRepository:
    """The default repository, opened on first use; its operations join `transaction()` of this module."""
    found = _repository
    if found is None:
        with _lock:
            get_db()
            found = _repository
            assert found is not None  # noqa: S101 (get_db has just set it, under the same lock)
    return found


def _of_default(operation: Callable[Concatenate[ReceiptRepository, P], R]) -> Callable[P, R]:
    """The same operation on the default repository."""

    @functools.wraps(operation, assigned=("__name__", "__doc__"))
    def function(*args: P.args, **kwargs: P.kwargs) -> R:
        return operation(repository(), *args, **kwargs)

    _, *parameters = inspect.signature(operation).parameters.values()
    vars(function)["__signature__"] = inspect.signature(operation).replace(parameters=parameters)
    return function


insert_receipt = _of_default(ReceiptRepository.insert_receipt)
insert_receipts = _of_default(ReceiptRepository.insert_receipts)
update_receipt_fiscal_doc = _of_default(ReceiptRepository.update_receipt_fiscal_doc)
get_pending_receipts = _of_default(ReceiptRepository.get_pending_receipts)
get_receipt_by_id = _of_default(ReceiptRepository.get_receipt_by_id)
mark_synced = _of_default(ReceiptRepository.mark_synced)
increment_retry_count = _of_default(ReceiptRepository.increment_retry_count)
move_to_dlq = _of_default(ReceiptRepository.move_to_dlq)
update_receipt_status = _of_default(ReceiptRepository.update_receipt_status)
get_buffer_status = _of_default(ReceiptRepository.get_buffer_status)
transaction = _of_default(ReceiptRepository.transaction)
log_event = _of_default(ReceiptRepository.log_event)
get_events = _of_default(ReceiptRepository.get_events)
get_config = _of_default(ReceiptRepository.get_config)
set_config = _of_default(ReceiptRepository.set_config)
list_dead_letters = _of_default(ReceiptRepository.list_dead_letters)
requeue = _of_default(ReceiptRepository.requeue)
resolve = _of_default(ReceiptRepository.resolve)
deliver_pending = _of_default(delivery.deliver_pending)
