"""etcd and three Patroni nodes on loopback, from the distribution's packages."""

import contextlib
import json
import os
import shutil
import signal
import urllib.error
import urllib.request
from pathlib import Path
from string import Template

from postgresql.cluster import wait_until
from postgresql.program import Program
from server_guard import processes_in
from servers import PASSWORD, a_free_port, programs
from sqlalchemy import URL

NODES = 3


class Etcd(Program):
    """The store in which the nodes elect their leader."""

    def start(self):
        client_url, peer_url = (f"http://127.0.0.1:{port}" for port in (self.port, a_free_port()))
        self.launch(
            "etcd",
            *("--name", "one", "--data-dir", self.data, "--initial-cluster", f"one={peer_url}"),
            *("--listen-client-urls", client_url, "--advertise-client-urls", client_url),
            *("--listen-peer-urls", peer_url, "--initial-advertise-peer-urls", peer_url),
        )
        wait_until(lambda: _answer(f"{client_url}/health"))


class Node(Program):
    """Patroni and its PostgreSQL."""

    def __init__(self, name, etcd):
        super().__init__()
        self.name = name
        self.api_port = a_free_port()
        self.file = self.folder / "patroni.yml"
        template = Template(Path(__file__).with_name("patroni.yml").read_text())
        self.file.write_text(
            template.substitute(
                name=name,
                api_port=self.api_port,
                etcd_port=etcd.port,
                port=self.port,
                data=self.data,
                folder=self.folder,
                programs=programs(),
                password=PASSWORD,
            )
        )
        self.file.chmod(0o644)

    def start(self):
        self.launch(shutil.which("patroni"), self.file)

    def signal(self, number):
        """Send a signal to all processes of the node."""
        for process in processes_in(str(self.folder)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)

    @contextlib.contextmanager
    def frozen(self):
        """Nothing of the node runs during the block; its connections stay open."""
        self.signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.signal(signal.SIGCONT)

    def kill_postgresql(self):
        """SIGKILL PostgreSQL alone."""
        postmaster = int((self.data / "postmaster.pid").read_text().split()[0])
        for process in processes_in(str(self.data)):
            if process != postmaster:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
        os.kill(postmaster, signal.SIGKILL)


class PatroniNodes:
    """The nodes, started with the block."""

    def __enter__(self):
        self.etcd = Etcd()
        self.nodes = [Node(f"node{number}", self.etcd) for number in range(NODES)]
        try:
            self.etcd.start()
            for node in self.nodes:
                node.start()
            self.wait_until_whole()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for server in [*self.nodes, self.etcd]:
            server.stop()

    def url(self, **query):
        """A URL with all hosts, by which a client finds the leader."""
        hosts = [f"127.0.0.1:{node.port}" for node in self.nodes]
        query = {"host": hosts, "target_session_attrs": "read-write", "connect_timeout": "2"} | query
        return URL.create("postgresql+psycopg", "postgres", PASSWORD, database="postgres", query=query)

    def node(self, role):
        """The only node that has this role, such as `leader`; None if there is none."""
        names = [member["name"] for member in self._members() if member["role"] == role]
        return next((node for node in self.nodes if [node.name] == names), None)

    def wait_for_another_leader(self, old, *, timeout=90):
        """Wait until another node than this one is the leader."""
        wait_until(lambda: self.node("leader") not in {None, old}, timeout=timeout)

    def wait_until_whole(self, *, timeout=90):
        """Wait until there is a leader, followed by all other nodes, and one of these is synchronous."""

        def is_whole():
            members = self._members()
            roles = sorted(member["role"] for member in members if member["state"] in {"running", "streaming"})
            return roles == ["leader", *["replica"] * (NODES - 2), "sync_standby"] and all(
                member.get("lag", 0) == 0 for member in members
            )

        try:
            wait_until(is_whole, timeout=timeout)
        except AssertionError:
            for server in [*self.nodes, self.etcd]:
                print(f"--- {server.log}", *server.log.read_text(errors="replace").splitlines()[-30:], sep="\n")
            raise

    def switch_over(self):
        """Hand the lead over to the synchronous standby."""
        leader = self.node("leader")
        wish = json.dumps({"leader": leader.name}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{leader.api_port}/switchover", wish, method="POST")
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert 200 == answer.status

    def _members(self):
        """The cluster as any node sees it that answers; empty if none does."""
        for node in self.nodes:
            if told := _answer(f"http://127.0.0.1:{node.api_port}/cluster"):
                return json.loads(told)["members"]
        return []


def _answer(url):
    with contextlib.suppress(urllib.error.URLError, OSError):
        with urllib.request.urlopen(url, timeout=1) as answer:
            return answer.read()
    return None
