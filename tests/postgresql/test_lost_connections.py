"""Each operation, when the idle connections of the pool are gone: after a failover, or a restart of the server."""

import pytest
from operations_table import OPERATIONS, prepared

from kkt_buffer import ReceiptRepository

END_ALL = """
SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity
WHERE application_name = 'kkt-buffer' AND pid <> pg_backend_pid()"""


@pytest.mark.parametrize("is_new", [False, True], ids=["used", "new"])
@pytest.mark.parametrize("name", sorted(OPERATIONS.keys() - {"transaction", "reading"}))
def test_not_seen(server, server_engine, name, is_new):
    """It is done on a new connection, and the caller does not notice; also by a repository that is used first then."""
    repository = ReceiptRepository(server_engine)
    known = prepared(repository)
    assert server.execute(END_ALL)
    OPERATIONS[name].call(ReceiptRepository(server_engine) if is_new else repository, known)
