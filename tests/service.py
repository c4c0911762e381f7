"""
A service as others write it. It is not run: mypy and pyright read it, both strict (`make types`).

A line that must be refused says so by `type: ignore`; a checker that does not refuse it complains about the comment.
"""

from collections.abc import Iterator
from typing import assert_type
from uuid import UUID

from sqlalchemy import Engine, ForeignKey, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from kkt_buffer import (
    BufferEvent,
    BufferFullError,
    BufferStatus,
    DeadLetter,
    DeliveryReport,
    DuplicateReceiptError,
    Outcome,
    Receipt,
    ReceiptData,
    ReceiptRepository,
    ReceiptStatus,
    buffer,
    create_buffer_engine,
    deliver_pending,
    upgrade,
)


class Base(DeclarativeBase):
    """The tables of the service."""


class Sale(Base):
    """A sale and its receipt."""

    __tablename__ = "sales"

    id: Mapped[int] = mapped_column(primary_key=True)
    receipt_id: Mapped[str] = mapped_column(ForeignKey(Receipt.id))


def opened(path: str) -> ReceiptRepository:
    engine = create_buffer_engine(path, driver="sqlite3")
    upgrade(engine)
    Base.metadata.create_all(engine)
    return ReceiptRepository(engine)


def sell(repository: ReceiptRepository, receipt_id: UUID, document: bytes) -> str:
    receipt: ReceiptData = {"id": receipt_id, "pos_id": "till-1", "fiscal_doc": document}
    try:
        with repository.transaction() as session:
            stored = repository.insert_receipt(receipt, exist_ok=True)
            session.add(Sale(receipt_id=stored))
            return stored
    except BufferFullError as error:
        assert_type(error.capacity, int)
        raise
    except DuplicateReceiptError as error:
        assert_type(error.identical, bool)
        raise


def receipts_of_a_shift(many: int) -> Iterator[ReceiptData]:
    for number in range(many):
        yield {"pos_id": "till-1", "fiscal_doc": {"totalSum": number}}


def refused(repository: ReceiptRepository) -> None:
    repository.insert_receipt({"pos_id": "till-1"})  # type: ignore[typeddict-item]
    repository.insert_receipt({"pos_id": "till-1", "fiscal_doc": "{}", "sum": 1})  # type: ignore[typeddict-unknown-key]
    repository.update_receipt_status("an id", "sent")  # type: ignore[arg-type]
    buffer.update_receipt_status("an id", "sent")  # type: ignore[arg-type]
    buffer.insert_receipt({"pos_id": 5, "fiscal_doc": "{}"})  # type: ignore[typeddict-item]
    create_buffer_engine("buffer.db", driver="psycopg")  # type: ignore[arg-type]


def send(receipt: Receipt) -> int:
    assert_type(receipt.fiscal_doc, str)
    assert_type(receipt.status, ReceiptStatus)
    return receipt.created_at


def work(repository: ReceiptRepository) -> int:
    report = deliver_pending(repository, send)
    assert_type(report, DeliveryReport)
    return report.count(Outcome.SYNCED)


def watch(repository: ReceiptRepository) -> None:
    assert_type(repository.get_buffer_status(), BufferStatus)
    assert_type(repository.get_config("buffer_capacity"), int)
    assert_type(repository.get_config("shop"), int | str | None)
    assert_type(repository.get_events(5), list[BufferEvent])
    assert_type(repository.list_dead_letters(), list[DeadLetter])
    assert_type(repository.get_receipt_by_id("an id"), Receipt | None)
    with repository.reading() as session:
        assert_type(list(session.scalars(select(Receipt))), list[Receipt])


def functions() -> None:
    """The same as functions: no type is lost on the way."""
    assert_type(buffer.init_buffer_db(), Engine)
    assert_type(buffer.insert_receipts(receipts_of_a_shift(3)), list[str])
    assert_type(buffer.get_config("lease_seconds"), int)
    assert_type(buffer.get_config("shop"), int | str | None)
    assert_type(buffer.update_receipt_status("an id", ReceiptStatus.SYNCED), bool)
    assert_type(buffer.update_receipt_status("an id", "synced"), bool)
    assert_type(buffer.get_pending_receipts(), list[Receipt])
    assert_type(buffer.deliver_pending(send), DeliveryReport)
