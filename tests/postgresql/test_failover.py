"""Servers are killed under load: nothing that was acknowledged is lost, nothing is there twice."""

import pytest
from postgresql.cluster import Cluster, migrate
from postgresql.load import Load

KILLS = 3


@pytest.mark.slow
@pytest.mark.one_python
class TestFailover:
    def test_primary_killed(self, tmp_path):
        """With synchronous replicas, the one that is promoted has every acknowledged receipt, and the load goes on."""
        with Cluster() as cluster:
            migrate(cluster.url())
            with Load(cluster.url(), tmp_path, require_replicas=1).running() as load:
                load.wait_for(300)
                cluster.fail_over()
                load.wait_for(300)
                books = load.books()
        print(f"\nthe primary killed: {books}")
        books.assert_right()
        assert books.gap < 10

    def test_asynchronous(self, tmp_path):
        """Without, and without `require_replicas`, the same load loses receipts: this is what the books can see."""
        with Cluster(synchronous="") as cluster:
            migrate(cluster.url())
            with Load(cluster.url(), tmp_path).running() as load:
                load.wait_for(300)
                cluster.stop_sending()
                load.wait_for(100)
                cluster.fail_over()
                load.wait_for(300)
                books = load.books()
        print(f"\nthe primary killed, asynchronous: {books}")
        assert 100 <= len(books.lost)
        assert [] == books.doubled
        assert [] == books.unexpected

    def test_one_server(self, own_server, tmp_path):
        """A server that is killed and started again, time after time, has everything that it acknowledged."""
        with Load(own_server.url(), tmp_path).running() as load:
            for _ in range(KILLS):
                load.wait_for(150)
                own_server.kill()
                own_server.start()
            load.wait_for(150)
            books = load.books()
        print(f"\none server killed {KILLS} times: {books}")
        books.assert_right()
        assert books.gap < 10
