"""
Ends what is left of a server whose owner is gone, however it went: `server_guard.py FOLDER`.

It waits for the end of its standard input, a pipe that the owner alone holds open.
"""

import contextlib
import os
import shutil
import signal
import sys
import time


def processes_in(folder):
    """The processes whose current folder is this one or below it: a server and all that it has started."""
    found = []
    for process in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            current = os.readlink(f"/proc/{process}/cwd")
            if current == folder or current.startswith(f"{folder}/"):
                found.append(int(process))
    return found


def kill_all(folder):
    """SIGKILL every process in the folder, those too that are started meanwhile; returns when none is left."""
    while processes := processes_in(folder):
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.001)  # the kernel tells nobody but the parent when a process has ended


def main(folder):
    sys.stdin.read()
    kill_all(folder)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main(sys.argv[1])
