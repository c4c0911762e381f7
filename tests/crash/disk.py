"""
What a power loss may leave of a recording: what is certainly on disk at a moment, and what is not yet.

The rules are those of POSIX, and no kinder: a file's data is certain once a sync of that file has ended that began
after the write had ended; a name, once a sync of its folder has. Syncing a file does nothing for its name.
"""

import heapq
from dataclasses import dataclass

from crash.operations import Acknowledgement, Naming, Operation, Recording, Sync, Truncate, Write


@dataclass
class Effect:
    """A change that has begun."""

    operation: Write | Truncate | Naming
    certain: bool = False


class Disk:
    """The disk as a recording goes on: by inode, what is certain, and `pending` what has begun since."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.contents = {
            number: bytearray(inode.content) for number, inode in recording.inodes.items() if inode.entries is None
        }
        self.entries = {
            number: dict(inode.entries) for number, inode in recording.inodes.items() if inode.entries is not None
        }
        self.pending: dict[int, list[Effect]] = {number: [] for number in recording.inodes}
        self._steps: list[tuple[float, int, Operation]] = []
        for order, one in enumerate(recording.operations):
            if not isinstance(one, Acknowledgement):
                self._steps.append((one.ended if isinstance(one, Sync) else one.began, order, one))
        heapq.heapify(self._steps)

    def advance(self, moment: float) -> None:
        """Go on to just before `moment`."""
        while self._steps and self._steps[0][0] < moment:
            operation = heapq.heappop(self._steps)[2]
            if isinstance(operation, Sync):
                self._sync(operation)
            else:
                self.pending[operation.inode].append(Effect(operation))

    def _sync(self, sync: Sync) -> None:
        effects = self.pending[sync.inode]
        for effect in effects:
            effect.certain = effect.certain or effect.operation.ended < sync.began
        # One that is certain stays behind one that is not, if that began before it.
        while effects and effects[0].certain:
            operation = effects.pop(0).operation
            if isinstance(operation, Naming):
                rename(self.entries[operation.inode], operation)
            else:
                write(self.contents[operation.inode], operation)


def rename(entries: dict[str, int], naming: Naming) -> None:
    for name, number in naming.entries.items():
        if number is None:
            entries.pop(name, None)
        else:
            entries[name] = number


def write(content: bytearray, operation: Write | Truncate) -> None:
    if isinstance(operation, Truncate):
        resize(content, operation.size)
        return
    end = operation.offset + len(operation.data)
    if len(content) < operation.offset:
        resize(content, operation.offset)
    content[operation.offset : end] = operation.data


def resize(content: bytearray, size: int) -> None:
    """Cut, or fill up with zeros."""
    if size <= len(content):
        del content[size:]
    else:
        content.extend(bytes(size - len(content)))
