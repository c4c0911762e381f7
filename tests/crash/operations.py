"""What was done to the files of one folder, and what was acknowledged in between, in the order of their moments."""

import re
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Inode:
    """A file or a folder, as it was found or made; `path` is its name then, from the recorded folder on."""

    number: int
    path: str
    content: bytes = b""
    entries: dict[str, int] | None = None  # of a folder

    @property
    def kind(self):
        """What its syncs are for."""
        if self.entries is not None:
            return "folder"
        suffix = re.search(r"-(wal|journal|gate)$", self.path)
        return suffix.group(1) if suffix else "database"


@dataclass(frozen=True)
class Operation:
    """A system call from its beginning to its end. In between it may have had its effect or not."""

    began: int
    ended: int
    thread: int


@dataclass(frozen=True)
class Write(Operation):
    inode: int
    offset: int
    data: bytes


@dataclass(frozen=True)
class Truncate(Operation):
    inode: int
    size: int


@dataclass(frozen=True)
class Naming(Operation):
    """A change of a folder's entries, all at once: a name is given to an inode, or to none any more."""

    inode: int
    entries: dict[str, int | None]


@dataclass(frozen=True)
class Sync(Operation):
    """Puts on disk what had ended before it began; once it has ended, that is certain."""

    inode: int


@dataclass(frozen=True)
class Acknowledgement(Operation):
    """The facts that each of some transactions has changed."""

    transactions: list[dict[str, object]]


@dataclass
class Recording:
    """Inode 0 is the recorded folder. Everything that was there at first is on disk."""

    database: str
    inodes: dict[int, Inode] = field(default_factory=dict)
    operations: list[Operation] = field(default_factory=list)

    def syncs(self, *kinds):
        """The syncs of these kinds of files, or all."""
        found = [one for one in self.operations if isinstance(one, Sync)]
        return [one for one in found if not kinds or self.inodes[one.inode].kind in kinds]

    @property
    def acknowledgements(self):
        return [one for one in self.operations if isinstance(one, Acknowledgement)]

    @property
    def end(self):
        """After everything."""
        return max(one.ended for one in self.operations) + 1

    def without(self, *syncs):
        """What it would be, had these never been called."""
        gone = set(map(id, syncs))
        return replace(self, operations=[one for one in self.operations if id(one) not in gone])
