"""A receipt and a streak in plain Python: what the database should say of a receipt, and what delivery should do."""

from dataclasses import dataclass, field

from kkt_buffer import DeliveryReport, DeliveryWorker, Outcome


def work(repository, send, limit):
    """What `deliver_pending` does, by a worker, also if the circuit is open."""
    worker = DeliveryWorker(repository, send, batch=limit)
    worker.wake()
    worker.tick()
    return worker.status.report or DeliveryReport({})


@dataclass
class Model:
    """What one receipt should be."""

    number: int
    created: int
    status: str = "pending"
    attempts: int = 0
    token: str | None = None
    taken: int = 0
    expires: int = 0
    due: int = 0
    server_time: int | None = None
    open_letter: bool = False
    resolved: bool = False
    events: tuple[str, ...] = ("receipt_added",)

    def tell(self, *kinds):
        self.events += kinds

    def free(self, status):
        self.status, self.token = status, None

    def fail(self):
        self.free("failed")
        self.due, self.open_letter, self.resolved = 0, True, False
        self.tell("receipt_failed")

    def sync(self, server_time):
        if self.status != "synced":
            self.free("synced")
            self.server_time, self.open_letter = server_time, False
            self.due = 0
            self.tell("receipt_synced")


@dataclass
class StreakModel:
    """The streak rule, for receipts by their keys."""

    threshold: int
    outage: bool = False
    doubt: bool = False
    row: set[str] = field(default_factory=set)  # those that have failed since the last answer
    failed: list[str] = field(default_factory=list)
    suspects: set[str] = field(default_factory=set)

    def answer(self, key):
        self.outage = self.doubt = False
        self.row.clear()
        self.suspects.discard(key)
        self.failed = [other for other in self.failed if other != key]
        self.suspects.update(self.failed[: self.threshold])
        self.failed = self.failed[self.threshold :]

    def fail(self, key, *, is_outage):
        self.doubt = True
        if key not in self.suspects:
            self.row.add(key)
            self.failed += [key] if key not in self.failed else []
        self.outage = self.outage or is_outage or len(self.row) >= self.threshold

    def deliver(self, batch, answers, now, count_attempt):
        """What becomes of the receipts of a batch that meets these answers."""
        outcomes = dict.fromkeys((key for key, _ in batch), Outcome.RELEASED)
        failures = []

        def count():
            for key, one, _ in failures:
                count_attempt(one)
                outcomes[key] = Outcome.RETRY if one.status == "pending" else Outcome.DEAD_LETTERED
            failures.clear()

        for (key, one), answer in zip(batch, answers, strict=False):
            if answer in {"yes", "never"}:
                one.sync(now) if answer == "yes" else one.fail()
                outcomes[key] = Outcome.SYNCED if answer == "yes" else Outcome.DEAD_LETTERED
                self.answer(key)
                count()
            else:
                self.fail(key, is_outage=answer == "offline")
                failures.append((key, one, answer == "offline"))
                if self.outage:
                    for failed, other, is_told in failures:
                        other.due = now + (0 if is_told and failed not in self.suspects else 300)
                    return outcomes
        count()
        return outcomes
