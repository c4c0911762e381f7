"""`deliver_pending` while the OFD cannot be reached: what the sender says, and what becomes of the receipts."""

import pytest
from builders import NOON, a_receipt, on_sqlite_alone
from delivery.ofd import Ofd

from kkt_buffer import DeliveryRejected, DeliveryUnavailable, Outcome, ReceiptRepository, deliver_pending

OFFLINE = Ofd(DeliveryUnavailable("offline"))


@pytest.fixture
def repository(engine, clock):
    """Without jitter: what is taken off a wait is nothing."""
    return ReceiptRepository(engine, now=clock, jitter=lambda: 0.0)


@pytest.fixture
def three(repository):
    """Three receipts of three tills, in this order."""
    return [a_receipt(repository, pos_id=pos_id).id for pos_id in ("first", "second", "third")]


def sync_events(repository):
    """What the runs have logged, oldest first."""
    return [event.event_type for event in reversed(repository.get_events()) if event.event_type.startswith("sync")]


class TestOutage:
    @pytest.mark.parametrize(
        "error", [DeliveryUnavailable("offline"), ConnectionRefusedError("refused"), TimeoutError("no answer")]
    )
    def test_releases(self, repository, three, error):
        """An outage releases what is not sent, burns no attempt, and sends nothing more."""
        ofd = Ofd(second=error)
        report = deliver_pending(repository, ofd)
        assert [Outcome.SYNCED, Outcome.RELEASED, Outcome.RELEASED] == list(report.outcomes.values())
        assert f"{type(error).__name__}: {error}" == report.outage
        assert three[:2] == ofd.received
        assert [0, 0] == [receipt.retry_count for receipt in repository.get_pending_receipts()]
        assert three[1:] == [receipt.id for receipt in repository.claim_pending(5)]

    def test_failures_before_it(self, repository, three):
        """What failed since the last answer may have met the same outage: no attempt is counted, and it waits."""
        report = deliver_pending(repository, Ofd(ValueError("cut off"), third=DeliveryUnavailable()))
        assert dict.fromkeys(three, Outcome.RELEASED) == report.outcomes
        waits = [(receipt.retry_count, receipt.next_attempt_at) for receipt in repository.get_pending_receipts()]
        assert [(0, NOON + 300), (0, NOON + 300), (0, NOON)] == waits

    def test_one_at_a_time(self, repository, clock, three):
        """While it lasts, each call tries one receipt: the one that was tried least recently."""
        ofd = Ofd(DeliveryUnavailable("offline"))
        for _ in range(4):
            assert deliver_pending(repository, ofd).outage == "DeliveryUnavailable: offline"
            clock.seconds += 1
        assert [*three, three[0]] == ofd.received

    def test_end(self, repository, three):
        """The first receipt that is accepted ends it, and the same call goes on in HLC order."""
        deliver_pending(repository, OFFLINE)
        ofd = Ofd()
        report = deliver_pending(repository, ofd)
        assert (3, None) == (report.count(Outcome.SYNCED), report.outage)
        assert [three[1], three[0], three[2]] == ofd.received

    def test_end_by_rejection(self, repository, three):
        """An OFD that rejects is up."""
        deliver_pending(repository, OFFLINE)
        report = deliver_pending(repository, Ofd(second=DeliveryRejected("unknown tax rate")))
        assert ([Outcome.DEAD_LETTERED, Outcome.SYNCED, Outcome.SYNCED], None) == (
            list(report.outcomes.values()),
            report.outage,
        )

    @pytest.mark.parametrize("limit", [1, 2])
    def test_limit(self, repository, three, limit):
        """The one that ends it counts in the limit."""
        deliver_pending(repository, OFFLINE)
        assert limit == len(deliver_pending(repository, Ofd(), limit).outcomes)

    def test_only_one_fails(self, repository, clock, three):
        """A receipt by which the OFD seems to be down each time does not keep it from the others for ever."""
        ofd = Ofd(first=TimeoutError("no answer"))
        for _ in range(3):
            deliver_pending(repository, ofd)
            clock.seconds += 1
        assert set(three[1:]) < set(ofd.received)
        assert repository.get_buffer_status().synced == 2
        assert repository.get_receipt_by_id(three[0]).retry_count == 0
        new = a_receipt(repository)
        deliver_pending(repository, ofd)
        assert ([new.id], 1) == (ofd.received[-1:], repository.get_buffer_status().pending)

    def test_ended_meanwhile(self, repository, three):
        """An outage that another thread's delivery ends before this receipt is handed back burns no attempt either."""

        class OfflineError(DeliveryUnavailable):
            def __str__(self):
                repository.streak.answered("another")
                return "offline"

        repository.streak.failed(three[0], "500", 5)
        repository.streak.answered("another")  # so the first one is a suspect
        report = deliver_pending(repository, Ofd(OfflineError()), 1)
        assert ({three[0]: Outcome.RELEASED}, None) == (report.outcomes, report.outage)
        assert repository.get_receipt_by_id(three[0]).retry_count == 0

    def test_nothing_due(self, repository, clock, three):
        """It lasts although no receipt is due."""
        deliver_pending(repository, Ofd(ValueError("cut off"), third=DeliveryUnavailable("offline")))
        deliver_pending(repository, Ofd(ValueError("cut off")))
        report = deliver_pending(repository, Ofd())
        assert ({}, "DeliveryUnavailable: offline") == (report.outcomes, report.outage)


class TestTypes:
    def test_own(self, repository, three):
        """Errors of the sender's own that mean an outage."""

        class NoRouteError(Exception):
            pass

        report = deliver_pending(repository, Ofd(NoRouteError("tunnel")), outage=(KeyError, NoRouteError))
        assert (3, "NoRouteError: tunnel") == (report.count(Outcome.RELEASED), report.outage)

    def test_rejection(self, repository, three):
        """A rejection stays one, however much is an outage; so does an answer that is no time."""
        ofd = Ofd(first=DeliveryRejected("unknown tax rate"), second="soon")
        report = deliver_pending(repository, ofd, outage=(Exception,))
        assert [Outcome.DEAD_LETTERED, Outcome.RETRY, Outcome.SYNCED] == list(report.outcomes.values())

    @pytest.mark.parametrize("outage", [KeyError, [KeyError], (KeyError(),), (KeyboardInterrupt,), "KeyError", None])
    def test_bad(self, repository, three, outage):
        with pytest.raises(TypeError, match="outage: expected a tuple of exception classes"):
            deliver_pending(repository, OFFLINE, outage=outage)
        assert repository.get_buffer_status().pending == 3


class TestRetryAfter:
    @pytest.mark.parametrize(("retry_after", "pause"), [(90, 90), (0.5, 1), (86_400, 3600)])
    def test_pause(self, repository, clock, three, retry_after, pause):
        """Until then, an hour at most, nothing is sent; the report says why."""
        deliver_pending(repository, Ofd(DeliveryUnavailable("HTTP 429", retry_after=retry_after)))
        ofd = Ofd()
        clock.seconds += pause - 1
        report = deliver_pending(repository, ofd)
        assert ([], {}, "DeliveryUnavailable: HTTP 429") == (ofd.received, report.outcomes, report.outage)
        clock.seconds += 1
        assert deliver_pending(repository, ofd).count(Outcome.SYNCED) == 3

    @pytest.mark.parametrize("retry_after", [None, 0, -5, float("nan")])
    def test_none(self, repository, three, retry_after):
        deliver_pending(repository, Ofd(DeliveryUnavailable("HTTP 503", retry_after=retry_after)))
        assert deliver_pending(repository, Ofd()).count(Outcome.SYNCED) == 3

    def test_clock_set_back(self, repository, clock, three):
        """A clock that is set back ends the pause; it does not prolong it."""
        deliver_pending(repository, Ofd(DeliveryUnavailable("HTTP 429", retry_after=60)))
        clock.seconds -= 3600
        assert deliver_pending(repository, Ofd()).count(Outcome.SYNCED) == 3


class TestEvents:
    @on_sqlite_alone
    def test_eight_hours(self, repository, clock, three):
        """Eight hours offline move nothing to the DLQ, and leave the events of one failed and one good run."""
        for _ in range(8 * 60):
            deliver_pending(repository, OFFLINE)
            clock.seconds += 60
        assert sync_events(repository) == ["sync_started", "sync_failed"]
        assert deliver_pending(repository, Ofd()).count(Outcome.SYNCED) == 3
        assert sync_events(repository) == ["sync_started", "sync_failed", "sync_started", "sync_completed"]
        assert repository.get_buffer_status().dlq_size == 0

    def test_short_recovery(self, repository, three):
        """A run that delivers something before the line goes down again is on record too."""
        deliver_pending(repository, OFFLINE)
        deliver_pending(repository, Ofd(first=DeliveryUnavailable()))
        assert sync_events(repository) == ["sync_started", "sync_failed"] * 2

    def test_counts(self, repository, three):
        """The events say how many, also in the run that ends an outage."""
        deliver_pending(repository, Ofd(third=DeliveryUnavailable("offline")))
        failed, started = (repository.get_events(1, event_type=kind)[0] for kind in ("sync_failed", "sync_started"))
        assert {"claimed": 3} == started.details
        assert {"synced": 2, "released": 1, "error": "DeliveryUnavailable: offline"} == failed.details
        a_receipt(repository)
        deliver_pending(repository, Ofd())
        completed, started = (
            repository.get_events(1, event_type=kind)[0] for kind in ("sync_completed", "sync_started")
        )
        assert ({"claimed": 2}, {"synced": 2}) == (started.details, completed.details)
