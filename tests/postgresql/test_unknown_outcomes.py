"""
The connection is cut while a commit is under way, so that the client cannot know its outcome from that connection.

An insert is repeated by its id, and the caller is told the truth; where no repetition can tell, `OutcomeUnknownError`
names the receipts.
"""

import itertools
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from builders import an_id, new_receipt, together
from postgresql.cluster import wait_until
from postgresql.proxy import Cut
from servers import a_free_port
from sqlalchemy import event

from kkt_buffer import (
    BufferBusyError,
    BufferFullError,
    BufferStorageError,
    ConnectionLostError,
    DuplicateReceiptError,
    OutcomeUnknownError,
)
from kkt_buffer.backend import backend_of

EVERYWHERE = pytest.mark.parametrize("cut", Cut, ids=[cut.name.lower() for cut in Cut])
CUTS = 51
THREADS = 6


@pytest.fixture
def repository(open_repository, through_proxy):
    return open_repository(through_proxy)


@pytest.fixture
def undisturbed(open_repository, server_buffer):
    """The same buffer, not through the proxy."""
    return open_repository(server_buffer)


def stored(repository):
    """The ids of all pending receipts."""
    return sorted(receipt.id for receipt in repository.get_pending_receipts(10_000))


class TestInsert:
    @pytest.mark.slow
    def test_threads(self, repository, proxy, undisturbed):
        """Cut 51 times, at all three places, every caller is told stored, and stored it is, once."""
        undisturbed.set_config("buffer_capacity", 10_000)
        cuts = itertools.cycle(Cut)

        def work(number):
            told = []
            while proxy.cuts < CUTS:
                document = {"cut": f"<{number}/{len(told)}>"}
                if len(told) % 4 == 0:
                    proxy.cut(document["cut"], next(cuts))
                told.append(repository.insert_receipt(new_receipt(fiscal_doc=document)))
            return told

        told = [receipt_id for ids in together(THREADS, work) for receipt_id in ids]
        assert stored(undisturbed) == sorted(told)

    @EVERYWHERE
    def test_alone(self, repository, proxy, undisturbed, cut):
        """A receipt with an id of its own is no duplicate of itself."""
        own = an_id()
        proxy.cut(own, cut)
        assert own == repository.insert_receipt(new_receipt(id=own))
        assert 1 == proxy.cuts
        assert [own] == stored(undisturbed)

    @pytest.fixture
    def pool(self):
        with ThreadPoolExecutor(8) as pool:
            yield pool

    @pytest.fixture
    def queued(self, repository, undisturbed, pool):
        """Insert these receipts, so that they share a commit after another one; returns the futures."""

        def queued(receipts):
            with undisturbed.transaction() as session:  # keeps the first one waiting, so that the others queue
                backend_of(undisturbed.engine).lock(session.connection())
                first = pool.submit(repository.insert_receipt, new_receipt())
                waiting = "SELECT COUNT(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
                wait_until(lambda: session.connection().exec_driver_sql(waiting).scalar_one())
                futures = [pool.submit(repository.insert_receipt, receipt) for receipt in receipts]
                wait_until(lambda: all(future.running() for future in futures))
                time.sleep(0.5)  # until each of them is in the queue
            first.result()
            return futures

        return queued

    @pytest.fixture
    def commit_together(self, proxy, pool, queued):
        """
        Insert these receipts in one commit, whose answer is cut off; the server is out of reach then. Meanwhile,
        `meanwhile` is submitted. Returns the futures; the caller lets the server be reached again.
        """

        def commit_together(receipts, *meanwhile):
            later = []

            def lose_the_server():
                proxy.server_port = a_free_port()
                later.extend(pool.submit(call) for call in meanwhile)

            proxy.cut(receipts[0]["id"], Cut.AFTER, lose_the_server)
            futures = queued(receipts)
            wait_until(lambda: proxy.cuts)
            return futures, later

        return commit_together

    def test_group_with_refused(self, repository, proxy, undisturbed, queued):
        """One of a group is refused, and then the answer to the commit is cut off: that one is still refused."""
        known, receipt = new_receipt(id=an_id()), new_receipt(id=an_id())
        undisturbed.insert_receipt(known)
        savepoints = []

        def cut(_connection, name):
            savepoints.append(name)
            if len(savepoints) == 1:
                proxy.cut(receipt["id"], Cut.AFTER)

        event.listen(repository.engine, "savepoint", cut)
        stored_one, refused = queued([receipt, known])
        assert receipt["id"] == stored_one.result()
        assert isinstance(refused.exception(), DuplicateReceiptError)
        assert 1 == proxy.cuts

    def test_batch_without_server(self, repository, proxy, undisturbed):
        """The server does not come back: whether the batch is stored is not known, and all of it is named."""
        ids = [an_id() for _ in range(3)]

        def lose_the_server():
            proxy.server_port = a_free_port()

        proxy.cut(ids[1], Cut.AFTER, lose_the_server)
        with pytest.raises(OutcomeUnknownError) as raised:
            repository.insert_receipts(new_receipt(id=own) for own in ids)
        assert ids == list(raised.value.receipt_ids)
        assert sorted(ids) == stored(undisturbed)

    def test_group(self, repository, proxy, undisturbed, commit_together):
        """
        The server does not come back: each thread is told of its own receipt, and one that came later, of which nothing
        was sent, is told so.
        """
        receipts = [new_receipt(id=an_id()) for _ in range(3)]
        futures, [later] = commit_together(receipts, lambda: repository.insert_receipt(new_receipt()))
        for receipt, future in zip(receipts, futures, strict=True):
            assert isinstance(future.exception(), OutcomeUnknownError)
            assert (receipt["id"],) == future.exception().receipt_ids
        assert isinstance(later.exception(), ConnectionLostError)
        assert 4 == len(stored(undisturbed))

    def test_group_with_later(self, repository, proxy, undisturbed, commit_together):
        """The server comes back: what came later is told of its own outcome, not of that of the others."""
        receipts = [new_receipt(id=an_id()) for _ in range(3)]
        known = new_receipt(id=an_id())
        undisturbed.insert_receipt(known)
        claimed = undisturbed.claim_pending()[0]
        port = proxy.server_port
        futures, [duplicate, failure] = commit_together(
            receipts,
            lambda: repository.insert_receipt(known),
            lambda: repository.record_failure(claimed.id, "HTTP 500", claimed.lease_token),
        )
        time.sleep(0.1)
        proxy.server_port = port
        assert [receipt["id"] for receipt in receipts] == [future.result() for future in futures]
        assert isinstance(duplicate.exception(), DuplicateReceiptError)
        failure.result()
        assert 1 == undisturbed.get_receipt_by_id(claimed.id).retry_count

    def test_group_that_waits(self, undisturbed, server_buffer, open_repository):
        """Threads that share a commit wait for the lock together, not one after another."""
        repository = open_repository(server_buffer, busy_timeout=1)
        repository.get_buffer_status()
        waits = []

        def note(_connection, _cursor, statement, *_):
            waits.append(statement)

        event.listen(repository.engine, "before_cursor_execute", note)

        def insert(_):
            with pytest.raises(BufferBusyError):
                repository.insert_receipt(new_receipt())

        with undisturbed.transaction() as session:
            backend_of(undisturbed.engine).lock(session.connection())
            together(8, insert)
        assert len(waits) <= 3  # the first one alone, then those that had queued meanwhile

    def test_leader_interrupted(self, repository, proxy, undisturbed, commit_together):
        """Who repeats the commit is interrupted: the others do not take their own receipts for those of somebody."""
        inserts = []

        def interrupt(_connection, _cursor, statement, *_):
            if "kkt_insert_receipts" in statement:
                inserts.append(1)
                if len(inserts) == 3:
                    raise KeyboardInterrupt

        event.listen(repository.engine, "before_cursor_execute", interrupt)
        receipts = [new_receipt(id=an_id()) for _ in range(2)]
        port = proxy.server_port
        futures, _ = commit_together(receipts)
        proxy.server_port = port
        told = {receipt["id"]: future.exception() for receipt, future in zip(receipts, futures, strict=True)}
        [[own, other]] = [pair for pair in told.items() if not isinstance(pair[1], KeyboardInterrupt)]
        assert isinstance(other, OutcomeUnknownError)
        assert "may be stored or not" in str(other)
        assert (own,) == other.receipt_ids

    @EVERYWHERE
    def test_batch(self, repository, proxy, undisturbed, cut):
        """All of a batch, once, in its order."""
        ids = [an_id() for _ in range(5)]
        proxy.cut(ids[3], cut)
        assert ids == repository.insert_receipts(new_receipt(id=own) for own in ids)
        assert 1 == proxy.cuts
        assert sorted(ids) == stored(undisturbed)
        assert ids == [receipt.id for receipt in undisturbed.get_pending_receipts()]

    @EVERYWHERE
    def test_duplicate(self, repository, proxy, undisturbed, cut):
        """An id that was known with another document before is refused."""
        own = undisturbed.insert_receipt(new_receipt(fiscal_doc="{}"))
        proxy.cut(own, cut)
        with pytest.raises(DuplicateReceiptError):
            repository.insert_receipt(new_receipt(id=own))
        assert "{}" == undisturbed.get_receipt_by_id(own).fiscal_doc

    def test_full(self, repository, proxy, undisturbed):
        """Full at the second try: the first one may still be committed, so its outcome is unknown."""
        own = an_id()
        undisturbed.set_config("buffer_capacity", 1)
        proxy.cut(own, Cut.BEFORE, meanwhile=lambda: undisturbed.insert_receipt(new_receipt()))
        with pytest.raises(OutcomeUnknownError) as raised:
            repository.insert_receipt(new_receipt(id=own))
        assert [own] == list(raised.value.receipt_ids)

    def test_full_at_once(self, repository, proxy, undisturbed):
        """Full, and stored by the first try: the caller is told stored."""
        own = an_id()
        undisturbed.set_config("buffer_capacity", 1)
        proxy.cut(own, Cut.AFTER)
        assert own == repository.insert_receipt(new_receipt(id=own))
        with pytest.raises(BufferFullError):
            repository.insert_receipt(new_receipt())


class TestTransaction:
    @EVERYWHERE
    def test_unknown(self, repository, proxy, undisturbed, cut):
        """The caller's own block cannot be repeated: the error names its receipts, and they are stored all or none."""
        own = an_id()
        proxy.cut(own, cut)
        with pytest.raises(OutcomeUnknownError, match=own) as raised:
            with repository.transaction():
                repository.insert_receipt(new_receipt(id=own))
                batch = repository.insert_receipts([new_receipt(), new_receipt()])
        assert [own, *batch] == list(raised.value.receipt_ids)
        assert 1 == proxy.cuts
        if cut is not Cut.MEANWHILE:  # there the server may not have ended yet
            assert stored(undisturbed) == ([] if cut is Cut.BEFORE else sorted([own, *batch]))

    def test_next(self, repository, proxy, undisturbed):
        """The next call finds a new connection."""
        own = an_id()
        proxy.cut(own, Cut.AFTER)
        with pytest.raises(OutcomeUnknownError):
            with repository.transaction():
                repository.insert_receipt(new_receipt(id=own))
        assert own == repository.insert_receipt(new_receipt(id=own), exist_ok=True)

    def test_before_commit(self, repository, server, undisturbed):
        """A connection that breaks before the commit has stored nothing, and that is said."""
        with pytest.raises(BufferStorageError) as raised:
            with repository.transaction() as session:
                repository.insert_receipt(new_receipt())
                backend = session.connection().exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
                server.execute(f"SELECT pg_terminate_backend({backend})")
                repository.insert_receipt(new_receipt())
        assert not isinstance(raised.value, OutcomeUnknownError)
        assert [] == stored(undisturbed)


class TestDelivery:
    @EVERYWHERE
    def test_mark_synced(self, repository, proxy, undisturbed, cut):
        """A delivery is recorded once, whatever was cut off."""
        own = undisturbed.insert_receipt(new_receipt())
        proxy.cut(own, cut)
        assert repository.mark_synced(own, 5)
        assert 1 == proxy.cuts
        assert 1 == len(undisturbed.get_events(receipt_id=own, event_type="receipt_synced"))

    @EVERYWHERE
    def test_claim(self, repository, proxy, undisturbed, cut):
        """A claim is repeated by its token: the receipts are handed to the caller, not lost until a lease is over."""
        own = undisturbed.insert_receipt(new_receipt(pos_id="till-to-be-cut"))
        proxy.cut("till-to-be-cut", cut)
        assert [own] == [receipt.id for receipt in repository.claim_pending(pos_id="till-to-be-cut")]
        assert 1 == proxy.cuts
