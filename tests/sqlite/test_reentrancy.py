"""
An operation inside another operation of the same engine, in one thread: refused at once, and the outer one completes.

It comes out of a signal handler, `__del__`, a listener of the engine's events, or the clock `now`.
"""

import json
import math
import time

import pytest
from builders import NOON, a_receipt, new_receipt, run_python, start_python
from sqlalchemy import event

from kkt_buffer import ReceiptBufferError, ReceiptRepository, upgrade

# What is called inside; each for itself, with a receipt that is in the buffer.
INNER = {
    "insert_receipt": lambda repository, _: repository.insert_receipt(new_receipt()),
    "insert_receipts": lambda repository, _: repository.insert_receipts([new_receipt(), new_receipt()]),
    "mark_synced": lambda repository, receipt_id: repository.mark_synced(receipt_id, NOON),
    "claim_pending": lambda repository, _: repository.claim_pending(),
    "get_receipt_by_id": lambda repository, receipt_id: repository.get_receipt_by_id(receipt_id),
    "get_buffer_status": lambda repository, _: repository.get_buffer_status(),
    "transaction": lambda repository, _: repository.transaction().__enter__(),
}

# What it is called within: a write of one statement or more, and a batch.
OUTER = {
    "insert_receipt": lambda repository, _: repository.insert_receipt(new_receipt()),
    "insert_receipts": lambda repository, _: repository.insert_receipts([new_receipt(), new_receipt()]),
    "claim_pending": lambda repository, _: repository.claim_pending(),
    "move_to_dlq": lambda repository, receipt_id: repository.move_to_dlq(receipt_id, "a reason"),
}


class Intruder:
    """Calls an operation once, as soon as it is armed, and keeps what that was answered with."""

    def __init__(self, operation, repository, receipt_id):
        self.call = lambda: operation(repository, receipt_id)
        self.armed = False
        self.answer = "it was not called"
        self.took = 0.0

    def __call__(self):
        if self.armed:
            self.armed = False
            began = time.monotonic()
            try:
                self.answer = self.call()
            except Exception as error:  # noqa: BLE001 (which one it is, is the question)
                self.answer = error
            self.took = time.monotonic() - began


@pytest.fixture(params=["memory", "file"])
def buffer(request, path, open_engine):
    """An engine that waits for two seconds, so that a refusal at once is told from one after waiting."""
    engine = open_engine(":memory:" if request.param == "memory" else path, busy_timeout=2)
    upgrade(engine)
    return engine


def outcome(repository):
    """What a completed operation has changed, whatever its ids."""
    return repository.get_buffer_status(), len(repository.get_events(1000)), len(repository.list_dead_letters())


def without_intruder(open_engine, outer):
    engine = open_engine(":memory:")
    upgrade(engine)
    repository = ReceiptRepository(engine, now=lambda: NOON)
    OUTER[outer](repository, a_receipt(repository).id)
    return outcome(repository)


def assert_refused(intruder):
    assert isinstance(intruder.answer, ReceiptBufferError), repr(intruder.answer)
    assert intruder.took < 1


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("outer", OUTER)
class TestRefused:
    def test_now(self, buffer, outer, inner, open_engine):
        """Called by the clock."""
        intruder = None

        def now():
            if intruder is not None:
                intruder()
            return NOON

        repository = ReceiptRepository(buffer, now=now)
        receipt_id = a_receipt(repository).id
        intruder = Intruder(INNER[inner], repository, receipt_id)
        intruder.armed = True
        OUTER[outer](repository, receipt_id)
        intruder.armed = False
        assert_refused(intruder)
        assert without_intruder(open_engine, outer) == outcome(repository)

    def test_del(self, buffer, outer, inner, open_engine):
        """Called by an object that is freed meanwhile, here by the clock, on another repository of the engine."""
        intruder = None

        class Freed:
            def __del__(self):
                if intruder is not None:
                    intruder()

        def now():
            Freed()
            return NOON

        repository = ReceiptRepository(buffer, now=now)
        receipt_id = a_receipt(repository).id
        intruder = Intruder(INNER[inner], ReceiptRepository(buffer), receipt_id)
        intruder.armed = True
        OUTER[outer](repository, receipt_id)
        intruder.armed = False
        assert_refused(intruder)
        assert without_intruder(open_engine, outer) == outcome(repository)

    def test_listener(self, buffer, outer, inner, open_engine):
        """Called by a listener of the engine's events, before a statement is run."""
        repository = ReceiptRepository(buffer, now=lambda: NOON)
        receipt_id = a_receipt(repository).id
        intruder = Intruder(INNER[inner], repository, receipt_id)
        event.listen(buffer, "before_cursor_execute", lambda *_: intruder())
        intruder.armed = True
        OUTER[outer](repository, receipt_id)
        intruder.armed = False
        assert_refused(intruder)
        assert without_intruder(open_engine, outer) == outcome(repository)


class TestNotRefused:
    def test_another_buffer(self, file_engine, engine):
        """An operation of another buffer is none of this one's business."""
        other = ReceiptRepository(engine)
        repository = ReceiptRepository(file_engine, now=lambda: bool(other.insert_receipt(new_receipt())) * NOON)
        repository.insert_receipt(new_receipt())
        assert (1, 1) == (other.get_buffer_status().pending, repository.get_buffer_status().pending)

    def test_afterwards(self, file_engine):
        """What was refused inside works as soon as the outer operation has ended."""
        refused = []

        def now():
            if not refused:
                refused.append(None)
                with pytest.raises(ReceiptBufferError) as caught:
                    repository.insert_receipt(new_receipt())
                refused.append(caught.value)
            return NOON

        repository = ReceiptRepository(file_engine, now=now)
        for _ in range(3):
            repository.insert_receipt(new_receipt())
        assert 3 == repository.get_buffer_status().pending
        assert 2 == len(refused)


# For some seconds the main thread inserts, a signal handler inserts in the middle of it, and two threads insert too.
HANDLER = """
import faulthandler, json, signal, sys, threading, time
from kkt_buffer import ReceiptBufferError, ReceiptRepository, create_buffer_engine

faulthandler.dump_traceback_later(60, exit=True)
repository = ReceiptRepository(create_buffer_engine(sys.argv[1], busy_timeout=20))
repository.set_config("buffer_capacity", 1_000_000)
receipt = {"pos_id": "till-1", "fiscal_doc": "{}"}
acknowledged, refused, failed, slowest = [], [], [], [0.0]

def handler(*_):
    began = time.monotonic()
    try:
        acknowledged.append(repository.insert_receipt(receipt))
    except ReceiptBufferError as error:
        refused.append(str(error))
        slowest[0] = max(slowest[0], time.monotonic() - began)
    except BaseException as error:
        failed.append(repr(error))

def insert_until(moment):
    while time.monotonic() < moment:
        try:
            acknowledged.append(repository.insert_receipt(receipt))
        except BaseException as error:
            failed.append(repr(error))

until = time.monotonic() + 4
signal.signal(signal.SIGALRM, handler)
threads = [threading.Thread(target=insert_until, args=(until,)) for _ in range(int(sys.argv[2]))]
for thread in threads:
    thread.start()
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.0017)
insert_until(until)
signal.setitimer(signal.ITIMER_REAL, 0)
for thread in threads:
    thread.join()
told = {"acknowledged": acknowledged, "refused": len(refused), "slowest": slowest[0], "failed": failed[:5]}
print(json.dumps(told), flush=True)
sys.stdin.read()
"""

# What another process finds, and whether it can write.
LOOK = """
import json, sqlite3, sys
from kkt_buffer import ReceiptRepository, create_buffer_engine

ReceiptRepository(create_buffer_engine(sys.argv[1], busy_timeout=10)).insert_receipt(
    {"id": "00000000-0000-4000-8000-000000000000", "pos_id": "till-2", "fiscal_doc": "{}"}
)
rows = sqlite3.connect(sys.argv[1]).execute(
    "SELECT id, hlc_local_time, hlc_logical_counter FROM receipts ORDER BY rowid"
)
print(json.dumps(rows.fetchall()))
"""


class TestSignalHandler:
    @pytest.mark.parametrize("threads", [0, 2])
    def test_inserts(self, path, threads):
        """
        A handler that inserts while its thread inserts is refused at once, or has its receipt stored.

        No acknowledged insert is lost, none that was refused is stored, the HLC is in order, and while this process
        lives on, another one can write.
        """
        with start_python(HANDLER, path, threads, stdin=-1) as process:
            told = json.loads(process.stdout.readline() or "{}")
            assert told, "the process has hung"
            rows = json.loads(run_python(LOOK, path).stdout)
            process.stdin.close()
        assert [] == told["failed"]
        assert told["refused"] > 0
        assert told["slowest"] < 2
        assert {*told["acknowledged"], "00000000-0000-4000-8000-000000000000"} == {row[0] for row in rows}
        times = [tuple(row[1:]) for row in rows]
        assert sorted(set(times)) == times


class TestNow:
    @pytest.mark.parametrize("moment", [math.nan, math.inf, -math.inf, "noon", None, [NOON], 1j])
    @pytest.mark.parametrize("outer", OUTER)
    def test_no_time(self, engine, outer, moment):
        """A clock that returns no moment is named, and nothing is stored; with a right one it goes on."""
        moments = [NOON]
        repository = ReceiptRepository(engine, now=lambda: moments[-1])
        receipt_id = a_receipt(repository).id
        before = outcome(repository)
        moments.append(moment)
        with pytest.raises((ValueError, TypeError), match=r"\bnow\b"):
            OUTER[outer](repository, receipt_id)
        moments.append(NOON)
        assert before == outcome(repository)
        OUTER[outer](repository, receipt_id)
