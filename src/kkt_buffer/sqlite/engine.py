"""`create`: an engine on an SQLite file or in memory, and what it was set to."""

import os
import re
from pathlib import Path
from types import ModuleType
from typing import Any

from sqlalchemy import (
    URL,
    Engine,
    QueuePool,
    create_engine,
    make_url,
)

from kkt_buffer.backend import OPTION, READ_ONLY
from kkt_buffer.sqlite.database import Database
from kkt_buffer.sqlite.driver import Driver, load_driver
from kkt_buffer.sqlite.pool import ThreadPool
from kkt_buffer.sqlite.pragmas import CACHE_SIZE, COMMON, DURABLE, WAL


def create(
    path_or_url: str | os.PathLike[str] | URL,
    *,
    read_only: bool,
    busy_timeout: float,
    driver: Driver | ModuleType | None = None,
    cache_size: int = CACHE_SIZE,
    **options: Any,  # noqa: ANN401 (passed on to create_engine)
) -> Engine:
    """Create an engine on a file or in memory, and connect once to check that it can be used."""
    module = load_driver(driver, writing=not read_only)
    path = file_of(path_or_url)
    if path is None and read_only:
        raise ValueError("read_only: an in-memory buffer that is read-only would stay empty")
    database = Database(module, path, read_only=read_only, busy_timeout=busy_timeout, cache_size=cache_size)
    engine = create_engine(
        URL.create("sqlite+pysqlite", database=":memory:" if path is None else str(path)),
        # Taken out of the options before the rest of them is passed on.
        execution_options={**options.pop("execution_options", {}), OPTION: database},
        **{"poolclass": QueuePool if {"max_overflow", "pool_timeout"} & options.keys() else ThreadPool} | options,
        creator=database.open,
        module=module,
    )
    database.watch(engine)
    try:
        with engine.connect():
            pass
    except BaseException:
        engine.dispose()
        raise
    return engine


def file_of(path_or_url: str | os.PathLike[str] | URL) -> Path | None:
    """The path with symbolic links resolved, because SQLite puts the WAL beside the real file; None: in memory."""
    if isinstance(path_or_url, str) and "://" in path_or_url:
        path_or_url = make_url(path_or_url)
    if isinstance(path_or_url, URL):
        url = path_or_url
        if url.get_backend_name() != "sqlite" or url.get_driver_name() != "pysqlite" or url.query:
            raise ValueError(
                "path_or_url: expected a path, or a URL like sqlite:////var/lib/shop/buffer.db or "
                f"postgresql+psycopg://USER@HOST/DATABASE, got {url!r}"
            )
        path_or_url = url.database or ":memory:"
    name = os.fspath(path_or_url)
    if isinstance(name, str) and re.match(r"[a-z0-9]+(\+[a-z0-9]+)?:/", name):
        raise ValueError("path_or_url: expected a path, or a URL with two slashes after its colon; nothing was made")
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise ValueError(f"path_or_url: expected the path of a file, got {name!r}")
    return None if name == ":memory:" else Path(os.path.realpath(name))


def pragmas(engine: Engine) -> dict[str, str | int]:
    """The PRAGMAs of a connection, read back."""
    with engine.execution_options(**{READ_ONLY: True}).connect() as connection:
        return {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()
            for name in (*(pragma.name for pragma in (WAL, *DURABLE, *COMMON)), "cache_size")
        }
