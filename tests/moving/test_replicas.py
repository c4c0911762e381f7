"""A move to a server whose commits a replica must confirm."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from builders import unproven
from moving.rows import rows_of
from postgresql.cluster import Cluster, frozen, migrate, wait_until
from servers import programs, reason

from kkt_buffer import ConnectionLostError

WAITING = "SELECT pid FROM pg_stat_activity WHERE wait_event = 'SyncRep'"


def test_unconfirmed(used, moved):
    """As long as the replica has not confirmed it, no run says that the move is done, not even one that finds it so."""
    if programs() is None:
        unproven(f"PostgreSQL: {reason()}")
    with Cluster(standbys=1) as cluster, ThreadPoolExecutor(1) as executor:
        migrate(cluster.url())
        url = cluster.url(require_replicas="1")
        with frozen(*cluster.standbys):
            for _ in range(3):  # at the guard of the target, at the commit, at the look at what is done
                run = executor.submit(moved, used, url)
                [(process,)] = wait_until(lambda: cluster.primary.execute(WAITING))
                cluster.primary.execute(f"SELECT pg_cancel_backend({process})")
                with pytest.raises(ConnectionLostError, match="the confirmation of a replica is missing"):
                    run.result(30)
        assert moved(used, cluster.url()).is_repeated  # what is demanded does not change the place
        assert rows_of(used) == rows_of(cluster.primary.url())
