"""Settings: the `config` table, typed and checked by the rules in `config`."""

from sqlalchemy import bindparam, select, update

from kkt_buffer.config import CONFIG_RULES, number_of
from kkt_buffer.models import ConfigEntry
from kkt_buffer.transaction import Transaction

VALUE = select(ConfigEntry.value).where(ConfigEntry.key == bindparam("name"))
CHANGE = (
    update(ConfigEntry.__table__)
    .where(ConfigEntry.key == bindparam("name"))
    .values(value=bindparam("new"), updated_at=bindparam("now"))
)


def get_config(tx: Transaction, key: str) -> int | str | None:
    """A setting: an int for the keys that the buffer reads, the text for others."""
    value = tx.connection.scalar(VALUE, {"name": key})
    return number_of(key, value) if key in CONFIG_RULES else value


def set_config(tx: Transaction, key: str, value: str) -> None:
    """Store a setting."""
    row = {"key": key, "value": value, "updated_at": tx.now}
    if not tx.connection.execute(CHANGE, {"name": key, "new": value, "now": tx.now}).rowcount:
        tx.connection.execute(ConfigEntry.__table__.insert(), row)
    tx.forget_settings()
