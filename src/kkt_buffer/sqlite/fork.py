"""
The open buffers of this process: one SQLite library for each file, and what becomes of them in a fork.

A connection must not be used after a fork (https://www.sqlite.org/howtocorrupt.html, section 2.6): SQLite in the child
assumes that it holds locks that only the parent has. So idle connections are closed before a fork. If a connection was
in use, the child may not use the buffer. No connection is opened during a fork.
"""

import os
import threading
import weakref
from types import ModuleType
from typing import Protocol

from sqlalchemy import Engine

from kkt_buffer.errors import BufferStorageError
from kkt_buffer.sqlite.connection import GuardedConnection, Identity
from kkt_buffer.sqlite.driver import is_same_library
from kkt_buffer.sqlite.gate import WriteGate


class Forkable(Protocol):
    """The open resources of an engine."""

    driver: ModuleType
    gate: WriteGate
    connections: "weakref.WeakSet[GuardedConnection]"
    identity: Identity | None  # of the file; None: in memory
    inherited: bool

    def close_idle(self, engine: Engine) -> None:
        """Close the connections that are not in use."""

    def start_afresh(self, engine: Engine) -> None:
        """Replace the pools in the child: another thread of the parent may have been using them."""


_open: "weakref.WeakKeyDictionary[Engine, Forkable]" = weakref.WeakKeyDictionary()
_inherited_files: set[Identity] = set()
lock = threading.RLock()  # held while a connection is opened


def watch(engine: Engine, database: Forkable) -> None:
    """
    Handle forks for this engine from now on.

    Raises `BufferStorageError` if an engine of this process uses the file through another SQLite library: POSIX locks
    belong to the process, so each library would cancel the locks of the other.
    """
    with lock:
        for other in list(_open.values()):
            is_same_file = other.identity is not None and other.identity == database.identity
            if is_same_file and not is_same_library(other.driver, database.driver):
                raise BufferStorageError(
                    f"{database} is in use in this process through {other.driver.__name__}, and "
                    f"{database.driver.__name__} is another SQLite library: they would cancel each other's locks. "
                    "Nothing was opened. Give all engines of a process the same driver."
                )
        _open[engine] = database


def is_inherited(identity: Identity | None) -> bool:
    """Whether the parent had this file in use when it forked."""
    return identity in _inherited_files


def _before() -> None:
    lock.acquire()
    for engine, database in list(_open.items()):
        database.close_idle(engine)


def _after_in_child() -> None:
    import ctypes  # noqa: PLC0415 (slow to import, and few processes fork)

    for engine, database in list(_open.items()):
        database.start_afresh(engine)
        database.gate.forget()
        database.inherited = database.identity is None or bool(database.connections)
        if database.identity is not None and database.connections:
            _inherited_files.add(database.identity)
        for connection in database.connections:
            # Keep the connection for ever: freeing it, even at exit, would close it.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))
    lock.release()


os.register_at_fork(before=_before, after_in_parent=lock.release, after_in_child=_after_in_child)
