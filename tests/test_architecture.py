"""Which module may import which, and what else holds the package together."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import grimp
import pytest
from builders import run_python

import kkt_buffer

ROOT = Path(__file__).parents[1]
PACKAGE = "kkt_buffer"
SOURCE = ROOT / "src" / PACKAGE
# By dotted name below the package; a folder's `__init__` has the name of the folder.
MODULES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in SOURCE.rglob("*.py")
}
SPEAKING = {"__main__", "cli", "demo"}  # programs
LONGEST = 350  # lines of a file
EXCEPTIONS = {
    "repository": 660,  # every operation, with its documentation
    "transaction": 385,
}


def lint_imports(folder):
    """Hold the package that stands in this folder against the contracts of pyproject.toml."""
    command = [Path(sys.executable).with_name("lint-imports"), "--config", ROOT / "pyproject.toml", "--no-cache"]
    # Without coverage, which would count a copy of the package as code that was never run.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def names_used(source):
    return {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}


class TestArrows:
    def test_kept(self):
        """A module imports what the contracts in pyproject.toml allow it, and nothing else."""
        done = lint_imports(SOURCE.parent)
        assert 0 == done.returncode, done.stdout + done.stderr

    @pytest.mark.parametrize(
        ("module", "line", "contract"),
        [
            ("hlc", "import sqlalchemy", "the standard library alone"),
            ("hlc", "import kkt_buffer.config", "the house"),
            ("errors", "from kkt_buffer import hlc", "the house"),
            ("delivery", "from kkt_buffer import buffer", "the house"),
            ("delivery", "def lazy():\n    from .buffer import insert_receipt", "the house"),
            ("repository", "from kkt_buffer.sqlite import file", "nobody reaches past the interface"),
            ("models", "from kkt_buffer import ReceiptRepository", "the public names are for others"),
            ("novelty", "", "the house"),
            ("group_commit", "import kkt_buffer.operations.receipts", "the house"),
            (
                "operations.leases",
                "from kkt_buffer.sqlite import schema",
                "operations know no engine",
            ),
            ("operations.leases", "from kkt_buffer.operations import pruning", "operations: a file for each subject"),
            ("operations.novelty", "", "operations: a file for each subject"),
            ("sqlite.gate", "from kkt_buffer.sqlite.engine import pragmas", "inside sqlite"),
            ("sqlite.novelty", "", "inside sqlite"),
            (
                "transaction",
                "if TYPE_CHECKING:\n    import kkt_buffer.sqlite.gate",
                "operations know no engine",
            ),
        ],
    )
    def test_would_be_found(self, tmp_path, module, line, contract):
        """A forbidden import breaks its contract, however it is written; so does a module that nobody has placed."""
        shutil.copytree(SOURCE, tmp_path / PACKAGE, ignore=shutil.ignore_patterns("__pycache__"))
        with (tmp_path / PACKAGE / f"{module.replace('.', '/')}.py").open("a") as file:
            file.write(f"{line}\n")
        done = lint_imports(tmp_path)
        assert 1 == done.returncode, done.stdout + done.stderr
        assert f"{contract} BROKEN" in done.stdout.splitlines()

    def test_third_parties(self):
        """
        What is not ours and not in the standard library: two packages, and one for each of two extras.

        (SQLite's drivers are imported by their names.)
        """
        graph = grimp.build_graph(PACKAGE, include_external_packages=True, cache_dir=None)
        top = {module.partition(".")[0] for module in graph.modules}
        theirs = top - set(sys.stdlib_module_names) - {PACKAGE}
        assert {"alembic", "prometheus_client", "psycopg", "sqlalchemy"} == theirs
        importers = graph.find_modules_that_directly_import("alembic")
        assert {f"{PACKAGE}.migrate"} == importers
        assert {f"{PACKAGE}.metrics"} == graph.find_modules_that_directly_import("prometheus_client")


class TestSize:
    @pytest.mark.parametrize("module", sorted(MODULES))
    def test_lines(self, module):
        """A file is short enough to be read in one sitting."""
        assert len(MODULES[module].read_text().splitlines()) <= EXCEPTIONS.get(module, LONGEST)


class TestPackage:
    def test_all_is_sorted(self):
        assert sorted(kkt_buffer.__all__) == kkt_buffer.__all__

    def test_all_is_complete(self):
        """What `__init__` imports is what the package offers: no more, no less, nothing twice."""
        statements = [
            node for node in ast.parse(MODULES["__init__"].read_text()).body if isinstance(node, ast.ImportFrom)
        ]
        imported = [alias.asname or alias.name for statement in statements for alias in statement.names]
        assert sorted(imported) == sorted(kkt_buffer.__all__)

    def test_version(self):
        """One version: in the project file, in the code, and at the top of the changelog."""
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        assert project["version"] == kkt_buffer.__version__
        assert project["version"] == re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1]

    def test_import_is_light(self):
        """Alembic costs as much as SQLAlchemy, and a buffer on SQLite that is up to date has no use for it."""
        heavy = {"alembic", "sqlalchemy", "sqlalchemy.dialects.postgresql"}
        program = f"import sys, kkt_buffer.buffer; print({heavy} & {{*sys.modules}})"
        assert "{'sqlalchemy'}\n" == run_python(program).stdout

    def test_import_says_nothing(self):
        done = run_python("import kkt_buffer.buffer")
        assert ("", "") == (done.stdout, done.stderr)

    @pytest.mark.parametrize("module", sorted(name for name in MODULES if name.split(".")[0] not in SPEAKING))
    def test_no_print(self, module):
        """A library speaks through what it returns, raises and logs."""
        assert "print" not in names_used(MODULES[module].read_text())

    def test_print_is_seen(self):
        assert "print" in names_used("def tell(say=print): say()")


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no checkout, so nobody knows what belongs to it")
class TestRepository:
    def test_top_level(self):
        """Whoever opens the repository sees these, and dotfiles; everything else has its place below them."""
        command = ["git", "-c", "safe.directory=*", "ls-files"]
        files = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
        top = {name.partition("/")[0] for name in files}
        expected = {"src", "migrations", "tests", "alembic.ini", "pyproject.toml", "Makefile"}
        expected |= {"README.md", "CHANGELOG.md", "LICENSE"}
        assert expected == {name for name in top if not name.startswith(".")}
