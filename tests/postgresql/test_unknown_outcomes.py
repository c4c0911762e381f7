"""
The connection is cut while a commit is under way, so that the client cannot know its outcome from that connection.

An insert is repeated by its id, and the caller is told the truth; where no repetition can tell, `OutcomeUnknownError`
names the receipts.
"""

import itertools

import pytest
from builders import an_id, new_receipt, together
from postgresql.proxy import Cut

from kkt_buffer import BufferFullError, BufferStorageError, DuplicateReceiptError, OutcomeUnknownError

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
