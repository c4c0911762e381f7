"""`DeliveryWorker`, a tick at a time under a clock of the test: what is due when, and what an idle worker costs."""

import datetime as dt
import threading

import pytest
from builders import NOON, a_receipt, another_program, commits, new_receipt
from delivery.ofd import Ofd

from kkt_buffer import BufferBusyError, BufferStorageError, DeliveryWorker, Outcome, ReceiptRepository
from kkt_buffer.backend import backend_of


@pytest.fixture
def repository(engine, clock):
    """Without jitter: what is taken off a wait is nothing."""
    return ReceiptRepository(engine, now=clock, jitter=lambda: 0.0)


class TestTick:
    def test_delivers(self, repository):
        """What is due is sent at once, in HLC order, and then it is asked again at once."""
        made = [a_receipt(repository, pos_id=till).id for till in "abc"]
        ofd = Ofd()
        worker = DeliveryWorker(repository, ofd)
        assert [0, 1.0] == [worker.tick(), worker.tick()]
        assert made == ofd.received
        assert dict.fromkeys(made, Outcome.SYNCED) == worker.status.report.outcomes

    def test_batch(self, repository):
        """A backlog is delivered a batch at a time, without a pause."""
        repository.insert_receipts(new_receipt() for _ in range(5))
        reports = []
        worker = DeliveryWorker(repository, Ofd(), batch=2, on_report=reports.append)
        assert [0, 0, 0, 1.0] == [worker.tick() for _ in range(4)]
        assert [2, 2, 1] == [len(report.outcomes) for report in reports]

    def test_batch_of_many(self, repository):
        """Each of the senders gets a batch."""
        repository.insert_receipts(new_receipt(pos_id=till) for till in "abcdef")
        worker = DeliveryWorker(repository, Ofd(), batch=2, concurrency=2)
        worker.tick()
        assert 4 == len(worker.status.report.outcomes)

    @pytest.mark.parametrize(("poll_seconds", "expected"), [(1.0, 1.0), (60, 5)])
    def test_backoff(self, repository, clock, poll_seconds, expected):
        """It comes back when the next attempt is due, or to look for new receipts if that is earlier."""
        a_receipt(repository)
        ofd = Ofd(ValueError("500"))
        worker = DeliveryWorker(repository, ofd, poll_seconds=poll_seconds)
        assert [0, expected] == [worker.tick(), worker.tick()]
        clock.advance(5)
        worker.tick()
        assert 2 == len(ofd.received)

    def test_lease(self, repository, clock):
        """A dead worker's lease is waited for, and its receipt sent when it expires."""
        receipt = a_receipt(repository)
        repository.claim_pending()
        ofd = Ofd()
        worker = DeliveryWorker(repository, ofd, poll_seconds=3600)
        assert 60 == worker.tick()
        clock.advance(60)
        worker.tick()
        assert [receipt.id] == ofd.received

    @pytest.mark.parametrize("what", ["lease", "backoff"])
    def test_clock_set_back(self, repository, clock, what):
        """A lease, or a backoff, of the future is over: the clock was set back."""
        a_receipt(repository)
        clock.advance(86_400)
        [claimed] = repository.claim_pending()
        if what == "backoff":
            repository.record_failure(claimed.id, "500", claimed.lease_token)
        clock.advance(-86_400)
        ofd = Ofd()
        DeliveryWorker(repository, ofd).tick()
        assert [claimed.id] == ofd.received

    def test_held(self, repository):
        """What is not printed yet is not due."""
        repository.insert_receipt(new_receipt(), hold=True)
        assert repository.seconds_until_due() is None

    def test_beaten(self, repository):
        """If another worker was faster, there is nothing to report."""
        a_receipt(repository)

        class Late(ReceiptRepository):
            def seconds_until_due(self):
                return 0

        late = Late(repository.engine, now=repository.now)
        repository.claim_pending()
        worker = DeliveryWorker(late, Ofd())
        assert 1.0 == worker.tick()
        assert worker.status.report is None


class TestIdle:
    def test_writes_nothing(self, shared_repository, shared_engine):
        """A worker that finds nothing to do writes nothing."""
        a_receipt(shared_repository)
        worker = DeliveryWorker(shared_repository, Ofd(ValueError("500")), maintenance_at=dt.time(23, 59, 59))
        worker.tick()
        with commits(shared_engine) as seen:
            assert [1.0, 1.0] == [worker.tick(), worker.tick()]
        assert [] == seen

    def test_write_lock(self, path, open_engine, clock):
        """Nor does it take SQLite's write lock: it works while another program holds that."""
        engine = open_engine(path, busy_timeout=0.1)
        repository = ReceiptRepository(engine, now=clock)
        a_receipt(repository)
        worker = DeliveryWorker(repository, Ofd(ValueError("500")), maintenance_at=dt.time(23, 59, 59))
        worker.tick()
        with another_program(path) as other, commits(engine) as seen:
            other.execute("BEGIN IMMEDIATE")
            assert [1.0, 1.0] == [worker.tick(), worker.tick()]
            clock.advance(5)
            with pytest.raises(BufferBusyError):
                worker.tick()
        assert [] == seen


class TestArguments:
    @pytest.mark.parametrize(
        ("wrong", "error"),
        [
            ({"batch": 0}, ValueError),
            ({"concurrency": 0}, ValueError),
            ({"concurrency": "2"}, TypeError),
            ({"poll_seconds": 0}, ValueError),
            ({"poll_seconds": float("nan")}, ValueError),
            ({"poll_seconds": 3601}, ValueError),
            ({"poll_seconds": True}, TypeError),
            ({"poll_seconds": "1"}, TypeError),
            ({"outage": [OSError]}, TypeError),
            ({"maintenance_at": "03:00"}, TypeError),
            ({"maintenance_at": dt.time(3, tzinfo=dt.UTC)}, TypeError),
            ({"backup_to": "backups"}, ValueError),
        ],
    )
    def test_refused(self, repository, wrong, error):
        """A wrong argument is named when the worker is made."""
        [name] = wrong
        with pytest.raises(error, match=f"^{name}: "):
            DeliveryWorker(repository, Ofd(), **wrong)

    def test_async_sender(self, repository):
        """So is a sender that cannot be called."""

        async def send(receipt):
            return NOON

        with pytest.raises(TypeError, match="^send: "):
            DeliveryWorker(repository, send)


class TestThread:
    @pytest.fixture
    def repository(self, shared_engine):
        """As threads need it, by the real clock."""
        return ReceiptRepository(shared_engine)

    def test_woken(self, repository, shared_engine):
        """A commit in this process wakes it, by whichever repository of the engine, also a requeue."""
        sent = threading.Semaphore(0)

        def send(receipt):
            sent.release()
            return NOON

        with DeliveryWorker(repository, send, poll_seconds=3600):
            repository.insert_receipt(new_receipt())
            assert sent.acquire(timeout=10)
            other = ReceiptRepository(shared_engine)
            with other.transaction():
                receipt_id = other.insert_receipt(new_receipt())
                other.move_to_dlq(receipt_id, "a test")
            other.requeue(receipt_id, actor="Anna", reason="a test")
            assert sent.acquire(timeout=10)

    def test_stop(self, repository):
        """It stops after the present send, records it, and hands back what it has not sent."""
        repository.insert_receipts(new_receipt() for _ in range(3))
        sending, go_on = threading.Event(), threading.Event()

        def send(receipt):
            sending.set()
            go_on.wait(10)
            return NOON

        worker = DeliveryWorker(repository, send)
        worker.start()
        sending.wait(10)
        assert not worker.stop(timeout=0.01)
        assert worker.status.is_running
        go_on.set()
        assert worker.stop(timeout=10)
        assert not worker.status.is_running
        status = repository.get_buffer_status()
        assert (1, 2, 0) == (status.synced, status.pending, status.syncing)

    def test_again(self, repository):
        """It can be started again, but runs once at a time."""
        worker = DeliveryWorker(repository, Ofd())
        for _ in range(2):
            with worker:
                with pytest.raises(RuntimeError, match="running already"):
                    worker.start()
                with pytest.raises(RuntimeError, match="running already"):
                    worker.run()
        assert worker.stop()
        assert set() == backend_of(repository.engine).bells

    @pytest.mark.parametrize("concurrency", [1, 2])
    def test_stopped_by_its_sender(self, repository, concurrency):
        """`send` may stop it, from each of its threads: that does not wait."""
        repository.insert_receipts(new_receipt(pos_id=till) for till in "ab" * 3)
        both = threading.Barrier(concurrency)

        def send(receipt):
            both.wait(10)
            answers.append(worker.stop())
            return NOON

        answers = []
        worker = DeliveryWorker(repository, send, concurrency=concurrency)
        worker.run()
        assert [False] * concurrency == answers
        assert repository.get_buffer_status().synced == concurrency

    def test_run_in_a_thread(self, repository):
        """`run` in another thread than the main one leaves signals alone, and `stop` ends it."""
        ofd = Ofd()
        worker = DeliveryWorker(repository, ofd)
        thread = threading.Thread(target=worker.run)
        thread.start()
        repository.insert_receipt(new_receipt())
        while not ofd.received:
            thread.join(0.01)
        assert worker.stop()
        thread.join()

    @pytest.mark.parametrize(
        ("error", "has_traceback"), [(OSError("no route"), True), (BufferStorageError("the disk is full"), False)]
    )
    def test_errors(self, repository, caplog, error, has_traceback):
        """
        An error is logged once for as long as it lasts; the worker goes on, and says so when it is over.

        Our own errors say what to do, and are no reason for a traceback.
        """
        repository.insert_receipts(new_receipt() for _ in range(4))
        seen = []

        def get_config(key):
            seen.append(worker.status.error)
            if len(seen) <= 2:
                raise error
            if len(seen) == 4:
                worker.stop()
            return original(key)

        original, repository.get_config = repository.get_config, get_config
        worker = DeliveryWorker(repository, Ofd(ValueError("500")), batch=1, poll_seconds=0.01)
        caplog.set_level("INFO", logger="kkt_buffer.worker")
        worker.run()
        message = f"{type(error).__name__}: {error}"
        assert [None, message, message, None] == seen
        told = [record for record in caplog.records if record.name == "kkt_buffer.worker"]
        assert [
            f"the worker cannot deliver ({error}); the receipts are safe, and it tries again",
            "the worker delivers again",
        ] == [record.message for record in told]
        assert has_traceback == bool(told[0].exc_info)

    def test_observer_fails(self, repository, caplog):
        """An error of `on_report` is told as such, and is no error of the delivery."""
        repository.insert_receipt(new_receipt())

        def observe(report):
            raise OSError("the disk of the log is full")

        worker = DeliveryWorker(repository, Ofd(), on_report=observe)
        assert 0 == worker.tick()
        assert worker.status.error is None
        assert ["on_report failed; the outcomes are stored, and delivery goes on"] == [
            record.message for record in caplog.records if record.name == "kkt_buffer.worker"
        ]

    def test_thread_fails(self, repository, monkeypatch):
        """If its thread cannot be started, it is not running: `stop` does not wait."""

        def refuse(thread):
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(threading.Thread, "start", refuse)
        worker = DeliveryWorker(repository, Ofd())
        with pytest.raises(RuntimeError, match="new thread"):
            worker.start()
        assert worker.stop(timeout=1)

    def test_tick_after_stop(self, repository):
        """A `tick` after `stop` delivers."""
        repository.insert_receipt(new_receipt())
        worker = DeliveryWorker(repository, Ofd())
        worker.stop()
        worker.tick()
        assert 1 == repository.get_buffer_status().synced

    def test_own_commits(self, repository):
        """The worker's own commits do not wake it."""
        repository.insert_receipt(new_receipt())
        repository.claim_pending()
        asked = []

        class Late(ReceiptRepository):
            def seconds_until_due(self):
                asked.append(1)
                return 0

        worker = DeliveryWorker(Late(repository.engine), Ofd(), poll_seconds=3600)
        timer = threading.Timer(0.3, worker.stop)
        timer.start()
        worker.run()
        timer.join()
        assert [1] == asked
