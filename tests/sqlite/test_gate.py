"""The queue of the writers."""

import os
import threading
from concurrent.futures import Future

import pytest
from builders import run_python, start_python

from kkt_buffer import BufferBusyError
from kkt_buffer.sqlite.gate import WriteGate

HOLD = """
import sys
from pathlib import Path
from kkt_buffer.sqlite.gate import WriteGate

gate = WriteGate(Path(sys.argv[1]), 60)
gate.acquire(gate)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def lock_file(tmp_path):
    return tmp_path / "buffer.db-gate"


@pytest.fixture
def gate(lock_file):
    gate = WriteGate(lock_file, 60)
    yield gate
    gate.close()


def in_thread(function):
    """Run in a thread, and return what it returned or raised."""
    results = []

    def run():
        try:
            results.append(function())
        except BufferBusyError as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return results[0]


class TestThreads:
    def test_one_at_a_time(self, gate):
        """Whoever has the gate is alone."""
        inside, seen = [], []

        def work():
            for _ in range(200):
                with gate.held():
                    inside.append(1)
                    seen.append(len(inside))
                    inside.pop()

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [1] * 1600 == seen

    def test_timeout(self, lock_file):
        """A writer that waited in vain is told so, and can come again."""
        gate = WriteGate(lock_file, 0.05)
        gate.acquire("first")
        refused = in_thread(lambda: gate.acquire("second"))
        assert "another thread of this process has kept the write lock" in str(refused)
        gate.release("first")
        assert in_thread(lambda: gate.acquire("second") or gate.release("second")) is None
        gate.close()

    def test_own_thread(self, gate):
        """A second write transaction in the same thread would wait for ever: refused at once."""
        with gate.held(), pytest.raises(BufferBusyError, match="inside a write transaction of this engine already"):
            gate.acquire("second")
        assert not gate.is_mine

    def test_held_inside(self, gate):
        """A block inside a write transaction uses the gate that is held anyway, and leaves it held."""
        with gate.held():
            with gate.held():
                assert gate.is_mine
            assert gate.is_mine
        assert not gate.is_mine

    def test_if_free(self, gate, lock_file):
        """Who need not wait takes the gate if it is free, and goes on without it if it is not."""
        with gate.held_if_free():
            assert gate.is_mine
        with gate.held(), gate.held_if_free():
            assert gate.is_mine
        other = WriteGate(lock_file, 60)
        with other.held(), gate.held_if_free():
            assert run_python(TRY, lock_file).stdout == "busy\n"
        assert run_python(TRY, lock_file).stdout == "free\n"
        other.close()

    def test_release_by_others(self, gate):
        """Only its holder can give the gate back."""
        with gate.held():
            gate.release("somebody else")
            assert gate.is_mine

    def test_gone_from_the_queue(self, gate):
        """One who was interrupted in the queue, and left the name there, holds nobody up."""
        gate._waiting.append(("interrupted", threading.Lock()))
        assert in_thread(lambda: gate.acquire("next") or gate.release("next")) is None
        assert not gate._waiting

    def test_taken_for_lost(self, gate):
        """One whom another took for lost still gets the turn."""
        gate.acquire("first")
        waiter = threading.Thread(target=lambda: gate.acquire("second") or gate.release("second"))
        waiter.start()
        while not gate._waiting:
            pass
        gate._waiting.clear()
        gate.release("first")
        waiter.join(5)
        assert not waiter.is_alive()

    def test_without_file(self):
        """A database in memory needs no file."""
        gate = WriteGate(None, 60)
        with gate.held():
            assert gate.is_mine
        gate.close()


class TestProcesses:
    def test_waits(self, lock_file):
        """The gate keeps out other processes, until its holder is gone, however it went."""
        with start_python(HOLD, lock_file, stdin=-1) as holder:
            assert holder.stdout.readline() == "held\n"
            gate = WriteGate(lock_file, 0.05)
            with pytest.raises(BufferBusyError, match="another process has kept the write lock .* for 0.05 s"):
                gate.acquire("impatient")
            patient = WriteGate(lock_file, 60)
            threading.Timer(0.2, holder.kill).start()
            with patient.held():
                assert patient.is_mine
        # The helper that waited for the impatient one has given its turn on.
        with gate.held():
            assert gate.is_mine
        gate.close()
        patient.close()

    def test_late_turn(self, lock_file, monkeypatch):
        """A turn that comes in the moment of giving up is taken, not lost."""
        gate = WriteGate(lock_file, 0.0)
        with start_python(HOLD, lock_file, stdin=-1) as holder:
            assert holder.stdout.readline() == "held\n"

            class Late(Future):
                def cancel(self):
                    holder.kill()
                    self._came = threading.Event()
                    self.add_done_callback(lambda _: self._came.set())
                    self._came.wait()
                    return super().cancel()

            monkeypatch.setattr("kkt_buffer.sqlite.gate.Future", Late)
            gate.acquire("late")
            assert gate.is_mine
            gate.release("late")
        gate.close()

    def test_interrupted_queue(self, lock_file, monkeypatch):
        """Who is interrupted while it waits for another process leaves the queue, and keeps nobody out."""
        gate = WriteGate(lock_file, 60)
        with start_python(HOLD, lock_file, stdin=-1) as holder:
            assert holder.stdout.readline() == "held\n"

            def interrupted(*_):
                raise KeyboardInterrupt

            monkeypatch.setattr("kkt_buffer.sqlite.gate.Future.result", interrupted)
            with pytest.raises(KeyboardInterrupt):
                gate.acquire("interrupted")
            assert not gate.is_mine
            holder.kill()
        monkeypatch.undo()
        patient = WriteGate(lock_file, 60)
        with patient.held():
            assert patient.is_mine
        patient.close()

    def test_interrupted_in_the_last_moment(self, lock_file, monkeypatch):
        """The same if its turn comes at that very moment."""
        gate = WriteGate(lock_file, 60)
        with start_python(HOLD, lock_file, stdin=-1) as holder:
            assert holder.stdout.readline() == "held\n"
            result = Future.result

            def interrupted(future, timeout):
                holder.kill()
                result(future, timeout)
                raise KeyboardInterrupt

            monkeypatch.setattr("kkt_buffer.sqlite.gate.Future.result", interrupted)
            with pytest.raises(KeyboardInterrupt):
                gate.acquire("interrupted")
        assert run_python(TRY, lock_file).stdout == "free\n"
        gate.close()

    def test_owner_only(self, gate, lock_file):
        with gate.held():
            assert lock_file.stat().st_mode & 0o777 == 0o600

    def test_no_folder(self, tmp_path):
        """Without a lock file there is no gate, and the next attempt is not blocked by the failed one."""
        gate = WriteGate(tmp_path / "missing" / "buffer.db-gate", 60)
        with pytest.raises(FileNotFoundError):
            gate.acquire("nobody")
        (tmp_path / "missing").mkdir()
        with gate.held():
            assert gate.is_mine
        gate.close()

    def test_close_while_held(self, gate):
        """Closing does not take the lock away from who holds it."""
        with gate.held():
            gate.close()
            assert in_thread(lambda: run_python(TRY, gate._path).stdout) == "busy\n"
        assert run_python(TRY, gate._path).stdout == "free\n"

    def test_forget(self, gate):
        """A forked child starts with a gate of its own."""
        gate.acquire("parent")
        descriptor = os.dup(gate._descriptor)  # as the parent has it
        gate.forget()
        assert not gate.is_mine
        assert run_python(TRY, gate._path).stdout == "busy\n"
        os.close(descriptor)
        with gate.held():
            assert gate.is_mine


TRY = """
import sys
from pathlib import Path
from kkt_buffer import BufferBusyError
from kkt_buffer.sqlite.gate import WriteGate

try:
    WriteGate(Path(sys.argv[1]), 0).acquire(sys)
    print("free")
except BufferBusyError:
    print("busy")
"""


def test_forgets_what_waits(tmp_path):
    """A child closes the lock file that a thread of its parent was waiting with."""
    gate = WriteGate(tmp_path / "gate", 1)
    descriptor = os.open(tmp_path / "gate", os.O_RDWR | os.O_CREAT)
    gate._queued.add(descriptor)
    gate.forget()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
