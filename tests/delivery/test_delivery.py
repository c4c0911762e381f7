"""`deliver_pending`: what becomes of each receipt, and of the others."""

import time

import pytest
from builders import NOON, a_receipt, checkouts, commits, new_receipt, together

from kkt_buffer import (
    DeliveryRejected,
    DeliveryUnavailable,
    Outcome,
    ReceiptBufferError,
    ReceiptRepository,
    deliver_pending,
)

LEASE = 300


class Ofd:
    """A stand-in for the ОФД: answers by receipt, and remembers what it was sent."""

    def __init__(self, **answers):
        self.answers = answers
        self.received = []

    def __call__(self, receipt):
        self.received.append(receipt.id)
        answer = self.answers.get(receipt.pos_id, NOON + 5)
        if isinstance(answer, BaseException):
            raise answer
        return answer() if callable(answer) else answer


@pytest.fixture
def three(repository):
    """Three receipts of three tills, in this order."""
    return [a_receipt(repository, pos_id=pos_id).id for pos_id in ("first", "second", "third")]


def sync_events(repository):
    """What the runs have logged, oldest first."""
    return [event.event_type for event in reversed(repository.get_events()) if event.event_type.startswith("sync")]


def statuses(repository, receipt_ids):
    return [str(repository.get_receipt_by_id(receipt_id).status) for receipt_id in receipt_ids]


class TestSynced:
    def test_in_order(self, repository, three):
        """All that is due is sent in HLC order, and recorded with the OFD's time."""
        ofd = Ofd()
        report = deliver_pending(repository, ofd)
        assert three == ofd.received
        assert dict.fromkeys(three, Outcome.SYNCED) == report.outcomes
        assert (3, 0, None) == (report.count(Outcome.SYNCED), report.count(Outcome.RETRY), report.outage)
        assert repository.get_receipt_by_id(three[0]).hlc_server_time == NOON + 5

    def test_limit(self, repository, three):
        report = deliver_pending(repository, Ofd(), 2)
        assert three[:2] == list(report.outcomes)

    def test_at_once(self, repository, three):
        """Each delivery is on record before the next receipt is sent."""
        seen = []

        def send(receipt):
            seen.append(repository.get_buffer_status().synced)
            return NOON

        deliver_pending(repository, send)
        assert [0, 1, 2] == seen

    def test_no_transaction(self, file_repository):
        """No transaction is open while a receipt is sent, so others can write."""
        a_receipt(file_repository)

        def send(receipt):
            assert [] == in_use
            file_repository.insert_receipt(new_receipt())
            return NOON

        with checkouts() as in_use:
            assert deliver_pending(file_repository, send).count(Outcome.SYNCED) == 1

    def test_nothing_due(self, repository, engine):
        """A call that found nothing sends nothing, logs nothing, and writes nothing."""
        ofd = Ofd()
        assert deliver_pending(repository, ofd).outcomes == {}
        assert [] == ofd.received == sync_events(repository)

    def test_no_function(self, repository, three):
        """A sender that cannot be called as it is would be the receipts' fault otherwise: refused before the claim."""

        async def asynchronous(receipt):
            return NOON

        for send in (None, "send", asynchronous):
            with pytest.raises(TypeError, match="send: expected a plain function of a receipt"):
                deliver_pending(repository, send)
        assert ["pending"] * 3 == statuses(repository, three)

    def test_inside_transaction(self, repository, three):
        """Inside a transaction nothing could be recorded at once: refused."""
        ofd = Ofd()
        with repository.transaction(), pytest.raises(ReceiptBufferError, match=r"inside transaction\(\)"):
            deliver_pending(repository, ofd)
        assert ofd.received == []


class TestRejected:
    def test_dead_letter(self, repository, three):
        """What the OFD rejects is dead-lettered at once, and the others go on."""
        report = deliver_pending(repository, Ofd(second=DeliveryRejected("unknown tax rate")))
        assert [Outcome.SYNCED, Outcome.DEAD_LETTERED, Outcome.SYNCED] == list(report.outcomes.values())
        [letter] = repository.list_dead_letters()
        assert (three[1], 0) == (letter.original_receipt_id, letter.retry_attempts)
        assert letter.reason.endswith(": DeliveryRejected: unknown tax rate")

    def test_without_a_word(self, repository, three):
        """An error without a message is told by its name."""
        deliver_pending(repository, Ofd(second=DeliveryRejected()))
        assert repository.list_dead_letters()[0].reason.endswith(": DeliveryRejected")


class TestOutage:
    @pytest.mark.parametrize(
        "error", [DeliveryUnavailable("offline"), ConnectionRefusedError("refused"), TimeoutError("no answer")]
    )
    def test_releases(self, repository, three, error):
        """An outage releases what is not sent, burns no attempt, and sends nothing more."""
        ofd = Ofd(second=error)
        report = deliver_pending(repository, ofd)
        assert [Outcome.SYNCED, Outcome.RELEASED, Outcome.RELEASED] == list(report.outcomes.values())
        assert str(error) in report.outage
        assert three[:2] == ofd.received
        assert ["synced", "pending", "pending"] == statuses(repository, three)
        assert [0, 0] == [receipt.retry_count for receipt in repository.get_pending_receipts()]
        assert three[1:] == [receipt.id for receipt in repository.claim_pending(5)]

    def test_eight_hours(self, repository, clock, three):
        """Eight hours offline move nothing to the DLQ, and leave the events of one failed and one good run."""
        offline = Ofd(first=DeliveryUnavailable("offline"))
        for _ in range(8 * 60):
            deliver_pending(repository, offline)
            clock.seconds += 60
        assert sync_events(repository) == ["sync_started", "sync_failed"]
        assert deliver_pending(repository, Ofd()).count(Outcome.SYNCED) == 3
        assert sync_events(repository) == ["sync_started", "sync_failed", "sync_started", "sync_completed"]
        assert repository.get_buffer_status().dlq_size == 0

    def test_short_recovery(self, repository, three):
        """A run that delivers something before the line goes down again is on record too."""
        deliver_pending(repository, Ofd(first=DeliveryUnavailable()))
        deliver_pending(repository, Ofd(second=DeliveryUnavailable()))
        assert sync_events(repository) == ["sync_started", "sync_failed"] * 2

    def test_end_without_delivery(self, repository, three):
        """A run that reaches the OFD but delivers nothing ends the outage as well."""
        deliver_pending(repository, Ofd(first=DeliveryUnavailable()))
        refusing = dict.fromkeys(("first", "second", "third"), ValueError("no"))
        deliver_pending(repository, Ofd(**refusing))
        assert sync_events(repository) == ["sync_started", "sync_failed", "sync_started", "sync_completed"]

    def test_counts(self, repository, three):
        """The events say how many."""
        deliver_pending(repository, Ofd(third=DeliveryUnavailable("offline")))
        failed, started = repository.get_events(2, event_type="sync_failed") + repository.get_events(
            2, event_type="sync_started"
        )
        assert {"claimed": 3} == started.details
        assert {"synced": 2, "released": 1, "error": "DeliveryUnavailable: offline"} == failed.details


class TestFailedAttempt:
    @pytest.mark.parametrize("error", [ValueError("bad answer"), RuntimeError(), ReceiptBufferError("from a tool")])
    def test_counts(self, repository, three, error):
        """Any other exception counts an attempt, and the next receipt has its turn."""
        report = deliver_pending(repository, Ofd(first=error))
        assert [Outcome.RETRY, Outcome.SYNCED, Outcome.SYNCED] == list(report.outcomes.values())
        found = repository.get_receipt_by_id(three[0])
        assert (1, "pending", None) == (found.retry_count, found.status, found.lease_token)
        assert found.last_error.startswith(type(error).__name__)

    @pytest.mark.parametrize("answer", [None, -1, True, "1772366405", 5.0, 2**63])
    def test_no_time(self, repository, three, answer):
        """An answer that is no time is a failed attempt: its meaning is unknown."""
        report = deliver_pending(repository, Ofd(first=lambda: answer))
        assert report.outcomes[three[0]] == Outcome.RETRY
        assert "the answer of send: expected a whole number" in repository.get_receipt_by_id(three[0]).last_error

    def test_poison(self, repository, clock, three):
        """A receipt that always fails is dead-lettered in the end, and does not block others until then."""
        repository.set_config("max_retry_attempts", 3)
        ofd = Ofd(first=ValueError("poison"))
        for _ in range(3):
            report = deliver_pending(repository, ofd)
            clock.seconds += LEASE
        assert {three[0]: Outcome.DEAD_LETTERED} == report.outcomes
        assert ["failed", "synced", "synced"] == statuses(repository, three)


class TestInterrupted:
    @pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit()])
    def test_releases(self, repository, three, error):
        """Ctrl-C releases what is not sent, and goes on its way."""
        with pytest.raises(type(error)):
            deliver_pending(repository, Ofd(second=error))
        assert ["synced", "pending", "pending"] == statuses(repository, three)
        assert repository.get_receipt_by_id(three[1]).retry_count == 0


class TestLostLease:
    def test_not_sent(self, repository, clock, three):
        """What another worker took over meanwhile is not sent a second time."""

        def slow(receipt):
            clock.seconds += LEASE
            taken.extend(repository.claim_pending(5))
            return NOON

        taken = []
        report = deliver_pending(repository, slow)
        assert [Outcome.SYNCED, Outcome.LEASE_LOST, Outcome.LEASE_LOST] == list(report.outcomes.values())
        assert three == [receipt.id for receipt in taken]

    def test_gone(self, repository, three):
        """Nor what is no longer there, because another worker delivered it and it was pruned."""
        repository.set_config("retention_synced_days", 0)

        def slow(receipt):
            received.append(receipt.id)
            repository.mark_synced(three[1], NOON)
            repository.prune()
            return NOON

        received = []
        report = deliver_pending(repository, slow)
        assert [Outcome.SYNCED, Outcome.LEASE_LOST, Outcome.SYNCED] == list(report.outcomes.values())
        assert [three[0], three[2]] == received

    def test_failure_of_a_late_worker(self, repository, clock, three):
        """A late worker's failure is not counted against the present one's receipt."""

        def late(receipt):
            clock.seconds += LEASE
            repository.claim_pending(5)
            raise ValueError("no")

        report = deliver_pending(repository, late)
        assert dict.fromkeys(three, Outcome.LEASE_LOST) == report.outcomes
        assert [0] * 3 == [repository.get_receipt_by_id(receipt_id).retry_count for receipt_id in three]

    def test_rejection_of_what_was_delivered(self, repository, three):
        """A rejection that comes after another worker's delivery changes nothing."""

        def rejected(receipt):
            repository.mark_synced(receipt.id, NOON)
            raise DeliveryRejected("known already")

        report = deliver_pending(repository, rejected, 1)
        assert {three[0]: Outcome.LEASE_LOST} == report.outcomes
        assert repository.get_receipt_by_id(three[0]).status == "synced"

    def test_delivery_of_a_late_worker(self, repository, clock, three):
        """A late worker's delivery is a fact."""

        def late(receipt):
            clock.seconds += LEASE
            repository.claim_pending(5)
            return NOON

        assert deliver_pending(repository, late, 1).outcomes == {three[0]: Outcome.SYNCED}

    def test_outage_of_a_late_worker(self, repository, clock, three):
        """What is another's by now is not released under it."""

        def late(receipt):
            clock.seconds += LEASE
            held.extend(repository.claim_pending(5))
            raise DeliveryUnavailable

        held = []
        report = deliver_pending(repository, late)
        assert dict.fromkeys(three, Outcome.LEASE_LOST) == report.outcomes
        assert ["syncing"] * 3 == statuses(repository, three)
        assert {held[0].lease_token} == {repository.get_receipt_by_id(one).lease_token for one in three}

    def test_renewed(self, engine, three):
        """A slow OFD does not cost the lease: past its half it is renewed before the next send."""
        repository = ReceiptRepository(engine)  # by the real clock, of which a send of a real OFD takes its time
        repository.set_config("lease_seconds", 2)
        expires = []

        def slow(receipt):
            expires.append((receipt.lease_expires_at, repository.get_receipt_by_id(receipt.id).lease_expires_at))
            time.sleep(0.6)
            return NOON

        report = deliver_pending(repository, slow)
        assert dict.fromkeys(three, Outcome.SYNCED) == report.outcomes
        claimed, present = expires[2]
        assert present > claimed


def test_commits(file_repository, file_engine):
    """A run costs one commit to claim, one for each receipt, and one for each of its two events."""
    file_repository.insert_receipts(new_receipt() for _ in range(10))
    with commits(file_engine) as seen:
        deliver_pending(file_repository, lambda receipt: NOON)
    assert len(seen) == 13


def test_two_workers(file_engine, file_repository, clock):
    """Workers that deliver at the same time send each receipt once."""
    made = file_repository.insert_receipts(new_receipt() for _ in range(60))
    received = []

    def work(_number):
        own = ReceiptRepository(file_engine, now=clock)
        while deliver_pending(own, lambda receipt: received.append(receipt.id) or NOON, 7).outcomes:
            pass

    together(4, work)
    assert sorted(made) == sorted(received)
