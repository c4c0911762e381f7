"""Engines in a forked child."""

import textwrap

from builders import run_python

FORK = """
import atexit, os, sys
import kkt_buffer
from kkt_buffer import buffer

path = sys.argv[1]
receipt = {"pos_id": "till-1", "fiscal_doc": "{}"}

def in_child(work):
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except kkt_buffer.BufferStorageError as error:
            os.write(1, f"{error}\\n".encode())
            os._exit(7)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
"""


class TestFork:
    def test_idle(self, path):
        """After a fork of an idle parent, both go on, and each sees what the other has committed."""
        program = """
            engine = buffer.init_buffer_db(path)
            buffer.insert_receipt(receipt)
            buffer.get_buffer_status()
            for _ in range(3):
                assert in_child(lambda: buffer.insert_receipt(receipt)) == 0
                buffer.insert_receipt(receipt)
            print(buffer.get_buffer_status().pending)
        """
        assert run_python(FORK + textwrap.dedent(program), path).stdout == "7\n"

    def test_inside_transaction(self, path):
        """A child born inside a transaction is refused before anything is acknowledged; the parent is not harmed."""
        program = """
            engine = buffer.init_buffer_db(path)

            def go_on():
                buffer.insert_receipt(receipt)

            def start_afresh():
                buffer.init_buffer_db(path)

            with buffer.transaction() as session:
                buffer.insert_receipt(receipt)
                assert in_child(go_on) == 7
                assert in_child(start_afresh) == 7
                # A child that knows nothing of the buffer: it unwinds, tidies up, and exits in the ordinary way.
                child = os.fork()
                if child == 0:
                    atexit.register(buffer.close_buffer_db)
                    raise SystemExit
                assert os.waitpid(child, 0)[1] == 0
            print(buffer.get_buffer_status().pending)
            assert in_child(lambda: buffer.insert_receipt(receipt)) == 0
            print(buffer.get_buffer_status().pending)
        """
        done = run_python(FORK + textwrap.dedent(program), path)
        said = done.stdout.splitlines()
        assert said[-2:] == ["1", "2"]
        assert all("was in use in the parent process at the moment of the fork" in line for line in said[:-2])
        assert len(said) == 4

    def test_commit_in_child(self, path):
        """A child that goes on inside the parent's transaction cannot commit it."""
        program = """
            engine = buffer.init_buffer_db(path)
            transaction = buffer.transaction()
            transaction.__enter__()
            buffer.insert_receipt(receipt)
            assert in_child(lambda: transaction.__exit__(None, None, None)) == 7
            transaction.__exit__(None, None, None)
            print(buffer.get_buffer_status().pending)
        """
        assert run_python(FORK + textwrap.dedent(program), path).stdout.endswith("\n1\n")

    def test_closed_in_child(self, path):
        """A child that closes the parent's connection leaves the parent's files and locks alone."""
        program = """
            engine = buffer.init_buffer_db(path)
            with engine.connect() as connection:
                driver = connection.connection.driver_connection
                assert in_child(lambda: (driver.close(), driver.total_changes)) == 0  # an error, had it been closed
                buffer.insert_receipt(receipt)
            print(buffer.get_buffer_status().pending, os.path.getsize(path + "-wal") > 0)
        """
        assert run_python(FORK + textwrap.dedent(program), path).stdout == "1 True\n"

    def test_memory(self):
        """A database in memory does not come along: what the child wrote there, nobody would ever see."""
        program = """
            engine = buffer.init_buffer_db(":memory:")
            assert in_child(lambda: buffer.insert_receipt(receipt)) == 7
            buffer.insert_receipt(receipt)
            print(buffer.get_buffer_status().pending)
        """
        assert run_python(FORK + textwrap.dedent(program), "-").stdout.endswith("\n1\n")

    def test_closed_before(self, path):
        """Closing before the fork, the classic rule, works as ever."""
        program = """
            buffer.init_buffer_db(path)
            buffer.insert_receipt(receipt)
            buffer.close_buffer_db()
            assert in_child(lambda: (buffer.init_buffer_db(path), buffer.insert_receipt(receipt))) == 0
            buffer.init_buffer_db(path)
            print(buffer.get_buffer_status().pending)
        """
        assert run_python(FORK + textwrap.dedent(program), path).stdout == "2\n"
