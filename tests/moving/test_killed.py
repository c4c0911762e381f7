"""A move that is killed leaves the target empty or whole, and the next one makes it whole."""

import shutil
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
from builders import PROOF, STATUSES, a_receipt, everything, start_python
from moving.rows import rows_of

from kkt_buffer import ReceiptRepository, check, create_buffer_engine

KILLS = 200 if PROOF else 8

# Moves PATH to URL, and prints how many steps that took: statements on the file, messages to the server. Dies after the
# step LAST.
MOVE = """
import os, signal, sys
from sqlalchemy import event
from kkt_buffer import create_buffer_engine
from kkt_buffer.move import move
from kkt_buffer.postgresql.connection import ServerConnection

path, url, last = sys.argv[1], sys.argv[2], int(sys.argv[3])
steps = 0

def step(*_):
    global steps
    steps += 1
    if steps == last:
        os.kill(os.getpid(), signal.SIGKILL)

def wait(self, *arguments):
    answer = wait_for_server(self, *arguments)
    step()
    return answer

source, target = create_buffer_engine(path), create_buffer_engine(url)
event.listen(source, "after_cursor_execute", step)
wait_for_server, ServerConnection.wait = ServerConnection.wait, wait
move(source, target)
print(steps)
"""


def why_refused(buffer):
    engine = create_buffer_engine(buffer)
    try:
        return ReceiptRepository(engine).why_refused()
    finally:
        engine.dispose()


@pytest.fixture
def heavy(path, file_repository):
    """A file with documents that are sent in many messages, that nobody has open."""
    for number in range(12):
        a_receipt(file_repository, STATUSES[number % 4], fiscal_doc={"n": number, "text": "x" * 40_000})
    file_repository.close()
    return path


@pytest.mark.slow
def test_killed(heavy, server, migrated_schema, tmp_path, moved):
    """Killed at any message and any row: the target is empty or whole, and a second run makes it whole."""
    expected = rows_of(heavy)

    def run(number, last):
        path = shutil.copy(heavy, tmp_path / f"killed {number}.db")
        with migrated_schema.copy() as schema:
            url = server.url(schema=schema)
            empty = everything(url)
            child = start_python(MOVE, path, url, last, stderr=subprocess.DEVNULL)
            printed, _ = child.communicate()
            assert child.returncode == -signal.SIGKILL if last else printed
            is_closed = any("trg_moved" in line for line in everything(path))
            found = everything(url)
            is_whole = found != empty
            assert is_closed or not is_whole
            if is_closed:
                assert is_whole or "a move to" in why_refused(path)  # it may have died before it noted the end
                assert (None if is_whole else "a move into this buffer has begun") == why_refused(url)
            assert is_whole is moved(path, url).is_repeated
            arrived = rows_of(url)
            assert rows_of(path) == arrived
            assert not is_whole or found == everything(url)
            assert expected | {"config": arrived["config"]} == arrived
            assert "it was moved to" in why_refused(path)
            assert why_refused(url) is None
            engine = create_buffer_engine(url)
            check(engine)
            engine.dispose()
            return int(printed or 0), (is_closed, is_whole)

    steps, _ = run(0, 0)
    lasts = sorted({1 + round((steps - 1) * number / (KILLS - 1)) for number in range(KILLS)})
    with ThreadPoolExecutor(2) as pool:
        found = [state for _, state in pool.map(run, range(1, len(lasts) + 1), lasts)]
    print(f"{len(lasts)} kills in {steps} steps: {[(state, found.count(state)) for state in sorted(set(found))]}")
    assert {(False, False), (True, False), (True, True)} == set(found)
