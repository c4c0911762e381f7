"""What the server answers instead of a result: repeated where that is safe, and otherwise told by an error of ours."""

import psycopg
import pytest
from builders import new_receipt
from sqlalchemy.exc import IntegrityError

from kkt_buffer import BufferBusyError, BufferStorageError

# The first times that a receipt is written, the server gives up, as it does where transactions meet. The count is kept
# over a rollback: a sequence takes no part in transactions.
FAULT = """
    CREATE SEQUENCE faults;
    CREATE FUNCTION fault() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            IF nextval('faults') <= {times} THEN
                RAISE EXCEPTION 'on purpose' USING ERRCODE = '{state}';
            END IF;
            RETURN NEW;
        END
    $$;
    CREATE TRIGGER fault BEFORE INSERT OR UPDATE ON receipts FOR EACH ROW EXECUTE FUNCTION fault();
"""
CONFLICTS = {"serialization failure": "40001", "deadlock": "40P01"}
DISCONNECTS = {"read-only": "25006", "shutting down": "57P01", "crashed": "57P02", "starting": "57P03"}


@pytest.fixture
def repository(server_buffer, open_repository):
    return open_repository(server_buffer, busy_timeout=1)


@pytest.fixture
def run(server_buffer):
    def run(sql):
        with psycopg.connect(server_buffer.replace("+psycopg", ""), autocommit=True) as connection:
            connection.execute(sql)

    return run


@pytest.fixture
def known(repository):
    """The ids of two receipts."""
    return repository.insert_receipts([new_receipt(), new_receipt()])


@pytest.mark.parametrize("state", [*CONFLICTS.values(), *DISCONNECTS.values()], ids=[*CONFLICTS, *DISCONNECTS])
class TestRepeated:
    def test_insert(self, repository, run, state):
        run(FAULT.format(times=2, state=state))
        receipt_id = repository.insert_receipt(new_receipt())
        assert [receipt_id] == [receipt.id for receipt in repository.get_pending_receipts()]

    def test_batch(self, repository, run, state):
        run(FAULT.format(times=2, state=state))
        ids = repository.insert_receipts([new_receipt(), new_receipt(), new_receipt()])
        assert ids == [receipt.id for receipt in repository.get_pending_receipts()]

    def test_mark_synced(self, repository, known, run, state):
        run(FAULT.format(times=2, state=state))
        assert repository.mark_synced(known[0], 5)
        assert "synced" == repository.get_receipt_by_id(known[0]).status

    def test_claim(self, repository, known, run, state):
        run(FAULT.format(times=2, state=state))
        assert known == [receipt.id for receipt in repository.claim_pending()]

    def test_move_to_dlq(self, repository, known, run, state):
        run(FAULT.format(times=2, state=state))
        assert repository.move_to_dlq(known[0], "rejected")
        assert 1 == repository.get_buffer_status().dlq_size

    def test_transaction(self, repository, run, state):
        """The caller's own block cannot be repeated by us: nothing of it is stored, and its next try succeeds."""
        run(FAULT.format(times=1, state=state))
        with pytest.raises(BufferStorageError):
            with repository.transaction():
                repository.insert_receipt(new_receipt())
        assert 0 == repository.get_buffer_status().pending
        with repository.transaction():
            repository.insert_receipt(new_receipt())
        assert 1 == repository.get_buffer_status().pending


class TestTold:
    def test_own_trigger(self, repository, run):
        """What a trigger of the service itself refuses is told by its own error, inside a transaction too."""
        run(FAULT.format(times=1_000_000, state="23514"))
        with pytest.raises(IntegrityError, match="on purpose"):
            repository.insert_receipt(new_receipt())
        with pytest.raises(IntegrityError, match="on purpose"), repository.transaction():
            repository.insert_receipt(new_receipt())
        assert 0 == repository.get_buffer_status().pending

    @pytest.mark.parametrize("state", CONFLICTS.values(), ids=CONFLICTS)
    def test_for_ever(self, repository, run, state):
        """It is not repeated for ever."""
        run(FAULT.format(times=1_000_000, state=state))
        with pytest.raises(BufferStorageError):
            repository.insert_receipt(new_receipt())

    def test_busy(self, repository, server_buffer, open_repository):
        """Another client that adds receipts keeps the others waiting, for `busy_timeout` at most."""
        other = open_repository(server_buffer)
        with other.transaction():
            other.insert_receipt(new_receipt())
            with pytest.raises(BufferBusyError):
                repository.insert_receipt(new_receipt())
        repository.insert_receipt(new_receipt())

    def test_sleeps(self, repository, server_buffer, open_repository):
        """Who sleeps inside a transaction is ended after `answer_timeout`, so that the others go on."""
        sleeper = open_repository(server_buffer, busy_timeout=0.5, answer_timeout=1)
        patient = open_repository(server_buffer)
        with pytest.raises(BufferStorageError, match="idle"):
            with sleeper.transaction():
                sleeper.insert_receipt(new_receipt())
                receipt_id = patient.insert_receipt(new_receipt())  # waits until then
                sleeper.insert_receipt(new_receipt())
        assert [receipt_id] == [receipt.id for receipt in repository.get_pending_receipts()]
        sleeper.insert_receipt(new_receipt())

    def test_sleeps_before_commit(self, repository, server_buffer, open_repository):
        """One that wakes up and commits is not told stored."""
        sleeper = open_repository(server_buffer, busy_timeout=0.5, answer_timeout=1)
        patient = open_repository(server_buffer)
        with pytest.raises(BufferStorageError):
            with sleeper.transaction():
                sleeper.insert_receipt(new_receipt())
                receipt_id = patient.insert_receipt(new_receipt())
        assert [receipt_id] == [receipt.id for receipt in repository.get_pending_receipts()]
