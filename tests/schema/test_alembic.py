"""The command line of Alembic in a checkout, and what `make migration` writes."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from alembic import command
from alembic.config import Config
from builders import a_receipt, everything
from schema.helpers import ALEMBIC, HEAD, ROOT, alembic, schema

from kkt_buffer import (
    ReceiptRepository,
    check,
    migrate,
)


class TestAlembic:
    def test_up_check_down(self, tmp_path):
        """The three commands work in a checkout, make the folder, and leave nothing of ours behind."""
        path = tmp_path / "shop" / "buffer.db"
        for step in (["upgrade", "head"], ["check"], ["downgrade", "base"]):
            done = alembic("-x", f"db={path}", *step)
            assert done.returncode == 0, done.stdout
            assert "Warning" not in done.stdout
        assert not [line for line in everything(path) if "receipt" in line]

    def test_which_database(self, tmp_path):
        """`-x db=` comes first, then BUFFER_DB_PATH, then alembic.ini."""
        (tmp_path / "alembic.ini").write_text((ROOT / "alembic.ini").read_text().replace("%(here)s", str(ROOT)))
        expected = tmp_path / "x.db", tmp_path / "environment.db", tmp_path / "data" / "buffer.db"
        alembic("-x", f"db={expected[0]}", "upgrade", "head", cwd=tmp_path, BUFFER_DB_PATH=str(expected[1]))
        assert [True, False, False] == [path.exists() for path in expected]
        alembic("upgrade", "head", cwd=tmp_path, BUFFER_DB_PATH=str(expected[1]))
        assert [True, True, False] == [path.exists() for path in expected]
        alembic("upgrade", "head", cwd=tmp_path, BUFFER_DB_PATH="")
        assert [True, True, True] == [path.exists() for path in expected]

    def test_url(self, tmp_path):
        assert alembic("-x", f"db=sqlite:///{tmp_path}/buffer.db", "upgrade", "head").returncode == 0
        assert (tmp_path / "buffer.db").exists()

    @pytest.mark.parametrize("target", ["{folder}", "mysql://localhost/shop"])
    def test_refused(self, tmp_path, target):
        """A target that cannot be used is told in one line."""
        done = alembic("-x", f"db={target.format(folder=tmp_path)}", "upgrade", "head")
        assert done.returncode != 0
        assert "Traceback" not in done.stdout
        assert re.search(r"(FAILED:|ERROR) .*(is a folder|expected a path)", done.stdout)

    def test_offline(self, tmp_path):
        """A script of SQL would not be one transaction: refused."""
        done = alembic("-x", f"db={tmp_path}/buffer.db", "upgrade", "head", "--sql")
        assert "FAILED: a script of SQL cannot migrate SQLite safely" in done.stdout

    @pytest.mark.parametrize("status", ["pending", "synced", "failed"])
    def test_downgrade_with_receipts(self, path, status, opened):
        """A buffer that holds receipts is not taken away."""
        engine = opened(path)
        a_receipt(ReceiptRepository(engine), status)
        engine.dispose()
        before = everything(path)
        done = alembic("-x", f"db={path}", "downgrade", "base")
        assert "refusing to drop the buffer: it holds 1 receipts. Nothing was changed" in done.stdout
        assert before == everything(path)

    def test_downgrade_with_settings(self, path, opened):
        """Nor is one without receipts whose settings were changed."""
        engine = opened(path)
        ReceiptRepository(engine).set_config("buffer_capacity", 500)
        engine.dispose()
        before = everything(path)
        done = alembic("-x", f"db={path}", "downgrade", "base")
        assert "it has changed settings (buffer_capacity). Nothing was changed" in done.stdout
        assert before == everything(path)

    def test_without_an_ini(self, tmp_path, opened):
        """A program may run Alembic by a configuration of its own making, without a file."""
        path = tmp_path / "buffer.db"
        config = Config()
        config.set_main_option("script_location", str(migrate.SCRIPTS))
        config.set_main_option("sqlalchemy.url", str(path))
        command.upgrade(config, "head")
        check(opened(path))

    def test_up_down_up(self, path):
        """Going down and up again arrives at the same schema."""
        before = schema(path)
        for step in (["downgrade", "base"], ["upgrade", "head"]):
            assert alembic("-x", f"db={path}", *step).returncode == 0
        assert before == schema(path)


class TestRevision:
    """What `make migration` writes."""

    def test_numbered_and_written(self, tmp_path):
        """The next number, the rules, and what the models and `schema` differ in, triggers too."""
        copy = tmp_path / "copy"
        for folder in ("src", "migrations", ".ci"):
            shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "alembic.ini", copy)
        for name, old, new in (
            (
                "models.py",
                "    changed_at: Mapped[int | None]\n",
                "    changed_at: Mapped[int | None]\n    shade: Mapped[str | None]\n",
            ),
            ("sqlite/schema.py", "'Buffer full'", "'Buffer is full'"),
        ):
            file = copy / "src" / "kkt_buffer" / name
            before = file.read_text()
            assert before.count(old) >= 1
            file.write_text(before.replace(old, new))
        # Without the coverage of this process, which would look into the copy.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
        environment["PYTHONPATH"] = str(copy / "src")
        done = subprocess.run(
            ["sh", ".ci/migration.sh", Path(sys.executable).parent, "Add the shade."],
            cwd=copy,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        (script,) = (copy / "migrations" / "versions").glob(f"{int(HEAD) + 1:04}_*.py")
        assert script.name.endswith("_add_the_shade.py")
        written = script.read_text().replace("'", '"')  # where there is no ruff, the script is not formatted
        for expected in (
            f'down_revision = "{HEAD}"',
            "Rules for migrations",
            '"shade"',
            "DROP TRIGGER trg_guard_capacity",
        ):
            assert expected in written
        path = tmp_path / "buffer.db"
        for step in (["upgrade", "head"], ["check"], ["downgrade", HEAD], ["upgrade", "head"], ["check"]):
            done = subprocess.run(
                [*ALEMBIC, "-x", f"db={path}", *step],
                cwd=copy,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stderr

    def test_needs_words(self):
        """Without a message nothing is written, and the command is shown as it must be."""
        script = ["sh", ".ci/migration.sh", Path(sys.executable).parent, ""]
        done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, check=False)
        assert "make migration m=" in done.stderr
        assert done.returncode != 0


def test_shows_its_steps(tmp_path):
    """The command line says which revisions it runs."""
    done = alembic("-x", f"db={tmp_path}/buffer.db", "upgrade", "head")
    for revision in migrate.revisions():
        assert re.search(rf"INFO Running upgrade .*-> {revision}", done.stdout)
