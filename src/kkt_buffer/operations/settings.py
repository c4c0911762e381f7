"""Settings: rows of the `config` table, checked by the rules in the `config` module."""

from typing import cast

from sqlalchemy import Table, bindparam, insert, select, update

from kkt_buffer.config import CONFIG_RULES, number_of
from kkt_buffer.models import ConfigEntry
from kkt_buffer.transaction import Transaction

_config = cast("Table", ConfigEntry.__table__)

VALUE = select(ConfigEntry.value).where(ConfigEntry.key == bindparam("name"))
CHANGE = (
    update(_config)
    .where(ConfigEntry.key == bindparam("name"))
    .values(value=bindparam("new"), updated_at=bindparam("now"))
)


def get_config(tx: Transaction, key: str) -> int | str | None:
    """A setting: an int for the keys that the buffer reads, the text for other keys."""
    value = tx.connection.scalar(VALUE, {"name": key})
    return number_of(key, value) if key in CONFIG_RULES else value


def set_config(tx: Transaction, key: str, value: str) -> None:
    """Store a setting."""
    row = {"key": key, "value": value, "updated_at": tx.now}
    if not tx.connection.execute(CHANGE, {"name": key, "new": value, "now": tx.now}).rowcount:
        tx.connection.execute(insert(_config), row)
    tx.forget_settings()
