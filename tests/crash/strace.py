"""
Recording what the writer does, with strace.

strace is asked for all system calls but those that cannot change a file; one that names something in the recorded
folder and is not known here fails the recording. It stops a thread where a call begins and where it ends, and lets it
go on only after it has written that down: what is done because of something also stands after it, whatever the thread.
"""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from builders import unmeasured
from crash.operations import Acknowledgement, Inode, Naming, Operation, Recording, Sync, Truncate, Write

# They read, wait, or have to do with memory and signals alone. A question mark: not every machine has it.
HARMLESS = """
    read pread64 readv preadv preadv2 lseek stat fstat newfstatat lstat statx statfs fstatfs access faccessat faccessat2
    readlink readlinkat getdents64 getcwd futex brk mprotect munmap madvise rt_sigaction rt_sigprocmask rt_sigreturn
    sigaltstack sched_yield sched_getaffinity poll ppoll select pselect6 epoll_wait epoll_pwait nanosleep getpid gettid
    clock_nanosleep geteuid getuid getegid getgid getrandom set_robust_list rseq set_tid_address prlimit64 sysinfo uname
    arch_prctl exit exit_group
"""
OPTIONS = ["-f", "--seccomp-bpf", "-y", "-xx", "-s", "1000000", "-e", "signal=none"]
FILTER = "trace=!" + ",".join(f"?{name}" for name in HARMLESS.split())

# On files of ours, these change owners, modes and locks.
NO_DATA = {"execve", "fchown", "fchmod", "flock", "fcntl", "fadvise64"}
# They may fail, and nothing has happened.
NAMES = {"openat", "mkdir", "mkdirat", "unlink", "unlinkat"}
# A process of its own would have descriptors of its own, and io_uring writes without a call.
NEVER = {"fork", "vfork", "io_uring_setup", "memfd_create"}

CALL = re.compile(r"(\d+) +(?:<\.\.\. )?(\w+)(?: resumed>|\()(.*)", re.DOTALL)
TEXT = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')
UNFINISHED = " <unfinished ...>"


class StraceMissingError(Exception):
    """strace cannot be had here, or may not trace."""


class UnknownOperationError(Exception):
    """The program did something that the model of the disk does not know."""


class _Unknown(Exception):  # noqa: N818 (never seen outside)
    """Raised where it is found out, told where the whole call is known."""


def record(folder: Path, database: str, *arguments: str) -> Recording:
    """Run the writer on a database in `folder`; `folder` is what is recorded."""
    aside = folder.with_name(f"beside {folder.name}")
    aside.mkdir()
    trace, acknowledged = aside / "trace", aside / "acknowledged"
    recording = Recording(database)
    parser = Parser(folder, acknowledged, recording)
    program = [sys.executable, "-m", "crash.writer", str(folder / database), str(acknowledged), *arguments]
    done = subprocess.run(
        [_strace(), *OPTIONS, "-e", FILTER, "-o", trace, *program],
        cwd=aside,
        # Without what makes a program measure its coverage: it would write files, and take long.
        env=unmeasured() | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with trace.open() as lines:
        parser.parse(lines)
    return recording


def _strace() -> str:
    """The program, if it is there and may do what it is for."""
    strace = shutil.which("strace")
    if strace is None:
        raise StraceMissingError("there is no strace on the path")
    tried = subprocess.run([strace, *OPTIONS, "-e", FILTER, "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        raise StraceMissingError(f"strace does not work here: {tried.stderr.strip()}")
    return strace


class Parser:
    """Makes operations of the lines of strace. To be made before the program runs: it looks at what is there."""

    def __init__(self, folder: Path, acknowledged: Path, recording: Recording) -> None:
        self._folder = os.path.realpath(folder)
        self._ours = re.compile(re.escape(_escaped(self._folder)) + r"(\\x2f|[>\"])")
        self._acknowledged = _escaped(os.path.realpath(acknowledged))
        self._recording = recording
        self._entries: dict[int, dict[str, int]] = {}  # of folders, as they are now
        self._descriptors: dict[str, int | None] = {}  # None: shared memory
        self._begun: dict[str, tuple[int, str, str]] = {}
        self._find(Path(self._folder))

    def _find(self, path: Path) -> int:
        number = self._new("" if str(path) == self._folder else str(path.relative_to(self._folder)), path)
        if path.is_dir():
            for child in sorted(path.iterdir()):
                self._entries[number][child.name] = self._find(child)
            self._recording.inodes[number].entries.update(self._entries[number])
        return number

    def _new(self, name: str, found: Path | None = None, *, folder: bool = False) -> int:
        number = len(self._recording.inodes)
        folder = folder or (found is not None and found.is_dir())
        content = found.read_bytes() if found is not None and not folder else b""
        self._recording.inodes[number] = Inode(number, name, content, {} if folder else None)
        if folder:
            self._entries[number] = {}
        return number

    def parse(self, lines: Iterable[str]) -> None:
        """Read them all, and put the operations into the recording."""
        for moment, line in enumerate(lines):
            match = CALL.match(line.rstrip("\n"))
            if match is None:
                if not re.match(r"\d+ +(\+\+\+|---)", line):
                    raise UnknownOperationError(line)
                continue
            thread, name, rest = match.groups()
            if rest.endswith(UNFINISHED):
                rest = rest.removesuffix(UNFINISHED)
                if name == "close":  # its number is free from now on
                    self._call((moment, math.inf, int(thread)), name, rest, "0")
                self._begun[thread] = (moment, name, rest)
                continue
            began = moment
            if "resumed>" in line[:80]:
                began, name, before = self._begun.pop(thread)
                rest = before + rest
                if name == "close":
                    continue
            arguments, _, result = rest.rpartition(" = ")
            self._call((2 * began, 2 * moment + 1, int(thread)), name, arguments.rstrip().removesuffix(")"), result)
        if self._begun:
            raise UnknownOperationError(f"calls that never ended: {self._begun}")
        self._recording.operations.sort(key=lambda one: one.began)

    def _call(self, times: tuple[float, float, int], name: str, arguments: str, result: str) -> None:
        try:
            if name in NEVER or (name in {"clone", "clone3"} and "CLONE_FILES" not in arguments):
                raise _Unknown
            if name == "write" and self._acknowledged in arguments[:1000]:
                self._add(Acknowledgement(*times, json.loads(_texts(arguments)[0])))
            elif self._ours.search(arguments) or self._ours.search(result):
                self._do(times, name, arguments, result)
        except _Unknown:
            raise UnknownOperationError(f"{name}({arguments[:300]}) = {result}") from None

    def _do(self, times: tuple[float, float, int], name: str, arguments: str, result: str) -> None:
        """One of the methods below, unless there is nothing to note."""
        failed = result.startswith(("-", "?"))
        if name in NO_DATA:
            if "F_DUPFD" in arguments:
                raise _Unknown
        elif name in NAMES and failed:
            pass  # a name that was there already, or was not
        elif failed or not hasattr(self, f"_do_{name}"):
            raise _Unknown
        else:
            getattr(self, f"_do_{name}")(times, arguments, result)

    def _add(self, operation: Operation) -> None:
        self._recording.operations.append(operation)

    # Names.

    def _place(self, arguments: str) -> tuple[int, str]:
        """The folder and the name of the last path among the arguments."""
        path = os.fsdecode(_texts(arguments)[-1])
        if not path.startswith("/"):
            raise _Unknown  # whose folder would be that of a descriptor
        *folders, name = os.path.relpath(path, self._folder).split("/")
        number = 0
        for folder in folders:
            number = self._entries[number][folder]
        return number, name

    def _name(self, times, folder: int, entries: dict[str, int | None]) -> None:
        for name, number in entries.items():
            if number is None:
                del self._entries[folder][name]
            else:
                self._entries[folder][name] = number
        self._add(Naming(*times, folder, entries))

    def _do_openat(self, times, arguments: str, result: str) -> None:
        folder, name = self._place(arguments)
        number: int | None = 0 if name == "." else self._entries[folder].get(name)
        if name.endswith("-shm"):
            # Shared memory, which SQLite makes anew from the WAL when nobody has it open, as after a power loss:
            # whatever of it is on disk tells nothing.
            number = None
        elif "O_APPEND" in arguments or "O_TMPFILE" in arguments:
            raise _Unknown
        elif number is None:
            number = self._new(os.path.join(self._recording.inodes[folder].path, name))
            self._name(times, folder, {name: number})
        elif "O_TRUNC" in arguments:
            self._add(Truncate(*times, number, 0))
        self._descriptors[_descriptor(result)] = number

    def _do_mkdir(self, times, arguments: str, _result: str) -> None:
        folder, name = self._place(arguments)
        path = os.path.join(self._recording.inodes[folder].path, name)
        self._name(times, folder, {name: self._new(path, folder=True)})

    def _do_unlink(self, times, arguments: str, _result: str) -> None:
        folder, name = self._place(arguments)
        if not name.endswith("-shm"):
            self._name(times, folder, {name: None})

    def _do_rename(self, times, arguments: str, _result: str) -> None:
        (folder, old), (target, new) = (self._place(f'"{path}"') for path in TEXT.findall(arguments))
        if folder != target or "RENAME_" in arguments:
            raise _Unknown
        self._name(times, folder, {new: self._entries[folder][old], old: None})

    _do_mkdirat, _do_unlinkat, _do_renameat, _do_renameat2 = _do_mkdir, _do_unlink, _do_rename, _do_rename

    # Contents.

    def _do_close(self, _times, arguments: str, _result: str) -> None:
        del self._descriptors[_descriptor(arguments)]

    def _do_pwrite64(self, times, arguments: str, result: str) -> None:
        data = _texts(arguments)[0]
        _, count, offset = arguments.rsplit(", ", 2)
        if len(data) != int(count):
            raise _Unknown  # strace has not told all
        self._add_to_file(Write, times, arguments, int(offset), data[: int(result)])

    def _do_ftruncate(self, times, arguments: str, _result: str) -> None:
        self._add_to_file(Truncate, times, arguments, int(arguments.rsplit(", ", 1)[1]))

    def _do_fsync(self, times, arguments: str, _result: str) -> None:
        self._add_to_file(Sync, times, arguments)

    _do_fdatasync = _do_fsync  # it leaves out times and modes, which nobody reads here

    def _do_mmap(self, _times, arguments: str, _result: str) -> None:
        if self._descriptors[_descriptor(arguments.split(", ")[4])] is not None:
            raise _Unknown

    def _add_to_file(self, kind: type[Operation], times, arguments: str, *rest) -> None:
        number = self._descriptors[_descriptor(arguments)]
        if number is not None:
            self._add(kind(*times, number, *rest))


def _descriptor(text: str) -> str:
    return text[: text.index("<")]


def _escaped(path: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in os.fsencode(path))


def _texts(arguments: str) -> list[bytes]:
    return [bytes.fromhex(text.replace("\\x", "")) for text in TEXT.findall(arguments)]
