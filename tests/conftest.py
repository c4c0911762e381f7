"""The databases that tests work on: each one was made by the migrations."""

import contextlib
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import servers
from builders import Clock, fill, unproven
from sqlalchemy import Engine

from kkt_buffer import ReceiptRepository, create_buffer_engine, testing, upgrade

pytest_plugins = ["not_proven"]

# A run that was started in the background ignores Control-C, and the programs that it starts would ignore it too.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests repeat what quick ones cover; measured, they would take twice as long. The demo has no quick ones."""
    for item in items:
        if item.get_closest_marker("slow") and item.path.name != "test_demo.py":
            item.add_marker("no_cover")


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


@pytest.fixture(scope="session")
def migrated_schema(server: servers.Server) -> Iterator[servers.Template]:
    """A migrated buffer on the server, to be copied."""
    with contextlib.closing(servers.Template(server, migrate)) as template:
        yield template


@pytest.fixture
def postgresql_url(server: servers.Server) -> Iterator[str]:
    """The URL of a new, empty schema on a server, dropped after the test."""
    with server.schema() as schema:
        yield server.url(schema=schema)


@pytest.fixture
def server_buffer(server: servers.Server, migrated_schema: servers.Template) -> Iterator[str]:
    """The URL of a migrated, empty buffer on a server."""
    with migrated_schema.copy() as schema:
        yield server.url(schema=schema)


@pytest.fixture
def server_engine(server_buffer: str, open_engine: Callable[..., Engine]) -> Engine:
    return open_engine(server_buffer)


# The fixture that opens a migrated, empty buffer, for each database that the package supports.
ENGINES = {"sqlite": "memory_engine", "postgresql": "server_engine"}


@pytest.fixture(params=ENGINES.values(), ids=ENGINES)
def engine(request: pytest.FixtureRequest) -> Engine:
    """A migrated, empty buffer: what holds on every database is tested on every database."""
    engine: Engine = request.getfixturevalue(request.param)
    return engine


@pytest.fixture
def repository(engine: Engine, clock: Clock) -> ReceiptRepository:
    return ReceiptRepository(engine, now=clock)


def migrate(path_or_url: Path | str) -> None:
    engine = create_buffer_engine(path_or_url)
    upgrade(engine)
    engine.dispose()


@pytest.fixture(scope="session")
def migrated_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated buffer that nobody has open, to be copied."""
    path = tmp_path_factory.mktemp("migrated") / "buffer.db"
    migrate(path)
    return path


@pytest.fixture
def path(migrated_file: Path, tmp_path: Path) -> Path:
    """A migrated, empty buffer on disk."""
    return Path(shutil.copy(migrated_file, tmp_path / "buffer.db"))


@pytest.fixture
def used(path: Path) -> Path:
    """A buffer on disk with a receipt of every status, that nobody has open."""
    fill(path)
    return path


@pytest.fixture
def file_engine(path: Path, open_engine: Callable[..., Engine]) -> Engine:
    return open_engine(path)


@pytest.fixture
def file_repository(file_engine: Engine, clock: Clock) -> ReceiptRepository:
    return ReceiptRepository(file_engine, now=clock)


# What another process, or a command, opens: a migrated, empty buffer, by its path or URL.
BUFFERS = {"sqlite": "path", "postgresql": "server_buffer"}


@pytest.fixture(params=BUFFERS.values(), ids=BUFFERS)
def buffer(request: pytest.FixtureRequest) -> str:
    """The path or URL of a migrated, empty buffer that several processes can open."""
    return str(request.getfixturevalue(request.param))


@pytest.fixture
def shared_engine(buffer: str, open_engine: Callable[..., Engine]) -> Engine:
    """An engine on `buffer`: unlike a buffer in memory, it lets readers in beside a writer."""
    return open_engine(buffer)


@pytest.fixture
def shared_repository(shared_engine: Engine, clock: Clock) -> ReceiptRepository:
    return ReceiptRepository(shared_engine, now=clock)


@pytest.fixture
def filled(buffer: str) -> str:
    """The path or URL of a buffer with a receipt of every status, that nobody has open."""
    fill(buffer)
    return buffer
