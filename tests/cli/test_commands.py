"""The commands: what they print, what they refuse, and their exit status."""

import os
import re
import subprocess
import sys

import pytest
from builders import another_program, everything, shown

import kkt_buffer
from kkt_buffer import create_buffer_engine, demo
from kkt_buffer.cli import main
from kkt_buffer.migrate import revisions

HEAD = revisions()[-1]


def stored_tables(path):
    with another_program(path) as connection:
        return [name for (name,) in connection.execute("SELECT name FROM sqlite_master")]


@pytest.fixture
def without_schema(tmp_path):
    """A database that is as ours should be, but has no tables."""
    path = tmp_path / "bare.db"
    create_buffer_engine(path).dispose()
    return path


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("Not a database, but somebody's notes.\n" * 100)
    return path


@pytest.fixture
def of_another_program(tmp_path):
    """A database with a table that is called like ours, and is not."""
    path = tmp_path / "shop.db"
    with another_program(path) as connection:
        connection.execute("CREATE TABLE receipts (number INTEGER PRIMARY KEY, total REAL)")
        connection.execute("INSERT INTO receipts VALUES (1, 64.9)")
    return path


class TestUpgrade:
    def test_new(self, tmp_path, capsys):
        """The file is made, with the folders that it needs."""
        path = tmp_path / "shop" / "till 1" / "buffer.db"
        assert 0 == main(["upgrade", str(path)])
        assert (f"{path}: schema {HEAD} (was none)\n", "") == capsys.readouterr()
        assert 0 == main(["status", str(path)])

    def test_new_on_a_server(self, postgresql_url, capsys):
        """The schema must be there, empty or with the tables of others."""
        assert 0 == main(["upgrade", postgresql_url])
        assert (f"{shown(postgresql_url)}: schema {HEAD} (was none)\n", "") == capsys.readouterr()
        assert 0 == main(["status", postgresql_url])

    def test_again(self, filled, capsys):
        """A second time changes nothing, and says which schema was there."""
        before = everything(filled)
        assert 0 == main(["upgrade", filled])
        assert (f"{shown(filled)}: schema {HEAD} (was {HEAD})\n", "") == capsys.readouterr()
        assert before == everything(filled)

    def test_old(self, tmp_path, capsys, pytestconfig):
        """A buffer of an earlier release says what it was, too."""
        path = tmp_path / "buffer.db"
        alembic = [sys.executable, "-m", "alembic", "-x", f"db={path}", "upgrade", "0001"]
        subprocess.run(alembic, cwd=pytestconfig.rootpath, check=True, capture_output=True)
        assert 0 == main(["upgrade", str(path)])
        assert (f"{path}: schema {HEAD} (was 0001)\n", "") == capsys.readouterr()

    def test_program(self, tmp_path):
        """`python -m kkt_buffer` is the same command line as `kkt-buffer`, with the same exit status."""
        command = [sys.executable, "-m", "kkt_buffer", "upgrade"]
        done = subprocess.run([*command, "buffer.db"], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (0, f"buffer.db: schema {HEAD} (was none)\n") == (done.returncode, done.stdout)
        done = subprocess.run([*command, "."], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (1, "") == (done.returncode, done.stdout)
        assert done.stderr.splitlines()[-1].startswith("error: ")


def test_version(run):
    assert (0, f"kkt-buffer {kkt_buffer.__version__}\n", "") == run("--version")


class TestErrors:
    def test_missing(self, tmp_path, refused):
        """Looking at a buffer that is not there does not make it."""
        path = tmp_path / "shop" / "buffer.db"
        expected = f"error: there is no buffer at {path}; check the path (--db PATH, or BUFFER_DB_PATH)"
        assert expected == refused("status", path)
        assert [] == list(tmp_path.iterdir())

    def test_below_a_file(self, text_file, refused):
        """A path that no file can have is told of by whoever tries to open it."""
        assert "Not a directory" in refused("status", text_file / "buffer.db")

    def test_empty_file(self, tmp_path, refused):
        path = tmp_path / "buffer.db"
        path.touch()
        assert f"error: {path} is not a buffer: the file is empty. Nothing was changed." == refused("status", path)
        assert b"" == path.read_bytes()

    @pytest.mark.parametrize("command", ["status", "upgrade", "demo"])
    def test_folder(self, command, tmp_path, refused):
        assert f"{tmp_path} is a folder" in refused(command, tmp_path)
        assert [] == list(tmp_path.iterdir())

    @pytest.mark.parametrize("command", ["status", "upgrade", "demo"])
    def test_no_database(self, command, text_file, refused):
        """A file that is something else is left as it is, to the byte."""
        before = text_file.read_bytes()
        assert "the file is not an SQLite database" in refused(command, text_file)
        assert before == text_file.read_bytes()

    def test_no_schema(self, without_schema, refused):
        """The message says how to get one."""
        assert f"no tables of a buffer where this release needs schema {HEAD}" in refused("status", without_schema)
        assert [] == stored_tables(without_schema)

    def test_no_schema_on_a_server(self, postgresql_url, refused):
        assert f"no tables of a buffer where this release needs schema {HEAD}" in refused("status", postgresql_url)
        assert [] == everything(postgresql_url)

    @pytest.mark.parametrize("command", ["status", "upgrade"])
    def test_newer(self, command, filled, refused):
        """What a newer release made is not for this one to touch."""
        with another_program(filled) as connection:
            connection.execute("UPDATE kkt_buffer_version SET version_num = '9999'")
        before = everything(filled)
        assert f"schema 9999, made by kkt-buffer {kkt_buffer.__version__}; this is" in refused(command, filled)
        assert before == everything(filled)

    def test_no_wal(self, of_another_program, refused):
        """A database that is not kept as a buffer is, is none; it is left as it is, to the byte."""
        before = of_another_program.read_bytes()
        line = refused("status", of_another_program)
        assert f"{of_another_program} is not a buffer: its journal mode is 'delete'. Nothing was changed." in line
        assert before == of_another_program.read_bytes()

    @pytest.mark.parametrize("command", ["upgrade", "demo"])
    def test_of_another_program(self, command, of_another_program, refused):
        """Tables of somebody else that are called like ours are neither adopted nor changed."""
        before = everything(of_another_program)
        line = refused(command, of_another_program)
        assert f"the upgrade to schema {HEAD} failed and was rolled back; the database is as it was." in line
        assert "table receipts already exists" in line
        assert before == everything(of_another_program)

    def test_nonsense_in_config(self, filled, refused):
        with another_program(filled) as connection:
            connection.execute("UPDATE config SET value = 'many' WHERE key = 'buffer_capacity'")
        assert "config buffer_capacity is 'many'" in refused("status", filled)

    @pytest.mark.parametrize(
        "path", ["", "mysql://shop/buffer", ":memory:"], ids=["empty", "another database", "memory"]
    )
    def test_bad_path(self, path, refused):
        assert refused("status", path)

    def test_memory(self, refused):
        """The demo's processes would each have a buffer of their own: said before anything is played."""
        assert "error: path: the demo needs a file, because several processes open it" == refused("demo", ":memory:")

    def test_real_receipts(self, used, refused):
        """The demo delivers to nobody, so it keeps away from receipts that somebody needs."""
        before = everything(used)
        assert "this buffer holds 4 receipts that are not the demo's" in refused("demo", used)
        assert before == everything(used)

    def test_broken_demo(self, path, monkeypatch, refused):
        """A demo that does not prove what it should is an error like any other."""

        def broken(path, operate):
            raise RuntimeError("1 acknowledged receipts are not in the buffer: ['lost']")

        monkeypatch.setattr(demo, "run", broken)
        assert "error: 1 acknowledged receipts are not in the buffer: ['lost']" == refused("demo", path)

    def test_reader_gone(self, buffer):
        """Whoever reads what we say may stop before the end, as `head` does: no word of it, no traceback."""
        reading, writing = os.pipe()
        os.close(reading)
        with open(writing, "wb") as nowhere:
            status = [sys.executable, "-m", "kkt_buffer", "status", buffer]
            done = subprocess.run(status, stdout=nowhere, stderr=subprocess.PIPE, text=True, check=False)
        assert (1, "") == (done.returncode, done.stderr)

    def test_interrupted(self, path, monkeypatch, capsys):
        """Control-C is no error of ours; the exit status is the one that shells give it."""

        def interrupt(path, operate):
            raise KeyboardInterrupt

        monkeypatch.setattr(demo, "run", interrupt)
        assert 130 == main(["demo", str(path)])
        assert ("", "interrupted; what was acknowledged is safe\n") == capsys.readouterr()

    @pytest.mark.parametrize(
        "argv",
        [
            [],
            ["deliver"],
            ["status", "buffer.db", "--xml"],
            ["demo", "a.db", "b.db"],
            ["status", "a.db", "--db", "b.db"],
            ["requeue", "--reason", "mended"],
            ["requeue", "an-id", "--all", "--reason", "mended"],
            ["requeue", "--all", "--error", "HTTP", "--reason", "mended"],
            ["resolve", "an-id"],
            ["backup", "a.db", "b.db", "c.db"],
            ["backup", "a.db", "b.db", "--keep", "2"],
            ["list", "--status", "lost"],
        ],
    )
    def test_not_understood(self, argv, capsys):
        """A command line that makes no sense is told apart from one that failed."""
        with pytest.raises(SystemExit) as caught:
            main(argv)
        assert 2 == caught.value.code
        out, err = capsys.readouterr()
        assert "" == out
        assert err.startswith("usage: kkt-buffer")
        assert err.endswith(" --help`\n")

    def test_status_not_known(self, run):
        """The values that are allowed are named as a user types them."""
        assert "(choose from 'pending', 'syncing', 'synced', 'failed'); see `kkt-buffer list --help`" in (
            run("list", "--status", "lost").err
        )

    def test_time_not_understood(self, run):
        """It is told which form is expected."""
        assert "--maintenance-at: expected a time of the day like 03:30, got '25:00'; see" in (
            run("work", "shop:send", "--maintenance-at", "25:00").err
        )


class TestHelp:
    def test_width(self, run, monkeypatch):
        """The help of each command fits into a terminal of 80 columns, and keeps its paragraphs."""
        monkeypatch.setenv("COLUMNS", "80")
        overview = run("--help").out
        commands = re.findall(r"^    ([a-z-]+) ", overview, re.MULTILINE)
        assert {"status", "requeue", "work", "verify"} < set(commands)
        texts = {command: run(command, "--help").out for command in commands} | {"": overview}
        assert {} == {command: text for command, text in texts.items() if max(map(len, text.splitlines())) > 80}
        assert "\n\nWARNING (1): it is full to -w percent" in texts["check"]


class TestOption:
    """`--db` stands in front of the command or behind it."""

    def test_in_front(self, filled, done):
        assert done("status", "--db", filled) == done("--db", filled, "status")

    def test_both(self, used, tmp_path, done):
        """The one behind the command counts."""
        assert done("status", "--db", used) == done("--db", tmp_path / "other.db", "status", "--db", used)
