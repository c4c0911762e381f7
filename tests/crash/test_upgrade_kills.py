"""An upgrade or downgrade that is killed leaves the old schema or the new one, whole, and the next one succeeds."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor

import predecessor
import pytest
from alembic import command
from builders import a_receipt, run_python, start_python

from kkt_buffer import ReceiptRepository, check, create_buffer_engine, migrate, upgrade

PROOF = bool(os.environ.get("KKT_BUFFER_PROOF"))
KILLS = 100 if PROOF else 6

# Migrates PATH to TARGET and prints how many statements that took; dies within the statement number LAST, or up to
# DELAY seconds after it began. With the FAULT, each statement commits by itself.
MIGRATION = """
import signal, sys
from alembic import command
from sqlalchemy import event
from kkt_buffer import create_buffer_engine, migrate
from kkt_buffer.sqlite import connection as layer

path, direction, target, last, delay, fault = sys.argv[1:7]
last, delay, seen = int(last), float(delay), 0

def count(statement):
    global seen
    seen += 1
    if seen == last:
        signal.setitimer(signal.ITIMER_REAL, delay)  # nobody handles SIGALRM: it is the end

if fault == "every statement by itself":
    def begin(self, *, write):
        self.in_write = write
    layer.GuardedConnection.begin = begin

database = create_buffer_engine(path)
event.listen(database, "checkout", lambda connection, *_: connection.set_trace_callback(count))
getattr(command, direction)(migrate.alembic_config(database), target)
database.dispose()
print(seen)
"""


def migrated(engine, target, direction="upgrade"):
    getattr(command, direction)(migrate.alembic_config(engine), target)


def busy(path, target):
    """A buffer with receipts of every status, at the schema of `target`."""
    engine = create_buffer_engine(path)
    upgrade(engine)
    repository = ReceiptRepository(engine)
    for status in ("pending", "syncing", "synced", "failed") * 5:
        a_receipt(repository, status)
    if target != migrate.revisions()[-1]:
        migrated(engine, target, "downgrade")
    engine.dispose()


def empty(path, target):
    engine = create_buffer_engine(path)
    if target:
        migrated(engine, target)
    engine.dispose()


# What there is before, and the step that is killed: its direction and its target.
STEPS = {
    "adoption": (lambda path: predecessor.make(path, 200), "upgrade", "0001"),
    "adoption to the end": (lambda path: predecessor.make(path, 200), "upgrade", "head"),
    "0001 up": (lambda path: empty(path, None), "upgrade", "0001"),
    "0002 up": (lambda path: busy(path, "0001"), "upgrade", "0002"),
    "0003 up": (lambda path: busy(path, "0002"), "upgrade", "0003"),
    "0003 down": (lambda path: busy(path, "0003"), "downgrade", "0002"),
    "0002 down": (lambda path: busy(path, "0002"), "downgrade", "0001"),
    "0001 down": (lambda path: empty(path, "0001"), "downgrade", "base"),
}


def state(path):
    """Every object of the schema, and every row but for what tells when or by which chance."""
    with contextlib.closing(predecessor.driver.connect(path)) as db:
        assert ("ok",) == db.execute("PRAGMA integrity_check").fetchone()
        objects = sorted(db.execute("SELECT type, name, sql FROM sqlite_master").fetchall(), key=str)
        columns = {
            "buffer_events": "event_type, receipt_id, metadata",
            "config": "key, value",
            "dlq": "id, original_receipt_id, resolved_by",
        }
        rows = {
            name: db.execute(f"SELECT {columns.get(name, '*')} FROM {name} ORDER BY 1").fetchall()
            for kind, name, _ in objects
            if kind == "table"
        }
        return objects, rows


class Step:
    """One migration of one file, to be repeated and killed."""

    def __init__(self, folder, name):
        self.make, self.direction, self.target = STEPS[name]
        self.folder = folder
        self.old = folder / "old.db"
        self.make(self.old)
        self.before = state(self.old)
        done = self.copy("whole")
        self.statements = int(run_python(MIGRATION, done, self.direction, self.target, 0, 0, "none").stdout)
        self.after = state(done)
        assert self.before != self.after

    def copy(self, name):
        with contextlib.closing(predecessor.driver.connect(self.old)) as db:  # its WAL too
            path = self.folder / f"{name}.db"
            db.execute("VACUUM INTO ?", (str(path),))
        shutil.copymode(self.old, path)
        return path

    def kill(self, number, of, fault="none"):
        """Kill it at a moment of its run; return the file."""
        chance = random.Random(number)
        last = 1 + round((self.statements - 1) * number / (of - 1))
        path = self.copy(f"killed {number}")
        delay = chance.choice((0.00001, 0.0005, 0.002))
        child = start_python(
            MIGRATION, path, self.direction, self.target, last, delay, fault, stderr=subprocess.DEVNULL
        )
        child.communicate()
        assert child.returncode in {0, -signal.SIGALRM}
        return path, child.returncode != 0


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_killed(tmp_path, name):
    """Killed at moments spread over its whole run, the last of them inside COMMIT."""
    step = Step(tmp_path, name)
    found = {"before": 0, "after": 0}
    killed = 0
    with ThreadPoolExecutor(2) as pool:
        for path, was_killed in pool.map(lambda number: step.kill(number, KILLS), range(KILLS)):
            killed += was_killed
            result = state(path)
            assert result in (step.before, step.after)
            found["before" if result == step.before else "after"] += 1
            engine = create_buffer_engine(path)
            if step.direction == "downgrade":
                migrated(engine, step.target, "downgrade")
                assert state(path) == step.after
            upgrade(engine)
            check(engine)
            engine.dispose()
    print(f"{name}: {step.statements} statements, {killed} of {KILLS} killed, {found}")
    assert killed > KILLS // 2
    assert found["before"]


def test_half_made_is_noticed(tmp_path):
    """The same with every statement committed by itself leaves something in between, and this test sees it."""
    step = Step(tmp_path, "0002 up")
    states = [state(step.kill(number, 6, "every statement by itself")[0]) for number in range(1, 5)]
    assert any(found not in (step.before, step.after) for found in states)
