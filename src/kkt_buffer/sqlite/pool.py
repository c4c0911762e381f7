"""The connection pool of an engine, without a lock that an exception could leave locked."""

import contextlib
from collections import deque
from typing import Any

from sqlalchemy import Pool
from sqlalchemy.pool import ConnectionPoolEntry

IDLE_CONNECTIONS = 8


class ThreadPool(Pool):
    """
    As many connections as there are threads in use; a few stay open while idle, and the last used is reused first.

    An exception that is raised asynchronously in a thread can leave the Condition of SQLAlchemy's QueuePool locked, and
    then every other thread waits for ever. The operations of a deque cannot be interrupted.
    """

    __module__ = Pool.__module__  # so that it uses the logger of SQLAlchemy's pools

    def __init__(self, creator: Any, pool_size: int = IDLE_CONNECTIONS, **options: Any) -> None:  # noqa: ANN401 (SQLAlchemy's)
        super().__init__(creator, **options)
        self._pool_size = pool_size
        self._idle: deque[ConnectionPoolEntry] = deque()

    def _do_get(self) -> ConnectionPoolEntry:
        try:
            return self._idle.pop()
        except IndexError:
            return self._create_connection()

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        if len(self._idle) < self._pool_size:
            self._idle.append(record)
        else:
            record.close()

    def recreate(self) -> "ThreadPool":
        """Create an empty pool with the same options."""
        return type(self)(
            self._creator,
            self._pool_size,
            recycle=self._recycle,
            echo=self.echo,
            logging_name=self._orig_logging_name,
            reset_on_return=self._reset_on_return,
            _dispatch=self.dispatch,
            dialect=self._dialect,
        )

    def dispose(self) -> None:
        """Close the idle connections."""
        with contextlib.suppress(IndexError):
            while True:
                self._idle.pop().close()

    def status(self) -> str:
        """The number of idle connections, as text."""
        return f"{len(self._idle)} idle connections"
