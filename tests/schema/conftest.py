"""What the tests of the schema begin with."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import predecessor
import pytest
from sqlalchemy import Engine

from kkt_buffer import create_buffer_engine


@pytest.fixture
def opened() -> Iterator[Callable[..., Engine]]:
    """Like `create_buffer_engine`, but each engine is closed after the test."""
    with contextlib.ExitStack() as stack:

        def opened(*arguments: object, **options: object) -> Engine:
            engine = create_buffer_engine(*arguments, **options)  # type: ignore[arg-type]
            stack.callback(engine.dispose)
            return engine

        yield opened


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A file of the sqlite3 version without a receipt."""
    return predecessor.make(tmp_path / "old.db")
