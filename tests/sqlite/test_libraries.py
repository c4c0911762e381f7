"""Which SQLite libraries are refused, and which are warned of."""

import logging

import pytest

from kkt_buffer import (
    create_buffer_engine,
)
from kkt_buffer.sqlite import engine as layer


class TestWalResetBug:
    @pytest.mark.parametrize(
        ("version", "affected"),
        [
            ((3, 40, 1), True),
            ((3, 44, 5), True),
            ((3, 44, 6), False),
            ((3, 45, 0), True),
            ((3, 50, 6), True),
            ((3, 50, 7), False),
            ((3, 51, 2), True),
            ((3, 51, 3), False),
            ((3, 53, 0), False),
        ],
    )
    def test_versions(self, version, affected):
        assert affected == layer._has_wal_reset_bug(version)

    @pytest.mark.parametrize("affected", [True, False])
    def test_said_once(self, monkeypatch, caplog, affected):
        """An affected library is named in the log, once for each process."""
        monkeypatch.setattr(layer, "_warned", set())
        monkeypatch.setattr(layer, "_has_wal_reset_bug", lambda version: affected)
        with caplog.at_level(logging.WARNING):
            create_buffer_engine(":memory:")
            create_buffer_engine(":memory:")
        assert affected == sum("WAL-reset bug" in record.message for record in caplog.records)
