"""Claims, leases and backoff: what a worker may hold, and for how long."""

import threading

import pytest
from builders import NOON, a_receipt, an_id, new_receipt, story, together

from kkt_buffer import LeaseLostError, ReceiptNotFoundError, ReceiptRepository

LEASE = 60


@pytest.fixture
def repository(engine, clock):
    """Without jitter: what is taken off the backoff is nothing."""
    return ReceiptRepository(engine, now=clock, jitter=lambda: 0.0)


def ids(receipts):
    return [receipt.id for receipt in receipts]


class TestClaimPending:
    def test_lease(self, repository):
        """A claimed receipt is syncing, under one fresh token, for `lease_seconds`."""
        made = [a_receipt(repository).id for _ in range(3)]
        claimed = repository.claim_pending(2)
        assert made[:2] == ids(claimed)
        assert len({receipt.lease_token for receipt in claimed}) == 1
        for receipt in claimed:
            assert ("syncing", NOON, NOON + LEASE) == (
                receipt.status,
                receipt.lease_taken_at,
                receipt.lease_expires_at,
            )
        [last] = repository.claim_pending(5)
        assert made[2] == last.id
        assert last.lease_token != claimed[0].lease_token
        assert repository.claim_pending(5) == []

    def test_order(self, repository, clock):
        """HLC order, also of what comes back from a dead worker in between."""
        made = []
        for _ in range(4):
            made.append(a_receipt(repository).id)
            clock.seconds += 1
        repository.claim_pending(2)
        clock.seconds += LEASE
        assert made == ids(repository.claim_pending(10))

    def test_of_one_till(self, repository):
        own = [a_receipt(repository, pos_id="till-2").id for _ in range(2)]
        a_receipt(repository)
        assert own == ids(repository.claim_pending(10, pos_id="till-2"))

    @pytest.mark.parametrize("pos_id", [None, "till-1"])
    def test_retries_last(self, repository, clock, pos_id):
        """First those that were never tried, in HLC order, then those that have been due for the longest time."""
        made = [a_receipt(repository).id for _ in range(5)]
        claimed = repository.claim_pending(3)
        for receipt, wait in zip(claimed, (20, 0, 10), strict=True):
            repository.release(receipt.id, receipt.lease_token, wait_seconds=wait)
        clock.seconds += 20
        expected = [made[number] for number in (3, 4, 1, 2, 0)]
        assert expected[:3] == ids(repository.claim_pending(3, pos_id=pos_id, retries_last=True))
        assert expected[3:] == ids(repository.claim_pending(3, pos_id=pos_id, retries_last=True))

    def test_own_duration(self, repository, clock):
        receipt = a_receipt(repository)
        assert repository.claim_pending(1, lease_seconds=5)[0].lease_expires_at == NOON + 5
        clock.seconds += 5
        assert [receipt.id] == ids(repository.claim_pending(1))

    def test_dead_worker(self, repository, clock):
        """A worker that died leaves nothing stuck: its lease runs out, without any sweeper."""
        receipt = a_receipt(repository)
        [first] = repository.claim_pending(1)
        clock.seconds += LEASE - 1
        assert repository.claim_pending(1) == []
        clock.seconds += 1
        [second] = repository.claim_pending(1)
        assert receipt.id == second.id
        assert first.lease_token != second.lease_token
        assert second.retry_count == 0

    def test_after_waiting(self, engine, repository, clock):
        """A worker that waited while the clock went on does not take a fresh lease for one out of the future."""
        inside, asked = threading.Event(), threading.Event()

        def now():
            moment = clock()
            asked.set()
            return moment

        def first():
            with repository.transaction():
                a_receipt(repository)
                inside.set()
                asked.wait(0.2)  # the other one reads the clock now, or only once it has the lock
                clock.seconds += 1
                return repository.claim_pending()

        def late():
            inside.wait(10)
            return ReceiptRepository(engine, now=now).claim_pending()

        [mine], claimed = together(2, lambda number: late() if number else first())
        assert claimed == []
        repository.release(mine.id, mine.lease_token)

    @pytest.mark.parametrize("back", [1, 60, LEASE, 3600, 10**6])
    @pytest.mark.parametrize("worked", [0, 1, 299])
    def test_clock_set_back(self, repository, clock, back, worked):
        """After one setback nothing is stuck for longer than twice the lease."""
        receipt = a_receipt(repository)
        repository.claim_pending(1)
        clock.seconds += worked
        clock.seconds -= back
        clock.seconds += 2 * LEASE
        assert [receipt.id] == ids(repository.claim_pending(1))

    def test_clock_jumps_ahead(self, repository, clock):
        """A jump ahead ends leases early, which is safe: a late worker's delivery still counts."""
        receipt = a_receipt(repository)
        [first] = repository.claim_pending(1)
        clock.seconds += 10**6
        repository.claim_pending(1)
        assert repository.mark_synced(first.id, NOON)
        assert repository.get_receipt_by_id(receipt.id).lease_token is None

    def test_backoff_after_setback(self, repository, clock):
        """A next attempt that lies further ahead than any backoff is due: the clock was ahead when it was set."""
        receipt = a_receipt(repository)
        [claimed] = repository.claim_pending(1)
        repository.record_failure(claimed.id, "timeout", claimed.lease_token)
        clock.seconds -= 3600
        assert [receipt.id] == ids(repository.claim_pending(1))

    @pytest.mark.parametrize(
        ("arguments", "options"),
        [
            ((0,), {}),
            ((True,), {}),
            (("5",), {}),
            ((1,), {"lease_seconds": 0}),
            ((1,), {"lease_seconds": 2**62}),
            ((1,), {"pos_id": ""}),
        ],
    )
    def test_bad(self, repository, arguments, options):
        a_receipt(repository)
        with pytest.raises((ValueError, TypeError), match="(limit|lease_seconds|pos_id): expected"):
            repository.claim_pending(*arguments, **options)
        assert repository.get_buffer_status().pending == 1

    def test_no_fact(self, repository, clock):
        """Leases leave no event."""
        receipt = a_receipt(repository)
        [claimed] = repository.claim_pending(1)
        repository.renew_lease(claimed.id, claimed.lease_token)
        repository.release(claimed.id, claimed.lease_token)
        repository.claim_pending(1)
        clock.seconds += LEASE
        repository.recover_expired_leases()
        assert ["receipt_added"] == story(repository, receipt.id)

    def test_threads(self, shared_repository):
        """Sixteen threads never hold the same receipt."""
        made = shared_repository.insert_receipts(new_receipt() for _ in range(100))
        held = []

        def work(_number):
            while batch := shared_repository.claim_pending(3):
                held.extend(ids(batch))

        together(16, work)
        assert sorted(made) == sorted(held)


class TestStaleToken:
    @pytest.fixture
    def lost(self, repository, clock):
        """A worker whose lease ran out, and whose receipt another one has."""
        a_receipt(repository)
        [late] = repository.claim_pending(1)
        clock.seconds += LEASE
        [present] = repository.claim_pending(1)
        return late, present

    @pytest.mark.parametrize("operation", ["renew_lease", "release", "record_failure"])
    def test_changes_nothing(self, repository, lost, operation):
        """A late worker is told that its lease is over, and changes nothing."""
        late, present = lost
        arguments = ("timeout", late.lease_token) if operation == "record_failure" else (late.lease_token,)
        with pytest.raises(LeaseLostError, match=f"the lease on receipt {late.id} is over, the receipt is syncing now"):
            getattr(repository, operation)(late.id, *arguments)
        found = repository.get_receipt_by_id(late.id)
        assert (present.lease_token, present.lease_expires_at, 0) == (
            found.lease_token,
            found.lease_expires_at,
            found.retry_count,
        )

    @pytest.mark.parametrize("operation", ["renew_lease", "release", "record_failure"])
    def test_unknown_receipt(self, repository, operation):
        arguments = ("timeout", "token") if operation == "record_failure" else ("token",)
        with pytest.raises(ReceiptNotFoundError):
            getattr(repository, operation)(an_id(), *arguments)

    def test_delivery_counts(self, repository, lost):
        """But its delivery is a fact, and the present worker learns that the receipt is not its own any more."""
        late, present = lost
        assert repository.mark_synced(late.id, NOON)
        with pytest.raises(LeaseLostError, match="the receipt is synced now"):
            repository.release(present.id, present.lease_token)


class TestRenewLease:
    def test_longer(self, repository, clock):
        """Renewed, a lease lasts from now on."""
        a_receipt(repository)
        [claimed] = repository.claim_pending(1)
        clock.seconds += 200
        assert NOON + 200 + LEASE == repository.renew_lease(claimed.id, claimed.lease_token)
        assert NOON + 200 + 7 == repository.renew_lease(claimed.id, claimed.lease_token, lease_seconds=7)
        clock.seconds += 6
        assert repository.recover_expired_leases() == 0
        clock.seconds += 1
        assert repository.recover_expired_leases() == 1

    def test_whole_claim(self, repository, clock):
        """All leases of one claim, with one call; what has an outcome, or another token, is not among them."""
        made = [a_receipt(repository).id for _ in range(4)]
        first, second, _ = repository.claim_pending(3)
        [other] = repository.claim_pending(3)
        repository.mark_synced(second.id, NOON)
        clock.seconds += 50
        assert [made[0], made[2]] == sorted(repository.renew_leases(first.lease_token), key=made.index)
        expected = [NOON + 50 + LEASE, None, NOON + 50 + LEASE, NOON + LEASE]
        assert expected == [repository.get_receipt_by_id(receipt_id).lease_expires_at for receipt_id in made]
        repository.renew_leases(other.lease_token, lease_seconds=7)
        assert repository.get_receipt_by_id(other.id).lease_expires_at == NOON + 57

    def test_lost_claim(self, repository, clock):
        """A late worker has nothing to renew."""
        a_receipt(repository)
        [late] = repository.claim_pending(1)
        clock.seconds += LEASE
        [present] = repository.claim_pending(1)
        assert repository.renew_leases(late.lease_token) == []
        assert repository.get_receipt_by_id(present.id).lease_expires_at == present.lease_expires_at


class TestRelease:
    @pytest.mark.parametrize(("wait", "waits"), [(0, 0), (100, 100), (10**9, 300)])
    def test_wait(self, repository, clock, wait, waits):
        """Released after a try in vain, it waits as long as it is told, at most `retry_backoff_max`; uncounted."""
        receipt = a_receipt(repository)
        [claimed] = repository.claim_pending(1)
        repository.release(claimed.id, claimed.lease_token, wait_seconds=wait)
        found = repository.get_receipt_by_id(receipt.id)
        assert (NOON + waits, 0) == (found.next_attempt_at, found.retry_count)
        clock.seconds += max(waits - 1, 0)
        assert bool(waits) == (repository.claim_pending(1) == [])

    @pytest.mark.parametrize("wait", [-1, 0.5, "5", True])
    def test_bad_wait(self, repository, wait):
        a_receipt(repository)
        [claimed] = repository.claim_pending(1)
        with pytest.raises((ValueError, TypeError), match="wait_seconds: expected a whole number"):
            repository.release(claimed.id, claimed.lease_token, wait_seconds=wait)

    def test_unharmed(self, repository):
        """Released, a receipt is due at once, and no attempt is counted."""
        receipt = a_receipt(repository)
        [claimed] = repository.claim_pending(1)
        repository.release(claimed.id, claimed.lease_token)
        [again] = repository.claim_pending(1)
        assert (receipt.id, 0) == (again.id, again.retry_count)

    def test_twice(self, repository):
        a_receipt(repository)
        [claimed] = repository.claim_pending(1)
        repository.release(claimed.id, claimed.lease_token)
        with pytest.raises(LeaseLostError, match="the receipt is pending now"):
            repository.release(claimed.id, claimed.lease_token)


class TestRecordFailure:
    def fail(self, repository, clock):
        [claimed] = repository.claim_pending(1)
        return repository.record_failure(claimed.id, "timeout", claimed.lease_token)

    def test_backoff(self, repository, clock):
        """The wait doubles from `retry_backoff_initial` to `retry_backoff_max`, and the attempt is on record."""
        receipt = a_receipt(repository)
        waits = []
        for _ in range(9):
            assert self.fail(repository, clock) == "pending"
            due = repository.get_receipt_by_id(receipt.id).next_attempt_at
            waits.append(due - clock.seconds)
            clock.seconds = due - 1
            assert repository.claim_pending(1) == []
            clock.seconds = due
        assert [5, 10, 20, 40, 80, 160, 300, 300, 300] == waits
        assert ["receipt_added", *["receipt_attempt_failed"] * 9] == story(repository, receipt.id)
        found = repository.get_receipt_by_id(receipt.id)
        assert (9, "timeout") == (found.retry_count, found.last_error)

    def test_jitter(self, engine, clock):
        """Up to a half is taken off the wait, so that tills do not come back in step."""
        repository = ReceiptRepository(engine, now=clock, jitter=lambda: 1.0)
        repository.set_config("retry_backoff_initial", 100)
        receipt = a_receipt(repository)
        self.fail(repository, clock)
        assert repository.get_receipt_by_id(receipt.id).next_attempt_at == NOON + 50

    def test_many_attempts(self, repository, clock):
        """However many attempts are allowed, the wait stays within its bounds."""
        repository.set_config("max_retry_attempts", 1000)
        repository.set_config("retry_backoff_initial", 10**9)
        receipt = a_receipt(repository)
        for _ in range(100):
            self.fail(repository, clock)
            assert clock.seconds + 300 == repository.get_receipt_by_id(receipt.id).next_attempt_at
            clock.seconds += 300

    def test_exhausted(self, repository, clock):
        """At `max_retry_attempts` the receipt is dead-lettered, with the attempt that was the last."""
        repository.set_config("max_retry_attempts", 2)
        receipt = a_receipt(repository)
        assert self.fail(repository, clock) == "pending"
        clock.seconds += 300
        assert self.fail(repository, clock) == "failed"
        [letter] = repository.list_dead_letters()
        assert (receipt.id, 2, "gave up after 2 attempts: timeout") == (
            letter.original_receipt_id,
            letter.retry_attempts,
            letter.reason,
        )
        assert ["receipt_added", *["receipt_attempt_failed"] * 2, "receipt_failed"] == story(repository, receipt.id)

    def test_poison(self, repository, clock):
        """A receipt that always fails does not stand in the way of the others."""
        poison = a_receipt(repository)
        self.fail(repository, clock)
        other = a_receipt(repository)
        assert [other.id] == ids(repository.claim_pending(10))
        assert repository.get_receipt_by_id(poison.id).status == "pending"


class TestRecoverExpiredLeases:
    def test_count(self, repository, clock):
        for _ in range(3):
            a_receipt(repository)
        repository.claim_pending(2)
        assert repository.recover_expired_leases() == 0
        clock.seconds += LEASE
        assert repository.recover_expired_leases() == 2
        assert repository.get_buffer_status().pending == 3
