"""`deliver_pending` with several senders at once: which receipts are in flight together, and how they end."""

import contextvars
import threading
import time
from collections import defaultdict

import pytest
from builders import NOON, new_receipt

from kkt_buffer import DeliveryUnavailable, Outcome, ReceiptRepository, deliver_pending


@pytest.fixture
def repository(shared_engine):
    """As threads need it, by the real clock."""
    return ReceiptRepository(shared_engine)


def sold(repository, tills):
    return repository.insert_receipts(new_receipt(pos_id=till) for till in tills)


class Ofd:
    """Takes some time, and watches what is in flight for each till."""

    def __init__(self, seconds=0.0):
        self.seconds = seconds
        self.in_flight = defaultdict(int)
        self.most = defaultdict(int)
        self.started = defaultdict(list)

    def __call__(self, receipt):
        till = receipt.pos_id
        self.in_flight[till] += 1
        self.most[till] = max(self.most[till], self.in_flight[till])
        self.started[till].append(receipt.id)
        time.sleep(self.seconds)
        self.in_flight[till] -= 1
        return NOON


class TestOrder:
    def test_tills(self, repository):
        """Those of one till start in HLC order and one after the other, whichever thread sends them."""
        tills = "aabacbaaccbabd" * 3
        ids = sold(repository, tills)
        ofd = Ofd(0.002)
        report = deliver_pending(repository, ofd, concurrency=3)
        assert dict.fromkeys(ids, Outcome.SYNCED) == report.outcomes
        assert dict.fromkeys("abcd", 1) == ofd.most
        for till in "abcd":
            assert [one for one, of in zip(ids, tills, strict=True) if of == till] == ofd.started[till]

    def test_at_once(self, repository):
        """As many are in flight as there are senders."""
        sold(repository, "abcabc")
        all_three = threading.Barrier(3)

        def send(receipt):
            all_three.wait(10)
            return NOON

        assert deliver_pending(repository, send, concurrency=3).count(Outcome.SYNCED) == 6

    def test_backoff(self, repository):
        """A receipt in its backoff holds nobody back, not even the next one of its till."""
        first, second = sold(repository, "aa")
        [claimed] = repository.claim_pending(1)
        repository.record_failure(first, "500", claimed.lease_token)
        assert {second: Outcome.SYNCED} == deliver_pending(repository, Ofd(), concurrency=2).outcomes

    def test_context(self, repository):
        """Each sender runs in the context of the caller, as tracing expects."""
        sold(repository, "ab")
        variable = contextvars.ContextVar("trace")
        variable.set("the caller's")
        seen = []

        def send(receipt):
            both.wait(10)
            seen.append(variable.get())
            return NOON

        both = threading.Barrier(2)
        deliver_pending(repository, send, concurrency=2)
        assert ["the caller's"] * 2 == seen


class TestEnd:
    def test_outage(self, repository):
        """An outage that one meets stops all; what is not sent is due at once."""
        sold(repository, "ab" * 10)
        both = threading.Barrier(2)

        def send(receipt):
            both.wait(10)
            raise DeliveryUnavailable("offline")

        report = deliver_pending(repository, send, concurrency=2)
        assert "DeliveryUnavailable: offline" == report.outage
        assert 20 == report.count(Outcome.RELEASED) == len(repository.claim_pending())

    def test_failures(self, repository):
        """Failures of all senders make one streak: the threshold is reached together, and no attempt is counted."""
        sold(repository, "abcdefgh")

        def send(receipt):
            raise RuntimeError("500")

        report = deliver_pending(repository, send, concurrency=3)
        assert report.outage.startswith("5 different receipts have failed in a row")
        assert 8 == report.count(Outcome.RELEASED)

    def test_should_stop(self, repository):
        """Each sender asks before each receipt."""
        sold(repository, "ab" * 5)
        ofd = Ofd()
        report = deliver_pending(repository, ofd, concurrency=2, should_stop=lambda: len(ofd.started) == 2)
        assert report.count(Outcome.SYNCED) <= 4
        assert 10 == report.count(Outcome.SYNCED) + repository.get_buffer_status().pending

    @pytest.mark.parametrize("where", ["this thread", "another thread"])
    @pytest.mark.parametrize("error", [SystemExit("stop"), KeyboardInterrupt()])
    def test_interrupted(self, repository, where, error):
        """What interrupts one sender reaches the caller, and the rest is released."""
        sold(repository, "ab" * 5)
        here = threading.current_thread()
        sending = threading.Barrier(2)

        def send(receipt):
            if len(sent) < 2:
                sent.append(receipt.id)
                sending.wait(10)
            if (threading.current_thread() is here) == (where == "this thread"):
                raise error
            time.sleep(0.1)  # so that it is noticed before the other one has sent all of its till
            return NOON

        sent = []
        with pytest.raises(type(error)):
            deliver_pending(repository, send, concurrency=2)
        for thread in threading.enumerate():
            if thread.name.startswith("lane "):
                thread.join(10)  # an interrupted call does not wait for it; this test must, before the buffer is closed
        status = repository.get_buffer_status()
        assert 0 == status.syncing
        assert 5 < status.pending

    def test_no_thread(self, repository, monkeypatch):
        """If a sender cannot be started, no further receipt is, and the rest is due at once."""
        sold(repository, "abc" * 5)
        start = threading.Thread.start
        started = []

        def refuse_second(thread):
            if started:
                gate.set()
                raise RuntimeError("can't start new thread")
            started.append(thread)
            start(thread)

        def send(receipt):
            gate.wait(10)
            time.sleep(0.05)
            return NOON

        gate = threading.Event()
        monkeypatch.setattr(threading.Thread, "start", refuse_second)
        with pytest.raises(RuntimeError, match="new thread"):
            deliver_pending(repository, send, concurrency=3)
        status = repository.get_buffer_status()
        assert (1, 14, 0) == (status.synced, status.pending, status.syncing)

    def test_interrupted_at_its_end(self, repository, monkeypatch):
        """An interrupt while the others are waited for stops them: nothing is started that was handed back."""
        sold(repository, "aabb")
        here = threading.current_thread()
        both, gate = threading.Barrier(2), threading.Event()
        sent, lanes = [], set()

        def join(thread, timeout=None):
            monkeypatch.undo()
            raise KeyboardInterrupt

        def send(receipt):
            sent.append(receipt.id)
            if len(sent) <= 2:
                both.wait(10)
            if threading.current_thread() is not here:
                lanes.add(threading.current_thread())
                gate.wait(10)
            return NOON

        monkeypatch.setattr(threading.Thread, "join", join)
        with pytest.raises(KeyboardInterrupt):
            deliver_pending(repository, send, concurrency=2)
        gate.set()
        for lane in lanes:
            lane.join()
        assert 3 == len(sent)  # two of this thread's till, and the one that was in flight
        assert 0 == repository.get_buffer_status().syncing

    def test_buffer_fails(self, repository):
        """An error of the buffer in this thread is raised once the others have recorded what they were sending."""
        [a, b] = sold(repository, "ab")
        sending = threading.Barrier(2)
        failed = threading.Event()

        def send(receipt):
            sending.wait(10)
            if receipt.id == a:
                failed.set()
                raise ValueError("500")
            failed.wait(10)
            return NOON

        def get_config(key):
            raise OSError("no answer")

        repository.get_config = get_config
        with pytest.raises(OSError, match="no answer"):
            deliver_pending(repository, send, concurrency=2)
        assert {a: "pending", b: "synced"} == {one: repository.get_receipt_by_id(one).status for one in (a, b)}
