"""Several operations, and a service's own rows, in one transaction."""

import asyncio

import pytest
from builders import NOON, a_receipt, an_id, new_receipt, snapshot, together
from sqlalchemy import create_engine, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from kkt_buffer import (
    BufferFullError,
    DuplicateReceiptError,
    ReceiptBufferError,
    ReceiptNotFoundError,
    ReceiptRepository,
)


class Own(DeclarativeBase):
    pass


class Sale(Own):
    """A service's own table beside ours."""

    __tablename__ = "sales"

    id: Mapped[int] = mapped_column(primary_key=True)
    receipt_id: Mapped[str]


@pytest.fixture
def sales(engine):
    Own.metadata.create_all(engine)

    def count():
        with engine.connect() as connection:
            return connection.scalar(text("SELECT COUNT(*) FROM sales"))

    return count


class TestTransaction:
    def test_together(self, repository, sales):
        """A receipt and a service's own row are committed together."""
        with repository.transaction() as session:
            receipt_id = repository.insert_receipt(new_receipt())
            session.add(Sale(receipt_id=receipt_id))
        assert (1, 1) == (repository.get_buffer_status().pending, sales())

    def test_not_at_all(self, repository, engine, sales):
        """Or neither of them."""
        before = snapshot(engine)
        with pytest.raises(RuntimeError), repository.transaction() as session:
            session.add(Sale(receipt_id=repository.insert_receipt(new_receipt())))
            session.flush()
            repository.set_config("buffer_capacity", 5)
            repository.log_event("sync_started")
            raise RuntimeError
        assert before == snapshot(engine)
        assert sales() == 0

    def test_sees_its_own(self, repository):
        """Operations inside see what those before them did."""
        with repository.transaction():
            receipt_id = repository.insert_receipt(new_receipt())
            assert repository.get_pending_receipts()[0].id == receipt_id
            assert repository.get_buffer_status().pending == 1
            repository.mark_synced(receipt_id, NOON)
            assert repository.get_receipt_by_id(receipt_id).status == "synced"
            assert repository.get_config("buffer_capacity") == 200

    def test_refused_inside(self, repository, sales):
        """An operation that is refused inside changes nothing, and the transaction can go on."""
        repository.set_config("buffer_capacity", 2)
        known = new_receipt(id=an_id())
        with repository.transaction() as session:
            repository.insert_receipt(known)
            session.add(Sale(receipt_id="1"))
            with pytest.raises(DuplicateReceiptError):
                repository.insert_receipt(known)
            with pytest.raises(BufferFullError):
                repository.insert_receipts([new_receipt(), new_receipt()])
            with pytest.raises(ReceiptNotFoundError):
                repository.increment_retry_count(an_id(), "timeout")
            repository.insert_receipt(new_receipt())
        assert (2, 1) == (repository.get_buffer_status().pending, sales())

    def test_block_inside(self, repository, sales):
        """A block inside that fails is undone alone."""
        with repository.transaction() as session:
            session.add(Sale(receipt_id="kept"))
            with pytest.raises(RuntimeError), repository.transaction() as same:
                assert session is same
                same.add(Sale(receipt_id="undone"))
                repository.insert_receipt(new_receipt())
                raise RuntimeError
        assert (0, 1) == (repository.get_buffer_status().pending, sales())

    def test_own_rows_at_fault(self, repository, sales):
        """A service's own row that the database refuses is not taken for a refused receipt."""
        with pytest.raises(IntegrityError, match="sales"), repository.transaction() as session:
            session.add_all([Sale(id=1, receipt_id="a"), Sale(id=1, receipt_id="b")])
            repository.insert_receipt(new_receipt())
        assert repository.get_buffer_status().pending == 0

    def test_detached_inside(self, repository):
        """What was returned inside stays complete when the transaction is rolled back."""
        with pytest.raises(RuntimeError), repository.transaction():
            receipt = a_receipt(repository)
            raise RuntimeError
        assert receipt.status == "pending"

    def test_threads(self, shared_repository):
        """Another thread is not inside: it sees nothing before the commit."""

        def pending(_number=0):
            return shared_repository.get_buffer_status().pending

        with shared_repository.transaction():
            shared_repository.insert_receipt(new_receipt())
            assert together(1, pending) == [0]
        assert pending() == 1

    def test_asyncio_tasks(self, repository):
        """
        A task that awaits inside a transaction does not drag others in.

        Their receipts would be acknowledged before the commit that they depend on.
        """

        async def careless(inside, done):
            with repository.transaction():
                repository.insert_receipt(new_receipt())
                inside.set()
                await done.wait()

        async def other(inside, done):
            await inside.wait()
            try:
                with pytest.raises(ReceiptBufferError, match="another asyncio task of this thread"):
                    repository.insert_receipt(new_receipt())
            finally:
                done.set()

        async def both():
            inside, done = asyncio.Event(), asyncio.Event()
            await asyncio.gather(careless(inside, done), other(inside, done))

        asyncio.run(both())
        assert repository.get_buffer_status().pending == 1
        repository.insert_receipt(new_receipt())

    def test_to_thread(self, repository):
        """The recommended way from asyncio: each operation in a thread."""

        async def many():
            calls = [asyncio.to_thread(repository.insert_receipt, new_receipt()) for _ in range(20)]
            return await asyncio.gather(*calls)

        assert len(set(asyncio.run(many()))) == 20
        assert repository.get_buffer_status().pending == 20


class TestEngine:
    def test_other_engine(self):
        """Without the guards of our own engine nothing that is promised would hold."""
        other = create_engine("sqlite://")
        with pytest.raises(TypeError, match="engine: expected one that create_buffer_engine made"):
            ReceiptRepository(other)
        other.dispose()

    def test_derived_engine(self, engine):
        derived = engine.execution_options(logging_token="till-1")
        assert ReceiptRepository(derived).insert_receipt(new_receipt())
