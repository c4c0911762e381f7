"""The write gate by itself: what its users, processes and threads, rely on."""

import gc
import signal
import threading

import pytest

from kkt_buffer import BufferBusyError
from kkt_buffer.sqlite.gate import WriteGate


class Holder:
    pass


@pytest.fixture
def gates(tmp_path):
    """Gates of one database, as two processes have them."""
    both = [WriteGate(tmp_path / "gate", timeout) for timeout in (0.05, 5)]
    yield both
    for gate in both:
        gate.close()


class TestHolders:
    def test_gone(self, gates):
        """A holder that is gone holds nothing, for its own process and for others."""
        first, second = gates
        holder = Holder()
        first.acquire(holder)
        del holder
        gc.collect()
        second.acquire(held := Holder())
        second.release(held)
        first.acquire(held)
        first.release(held)

    def test_released_twice(self, gates):
        """Whoever cleans up need not know what was released already, and takes nothing from the next holder."""
        gate, other = gates[0], Holder()
        gate.acquire(holder := Holder())
        gate.release(holder)
        gate.acquire(other)
        gate.release(holder)
        with pytest.raises(BufferBusyError, match="this thread is inside a write transaction"):
            gate.acquire(holder)
        gate.release(other)

    def test_block_inside(self, gates):
        """A block inside a block of the same thread goes on at once."""
        with gates[0].held(), gates[0].held():
            pass
        with gates[1].held():
            pass

    def test_interrupted(self, gates):
        """An exception out of a signal handler, while a thread waits, leaves nothing held."""

        def interrupt(*_):
            raise InterruptedError

        inside, done = threading.Event(), threading.Event()

        def hold():
            with gates[1].held():
                inside.set()
                done.wait(10)

        thread = threading.Thread(target=hold)
        thread.start()
        inside.wait(10)
        before = signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(InterruptedError):
            gates[1].acquire(Holder())
        signal.signal(signal.SIGALRM, before)
        done.set()
        thread.join()
        with gates[1].held():
            pass


class TestProcesses:
    def test_given_back(self, gates):
        """A lock that is granted after the wait for it has timed out is given back, and can be had again."""
        impatient, other = gates
        with other.held():
            for _ in range(3):
                with pytest.raises(BufferBusyError, match="another process has kept the write lock"):
                    impatient.acquire(Holder())
        threading.Event().wait(1.5)
        with other.held():
            pass
        with impatient.held():
            pass

    def test_taken_over(self, gates):
        """A later wait goes on from the place in the queue that an earlier one has kept."""
        impatient, other = gates
        with other.held(), pytest.raises(BufferBusyError):
            impatient.acquire(Holder())
        with impatient.held(), impatient.held_if_free():
            pass
