"""What the tests of the command line share: commands that are run in this process."""

import time
from collections.abc import Callable

import pytest
from terminal import Ended

from kkt_buffer.cli import main


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Run a command in this process."""

    def command(*argv: object) -> Ended:
        try:
            status = main([str(argument) for argument in argv])
        except SystemExit as left:
            status = int(str(left.code))
        return Ended(status, *capsys.readouterr())

    return command


@pytest.fixture
def done(run: Callable[..., Ended]) -> Callable[..., str]:
    """Run a command that must succeed and say nothing on stderr; returns what it printed."""

    def command(*argv: object) -> str:
        ended = run(*argv)
        assert (0, "") == (ended.status, ended.err)
        return ended.out

    return command


@pytest.fixture
def refused(run: Callable[..., Ended]) -> Callable[..., str]:
    """Run a command that must fail; returns the one line that it says of it."""

    def command(*argv: object) -> str:
        ended = run(*argv)
        [line] = ended.err.splitlines()
        assert 1 == ended.status
        assert line.startswith("error: ")
        return line

    return command


@pytest.fixture
def moscow(monkeypatch):
    """The local time of the tests: three hours ahead of UTC."""
    monkeypatch.setenv("TZ", "MSK-3")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()
