"""The streak rule of `deliver_pending`: one receipt that fails is bad, several in a row are an outage."""

import random

import pytest
from builders import NOON, Clock, a_receipt, an_id, new_receipt, on_sqlite_alone, together
from delivery.ofd import Ofd

from kkt_buffer import DeliveryRejected, Outcome, ReceiptRepository, deliver_pending
from kkt_buffer.streak import MAX_REMEMBERED, Streak

THRESHOLD = 5
BACKOFF_MAX = 300


@pytest.fixture
def repository(engine, clock):
    """Without jitter: what is taken off a wait is nothing."""
    return ReceiptRepository(engine, now=clock, jitter=lambda: 0.0)


def receipts(repository, *tills):
    return [a_receipt(repository, pos_id=till).id for till in tills]


def down():
    return Ofd(RuntimeError("500"))


def attempts(repository, receipt_ids):
    return [repository.get_receipt_by_id(receipt_id).retry_count for receipt_id in receipt_ids]


class TestPause:
    def test_longer(self):
        """Of two senders that were told to wait, the longer wait counts, whichever comes last."""
        clock = Clock()
        streak = Streak(clock)
        for error, seconds in (("a", 60), ("b", 600), ("c", 30)):
            streak.unavailable("1", error, THRESHOLD, seconds)
        clock.advance(599)
        assert "b" == streak.pause
        clock.advance(1)
        assert streak.pause is None


class TestOutage:
    def test_threshold(self, repository):
        """At `circuit_breaker_threshold` it is an outage: what was tried waits, uncounted; the rest is released."""
        made = receipts(repository, *"abcdefg")
        ofd = down()
        report = deliver_pending(repository, ofd)
        assert made[:THRESHOLD] == ofd.received
        assert dict.fromkeys(made, Outcome.RELEASED) == report.outcomes
        assert report.outage == "5 different receipts have failed in a row, the last one with RuntimeError: 500"
        assert [0] * 7 == attempts(repository, made)
        due = [repository.get_receipt_by_id(receipt_id).next_attempt_at for receipt_id in made]
        assert [NOON + BACKOFF_MAX] * THRESHOLD + [None] * 2 == due

    def test_setting(self, repository):
        """The number is a setting."""
        repository.set_config("circuit_breaker_threshold", 2)
        made = receipts(repository, *"abc")
        ofd = down()
        deliver_pending(repository, ofd)
        assert made[:2] == ofd.received

    def test_jitter(self, engine, clock):
        """The wait is spread like any other."""
        repository = ReceiptRepository(engine, now=clock, jitter=lambda: 1.0)
        repository.set_config("circuit_breaker_threshold", 1)
        [made] = receipts(repository, "a")
        deliver_pending(repository, down())
        assert repository.get_receipt_by_id(made).next_attempt_at == NOON + BACKOFF_MAX // 2

    def test_below(self, repository):
        """Fewer failures count their attempts at the end of the call."""
        made = receipts(repository, *"abcd")
        report = deliver_pending(repository, down())
        assert (dict.fromkeys(made, Outcome.RETRY), None) == (report.outcomes, report.outage)
        assert [1] * 4 == attempts(repository, made)

    def test_over_calls(self, repository):
        """The failures of several calls are counted together; those of an earlier call have counted their attempts."""
        made = receipts(repository, *"abcdefg")
        deliver_pending(repository, down(), 3)
        report = deliver_pending(repository, down(), 3)
        assert [Outcome.RELEASED] * 3 == list(report.outcomes.values())
        assert [1, 1, 1, 0, 0, 0, 0] == attempts(repository, made)

    def test_same_receipt(self, repository, clock):
        """Only different receipts are counted."""
        made = receipts(repository, "a")
        for _ in range(THRESHOLD):
            assert deliver_pending(repository, down()).outage is None
            clock.seconds += BACKOFF_MAX
        assert [THRESHOLD] == attempts(repository, made)

    def test_other_repository(self, repository, engine, clock):
        """Each repository has its own."""
        receipts(repository, *"abcde")
        deliver_pending(repository, down())
        clock.seconds += BACKOFF_MAX
        other = ReceiptRepository(engine, now=clock)
        assert deliver_pending(other, Ofd()).count(Outcome.SYNCED) == 5

    @pytest.mark.parametrize("answer", [NOON, DeliveryRejected("unknown tax rate")])
    def test_answer_between(self, repository, answer):
        """A delivery or a rejection ends the streak, and what failed before it counts its attempts."""
        made = receipts(repository, *"abcdXefgh")
        report = deliver_pending(repository, Ofd(RuntimeError("500"), X=answer))
        assert (8, None) == (report.count(Outcome.RETRY), report.outage)
        assert [1, 1, 1, 1, 0, 1, 1, 1, 1] == attempts(repository, made)

    def test_small_batches(self, repository, clock):
        """Batches below the threshold do not try the same receipts each time, so that an outage is seen."""
        made = receipts(repository, *"abcdefgh")
        for _ in range(30):
            report = deliver_pending(repository, down(), 4)
            clock.seconds += BACKOFF_MAX
        assert report.outage is not None
        assert [1] * 4 + [0] * 4 == attempts(repository, made)

    def test_threads(self, shared_repository):
        """Threads that deliver with one repository count together."""
        shared_repository.insert_receipts(new_receipt() for _ in range(8))
        reports = together(4, lambda _: deliver_pending(shared_repository, down(), 2))
        assert any(report.outage for report in reports)
        assert deliver_pending(shared_repository, down(), 8).outage is not None


class TestWhileItLasts:
    @pytest.fixture
    def made(self, repository, clock):
        """Seven receipts, of which the first five made the outage, a second one after the other."""

        def slowly():
            clock.seconds += 1
            raise RuntimeError("500")

        made = receipts(repository, *"abcdefg")
        deliver_pending(repository, Ofd(slowly))
        return made

    def test_order(self, repository, clock, made):
        """Each call tries one: those never tried first, then the least recently tried."""
        clock.seconds += BACKOFF_MAX
        ofd = down()
        for _ in range(8):
            assert deliver_pending(repository, ofd).count(Outcome.RELEASED) == 1
            clock.seconds += 100
        assert made[THRESHOLD:] + made[:THRESHOLD] + made[THRESHOLD:][:1] == ofd.received
        assert [0] * 7 == attempts(repository, made)

    def test_end(self, repository, clock, made):
        """The first answer ends it; the call goes on in HLC order."""
        clock.seconds += BACKOFF_MAX
        ofd = Ofd()
        report = deliver_pending(repository, ofd)
        assert (7, None) == (report.count(Outcome.SYNCED), report.outage)
        assert [made[5], *made[:5], made[6]] == ofd.received

    def test_suspects(self, repository, clock, made):
        """What failed before the last answer counts its attempts, and is no sign of an outage."""
        clock.seconds += BACKOFF_MAX
        ofd = Ofd(RuntimeError("500"), f=NOON, g=NOON)
        report = deliver_pending(repository, ofd)
        assert (5, 2, None) == (report.count(Outcome.RETRY), report.count(Outcome.SYNCED), report.outage)
        assert [1] * 5 == attempts(repository, made[:5])


@pytest.fixture
def simulated(engine, clock):
    """A shop with an OFD that is down, and a worker that calls now and then; some of the receipts are bad."""
    return Shop(engine, clock)


class Shop:
    def __init__(self, engine, clock):
        self.clock = clock
        self.is_down = True
        self.repository = ReceiptRepository(engine, now=clock, jitter=random.Random(5).random)

    def sell(self, bad, good):
        self.repository.insert_receipts(new_receipt(pos_id="bad") for _ in range(bad))
        self.repository.insert_receipts(new_receipt(pos_id="good") for _ in range(good))

    def send(self, receipt):
        if self.is_down or receipt.pos_id == "bad":
            raise RuntimeError("500")
        return int(self.clock.seconds)

    def work(self, seconds, batch, every):
        end = self.clock.seconds + seconds
        while self.clock.seconds < end:
            deliver_pending(self.repository, self.send, batch)
            self.clock.seconds += every
        return self.repository.get_buffer_status()


@pytest.mark.slow
@on_sqlite_alone
class TestEightHours:
    @pytest.mark.parametrize(("bad", "batch"), [(1, 4), (5, 50), (12, 4), (40, 50)])
    def test_afterwards(self, simulated, batch, bad):
        """Eight hours of 500 give nothing up; then the good ones go out, and the bad ones after their attempts."""
        simulated.sell(bad, 100 - bad)
        status = simulated.work(8 * 3600, batch, every=60)
        assert (100, 0) == (status.pending, status.dlq_size)
        assert all(receipt.retry_count <= 1 for receipt in simulated.repository.get_pending_receipts(100))
        simulated.is_down = False
        status = simulated.work(1800, batch, every=10)
        assert (100 - bad, bad) == (status.synced, status.pending + status.failed)
        status = simulated.work(2 * 3600, batch, every=10)
        assert (0, bad) == (status.pending, status.dlq_size)
        assert {20} == {letter.retry_attempts for letter in simulated.repository.list_dead_letters()}

    @pytest.mark.parametrize("batch", [4, 50])
    def test_one_success_in_between(self, simulated, batch):
        """One receipt that gets through in the middle does not lay the blame on all the others."""
        simulated.sell(0, 100)
        simulated.work(4 * 3600, batch, every=60)
        simulated.is_down = False
        deliver_pending(simulated.repository, simulated.send, 1)
        simulated.is_down = True
        status = simulated.work(4 * 3600, batch, every=60)
        assert (99, 1, 0) == (status.pending, status.synced, status.dlq_size)


def test_answered_itself():
    """A receipt that was answered is no suspect, however often it has failed."""
    streak = Streak(Clock())
    streak.failed("a", "500", THRESHOLD)
    streak.answered("a")
    assert not streak.is_suspect("a")
    streak.failed("a", "500", THRESHOLD)
    streak.answered("b")
    assert streak.is_suspect("a")
    streak.answered("a")
    assert not streak.is_suspect("a")


def test_memory():
    """What a process remembers of failed receipts has a bound."""
    streak = Streak(Clock())
    ids = [an_id() for _ in range(MAX_REMEMBERED + 1)]
    for receipt_id in ids:
        streak.failed(receipt_id, "500", THRESHOLD)
    streak.answered(an_id())
    assert [False, True] == [streak.is_suspect(receipt_id) for receipt_id in ids[:2]]
