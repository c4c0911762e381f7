"""The throwaway servers: none is left behind, and where there is none, the run says so."""

import contextlib
import re
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest
import servers
from builders import start_python, unmeasured
from server_guard import processes_in

HERE = Path(__file__).parent
ON_A_SERVER = f"{HERE / 'test_servers.py'}::TestServer::test_schema"

OWNER = """
    import os, sys
    from servers import Server

    server = Server()
    server.create()
    server.start()
    print(server.folder, flush=True)
    sys.stdin.read()
"""


def pytest_without_server(*arguments, folder, **variables):
    """A run of a test that needs a server, where there is none."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", ON_A_SERVER]
    variables = {"KKT_BUFFER_NO_SERVER": "1", "COVERAGE_FILE": str(folder / "coverage"), **variables}
    environment = {name: value for name, value in unmeasured().items() if name != "KKT_BUFFER_PROOF"} | variables
    return subprocess.run(
        [*command, *arguments], cwd=HERE.parent, env=environment, capture_output=True, text=True, check=False
    )


class TestServer:
    def test_schema(self, postgresql_url):
        """A URL leads to a schema of its own, empty, where names without a schema are looked for."""
        with psycopg.connect(postgresql_url.replace("+psycopg", "")) as connection:
            connection.execute("CREATE TABLE notes (id integer)")
            [(schema,)] = connection.execute(
                "SELECT relnamespace::regnamespace::text FROM pg_class WHERE oid = 'notes'::regclass"
            )
        assert postgresql_url.endswith(f"search_path%3D{schema}")

    def test_kill(self, server):
        """A killed server has lost nothing that was committed, and is there again at the same port."""
        with servers.Server() as own:
            own.execute("CREATE TABLE notes (id integer)")
            own.kill()
            assert [] == processes_in(str(own.data))
            own.start()
            assert [] == own.execute("SELECT * FROM notes")

    def test_standby(self, server):
        """A second server follows the first."""
        with servers.Server() as primary, servers.Server(standby_of=primary) as standby:
            assert [(True,)] == standby.execute("SELECT pg_is_in_recovery()")
            [(name,)] = primary.execute("SELECT application_name FROM pg_stat_replication")
            assert f"node{standby.port}" == name

    def test_stop(self, server):
        with servers.Server() as own:
            pass
        assert [] == processes_in(str(own.data))
        assert not own.folder.exists()

    def test_fails(self, server):
        """What a server says that does not start is told, and its files are removed."""
        own = servers.Server(wal_level="nonsense")
        with pytest.raises(RuntimeError, match='invalid value for parameter "wal_level"'), own:
            pass
        assert not own.folder.exists()


MADE = """
    CREATE TABLE notes (id serial PRIMARY KEY, note text DEFAULT 'none' CHECK (note <> ''));
    INSERT INTO notes (note) VALUES ('first');
    CREATE VIEW shown AS SELECT note FROM notes;
    CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION ''no''; END';
    CREATE TRIGGER guard BEFORE DELETE ON notes FOR EACH ROW EXECUTE FUNCTION refuse();
"""
# A change of each kind of object.
CHANGES = (
    "CREATE TABLE others ()",
    "DROP VIEW shown",
    "CREATE OR REPLACE VIEW shown AS SELECT upper(note) AS note FROM notes",
    "CREATE OR REPLACE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'",
    "DROP TRIGGER guard ON notes",
    "ALTER TABLE notes DISABLE TRIGGER guard",
    "ALTER TABLE notes ADD more text",
    "ALTER TABLE notes ALTER note SET DEFAULT 'other'",
    "ALTER TABLE notes DROP CONSTRAINT notes_note_check",
    "ALTER TABLE notes SET (toast_tuple_target = 256)",
    "CREATE INDEX mine ON notes (note)",
    "GRANT SELECT ON notes TO public",
    "GRANT USAGE ON SCHEMA {schema} TO public",
)


@pytest.fixture(scope="module")
def template(server):
    def make(url):
        with psycopg.connect(url.replace("+psycopg", "")) as connection:
            connection.execute(MADE)

    with contextlib.closing(servers.Template(server, make)) as template:
        yield template


class TestTemplate:
    def test_rows(self, server, template):
        """A copy that was used before has the rows of the first day, and its numbers begin again."""
        names = set()
        for _ in range(2):
            with template.copy() as name:
                names.add(name)
                assert [(1, "first")] == server.execute(f"SELECT * FROM {name}.notes")
                server.execute(f"UPDATE {name}.notes SET note = 'changed'")
                assert [(2,)] == server.execute(f"INSERT INTO {name}.notes DEFAULT VALUES RETURNING id")
        assert 1 == len(names)

    @pytest.mark.parametrize("change", CHANGES)
    def test_objects(self, server, template, change):
        """A copy whose objects were changed is not used again."""
        with template.copy() as changed:
            server.execute(f"SET search_path = {changed}; {change.format(schema=changed)}")
        with template.copy() as name:
            assert changed != name
        assert [] == server.execute(f"SELECT 1 FROM pg_namespace WHERE nspname = '{changed}'")


class TestGuard:
    def test_killed(self, server):
        """A run that is killed leaves neither a process nor a file of its server."""
        environment = unmeasured() | {"PYTHONPATH": str(HERE)}
        with start_python(OWNER, stdin=subprocess.PIPE, env=environment) as owner:
            folder = Path(owner.stdout.readline().strip())
            assert processes_in(str(folder / "data"))
            owner.kill()
            owner.stdout.read()  # until the guard has ended too, which has inherited it
        assert [] == processes_in(str(folder / "data"))
        assert not folder.exists()


@pytest.mark.one_python
class TestNoServer:
    def test_skipped(self, tmp_path):
        """Where there is no server the run goes on, and its end says loudly what was not proven."""
        done = pytest_without_server(folder=tmp_path)
        assert 0 == done.returncode, done.stdout
        assert "NOT PROVEN, 1 tests: PostgreSQL: KKT_BUFFER_NO_SERVER hides its" in done.stdout
        assert "LEFT OUT" not in done.stdout

    def test_reasons(self, tmp_path):
        """Any other reason is told once, with the number of its tests."""
        done = pytest_without_server("tests/postgresql/test_patroni.py", folder=tmp_path)
        assert re.search(r"^SKIPPED, [1-9]\d* tests: make proof runs it$", done.stdout, re.MULTILINE), done.stdout

    @pytest.mark.parametrize("parallel", [(), ("-n", "1")], ids=["alone", "xdist"])
    def test_coverage(self, tmp_path, parallel):
        """Files for PostgreSQL are left out of the coverage, and the rest has no goal; that is said."""
        done = pytest_without_server("--cov", *parallel, folder=tmp_path)
        assert 0 == done.returncode, done.stdout
        assert "The coverage of the rest has NO GOAL here" in done.stdout
        assert "LEFT OUT of the coverage, because it only runs on PostgreSQL: */kkt_buffer/postgresql/*" in done.stdout
        assert "src/kkt_buffer/repository.py" in done.stdout
        assert "src/kkt_buffer/postgresql/" not in done.stdout

    def test_proof(self, tmp_path):
        """`make proof` fails there."""
        done = pytest_without_server(folder=tmp_path, KKT_BUFFER_PROOF="1")
        assert 1 == done.returncode
        assert "NOT PROVEN: PostgreSQL: " in done.stdout
