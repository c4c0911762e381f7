"""The databases that tests work on: each one was made by the migrations."""

import contextlib
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import servers
from builders import STATUSES, Clock, a_receipt, an_id, unproven
from sqlalchemy import Engine

from kkt_buffer import ReceiptRepository, create_buffer_engine, testing, upgrade

pytest_plugins = ["not_proven"]

# A run that was started in the background ignores Control-C, and the programs that it starts would ignore it too.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def clock(kkt_clock: Clock) -> Clock:
    return kkt_clock


@pytest.fixture
def open_engine() -> Iterator[Callable[..., Engine]]:
    """`create_buffer_engine`; the engines that it has made are disposed of after the test."""
    with contextlib.ExitStack() as stack:

        def opened(*arguments: object, **options: object) -> Engine:
            engine = create_buffer_engine(*arguments, **options)  # type: ignore[arg-type]
            stack.callback(engine.dispose)
            return engine

        yield opened


@pytest.fixture
def memory_engine() -> Iterator[Engine]:
    """A migrated SQLite buffer in memory, for what needs no file."""
    engine = testing.memory_engine()
    yield engine
    engine.dispose()


@pytest.fixture(scope="session")
def server() -> Iterator[servers.Server]:
    """A PostgreSQL server of this process of the run, for all its tests."""
    if servers.programs() is None:
        unproven(f"PostgreSQL: {servers.reason()}")
    with servers.Server() as server:
        yield server


@pytest.fixture
def postgresql_url(server: servers.Server) -> Iterator[str]:
    """The URL of a new schema on a server, dropped after the test."""
    schema = f"test_{an_id()[:8]}"
    server.execute(f"CREATE SCHEMA {schema}")
    yield server.url(schema=schema)
    server.execute(f"DROP SCHEMA {schema} CASCADE")


# The fixture that opens a migrated, empty buffer, for each database that the package supports.
ENGINES = {"sqlite": "memory_engine"}


@pytest.fixture(params=ENGINES.values(), ids=ENGINES)
def engine(request: pytest.FixtureRequest) -> Engine:
    """A migrated, empty buffer: what holds on every database is tested on every database."""
    engine: Engine = request.getfixturevalue(request.param)
    return engine


@pytest.fixture
def repository(engine: Engine, clock: Clock) -> ReceiptRepository:
    return ReceiptRepository(engine, now=clock)


@pytest.fixture(scope="session")
def migrated_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated buffer that nobody has open, to be copied."""
    path = tmp_path_factory.mktemp("migrated") / "buffer.db"
    engine = create_buffer_engine(path)
    upgrade(engine)
    engine.dispose()
    return path


@pytest.fixture
def path(migrated_file: Path, tmp_path: Path) -> Path:
    """A migrated, empty buffer on disk."""
    return Path(shutil.copy(migrated_file, tmp_path / "buffer.db"))


@pytest.fixture
def used(path: Path) -> Path:
    """A buffer on disk with a receipt of every status, that nobody has open."""
    engine = create_buffer_engine(path)
    repository = ReceiptRepository(engine, now=Clock())
    for status in STATUSES:
        a_receipt(repository, status)
    engine.dispose()
    return path


@pytest.fixture
def file_engine(path: Path, open_engine: Callable[..., Engine]) -> Engine:
    return open_engine(path)


@pytest.fixture
def file_repository(file_engine: Engine, clock: Clock) -> ReceiptRepository:
    return ReceiptRepository(file_engine, now=clock)
