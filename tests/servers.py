"""
Throwaway PostgreSQL servers, made with the distribution's programs.

A server outlives neither its owner nor a run of tests that was killed: `server_guard` ends it.
"""

import contextlib
import fcntl
import functools
import os
import pwd
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import psycopg
import server_guard
from sqlalchemy import URL

OLDEST = 15
PASSWORD = "s3cret-pa55word"  # is accepted as any other would be; no message may show it
PORTS = 20_000, 32_000  # below those that the kernel gives to clients, so that the port is free after a restart too
HIDDEN = bool(os.environ.get("KKT_BUFFER_NO_SERVER"))
CHANCE = random.SystemRandom()  # pytest-randomly gives all processes of a run the same seed

SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "max_connections": 200,
    "track_commit_timestamp": "on",
    "shared_buffers": "32MB",
    "dynamic_shared_memory_type": "mmap",  # in the server's folder: a killed server leaves nothing elsewhere
    "timezone": "Asia/Kamchatka",  # what depends on the server's time zone is found
}

INSTALL = """
mkdir -p /etc/postgresql-common
[ -e /etc/postgresql-common/createcluster.conf ] ||
    echo 'create_main_cluster = false' >/etc/postgresql-common/createcluster.conf
export TMPDIR=/var/tmp DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends -o Dpkg::Options::=--force-confold "$@"
"""


def _bin_folders():
    """Where the programs may be: where pg_config says, in Debian's folders (the newest first), on PATH."""
    if pg_config := shutil.which("pg_config"):
        yield subprocess.run([pg_config, "--bindir"], capture_output=True, text=True, check=True).stdout.strip()
    folders = Path("/usr/lib/postgresql").glob("*/bin")
    yield from sorted(map(str, folders), key=lambda folder: [int(n) for n in re.findall(r"\d+", folder)], reverse=True)
    yield from os.get_exec_path()


def _find():
    """The folder with the server's programs, or None."""
    for folder in map(Path, _bin_folders()):
        if (folder / "initdb").exists() and (folder / "postgres").exists():
            told = subprocess.run([folder / "postgres", "--version"], capture_output=True, text=True, check=True).stdout
            if int(re.search(r"\d+", told)[0]) >= OLDEST:
                return folder
    return None


def installed(find, *packages):
    """
    What `find` finds, if need be after root has installed the packages; nothing if they cannot be had.

    `KKT_BUFFER_NO_SERVER=1` hides all of it.
    """
    if HIDDEN:
        return None
    if (found := find()) or os.geteuid() != 0 or not shutil.which("apt-get"):
        return found
    with open("/var/tmp/kkt-buffer-install.lock", "w") as lock:  # by one process of the run
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not find():
            command = ["sh", "-c", INSTALL, "sh", *packages]
            subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=False)
    return find()


@functools.cache
def programs():
    """The folder with PostgreSQL's programs, or None."""
    return installed(_find, "postgresql") if os.path.exists("/proc/self/cwd") else None


def reason():
    """Why there are no programs."""
    if HIDDEN:
        return "KKT_BUFFER_NO_SERVER hides its server programs"
    return f"there are no server programs of version {OLDEST} or newer, and they cannot be installed"


ENOUGH = 4 << 30  # bytes, for all servers of a run


def a_free_port():
    """A port of loopback that nobody listens on."""
    while True:
        port = CHANCE.randrange(*PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def memory():
    """A folder in memory, else on disk."""
    with contextlib.suppress(OSError):
        if shutil.disk_usage("/dev/shm").free > ENOUGH:
            return "/dev/shm"
    return "/var/tmp"


class Server:
    """
    One server on a free port of loopback: `create`, `start`, `kill`, `start` again, …, `stop`.

    In memory, if there is enough: no test cuts the power of a server, and a slow disk would take most of the
    time. With `standby_of`, it is made as a copy of that server, which it follows. Other options are settings of
    PostgreSQL. Everybody is let in, as `postgres`, whatever the password.
    """

    def __init__(self, *, standby_of=None, on_disk=False, **settings):
        self.port = a_free_port()
        self.settings = SETTINGS | settings | {"port": self.port}
        self.standby_of = standby_of
        self.process = None
        # One that PostgreSQL's own user can reach, whose servers root starts.
        self.folder = Path(tempfile.mkdtemp(prefix="kkt-buffer-server-", dir="/var/tmp" if on_disk else memory()))
        self.data = self.folder / "data"
        self.log = self.folder / "log"
        self.account = {}
        if os.geteuid() == 0:
            user = pwd.getpwnam("postgres")
            self.account = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": ()}
            os.chown(self.folder, user.pw_uid, user.pw_gid)
        guard = Path(server_guard.__file__)
        self.guard = subprocess.Popen(
            [sys.executable, "-I", "-S", guard, self.folder], stdin=subprocess.PIPE, start_new_session=True, cwd="/"
        )

    def __enter__(self):
        try:
            self.create()
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_):
        self.stop()

    def run(self, program, *arguments):
        """Run one of PostgreSQL's programs as the server's user; returns what it prints."""
        command = [programs() / program, *map(str, arguments)]
        done = subprocess.run(
            command, cwd=self.folder, capture_output=True, text=True, timeout=120, check=False, **self.account
        )
        if done.returncode:
            raise RuntimeError(f"{program}: {done.stdout}{done.stderr}")
        return done.stdout

    def create(self):
        """Make the server's files. It orders text as Russian does: what needs the order of bytes must say so."""
        if self.standby_of is None:
            locale = ("--locale=C.UTF-8", "--locale-provider=icu", "--icu-locale=ru")
            self.run(
                "initdb", "-D", self.data, "-U", "postgres", "--auth=trust", "--encoding=UTF8", "--no-sync", *locale
            )
        else:
            source = f"host=127.0.0.1 port={self.standby_of.port} user=postgres application_name=node{self.port}"
            self.run(
                "pg_basebackup",
                "-D",
                self.data,
                "-d",
                source,
                "--write-recovery-conf",
                "--checkpoint=fast",
                "--no-sync",
            )
        with (self.data / "postgresql.conf").open("a") as file:
            file.writelines(f"{name} = '{value}'\n" for name, value in self.settings.items())

    def start(self):
        """Start the server; returns when it lets clients in."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [programs() / "postgres", "-D", self.data],
                cwd=self.data,  # by which its processes are known
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                **self.account,
            )
        until = time.monotonic() + 60
        while not self._is_ready():
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.01)
                raise RuntimeError(f"the server has not started: {self.log.read_text()}")
            if time.monotonic() > until:
                raise RuntimeError(f"the server is not ready after a minute: {self.log.read_text()}")

    def _is_ready(self):
        """PostgreSQL says in its lock file how far it is: process, folder, time, port, …, status."""
        with contextlib.suppress(FileNotFoundError):
            lines = (self.data / "postmaster.pid").read_text().splitlines()
            return len(lines) > 7 and lines[0] == str(self.process.pid) and lines[7].strip() in {"ready", "standby"}
        return False

    def kill(self):
        """SIGKILL all processes of the server, as a crash of the machine does."""
        server_guard.kill_all(str(self.data))
        if self.process is not None:
            self.process.wait()

    def stop(self):
        """Kill the server and remove its files."""
        self.guard.stdin.close()
        self.guard.wait()
        if self.process is not None:
            self.process.wait()

    def url(self, *, database="postgres", schema=None):
        """The URL of a database, or of one schema in it."""
        query = {} if schema is None else {"options": f"-csearch_path={schema}"}
        url = URL.create("postgresql+psycopg", "postgres", PASSWORD, "127.0.0.1", self.port, database, query)
        return url.render_as_string(hide_password=False)

    def connect(self, *, database="postgres"):
        """A connection in autocommit. It waits for no lock for long: a test that has left one there must fail."""
        address = {"host": "127.0.0.1", "port": self.port, "user": "postgres", "dbname": database}
        return psycopg.connect(**address, options="-clock_timeout=30s", autocommit=True)

    def execute(self, sql, *, database="postgres"):
        """Run a statement on a connection of its own; returns its rows."""
        with contextlib.closing(self.connect(database=database)) as connection:
            cursor = connection.execute(sql)
            return cursor.fetchall() if cursor.description else []

    def dump(self, schema):
        """What pg_dump makes of a schema: a script that makes it, with its rows."""
        address = ("--host=127.0.0.1", f"--port={self.port}", "--username=postgres", "--dbname=postgres")
        dump = self.run("pg_dump", *address, "--inserts", "--no-owner", f"--schema={schema}")
        # The commands of psql's own, of later versions of pg_dump, are none of SQL.
        return re.sub(r"(?m)^\\.*$", "", dump)

    @contextlib.contextmanager
    def schema(self):
        """The name of a new, empty schema; dropped at the end."""
        name = f"test_{uuid.uuid4().hex}"
        self.execute(f"CREATE SCHEMA {name}")
        try:
            yield name
        finally:
            self.execute(f"DROP SCHEMA IF EXISTS {name} CASCADE")


# When and how often the objects of a schema were changed.
CATALOGUE = """
    SELECT count(*), max(xmin::text::bigint) FROM (
        SELECT xmin FROM pg_namespace WHERE oid = '{schema}'::regnamespace
        UNION ALL SELECT xmin FROM pg_class WHERE relnamespace = '{schema}'::regnamespace
        UNION ALL SELECT xmin FROM pg_proc WHERE pronamespace = '{schema}'::regnamespace
        UNION ALL SELECT xmin FROM pg_constraint WHERE connamespace = '{schema}'::regnamespace
        UNION ALL SELECT a.xmin FROM pg_attribute a JOIN pg_class c ON c.oid = attrelid
            WHERE relnamespace = '{schema}'::regnamespace
        UNION ALL SELECT t.xmin FROM pg_trigger t JOIN pg_class c ON c.oid = tgrelid
            WHERE relnamespace = '{schema}'::regnamespace
        UNION ALL SELECT r.xmin FROM pg_rewrite r JOIN pg_class c ON c.oid = ev_class
            WHERE relnamespace = '{schema}'::regnamespace
    ) AS object"""


class Template:
    """
    A schema to be copied, which `make` has made at the URL that it was given.

    A copy is made in a tenth of the time that migrations take, by the script of pg_dump; and in a tenth of that time by
    putting back the rows of one that was used, if none of its objects was changed.
    """

    def __init__(self, server, make):
        self.connection = server.connect()
        with server.schema() as self.name:
            make(server.url(schema=self.name))
            self.dump = server.dump(self.name)
        tables = re.findall(r"(?m)^CREATE TABLE (\S+)", self.dump)
        rows = re.findall(r"(?m)^(?:INSERT INTO|SELECT pg_catalog.setval).*;$", self.dump)
        deletions = [f"DELETE FROM {table};" for table in tables]
        role = "session_replication_role"
        self.rows = "\n".join([f"SET {role} = replica;", *deletions, *rows, f"RESET {role};"])  # without triggers
        self.unused = []

    @contextlib.contextmanager
    def copy(self):
        """The name of a copy."""
        if self.unused:
            name, objects = self.unused.pop()
        else:
            name = f"test_{uuid.uuid4().hex}"
            self.connection.execute(self.dump.replace(self.name, name))
            objects = self._objects(name)
        yield name
        if objects == self._objects(name):
            self.connection.execute(self.rows.replace(self.name, name))
            self.unused.append((name, objects))
        else:
            self.connection.execute(f"DROP SCHEMA {name} CASCADE")

    def _objects(self, name):
        return self.connection.execute(CATALOGUE.format(schema=name)).fetchall()

    def close(self):
        for name, _ in self.unused:
            self.connection.execute(f"DROP SCHEMA {name} CASCADE")
        self.connection.close()
