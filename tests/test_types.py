"""What a type checker and an editor learn of the package. `make types` checks the README's code and `service.py`."""

import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from builders import STATUSES
from operations_table import public_names

from kkt_buffer import ReceiptRepository, buffer
from kkt_buffer.arguments import StatusName
from kkt_buffer.config import CONFIG_RULES, NumberKey

ROOT = Path(__file__).parents[1]


class TestLiterals:
    """A list that type checkers need is a copy: it has what the original has."""

    def test_settings(self):
        assert (*CONFIG_RULES,) == get_args(NumberKey)

    def test_statuses(self):
        assert get_args(StatusName) == STATUSES


@pytest.mark.parametrize("name", sorted(vars(buffer).keys() & public_names()))
def test_documented(name):
    """A function of `buffer` has the documentation of the operation, and its signature without `self`."""
    function, operation = getattr(buffer, name), getattr(ReceiptRepository, name)
    assert operation.__doc__ == function.__doc__
    assert [*inspect.signature(operation).parameters][1:] == [*inspect.signature(function).parameters]


@pytest.mark.slow
@pytest.mark.one_python
@pytest.mark.skipif(importlib.util.find_spec("pyright") is None, reason="pyright is in the extra dev alone")
def test_would_be_found(tmp_path):
    """Both checkers see a wrong type in the README, and one that a service may use although it should not."""
    (tmp_path / "README.md").write_text("```python\nfrom kkt_buffer import buffer\n\nbuffer.get_config(5)\n```\n")
    for other in ("src/kkt_buffer", "src/kkt_buffer/postgresql", "migrations"):
        (tmp_path / other).mkdir(parents=True)
        (tmp_path / other / "README.md").touch()
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "service.py").write_text("import kkt_buffer\n\nkkt_buffer.upgrade  # type: ignore[name]\n")
    script = [sys.executable, ROOT / ".ci" / "users_types.py"]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode
    for name in ("readme.py", "service.py"):
        assert re.search(rf"{name}:3: error", done.stdout), "mypy"
        assert re.search(rf"{name}:3:\d+ - error", done.stdout), "pyright"
