"""
PgQueuer and procrastinate, each in a database of its own, made by its own schema and as it comes.

Both are asynchronous, with an interface for synchronous programs that enqueue: one thread calls it, on one connection.
"""

import itertools
import json

import procrastinate
import psycopg
from ours_and_floor import documents
from pgqueuer.adapters.persistence.qb import QueryBuilderEnvironment
from pgqueuer.db import SyncPsycopgDriver
from pgqueuer.queries import SyncQueries

UNSAFE = """\
SELECT relname FROM pg_class WHERE relkind = 'r' AND relpersistence <> 'p'
UNION ALL SELECT name FROM pg_settings WHERE name IN ('fsync', 'synchronous_commit') AND setting <> 'on'"""


class PgQueuer:
    name = "PgQueuer"

    def __init__(self, url):
        self.connection = psycopg.connect(url, autocommit=True)
        self.connection.execute(QueryBuilderEnvironment().build_install_query())
        assert_durable(self.connection)
        self.queries = SyncQueries(SyncPsycopgDriver(self.connection))
        self.documents = itertools.cycle([document.encode() for document in documents()])

    def insert(self):
        self.queries.enqueue("deliver", next(self.documents))

    def close(self):
        self.connection.close()


class Procrastinate:
    name = "procrastinate"

    def __init__(self, url):
        self.app = procrastinate.App(connector=procrastinate.SyncPsycopgConnector(conninfo=url, min_size=1, max_size=1))
        self.app.open()
        self.app.schema_manager.apply_schema()
        with self.app.connector.pool.connection() as connection:
            assert_durable(connection)
        self.task = self.app.task(name="deliver")(print)
        self.documents = itertools.cycle([json.loads(document) for document in documents()])

    def insert(self):
        self.task.defer(receipt=next(self.documents))

    def close(self):
        self.app.close()


PEERS = (PgQueuer, Procrastinate)


def assert_durable(connection):
    """A job is on disk when the call returns: tables are logged, and a commit waits for the disk."""
    assert connection.execute(UNSAFE).fetchall() == []
