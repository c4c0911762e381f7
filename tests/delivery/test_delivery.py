"""`deliver_pending`: what becomes of each receipt, and of the others."""

import logging

import pytest
from builders import NOON, a_foreign_receipt, a_receipt, checkouts, commits, drop_trigger, new_receipt, together
from delivery.ofd import Ofd
from sqlalchemy import text

from kkt_buffer import (
    BufferBusyError,
    DeliveryRejected,
    DeliveryUnavailable,
    InvalidConfigError,
    Outcome,
    ReceiptBufferError,
    ReceiptRepository,
    deliver_pending,
)

LEASE = 60


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

    def test_no_transaction(self, shared_repository):
        """No transaction is open while a receipt is sent, so others can write."""
        a_receipt(shared_repository)

        def send(receipt):
            assert [] == in_use
            shared_repository.insert_receipt(new_receipt())
            return NOON

        with checkouts() as in_use:
            assert deliver_pending(shared_repository, send).count(Outcome.SYNCED) == 1

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


class TestDamaged:
    @pytest.fixture
    def damaged(self, repository, engine, three):
        """The document of the second receipt has changed in the file, past every guard."""
        with engine.begin() as connection:
            drop_trigger(connection, "trg_guard_acknowledged")
            connection.execute(
                text("UPDATE receipts SET fiscal_doc = replace(fiscal_doc, '6490', '6491') WHERE id = :id"),
                {"id": three[1]},
            )
        return three[1]

    def test_not_sent(self, repository, three, damaged, caplog):
        """A document that differs from its digest is not sent, but told and dead-lettered; the others go on."""
        ofd = Ofd()
        report = deliver_pending(repository, ofd)
        assert [three[0], three[2]] == ofd.received
        assert Outcome.DEAD_LETTERED == report.outcomes[damaged]
        [letter] = repository.list_dead_letters()
        assert letter.reason == "damaged: the stored document differs from its digest. It was not sent"
        [record] = [record for record in caplog.records if record.levelno >= logging.ERROR]
        assert (damaged, letter.reason) == (record.receipt_id, record.error)

    def test_no_answer(self, repository, damaged):
        """It says nothing about the OFD: an outage lasts."""
        deliver_pending(repository, Ofd(DeliveryUnavailable("offline")))
        report = deliver_pending(repository, Ofd())
        assert ({damaged: Outcome.DEAD_LETTERED}, "DeliveryUnavailable: offline") == (report.outcomes, report.outage)

    def test_no_digest(self, repository, engine):
        """A row of a program that knows no digest is sent."""
        a_foreign_receipt(engine, "foreign")
        assert deliver_pending(repository, Ofd()).count(Outcome.SYNCED) == 1


class TestStopped:
    @pytest.mark.parametrize("sent", [0, 1, 3])
    def test_should_stop(self, repository, three, sent):
        """It is asked before each receipt; the rest is handed back, due at once."""
        ofd = Ofd()
        report = deliver_pending(repository, ofd, should_stop=lambda: len(ofd.received) == sent)
        assert three[:sent] == ofd.received
        expected = [Outcome.SYNCED] * sent + [Outcome.RELEASED] * (3 - sent)
        assert (expected, None) == (list(report.outcomes.values()), report.outage)
        assert three[sent:] == [receipt.id for receipt in repository.claim_pending(5)]

    def test_failures_before_it(self, repository, three):
        """What failed before it counts its attempt."""
        ofd = Ofd(ValueError("no"))
        report = deliver_pending(repository, ofd, should_stop=lambda: len(ofd.received) == 2)
        assert [Outcome.RETRY, Outcome.RETRY, Outcome.RELEASED] == list(report.outcomes.values())

    def test_no_function(self, repository, three):
        with pytest.raises(TypeError, match="should_stop: expected a function"):
            deliver_pending(repository, Ofd(), should_stop=True)
        assert ["pending"] * 3 == statuses(repository, three)

    @pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit()])
    def test_interrupted(self, repository, three, error):
        """Ctrl-C releases what is not sent, and goes on its way; what failed before it counts its attempt."""
        with pytest.raises(type(error)):
            deliver_pending(repository, Ofd(first=ValueError("no"), second=error))
        assert ["pending"] * 3 == statuses(repository, three)
        assert [1, 0, 0] == [repository.get_receipt_by_id(receipt_id).retry_count for receipt_id in three]

    def test_buffer_fails(self, repository, engine, three):
        """An error of the buffer itself goes to the caller, and no receipt stays leased."""

        def send(receipt):
            with engine.begin() as connection:
                connection.execute(text("UPDATE config SET value = 'many' WHERE key = 'circuit_breaker_threshold'"))
            raise ValueError("no")

        with pytest.raises(InvalidConfigError):
            deliver_pending(repository, send)
        assert ["pending"] * 3 == statuses(repository, three)


class TestLease:
    def test_renewed(self, repository, clock, engine):
        """Past half of the lease, what is left of the batch is renewed before the next send, with one commit."""
        made = repository.insert_receipts(new_receipt() for _ in range(9))
        expires = []

        def slow(receipt):
            expires.append([repository.get_receipt_by_id(one).lease_expires_at for one in made[len(expires) :]])
            clock.seconds += 11
            return NOON

        with commits(engine) as seen:
            assert deliver_pending(repository, slow).count(Outcome.SYNCED) == 9
        claimed, first, second = NOON + LEASE, NOON + 33 + LEASE, NOON + 66 + LEASE
        assert [claimed] * 3 + [first] * 3 + [second] * 3 == [times[0] for times in expires]
        assert all(len(set(times)) == 1 for times in expires)
        assert len(seen) == 1 + 9 + 2 + 2  # the claim, the deliveries, two renewals, two events

    def test_failures_renewed(self, repository, clock, three):
        """So is what has failed and is not recorded yet."""

        def slow(receipt):
            clock.seconds += LEASE - 1
            assert repository.recover_expired_leases() == 0
            raise ValueError("no")

        assert deliver_pending(repository, slow).count(Outcome.RETRY) == 3

    @pytest.mark.parametrize("jump", [LEASE, -7200])
    def test_taken(self, repository, clock, three, jump):
        """What another worker took over meanwhile, after a clock that was set back too, is not sent a second time."""

        def slow(receipt):
            clock.seconds += jump
            taken.extend(repository.claim_pending(5))
            return NOON

        taken = []
        report = deliver_pending(repository, slow)
        assert [Outcome.SYNCED, Outcome.LEASE_LOST, Outcome.LEASE_LOST] == list(report.outcomes.values())
        assert three == [receipt.id for receipt in taken]

    def test_gone(self, repository, three):
        """A receipt that another worker delivered, and that was pruned, is not ours any more."""
        repository.set_config("retention_synced_days", 0)

        def slow(receipt):
            repository.mark_synced(receipt.id, NOON)
            repository.prune()
            return NOON

        report = deliver_pending(repository, slow, 1)
        assert {three[0]: Outcome.LEASE_LOST} == report.outcomes

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


class TestLog:
    def test_outcomes(self, repository, three, caplog):
        """Every outcome is one record, with fields for a log that is read by machines."""
        with caplog.at_level(logging.INFO, logger="kkt_buffer"):
            deliver_pending(repository, Ofd(first=ValueError("no"), second=DeliveryRejected("unknown tax rate")))
        records = {record.receipt_id: record for record in caplog.records}
        assert len(caplog.records) == len(records) == 3
        assert {"kkt_buffer.delivery"} == {record.name for record in caplog.records}
        expected = [
            ("WARNING", "first", "retry", "ValueError: no"),
            ("ERROR", "second", "dead_lettered", "rejected by the OFD: DeliveryRejected: unknown tax rate"),
            ("INFO", "third", "synced", None),
        ]
        found = [records[receipt_id] for receipt_id in three]
        assert expected == [(one.levelname, one.pos_id, one.outcome, one.error) for one in found]
        assert f"receipt {three[0]}: retry (ValueError: no)" == found[0].getMessage()

    def test_released(self, repository, three, caplog):
        """What is released is told with the outage."""
        with caplog.at_level(logging.INFO, logger="kkt_buffer"):
            deliver_pending(repository, Ofd(DeliveryUnavailable("offline")))
        told = [(record.levelname, record.receipt_id, record.outcome, record.error) for record in caplog.records]
        assert [("INFO", one, "released", "DeliveryUnavailable: offline") for one in three] == told


def test_commits(shared_repository, shared_engine):
    """A run costs one commit to claim, one for each receipt, and one for each of its two events."""
    shared_repository.insert_receipts(new_receipt() for _ in range(10))
    with commits(shared_engine) as seen:
        deliver_pending(shared_repository, lambda receipt: NOON)
    assert len(seen) == 13


def test_two_workers(shared_engine, shared_repository, clock):
    """Workers that deliver at the same time send each receipt once."""
    made = shared_repository.insert_receipts(new_receipt() for _ in range(60))
    received = []

    def work(_number):
        own = ReceiptRepository(shared_engine, now=clock)
        while deliver_pending(own, lambda receipt: received.append(receipt.id) or NOON, 7).outcomes:
            pass

    together(4, work)
    assert sorted(made) == sorted(received)


def test_start_not_logged(repository):
    """If the start cannot be logged, what was claimed is handed back."""
    a_receipt(repository)

    def log_event(*_, **__):
        raise BufferBusyError("busy")

    repository.log_event = log_event
    with pytest.raises(BufferBusyError):
        deliver_pending(repository, Ofd())
    assert (1, 0) == (repository.get_buffer_status().pending, repository.get_buffer_status().syncing)
