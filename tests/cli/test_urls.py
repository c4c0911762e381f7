"""A buffer that is named by the URL of a server: what is refused there, and what is not printed."""

import pytest
import servers
from builders import shown
from sqlalchemy import make_url


@pytest.fixture
def nowhere(server_buffer):
    """A URL at which nobody answers."""
    return make_url(server_buffer).set(port=1).render_as_string(hide_password=False)


class TestFileOnly:
    @pytest.mark.parametrize(
        ("command", "told"),
        [
            (["backup"], "pg_basebackup"),
            (["backup", "folder"], "pg_basebackup"),
            (["export"], "pg_dump"),
            (["demo"], "Without a path it is data/demo.db."),
        ],
    )
    def test_refused(self, server_buffer, refused, tmp_path, monkeypatch, command, told):
        """What works on a file alone says so, and what to use on a server."""
        monkeypatch.chdir(tmp_path)
        line = refused(*command, "--db", server_buffer)
        assert line.startswith(f"error: {shown(server_buffer)}: this command needs a file. Nothing was changed. ")
        assert told in line
        assert [] == list(tmp_path.iterdir())

    def test_copy(self, server_buffer, refused, tmp_path):
        """So does the form of `backup` that names both."""
        assert "pg_basebackup" in refused("backup", server_buffer, tmp_path / "copy.db")
        assert [] == list(tmp_path.iterdir())


class TestPassword:
    @pytest.mark.parametrize(
        "command",
        ["status", "status --json", "verify", "check", "list", "upgrade", "backup", "export", "demo", "metrics"],
    )
    def test_hidden(self, server_buffer, run, command):
        """No command prints the password."""
        ended = run(*command.split(), "--db", server_buffer)
        assert servers.PASSWORD in server_buffer
        assert servers.PASSWORD not in ended.out + ended.err

    @pytest.mark.parametrize("command", ["status", "check", "upgrade"])
    def test_hidden_in_errors(self, nowhere, run, command):
        """Nor if the server cannot be reached, which is told in one line."""
        ended = run(command, nowhere)
        assert servers.PASSWORD in nowhere
        assert servers.PASSWORD not in ended.out + ended.err
        assert 1 == len((ended.out + ended.err).splitlines())
        assert {"check": 2}.get(command, 1) == ended.status

    def test_malformed(self, run):
        """Nor if the URL is not one."""
        ended = run("status", "postgresql+psycopg://postgres:geheim@[shop/buffer")
        assert (1, "") == (ended.status, ended.out)
        assert ended.err.startswith("error: ")
        assert "geheim" not in ended.err


def test_url_of_a_file(used, done):
    """A file may be named by its URL too."""
    assert done("status", used).splitlines()[1:] == done("status", f"sqlite:///{used}").splitlines()[1:]
