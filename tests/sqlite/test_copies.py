"""Copies of a buffer that is in use, what a restored one goes on from, and what a restarted process does."""

import contextlib
import shutil
import sqlite3
import subprocess
import threading

import pytest
from builders import NOON, Clock, a_receipt, everything, new_receipt, stamps, start_python, together
from damage import report

from kkt_buffer import BufferStorageError, ReceiptBufferError, ReceiptRepository, create_buffer_engine


class TestBackup:
    def test_inside(self, tmp_path, file_repository):
        with file_repository.transaction(), pytest.raises(ReceiptBufferError, match="Nothing was copied"):
            file_repository.backup(tmp_path / "copy.db")
        assert not (tmp_path / "copy.db").exists()

    @pytest.mark.parametrize("suffix", ["", "-wal", "-shm", "-gate"])
    def test_onto_itself(self, path, file_repository, suffix):
        with pytest.raises(ValueError, match="belongs to the buffer itself; give another one. Nothing was copied"):
            file_repository.backup(f"{path}{suffix}")

    @pytest.mark.parametrize("target", ["", "/", "\0", ".."])
    def test_no_file(self, file_repository, target):
        with pytest.raises((ValueError, BufferStorageError)):
            file_repository.backup(target)

    @pytest.mark.parametrize("target", [None, 5, b"x"])
    def test_no_path(self, file_repository, target):
        with pytest.raises(TypeError, match="path: expected the path of a file"):
            file_repository.backup(target)

    @pytest.mark.slow
    def test_under_load(self, tmp_path, path):
        """While others insert: each copy is whole, and holds what was acknowledged before it began."""
        engine = create_buffer_engine(path)
        repository = ReceiptRepository(engine)
        repository.set_config("buffer_capacity", 100_000)
        acknowledged = []
        done = threading.Event()

        def sell():
            while not done.is_set():
                acknowledged.append(repository.insert_receipt(new_receipt()))

        def copy():
            try:
                for number in range(10):
                    before = set(acknowledged)
                    target = tmp_path / f"{number % 2}.db"  # new, and over an older one
                    repository.backup(target)
                    assert report(target).is_sound
                    with contextlib.closing(sqlite3.connect(target)) as db:
                        assert before <= {row[0] for row in db.execute("SELECT id FROM receipts")}
            finally:
                done.set()

        together(5, lambda number: sell() if number else copy())
        engine.dispose()

    @pytest.mark.slow
    def test_killed(self, tmp_path, used):
        """A kill at any moment leaves the old copy or the new one, whole."""
        target = tmp_path / "backup.db"
        engine = create_buffer_engine(used)
        repository = ReceiptRepository(engine)
        repository.set_config("buffer_capacity", 100_000)
        program = """
            import sys
            from kkt_buffer import ReceiptRepository, create_buffer_engine
            repository = ReceiptRepository(create_buffer_engine(sys.argv[1], read_only=True))
            print("ready", flush=True)
            while True:
                repository.backup(sys.argv[2])
        """
        repository.backup(target)
        for number in range(10):
            with start_python(program, used, target, stderr=subprocess.DEVNULL) as child:
                child.stdout.readline()
                repository.insert_receipts([new_receipt() for _ in range(100)])
                threading.Event().wait(number / 100)
                child.kill()
            assert report(target).is_sound
        repository.backup(target)
        assert everything(used) == everything(target)
        engine.dispose()


class TestRestore:
    def test_clock_goes_on(self, tmp_path, path):
        """A restored buffer goes on above its latest timestamp, though the clock was set back."""
        engine = create_buffer_engine(path)
        repository = ReceiptRepository(engine, now=lambda: NOON)
        kept = [a_receipt(repository) for _ in range(3)]
        repository.backup(tmp_path / "backup.db")
        repository.insert_receipt(new_receipt())
        engine.dispose()
        for file in path.parent.glob(f"{path.name}*"):
            file.unlink()
        shutil.copy(tmp_path / "backup.db", path)
        engine = create_buffer_engine(path)
        repository = ReceiptRepository(engine, now=Clock(NOON - 3600))
        assert repository.check_integrity().is_sound
        assert [receipt.id for receipt in kept] == [found.id for found in repository.get_pending_receipts()]
        new = a_receipt(repository)
        latest = kept[-1].hlc_local_time, kept[-1].hlc_logical_counter
        assert (new.hlc_local_time, new.hlc_logical_counter) > latest
        engine.dispose()


class TestRestart:
    def test_restart(self, path, clock):
        """The database is the memory: another process with another clock goes on from the last timestamp."""
        made = []
        for seconds in (NOON, NOON - 1000):
            clock.seconds = seconds
            engine = create_buffer_engine(path)
            made += [a_receipt(ReceiptRepository(engine, now=clock)) for _ in range(2)]
            engine.dispose()
        assert [(NOON, 0), (NOON, 1), (NOON, 2), (NOON, 3)] == stamps(made)
