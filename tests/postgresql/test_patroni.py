"""
Three Patroni nodes under load: the leader is killed, PostgreSQL alone, frozen and woken, and relieved by a switchover.

It takes minutes, so that only `make proof` runs it. `patroni.yml` is the recipe that it proves.
"""

import time

import pytest
from builders import PROOF, an_id, unproven
from postgresql.cluster import migrate
from postgresql.load import Load
from postgresql.patroni_nodes import PatroniNodes
from postgresql.program import are_installed
from sqlalchemy import create_engine

pytestmark = [pytest.mark.slow, pytest.mark.one_python, pytest.mark.skipif(not PROOF, reason="make proof runs it")]


@pytest.fixture(scope="module")
def nodes():
    if not are_installed("etcd", "patroni", packages=("etcd-server", "patroni")):
        unproven("failover by Patroni: the packages etcd-server and patroni are not here, and cannot be installed")
    with PatroniNodes() as nodes:
        yield nodes


@pytest.fixture
def url(nodes):
    """An empty buffer."""
    schema = f"test_{an_id()[:8]}"
    engine = create_engine(nodes.url())
    with engine.begin() as connection:
        connection.exec_driver_sql(f"CREATE SCHEMA {schema}")
    engine.dispose()
    url = nodes.url(options=f"-csearch_path={schema}")
    migrate(url)
    return url


def kill_leader(nodes, load):
    old = nodes.node("leader")
    old.kill()
    nodes.wait_for_another_leader(old)
    old.start()


def kill_standby(nodes, load):
    """The synchronous one: nothing is acknowledged before Patroni has made another one synchronous."""
    standby = nodes.node("sync_standby")
    standby.kill()
    load.wait_for(500)
    standby.start()


def kill_postgresql(nodes, load):
    nodes.node("leader").kill_postgresql()
    time.sleep(1)  # until Patroni has seen it


def switch_over(nodes, load):
    nodes.switch_over()


def freeze_leader(nodes, load):
    """
    Its machine is reset when the load has gone on without it for some time, as the watchdog of the recipe does.

    Woken instead, Patroni 3.0.2 can write its name over that of its successor, and what that one has acknowledged is
    lost: seen in 2 of 3 runs, 626 receipts of 2,009 and 667 of 1,754.
    """
    old = nodes.node("leader")
    with old.frozen():
        nodes.wait_for_another_leader(old)
        load.wait_for(500)
        old.kill()
    old.start()


@pytest.mark.parametrize("event", [kill_leader, kill_standby, kill_postgresql, switch_over, freeze_leader])
def test_load(nodes, url, tmp_path, event):
    """Nothing acknowledged is lost, nothing is there twice, everything is delivered, and the load goes on."""
    with Load(url, tmp_path, require_replicas=1).running() as load:
        load.wait_for(500)
        nodes.wait_until_whole()  # Patroni names a synchronous standby some seconds after its start
        event(nodes, load)
        nodes.wait_until_whole()
        load.wait_for(500)
        books = load.books()
    print(f"\n{event.__name__}: {books}")
    books.assert_right()
    assert books.gap < 60
