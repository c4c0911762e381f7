"""
The load of a cluster: processes that insert receipts and processes that deliver them, with books outside the database.

What the processes do is in `load_process`. `Load.books` compares what they wrote down with the database.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from builders import unmeasured
from sqlalchemy import URL, make_url, text

from kkt_buffer import ReceiptRepository, create_buffer_engine

PROGRAM = Path(__file__).with_name("load_process.py")
PROCESSES = 4
THREADS = 4
WORKERS = 2
LEASE_SECONDS = 3  # a receipt whose outcome could not be recorded is delivered again when its lease is over


@dataclass(frozen=True)
class Books:
    """The logs, compared with the database. `gap` is the longest time without an acknowledgement, in seconds."""

    acknowledged: int
    lost: list[str]
    doubled: list[str]
    unsynced: list[str]
    undelivered: list[str]
    unexpected: list[str]
    failed: Counter[str]
    gap: float
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.acknowledged} acknowledged in {self.seconds:.1f} s, {len(self.lost)} lost, {len(self.doubled)} "
            f"doubled, {len(self.undelivered)} not delivered, longest gap {self.gap:.2f} s, "
            f"errors told: {self.failed.total()}"
        )

    def assert_right(self) -> None:
        """Nothing acknowledged was lost, nothing is there twice, everything was delivered, no error was unknown."""
        assert [] == self.unexpected
        assert 0 < self.acknowledged
        assert [] == self.lost
        assert [] == self.doubled
        assert [] == self.unsynced
        assert [] == self.undelivered


class Load:
    """Tills and workers on one buffer, from `running` on."""

    def __init__(self, url: URL | str, folder: Path, **options: Any) -> None:
        self._url = make_url(url).render_as_string(hide_password=False)
        self._folder = folder
        self._options = options
        self._tills: subprocess.Popen[str] | None = None
        self._workers: subprocess.Popen[str] | None = None

    @contextlib.contextmanager
    def running(self) -> Iterator["Load"]:
        """The load begins with the block; its processes are gone after it."""
        engine = create_buffer_engine(self._url)
        repository = ReceiptRepository(engine)
        repository.set_config("buffer_capacity", 1_000_000)
        repository.set_config("lease_seconds", LEASE_SECONDS)
        repository.set_config("retry_backoff_initial", 0)
        engine.dispose()
        with (
            self._started("till", PROCESSES, THREADS) as self._tills,
            self._started("worker", WORKERS, 0) as self._workers,
        ):
            for process, number in ((self._tills, PROCESSES), (self._workers, WORKERS)):
                assert ["ready\n"] * number == [process.stdout.readline() for _ in range(number)]
            yield self

    def wait_for(self, number: int, *, timeout: float = 60) -> None:
        """Wait until so many receipts more were acknowledged than now."""
        deadline = time.monotonic() + timeout
        wanted = self.acknowledged() + number
        while self.acknowledged() < wanted:
            assert time.monotonic() < deadline, f"no {number} receipts were acknowledged within {timeout} s"
            time.sleep(0.02)

    def acknowledged(self) -> int:
        """How many receipts have been acknowledged so far."""
        return sum(log.read_bytes().count(b" acknowledged ") for log in self._folder.glob("till-*.log"))

    def books(self, *, timeout: float = 60) -> Books:
        """Stop the tills, let the workers deliver everything, stop them, and compare the logs with the database."""
        self._stop(self._tills)
        engine = create_buffer_engine(self._url, **self._options)
        try:
            self._drain(ReceiptRepository(engine), timeout)
            self._stop(self._workers)
            with engine.connect() as connection:
                rows = connection.execute(text("SELECT id, fiscal_doc, status FROM receipts")).all()
        finally:
            engine.dispose()
        return self._compare([(row.id, json.loads(row.fiscal_doc)["key"], row.status) for row in rows])

    @contextlib.contextmanager
    def _started(self, name: str, processes: int, threads: int) -> Iterator[subprocess.Popen[str]]:
        """They are gone after the block."""
        task = {
            "url": self._url,
            "options": self._options,
            "folder": str(self._folder),
            "name": name,
            "processes": processes,
            "threads": threads,
        }
        with subprocess.Popen(
            [sys.executable, PROGRAM, json.dumps(task)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=unmeasured(),
            start_new_session=True,
        ) as process:
            try:
                yield process
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)

    @staticmethod
    def _stop(processes: subprocess.Popen[str]) -> None:
        processes.stdin.close()
        assert 0 == processes.wait(timeout=60)

    @staticmethod
    def _drain(repository: ReceiptRepository, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while (status := repository.get_buffer_status()).pending or status.syncing:
            assert time.monotonic() < deadline, f"not delivered within {timeout} s: {status}"
            time.sleep(0.1)

    def _compare(self, rows: list[tuple[str, str, str]]) -> Books:
        lines = [
            line.split(" ", 3) for log in sorted(self._folder.glob("*.log")) for line in log.read_text().splitlines()
        ]
        said = [(float(moment), key, rest) for moment, kind, key, rest in lines if kind == "acknowledged"]
        moments = sorted(moment for moment, _, _ in said)
        stored = {receipt_id: key for receipt_id, key, _ in rows}
        delivered = {rest for _, kind, _, rest in lines if kind == "delivered"}
        times = Counter(key for _, key, _ in rows)
        return Books(
            acknowledged=len(said),
            lost=[key for _, key, receipt_id in said if stored.get(receipt_id) != key],
            doubled=[key for key, number in times.items() if number > 1],
            unsynced=[key for _, key, status in rows if status != "synced"],
            undelivered=[key for receipt_id, key, _ in rows if receipt_id not in delivered],
            unexpected=[rest for _, kind, _, rest in lines if kind == "unexpected"],
            failed=Counter(rest.split(":")[0] for _, kind, _, rest in lines if kind == "failed"),
            gap=max((later - earlier for earlier, later in pairwise(moments)), default=0.0),
            seconds=moments[-1] - moments[0] if moments else 0.0,
        )
