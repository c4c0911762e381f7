"""`create_buffer_engine`: open an engine on a buffer."""

import importlib
import os
import sys
from types import ModuleType
from typing import Any

from sqlalchemy import URL, Engine, make_url
from sqlalchemy.exc import ArgumentError

from kkt_buffer.backend import PLACE, with_query
from kkt_buffer.errors import BufferStorageError
from kkt_buffer.sqlite.driver import Driver

if sys.platform != "win32":  # pragma: no branch (no test runs there); Windows has no fcntl
    from kkt_buffer.sqlite import engine as sqlite

LOCK_TIMEOUT_SECONDS = 10.0
ANSWER_TIMEOUT_SECONDS = 30.0
MAX_NUMBER = 1_000_000


def create_buffer_engine(  # noqa: PLR0913 (all but one are keywords)
    path_or_url: str | os.PathLike[str] | URL,
    *,
    read_only: bool = False,
    busy_timeout: float = LOCK_TIMEOUT_SECONDS,
    answer_timeout: float = ANSWER_TIMEOUT_SECONDS,
    require_replicas: int = 0,
    driver: Driver | ModuleType | None = None,
    **engine_options: Any,  # noqa: ANN401 (passed on to create_engine)
) -> Engine:
    """
    Open an engine on a buffer: a path, an SQLite URL, `":memory:"`, or a URL of PostgreSQL.

    A missing file is created, with its folders, readable by the owner only; its schema is not (see
    `kkt_buffer.upgrade`). An in-memory buffer is shared by all threads of this process; `dispose()` deletes it. With
    `read_only`, the file must exist, and every write is refused. `busy_timeout` is the number of seconds that a writer
    waits for the write lock. `cache_size` limits the page cache of each connection, as SQLite's PRAGMA takes it
    (default -64000: 64 MB). `driver` is the SQLite library: `"sqlite3"`, `"pysqlite3"` or a module like them; by
    default the standard library's, or pysqlite3 if it is installed and only the standard one has the WAL-reset bug. A
    process must open one file through one library alone. Other options go to `sqlalchemy.create_engine`.

    The engine may be used after a fork. If a transaction was open at that moment (on a file: if any connection was in
    use), every use of it in the child raises `BufferStorageError`.

    On PostgreSQL (`postgresql+psycopg://…`, with the extra `postgresql`) the buffer is the first schema of
    `search_path`. A commit is refused if the settings of the server do not make it durable, and, with
    `require_replicas`, if not as many replicas have confirmed it. A connection is closed if its server does not answer
    for `answer_timeout` seconds, or if its write transaction is idle for so long; it must be more than `busy_timeout`.

    Raises `BufferStorageError` if the path cannot be used, SQLite is too old or the server refuses,
    `BufferDamagedError` if the file is not an SQLite database, `ValueError` for a URL or a driver of another kind.

    >>> engine = create_buffer_engine(":memory:")
    >>> engine.dispose()
    """
    if sys.platform == "win32":
        raise BufferStorageError("kkt-buffer runs on Linux and macOS; Windows has no flock. Nothing was opened.")
    url = url_of(path_or_url) if isinstance(path_or_url, str) and "://" in path_or_url else path_or_url
    if isinstance(url, URL) and url.get_backend_name() == "postgresql":
        options = {"busy_timeout": busy_timeout, "answer_timeout": answer_timeout, "require_replicas": require_replicas}
        engine: Engine = _postgresql().create(
            url.difference_update_query(_IN_QUERY),
            read_only=read_only,
            **(options | _options_in(url, require_replicas)),
            **engine_options,
        )
        return engine
    if require_replicas:
        raise ValueError("require_replicas: a file has no replicas; give the URL of a PostgreSQL server")
    return sqlite.create(url, read_only=read_only, busy_timeout=busy_timeout, driver=driver, **engine_options)


# Options that the URL of a server may have too, for commands.
_IN_QUERY = {"busy_timeout": float, "answer_timeout": float, "require_replicas": int}


def _options_in(url: URL, require_replicas: int) -> dict[str, float]:
    found: dict[str, float] = {}
    for key in url.query.keys() & _IN_QUERY:
        try:
            found[key] = _IN_QUERY[key](url.query[key])
        except (TypeError, ValueError):
            found[key] = -1
        if not 0 <= found[key] <= MAX_NUMBER:
            whole = "whole " * (_IN_QUERY[key] is int)
            raise ValueError(f"{key}={url.query[key]} in the URL: expected a {whole}number from 0 to {MAX_NUMBER}")
    if "require_replicas" in found:
        found["require_replicas"] = max(require_replicas, found["require_replicas"])
    return found


def url_of(text: str) -> URL:
    """The URL in a text. Raises `ValueError`, which does not show the password, if it cannot be read."""
    if text.partition("://")[2].partition("/")[0].count("@") > 1:
        raise ValueError(
            "path_or_url: this URL has more than one @. In a password, write it as %40. Nothing was opened."
        )
    try:
        return make_url(text)
    except (ValueError, ArgumentError):  # SQLAlchemy takes whatever follows the colon for the number of a port
        raise ValueError(
            "path_or_url: this URL cannot be read. Nothing was opened. Write postgresql+psycopg://USER@HOST/DATABASE; "
            "several hosts as postgresql+psycopg://USER@/DATABASE?host=HOST1:5432&host=HOST2:5432"
        ) from None


def public_url(url: URL) -> URL:
    """The URL without what may be a secret, but for its password, which SQLAlchemy hides when the URL is printed."""
    return with_query(url, PLACE | {"require_replicas", "target_session_attrs"})


def _postgresql() -> ModuleType:
    try:
        return importlib.import_module("kkt_buffer.postgresql.engine")
    except ModuleNotFoundError as error:
        raise BufferStorageError(
            "PostgreSQL needs a driver that is not installed here. Nothing was opened. Install it: "
            "pip install 'psycopg[binary]>=3.3.6'"
        ) from error
