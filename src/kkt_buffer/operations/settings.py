"""Settings: rows of the `config` table, checked by the rules in the `config` module."""

from sqlalchemy import bindparam, select

from kkt_buffer.config import CONFIG_RULES, number_of
from kkt_buffer.models import ConfigEntry
from kkt_buffer.transaction import Transaction

VALUE = select(ConfigEntry.value).where(ConfigEntry.key == bindparam("name"))
STORE = """\
INSERT INTO config (key, value, updated_at) VALUES (:key, :value, :now)
ON CONFLICT (key) DO UPDATE SET value = excluded.value, updated_at = excluded.updated_at"""


def get_config(tx: Transaction, key: str) -> int | str | None:
    """A setting: an int for the keys that the buffer reads, the text for other keys."""
    value = tx.connection.scalar(VALUE, {"name": key})
    return number_of(key, value) if key in CONFIG_RULES else value


def set_config(tx: Transaction, key: str, value: str) -> None:
    """Store a setting."""
    tx.run(STORE, {"key": key, "value": value, "now": tx.now})
    tx.forget_settings()
