"""The operations, each by its contract."""

import asyncio
import json
import logging
import pickle
import threading
import uuid

import pytest
from builders import NOON, a_document, a_receipt, an_id, commits, new_receipt
from sqlalchemy import event, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from kkt_buffer import (
    BufferFullError,
    DuplicateReceiptError,
    EventType,
    InvalidConfigError,
    InvalidDocumentError,
    InvalidTransitionError,
    ReceiptBufferError,
    ReceiptNotFoundError,
    ReceiptRepository,
    ReceiptStatus,
    create_buffer_engine,
)
from kkt_buffer.config import CONFIG_RULES
from kkt_buffer.demo import sample_receipts
from kkt_buffer.models import TRANSITIONS

STATUSES = tuple(str(status) for status in ReceiptStatus)


def snapshot(engine):
    """All rows of all tables but the events' numbers: what a refused call must leave as it was."""
    tables = ("receipts", "dlq", "buffer_events", "config", "buffer_state")
    with engine.connect() as connection:
        return {table: [tuple(row) for row in connection.execute(text(f"SELECT * FROM {table}"))] for table in tables}


def stamps(receipts):
    return [(receipt.hlc_local_time, receipt.hlc_logical_counter) for receipt in receipts]


def story(repository, receipt_id):
    """The types of a receipt's events, oldest first."""
    return [event.event_type for event in reversed(repository.get_events(receipt_id=receipt_id))]


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

    def test_nonsense_capacity(self, repository, engine):
        """Somebody's nonsense in the config table is named, and nothing is stored beyond it."""
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

    def test_restart(self, path, clock):
        """The database is the memory: another process with another clock goes on from the last timestamp."""
        made = []
        for seconds in (NOON, NOON - 1000):
            clock.seconds = seconds
            engine = create_buffer_engine(path)
            made += [a_receipt(ReceiptRepository(engine, now=clock)) for _ in range(2)]
            engine.dispose()
        assert [(NOON, 0), (NOON, 1), (NOON, 2), (NOON, 3)] == stamps(made)


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

    def test_own_rows_at_fault(self, repository, sales):
        """A service's own row that the database refuses is not taken for a refused receipt."""
        with pytest.raises(IntegrityError, match="sales"), repository.transaction() as session:
            session.add_all([Sale(id=1, receipt_id="a"), Sale(id=1, receipt_id="b")])
            repository.insert_receipt(new_receipt())
        assert repository.get_buffer_status().pending == 0

    def test_all_or_nothing(self, repository, engine):
        """A batch that does not fit is refused whole, and the error says what it wanted."""
        repository.set_config("buffer_capacity", 3)
        a_receipt(repository)
        before = snapshot(engine)
        with pytest.raises(BufferFullError, match="1 of 3 .* so 3 more cannot be taken"):
            repository.insert_receipts(new_receipt() for _ in range(3))
        assert before == snapshot(engine)
        assert len(repository.insert_receipts(new_receipt() for _ in range(2))) == 2

    def test_one_commit(self, file_repository, file_engine):
        """A batch costs one commit."""
        with commits(file_engine) as seen:
            file_repository.insert_receipts(new_receipt() for _ in range(50))
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

    def test_twice_in_one_batch(self, repository, engine):
        """An id that comes twice in a batch is a duplicate too."""
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


class TestGetPendingReceipts:
    def test_order_and_limit(self, repository, clock):
        made = []
        for step in (0, 0, 1, 1, 5):
            clock.seconds += step
            made.append(a_receipt(repository).id)
        assert made == [receipt.id for receipt in repository.get_pending_receipts()]
        assert made[:2] == [receipt.id for receipt in repository.get_pending_receipts(2)]

    def test_limit_by_default(self, repository):
        repository.insert_receipts(new_receipt() for _ in range(60))
        assert len(repository.get_pending_receipts()) == 50

    def test_only_pending(self, repository):
        made = {status: a_receipt(repository, status).id for status in STATUSES}
        assert [made["pending"]] == [receipt.id for receipt in repository.get_pending_receipts()]

    @pytest.mark.parametrize("limit", [0, -1, True, "5", 2.0, None, 2**63])
    def test_bad_limit(self, repository, limit):
        with pytest.raises((ValueError, TypeError), match="limit: expected a whole number of 1 or more"):
            repository.get_pending_receipts(limit)

    def test_detached(self, file_repository, file_engine):
        """What was returned is complete: no attribute touches the database any more."""
        receipt = a_receipt(file_repository)
        file_engine.dispose()
        touched = []
        event.listen(file_engine, "before_cursor_execute", lambda *_: touched.append(1))
        assert receipt.to_dict() == pickle.loads(pickle.dumps(receipt)).to_dict()
        assert receipt.changed_at is None
        assert [] == touched


class TestReceipt:
    def test_not_json(self, repository, engine):
        """A text that is no JSON, which a predecessor may have left, is kept; decoding it is refused clearly."""
        receipt = a_receipt(repository)
        with engine.begin() as connection:
            connection.execute(text("DROP TRIGGER trg_guard_acknowledged"))
            connection.execute(text("UPDATE receipts SET fiscal_doc = 'чек №1'"))
        receipt = repository.get_receipt_by_id(receipt.id)
        assert receipt.fiscal_doc == "чек №1"
        with pytest.raises(InvalidDocumentError, match=f"fiscal_doc of receipt {receipt.id} is not JSON"):
            receipt.document  # noqa: B018 (a property that raises)
        with pytest.raises(InvalidDocumentError):
            receipt.to_dict()

    def test_missing(self, repository):
        assert repository.get_receipt_by_id(an_id()) is None

    def test_repr(self, repository):
        """What is printed says which and what."""
        receipt = a_receipt(repository, "failed")
        assert f"<Receipt {receipt.id} of till-1: failed>" == repr(receipt)
        assert f"<DeadLetter of {receipt.id}: open>" == repr(repository.list_dead_letters()[0])
        assert f"receipt_failed of {receipt.id} at {NOON}>" in repr(repository.get_events(1)[0])

    def test_bad_id(self, repository):
        with pytest.raises(TypeError, match="id: expected a UUID"):
            repository.get_receipt_by_id(5)


class TestMarkSynced:
    @pytest.mark.parametrize("status", ["pending", "syncing", "failed"])
    def test_from_any_status(self, repository, clock, status):
        """A delivery is recorded whatever the status was."""
        receipt = a_receipt(repository, status)
        clock.seconds += 60
        assert repository.mark_synced(receipt.id, NOON + 42) is True
        synced = repository.get_receipt_by_id(receipt.id)
        assert ("synced", NOON + 60, NOON + 42) == (synced.status, synced.synced_at, synced.hlc_server_time)
        [event] = repository.get_events(event_type="receipt_synced")
        assert (receipt.id, NOON + 60, NOON + 42) == (event.receipt_id, event.timestamp, event.details["server_time"])

    def test_first_stays(self, repository, engine):
        """A second report of the same delivery is true, and changes nothing."""
        receipt = a_receipt(repository, "synced")
        before = snapshot(engine)
        assert repository.mark_synced(receipt.id, NOON + 1000) is True
        assert before == snapshot(engine)

    def test_dead_letter(self, repository, engine, clock):
        """The open dead letter of a delivered receipt is resolved, by name."""
        receipt = a_receipt(repository, "failed")
        clock.seconds += 60
        repository.mark_synced(receipt.id, NOON)
        with engine.connect() as connection:
            row = connection.execute(text("SELECT resolved_at, resolved_by, resolution_reason FROM dlq")).one()
        assert (NOON + 60, "delivery", "the receipt was delivered") == row
        assert repository.get_buffer_status().dlq_size == 0
        assert story(repository, receipt.id) == ["receipt_added", "receipt_failed", "receipt_synced"]

    def test_missing(self, repository):
        assert repository.mark_synced(an_id(), NOON) is False

    @pytest.mark.parametrize("server_time", [-1, True, 1.5, "5", None, 2**63])
    def test_bad_server_time(self, repository, engine, server_time):
        receipt = a_receipt(repository)
        before = snapshot(engine)
        with pytest.raises((ValueError, TypeError), match="server_time: expected a whole number of 0 or more"):
            repository.mark_synced(receipt.id, server_time)
        assert before == snapshot(engine)

    def test_zero_and_largest(self, repository):
        """Any time that the column holds is taken as it is."""
        for server_time in (0, 2**63 - 1):
            receipt = a_receipt(repository)
            repository.mark_synced(receipt.id, server_time)
            assert server_time == repository.get_receipt_by_id(receipt.id).hlc_server_time


class TestIncrementRetryCount:
    def test_counts(self, repository, clock):
        receipt = a_receipt(repository)
        clock.seconds += 5
        assert repository.increment_retry_count(receipt.id, "no route to host") == 1
        assert repository.increment_retry_count(receipt.id, "timeout") == 2
        after = repository.get_receipt_by_id(receipt.id)
        assert (2, "timeout", "pending") == (after.retry_count, after.last_error, after.status)
        assert story(repository, receipt.id) == ["receipt_added", "receipt_attempt_failed", "receipt_attempt_failed"]
        last = repository.get_events(1)[0]
        assert (NOON + 5, {"retry_count": 2, "error": "timeout"}) == (last.timestamp, last.details)

    @pytest.mark.parametrize("status", STATUSES)
    def test_touches_no_status(self, repository, status):
        """It never dead-letters, however often, and leaves every status as it is."""
        repository.set_config("max_retry_attempts", 1)
        receipt = a_receipt(repository, status)
        for _ in range(3):
            repository.increment_retry_count(receipt.id, "timeout")
        assert status == repository.get_receipt_by_id(receipt.id).status

    def test_missing(self, repository):
        with pytest.raises(ReceiptNotFoundError, match="no receipt 'x' in this buffer"):
            repository.increment_retry_count("x", "timeout")

    def test_strange_error(self, repository):
        """An error of any content and length is kept as well as it can be."""
        receipt = a_receipt(repository)
        repository.increment_retry_count(receipt.id, "\ud800\0" + "x" * 10**6)
        assert len(repository.get_receipt_by_id(receipt.id).last_error) == 2000

    @pytest.mark.parametrize("error", ["", None, ValueError("x")])
    def test_bad_error(self, repository, engine, error):
        receipt = a_receipt(repository)
        before = snapshot(engine)
        with pytest.raises((ValueError, TypeError), match="error: expected a text"):
            repository.increment_retry_count(receipt.id, error)
        assert before == snapshot(engine)


class TestMoveToDlq:
    @pytest.mark.parametrize("status", ["pending", "syncing"])
    def test_dead_letter(self, repository, engine, clock, status):
        """The dead letter has all that an operator needs, a copy of the document included."""
        receipt = a_receipt(repository, status)
        repository.increment_retry_count(receipt.id, "timeout")
        clock.seconds += 60
        assert repository.move_to_dlq(receipt.id, "unknown tax rate") is True
        assert repository.get_receipt_by_id(receipt.id).status == "failed"
        with engine.connect() as connection:
            letter = connection.execute(text("SELECT * FROM dlq")).one()
        assert (receipt.id, NOON + 60, "unknown tax rate", receipt.fiscal_doc, 1, "timeout", None) == (
            letter.original_receipt_id,
            letter.failed_at,
            letter.reason,
            letter.fiscal_doc,
            letter.retry_attempts,
            letter.last_error,
            letter.resolved_at,
        )
        last = repository.get_events(1)[0]
        assert ("receipt_failed", receipt.id, NOON + 60) == (last.event_type, last.receipt_id, last.timestamp)
        assert {"reason": "unknown tax rate", "retry_attempts": 1} == last.details

    def test_twice_is_once(self, repository, engine):
        receipt = a_receipt(repository, "failed")
        before = snapshot(engine)
        assert repository.move_to_dlq(receipt.id, "again") is True
        assert before == snapshot(engine)

    def test_missing(self, repository):
        assert repository.move_to_dlq(an_id(), "rejected") is False

    def test_synced(self, repository, engine):
        """What the operator has cannot be given up."""
        receipt = a_receipt(repository, "synced")
        before = snapshot(engine)
        with pytest.raises(InvalidTransitionError, match="is synced and cannot become failed; it was not changed"):
            repository.move_to_dlq(receipt.id, "rejected")
        assert before == snapshot(engine)

    @pytest.mark.parametrize("reason", ["", " ", None])
    def test_bad_reason(self, repository, engine, reason):
        receipt = a_receipt(repository)
        before = snapshot(engine)
        with pytest.raises((ValueError, TypeError), match="reason: expected a text"):
            repository.move_to_dlq(receipt.id, reason)
        assert before == snapshot(engine)


class TestUpdateReceiptStatus:
    @pytest.mark.parametrize("wanted", STATUSES)
    @pytest.mark.parametrize("status", STATUSES)
    def test_every_move(self, repository, engine, status, wanted):
        """The allowed moves are made, the status it has already is no move, all others are refused."""
        receipt = a_receipt(repository, status)
        before = snapshot(engine)
        if wanted in TRANSITIONS[ReceiptStatus(status)]:
            assert repository.update_receipt_status(receipt.id, wanted) is True
            assert wanted == repository.get_receipt_by_id(receipt.id).status
        elif wanted == status:
            assert repository.update_receipt_status(receipt.id, wanted) is True
            assert before == snapshot(engine)
        else:
            with pytest.raises(InvalidTransitionError, match=f"is {status} and cannot become {wanted}"):
                repository.update_receipt_status(receipt.id, wanted)
            assert before == snapshot(engine)

    def test_the_moves(self):
        """The table of the moves, in full."""
        moves = {(str(a), str(b)) for a, targets in TRANSITIONS.items() for b in targets}
        assert moves == {
            ("pending", "syncing"),
            ("pending", "synced"),
            ("pending", "failed"),
            ("syncing", "pending"),
            ("syncing", "synced"),
            ("syncing", "failed"),
            ("failed", "synced"),
        }

    def test_synced_now(self, repository, clock):
        """`synced` takes the present time for the operator's."""
        receipt = a_receipt(repository)
        clock.seconds += 7.9
        repository.update_receipt_status(receipt.id, "synced")
        assert repository.get_receipt_by_id(receipt.id).hlc_server_time == NOON + 7

    def test_failed(self, repository, engine):
        """`failed` leaves a dead letter with its reason."""
        repository.update_receipt_status(a_receipt(repository).id, ReceiptStatus.FAILED)
        with engine.connect() as connection:
            assert connection.scalar(text("SELECT reason FROM dlq")) == "status set to failed"

    @pytest.mark.parametrize("status", ["done", "", "PENDING", None, 5])
    def test_bad_status(self, repository, status):
        with pytest.raises(ValueError, match="^Invalid status: .*expected pending, syncing, synced, failed$"):
            repository.update_receipt_status(a_receipt(repository).id, status)

    def test_missing(self, repository):
        assert repository.update_receipt_status(an_id(), "syncing") is False

    def test_leases_leave_no_event(self, repository):
        """Taking a receipt and giving it back is no fact about it."""
        receipt = a_receipt(repository)
        repository.update_receipt_status(receipt.id, "syncing")
        repository.update_receipt_status(receipt.id, "pending")
        assert story(repository, receipt.id) == ["receipt_added"]


class TestGetBufferStatus:
    def test_empty(self, repository):
        status = repository.get_buffer_status()
        assert (0, 0, 200, 0.0, None, None) == (
            status.total_receipts,
            status.dlq_size,
            status.capacity,
            status.percent_full,
            status.oldest_undelivered_at,
            status.deadline_at,
        )

    def test_counts(self, repository):
        """Every count is right, and only what is undelivered fills the buffer."""
        for number, status in enumerate(STATUSES, start=1):
            for _ in range(number):
                a_receipt(repository, status)
        status = repository.get_buffer_status()
        assert (1, 2, 3, 4, 10, 4) == (
            status.pending,
            status.syncing,
            status.synced,
            status.failed,
            status.total_receipts,
            status.dlq_size,
        )
        assert status.percent_full == 1.5

    def test_percent(self, repository):
        """Two decimals, and more than a hundred if the capacity was lowered."""
        repository.set_config("buffer_capacity", 3)
        a_receipt(repository)
        assert repository.get_buffer_status().percent_full == 33.33
        a_receipt(repository)
        repository.set_config("buffer_capacity", 1)
        assert repository.get_buffer_status().percent_full == 200.0

    @pytest.mark.parametrize("status", ["pending", "syncing", "failed"])
    def test_deadline(self, repository, clock, status):
        """The oldest receipt that the operator does not have, a dead-lettered one too, sets the deadline."""
        a_receipt(repository, "synced")
        clock.seconds += 100
        oldest = a_receipt(repository, status)
        clock.seconds += 100
        a_receipt(repository)
        found = repository.get_buffer_status()
        assert (NOON + 100, NOON + 100 + 30 * 86_400) == (found.oldest_undelivered_at, found.deadline_at)
        repository.set_config("ofd_deadline_days", 1)
        assert NOON + 100 + 86_400 == repository.get_buffer_status().deadline_at
        repository.mark_synced(oldest.id, NOON)
        assert NOON + 200 == repository.get_buffer_status().oldest_undelivered_at

    def test_resolved(self, repository, engine):
        """A dead letter that was closed takes its receipt out of the deadline."""
        a_receipt(repository, "failed")
        with engine.begin() as connection:
            connection.execute(text("UPDATE dlq SET resolved_at = 1, resolved_by = 'Anna'"))
        status = repository.get_buffer_status()
        assert (1, 0, None) == (status.failed, status.dlq_size, status.oldest_undelivered_at)


class TestEvents:
    def test_log(self, repository, clock):
        """An event of the caller's own is kept with its details, and its number is returned."""
        clock.seconds += 9
        number = repository.log_event("circuit_opened", metadata={"failures": 5, "why": "нет связи"})
        [event] = repository.get_events()
        assert (number, "circuit_opened", None, NOON + 9, {"failures": 5, "why": "нет связи"}) == (
            event.id,
            event.event_type,
            event.receipt_id,
            event.timestamp,
            event.details,
        )

    def test_of_a_receipt(self, repository):
        receipt = a_receipt(repository)
        repository.log_event("sync_failed", receipt_id=uuid.UUID(receipt.id))
        assert story(repository, receipt.id) == ["receipt_added", "sync_failed"]

    @pytest.mark.parametrize(
        "event_type", ["receipt_added", "receipt_synced", "receipt_failed", "receipt_eaten", "lunch", "", None, 5]
    )
    def test_not_to_be_logged(self, repository, event_type):
        """Unknown types are refused, and facts about receipts: those are the triggers' to write."""
        with pytest.raises(ValueError, match="event_type: expected one of circuit_opened, "):
            repository.log_event(event_type)
        assert repository.get_events() == []

    def test_newest_first(self, repository):
        numbers = [repository.log_event("sync_started") for _ in range(5)]
        assert numbers[::-1] == [event.id for event in repository.get_events()]
        assert numbers[:2:-1] == [event.id for event in repository.get_events(2)]

    def test_of_a_type(self, repository):
        """Each type is found, the common and the rare."""
        for status in STATUSES:
            repository.increment_retry_count(a_receipt(repository, status).id, "timeout")
        for event_type in EventType:
            if not event_type.is_fact:
                repository.log_event(event_type)
        found = {event_type: len(repository.get_events(event_type=event_type)) for event_type in EventType}
        counted = {"receipt_added": 4, "receipt_attempt_failed": 4, "receipt_requeued": 0, "receipt_resolved": 0}
        counted |= {"receipt_repaired": 0, "receipt_completed": 0}
        assert dict.fromkeys(EventType, 1) | counted == found

    @pytest.mark.parametrize("event_type", ["lunch", 5])
    def test_bad_type(self, repository, event_type):
        with pytest.raises(ValueError, match="event_type: expected one of receipt_added, "):
            repository.get_events(event_type=event_type)

    @pytest.mark.parametrize("limit", [0, True])
    def test_bad_limit(self, repository, limit):
        with pytest.raises((ValueError, TypeError), match="limit: expected"):
            repository.get_events(limit)

    def test_foreign_metadata(self, repository, engine):
        """What another program wrote and is not JSON comes back as its text."""
        with engine.begin() as connection:
            connection.execute(
                text("INSERT INTO buffer_events (event_type, timestamp, metadata) VALUES ('sync_failed', 1, 'oops')")
            )
        assert repository.get_events()[0].details == "oops"

    def test_append_only(self, repository, engine):
        """The database itself refuses to change an event, and to delete one before its time."""
        repository.log_event("sync_started")
        now = "UPDATE buffer_events SET timestamp = 5"
        with pytest.raises(Exception, match="buffer_events is append-only"), engine.begin() as connection:
            connection.execute(text(now))
        young = ReceiptRepository(engine)  # by the real clock
        young.log_event("sync_started")
        with pytest.raises(Exception, match="cannot be deleted before retention_events_days"):
            with engine.begin() as connection:
                connection.execute(text("DELETE FROM buffer_events"))
        with engine.begin() as connection:
            connection.execute(text("DELETE FROM buffer_events WHERE timestamp < unixepoch() - 90 * 86400"))
        assert len(repository.get_events()) == 1


class TestConfig:
    @pytest.mark.parametrize("key", CONFIG_RULES)
    def test_defaults(self, repository, engine, key):
        """The migrated values are the defaults, and a deleted row means the default."""
        assert CONFIG_RULES[key].default == repository.get_config(key)
        with engine.begin() as connection:
            connection.execute(text("DELETE FROM config"))
        assert CONFIG_RULES[key].default == repository.get_config(key)

    def test_version(self, repository):
        assert repository.get_config("version") == "1.0.0"

    def test_without_rows(self, repository, engine):
        """The buffer works by its defaults if somebody has emptied the table."""
        with engine.begin() as connection:
            connection.execute(text("DELETE FROM config"))
        a_receipt(repository)
        assert repository.get_buffer_status().percent_full == 0.5

    @pytest.mark.parametrize("value", [7, "7", "007"])
    def test_number(self, repository, value):
        repository.set_config("buffer_capacity", value)
        assert repository.get_config("buffer_capacity") == 7
        assert repository.get_buffer_status().capacity == 7

    @pytest.mark.parametrize("value", ["abc", 0, -5, "0", "", "1.5", 1.5, True, None, 10**10, "9" * 5000, "٧", "１"])
    def test_nonsense(self, repository, engine, value):
        before = snapshot(engine)
        with pytest.raises(ValueError, match="buffer_capacity: expected a whole number from 1 to 1000000000"):
            repository.set_config("buffer_capacity", value)
        assert before == snapshot(engine)

    def test_other_keys(self, repository, engine, clock):
        """A key that the buffer does not know is the service's own, and kept as text."""
        assert repository.get_config("shop.name") is None
        repository.set_config("shop.name", "Ромашка")
        clock.seconds += 5
        repository.set_config("shop.name", "Василёк")
        assert repository.get_config("shop.name") == "Василёк"
        with engine.connect() as connection:
            changed = connection.scalar(text("SELECT updated_at FROM config WHERE key = 'shop.name'"))
        assert NOON + 5 == changed

    @pytest.mark.parametrize(("key", "value"), [("shop.name", 5), ("shop.name", ""), ("", "x"), (None, "x"), (5, "x")])
    def test_bad(self, repository, key, value):
        with pytest.raises((ValueError, TypeError), match="(key|value): expected a text"):
            repository.set_config(key, value)


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

    def test_detached_inside(self, repository):
        """What was returned inside stays complete when the transaction is rolled back."""
        with pytest.raises(RuntimeError), repository.transaction():
            receipt = a_receipt(repository)
            raise RuntimeError
        assert receipt.status == "pending"

    def test_threads(self, file_repository):
        """Another thread is not inside: it sees nothing before the commit."""
        seen = []

        def look():
            seen.append(file_repository.get_buffer_status().pending)

        with file_repository.transaction():
            file_repository.insert_receipt(new_receipt())
            thread = threading.Thread(target=look)
            thread.start()
            thread.join()
        look()
        assert [0, 1] == seen

    def test_asyncio_tasks(self, repository):
        """
        A task that awaits inside a transaction does not drag others in.

        Their receipts would be acknowledged before the commit that they depend on.
        """

        async def careless(inside, done):
            with repository.transaction():
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
        repository.insert_receipt(new_receipt())

    def test_to_thread(self, file_repository):
        """The recommended way from asyncio: each operation in a thread."""

        async def many():
            calls = [asyncio.to_thread(file_repository.insert_receipt, new_receipt()) for _ in range(20)]
            return await asyncio.gather(*calls)

        assert len(set(asyncio.run(many()))) == 20
        assert file_repository.get_buffer_status().pending == 20


class TestGuards:
    """What the database itself refuses, whoever asks."""

    @pytest.mark.parametrize(
        ("status", "statement", "message"),
        [
            ("pending", "DELETE FROM receipts", "an undelivered receipt cannot be deleted"),
            ("syncing", "DELETE FROM receipts", "an undelivered receipt cannot be deleted"),
            ("pending", "UPDATE receipts SET status = 'failed'", "a receipt fails through its dead letter"),
            ("failed", "UPDATE receipts SET status = 'pending'", "a failed receipt has an open dead letter"),
            ("failed", "DELETE FROM receipts", "FOREIGN KEY constraint failed"),
            ("pending", "UPDATE receipts SET status = 'done'", "ck_receipts_status"),
            ("pending", "UPDATE receipts SET status = 'synced'", "ck_receipts_synced"),
            ("pending", "UPDATE receipts SET synced_at = 1", "ck_receipts_synced"),
            ("synced", "UPDATE receipts SET hlc_server_time = NULL", "ck_receipts_synced"),
            ("pending", "UPDATE receipts SET status = 'syncing'", "ck_receipts_lease"),
            ("pending", "UPDATE receipts SET lease_token = 'x'", "ck_receipts_lease"),
            ("syncing", "UPDATE receipts SET lease_expires_at = NULL", "ck_receipts_lease"),
            ("pending", "UPDATE receipts SET retry_count = -1", "ck_receipts_retry_count"),
            ("failed", "UPDATE dlq SET resolved_at = 1", "ck_dlq_resolved"),
            ("failed",
             "INSERT INTO dlq SELECT 'x', original_receipt_id, 1, 'r', '{}', 0, NULL, NULL, NULL, NULL, NULL FROM dlq",
             "a synced or failed receipt cannot be dead-lettered"),
            ("synced", "INSERT INTO dlq SELECT 'x', id, 1, 'r', '{}', 0, NULL, NULL, NULL, NULL, NULL FROM receipts",
             "a synced or failed receipt cannot be dead-lettered"),
        ],
    )  # fmt: skip
    def test_refused(self, repository, engine, status, statement, message):
        a_receipt(repository, status)
        before = snapshot(engine)
        with pytest.raises(Exception, match=message), engine.begin() as connection:
            connection.execute(text(statement))
        assert before == snapshot(engine)

    def test_first_schema_insert(self, repository, engine):
        """The plain INSERT of the first schema still works, and is counted, told and limited like any other."""
        statement = text(
            "INSERT INTO receipts (id, pos_id, created_at, hlc_local_time, hlc_logical_counter, fiscal_doc)"
            " VALUES (:id, 'till-1', 5, 5, 0, '{}')"
        )
        repository.set_config("buffer_capacity", 1)
        with engine.begin() as connection:
            connection.execute(statement, {"id": "receipt-1"})
        assert repository.get_receipt_by_id("receipt-1").status == "pending"
        assert story(repository, "receipt-1") == ["receipt_added"]
        with pytest.raises(Exception, match="Buffer full"), engine.begin() as connection:
            connection.execute(statement, {"id": "receipt-2"})

    def test_counts_follow(self, repository, engine):
        """The counters follow every way in which rows come, change and go."""
        for status in STATUSES:
            a_receipt(repository, status)
        with engine.begin() as connection:
            connection.execute(text("UPDATE dlq SET resolved_at = 1, resolved_by = 'Anna'"))
            connection.execute(text("UPDATE dlq SET resolved_at = NULL, resolved_by = NULL"))
            connection.execute(text("DELETE FROM receipts WHERE status = 'synced'"))
            connection.execute(text("DELETE FROM dlq"))
        status = repository.get_buffer_status()
        assert (1, 1, 0, 1, 0) == (status.pending, status.syncing, status.synced, status.failed, status.dlq_size)

    def test_changed_at_missing(self, repository, engine):
        """A program that does not know `changed_at` still gets its event dated."""
        a_receipt(repository)
        with engine.begin() as connection:
            connection.execute(text("UPDATE receipts SET retry_count = retry_count + 1"))
        assert repository.get_events(1)[0].timestamp > NOON


def test_log_is_silent(repository, caplog):
    """Ordinary work writes nothing to the log."""
    with caplog.at_level(logging.DEBUG, logger="kkt_buffer"):
        a_receipt(repository, "failed")
    assert caplog.records == []
