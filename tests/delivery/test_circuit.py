"""The circuit breaker of `DeliveryWorker`: when the OFD is left alone, and what the events say of it."""

import itertools

import pytest
from builders import NOON, a_receipt, new_receipt, on_sqlite_alone
from delivery.ofd import Ofd

from kkt_buffer import DeliveryUnavailable, DeliveryWorker, ReceiptRepository

OFFLINE = DeliveryUnavailable("offline")
THRESHOLD, TIMEOUT = 5, 60
SELDOM = 20  # seconds between two looks, where hours are played


@pytest.fixture
def repository(engine, clock):
    """Without jitter: what is taken off a wait is nothing."""
    return ReceiptRepository(engine, now=clock, jitter=lambda: 0.0)


class Line:
    """The line to the OFD, which tells when it was used; receipts of the till `bad` are never taken."""

    def __init__(self, clock):
        self.clock = clock
        self.error = OFFLINE
        self.tried = []

    def __call__(self, receipt):
        self.tried.append(self.clock() - NOON)
        if self.error:
            raise self.error
        if receipt.pos_id == "bad":
            raise RuntimeError("500")
        return int(self.clock())


@pytest.fixture
def line(clock):
    return Line(clock)


def work(worker, clock, seconds):
    """Let the worker run for so long, by the clock of the test."""
    end = clock() + seconds
    while clock() < end:
        clock.advance(min(worker.tick(), end - clock()))


def circuit_events(repository):
    found = [event.event_type for event in reversed(repository.get_events(1000))]
    return [event_type for event_type in found if event_type.startswith("circuit")]


class TestOutage:
    @on_sqlite_alone
    @pytest.mark.parametrize("error", [OFFLINE, ConnectionRefusedError(), RuntimeError("500")])
    def test_eight_hours(self, repository, clock, line, error):
        """One receipt is tried each `circuit_breaker_timeout`; nothing is given up; each event is there once."""
        repository.set_config("retry_backoff_max", 60)
        repository.insert_receipts(new_receipt() for _ in range(20))
        line.error = error
        worker = DeliveryWorker(repository, line, poll_seconds=SELDOM)
        work(worker, clock, 8 * 3600)
        probes = line.tried[THRESHOLD:]
        assert 8 * 60 - 2 <= len(probes) <= 8 * 60
        assert {TIMEOUT} == {later - earlier for earlier, later in itertools.pairwise(probes)}
        assert (20, 0) == (repository.get_buffer_status().pending, repository.get_buffer_status().dlq_size)
        assert {0} == {receipt.retry_count for receipt in repository.get_pending_receipts()}
        assert worker.status.is_open
        line.error = None
        work(worker, clock, TIMEOUT + 1)
        assert 20 == repository.get_buffer_status().synced
        assert not worker.status.is_open
        assert ["circuit_opened", "circuit_closed"] == circuit_events(repository)
        assert 8 * 3600 <= worker.status.since - NOON <= 8 * 3600 + TIMEOUT

    @on_sqlite_alone
    @pytest.mark.parametrize("error", [OFFLINE, RuntimeError("500")])
    def test_poisonous(self, repository, clock, line, error):
        """A bad receipt at the head neither keeps it open, nor is it given up because of the outage."""
        [bad, *_] = repository.insert_receipts(new_receipt(pos_id=till) for till in ["bad", *"abcdefghi"])
        line.error = error
        worker = DeliveryWorker(repository, line, poll_seconds=SELDOM)
        work(worker, clock, 8 * 3600)
        assert 10 == repository.get_buffer_status().pending
        line.error = None
        work(worker, clock, 10 * TIMEOUT)
        status = repository.get_buffer_status()
        assert (9, 0) == (status.synced, status.dlq_size)
        assert ["circuit_opened", "circuit_closed"] == circuit_events(repository)
        assert 0 < repository.get_receipt_by_id(bad).retry_count < 20
        assert not worker.status.is_open

    @on_sqlite_alone
    def test_alone(self, repository, clock, line):
        """A bad receipt by itself opens nothing: it waits its backoffs, and becomes a dead letter."""
        line.error = None
        a_receipt(repository, pos_id="bad")
        work(DeliveryWorker(repository, line, poll_seconds=SELDOM), clock, 2 * 3600)
        assert 1 == repository.get_buffer_status().dlq_size
        assert [] == circuit_events(repository)

    def test_before_it_opens(self, repository, clock, line):
        """Below the threshold the next try is after `poll_seconds`, and one that gets through is no event."""
        a_receipt(repository)
        worker = DeliveryWorker(repository, line, poll_seconds=2)
        work(worker, clock, 7)
        assert [0, 2, 4, 6] == line.tried
        line.error = None
        work(worker, clock, 2)
        assert 1 == repository.get_buffer_status().synced
        assert [] == circuit_events(repository)

    def test_settings(self, repository, clock, line):
        """Both numbers are settings, and are read again."""
        repository.set_config("circuit_breaker_threshold", 2)
        repository.set_config("circuit_breaker_timeout", 7)
        a_receipt(repository)
        worker = DeliveryWorker(repository, line)
        work(worker, clock, 10)
        assert [0, 1, 8] == line.tried
        repository.set_config("circuit_breaker_timeout", 3)
        work(worker, clock, 5)
        assert [0, 1, 8, 11, 14] == line.tried

    def test_clock_set_back(self, repository, clock, line):
        """A clock that is set back does not keep it open for longer."""
        a_receipt(repository)
        worker = DeliveryWorker(repository, line)
        work(worker, clock, 30)
        assert THRESHOLD == len(line.tried)
        clock.advance(-86_400)
        worker.tick()
        assert THRESHOLD + 1 == len(line.tried)


@pytest.fixture
def opened(repository, clock, line):
    """A worker whose circuit was just opened."""
    a_receipt(repository)
    worker = DeliveryWorker(repository, line)
    work(worker, clock, THRESHOLD)
    assert worker.status.is_open
    return worker


class TestOpen:
    def test_new_receipts(self, repository, line, opened):
        """A sale does not call the OFD."""
        a_receipt(repository)
        opened.tick()
        assert THRESHOLD == len(line.tried)

    def test_woken(self, repository, line, opened):
        """`wake` does: somebody knows that the line is up again."""
        opened.wake()
        opened.tick()
        assert THRESHOLD + 1 == len(line.tried)
        opened.tick()
        assert THRESHOLD + 1 == len(line.tried)

    def test_retry_after(self, repository, clock, line, opened):
        """When the OFD asks to be left alone, it is, even by `wake`."""
        line.error = DeliveryUnavailable("maintenance", retry_after=600)
        work(opened, clock, TIMEOUT)
        assert THRESHOLD + 1 == len(line.tried)
        opened.wake()
        work(opened, clock, 590)
        assert THRESHOLD + 1 == len(line.tried)
        work(opened, clock, 20)
        assert THRESHOLD + 2 == len(line.tried)

    def test_restart(self, repository, engine, clock, line, opened):
        """The next worker does not log it again, and closes it."""
        restarted = DeliveryWorker(ReceiptRepository(engine, now=clock), line)
        work(restarted, clock, 10)
        assert restarted.status.is_open
        assert ["circuit_opened"] == circuit_events(repository)
        line.error = None
        restarted.wake()
        restarted.tick()
        assert ["circuit_opened", "circuit_closed"] == circuit_events(repository)
        work(opened, clock, TIMEOUT)
        assert ["circuit_opened", "circuit_closed"] == circuit_events(repository)

    def test_restart_after_it(self, repository, engine, clock, line, opened):
        """A worker that starts after the outage closes it with its first delivery."""
        line.error = None
        restarted = DeliveryWorker(ReceiptRepository(engine, now=clock), line)
        assert repository.get_buffer_status().circuit_opened_at is not None
        restarted.tick()
        assert ["circuit_opened", "circuit_closed"] == circuit_events(repository)

    @pytest.mark.parametrize("why", ["beaten", "stopped"])
    def test_nothing_sent(self, repository, engine, clock, line, opened, why):
        """A worker that has not used the line says nothing of the circuit."""

        class Beaten(ReceiptRepository):
            def claim_pending(self, *_, **__):
                if why == "stopped":
                    other.stop(0)
                    return super().claim_pending()
                return []

        other = DeliveryWorker(Beaten(engine, now=clock), line)
        other.tick()
        assert ["circuit_opened"] == circuit_events(repository)
        assert repository.get_buffer_status().circuit_opened_at is not None

    def test_closed_by_another(self, repository, engine, clock, line, opened):
        """If another worker has closed it and the OFD is down still, it is opened again on record."""
        repository.log_event("circuit_closed")
        work(opened, clock, TIMEOUT + 1)
        assert ["circuit_opened", "circuit_closed", "circuit_opened"] == circuit_events(repository)

    def test_shared(self, repository, clock, line, opened):
        """The status of each worker of the repository shows it, and since when."""
        other = DeliveryWorker(repository, line).status
        assert other.is_open
        clock.advance(TIMEOUT)
        line.error = None
        opened.tick()
        assert not opened.status.is_open
        assert clock() == opened.status.since

    def test_no_answer(self, repository, engine, clock, line, opened):
        """A receipt that fails is no answer: the next worker does not close it."""
        line.error = RuntimeError("500")
        restarted = DeliveryWorker(ReceiptRepository(engine, now=clock), line)
        restarted.tick()
        assert ["circuit_opened"] == circuit_events(repository)

    def test_reason(self, repository, opened):
        """The event says why."""
        [event] = repository.get_events(event_type="circuit_opened")
        assert {"error": "DeliveryUnavailable: offline"} == event.details


def test_no_probe_without_receipts(repository, clock):
    """With nothing to deliver, nothing is tried."""
    ofd = Ofd(OFFLINE)
    work(DeliveryWorker(repository, ofd), clock, 100)
    assert [] == ofd.received
