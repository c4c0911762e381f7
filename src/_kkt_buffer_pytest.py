"""
The pytest plugin: the fixtures `kkt_buffer` and `kkt_clock`.

It is a module beside the package because pytest imports it in every run of every project that has kkt-buffer installed,
before coverage is measured: it must not import the package (and SQLAlchemy) until a test asks for a buffer.
"""

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kkt_buffer import ReceiptRepository
    from kkt_buffer.testing import Clock


@pytest.fixture
def kkt_clock() -> "Clock":
    """The clock of `kkt_buffer`. It stands still until a test calls `advance(seconds)`."""
    from kkt_buffer.testing import Clock  # noqa: PLC0415 (see above)

    return Clock()


@pytest.fixture
def kkt_buffer(kkt_clock: "Clock") -> "Iterator[ReceiptRepository]":
    """An empty buffer in memory, with the schema of this release. Its time is that of `kkt_clock`."""
    from kkt_buffer import ReceiptRepository  # noqa: PLC0415 (see above)
    from kkt_buffer.testing import memory_engine  # noqa: PLC0415 (see above)

    engine = memory_engine()
    yield ReceiptRepository(engine, now=kkt_clock)
    engine.dispose()
