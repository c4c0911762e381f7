"""Receipts that come in: what is stored, what is refused, in which order they stand."""

import json
import uuid

import pytest
from builders import NOON, a_document, a_receipt, an_id, commits, new_receipt, snapshot, stamps
from samples import sample_receipts
from sqlalchemy import text

from kkt_buffer import (
    BufferFullError,
    DuplicateReceiptError,
    InvalidConfigError,
)


class TestInsertReceipt:
    def test_row(self, repository):
        """A new receipt is pending, with the present time and the first timestamp of its second."""
        receipt_id = repository.insert_receipt(new_receipt(fiscal_doc='{"a": 1}'))
        expected = {
            "id": receipt_id,
            "pos_id": "till-1",
            "created_at": NOON,
            "hlc_local_time": NOON,
            "hlc_logical_counter": 0,
            "hlc_server_time": None,
            "fiscal_doc": {"a": 1},
            "status": "pending",
            "retry_count": 0,
            "last_error": None,
            "synced_at": None,
        }
        assert expected == repository.get_receipt_by_id(receipt_id).to_dict()

    @pytest.mark.parametrize("number", range(40))
    def test_verbatim(self, repository, number):
        """Documents of every shape come back as they went in, byte for byte."""
        document = list(sample_receipts(40))[number]
        for document_text in (json.dumps(document), json.dumps(document, ensure_ascii=False, indent=1)):
            receipt = a_receipt(repository, fiscal_doc=document_text)
            assert document_text == receipt.fiscal_doc
            assert document == receipt.document

    def test_own_id(self, repository):
        """A caller's UUID is the receipt's id, in lower case, and finds it in every form."""
        own = uuid.uuid4()
        assert str(own) == repository.insert_receipt(new_receipt(id=str(own).upper()))
        for form in (own, str(own), str(own).upper()):
            assert str(own) == repository.get_receipt_by_id(form).id

    def test_event(self, repository):
        receipt_id = repository.insert_receipt(new_receipt())
        [added] = repository.get_events()
        assert ("receipt_added", receipt_id, NOON, {"pos_id": "till-1"}) == (
            added.event_type,
            added.receipt_id,
            added.timestamp,
            added.details,
        )

    def test_full(self, repository):
        """A buffer at capacity refuses the next receipt, says how full it is, and keeps what it had."""
        repository.set_config("buffer_capacity", 2)
        kept = [a_receipt(repository).id, a_receipt(repository, "syncing").id]
        with pytest.raises(BufferFullError, match="^Buffer full: 2 of 2 receipts") as refused:
            repository.insert_receipt(new_receipt())
        assert (2, 2, 1) == (refused.value.undelivered, refused.value.capacity, refused.value.wanted)
        assert repository.get_buffer_status().total_receipts == 2
        repository.mark_synced(kept[0], NOON)
        repository.insert_receipt(new_receipt())

    @pytest.mark.parametrize("status", ["synced", "failed"])
    def test_only_undelivered_count(self, repository, status):
        """What was delivered or dead-lettered takes no place."""
        repository.set_config("buffer_capacity", 1)
        a_receipt(repository, status)
        a_receipt(repository)

    def test_capacity_by_default(self, repository):
        for _ in range(200):
            repository.insert_receipt(new_receipt())
        with pytest.raises(BufferFullError, match="200 of 200"):
            repository.insert_receipt(new_receipt())

    def test_lowered_capacity(self, repository):
        """A capacity below what waits takes nothing away; there is no room until enough is delivered."""
        receipts = [a_receipt(repository) for _ in range(3)]
        repository.set_config("buffer_capacity", 1)
        with pytest.raises(BufferFullError, match="3 of 1"):
            repository.insert_receipt(new_receipt())
        for receipt in receipts:
            repository.mark_synced(receipt.id, NOON)
        repository.insert_receipt(new_receipt())

    def test_invalid_capacity(self, repository, engine):
        """A stored capacity that is invalid is named, and nothing is stored beyond it."""
        with engine.begin() as connection:
            connection.execute(text("UPDATE config SET value = 'abc' WHERE key = 'buffer_capacity'"))
        with pytest.raises(InvalidConfigError, match="config buffer_capacity is 'abc', expected a whole number from 1"):
            repository.insert_receipt(new_receipt())
        with pytest.raises(InvalidConfigError):
            repository.get_buffer_status()

    @pytest.mark.parametrize("full", [False, True])
    @pytest.mark.parametrize(
        ("change", "same_pos_id", "same_document"),
        [
            ({}, True, True),
            ({"pos_id": "till-2"}, False, True),
            ({"fiscal_doc": "{}"}, True, False),
            ({"pos_id": "till-2", "fiscal_doc": "{}"}, False, False),
        ],
    )
    def test_known_id(self, repository, engine, full, change, same_pos_id, same_document):
        """A known id is recognised, also when the buffer is full, and the stored receipt stays as it is."""
        known = new_receipt(id=an_id())
        repository.insert_receipt(known)
        if full:
            repository.set_config("buffer_capacity", 1)
        before = snapshot(engine)
        with pytest.raises(DuplicateReceiptError) as refused:
            repository.insert_receipt(known | change)
        assert (same_pos_id, same_document) == (refused.value.same_pos_id, refused.value.same_document)
        if refused.value.identical:
            assert known["id"] == repository.insert_receipt(known, exist_ok=True)
        else:
            with pytest.raises(DuplicateReceiptError):
                repository.insert_receipt(known | change, exist_ok=True)
        assert before == snapshot(engine)

    def test_replay_of_mapping(self, repository):
        """A mapping is the same as the text that it was stored as."""
        known = new_receipt(id=an_id(), fiscal_doc=a_document())
        assert repository.insert_receipt(known) == repository.insert_receipt(known, exist_ok=True)

    def test_exist_ok_new(self, repository):
        """With exist_ok, a new receipt is stored like any other."""
        assert repository.get_receipt_by_id(repository.insert_receipt(new_receipt(id=an_id()), exist_ok=True))

    @pytest.mark.parametrize(
        "wrong",
        [
            {},
            {"pos_id": "till-1"},
            new_receipt(pos_id=""),
            new_receipt(pos_id=5),
            new_receipt(fiscal_doc="[]"),
            new_receipt(fiscal_doc='{"a":NaN}'),
            new_receipt(fiscal_doc={"a": float("inf")}),
            new_receipt(fiscal_doc={"a": "\ud800"}),
            new_receipt(id="receipt-1"),
            new_receipt(amount=5),
            None,
        ],
    )
    def test_malformed(self, repository, engine, wrong):
        """A malformed receipt is refused, alone or in a batch, and nothing is changed."""
        before = snapshot(engine)
        with pytest.raises((ValueError, TypeError)):
            repository.insert_receipt(wrong)
        with pytest.raises((ValueError, TypeError)) as refused:
            repository.insert_receipts([new_receipt(), wrong])
        assert "in receipt 1 of the batch" in refused.value.__notes__[0]
        assert before == snapshot(engine)

    def test_large(self, repository):
        """A document of ten megabytes, or of 100,000 items, is stored like any other."""
        for document in ({"text": "ж" * 5_000_000}, {"items": [{"sum": n} for n in range(100_000)]}):
            assert document == a_receipt(repository, fiscal_doc=document).document

    def test_clock_set_back(self, repository, clock):
        """Timestamps go on upwards when the wall clock goes back or jumps; `created_at` is what the clock says."""
        made = []
        for seconds in (NOON, NOON + 100, NOON - 3600, NOON - 3600, NOON + 10**6, NOON + 1, 0):
            clock.seconds = seconds
            made.append(a_receipt(repository))
            assert seconds == made[-1].created_at
        assert stamps(made) == sorted(set(stamps(made)))
        assert stamps(made) == stamps(repository.get_pending_receipts())


class TestInsertReceipts:
    def test_order(self, repository):
        """A batch keeps its order, and gets one timestamp after the other."""
        ids = repository.insert_receipts(new_receipt() for _ in range(5))
        receipts = repository.get_pending_receipts()
        assert ids == [receipt.id for receipt in receipts]
        assert [(NOON, number) for number in range(5)] == stamps(receipts)

    def test_empty(self, repository):
        assert repository.insert_receipts([]) == []

    @pytest.mark.parametrize("many", [None, 5, new_receipt()])
    def test_not_several(self, repository, many):
        with pytest.raises(TypeError, match="many: expected several receipts"):
            repository.insert_receipts(many)

    def test_all_or_nothing(self, repository, engine):
        """A batch that does not fit is refused whole, and the error says what it wanted."""
        repository.set_config("buffer_capacity", 3)
        a_receipt(repository)
        before = snapshot(engine)
        with pytest.raises(BufferFullError, match="1 of 3 .* so 3 more cannot be taken"):
            repository.insert_receipts(new_receipt() for _ in range(3))
        assert before == snapshot(engine)
        assert len(repository.insert_receipts(new_receipt() for _ in range(2))) == 2

    def test_one_commit(self, repository, engine):
        """A batch costs one commit."""
        with commits(engine) as seen:
            repository.insert_receipts(new_receipt() for _ in range(50))
        assert len(seen) == 1

    def test_known_id(self, repository, engine):
        """One known id refuses the batch; with exist_ok an identical one is passed over."""
        known = new_receipt(id=an_id())
        repository.insert_receipt(known)
        before = snapshot(engine)
        batch = [new_receipt(id=an_id()), known, new_receipt()]
        with pytest.raises(DuplicateReceiptError) as refused:
            repository.insert_receipts(batch)
        assert known["id"] == refused.value.receipt_id
        assert before == snapshot(engine)
        ids = repository.insert_receipts(batch, exist_ok=True)
        assert ids[1] == known["id"]
        assert repository.get_buffer_status().pending == 3

    def test_duplicate_in_one_batch(self, repository, engine):
        """An id that a batch holds two times is a duplicate too."""
        twice = new_receipt(id=an_id())
        before = snapshot(engine)
        with pytest.raises(DuplicateReceiptError):
            repository.insert_receipts([twice, twice])
        assert before == snapshot(engine)
        assert [twice["id"]] * 2 == repository.insert_receipts([twice, twice], exist_ok=True)

    def test_replay_when_full(self, repository):
        """A batch that was stored already is recognised by a full buffer."""
        batch = [new_receipt(id=an_id()) for _ in range(2)]
        ids = repository.insert_receipts(batch)
        repository.set_config("buffer_capacity", 1)
        assert ids == repository.insert_receipts(batch, exist_ok=True)


@pytest.mark.parametrize("flag", [None, 0, "", [1], "no"])
def test_flags(repository, flag):
    """A flag may be any value, as everywhere in Python."""
    receipt = new_receipt(id=an_id())
    repository.insert_receipt(receipt, hold=flag)
    assert bool(flag) is bool(repository.list_held())
    repository.insert_receipts([receipt | {"id": an_id()}], hold=flag, exist_ok=flag)
    assert 2 * bool(flag) == len(repository.list_held())
