"""The settings in the table `config`."""

import pytest
from builders import NOON, a_receipt, snapshot
from sqlalchemy import text

from kkt_buffer.config import CONFIG_RULES


class TestConfig:
    @pytest.mark.parametrize("key", CONFIG_RULES)
    def test_defaults(self, repository, engine, key):
        """The migrated values are the defaults, and a deleted row means the default."""
        assert CONFIG_RULES[key].default == repository.get_config(key)
        with engine.begin() as connection:
            connection.execute(text("DELETE FROM config"))
        assert CONFIG_RULES[key].default == repository.get_config(key)

    def test_version(self, repository):
        assert repository.get_config("version") == "1.0.0"

    def test_without_rows(self, repository, engine):
        """The buffer works by its defaults if the table is empty."""
        with engine.begin() as connection:
            connection.execute(text("DELETE FROM config"))
        a_receipt(repository)
        assert repository.get_buffer_status().percent_full == 0.5

    @pytest.mark.parametrize("value", [7, "7", "007"])
    def test_number(self, repository, value):
        repository.set_config("buffer_capacity", value)
        assert repository.get_config("buffer_capacity") == 7
        assert repository.get_buffer_status().capacity == 7

    @pytest.mark.parametrize("value", ["abc", 0, -5, "0", "", "1.5", 1.5, True, None, 10**10, "9" * 5000, "٧", "１"])
    def test_invalid(self, repository, engine, value):
        before = snapshot(engine)
        with pytest.raises(ValueError, match="buffer_capacity: expected a whole number from 1 to 1000000000"):
            repository.set_config("buffer_capacity", value)
        assert before == snapshot(engine)

    def test_other_keys(self, repository, engine, clock):
        """A key that the buffer does not know is the service's own, and kept as text."""
        assert repository.get_config("shop.name") is None
        repository.set_config("shop.name", "Ромашка")
        clock.seconds += 5
        repository.set_config("shop.name", "Василёк")
        assert repository.get_config("shop.name") == "Василёк"
        with engine.connect() as connection:
            changed = connection.scalar(text("SELECT updated_at FROM config WHERE key = 'shop.name'"))
        assert NOON + 5 == changed

    @pytest.mark.parametrize(("key", "value"), [("shop.name", 5), ("shop.name", ""), ("", "x"), (None, "x"), (5, "x")])
    def test_bad(self, repository, key, value):
        with pytest.raises((ValueError, TypeError), match="(key|value): expected a text"):
            repository.set_config(key, value)
