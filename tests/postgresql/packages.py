"""Programs of the distribution that tests run, installed where this is possible."""

import fcntl
import functools
import os
import shutil
import subprocess
from pathlib import Path

LOCK = Path("/var/tmp/kkt-buffer-install.lock")


@functools.cache
def installed(*programs: str, packages: tuple[str, ...]) -> bool:
    """Whether these programs are here; root installs the packages first."""
    if os.environ.get("KKT_BUFFER_NO_SERVER"):
        return False
    if not _found(programs) and os.geteuid() == 0 and shutil.which("apt-get"):
        environment = os.environ | {"TMPDIR": "/var/tmp", "DEBIAN_FRONTEND": "noninteractive"}
        install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages]
        with LOCK.open("w") as lock:  # by one process of the run
            fcntl.flock(lock, fcntl.LOCK_EX)
            for command in [] if _found(programs) else [["apt-get", "update", "-qq"], install]:
                subprocess.run(
                    command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=False
                )
    return _found(programs)


def _found(programs: tuple[str, ...]) -> bool:
    return all(shutil.which(program) for program in programs)
