"""`status` and `watch`: how full the buffer is, for people and for programs."""

import json
import re
from pathlib import Path

import pytest
from builders import NOON, everything, is_server, new_receipt, on_a_file_alone, shown
from terminal import in_terminal, without_distances

from kkt_buffer.migrate import revisions

HEAD = revisions()[-1]
DAY = 86_400


class TestStatus:
    def test_table(self, filled, done, moscow):
        """Times are shown as the wall clock of the shop shows them."""
        expected = f"""\
buffer             | {shown(filled)}
schema             | {HEAD}
full               | 1.00 %  (2 of 200)
pending            | 1  (held, not printed yet: 0)
syncing            | 1  (expired leases: 1)
synced             | 1
failed             | 1  (open dead letters: 1, closed: 0)
total              | 4
oldest undelivered | 2026-03-01 15:00:00 +0300
deliver before     | 2026-03-31 15:00:00 +0300
last delivery      | 2026-03-01 15:00:00 +0300
last outage        | none on record
circuit breaker    | closed
"""
        assert expected == without_distances(done("status", filled))

    def test_empty_table(self, buffer, done):
        expected = [
            "oldest undelivered | nothing waits",
            "deliver before     | nothing waits",
            "last delivery      | none yet",
            "last outage        | none on record",
            "circuit breaker    | closed",
        ]
        assert expected == done("status", buffer).splitlines()[-5:]

    def test_json(self, filled, done):
        """For programs: one JSON object, times as Unix seconds."""
        expected = {
            "path": shown(filled),
            "schema": HEAD,
            "total_receipts": 4,
            "pending": 1,
            "syncing": 1,
            "synced": 1,
            "failed": 1,
            "dlq_size": 1,
            "capacity": 200,
            "percent_full": 1.0,
            "held": 0,
            "expired_leases": 1,
            "oldest_undelivered_at": NOON,
            "deadline_at": NOON + 30 * DAY,
            "last_synced_at": NOON,
            "last_outage_at": None,
            "circuit_opened_at": None,
        }
        assert expected == json.loads(done("status", filled, "--json"))

    def test_circuit(self, shared_engine, shared_repository, buffer, done, moscow):
        shared_repository.log_event("circuit_opened", metadata={"error": "5 receipts have failed: HTTP 500"})
        shared_engine.dispose()
        since, error = done("status", buffer).splitlines()[-2:]
        assert since.startswith("circuit breaker    | OPEN since 2026-03-01 15:00:00")
        assert error == "opened by          | 5 receipts have failed: HTTP 500"

    @pytest.mark.parametrize("options", [[], ["--json"]])
    def test_changes_nothing(self, filled, options, done):
        before = everything(filled) if is_server(filled) else Path(filled).read_bytes()
        done("status", filled, *options)
        assert before == (everything(filled) if is_server(filled) else Path(filled).read_bytes())

    def test_default_buffer(self, used, done, monkeypatch):
        """Where none is named, it is data/buffer.db."""
        monkeypatch.delenv("BUFFER_DB_PATH", raising=False)
        (used.parent / "data").mkdir()
        used.rename(used.parent / "data" / "buffer.db")
        monkeypatch.chdir(used.parent)
        assert "total              | 4" in done("status")

    @pytest.mark.parametrize("named", ["positional", "option", "variable"])
    def test_which_buffer(self, filled, done, named, monkeypatch):
        """The path or URL is an argument, or `--db`, or BUFFER_DB_PATH."""
        monkeypatch.delenv("BUFFER_DB_PATH", raising=False)
        if named == "variable":
            monkeypatch.setenv("BUFFER_DB_PATH", str(filled))
        arguments = {"positional": [filled], "option": ["--db", filled]}.get(named, [])
        assert "total              | 4" in done("status", *arguments)

    def test_full(self, filled, run, done):
        """A full buffer is the first thing that is said, with what to do; on paper and on a terminal."""
        run("config", "--db", filled, "buffer_capacity", 1)
        for out in (done("status", filled), in_terminal("status", filled).out):
            assert "THE TILL IS REFUSING RECEIPTS" in out.splitlines()[0]
            advice = f"kkt-buffer config --db {shown(filled)} buffer_capacity 4"
            assert "".join(advice.split()) in "".join(out.split())

    @on_a_file_alone
    @pytest.mark.parametrize(("capacity", "colour"), [(200, 32), (24, 33), (21, 31)])
    def test_bar(self, shared_engine, shared_repository, buffer, capacity, colour):
        """On a terminal there is a bar: green, yellow from 80 %, red from 95 %."""
        shared_repository.insert_receipts(new_receipt() for _ in range(20))
        shared_repository.set_config("buffer_capacity", capacity)
        shared_engine.dispose()
        out = in_terminal("status", buffer).out
        assert re.search(rf"full +\| \x1b\[{colour}m█+░+\x1b\[0m  \d", out), out

    @on_a_file_alone
    @pytest.mark.parametrize("variables", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
    def test_no_colour(self, filled, variables):
        """Whoever wants no colour gets none; the bar stays."""
        out = in_terminal("status", filled, **variables).out
        assert "\x1b" not in out
        assert "░" in out

    @on_a_file_alone
    def test_plain_bar(self, filled):
        """A terminal that is not UTF-8 has a bar too."""
        out = in_terminal("status", filled, PYTHONUTF8="0", PYTHONIOENCODING="ascii").out
        assert "." * 30 in out


class TestWatch:
    def test_terminal(self, filled):
        """The status is redrawn in place, with the last events; Control-C is the way to end it."""
        ended = in_terminal("watch", filled, "--every", 0.1, until="\x1b[Jbuffer")
        assert 0 == ended.status
        first, height, redrawn, *_ = re.split(r"\x1b\[(\d+)F\x1b\[J", ended.out)
        assert int(height) == len(first.splitlines())
        assert redrawn.startswith("buffer ")
        assert "2026-03-01" in "".join(first.splitlines()[-2:])

    @on_a_file_alone
    def test_low_terminal(self, filled):
        """What does not fit is left out: else the lines above would scroll away."""
        ended = in_terminal("watch", filled, "--every", 0.1, lines=10, until="\x1b[J")
        assert "\x1b[9F\x1b[J" in ended.out

    def test_pipe(self, filled, capfd, monkeypatch):
        """In a file or a pipe each status stands below the one before, with its time."""
        naps = []

        def sleep(seconds):
            naps.append(seconds)
            if len(naps) == 2:
                raise KeyboardInterrupt

        monkeypatch.setattr("kkt_buffer.cli.look.sleep", sleep)
        from kkt_buffer.cli import main  # noqa: PLC0415

        assert 0 == main(["watch", str(filled), "--every", "7"])
        out = capfd.readouterr().out
        assert [7.0, 7.0] == naps
        assert 2 == out.count("circuit breaker")
        assert "\x1b" not in out

    @pytest.mark.parametrize("every", [0, -1, "nan"])
    def test_no_time(self, filled, refused, every):
        assert "--every: expected a number of seconds above 0" in refused("watch", filled, "--every", every)
