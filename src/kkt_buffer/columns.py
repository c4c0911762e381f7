"""
Types of columns, and indexes, that are the same on every engine: what differs between engines is in this module.
"""

import json
from typing import Any

from sqlalchemy import BigInteger, Dialect, Index, Integer, Text, TypeDecorator, text
from sqlalchemy.types import UserDefinedType

# In the `info` of a table that only one engine has.
ONLY_ON = "kkt_buffer_only_on"
# In the `info` of an index: its condition, and the columns that it has on PostgreSQL alone.
WHERE = "kkt_buffer_where"
MORE_COLUMNS = "kkt_buffer_more_columns"


class JsonText(TypeDecorator[Any]):
    """JSON stored as TEXT, with Cyrillic unescaped. Text of other programs that is not JSON is returned unchanged."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: object, dialect: Dialect) -> str | None:
        """Encode, for SQLAlchemy."""
        del dialect
        return None if value is None else json.dumps(value, ensure_ascii=False, allow_nan=False)

    def process_result_value(self, value: str | None, dialect: Dialect) -> object:
        """Decode, for SQLAlchemy."""
        del dialect
        try:
            return None if value is None else json.loads(value)
        except (ValueError, TypeError):
            return value


class TransactionId(UserDefinedType[str]):
    """The number of a transaction of PostgreSQL, which never wraps around."""

    cache_ok = True

    def get_col_spec(self, **_: object) -> str:
        """The name of the type, for SQLAlchemy."""
        return "xid8"


# SQLite's INTEGER has 8 bytes, PostgreSQL's 4: times would end in 2038.
WholeNumber = BigInteger().with_variant(Integer, "sqlite")
# Compared byte by byte, as SQLite does; a locale's order is slower, and changes with the operating system.
Key = Text().with_variant(Text(collation="C"), "postgresql")


def partial_index(name: str, *columns: str, where: str, unique: bool = False, more: tuple[str, ...] = ()) -> Index:
    """
    An index on the rows that match `where`, with `more` columns on PostgreSQL.

    `postgresql_where` would import SQLAlchemy's PostgreSQL dialect, some 60 ms at each start.
    """
    return Index(name, *columns, unique=unique, sqlite_where=text(where), info={WHERE: where, MORE_COLUMNS: more})
