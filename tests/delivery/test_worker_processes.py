"""`DeliveryWorker` in processes of its own: signals, kills, and workers that share the work."""

import os
import signal
import threading
import time
from collections import Counter

import pytest
from builders import new_receipt, start_python

from kkt_buffer import DeliveryWorker, ReceiptRepository

# Arguments: the database, how long a send takes, the batch. Each send is a line "receipt", each return "ended".
WORKER = """
import sys, time
from kkt_buffer import DeliveryWorker, ReceiptRepository, create_buffer_engine

path, seconds, batch = sys.argv[1:]

def send(receipt):
    print(receipt.id, flush=True)
    time.sleep(float(seconds))
    return 5

engine = create_buffer_engine(path)
worker = DeliveryWorker(ReceiptRepository(engine), send, batch=int(batch), poll_seconds=0.1)
print("ready", flush=True)
worker.run()
engine.dispose()
print("ended", flush=True)
"""


@pytest.fixture
def repository(shared_engine):
    """By the real clock."""
    return ReceiptRepository(shared_engine)


@pytest.fixture
def start(buffer):
    """Start a worker, and wait until it looks for receipts."""
    started = []

    def start(seconds=0.0, batch=50):
        process = start_python(WORKER, buffer, seconds, batch)
        started.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def end(process):
    """The exit status, what was printed, and how long it took."""
    began = time.monotonic()
    printed, _ = process.communicate(timeout=30)
    return process.returncode, printed.splitlines(), time.monotonic() - began


def wait_until_synced(repository, number):
    deadline = time.monotonic() + 30
    while repository.get_buffer_status().synced < number:
        assert time.monotonic() < deadline
        time.sleep(0.01)


class TestSignals:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_graceful(self, repository, start, number):
        """In the middle of a batch of 50, it ends within one send; the rest is due at once, and the status is 0."""
        repository.insert_receipts(new_receipt() for _ in range(50))
        worker = start(2)
        worker.stdout.readline()
        worker.send_signal(number)
        status, printed, seconds = end(worker)
        assert (0, ["ended"]) == (status, printed)
        assert seconds < 4  # two sends
        assert 1 == repository.get_buffer_status().synced
        assert 49 == len(repository.claim_pending(100))

    def test_second_sigterm(self, repository, start):
        """A second SIGTERM ends it at once, as it would end any program."""
        repository.insert_receipt(new_receipt())
        worker = start(20)
        worker.stdout.readline()
        worker.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        worker.send_signal(signal.SIGTERM)
        status, printed, seconds = end(worker)
        assert (-signal.SIGTERM, []) == (status, printed)
        assert seconds < 5

    def test_second_sigint(self, repository, start):
        """A second SIGINT interrupts the send; what was not sent is due at once."""
        repository.insert_receipts(new_receipt() for _ in range(3))
        worker = start(20)
        worker.stdout.readline()
        worker.send_signal(signal.SIGINT)
        time.sleep(0.3)
        worker.send_signal(signal.SIGINT)
        status, _, seconds = end(worker)
        assert -signal.SIGINT == status
        assert seconds < 5
        assert 3 == repository.get_buffer_status().pending

    def test_handlers(self, repository):
        """The handlers of before are there again after `run`; an idle worker is stopped too."""
        before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
        timer = threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGTERM])
        timer.start()
        DeliveryWorker(repository, lambda receipt: 5, poll_seconds=3600).run()
        timer.join()
        assert before == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]

    def test_log(self, repository, caplog):
        """The handler logs nothing, as it may have interrupted the log; what stopped the worker is told at its end."""
        caplog.set_level("INFO", logger="kkt_buffer.worker")
        repository.insert_receipt(new_receipt())
        told = []

        def send(receipt):
            os.kill(os.getpid(), signal.SIGTERM)
            told.extend(caplog.messages)
            return 5

        DeliveryWorker(repository, send).run()
        assert [] == [message for message in told if "SIGTERM" in message]
        assert "SIGTERM: the worker has stopped" in caplog.messages


class TestProcesses:
    def test_woken(self, repository, start):
        """A receipt of another process is noticed within `poll_seconds`."""
        worker = start()
        time.sleep(0.3)
        began = time.monotonic()
        receipt_id = repository.insert_receipt(new_receipt())
        assert receipt_id == worker.stdout.readline().strip()
        assert time.monotonic() - began < 1

    def test_share(self, repository, start):
        """Two workers share the work, and each receipt is sent once."""
        workers = [start(0.02, batch=5) for _ in range(2)]
        ids = repository.insert_receipts(new_receipt() for _ in range(60))
        wait_until_synced(repository, 60)
        sent = []
        for worker in workers:
            worker.send_signal(signal.SIGTERM)
            status, printed, _ = end(worker)
            assert 0 == status
            assert 5 < len(printed)
            sent += printed[:-1]
        assert Counter(ids) == Counter(sent)

    def test_killed(self, repository, start):
        """After a SIGKILL the next worker goes on; what the killed one had leased is sent when the lease is over."""
        repository.set_config("lease_seconds", 2)
        ids = repository.insert_receipts(new_receipt() for _ in range(20))
        first = start(20, batch=10)
        assert ids[0] == first.stdout.readline().strip()
        first.kill()
        first.wait()
        second = start()
        wait_until_synced(repository, 20)
        second.send_signal(signal.SIGTERM)
        status, printed, _ = end(second)
        assert 0 == status
        assert Counter(ids) == Counter(printed[:-1])
