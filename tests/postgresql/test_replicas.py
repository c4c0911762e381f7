"""
An acknowledgement is refused wherever the server would give one that is not safe.

Settings are read where the receipts are stored: those of a server may change at any time, also behind a pool.
"""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from builders import an_id, new_receipt
from postgresql.cluster import Cluster, frozen, migrate, wait_until
from postgresql.proxy import Proxy
from servers import Server
from sqlalchemy import make_url, text

from kkt_buffer import (
    BufferBusyError,
    BufferFullError,
    BufferStorageError,
    DuplicateReceiptError,
    OutcomeUnknownError,
)

WAITING = "SELECT pid FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
NO_ACKNOWLEDGEMENT = (BufferStorageError, OutcomeUnknownError)
UNSAFE = {
    "fsync": "off",
    "full_page_writes": "off",
    "synchronous_commit": "off",
}
TOO_WEAK_WITH_REPLICAS = {
    "synchronous_commit": "local",
    "synchronous_standby_names": "",
}
NAMES = {
    "one": 1,
    "*": 1,
    "one, two": 1,
    "2 (one, two)": 2,
    "FIRST 2 (one, two, three)": 2,
    " any 3(*)": 3,
    '"2 (a"': 1,
}


@pytest.fixture(scope="module")
def cluster():
    with Cluster(standbys=1) as cluster:
        migrate(cluster.url())
        yield cluster


@pytest.fixture(autouse=True)
def _as_it_was(cluster):
    yield
    change(cluster.primary, "RESET ALL")
    cluster.primary.execute("UPDATE config SET value = '200' WHERE key = 'buffer_capacity'")
    for standby in cluster.standbys:
        change(standby, "RESET synchronous_standby_names")


@pytest.fixture(scope="module")
def lone_server():
    """One without replicas."""
    with Server() as server:
        yield server


@pytest.fixture
def lone_buffer(lone_server):
    """The URL of a buffer on it."""
    with lone_server.schema() as schema:
        migrate(lone_server.url(schema=schema))
        yield lone_server.url(schema=schema)
        change(lone_server, "RESET ALL")  # first: the schema is dropped with a commit, which would wait for a replica


@pytest.fixture
def repository(cluster, open_repository):
    return open_repository(cluster.url(), require_replicas=1)


def change(server, change):
    """Change settings of a running server; returns when its processes have them."""
    before = server.execute("SELECT pg_conf_load_time()")
    server.execute(f"ALTER SYSTEM {change}")
    server.execute("SELECT pg_reload_conf()")
    wait_until(lambda: before != server.execute("SELECT pg_conf_load_time()"))


class TestSettings:
    @pytest.mark.parametrize(("name", "value"), UNSAFE.items(), ids=UNSAFE)
    def test_unsafe(self, lone_server, lone_buffer, open_repository, name, value):
        """
        Changed while connections of the pool are open: what is stored next is refused, and who looks is told why;
        changed back, it is taken.
        """
        repository = open_repository(lone_buffer)
        repository.insert_receipt(new_receipt())
        change(lone_server, f"SET {name} = {value}")
        with pytest.raises(BufferStorageError, match=name):
            repository.insert_receipt(new_receipt())
        with pytest.raises(BufferStorageError, match=name):
            repository.insert_receipts([new_receipt(), new_receipt()])
        with pytest.raises(BufferStorageError, match=name):
            with repository.transaction():
                repository.insert_receipt(new_receipt())
        assert name in str(repository.why_refused())
        assert 1 == repository.get_buffer_status().pending
        change(lone_server, f"RESET {name}")
        repository.insert_receipt(new_receipt())

    @pytest.mark.parametrize(("name", "value"), TOO_WEAK_WITH_REPLICAS.items(), ids=TOO_WEAK_WITH_REPLICAS)
    def test_too_weak(self, cluster, repository, open_repository, name, value):
        """With `require_replicas`, what would not wait for a replica is refused; without, it is taken."""
        repository.insert_receipt(new_receipt())
        pending = repository.get_buffer_status().pending
        change(cluster.primary, f"SET {name} = '{value}'")
        with pytest.raises(BufferStorageError, match=name):
            repository.insert_receipt(new_receipt())
        assert pending == repository.get_buffer_status().pending
        open_repository(cluster.url()).insert_receipt(new_receipt())

    @pytest.mark.parametrize(("name", "value"), UNSAFE.items(), ids=UNSAFE)
    def test_while_open(self, lone_server, lone_buffer, open_repository, name, value):
        """Changed while a transaction is open: its commit is refused."""
        repository = open_repository(lone_buffer)
        with pytest.raises(BufferStorageError, match=name):
            with repository.transaction():
                repository.insert_receipt(new_receipt())
                change(lone_server, f"SET {name} = {value}")
        assert 0 == repository.get_buffer_status().pending

    def test_asynchronous(self, lone_server, lone_buffer, open_repository):
        """A server without replicas is refused at once."""
        with pytest.raises(BufferStorageError, match="synchronous_standby_names is ''"):
            open_repository(lone_buffer, require_replicas=1)

    def test_nobody_there(self, lone_server, lone_buffer, open_repository):
        """Required, and not connected: nothing would be acknowledged, and who looks is told."""
        change(lone_server, "SET synchronous_standby_names = 'absent'")
        repository = open_repository(lone_buffer, require_replicas=1)
        assert "0 of 1 replicas are connected" == repository.why_refused()
        assert repository.check_integrity().is_sound  # no difference that somebody should undo
        assert open_repository(lone_buffer).why_refused() is None

    def test_connected(self, repository):
        assert repository.why_refused() is None

    def test_read_only(self, lone_server, lone_buffer, open_repository):
        """A server that takes no writes."""
        repository = open_repository(lone_buffer)
        repository.insert_receipt(new_receipt())
        change(lone_server, "SET default_transaction_read_only = on")
        assert "default_transaction_read_only is on" == repository.why_refused()
        with pytest.raises(BufferStorageError, match="target_session_attrs=read-write"):
            repository.insert_receipt(new_receipt())

    def test_too_few(self, cluster, open_repository):
        """One replica is not two."""
        with pytest.raises(BufferStorageError, match="synchronous_standby_names is 'ANY 1"):
            open_repository(cluster.url(), require_replicas=2)

    @pytest.mark.parametrize(("names", "number"), NAMES.items())
    def test_names(self, lone_server, lone_buffer, open_repository, names, number):
        """How many replicas a commit waits for, in each form in which PostgreSQL takes the setting."""
        change(lone_server, f"SET synchronous_standby_names = '{names}'")
        open_repository(lone_buffer, require_replicas=number)
        with pytest.raises(BufferStorageError, match="synchronous_standby_names is"):
            open_repository(lone_buffer, require_replicas=number + 1)

    def test_unlogged(self, lone_server, lone_buffer, open_repository):
        """A table that a crash empties is refused."""
        repository = open_repository(lone_buffer)
        repository.insert_receipt(new_receipt())
        schema = make_url(lone_buffer).query["options"].removeprefix("-csearch_path=")
        for table in ("dlq", "receipts"):  # in the order that their foreign key allows
            lone_server.execute(f"ALTER TABLE {schema}.{table} SET UNLOGGED")
            with pytest.raises(BufferStorageError, match=r"the table \w+ is not logged"):
                repository.insert_receipt(new_receipt())
        for table in ("receipts", "dlq"):
            lone_server.execute(f"ALTER TABLE {schema}.{table} SET LOGGED")
        repository.insert_receipt(new_receipt())


class TestWait:
    """The primary has committed, no replica has it, and something ends the wait."""

    @pytest.fixture
    def begin(self, cluster, repository):
        """Begin a call; returns once it waits for the replica, which is frozen until the test ends."""
        self.held = repository.insert_receipt(new_receipt(), hold=True)
        with ThreadPoolExecutor(2) as executor:

            def begin(call, *arguments, **options):
                future = executor.submit(call, *arguments, **options)
                wait_until(lambda: cluster.primary.execute(WAITING) or future.done())
                return future

            with frozen(*cluster.standbys):
                yield begin

    @staticmethod
    def cancel(cluster, call):
        """Cancel every wait of the call, those of its repetitions too, until it is over."""

        def is_over():
            for (process,) in cluster.primary.execute(WAITING):
                cluster.primary.execute(f"SELECT pg_cancel_backend({process})")
            return call.done()

        wait_until(is_over)

    @pytest.mark.parametrize("call", ["single", "batch", "transaction"])
    def test_cancelled(self, cluster, repository, begin, call):
        """The server says committed, with a warning: that is no acknowledgement."""
        future = begin(getattr(self, call), repository, new_receipt())
        self.cancel(cluster, future)
        assert isinstance(future.exception(), NO_ACKNOWLEDGEMENT)
        assert "canceling wait for synchronous replication" in str(future.exception())

    @pytest.mark.parametrize("call", ["single", "batch", "transaction", "replay"])
    def test_cancelled_silently(self, cluster, repository, begin, call):
        """Where the session hides warnings, the wait is noticed all the same."""
        change(cluster.primary, "SET client_min_messages = error")
        receipt = new_receipt(id=an_id())
        if call == "replay":
            self.cancel(cluster, begin(repository.insert_receipt, receipt))
        future = begin(getattr(self, call), repository, receipt)
        self.cancel(cluster, future)
        assert isinstance(future.exception(), NO_ACKNOWLEDGEMENT)

    @pytest.mark.parametrize("exist_ok", [True, False])
    @pytest.mark.parametrize("call", ["single", "batch", "transaction"])
    def test_replay(self, cluster, repository, begin, call, exist_ok):
        """The receipt is there then, on the primary alone: nobody is told so before a replica has it."""
        receipt = new_receipt(id=an_id())
        self.cancel(cluster, begin(repository.insert_receipt, receipt))
        future = begin(getattr(self, call), repository, receipt, exist_ok=exist_ok)
        self.cancel(cluster, future)
        assert isinstance(future.exception(), NO_ACKNOWLEDGEMENT)

    @pytest.mark.parametrize("name", ["mark_synced", "move_to_dlq", "update_receipt_fiscal_doc"])
    def test_repeated(self, cluster, repository, begin, name):
        """Neither is a decision that was made already, on the primary alone."""
        receipt_id = self.held
        arguments = {
            "mark_synced": (receipt_id, 5),
            "move_to_dlq": (receipt_id, "rejected"),
            "update_receipt_fiscal_doc": (receipt_id, {"fiscalSign": 5}),
        }
        for _ in range(2):
            future = begin(getattr(repository, name), *arguments[name])
            self.cancel(cluster, future)
            assert isinstance(future.exception(), NO_ACKNOWLEDGEMENT)

    @staticmethod
    def single(repository, receipt, **options):
        repository.insert_receipt(receipt, **options)

    @staticmethod
    def replay(repository, receipt):
        repository.insert_receipt(receipt, exist_ok=True)

    @staticmethod
    def batch(repository, receipt, **options):
        repository.insert_receipts([receipt], **options)

    @staticmethod
    def transaction(repository, receipt, **options):
        with repository.transaction():
            repository.insert_receipt(receipt, **options)

    def test_names_emptied(self, cluster, repository, begin):
        """The server says committed, and nothing else."""
        call = begin(repository.insert_receipt, new_receipt())
        change(cluster.primary, "SET synchronous_standby_names = ''")
        wait_until(call.done)
        assert isinstance(call.exception(), NO_ACKNOWLEDGEMENT)

    def test_terminated(self, cluster, repository, begin):
        """The connection is ended while it waits: the insert is repeated, and waits again."""
        call = begin(repository.insert_receipt, new_receipt())
        [(process,)] = cluster.primary.execute(WAITING)
        cluster.primary.execute(f"SELECT pg_terminate_backend({process})")
        wait_until(lambda: call.done() or cluster.primary.execute(WAITING) not in ([], [(process,)]))
        assert not call.done() or isinstance(call.exception(), NO_ACKNOWLEDGEMENT)

    def test_deadline(self, cluster, open_repository):
        """A client does not wait for ever: the replica does not come, and the caller is told."""
        repository = open_repository(cluster.url(), require_replicas=1, answer_timeout=1, busy_timeout=0.1)
        repository.insert_receipt(new_receipt())
        with frozen(*cluster.standbys):
            with pytest.raises(
                OutcomeUnknownError, match="no answer for 1 s: it stands still, is busy, or waits for a replica"
            ):
                repository.insert_receipt(new_receipt())
            with pytest.raises(BufferBusyError):  # the first one is still waiting, with its lock
                repository.insert_receipt(new_receipt())


class TestTransaction:
    """What others have stored is confirmed inside a transaction too, on its own connection: there may be no other."""

    @pytest.fixture
    def repository(self, cluster, open_repository):
        return open_repository(cluster.url(), require_replicas=1, pool_size=1, max_overflow=0, pool_timeout=0.1)

    def test_replay(self, repository):
        receipt = new_receipt(id=an_id())
        repository.insert_receipt(receipt)
        with repository.transaction():
            assert receipt["id"] == repository.insert_receipt(receipt, exist_ok=True)

    def test_known(self, repository):
        receipt = new_receipt(id=an_id())
        repository.insert_receipt(receipt)
        with pytest.raises(DuplicateReceiptError), repository.transaction():
            repository.insert_receipt(receipt)

    def test_isolation(self, cluster, repository):
        """Of the role, it does not matter in a transaction, which has its own; a single insert is refused."""
        change(cluster.primary, "SET default_transaction_isolation = 'repeatable read'")
        with repository.transaction():
            repository.insert_receipt(new_receipt())
        with pytest.raises(BufferStorageError, match="the isolation level is not read committed"):
            repository.insert_receipt(new_receipt())
        assert "the isolation level is not read committed" == repository.why_refused()


class TestLeader:
    def test_demoted(self, cluster, repository):
        """A leader that became a replica is left: the next call succeeds on the new one."""
        first = repository.insert_receipt(new_receipt())
        cluster.demote()
        second = repository.insert_receipt(new_receipt())
        repository.mark_synced(first, 5)
        with repository.transaction() as session:
            assert cluster.primary.port == session.scalar(text("SELECT current_setting('port')::int"))
            assert repository.get_receipt_by_id(second)

    @pytest.mark.parametrize("is_new", [False, True], ids=["used", "new"])
    @pytest.mark.parametrize("call", ["insert", "not replicated there", "replay", "full", "claim", "read"])
    def test_one_name(self, cluster, open_repository, call, is_new):
        """A name that leads to the demoted one for a while: no connection to it is kept, and nothing is read there."""
        with Proxy(cluster.primary.port).running() as proxy:
            url = cluster.url(host=f"127.0.0.1:{proxy.port}", target_session_attrs="any")
            repository = open_repository(url, require_replicas=1)
            receipt = new_receipt(id=an_id(), pos_id=call)
            repository.insert_receipt(receipt)
            if call == "full":
                repository.set_config("buffer_capacity", repository.get_buffer_status().pending)
            demoted = cluster.primary
            cluster.demote()
            if is_new:
                repository.close()  # the next connection is made to the demoted one
            if call == "not replicated there":
                change(demoted, "SET synchronous_standby_names = ''")
            moved = threading.Timer(0.3, setattr, [proxy, "server_port", cluster.primary.port])
            moved.start()
            if call == "claim":
                assert [receipt["id"]] == [claimed.id for claimed in repository.claim_pending(pos_id=call)]
            elif call == "read":
                assert receipt["id"] == repository.get_receipt_by_id(receipt["id"]).id
            elif call == "replay":
                assert receipt["id"] == repository.insert_receipt(receipt, exist_ok=True)
            elif call == "full":  # on a connection that was cut off, it may have been the last one that had room
                with pytest.raises(BufferFullError if is_new else OutcomeUnknownError):
                    repository.insert_receipt(new_receipt())
            else:
                repository.insert_receipt(new_receipt())
            assert not moved.is_alive()
