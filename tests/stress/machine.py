"""A buffer and its model in plain Python, driven side by side through any history; restarts and clock jumps too."""

import contextlib

from builders import NOON, an_id, new_receipt
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from sqlalchemy import text
from stress.model import Model, StreakModel, work

from kkt_buffer import (
    BufferFullError,
    DeliveryRejected,
    DeliveryUnavailable,
    DuplicateReceiptError,
    InvalidTransitionError,
    LeaseLostError,
    ReceiptNotFoundError,
    ReceiptRepository,
    create_buffer_engine,
    deliver_pending,
    upgrade,
)

CAPACITY = 3
ATTEMPTS = 2
THRESHOLD = 2
LEASE = 60
DAY = 86_400

ANSWERS = ["yes", "no", "no", "no", "never", "offline"]
PICKS = 20
picks = st.integers(0, PICKS)

ANNA = {"actor": "Anna", "reason": "because"}


class BufferMachine(RuleBasedStateMachine):
    """Drives one buffer, which `new_buffer` makes, and its model."""

    steps = 0

    def __init__(self, new_buffer):
        super().__init__()
        self.new_buffer = new_buffer

    @initialize()
    def start(self):
        self.exit = contextlib.ExitStack()
        self.buffer = self.exit.enter_context(self.new_buffer())
        self.now = NOON
        self.model = {}
        self.made = 0
        self.has_pruned = False
        self.leases = []
        self.open()
        self.repository.set_config("buffer_capacity", CAPACITY)
        self.repository.set_config("max_retry_attempts", ATTEMPTS)
        self.repository.set_config("circuit_breaker_threshold", THRESHOLD)
        self.insert(CAPACITY)

    def open(self):
        self.engine = create_buffer_engine(self.buffer)
        upgrade(self.engine)
        self.repository = ReceiptRepository(self.engine, now=lambda: self.now, jitter=lambda: 0.0)
        self.streak = StreakModel(THRESHOLD)

    def teardown(self):
        if hasattr(self, "engine"):
            self.engine.dispose()
            self.exit.close()

    def receipt(self, pick, *statuses):
        """One of the receipts, of these statuses if there are such; or none that exists."""
        keys = [key for key, one in self.model.items() if one.status in statuses] or list(self.model)
        return keys[pick % len(keys)] if keys and pick < PICKS else an_id()  # all may be pruned

    # What the model knows.

    @property
    def undelivered(self):
        return sum(one.status in {"pending", "syncing"} for one in self.model.values())

    def in_order(self, *statuses):
        found = [(key, one) for key, one in self.model.items() if one.status in statuses]
        return sorted(found, key=lambda item: item[1].number)

    def recover(self):
        for one in self.model.values():
            if one.status == "syncing" and (one.expires <= self.now or one.taken > self.now + 60):
                one.free("pending")

    def is_due(self, one):
        return one.due <= self.now or one.due > self.now + 300

    def due(self, limit, *, retries_last=False):
        due = [(key, one) for key, one in self.in_order("pending") if self.is_due(one)]
        return sorted(due, key=lambda item: item[1].due if retries_last else 0)[:limit]

    def count_attempt(self, one):
        one.attempts += 1
        one.free("pending")
        one.tell("receipt_attempt_failed")
        if one.attempts >= ATTEMPTS:
            one.fail()
        else:
            one.due = self.now + min(300, 5 << (one.attempts - 1))

    # Steps.

    @rule(batch=st.integers(1, 2))
    def insert(self, batch):
        new = [new_receipt(id=an_id()) for _ in range(batch)]
        if self.undelivered + batch > CAPACITY:
            with contextlib.suppress(BufferFullError):
                self.repository.insert_receipts(new)
                raise AssertionError("more than the capacity")
            return
        ids = self.repository.insert_receipts(new)
        for receipt_id in ids:
            self.model[receipt_id] = Model(self.made, self.now)
            self.made += 1

    @rule(pick=picks)
    def insert_again(self, pick):
        receipt_id = self.receipt(pick)
        again = new_receipt(id=receipt_id, pos_id="another till")
        if receipt_id in self.model:
            with contextlib.suppress(DuplicateReceiptError):
                self.repository.insert_receipt(again, exist_ok=True)
                raise AssertionError("a known id")

    @rule(limit=st.integers(1, 3))
    def claim(self, limit):
        self.claim_now(limit)

    def claim_now(self, limit):
        self.recover()
        expected = self.due(limit)
        claimed = self.repository.claim_pending(limit)
        assert [key for key, _ in expected] == [receipt.id for receipt in claimed]
        for (_, one), receipt in zip(expected, claimed, strict=True):
            one.status, one.token = "syncing", receipt.lease_token
            one.taken, one.expires = self.now, self.now + LEASE
        self.leases += [(receipt.id, receipt.lease_token) for receipt in claimed]

    def lease(self, operation, receipt_id, token, *arguments):
        """Whether the operation was accepted, which it must be exactly if the token is the present one."""
        one = self.model.get(receipt_id)
        try:
            operation(receipt_id, *arguments)
        except LeaseLostError:
            assert one is not None
            assert (one.status, one.token) != ("syncing", token)
            return None
        except ReceiptNotFoundError:
            assert one is None
            return None
        assert (one.status, one.token) == ("syncing", token)
        return one

    @precondition(lambda self: self.leases)
    @rule(pick=picks, verb=st.sampled_from(["renew", "release", "fail", "fail", "acknowledge"]))
    def use_lease(self, pick, verb):
        """By present and by late workers."""
        receipt_id, token = self.leases[-1 - pick % len(self.leases)]
        if verb == "renew":
            if one := self.lease(self.repository.renew_lease, receipt_id, token, token):
                one.taken, one.expires = self.now, self.now + LEASE
        elif verb == "release":
            if one := self.lease(self.repository.release, receipt_id, token, token):
                one.free("pending")
        elif verb == "fail":
            if one := self.lease(self.repository.record_failure, receipt_id, token, "timeout", token):
                self.count_attempt(one)
        else:
            known = receipt_id in self.model
            assert known == self.repository.mark_synced(receipt_id, self.now)
            if known:
                self.model[receipt_id].sync(self.now)

    @rule(limit=st.integers(1, 3))
    def claim_after_all_have_died(self, limit):
        """Leases that ran out, and backoffs that are over: what a late worker meets."""
        self.now += LEASE + 1
        self.claim_now(limit)

    @rule(pick=picks, server_time=st.integers(0, 2**40))
    def acknowledge(self, pick, server_time):
        """Whoever says so, and whatever the status."""
        receipt_id = self.receipt(pick)
        known = receipt_id in self.model
        assert known == self.repository.mark_synced(receipt_id, server_time)
        if known:
            self.model[receipt_id].sync(server_time)

    @rule(pick=picks)
    def dead_letter(self, pick):
        receipt_id = self.receipt(pick, "pending", "syncing")
        one = self.model.get(receipt_id)
        if one is not None and one.status == "synced":
            with contextlib.suppress(InvalidTransitionError):
                self.repository.move_to_dlq(receipt_id, "given up")
                raise AssertionError("a synced receipt")
            return
        assert (one is not None) == self.repository.move_to_dlq(receipt_id, "given up")
        if one is not None and one.status != "failed":
            one.fail()

    @rule(pick=picks)
    def requeue(self, pick):
        receipt_id = self.receipt(pick, "failed")
        one = self.model.get(receipt_id)
        try:
            self.repository.requeue(receipt_id, **ANNA)
        except ReceiptNotFoundError:
            assert one is None
        except InvalidTransitionError:
            assert not one.open_letter
        except BufferFullError:
            assert one.open_letter
            assert self.undelivered >= CAPACITY
        else:
            assert one.open_letter
            self.requeued(one)

    def requeued(self, one):
        one.free("pending")
        one.attempts, one.due, one.open_letter = 0, 0, False
        one.tell("receipt_requeued")

    @rule()
    def requeue_all(self):
        letters = [one for _, one in self.in_order("failed") if one.open_letter]
        room = CAPACITY - self.undelivered
        try:
            assert min(room, len(letters)) == self.repository.requeue_all(**ANNA)
        except BufferFullError:
            assert letters
            assert room <= 0
        else:
            for one in letters[: max(room, 0)]:
                self.requeued(one)

    @rule(pick=picks)
    def resolve(self, pick):
        receipt_id = self.receipt(pick, "failed")
        one = self.model.get(receipt_id)
        try:
            self.repository.resolve(receipt_id, **ANNA)
        except ReceiptNotFoundError:
            assert one is None
        except InvalidTransitionError:
            assert not one.open_letter
        else:
            assert one.open_letter
            one.open_letter, one.resolved = False, True
            one.tell("receipt_resolved")

    @rule(
        answers=st.lists(st.sampled_from(ANSWERS), min_size=8, max_size=8),
        limit=st.integers(1, 4),
        by_worker=st.booleans(),
    )
    def deliver(self, answers, limit, by_worker):
        left = iter(answers)

        def send(receipt):
            answer = next(left)
            if answer == "yes":
                return self.now
            raise {"no": ValueError, "never": DeliveryRejected, "offline": DeliveryUnavailable}[answer]

        report = (work if by_worker else deliver_pending)(self.repository, send, limit)
        self.recover()
        expected, rest = {}, iter(answers)
        if self.streak.outage:
            expected |= self.streak.deliver(self.due(1, retries_last=True), rest, self.now, self.count_attempt)
        if not self.streak.outage:
            batch = self.due(limit - len(expected), retries_last=self.streak.doubt)
            expected |= self.streak.deliver(batch, rest, self.now, self.count_attempt)
        assert expected == report.outcomes
        assert self.streak.outage == (self.repository.streak.outage is not None)
        if by_worker and expected and not self.streak.doubt:
            assert self.repository.get_buffer_status().circuit_opened_at is None

    @rule(seconds=st.sampled_from([1, 6, 61, LEASE, 3600, 8 * DAY, 91 * DAY, -1, -60, -3600, -8 * DAY]))
    def clock_jumps(self, seconds):
        self.now = max(0, self.now + seconds)

    @rule(verb=st.sampled_from(["restart", "expire", "prune"]))
    def keep_house(self, verb):
        if verb == "restart":
            self.engine.dispose()
            self.open()
        elif verb == "expire":
            self.repository.recover_expired_leases()
            self.recover()
        else:
            self.prune()

    def prune(self):
        before = set(self.model)
        self.repository.prune()
        self.has_pruned = True
        with self.engine.connect() as connection:
            left = set(connection.scalars(text("SELECT id FROM receipts")))
        gone = before - left
        for receipt_id in gone:
            one = self.model.pop(receipt_id)
            assert one.status == "synced" or (one.status == "failed" and one.resolved)

    # What must hold after each of them.

    @invariant()
    def as_the_model_says(self):
        if not hasattr(self, "engine"):
            return
        type(self).steps += 1
        with self.engine.connect() as connection:
            rows = connection.execute(text("SELECT * FROM receipts")).all()
        assert set(self.model) == {row.id for row in rows}
        rows.sort(key=lambda row: self.model[row.id].number)
        for row in rows:
            one = self.model[row.id]
            assert (one.status, one.attempts, one.due, one.token, one.server_time, one.created) == (
                row.status,
                row.retry_count,
                row.next_attempt_at or 0,
                row.lease_token,
                row.hlc_server_time,
                row.created_at,
            )
        stamps = [(row.hlc_local_time, row.hlc_logical_counter) for row in rows]
        assert sorted(set(stamps)) == stamps
        status = self.repository.get_buffer_status()
        assert status.pending + status.syncing == self.undelivered <= CAPACITY
        assert sum(one.open_letter for one in self.model.values()) == status.dlq_size
        in_order = [self.model[row.id] for row in rows]
        owed = [one.created for one in in_order if one.status in {"pending", "syncing"} or one.open_letter]
        assert (owed or [None])[0] == status.oldest_undelivered_at

    @invariant()
    def invariants(self):
        """Those of the design, read from the rows themselves."""
        if not hasattr(self, "engine"):
            return
        broken = """
            SELECT 'synced' FROM receipts
                WHERE (status = 'synced') <> (synced_at IS NOT NULL AND hlc_server_time IS NOT NULL)
            UNION ALL SELECT 'open letter' FROM dlq JOIN receipts ON receipts.id = original_receipt_id
                WHERE resolved_at IS NULL AND status <> 'failed'
            UNION ALL SELECT 'failed' FROM receipts WHERE status = 'failed' AND NOT EXISTS (
                SELECT 1 FROM dlq WHERE original_receipt_id = receipts.id
                AND (resolved_at IS NULL OR resolution = 'resolved'))
            UNION ALL SELECT 'lease' FROM receipts WHERE (status = 'syncing') <> (lease_token IS NOT NULL)
            UNION ALL SELECT 'counts' FROM v_buffer_status
                WHERE pending <> (SELECT COUNT(*) FROM receipts WHERE status = 'pending')
                OR syncing <> (SELECT COUNT(*) FROM receipts WHERE status = 'syncing')
                OR synced <> (SELECT COUNT(*) FROM receipts WHERE status = 'synced')
                OR failed <> (SELECT COUNT(*) FROM receipts WHERE status = 'failed')
                OR dlq_size <> (SELECT COUNT(*) FROM dlq WHERE resolved_at IS NULL)
        """
        with self.engine.connect() as connection:
            assert [] == list(connection.scalars(text(broken)))

    @invariant()
    def stories(self):
        """Each fact has left one event, in order; pruning goes by times, which a clock set back has mixed."""
        if not hasattr(self, "engine"):
            return
        for receipt_id, one in self.model.items():
            told = [event.event_type for event in reversed(self.repository.get_events(receipt_id=receipt_id))]
            rest = iter(one.events)
            assert all(event in rest for event in told)
            assert self.has_pruned or list(one.events) == told
