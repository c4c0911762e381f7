"""The role of a service, as the README grants it: every operation, and nothing of the owner's."""

import re
from pathlib import Path

import pytest
from operations_table import OPERATIONS, prepared
from sqlalchemy import make_url
from sqlalchemy.exc import DBAPIError

from kkt_buffer import BufferStorageError, ReceiptRepository, check, upgrade

README = (Path(__file__).parents[2] / "src" / "kkt_buffer" / "postgresql" / "README.md").read_text()


@pytest.fixture
def service(server, server_engine, open_engine):
    """The repository of a role that has what the README grants, and no more."""
    with server_engine.begin() as connection:
        schema = connection.exec_driver_sql("SELECT quote_ident(current_schema())").scalar_one()
        role = f"service_of_{schema}"
        database = connection.exec_driver_sql("SELECT current_database()").scalar_one()
        [made, granted] = re.findall(r"```sql\n(.*?)```", README, re.DOTALL)
        statements = (made + granted).replace("service", role).replace("tills", schema).replace("shop", database)
        for sql in statements.split(";\n"):
            if sql.strip():
                connection.exec_driver_sql(sql)
    yield ReceiptRepository(open_engine(server_engine.url.set(username=role, query={})))
    with server_engine.begin() as connection:
        connection.exec_driver_sql(f"DROP OWNED BY {role}")
        connection.exec_driver_sql(f"DROP ROLE {role}")


class TestOwner:
    def test_alone(self, server, open_engine):
        """Who owns a database, and is no superuser, needs nobody else: for the schema, its check, all operations."""
        server.execute("CREATE ROLE shop LOGIN")
        server.execute("CREATE DATABASE shop OWNER shop")
        try:
            engine = open_engine(make_url(server.url(database="shop")).set(username="shop"))
            upgrade(engine)
            check(engine)
            repository = ReceiptRepository(engine)
            for name in sorted(OPERATIONS):
                repository.set_config("buffer_capacity", 10_000)
                OPERATIONS[name].call(repository, prepared(repository))
            assert repository.check_integrity().is_sound
        finally:
            server.execute("DROP DATABASE shop WITH (FORCE)")
            server.execute("DROP ROLE shop")


class TestService:
    @pytest.mark.parametrize("name", sorted(OPERATIONS))
    def test_operation(self, service, name):
        """Every operation works."""
        OPERATIONS[name].call(service, prepared(service))

    def test_check(self, service):
        """It may look whether the schema is whole."""
        check(service.engine)

    def test_not_the_owner(self, service):
        """It can take no table away, nor a trigger."""
        for sql in ("DROP TABLE receipts", "ALTER TABLE receipts DISABLE TRIGGER ALL", "TRUNCATE buffer_events"):
            with service.transaction() as session, pytest.raises((BufferStorageError, DBAPIError)):
                with session.begin_nested():
                    session.connection().exec_driver_sql(sql)


def test_stranger(server, server_engine, open_engine):
    """A role without these grants is told what it lacks."""
    with server_engine.begin() as connection:
        connection.exec_driver_sql("CREATE ROLE stranger LOGIN")
    try:
        with pytest.raises(BufferStorageError, match="GRANT USAGE ON SCHEMA"):
            ReceiptRepository(open_engine(server_engine.url.set(username="stranger"))).get_buffer_status()
    finally:
        server.execute("DROP ROLE stranger")
