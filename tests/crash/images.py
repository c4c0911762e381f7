"""
Disk images: of all that a power loss may leave at one moment, the one that a seed stands for.

What is pending is dropped, kept, put into another order, or torn at sectors of 512 bytes, for each file and folder in
a way of its own. Seeds 0 to 3 are the corners: nothing or all of the data, with nothing or all of the names.
"""

import hashlib
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from crash.disk import Disk, Effect, rename, resize, write
from crash.operations import Truncate, Write

SECTOR = 512
CORNERS = 4

Image = dict[str, bytes | None]  # by path, folders before what they hold; None is a folder
Choice = Callable[[random.Random, int], list[bool]]


def _some(chance: float) -> Choice:
    return lambda random_, count: [random_.random() < chance for _ in range(count)]


def _one(random_: random.Random, count: int) -> list[bool]:
    chosen = random_.randrange(count)
    return [number == chosen for number in range(count)]


def _prefix(random_: random.Random, count: int) -> list[bool]:
    kept = random_.randint(0, count)
    return [number < kept for number in range(count)]


def _none(_random: random.Random, count: int) -> list[bool]:
    return [False] * count


def _not(choice: Choice) -> Choice:
    return lambda random_, count: [not chosen for chosen in choice(random_, count)]


def _last(_random: random.Random, count: int) -> list[bool]:
    return [number == count - 1 for number in range(count)]


_all = _not(_none)
CHOICES = [
    _none,
    _all,
    _prefix,
    _not(_prefix),
    _one,
    _not(_one),
    _last,
    _not(_last),
    _some(0.1),
    _some(0.5),
    _some(0.9),
]
CORNER_CHOICES = [(_none, _none), (_all, _all), (_none, _all), (_all, _none)]


def draw(disk: Disk, seed: int) -> Image:
    """One image of the disk at its present moment. The same seed gives the same image."""
    random_ = random.Random(seed)
    corner = CORNER_CHOICES[seed] if seed < CORNERS else None
    image: Image = {}

    def visit(number: int, path: str) -> None:
        if disk.recording.inodes[number].entries is None:
            image[path] = bytes(_content(disk, number, random_, corner and corner[0]))
            return
        if path:
            image[path] = None
        entries = dict(disk.entries[number])
        effects = disk.pending[number]
        # Names mostly do get to the disk; without them there is not much to see.
        choice = corner[1] if corner else random_.choice([_all, _all, _none, *CHOICES])
        for effect, kept in zip(effects, choice(random_, len(effects)) if effects else [], strict=True):
            if kept or effect.certain:
                rename(entries, effect.operation)
        for name, child in sorted(entries.items()):
            visit(child, f"{path}/{name}" if path else name)

    visit(0, "")
    if corner is None and random_.random() < 0.1 and disk.recording.database in image:
        image[disk.recording.database + "-shm"] = random_.randbytes(32768)
    return image


def _content(disk: Disk, number: int, random_: random.Random, choice: Choice | None) -> bytearray:
    content = disk.contents[number].copy()
    effects = disk.pending[number]
    if not effects:
        return content
    if choice is None:
        choice = random_.choice(CHOICES)
        if random_.random() < 0.4:
            effects = [piece for effect in effects for piece in _torn(effect)]
        order = [effect for effect in effects if not effect.certain] if random_.random() < 0.2 else []
        if order and len(order) == len(effects):
            effects = random_.sample(effects, len(effects))
    grown = random_.random() < 0.2
    for effect, kept in zip(effects, choice(random_, len(effects)), strict=True):
        operation = effect.operation
        if kept or effect.certain:
            write(content, operation)
        elif grown and isinstance(operation, Write):
            # The new size is on disk, and the data is not.
            resize(content, max(len(content), operation.offset + len(operation.data)))
    return content


def _torn(effect: Effect) -> list[Effect]:
    """The same write, sector by sector."""
    operation = effect.operation
    if isinstance(operation, Truncate) or effect.certain:
        return [effect]
    pieces = []
    at = 0
    while at < len(operation.data):
        offset = operation.offset + at
        length = SECTOR - offset % SECTOR
        pieces.append(Effect(replace(operation, offset=offset, data=operation.data[at : at + length])))
        at += length
    return pieces


def fingerprint(image: Image) -> bytes:
    """Tells one image from another."""
    digest = hashlib.blake2b(digest_size=12)
    for path, content in image.items():
        digest.update(f"{path}\0{-1 if content is None else len(content)}\0".encode())
        digest.update(content or b"")
    return digest.digest()


def put(image: Image, folder: Path) -> None:
    """Make it real, in an empty folder."""
    for path, content in image.items():
        if content is None:
            (folder / path).mkdir()
        else:
            (folder / path).write_bytes(content)
