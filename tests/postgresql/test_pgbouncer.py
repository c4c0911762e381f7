"""Behind pgbouncer in transaction mode, where each transaction may run on another connection to the server."""

import psycopg
import pytest
from builders import new_receipt, together, unproven
from postgresql.cluster import wait_until
from postgresql.program import Program, are_installed

from kkt_buffer import BufferStorageError

THREADS = 16
EACH = 5
POOL = 4

SETTINGS = """
[databases]
* = host=127.0.0.1 port={server_port} user=postgres
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
pool_mode = transaction
default_pool_size = {pool}
max_client_conn = 100
ignore_startup_parameters = extra_float_digits, options
"""


class PgBouncer(Program):
    """pgbouncer in front of a server."""

    def __init__(self, server, pool):
        super().__init__()
        self.file = self.folder / "pgbouncer.ini"
        self.file.write_text(SETTINGS.format(server_port=server.port, port=self.port, pool=pool))
        self.file.chmod(0o644)

    def create(self):
        """It has no files of its own."""

    def start(self):
        self.launch("pgbouncer", self.file)
        wait_until(self._answers)

    def _answers(self):
        try:
            self.execute("SELECT 1")
        except psycopg.OperationalError:
            return False
        return True


@pytest.fixture
def pool():
    return POOL


@pytest.fixture
def pgbouncer(own_server, pool):
    if not are_installed("pgbouncer", packages=("pgbouncer",)):
        unproven("pgbouncer: it is not here, and cannot be installed")
    with PgBouncer(own_server, pool) as pgbouncer:
        yield pgbouncer


@pytest.fixture
def repository(pgbouncer, open_repository):
    """No option is needed: statements are not prepared, as they would be on one connection to the server alone."""
    return open_repository(pgbouncer.url())


def test_calls(repository):
    """320 calls of 16 threads on four connections to the server, without an error."""

    def work(number):
        told = []
        for n in range(EACH):
            own = repository.insert_receipt(new_receipt(pos_id=f"till-{number}"))
            claimed = repository.claim_pending(1, pos_id=f"till-{number}")
            told.append((n, own, [receipt.id for receipt in claimed], repository.mark_synced(own, 5)))
            repository.get_buffer_status()
        return told

    for told in together(THREADS, work):
        assert [(n, own, [own], True) for n, (_, own, _, _) in enumerate(told)] == told
    assert THREADS * EACH == repository.get_buffer_status().synced


@pytest.mark.parametrize("pool", [1])
def test_settings_of_another_client(repository, pgbouncer):
    """What another client has set on the connection that both use is refused."""
    repository.insert_receipt(new_receipt())
    pgbouncer.execute("SET synchronous_commit = off")
    with pytest.raises(BufferStorageError, match="synchronous_commit"):
        repository.insert_receipt(new_receipt())
    pgbouncer.execute("RESET synchronous_commit")
    repository.insert_receipt(new_receipt())
