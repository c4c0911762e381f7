"""Which module may import which, and what else holds the package together."""

import ast
import subprocess
import sys
from pathlib import Path

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
INTERNAL = set(MODULES) - {"__init__", "__main__", "buffer", "cli", "demo"}

# Each module, and those of ours that it may import. The whole design is in this table; a new module gets a line.
ARROWS = {
    "errors": set(),
    "arguments": set(),
    "hlc": {"errors"},
    "sqlite.gate": {"errors"},
    "config": {"errors"},
    "models": {"errors"},
    "sqlite.schema": {"config"},
    "sqlite.ddl": set(),
    "sqlite.engine": {"errors", "sqlite.gate"},
    "progress": set(),
    "sqlite.file": {"sqlite.engine", "progress"},
    "drift": {"models", "sqlite.ddl", "sqlite.schema"},
    "migrate": {"drift", "models", "sqlite.engine", "errors"},
    "repository": {
        f"operations.{subject}" for subject in ("dead_letters", "events", "integrity", "leases", "pruning", "status")
    },
    "sqlite.refusals": {"errors", "sqlite.schema"},
    "direct": {"sqlite.engine", "errors", "sqlite.refusals"},
    "group_commit": {"errors"},
    "transaction": {"sqlite.engine", "errors", "migrate", "direct", "sqlite.refusals"},
    "operations.settings": {"arguments", "config", "models", "transaction"},
    "operations.status": {"arguments", "config", "errors", "models", "direct", "operations.settings", "sqlite.schema"},
    "operations.events": {"arguments", "models", "transaction"},
    "operations.receipts": {
        "arguments",
        "errors",
        "hlc",
        "models",
        "direct",
        "group_commit",
        "sqlite.refusals",
        "operations.status",
    },
    "operations.leases": {"arguments", "config", "errors", "models", "operations.receipts"},
    "operations.dead_letters": {"arguments", "errors", "models", "direct", "operations.receipts"},
    "operations.pruning": {"operations.settings", "sqlite.ddl"},
    "operations.integrity": {"sqlite.file", "config", "errors", "models", "operations.settings"},
    "delivery": {"arguments", "errors", "models", "repository"},
    "buffer": {"delivery", "sqlite.engine", "migrate", "models", "repository"},
    "demo": {"config", "delivery", "sqlite.engine", "errors", "migrate", "models", "repository"},
    "__init__": INTERNAL | {"buffer"},
    "cli": INTERNAL | {"demo"},
    "operations": set(),
    "sqlite": set(),
    "__main__": {"cli"},
}

# What is not ours and not in the standard library; the driver of the extra `sqlite` is imported by name, in `engine`.
THIRD_PARTY = {
    "models": {"sqlalchemy"},
    "sqlite.schema": {"sqlalchemy"},
    "sqlite.engine": {"sqlalchemy"},
    "sqlite.file": {"sqlalchemy"},
    "drift": {"sqlalchemy"},
    "migrate": {"sqlalchemy", "alembic"},
    "direct": {"sqlalchemy"},
    "sqlite.refusals": {"sqlalchemy"},
    "transaction": {"sqlalchemy"},
    "operations.settings": {"sqlalchemy"},
    "operations.status": {"sqlalchemy"},
    "operations.events": {"sqlalchemy"},
    "operations.receipts": {"sqlalchemy"},
    "operations.leases": {"sqlalchemy"},
    "operations.dead_letters": {"sqlalchemy"},
    "operations.pruning": {"sqlalchemy"},
    "operations.integrity": {"sqlalchemy"},
    "buffer": {"sqlalchemy"},
    "demo": {"sqlalchemy"},
}


def module_of(name):
    """The module of ours that a dotted name below the package belongs to."""
    parts = name.split(".")
    while parts and ".".join(parts) not in MODULES:
        parts.pop()
    return ".".join(parts) or "__init__"


def imports(source):
    """Every import of a module, as (line, dotted name): inside functions and for the type checker too."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origin = ".".join(filter(None, [PACKAGE if node.level else None, node.module]))
            found += [(node.lineno, f"{origin}.{alias.name}") for alias in node.names]
    return sorted(found)


def forbidden(module, source):
    """What is wrong with the imports of a module, in words."""
    if module not in ARROWS:
        return [f"{module} is not in ARROWS: say there which of our modules it may import"]
    problems = []
    for line, name in imports(source):
        top, _, rest = name.partition(".")
        ours = module_of(rest)
        if top == PACKAGE and ours not in ARROWS[module]:
            problems.append(f"{module}, line {line}: must not import {ours}")
        elif top not in {PACKAGE, *sys.stdlib_module_names, *THIRD_PARTY.get(module, ())}:
            problems.append(f"{module}, line {line}: must not import {top}")
    return problems


def names_used(source):
    return {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}


class TestArrows:
    @pytest.mark.parametrize("module", sorted(MODULES))
    def test_kept(self, module):
        """A module imports what the table allows it, and nothing else."""
        assert [] == forbidden(module, MODULES[module].read_text())

    @pytest.mark.parametrize("module", sorted(ARROWS))
    def test_no_stale_line(self, module):
        """The table speaks of modules that are there."""
        assert {module, *ARROWS[module]} <= set(MODULES)

    def test_buffer_is_the_top(self):
        """Nothing that is imported by others reaches for the default repository."""
        assert {"__init__"} == {module for module, allowed in ARROWS.items() if "buffer" in allowed}

    def test_no_circle(self):
        """Some order exists in which every module comes after all that it imports."""
        left = dict(ARROWS)
        while ready := [module for module, allowed in left.items() if not allowed & set(left)]:
            for module in ready:
                del left[module]
        assert {} == left


class TestChecker:
    @pytest.mark.parametrize(
        "source",
        [
            "import kkt_buffer.buffer",
            "import kkt_buffer.buffer as anything",
            "from kkt_buffer import buffer",
            "from kkt_buffer import errors, buffer",
            "from kkt_buffer.buffer import insert_receipt",
            "from . import buffer",
            "from .buffer import insert_receipt",
            "def lazy():\n    from kkt_buffer.buffer import insert_receipt",
            "if TYPE_CHECKING:\n    from kkt_buffer import buffer",
            "try:\n    import kkt_buffer.buffer\nexcept ImportError:\n    pass",
        ],
    )
    def test_sees(self, source):
        """A forbidden import is found, however it is written and wherever it stands."""
        line = 1 + source[: source.index("buffer")].count("\n")
        assert [f"hlc, line {line}: must not import buffer"] == forbidden("hlc", source)

    @pytest.mark.parametrize(
        "source",
        ["import kkt_buffer", "from kkt_buffer import Receipt", "from kkt_buffer import *", "from . import Receipt"],
    )
    def test_sees_the_package(self, source):
        """The public names are for others: a module of ours that takes one from the package goes in a circle."""
        assert ["repository, line 1: must not import __init__"] == forbidden("repository", source)

    @pytest.mark.parametrize(
        ("module", "source", "top"),
        [
            ("hlc", "from sqlalchemy.orm import Session", "sqlalchemy"),
            ("repository", "import alembic.config", "alembic"),
            ("models", "def lazy():\n    import requests, json", "requests"),
        ],
    )
    def test_sees_third_parties(self, module, source, top):
        line = source.count("\n") + 1
        assert [f"{module}, line {line}: must not import {top}"] == forbidden(module, source)

    def test_sees_each(self):
        source = "import json\nimport numpy\nfrom kkt_buffer.errors import SchemaError\nfrom kkt_buffer import buffer"
        expected = ["hlc, line 2: must not import numpy", "hlc, line 4: must not import buffer"]
        assert expected == forbidden("hlc", source)

    def test_new_module(self):
        """A module that nobody has placed is told of, whatever it imports."""
        expected = ["novelty is not in ARROWS: say there which of our modules it may import"]
        assert expected == forbidden("novelty", "")


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

    def test_import_is_light(self):
        """Alembic costs as much as SQLAlchemy, and a buffer that is up to date has no use for it."""
        program = "import sys, kkt_buffer.buffer; print({'alembic', 'sqlalchemy'} & {*sys.modules})"
        assert "{'sqlalchemy'}\n" == run_python(program).stdout

    def test_import_says_nothing(self):
        done = run_python("import kkt_buffer.buffer")
        assert ("", "") == (done.stdout, done.stderr)

    @pytest.mark.parametrize("module", sorted(set(MODULES) - {"__main__", "cli", "demo"}))
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
        expected = {"src", "migrations", "tests", "alembic.ini", "pyproject.toml", "README.md", "Makefile"}
        assert expected == {name for name in top if not name.startswith(".")}
