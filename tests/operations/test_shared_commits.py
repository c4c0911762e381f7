"""Threads that insert at one moment share a commit, and each has its own result or error."""

import threading

import pytest
from builders import NOON, an_id, commits, new_receipt, stamps, together
from sqlalchemy import event, text

from kkt_buffer import (
    BufferFullError,
    DuplicateReceiptError,
    InvalidConfigError,
    ReceiptBufferError,
    ReceiptRepository,
)

THREADS = 8


class Crowd:
    """
    Threads that insert one receipt each while nobody can commit.

    The first of them to write asks for the time inside its transaction, and is kept there until all others have called.
    """

    def __init__(self, engine):
        self.repository = ReceiptRepository(engine, now=self.now)
        self.repository.get_buffer_status()  # the schema has been looked at
        self.missing = threading.Semaphore(0)
        self.callers = 0
        self.in_the_transaction = lambda: None

    def now(self):
        """The wall clock."""
        callers, self.callers = self.callers, 0
        if callers:
            for _ in range(callers):
                self.missing.acquire(timeout=10)
            threading.Event().wait(0.2)  # there is no sign of a thread that waits; one that is late commits for itself
            self.in_the_transaction()
        return NOON

    def insert(self, receipts, **options):
        """What became of each of the receipts: its id, or its error."""
        self.callers = len(receipts)

        def insert(number):
            self.missing.release()
            try:
                return self.repository.insert_receipt(receipts[number], **options)
            except BaseException as error:  # noqa: BLE001 (whatever it is, the test looks at it)
                return error

        return together(len(receipts), insert)

    def assert_told(self, outcomes):
        """What was acknowledged is stored, nothing else is, every error is one thread's own, and work goes on."""
        refused = [outcome for outcome in outcomes if not isinstance(outcome, str)]
        assert set(of_kind(str, outcomes)) == set(self.stored)
        assert len(refused) == len({id(error) for error in refused})
        self.callers = 0
        assert self.repository.log_event("sync_started")

    @property
    def stored(self):
        return [receipt.id for receipt in self.repository.get_pending_receipts(1000)]


@pytest.fixture
def crowd(engine):
    return Crowd(engine)


def of_kind(kind, outcomes):
    return [outcome for outcome in outcomes if isinstance(outcome, kind)]


class TestTogether:
    def test_fewer_commits(self, crowd, engine):
        """Threads share commits, and each receipt has its own place in the order."""
        with commits(engine) as seen:
            ids = crowd.insert([new_receipt() for _ in range(THREADS)])
        assert 0 < len(seen) < THREADS
        assert sorted(ids) == sorted(crowd.stored)
        assert [(NOON, number) for number in range(THREADS)] == stamps(crowd.repository.get_pending_receipts())

    def test_one_thread(self, crowd, engine):
        """One thread alone commits each of its receipts before it has the answer."""
        with commits(engine) as seen:
            for expected in (1, 2, 3):
                crowd.repository.insert_receipt(new_receipt())
                assert len(seen) == expected

    def test_inside_transaction(self, crowd, engine):
        """Inside transaction() a receipt belongs to that commit."""
        with commits(engine) as seen:
            with crowd.repository.transaction():
                crowd.repository.insert_receipt(new_receipt())
                assert [] == seen
            assert len(seen) == 1


class TestOwnErrors:
    def test_full(self, crowd):
        """As many as there is room for are stored; each of the others has an error of its own."""
        crowd.repository.set_config("buffer_capacity", 3)
        outcomes = crowd.insert([new_receipt() for _ in range(THREADS)])
        full = of_kind(BufferFullError, outcomes)
        assert (3, THREADS - 3) == (len(of_kind(str, outcomes)), len(full))
        assert {(3, 3, 1)} == {(error.undelivered, error.capacity, error.wanted) for error in full}
        crowd.assert_told(outcomes)

    def test_known(self, crowd):
        """Of those with one id, one is stored and the others are duplicates; neighbours are not concerned."""
        same = an_id()
        outcomes = crowd.insert([new_receipt(id=same), new_receipt(id=same), new_receipt(id=same), new_receipt()])
        assert len(of_kind(DuplicateReceiptError, outcomes)) == 2
        assert isinstance(outcomes[3], str)
        crowd.assert_told(outcomes)

    def test_replay(self, crowd):
        """With exist_ok, identical ones have all the same answer."""
        same = an_id()
        assert [same] * 4 == crowd.insert([new_receipt(id=same)] * 4, exist_ok=True)
        assert [same] == crowd.stored

    def test_malformed(self, crowd):
        """A malformed receipt is its own caller's fault."""
        outcomes = crowd.insert([new_receipt(), new_receipt(), new_receipt(pos_id=""), new_receipt()])
        assert isinstance(outcomes[2], ValueError)
        assert len(of_kind(str, outcomes)) == 3
        crowd.assert_told(outcomes)

    def test_invalid_capacity(self, crowd, engine):
        with engine.begin() as connection:
            connection.execute(text("UPDATE config SET value = 'abc' WHERE key = 'buffer_capacity'"))
        outcomes = crowd.insert([new_receipt() for _ in range(3)])
        assert len(of_kind(InvalidConfigError, outcomes)) == 3
        assert [] == crowd.stored


class TestInterrupted:
    def test_before_the_commit(self, crowd):
        """A thread is stopped inside the shared transaction: no other waits for ever, none is told a wrong thing."""

        def stop():
            crowd.in_the_transaction = lambda: None
            raise SystemExit

        crowd.in_the_transaction = stop
        outcomes = crowd.insert([new_receipt() for _ in range(4)])
        assert len(of_kind(SystemExit, outcomes)) == 1
        assert len(of_kind((str, ReceiptBufferError), outcomes)) == 3
        crowd.assert_told(outcomes)

    def test_after_the_commit(self, crowd, engine):
        """A thread is stopped when the commit is done: what the others are told is stored."""

        def stop(*_):
            event.remove(engine, "reset", stop)
            raise SystemExit

        crowd.in_the_transaction = lambda: event.listen(engine, "reset", stop)
        outcomes = crowd.insert([new_receipt() for _ in range(4)])
        assert len(of_kind(SystemExit, outcomes)) == 1
        assert len(of_kind((str, ReceiptBufferError), outcomes)) == 3
        assert set(of_kind(str, outcomes)) <= set(crowd.stored)


class TestNested:
    def test_clock_that_writes(self, engine):
        """A `now` that writes: one of the two calls is refused, and what is acknowledged is what is stored."""
        asked, acknowledged, refused = [], [], []

        def insert():
            try:
                acknowledged.append(repository.insert_receipt(new_receipt()))
            except ReceiptBufferError as error:
                refused.append(error)

        def now():
            if not asked:
                asked.append(1)
                insert()
            return NOON

        repository = ReceiptRepository(engine, now=now)
        insert()
        assert (1, 1) == (len(acknowledged), len(refused))
        assert acknowledged == [receipt.id for receipt in repository.get_pending_receipts()]
