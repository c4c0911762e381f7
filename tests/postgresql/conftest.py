"""Servers of a test's own: those that it kills, or whose settings it changes."""

from collections.abc import Callable, Iterator

import pytest
import servers
from builders import unproven
from postgresql.cluster import migrate, wait_until
from postgresql.proxy import Proxy
from sqlalchemy import URL, make_url

from kkt_buffer import ReceiptRepository


@pytest.fixture(scope="session", autouse=True)
def _programs() -> None:
    if servers.programs() is None:
        unproven(f"PostgreSQL: {servers.reason()}")


@pytest.fixture
def own_server() -> Iterator[servers.Server]:
    """A server of this test alone, with an empty buffer."""
    with servers.Server() as server:
        migrate(server.url())
        yield server


@pytest.fixture
def open_repository(open_engine: Callable[..., object]) -> Callable[..., ReceiptRepository]:
    """A repository on a URL, by the database's clock."""

    def opened(url: str | URL, **options: object) -> ReceiptRepository:
        return ReceiptRepository(open_engine(url, **options))  # type: ignore[arg-type]

    return opened


@pytest.fixture
def proxy(server: servers.Server, server_buffer: str) -> Iterator[Proxy]:
    """A proxy in front of the server. What was cut off is over, there too, before the next test uses the buffer."""
    with Proxy(server.port).running() as proxy:
        yield proxy
    clients = "SELECT client_port FROM pg_stat_activity WHERE client_port IS NOT NULL"
    wait_until(lambda: proxy.ports.isdisjoint(port for (port,) in server.execute(clients)))


@pytest.fixture
def through_proxy(proxy: Proxy, server_buffer: str) -> URL:
    """The URL of a migrated, empty buffer, by way of the proxy."""
    return make_url(server_buffer).set(port=proxy.port)
