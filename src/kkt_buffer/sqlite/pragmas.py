"""The PRAGMAs of every connection, as data. They are applied when it is opened, and read back."""

from typing import NamedTuple

WAL_LIMIT = 1 << 20  # bytes
CACHE_SIZE = -64_000  # KiB, negative: a limit, not a reservation


class Pragma(NamedTuple):
    """A setting, the value that SQLite reports once it is set, and the reason for it."""

    name: str
    value: str | int
    reads: str | int
    reason: str


WAL = Pragma("journal_mode", "WAL", "wal", "readers and the writer do not block each other; one sync per commit")
MEMORY = Pragma("journal_mode", "MEMORY", "memory", "the only mode that a database in memory has")
DURABLE = (
    Pragma("synchronous", "FULL", 2, "a commit is on disk before it is acknowledged"),
    Pragma("fullfsync", 1, 1, "on macOS a plain fsync stops at the drive's cache"),
    Pragma("checkpoint_fullfsync", 1, 1, "the same, for checkpoints"),
    Pragma("wal_autocheckpoint", 100, 100, "a short WAL, so that a restart is quick"),
    Pragma("journal_size_limit", WAL_LIMIT, WAL_LIMIT, "a WAL that grew during a long read is truncated again (bytes)"),
)
COMMON = (
    Pragma("foreign_keys", 1, 1, "a dead letter belongs to a receipt"),
    Pragma("recursive_triggers", 1, 1, "REPLACE fires the delete triggers"),
    Pragma("cell_size_check", 1, 1, "a damaged page is detected when it is read"),
    Pragma("secure_delete", 1, 1, "pruned receipts contain personal data, which must not stay readable in the file"),
)
QUERY_ONLY = Pragma("query_only", 1, 1, "a monitor must not write")


def cache(size: int) -> Pragma:
    """The page cache of a connection."""
    return Pragma("cache_size", size, size, "set by the caller of create_buffer_engine")
