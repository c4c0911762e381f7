"""
The tests on every Python that the package supports, with the other SQLite library, and on the oldest SQLAlchemy.

`matrix.py` runs all of them, two at a time; `matrix.py NAME …` those that are named, and fails if one is missing. The
Python that runs this program is the one of `make test`, which need not be repeated. What this machine does not have is
said loudly, at the beginning and at the end.

Only the oldest SQLAlchemy is tested on PostgreSQL too: there the risk is, and a second engine doubles many tests.
"""

import glob
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

PYTHONS = ("3.11", "3.12", "3.13")
RUNNING = "{}.{}".format(*sys.version_info)
CONSTRAINTS = ".ci/constraints.txt"
SOURCES = ("pyproject.toml", ".ci/constraints.txt", ".ci/constraints-oldest.txt", ".ci/venv.sh")

# Left out are the tests that take long, and those whose outcome does not depend on Python or SQLite. No two of the runs
# share pytest's cache.
PYTEST = ("-m", "pytest", "-q", "--color=no", "-p", "no:cacheprovider", "-m", "not slow and not one_python")
MYPY = ("-m", "mypy", "--cache-dir", ".mypy_cache/oldest")


class Run(NamedTuple):
    """One environment, and what is run in it."""

    name: str
    python: str
    extras: str
    constraints: str
    commands: tuple[tuple[str, ...], ...]
    failures: list[str]  # pytest's summary of each, to be told again at the end
    has_server: bool = False

    @property
    def venv(self) -> Path:
        return Path(f".venv-{self.name}")

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, **({} if self.has_server else {"KKT_BUFFER_NO_SERVER": "1"})}


def candidates(version: str) -> Iterator[str]:
    """Where an interpreter of this version may be: on PATH, or under pyenv."""
    for folder in os.get_exec_path():
        yield os.path.join(folder, f"python{version}")
    root = os.environ.get("PYENV_ROOT") or Path("~/.pyenv").expanduser()
    yield from sorted(glob.glob(f"{root}/versions/{version}.*/bin/python"), reverse=True)


def find(version: str) -> str | None:
    """An interpreter of this version that can make environments. A shim of pyenv may stand for none."""
    program = "import ensurepip, sqlite3, sys, venv; print('{}.{}'.format(*sys.version_info))"
    for path in candidates(version):
        if os.access(path, os.X_OK):
            done = subprocess.run([path, "-c", program], capture_output=True, text=True, check=False)
            if done.stdout.strip() == version:
                return path
    return None


def say(name: str, line: str) -> None:
    print(f"{name:<6} | {line}", flush=True)


def succeeds(run: Run, *command: str) -> bool:
    """Execute a command of a run; each line that it prints is shown with the name of the run."""
    with subprocess.Popen(
        command, env=run.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        for line in process.stdout or ():
            say(run.name, line.rstrip())
            if line.startswith(("FAILED ", "ERROR ")):
                run.failures.append(line.rstrip())
    return process.returncode == 0


def is_ready(run: Run) -> bool:
    ready = run.venv / ".installed"
    return ready.exists() and all(ready.stat().st_mtime >= Path(source).stat().st_mtime for source in SOURCES)


def play(run: Run) -> str:
    """Make the environment if it is not there, run the commands in it, and say how that ended."""
    began = time.monotonic()
    if not is_ready(run) and not succeeds(
        run, "sh", ".ci/venv.sh", run.python, str(run.venv), run.constraints, run.extras
    ):
        return "FAILED: its environment cannot be made"
    python = str(run.venv / "bin" / "python")
    outcome = "ok" if all(succeeds(run, python, *command) for command in run.commands) else "FAILED"
    outcome += f" in {time.monotonic() - began:.0f} s"
    say(run.name, outcome)
    return outcome


def main(names: list[str]) -> int:
    runs = {
        "oldest": Run(
            "oldest", sys.executable, "dev", ".ci/constraints-oldest.txt", (MYPY, PYTEST), [], has_server=True
        ),
        "sqlite": Run("sqlite", sys.executable, "test,sqlite", CONSTRAINTS, (PYTEST,), []),
    }
    missing = []
    for version in PYTHONS:
        if version == RUNNING and version not in names:
            say(version, "runs `make test`; not repeated")
        elif (python := find(version)) is not None:
            # Only what the extra `test` brings: a test that needs more fails here.
            runs[version] = Run(version, python, "test", CONSTRAINTS, (PYTEST,), [])
        else:
            missing.append(version)
    if unknown := set(names) - {*runs, *missing}:
        print(f"no such run: {', '.join(sorted(unknown))}; there are {', '.join(sorted(runs))}", file=sys.stderr)
        return 2
    chosen = [run for name, run in runs.items() if not names or name in names]
    absent = [version for version in missing if not names or version in names]
    for version in absent:
        say(version, f"NOT TESTED: there is no Python {version} on PATH or under pyenv")
    with ThreadPoolExecutor(2) as executor:  # most tests use one core, and wait for the disk
        outcomes = list(executor.map(play, chosen))
    print()
    for run, outcome in zip(chosen, outcomes, strict=True):
        for failure in run.failures:
            say(run.name, failure)
        say(run.name, outcome)
    for version in absent:
        say(version, f"NOT TESTED: there is no Python {version} on PATH or under pyenv")
    return int(any("FAILED" in outcome for outcome in outcomes) or bool(names and absent))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
