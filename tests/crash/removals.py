"""
Which syncs of a recording to leave out, each for a proof that the harness would notice, and where to look then.

SQLite syncs the WAL at the end of each commit; once more before a checkpoint writes to the database, which puts
nothing on disk that was not there; and after it has begun the WAL anew with another header, lest new frames stand
behind the old header.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from crash.operations import Recording, Sync, Truncate, Write


@dataclass(frozen=True)
class Removal:
    """Syncs to leave out, and the moments at which a power loss should do harm then."""

    syncs: list[Sync]
    moments: list[int]


def of_kind(recording: Recording, kind: str) -> Removal:
    """All syncs of one kind of files."""
    syncs = recording.syncs(kind)
    rest = recording.syncs()[recording.syncs().index(syncs[0]) :]
    if kind == "journal":
        # It is needed until the database is written, which is the next thing that happens.
        last = next(one for one in rest if recording.inodes[one.inode].kind == "database").ended
        return Removal(syncs, [one.began + 1 for one in recording.operations if syncs[0].began < one.began < last])
    return Removal(syncs, [one.began + 1 for one in recording.operations if one.began > syncs[0].began])


def wal_headers(recording: Recording) -> Removal:
    """The syncs of a new header over an old WAL, and the time until the first new commit is synced."""
    syncs, moments = [], []
    for sync, covered, following in _wal_syncs(recording):
        if _is_header(covered) and following is not None:
            syncs.append(sync)
            moments += [one.began + 1 for one in recording.operations if sync.ended < one.began <= following.began]
    return Removal(syncs, moments)


def wal_commits(recording: Recording) -> list[Removal]:
    """Single syncs with an acknowledgement of the same thread behind them, before the WAL is synced again."""
    return [
        Removal([sync], said)
        for sync, covered, following in _wal_syncs(recording)
        if covered and (said := _acknowledged(recording, sync, following))
    ]


def wal_checkpoints(recording: Recording) -> list[Removal]:
    """
    Commits that are followed by a checkpoint at once: either of two syncs would do, so both are left out.

    Not the first commit of a WAL: without older frames before it, which would hide what the checkpoint has written,
    nothing is lost.
    """
    syncs = list(_wal_syncs(recording))
    found = []
    for (_, before, _), (sync, covered, _), (again, covered_again, following) in zip(
        syncs, syncs[1:], syncs[2:], strict=False
    ):
        if covered and not covered_again and not _is_header(before) and not _acknowledged(recording, sync, again):
            said = _acknowledged(recording, again, following)
            found += [Removal([sync, again], said)] if said else []
    return found


def _acknowledged(recording: Recording, sync: Sync, following: Sync | None) -> list[int]:
    """The moment of the first acknowledgement of the thread that stands on this sync and on no later one."""
    until = recording.end if following is None else following.ended
    said = [one for one in recording.acknowledgements if one.thread == sync.thread and sync.ended < one.began < until]
    return [one.began + 1 for one in said[:1]]


def _is_header(covered: list[Write | Truncate]) -> bool:
    return [(0, 32)] == [(one.offset, len(one.data)) for one in covered if isinstance(one, Write)]


def _wal_syncs(recording: Recording) -> Iterator[tuple[Sync, list[Write | Truncate], Sync | None]]:
    """Each with what it puts on disk, and the next one of the same file."""
    syncs = recording.syncs("wal")
    for sync in syncs:
        same = [one for one in syncs if one.inode == sync.inode]
        before = max((one.began for one in same if one.began < sync.began), default=-1)
        covered = [
            one
            for one in recording.operations
            if isinstance(one, Write | Truncate) and one.inode == sync.inode and before < one.ended < sync.began
        ]
        yield sync, covered, next((one for one in same if one.began > sync.began), None)
