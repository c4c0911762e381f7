"""Settings: the `config` table, typed and checked."""

from sqlalchemy import select

from kkt_buffer import arguments
from kkt_buffer.config import CONFIG_RULES, number_of
from kkt_buffer.models import ConfigEntry
from kkt_buffer.transaction import Transactions

SECONDS_PER_DAY = 86_400


class Settings(Transactions):
    """The operations on settings."""

    def get_config(self, key: str) -> int | str | None:
        """
        A setting: a whole number for the keys that the buffer reads, the text for others, None if it is not there.

        Raises `InvalidConfigError` if somebody has put nonsense where the buffer needs a number.
        """
        key = arguments.name("key", key)
        with self._reading() as session:
            value = session.scalar(select(ConfigEntry.value).where(ConfigEntry.key == key))
        return number_of(key, value) if key in CONFIG_RULES else value

    def set_config(self, key: str, value: int | str) -> None:
        """
        Change a setting. The keys that the buffer reads take a whole number within bounds, others a text.

        Raises `ValueError` for a number out of bounds, or something that is none.
        """
        key = arguments.name("key", key)
        rule = CONFIG_RULES.get(key)
        if rule is None:
            stored = arguments.name("value", value)
        else:
            number = rule.parse(value)
            if number is None:
                raise ValueError(f"{key}: expected {rule.expected}, got {value!r}")
            stored = str(number)
        with self._writing() as session:
            session.merge(ConfigEntry(key=key, value=stored, updated_at=self._seconds()))
            session.flush()

    def _numbers(self, *keys: str) -> dict[str, int]:
        """Several settings of the buffer's own with one query."""
        with self._reading() as session:
            stored = {row.key: row.value for row in session.execute(select(ConfigEntry.key, ConfigEntry.value))}
        return {key: number_of(key, stored.get(key)) for key in keys}
