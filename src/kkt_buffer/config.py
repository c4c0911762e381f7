"""
The settings that the buffer reads from its `config` table: default and bounds of each, and typed reading.

How they are stored and changed is in `operations.settings`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from kkt_buffer.errors import InvalidConfigError


@dataclass(frozen=True, slots=True)
class ConfigRule:
    """Default and bounds of one setting, an int."""

    default: int
    minimum: int
    maximum: int = 1_000_000_000

    @property
    def expected(self) -> str:
        """The range in words, for an error."""
        return f"a whole number from {self.minimum} to {self.maximum}"

    def parse(self, value: object) -> int | None:
        """`value` (an int or its decimal text) as an int; None if it is not a number or out of bounds."""
        if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= len(str(self.maximum)):
            value = int(value)
        if isinstance(value, int) and not isinstance(value, bool) and self.minimum <= value <= self.maximum:
            return value
        return None


# Keys in `config` of a file: the server to which a move of it has begun, and when it was complete.
MOVED_TO, MOVED_AT = "moved_to", "moved_at"

# For type checkers; a test compares it with the rules below.
NumberKey = Literal[
    "buffer_capacity",
    "circuit_breaker_threshold",
    "circuit_breaker_timeout",
    "max_retry_attempts",
    "retry_backoff_initial",
    "retry_backoff_max",
    "lease_seconds",
    "retention_synced_days",
    "retention_dlq_days",
    "retention_events_days",
    "ofd_deadline_days",
]

CONFIG_RULES: Mapping[str, ConfigRule] = {
    "buffer_capacity": ConfigRule(200, 1),  # undelivered receipts
    "circuit_breaker_threshold": ConfigRule(5, 1),  # failures in a row
    "circuit_breaker_timeout": ConfigRule(60, 1),  # seconds
    "max_retry_attempts": ConfigRule(20, 1),
    "retry_backoff_initial": ConfigRule(5, 0),  # seconds
    "retry_backoff_max": ConfigRule(300, 0),  # seconds
    "lease_seconds": ConfigRule(60, 1),
    "retention_synced_days": ConfigRule(7, 0, 36_500),
    "retention_dlq_days": ConfigRule(90, 0, 36_500),
    "retention_events_days": ConfigRule(90, 0, 36_500),
    "ofd_deadline_days": ConfigRule(30, 1, 36_500),  # 54-ФЗ: the till is blocked after 30 calendar days
}


def number_of(key: str, stored: str | None) -> int:
    """
    The value of a setting from its stored text; its default where nothing is stored.

    Raises `InvalidConfigError` if the stored text is not a number within the bounds.
    """
    rule = CONFIG_RULES[key]
    number = rule.default if stored is None else rule.parse(stored)
    if number is None:
        raise InvalidConfigError(key, str(stored), rule.expected)
    return number
