"""The benchmark runs, and tells what it measured; how fast it was is no matter here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent / "bench" / "bench.py"


@pytest.mark.slow
class TestBench:
    def test_table_and_json(self, tmp_path):
        """All sections that need no peers come out as a table with ratios and budgets, and as the same in JSON."""
        found = tmp_path / "figures.json"
        done = bench("--quick", "--only", "^(?!peers)", "--dir", tmp_path, "--json", found)
        assert done.returncode == 0, done.stderr
        rows = json.loads(found.read_text())["rows"]
        assert {"operations", "threads", "flat", "pruning", "start", "memory"} == {row["section"] for row in rows}
        for row in rows:
            (line,) = [line for line in done.stdout.splitlines() if line.startswith(f"{row['what']}  ")]
            assert row["ours"]["median"] > 0 or row["section"] == "memory"
            assert line.endswith("<- over budget") is row["over_budget"]
            if row["budget"] is not None:
                assert f"{row['budget']:g}" in line
        assert "--quick" in done.stdout.splitlines()[-1]
        assert [found] == list(tmp_path.iterdir()), "it has left files behind"

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


def bench(*arguments):
    return run(BENCH, *arguments)


def run(*arguments):
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
