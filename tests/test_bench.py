"""The benchmark runs, and tells what it measured; how fast it was is no matter here."""

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
import servers
from builders import unproven

BENCH = Path(__file__).parent / "bench" / "bench.py"
GOOD = {"operations", "threads", "flat", "pruning", "start", "memory"}
TILL = {"till-operations", "till-threads"}


@pytest.mark.slow
class TestBench:
    def test_table_and_json(self, tmp_path):
        """All sections that need no peers come out as tables with ratios and goals, and as the same in JSON."""
        done, rows = measured(tmp_path, f"^({'|'.join(GOOD)})$")
        assert {row["section"] for row in rows} == GOOD
        for row in rows:
            (line,) = [line for line in done.stdout.splitlines() if line.startswith(f"| {row['what']}  ")]
            assert row["ours"]["median"] > 0 or row["section"] == "memory"
            assert line.endswith(": missed |") is row["missed"]
            if row["budget"] is not None:
                assert f"{row['budget']:g}" in line
        assert "--quick" in done.stdout.splitlines()[-1]

    def test_till(self, tmp_path):
        """On a till's disk each sync takes longer by 2 ms, and the syncs are counted."""
        done, rows = measured(tmp_path, f"^({'|'.join(TILL)})$")
        if "LEFT OUT" in done.stdout:
            unproven("the benchmark of a till's disk: strace is not there, or not permitted")
        assert {row["section"] for row in rows} == TILL
        found = {row["what"]: row for row in rows}
        insert, reading = found["insert_receipt"], found["get_buffer_status"]
        assert 1 <= insert["ours"]["syncs"] < 2
        assert insert["ours"]["median"] >= 2000
        assert reading["ours"]["syncs"] == 0
        assert found["insert_receipt, 16 threads"]["ours"]["syncs"] < 1

    def test_postgresql(self, tmp_path):
        """On a server, each budget has its row, and so has each of the other queues, or it is told to be missing."""
        if servers.programs() is None:
            unproven(f"the benchmark of PostgreSQL: {servers.reason()}")
        done, rows = measured(tmp_path, "^postgresql$")
        found = {row["what"]: row for row in rows}
        budgets = {
            "insert_receipt: plain INSERT": 2.5,
            "insert_receipts(64): executemany": 2.5,
            "insert_receipt, 16 threads: one thread": 3,
            "5,000 synced: insert_receipt": 1.15,
            "a snapshot of 2 s: insert_receipt": 1.3,
            "a snapshot of 2 s: claim_pending(50)": 1.5,
        }
        assert budgets == {what: found[what]["budget"] for what in budgets}
        assert all(row["ours"]["median"] > 0 and row["ratio"] > 0 for row in rows)
        if "PEERS LEFT OUT" not in done.stderr:
            assert {"insert_receipt: PgQueuer", "insert_receipt: procrastinate"} <= found.keys()

    def test_no_server(self, tmp_path):
        """Without a server, what needs it is left out, and the table says so."""
        done, rows = measured(tmp_path, "^postgresql$", env={"KKT_BUFFER_NO_SERVER": "1"})
        assert rows == []
        assert "LEFT OUT: PostgreSQL" in done.stdout
        assert "LEFT OUT: PostgreSQL" in done.stderr

    def test_left_out(self, tmp_path):
        """Without strace, what needs it is left out, and the table says so."""
        done, rows = measured(tmp_path, "till-threads", env={"PATH": str(tmp_path)})
        assert rows == []
        assert "LEFT OUT: there is no strace" in done.stdout
        assert "LEFT OUT: there is no strace" in done.stderr

    def test_compare(self, tmp_path):
        """Two versions are measured by the same blocks; here, one with itself."""
        source = Path(__file__).parents[1] / "src"
        done = run(BENCH.with_name("compare.py"), source, source, "--rounds", "2", "--dir", tmp_path)
        assert done.returncode == 0, done.stderr
        assert len(done.stdout.splitlines()) == 9
        assert [] == list(tmp_path.iterdir()), "it has left files behind"

    def test_unknown_section(self, tmp_path):
        """A section that does not exist is not left out in silence."""
        done = bench("--only", "nothing", "--dir", tmp_path)
        assert done.returncode == 2
        assert "no section of that name" in done.stderr


class TestPlot:
    def test_both_disks(self, tmp_path):
        """A line for each side in each panel, by the threads that it had."""
        rows = [
            {"section": section, "point": [threads, name], "ours": {"median": 900}, "reference": {"median": 300}}
            for section in ("peers", "till-peers")
            for threads in (1, 4, 8, 16)
            for name in ("plain sqlite3", "litequeue", "huey", "persist-queue")
        ]
        figures, plot = tmp_path / "figures.json", tmp_path / "speed.svg"
        figures.write_text(json.dumps({"rows": rows}))
        done = run(BENCH.with_name("plot.py"), figures, plot)
        assert done.returncode == 0, done.stderr
        drawn = ET.parse(plot).getroot()
        lines = [line.get("points").split() for line in drawn.findall(".//{*}polyline")]
        assert [4] * 10 == [len(points) for points in lines]
        told = [text.text for text in drawn.findall(".//{*}text")]
        assert told.count("900 kkt-buffer") == told.count("300 huey") == 2


def measured(folder, only, **options):
    """What `--quick` prints for these sections, and its rows."""
    found = folder / "figures.json"
    done = bench("--quick", "--only", only, "--dir", folder, "--json", found, **options)
    assert done.returncode == 0, done.stderr
    assert [found] == list(folder.iterdir()), "it has left files behind"
    return done, json.loads(found.read_text())["rows"]


def bench(*arguments, **options):
    return run(BENCH, *arguments, **options)


def run(*arguments, **options):
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **options)
