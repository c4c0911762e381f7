"""`kkt-buffer move`: a file to a server."""

import re

import pytest
import servers
from builders import everything, fill, shown
from sqlalchemy import make_url
from terminal import in_terminal


@pytest.fixture
def filled_server(server_buffer):
    """A buffer on a server, with a receipt of every status."""
    fill(server_buffer)
    return server_buffer


class TestMove:
    def test_told(self, used, server_buffer, done):
        """It says what was moved, how long that took, and what to do next. Both can be read afterwards."""
        first, second = done("move", used, server_buffer).splitlines()
        counts = "4 receipts, 1 dead letter, 6 events, 13 settings"
        assert re.fullmatch(
            rf"{re.escape(shown(server_buffer))}: {counts}, in \d+\.\d s; every row was compared", first
        )
        assert f"Keep {used}: it is closed, and has every row." in second
        there, here = done("status", server_buffer), done("status", used)
        refused = [line for line in here.splitlines() if line.startswith("takes receipts ")]
        assert there.splitlines()[1:] == [line for line in here.splitlines()[1:] if line not in refused]
        assert ["NO: it was moved to"] == [line.partition("| ")[2][:19] for line in refused]

    def test_again(self, used, server_buffer, done):
        done("move", used, server_buffer)
        counts = "4 receipts, 1 dead letter, 6 events, 13 settings"
        told = f"{shown(server_buffer)}: {used} was moved here before; now it holds {counts}. Nothing was changed.\n"
        assert told == done("move", used, server_buffer)

    def test_closed(self, used, server_buffer, done, refused):
        """A command that changes the file is refused, and names the server."""
        done("move", used, server_buffer)
        there = make_url(server_buffer)._replace(username=None, password=None).render_as_string()
        told = f"error: this buffer was moved to {there}. Nothing was changed here; the file can only be read."
        assert refused("config", "buffer_capacity", "5", "--db", used).startswith(told)
        assert "no need to restore" not in done("verify", used)

    def test_monitored(self, used, server_buffer, run):
        """A monitor that still looks at the file is told so, and not of receipts that are delivered elsewhere."""
        run("move", used, server_buffer)
        checked = run("check", "--db", used)
        assert 2 == checked.status
        assert checked.out.startswith("KKT CRITICAL - TAKES NO RECEIPTS: it was moved to ")

    def test_progress(self, used, server_buffer):
        """A person sees how far it is."""
        ended = in_terminal("move", used, server_buffer)
        assert 0 == ended.status
        for what in ("checking", "moving", "comparing"):
            assert f"{what} receipts: 4 of 4 (100 %)\n" in ended.out

    def test_password(self, used, server_buffer, run):
        """The password is not printed, whatever becomes of it."""
        for told in (run("move", used, server_buffer), run("move", used, server_buffer)):
            assert servers.PASSWORD not in told.out + told.err


class TestRefused:
    @pytest.mark.parametrize(
        ("source", "target", "told"),
        [
            (
                "used",
                "other.db",
                "other.db: expected the URL of a server, postgresql+psycopg://…. Nothing was changed.",
            ),
            ("server_buffer", "server_buffer", "this command needs a file. Nothing was changed. Move a server by its"),
            ("missing.db", "server_buffer", "there is no buffer at missing.db"),
            (":memory:", "server_buffer", "an in-memory buffer"),
            ("used", "nowhere", "connection failed"),
        ],
    )
    def test_refused(self, used, server_buffer, tmp_path, monkeypatch, refused, source, target, told):
        """It is refused in one line, without the password, before anything is changed."""
        monkeypatch.chdir(tmp_path)
        nowhere = make_url(server_buffer).set(port=1).render_as_string(hide_password=False)
        names = {"used": used, "server_buffer": server_buffer, "nowhere": nowhere}
        before = everything(used), everything(server_buffer), sorted(tmp_path.iterdir())
        line = refused("move", names.get(source, source), names.get(target, target))
        assert told in line
        assert servers.PASSWORD not in line
        assert before == (everything(used), everything(server_buffer), sorted(tmp_path.iterdir()))

    def test_not_empty(self, used, filled_server, refused):
        """A server that holds another buffer."""
        before = everything(used), everything(filled_server)
        line = refused("move", used, filled_server)
        assert "is not empty: it holds another buffer" in line
        assert servers.PASSWORD not in line
        assert before == (everything(used), everything(filled_server))

    def test_named_twice(self, used, server_buffer, run):
        """SRC is the file, and nothing else is."""
        ended = run("--db", used, "move", used, server_buffer)
        assert 2 == ended.status
        assert "expected SRC and DST without --db; see `kkt-buffer move --help`" in ended.err
        assert "--db" not in run("move", "--help").out

    def test_interrupted(self, used, server_buffer, server_engine, run):
        """Who ends a move half-way, or meets an error, is told that the file takes nothing until it is complete."""
        with server_engine.begin() as connection:
            connection.exec_driver_sql("ALTER TABLE receipts ADD CONSTRAINT no_tills CHECK (pos_id <> 'till-1')")
        ended = run("move", used, server_buffer)
        assert 1 == ended.status
        assert f"{used} takes no receipts: a move to " in ended.err
        assert "is not complete: keep this file, and run the move again" in ended.err
