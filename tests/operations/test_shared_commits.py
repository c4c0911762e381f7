"""Threads that insert or record a delivery at one moment share a commit, and each has its own result or error."""

import threading
from functools import partial

import pytest
from builders import NOON, an_id, commits, new_receipt, stamps, together
from sqlalchemy import event, text

from kkt_buffer import (
    BufferFullError,
    DuplicateReceiptError,
    InvalidConfigError,
    LeaseLostError,
    ReceiptBufferError,
    ReceiptNotFoundError,
    ReceiptRepository,
    ReceiptStatus,
)

THREADS = 8


class Crowd:
    """Threads that call while another one has a transaction open, so that none can commit before all have called."""

    def __init__(self, engine):
        self.in_the_transaction = lambda: None
        self.repository = ReceiptRepository(engine, now=self.now)
        self.repository.get_buffer_status()  # the schema has been looked at

    def now(self):
        """The wall clock: read once in each transaction, behind the write lock."""
        self.in_the_transaction()
        return NOON

    def call(self, *calls):
        """What became of each of the calls: its result, or its error."""
        all_here = threading.Barrier(len(calls) + 1)

        def hold():
            with self.repository.transaction():
                all_here.wait(timeout=10)
                threading.Event().wait(0.2)  # there is no sign of a thread that waits; a late one commits for itself

        def run(number):
            if number == len(calls):
                return hold()
            all_here.wait(timeout=10)
            try:
                return calls[number]()
            except BaseException as error:  # noqa: BLE001 (whatever it is, the test looks at it)
                return error

        return together(len(calls) + 1, run)[:-1]

    def insert(self, receipts, **options):
        return self.call(*(partial(self.repository.insert_receipt, receipt, **options) for receipt in receipts))

    def claimed(self):
        """A receipt for each thread, leased."""
        self.repository.insert_receipts(new_receipt() for _ in range(THREADS))
        return self.repository.claim_pending(THREADS)

    def assert_told(self, outcomes):
        """What was acknowledged is stored, nothing else is, every error is one thread's own, and work goes on."""
        refused = [outcome for outcome in outcomes if not isinstance(outcome, str)]
        assert set(of_kind(str, outcomes)) == set(self.stored)
        assert len(refused) == len({id(error) for error in refused})
        assert self.repository.log_event("sync_started")

    @property
    def stored(self):
        return [receipt.id for receipt in self.repository.get_pending_receipts(1000)]


@pytest.fixture
def crowd(engine):
    return Crowd(engine)


@pytest.fixture
def assert_shared(engine):
    """Run calls of a crowd, and see that there were fewer commits than calls."""

    def run(crowd, *calls):
        with commits(engine) as seen:
            outcomes = crowd.call(*calls)
        # One of the commits is that of the thread that held all others up.
        assert 1 < len(seen) <= len(calls)
        return outcomes

    return run


def of_kind(kind, outcomes):
    return [outcome for outcome in outcomes if isinstance(outcome, kind)]


class TestTogether:
    def test_inserts(self, crowd, assert_shared):
        """Threads share commits, and each receipt has its own place in the order."""
        ids = assert_shared(crowd, *(partial(crowd.repository.insert_receipt, new_receipt()) for _ in range(THREADS)))
        assert sorted(ids) == sorted(crowd.stored)
        assert [(NOON, number) for number in range(THREADS)] == stamps(crowd.repository.get_pending_receipts())

    def test_held_and_not(self, crowd, assert_shared):
        """Held receipts share commits with those that are not; each is what its caller asked for."""
        receipts = [(new_receipt(id=an_id()), number % 2 == 0) for number in range(THREADS)]
        assert_shared(crowd, *(partial(crowd.repository.insert_receipt, new, hold=hold) for new, hold in receipts))
        assert {new["id"] for new, hold in receipts if hold} == {held.id for held in crowd.repository.list_held()}
        assert {new["id"] for new, hold in receipts if not hold} == set(crowd.stored)

    def test_deliveries(self, crowd, assert_shared):
        """Threads that record deliveries share commits; each keeps its own time of the OFD."""
        receipts = crowd.claimed()
        outcomes = assert_shared(
            crowd,
            *(
                partial(crowd.repository.mark_synced, receipt.id, NOON + number)
                for number, receipt in enumerate(receipts)
            ),
        )
        assert [True] * THREADS == outcomes
        synced = [crowd.repository.get_receipt_by_id(receipt.id) for receipt in receipts]
        assert [("synced", NOON + number) for number in range(THREADS)] == [
            (receipt.status, receipt.hlc_server_time) for receipt in synced
        ]

    def test_failures(self, crowd, assert_shared):
        """And those that record failed attempts; each keeps its own error."""
        receipts = crowd.claimed()
        outcomes = assert_shared(
            crowd,
            *(
                partial(crowd.repository.record_failure, receipt.id, f"HTTP 50{number}", receipt.lease_token)
                for number, receipt in enumerate(receipts)
            ),
        )
        assert [ReceiptStatus.PENDING] * THREADS == outcomes
        failed = [crowd.repository.get_receipt_by_id(receipt.id) for receipt in receipts]
        assert [(1, f"HTTP 50{number}") for number in range(THREADS)] == [
            (receipt.retry_count, receipt.last_error) for receipt in failed
        ]

    def test_of_every_kind(self, crowd, assert_shared):
        """Different operations share a commit too."""
        delivered, failed, *_ = crowd.claimed()
        outcomes = assert_shared(
            crowd,
            partial(crowd.repository.insert_receipt, new_receipt(id=(inserted := an_id()))),
            partial(crowd.repository.mark_synced, delivered.id, NOON),
            partial(crowd.repository.record_failure, failed.id, "HTTP 500", failed.lease_token),
        )
        assert [inserted, True, ReceiptStatus.PENDING] == outcomes

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
                receipt_id = crowd.repository.insert_receipt(new_receipt())
                crowd.repository.mark_synced(receipt_id, NOON)
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

    def test_unknown_receipt(self, crowd, assert_shared):
        """A delivery of a receipt that is not there is False, and the others are recorded."""
        receipts = crowd.claimed()
        ids = [*(receipt.id for receipt in receipts), an_id()]
        outcomes = assert_shared(crowd, *(partial(crowd.repository.mark_synced, known, NOON) for known in ids))
        assert [True] * THREADS + [False] == outcomes
        assert THREADS == crowd.repository.get_buffer_status().synced

    def test_dead_lettered(self, crowd, assert_shared):
        """A delivery that closes a dead letter does so beside others."""
        receipts = crowd.claimed()
        crowd.repository.move_to_dlq(receipts[3].id, "no answer")
        outcomes = assert_shared(
            crowd, *(partial(crowd.repository.mark_synced, receipt.id, NOON) for receipt in receipts)
        )
        assert [True] * THREADS == outcomes
        assert (THREADS, 0) == (
            crowd.repository.get_buffer_status().synced,
            crowd.repository.get_buffer_status().dlq_size,
        )

    def test_lease_lost(self, crowd, assert_shared):
        """A lost lease and an unknown receipt are their own callers' errors: every other attempt is counted."""
        receipts = crowd.claimed()
        attempts = [(receipt.id, receipt.lease_token) for receipt in receipts]
        attempts[2] = (receipts[2].id, an_id())
        attempts[5] = (an_id(), receipts[5].lease_token)
        outcomes = assert_shared(
            crowd, *(partial(crowd.repository.record_failure, known, "HTTP 500", token) for known, token in attempts)
        )
        assert isinstance(outcomes[2], LeaseLostError)
        assert isinstance(outcomes[5], ReceiptNotFoundError)
        assert THREADS - 2 == outcomes.count(ReceiptStatus.PENDING)
        after = [crowd.repository.get_receipt_by_id(receipt.id) for receipt in receipts]
        assert [1, 1, 0, 1, 1, 0, 1, 1] == [receipt.retry_count for receipt in after]
        assert {"syncing"} == {after[2].status, after[5].status}


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

        def listen():
            crowd.in_the_transaction = lambda: None
            event.listen(engine, "reset", stop)

        crowd.in_the_transaction = listen
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
