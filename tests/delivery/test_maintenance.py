"""The nightly maintenance of `DeliveryWorker`: when, by whom, and what becomes of delivery if it fails."""

import datetime as dt

import pytest
from builders import NOON, a_receipt, another_program, commits

from kkt_buffer import DeliveryWorker, ReceiptRepository, create_buffer_engine
from kkt_buffer.rotation import backups

HOUR, DAY = 3600, 86_400


def local(seconds):
    """The date and time at the till."""
    return dt.datetime.fromtimestamp(seconds, dt.UTC).astimezone().replace(tzinfo=None)


AN_HOUR_AFTER = local(NOON + HOUR).time()


@pytest.fixture
def repository(file_repository):
    """A file, because that is what is backed up."""
    return file_repository


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "backups"


def send(receipt):
    return NOON


def a_worker(repository, folder=None):
    return DeliveryWorker(repository, send, maintenance_at=AN_HOUR_AFTER, backup_to=folder)


def history(repository):
    return [event.event_type for event in reversed(repository.get_events()) if "maintenance" in event.event_type]


class TestTime:
    def test_once_a_day(self, repository, clock, folder):
        """At that local time, once; and at the same time on the next day."""
        repository.log_event("maintenance_completed")  # that of yesterday, late
        worker = a_worker(repository, folder)
        clock.advance(HOUR - 1)
        worker.tick()
        assert not folder.exists()
        clock.advance(1)
        for seconds, expected in ((HOUR, 1), (60, 1), (2 * HOUR, 1), (DAY - 3 * HOUR - 61, 1), (HOUR, 2)):
            clock.advance(seconds)
            worker.tick()
            assert expected == len(backups(folder))
        assert ["maintenance_completed", *["maintenance_started", "maintenance_completed"] * 2] == history(repository)
        clock.advance(2 * HOUR)
        with commits(repository.engine) as seen:
            worker.tick()
        assert [] == seen

    def test_off_at_that_time(self, repository, clock, folder):
        """If no worker ran at that time, it is done by the next one, also when that is on the next day."""
        a_worker(repository, folder).tick()  # an hour before that time
        a_worker(repository, folder).tick()
        assert 1 == len(backups(folder))

    def test_later(self, repository, clock, folder):
        """A worker that is started after that time does it at once, unless it was done today."""
        clock.advance(5 * HOUR)
        a_worker(repository, folder).tick()
        a_worker(repository, folder).tick()
        assert 1 == len(backups(folder))

    def test_backup(self, repository, clock, folder):
        """The copy is a whole buffer, as it was after the pruning; what was delivered long ago is gone from both."""
        a_receipt(repository, "synced")
        clock.advance(8 * DAY + HOUR)
        receipt = a_receipt(repository, "failed")
        a_worker(repository, folder).tick()
        [copy] = backups(folder)
        engine = create_buffer_engine(copy, read_only=True)
        for found in (ReceiptRepository(engine), repository):
            assert (1, 1) == (found.get_buffer_status().total_receipts, found.get_buffer_status().dlq_size)
            assert found.get_receipt_by_id(receipt.id).fiscal_doc == receipt.fiscal_doc
        engine.dispose()

    def test_keep(self, repository, clock, folder):
        """The last seven stay."""
        worker = a_worker(repository, folder)
        clock.advance(HOUR)
        for _ in range(9):
            worker.tick()
            clock.advance(DAY)
        days = [f"{local(NOON + day * DAY):%Y%m%d}" for day in range(2, 9)]
        assert days == [path.name.removeprefix("buffer-")[:8] for path in backups(folder)]


class TestNoFolder:
    """Without a folder it prunes, on every database."""

    def test_prune(self, shared_repository, clock):
        a_receipt(shared_repository, "synced")
        a_receipt(shared_repository)
        clock.advance(8 * DAY + HOUR)
        a_worker(shared_repository).tick()
        assert 1 == shared_repository.get_buffer_status().total_receipts

    def test_by_one(self, shared_repository, clock):
        """By one of all workers, once a day; after a kill by another one, an hour later."""
        clock.advance(HOUR)
        shared_repository.log_event("maintenance_started")
        a_worker(shared_repository).tick()
        assert ["maintenance_started"] == history(shared_repository)
        clock.advance(HOUR)
        for _ in range(2):
            a_worker(shared_repository).tick()
        assert ["maintenance_started"] * 2 + ["maintenance_completed"] == history(shared_repository)

    def test_fails(self, shared_repository, buffer, clock):
        """What is wrong is told, and delivery goes on."""
        with another_program(buffer) as other:
            other.execute("UPDATE config SET value = 'nonsense' WHERE key = 'retention_dlq_days'")
        a_receipt(shared_repository)
        clock.advance(HOUR)
        worker = a_worker(shared_repository)
        worker.tick()
        assert worker.status.maintenance_error.startswith("InvalidConfigError: ")
        assert 1 == shared_repository.get_buffer_status().synced


class TestWorkers:
    def test_another_does_it(self, repository, clock, folder):
        """While another worker is at it, nothing is done; if that one was killed, another does it an hour later."""
        clock.advance(HOUR)
        repository.log_event("maintenance_started")
        worker = a_worker(repository, folder)
        worker.tick()
        assert not folder.exists()
        with commits(repository.engine) as seen:
            worker.tick()
        assert [] == seen
        clock.advance(HOUR)
        worker.tick()
        assert 1 == len(backups(folder))

    def test_clock_set_back(self, repository, clock, folder):
        """What is on record of a time that is in the future keeps nobody from it."""
        clock.advance(3 * HOUR)
        repository.log_event("maintenance_started")
        clock.advance(-HOUR)
        a_worker(repository, folder).tick()
        assert 1 == len(backups(folder))


class TestFailure:
    def test_folder(self, repository, clock, folder, caplog):
        """A backup that fails is told, does not stop delivery, and is tried again after an hour."""
        folder.write_text("not a folder")
        a_receipt(repository)
        clock.advance(HOUR)
        worker = a_worker(repository, folder)
        worker.tick()
        assert 1 == repository.get_buffer_status().synced
        assert worker.status.maintenance_error.startswith("BufferStorageError: ")
        [told] = [record for record in caplog.records if record.levelname == "ERROR"]
        assert told.message.startswith("maintenance has failed (")
        assert told.message.endswith("); delivery goes on, and it is tried again after an hour")
        assert not told.exc_info  # it says what to do
        folder.unlink()
        for seconds, expected in ((HOUR - 1, 0), (1, 1)):
            clock.advance(seconds)
            worker.tick()
            assert expected == folder.exists()
        assert worker.status.maintenance_error is None
        assert ["maintenance_started", "maintenance_started", "maintenance_completed"] == history(repository)

    def test_prune(self, repository, path, clock, folder):
        """If it cannot prune, it backs up all the same."""
        with another_program(path) as other:
            other.execute("UPDATE config SET value = 'nonsense' WHERE key = 'retention_dlq_days'")
        clock.advance(HOUR)
        worker = a_worker(repository, folder)
        worker.tick()
        assert worker.status.maintenance_error.startswith("InvalidConfigError: ")
        assert 1 == len(backups(folder))

    def test_damaged(self, repository, path, clock, folder):
        """A damaged copy is told, and no older one is deleted. Of the damaged ones, the last stays."""
        receipt = a_receipt(repository, "failed")
        with another_program(path) as other:
            other.execute("PRAGMA ignore_check_constraints = ON")
            other.execute("UPDATE receipts SET retry_count = -1 WHERE id = ?", (receipt.id,))
        worker = a_worker(repository, folder)
        clock.advance(HOUR)
        for _ in range(8):
            worker.tick()
            clock.advance(DAY)
        assert "no older backup" in worker.status.maintenance_error.lower()
        assert [folder / "buffer-damaged.db"] == list(folder.iterdir())

    def test_another_succeeds(self, repository, clock, folder):
        """When another worker has done it, the failure is over."""
        folder.write_text("not a folder")
        clock.advance(HOUR)
        worker = a_worker(repository, folder)
        worker.tick()
        assert worker.status.maintenance_error is not None
        folder.unlink()
        clock.advance(HOUR)
        a_worker(repository, folder).tick()
        worker.tick()
        assert worker.status.maintenance_error is None


def test_log(repository, clock, folder, caplog):
    """What was done is in the log."""
    caplog.set_level("INFO", logger="kkt_buffer.maintenance")
    clock.advance(HOUR)
    a_worker(repository, folder).tick()
    pruned, backed_up = (message for message in caplog.messages if message.startswith("maintenance: "))
    assert "receipts=0" in pruned
    assert str(backups(folder)[0]) in backed_up
