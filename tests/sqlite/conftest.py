"""What is tested in this folder is SQLite's alone."""

import pytest
from sqlalchemy import Engine


@pytest.fixture
def engine(memory_engine: Engine) -> Engine:
    """A migrated buffer in memory."""
    return memory_engine
