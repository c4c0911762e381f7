"""The state of a buffer on a server: what each transaction has changed is appended, and folded now and then."""

import pytest
from builders import NOON

from kkt_buffer import ReceiptRepository

ADD = """
INSERT INTO receipts (id, pos_id, created_at, hlc_local_time, hlc_logical_counter, fiscal_doc)
VALUES ('{id}', 'till-1', {now}, {now}, {number}, '{{}}')
"""
TIMES = 300  # at one of twenty, it is folded in all but one of a million runs


def add(connection, first, times=TIMES):
    for number in range(first, first + times):
        connection.exec_driver_sql(ADD.format(id=f"receipt-{number}", now=NOON, number=number))


def counted(connection):
    """The number of pending receipts, the rows it is made of, and whether the newest folded row is of this server."""
    return connection.exec_driver_sql(
        "SELECT pending, (SELECT COUNT(*) FROM buffer_changes), (SELECT xmin::text = folded_by FROM buffer_changes"
        " WHERE folded_below IS NOT NULL ORDER BY folded_below DESC LIMIT 1) FROM buffer_state"
    ).one()


@pytest.fixture
def roomy(server_engine):
    ReceiptRepository(server_engine).set_config("buffer_capacity", 1_000_000)
    return server_engine


class TestFolded:
    def test_alone(self, roomy):
        """Each receipt in a transaction of its own: the rows of the state do not grow with the receipts."""
        with roomy.connect() as connection:
            for number in range(TIMES):
                add(connection, number, 1)
                connection.commit()
            pending, rows, is_bounded = counted(connection)
        assert TIMES == pending
        assert rows < TIMES
        assert is_bounded

    def test_in_savepoints(self, roomy):
        """In savepoints of one transaction too, of which some are rolled back."""
        with roomy.begin() as connection:
            for number in range(TIMES):
                with connection.begin_nested() as savepoint:
                    add(connection, number, 1)
                    if number % 7 == 0:
                        savepoint.rollback()
        with roomy.connect() as connection:
            pending, rows, is_bounded = counted(connection)
        assert TIMES - len(range(0, TIMES, 7)) == pending
        assert rows < pending
        assert is_bounded

    def test_beside_an_open_one(self, roomy):
        """What a transaction adds that is not committed yet is counted after its commit, folded or not."""
        with roomy.connect() as late:
            late.exec_driver_sql("INSERT INTO buffer_changes (pending) VALUES (1000)")
            with roomy.connect() as connection:
                for number in range(TIMES):
                    add(connection, number, 1)
                    connection.commit()
                assert TIMES == counted(connection).pending
                connection.rollback()
                late.commit()
                assert TIMES + 1000 == counted(connection).pending

    def test_restored(self, roomy):
        """Copied by a dump, its rows have the numbers of another server: all of them are read."""
        with roomy.connect() as connection:
            add(connection, 0)
            connection.commit()
            connection.exec_driver_sql("CREATE TEMPORARY TABLE dumped AS SELECT * FROM buffer_changes")
            connection.exec_driver_sql("DELETE FROM buffer_changes")
            connection.exec_driver_sql("INSERT INTO buffer_changes SELECT * FROM dumped")
            connection.exec_driver_sql("DROP TABLE dumped")
            connection.commit()
            pending, _, is_bounded = counted(connection)
        assert TIMES == pending
        assert not is_bounded
