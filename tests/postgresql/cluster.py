"""Several throwaway servers with streaming replication: one primary, and standbys that follow it."""

import contextlib
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

from server_guard import processes_in
from servers import PASSWORD, Server
from sqlalchemy import URL

from kkt_buffer import create_buffer_engine, upgrade

SETTINGS = {
    "wal_keep_size": "256MB",  # a standby that was away for some time can catch up
    "wal_receiver_timeout": "2s",
    "wal_retrieve_retry_interval": "100ms",
}


def wait_until(is_so, *, timeout=30):
    """Wait until the function returns something true, and return that."""
    deadline = time.monotonic() + timeout
    while not (answer := is_so()):
        assert time.monotonic() < deadline, f"not within {timeout} s"
        time.sleep(0.01)
    return answer


def signal_all(server, number):
    """Send a signal to every process of a server."""
    for process in processes_in(str(server.data)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


@contextlib.contextmanager
def frozen(*servers):
    """All processes of these servers are stopped during the block; their connections stay open."""
    for server in servers:
        signal_all(server, signal.SIGSTOP)
    try:
        yield
    finally:
        for server in servers:
            signal_all(server, signal.SIGCONT)


def migrate(url):
    """Make an empty buffer there."""
    engine = create_buffer_engine(url)
    upgrade(engine)
    engine.dispose()


class Cluster:
    """
    `primary` and `standbys`, of which one at least has each commit by the time it is acknowledged.

    `synchronous` is PostgreSQL's setting `synchronous_standby_names`; an empty one makes the replication asynchronous.
    """

    def __init__(self, *, standbys=2, synchronous="ANY 1 (*)", **settings):
        settings = SETTINGS | {"synchronous_standby_names": synchronous} | settings
        self.primary = Server(**settings)
        self.standbys = [Server(standby_of=self.primary, **settings) for _ in range(standbys)]
        self._all = [self.primary, *self.standbys]

    def __enter__(self):
        try:
            for server in self._all:
                server.create()
                server.start()
            self.wait_for_standbys()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        with ThreadPoolExecutor() as executor:
            list(executor.map(Server.stop, self._all))

    def url(self, **query):
        """A URL with all hosts, by which a client finds the primary."""
        hosts = [f"127.0.0.1:{server.port}" for server in self._all]
        query = {"host": hosts, "target_session_attrs": "read-write", "connect_timeout": "2"} | query
        return URL.create("postgresql+psycopg", "postgres", PASSWORD, database="postgres", query=query)

    def wait_for_standbys(self):
        """Wait until every standby receives what is written."""
        streaming = "SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'"
        wait_until(lambda: self.primary.execute(streaming) == [(len(self.standbys),)])

    def stop_sending(self):
        """What the primary commits from now on does not reach the standbys."""
        for (process,) in self.primary.execute("SELECT pid FROM pg_stat_replication"):
            os.kill(process, signal.SIGSTOP)

    def fail_over(self):
        """
        Kill the primary and promote the standby that has received the most; the other ones follow it.

        The killed one stays down.
        """
        self.primary.kill()
        receiving = "SELECT count(*) FROM pg_stat_wal_receiver"
        for standby in self.standbys:  # one that still writes down what it has received has not got the most yet
            wait_until(lambda standby=standby: standby.execute(receiving) == [(0,)])
        self.promote(max(self.standbys, key=_received))

    def promote(self, standby):
        """Make this standby the primary, which the other ones follow."""
        standby.execute("SELECT pg_promote()")
        self.primary = standby
        self.standbys.remove(standby)
        for other in self.standbys:
            self.follow(other)

    def follow(self, standby):
        """Let this standby follow the primary."""
        source = f"host=127.0.0.1 port={self.primary.port} user=postgres application_name=node{standby.port}"
        standby.execute(f"ALTER SYSTEM SET primary_conninfo = '{source}'")
        standby.execute("SELECT pg_reload_conf()")

    def demote(self):
        """
        Make the primary a standby of a standby that is promoted first, as a switchover does.

        The demoted one has been restarted, on the same port.
        """
        old = self.primary
        old.run("pg_ctl", "stop", "-D", old.data, "-m", "fast")
        old.process.wait()
        (old.data / "standby.signal").touch()
        self.promote(max(self.standbys, key=_received))
        source = f"host=127.0.0.1 port={self.primary.port} user=postgres application_name=node{old.port}"
        with (old.data / "postgresql.auto.conf").open("a") as file:
            file.write(f"primary_conninfo = '{source}'\n")
        old.start()
        self.standbys.append(old)
        self.wait_for_standbys()


def _received(standby):
    return standby.execute("SELECT pg_last_wal_receive_lsn() - '0/0'")[0][0]
