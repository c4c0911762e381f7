"""
Every operation in any order, with restarts and a clock that jumps, against a model in plain Python.

After each step the database must say what the model says, and keep every invariant. `KKT_BUFFER_PROOF=1` goes deeper.
"""

import contextlib
import tempfile
from pathlib import Path

import pytest
from builders import PROOF
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test
from stress.machine import BufferMachine

# A step on a server takes several times as long.
HISTORIES = {"sqlite": 2000 if PROOF else 30, "postgresql": 500 if PROOF else 8}


@contextlib.contextmanager
def new_file():
    """The path of a buffer, which the upgrade makes."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "buffer.db"


@pytest.fixture(params=HISTORIES)
def engine_name(request):
    return request.param


@pytest.fixture
def new_buffer(engine_name, request):
    """What makes an empty buffer for each history, and removes it."""
    if engine_name == "sqlite":
        return new_file
    server, template = map(request.getfixturevalue, ("server", "migrated_schema"))

    @contextlib.contextmanager
    def new_schema():
        with template.copy() as schema:
            yield server.url(schema=schema)

    return new_schema


@pytest.mark.one_python
@pytest.mark.no_cover
def test_buffer(engine_name, new_buffer):
    machine = type("Machine", (BufferMachine,), {})  # counts its own steps
    histories = HISTORIES[engine_name]
    run_state_machine_as_test(
        lambda: machine(new_buffer),
        settings=settings(
            max_examples=histories,
            stateful_step_count=50,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    print(f"{machine.steps} steps")
    assert machine.steps >= 28 * histories
