"""What the database keeps and refuses by itself: plain SQL of another program, on a connection of its own."""

import contextlib
import json

import pytest
from builders import NOON, a_receipt, new_receipt
from predecessor import driver
from schema.helpers import state, state_of_rows

from kkt_buffer import BufferDamagedError, ReceiptRepository

ADD = "INSERT INTO receipts (id, pos_id, created_at, hlc_local_time, hlc_logical_counter, fiscal_doc) VALUES"
HELD = f"""\
INSERT INTO receipts (id, pos_id, created_at, hlc_local_time, hlc_logical_counter, fiscal_doc, held_at, digest,
    inserted_digest) VALUES ('held', 'till-1', {NOON}, {NOON}, 0, '{{"draft": 1}}', {NOON}, 'd', 'd')"""
SYNCED = f"status = 'synced', synced_at = {NOON + 9}, hlc_server_time = {NOON + 8}, held_at = NULL"
LETTER = f"""\
INSERT INTO dlq (id, original_receipt_id, failed_at, reason, fiscal_doc, retry_attempts)
VALUES ('letter', '%s', {NOON}, 'rejected', '{{}}', 0)"""
EMPTY = {
    "id": 1,
    **dict.fromkeys(("pending", "syncing", "synced", "failed", "open_dead_letters", "hlc_local_time"), 0),
    "hlc_logical_counter": -1,
    "last_synced_at": None,
}


@pytest.fixture
def other(path, file_engine):
    """Another program, which knows nothing of this package, with the buffer open."""
    with contextlib.closing(driver.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA recursive_triggers = ON")
        yield connection


@pytest.fixture
def held(other):
    """The id of a receipt that waits to be printed."""
    other.execute(HELD)
    return "held"


def add(other, receipt_id="r", stamp=(NOON, 0), *, created_at=NOON):
    other.execute(f"{ADD} (?, 'till-1', ?, ?, ?, '{{}}')", (receipt_id, created_at, *stamp))


def refused(other, sql, message):
    """Run a statement that must be refused."""
    with pytest.raises(driver.IntegrityError, match=message):
        other.execute(sql)


def events(other, event_type):
    found = other.execute(
        "SELECT receipt_id, timestamp, metadata FROM buffer_events WHERE event_type = ?", (event_type,)
    )
    return [(receipt_id, moment, metadata and json.loads(metadata)) for receipt_id, moment, metadata in found]


class TestState:
    def test_empty(self, file_engine):
        assert EMPTY == state(file_engine)

    def test_added(self, other, file_engine):
        """An insert counts by its status, and gives its timestamp."""
        add(other)
        assert EMPTY | {"pending": 1, "hlc_local_time": NOON, "hlc_logical_counter": 0} == state(file_engine)

    def test_added_synced(self, other, file_engine):
        """A receipt that another program inserts as synced gives the time of its delivery too."""
        columns = "id, pos_id, created_at, hlc_local_time, hlc_logical_counter, fiscal_doc, status, synced_at"
        for receipt_id, synced_at in (("a", NOON + 9), ("b", NOON + 5)):
            other.execute(
                f"INSERT INTO receipts ({columns}, hlc_server_time) VALUES (?, 't', 1, 1, 0, '{{}}', 'synced', ?, 1)",
                (receipt_id, synced_at),
            )
        assert (2, NOON + 9) == (state(file_engine)["synced"], state(file_engine)["last_synced_at"])

    @pytest.mark.parametrize(
        ("second", "greatest"),
        [
            ((NOON, 5), (NOON, 5)),
            ((NOON, 4), (NOON, 4)),
            ((NOON, 2), (NOON, 3)),
            ((NOON + 1, 0), (NOON + 1, 0)),
            ((NOON - 1, 9), (NOON, 3)),
        ],
    )
    def test_greatest_stamp(self, other, file_engine, second, greatest):
        """The greater pair stays, as a pair; a smaller one does not lower it."""
        add(other, "a", (NOON, 3))
        add(other, "b", second)
        found = state(file_engine)
        assert greatest == (found["hlc_local_time"], found["hlc_logical_counter"])

    def test_smaller_stamp(self, other, file_engine):
        """After another program has inserted a smaller timestamp, ours are still above the greatest."""
        repository = ReceiptRepository(file_engine, now=lambda: NOON)
        a_receipt(repository)
        add(other, "late", (NOON - 100, 7))
        new = a_receipt(repository)
        assert (NOON, 1) == (new.hlc_local_time, new.hlc_logical_counter)

    @pytest.mark.parametrize("stamp", [("soon", 0), (NOON + 0.5, 0), (NOON, "first")])
    def test_no_number(self, other, file_engine, stamp):
        """A timestamp that is not a pair of integers is refused: nothing could be above it."""
        before = state(file_engine)
        with pytest.raises(driver.IntegrityError, match="cannot store (TEXT|REAL) value in INTEGER column"):
            add(other, stamp=stamp)
        assert before == state(file_engine)

    def test_negative_counter(self, other):
        refused(other, f"{ADD} ('r', 't', 1, 1, -1, '{{}}')", "ck_receipts_hlc_logical_counter")

    def test_moved(self, other, file_engine):
        """Every move of a status, and every dead letter, is counted."""
        for number in range(5):
            add(other, str(number), (NOON, number))
        other.execute(f"UPDATE receipts SET {SYNCED} WHERE id = '0'")
        other.execute(
            "UPDATE receipts SET status = 'syncing', lease_token = 't', lease_taken_at = 1, lease_expires_at = 2"
            " WHERE id = '1'"
        )
        other.execute(LETTER % "2")
        other.execute("UPDATE receipts SET status = 'failed' WHERE id = '2'")
        expected = EMPTY | {"pending": 2, "syncing": 1, "synced": 1, "failed": 1, "open_dead_letters": 1}
        expected |= {"hlc_local_time": NOON, "hlc_logical_counter": 4, "last_synced_at": NOON + 9}
        assert expected == state(file_engine) == state_of_rows(file_engine)
        other.execute(f"UPDATE dlq SET resolved_at = {NOON}, resolved_by = 'Anna'")
        other.execute("UPDATE receipts SET status = 'pending' WHERE id = '2'")
        assert expected | {"pending": 3, "failed": 0, "open_dead_letters": 0} == state(file_engine)

    def test_last_synced(self, other, file_engine):
        """A delivery that is recorded with an earlier time does not lower the last one."""
        add(other, "a")
        add(other, "b")
        other.execute(f"UPDATE receipts SET {SYNCED} WHERE id = 'a'")
        other.execute("UPDATE receipts SET status = 'synced', synced_at = 5, hlc_server_time = 5 WHERE id = 'b'")
        assert NOON + 9 == state(file_engine)["last_synced_at"]

    def test_removed(self, other, file_engine):
        """A deletion is counted, by REPLACE too; the timestamp and the last delivery stay."""
        add(other)
        other.execute(f"UPDATE receipts SET {SYNCED}")
        other.execute("REPLACE INTO receipts SELECT * FROM receipts WHERE id = 'r'")
        assert 1 == state(file_engine)["synced"]
        other.execute("DELETE FROM receipts")
        expected = {"hlc_local_time": NOON, "hlc_logical_counter": 0, "last_synced_at": NOON + 9}
        assert EMPTY | expected == state(file_engine)

    def test_letter_removed(self, other, file_engine):
        add(other)
        other.execute(LETTER % "r")
        other.execute("DELETE FROM dlq")
        assert 0 == state(file_engine)["open_dead_letters"]

    def test_row_stays(self, other, file_engine):
        """The row can neither be deleted nor replaced, and there is no second one."""
        message = "the row of buffer_state cannot be deleted"
        refused(other, "DELETE FROM buffer_state", message)
        refused(other, "REPLACE INTO buffer_state SELECT * FROM buffer_state", message)
        refused(other, "INSERT INTO buffer_state SELECT 2, 0, 0, 0, 0, 0, 0, 0, NULL", "ck_buffer_state_one_row")
        assert EMPTY == state(file_engine)


class TestMissingRow:
    """Somebody has dropped the guard and deleted the row."""

    @pytest.fixture(autouse=True)
    def without_a_row(self, other):
        other.execute("DROP TRIGGER trg_guard_state")
        other.execute("DELETE FROM buffer_state")

    def test_insert(self, other):
        """Nothing that nobody counts is stored, and the message is not that the buffer is full."""
        refused(other, f"{ADD} ('r', 't', 1, 1, 0, '{{}}')", "buffer_state has no row")

    @pytest.mark.parametrize(
        "operation",
        [
            lambda repository: repository.insert_receipt(new_receipt()),
            lambda repository: repository.insert_receipts([new_receipt()]),
            lambda repository: repository.get_buffer_status(),
        ],
    )
    def test_operation(self, file_repository, operation):
        """The damage is reported as such."""
        with pytest.raises(BufferDamagedError):
            operation(file_repository)


class TestCapacity:
    @pytest.fixture(autouse=True)
    def small(self, other):
        other.execute("UPDATE config SET value = '2' WHERE key = 'buffer_capacity'")

    def test_full(self, other):
        """An insert above the capacity is refused; what is not undelivered does not count."""
        add(other, "a")
        add(other, "b")
        refused(other, f"{ADD} ('c', 't', 1, 1, 0, '{{}}')", "Buffer full")
        other.execute(f"UPDATE receipts SET {SYNCED} WHERE id = 'a'")
        add(other, "c")
        refused(other, HELD, "Buffer full")

    def test_default(self, other):
        """Without the setting, its default."""
        other.execute("DELETE FROM config WHERE key = 'buffer_capacity'")
        other.execute("UPDATE buffer_state SET pending = 199")
        add(other, "a")
        refused(other, f"{ADD} ('b', 't', 1, 1, 0, '{{}}')", "Buffer full")


CHANGES = {
    "id": "'other'",
    "pos_id": "'till-2'",
    "created_at": "created_at + 1",
    "hlc_local_time": "hlc_local_time + 1",
    "hlc_logical_counter": "hlc_logical_counter + 1",
    "fiscal_doc": "'{\"other\": 1}'",
    "digest": "'other'",
    "inserted_digest": "'other'",
}
OF_THE_DOCUMENT = {"fiscal_doc", "digest", "inserted_digest"}


class TestAcknowledged:
    MESSAGE = "an acknowledged receipt does not change"

    @pytest.mark.parametrize("column", CHANGES)
    @pytest.mark.parametrize("status", ["pending", "synced"])
    def test_refused(self, other, status, column):
        """What was acknowledged does not change."""
        add(other)
        if status == "synced":
            other.execute(f"UPDATE receipts SET {SYNCED}")
        refused(other, f"UPDATE receipts SET {column} = {CHANGES[column]}", self.MESSAGE)

    @pytest.mark.parametrize("column", CHANGES)
    def test_same_value(self, other, column):
        """An UPDATE that changes nothing is none."""
        add(other)
        assert 1 == other.execute(f"UPDATE receipts SET {column} = {column}").rowcount

    @pytest.mark.parametrize("column", CHANGES)
    def test_held(self, other, held, column):
        """Of a receipt that is not printed yet, the document may change, and nothing else."""
        change = f"UPDATE receipts SET {column} = {CHANGES[column]}"
        if column in OF_THE_DOCUMENT:
            assert 1 == other.execute(change).rowcount
        else:
            refused(other, change, self.MESSAGE)

    def test_once(self, other, held):
        """With its completion a receipt's document is final."""
        other.execute("UPDATE receipts SET fiscal_doc = '{\"final\": 1}', digest = 'e', held_at = NULL")
        refused(other, "UPDATE receipts SET fiscal_doc = '{}'", self.MESSAGE)


class TestHeld:
    MESSAGE = "held_at is set when a receipt is stored, never later"

    def test_never_later(self, other):
        add(other)
        refused(other, f"UPDATE receipts SET held_at = {NOON}", self.MESSAGE)

    def test_not_moved(self, other, held):
        refused(other, "UPDATE receipts SET held_at = held_at + 1", self.MESSAGE)
        assert 1 == other.execute("UPDATE receipts SET held_at = held_at").rowcount

    @pytest.mark.parametrize(
        "change",
        [
            "status = 'syncing', lease_token = 't', lease_taken_at = 1, lease_expires_at = 2",
            "status = 'synced', synced_at = 1, hlc_server_time = 1",
        ],
    )
    def test_status(self, other, held, change):
        """A held receipt is neither leased nor synced."""
        refused(other, f"UPDATE receipts SET {change}", "ck_receipts_held")

    def test_failed(self, other, held):
        """It may be dead-lettered, and is held again after a requeue."""
        other.execute(LETTER % held)
        other.execute("UPDATE receipts SET status = 'failed'")
        other.execute(f"UPDATE dlq SET resolved_at = {NOON}, resolved_by = 'Anna', resolution = 'requeued'")
        other.execute("UPDATE receipts SET status = 'pending'")
        assert [(NOON,)] == other.execute("SELECT held_at FROM receipts").fetchall()


class TestCompleted:
    def test_event(self, other, held):
        """A completion is an event, with the time and the digest of the row."""
        other.execute(f"UPDATE receipts SET held_at = NULL, digest = 'e', changed_at = {NOON + 3}")
        assert [(held, NOON + 3, {"digest": "e"})] == events(other, "receipt_completed")

    def test_without_values(self, other, held):
        """Another program may give neither."""
        other.execute("UPDATE receipts SET held_at = NULL, digest = NULL")
        [(receipt_id, moment, metadata)] = events(other, "receipt_completed")
        assert (held, True, None) == (receipt_id, moment > NOON, metadata)

    def test_dead_lettered(self, other, held):
        """A receipt that was given up may be completed too: a print is a fact."""
        other.execute(
            "INSERT INTO dlq (id, original_receipt_id, failed_at, reason, fiscal_doc, retry_attempts)"
            f" VALUES ('l', '{held}', {NOON}, 'no', '{{}}', 0)"
        )
        other.execute("UPDATE receipts SET status = 'failed'")
        assert [] == events(other, "receipt_completed")
        other.execute(f"UPDATE receipts SET held_at = NULL, changed_at = {NOON + 3}")
        assert [(held, NOON + 3)] == [event[:2] for event in events(other, "receipt_completed")]

    def test_delivered(self, other, held):
        """A receipt that is delivered while it is held was not completed."""
        other.execute(f"UPDATE receipts SET {SYNCED}")
        assert [] == events(other, "receipt_completed")
