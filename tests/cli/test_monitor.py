"""`check` and `metrics`: what a monitoring system reads."""

import re
import time

import pytest
from builders import a_receipt, another_program, new_receipt

from kkt_buffer import ReceiptRepository

DAY = 86_400


@pytest.fixture
def filled_with(shared_engine, buffer):
    """Fill `buffer`, by the clock on the wall; returns it."""

    def fill(count, *, capacity=20, days_ago=0.0, dead=0):
        repository = ReceiptRepository(shared_engine, now=lambda: time.time() - days_ago * DAY)
        repository.set_config("buffer_capacity", capacity)
        repository.insert_receipts(new_receipt() for _ in range(count))
        for _ in range(dead):
            a_receipt(repository, "failed")
        shared_engine.dispose()
        return buffer

    return fill


class TestCheck:
    @pytest.mark.parametrize(
        ("filled", "options", "status", "told"),
        [
            ({"count": 0}, [], 0, "OK - 0 of 20 receipts undelivered (0 %)"),
            ({"count": 15}, [], 0, "OK - 15 of 20 receipts undelivered (75 %)"),
            ({"count": 16}, [], 1, "WARNING - 16 of 20"),
            ({"count": 18}, ["-w", 95], 0, "OK - "),
            ({"count": 19}, [], 2, "CRITICAL - 19 of 20"),
            ({"count": 16}, ["-c", 80], 2, "CRITICAL - "),
            ({"count": 20}, [], 2, "CRITICAL - THE TILL IS REFUSING RECEIPTS, 20 of 20"),
            ({"count": 1, "dead": 2}, [], 1, "WARNING - 1 of 20 receipts undelivered (5 %), 2 dead letters"),
            ({"count": 1, "days_ago": 19.5}, [], 0, "OK - 1 of 20 receipts undelivered (5 %), 10.5 days to deliver"),
            ({"count": 1, "days_ago": 20.5}, [], 2, "CRITICAL - 1 of 20 receipts undelivered (5 %), 9.5 days"),
            ({"count": 1, "days_ago": 20.5}, ["--days", 5], 0, "OK - "),
            ({"count": 1, "days_ago": 31}, [], 2, "THE 30-DAY DEADLINE HAS PASSED"),
            ({"count": 0, "days_ago": 21, "dead": 1}, [], 2, "CRITICAL - "),
        ],
    )
    def test_state(self, filled_with, run, filled, options, status, told):
        """The worst of fill level, deadline and dead letters; the limits can be set."""
        ended = run("check", filled_with(**filled), *options)
        assert (status, "") == (ended.status, ended.err)
        assert told in ended.out

    def test_performance_data(self, filled_with, run):
        """One line, with figures that a plugin of Nagios may print."""
        [line] = run("check", filled_with(3, dead=1, days_ago=1), "-w", 70).out.splitlines()
        figures = line.split(" | ")[1]
        expected = r"percent_full=15%;70;95;0;100 undelivered=3;;;0;20 dead_letters=1;0;;0 days_left=29\.00;;10:"
        assert re.fullmatch(expected, figures)

    def test_missing(self, tmp_path, run):
        ended = run("check", tmp_path / "buffer.db")
        assert (2, "") == (ended.status, ended.err)
        assert re.fullmatch("KKT CRITICAL - .*there is no buffer at.*\n", ended.out)

    def test_damaged(self, tmp_path, run):
        path = tmp_path / "buffer.db"
        path.write_text("Not a database, but somebody's notes.\n" * 100)
        ended = run("check", path)
        assert 2 == ended.status
        assert "CRITICAL" in ended.out

    @pytest.mark.parametrize(
        "change",
        [
            "UPDATE config SET value = 'many' WHERE key = 'buffer_capacity'",
            "UPDATE kkt_buffer_version SET version_num = '9999'",
            "UPDATE kkt_buffer_version SET version_num = '9999 | x\n y'",
        ],
    )
    def test_unknown(self, filled, run, change):
        """What cannot be judged is UNKNOWN; still one line, without the bar that begins the figures."""
        with another_program(filled) as db:
            db.execute(change)
        ended = run("check", filled)
        assert (3, 1) == (ended.status, len(ended.out.splitlines()))
        assert ended.out.startswith("KKT UNKNOWN - ")
        assert "|" not in ended.out

    @pytest.mark.parametrize("words", [["--xml"], ["-w"], ["-w", "much"], ["a.db", "b.db"], ["a.db", "--db", "b.db"]])
    def test_usage(self, run, words):
        """Wrong usage is UNKNOWN too: the 2 of other commands would be CRITICAL here."""
        assert 3 == run("check", *words).status


class TestMetrics:
    def test_text(self, filled, done):
        out = done("metrics", filled)
        assert "# TYPE kkt_buffer_size gauge\nkkt_buffer_size 2.0\n" in out
        assert out.endswith("\n")
