"""
Compare the schema of a database with that of this release: tables, indexes, views, triggers and functions.

Their SQL text is compared. Triggers, views and columns with other names belong to other programs.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from sqlalchemy import Connection

from kkt_buffer.backend import backend_of
from kkt_buffer.sqlite.ddl import first_word, table_clauses


class Difference(NamedTuple):
    """A schema object that differs; `expected` or `found` is None where it is missing."""

    kind: str
    name: str
    expected: str | None
    found: str | None

    def __str__(self) -> str:
        if self.found is None:
            return f"the {self.kind} {self.name} is missing"
        if self.expected is None:
            return f"the {self.kind} {self.name} is not part of the buffer"
        if self.kind != "table":
            return f"the {self.kind} {self.name} differs"
        missing, extra = self._clauses()
        parts = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"has {', '.join(extra)}"] * bool(extra)
        return f"the table {self.name} {' and '.join(parts)}"

    @property
    def is_damage(self) -> bool:
        """Whether a table or a column is missing. Indexes, views, triggers and rules hold no receipts."""
        if self.kind != "table" or self.expected is None:
            return False
        return self.found is None or not _names(self.expected) <= _names(self.found)

    @property
    def constraints(self) -> list[str]:
        """The constraints of a table that are missing or extra."""
        missing, extra = self._clauses()
        return [clause for clause in missing + extra if clause.startswith("CONSTRAINT")]

    def _clauses(self) -> tuple[list[str], list[str]]:
        if self.expected is None or self.found is None:
            return [], []
        expected, found = _clauses(self.expected), _clauses(self.found)
        return sorted(expected - found), sorted(found - expected - _added_by_others(self.expected, self.found))


def differences(connection: Connection, made_by: Callable[[str], list[str]]) -> list[Difference]:
    """
    Every difference, sorted by kind and name; empty if the database has the schema of this release.

    `made_by`: see `Backend.objects`.
    """
    expected, found = backend_of(connection.engine).objects(connection, made_by)
    return [
        Difference(kind, name, expected.get((kind, name)), found.get((kind, name)))
        for kind, name in sorted(expected.keys() | found.keys())
        if _differ(expected.get((kind, name)), found.get((kind, name)))
    ]


def _differ(expected: str | None, found: str | None) -> bool:
    if expected is None or found is None:
        return True
    if not expected.startswith("CREATE TABLE"):
        return _normalized(expected) != _normalized(found)
    return _clauses(expected) != _clauses(found) - _added_by_others(expected, found)


def _added_by_others(expected: str, found: str) -> frozenset[str]:
    """The columns that other programs have added to one of our tables."""
    known = {first_word(clause) for clause in _clauses(expected)} | _RULES
    return frozenset(clause for clause in _clauses(found) if first_word(clause) not in known)


_RULES = frozenset({"check", "constraint", "foreign", "primary", "unique"})  # the first words of what is no column


def _names(sql: str) -> frozenset[str]:
    """The names of the columns of a table."""
    return frozenset(map(first_word, table_clauses(sql))) - _RULES


def _normalized(sql: str) -> str:
    """The text without line breaks and without quotes around names, which change nothing."""
    return re.sub(r"\s+", " ", sql).replace('"', "").strip()


def _clauses(sql: str) -> frozenset[str]:
    """
    The head, columns, constraints and options of a table, as a set: ADD COLUMN changes their order.

    A constraint that ADD COLUMN has put into the clause of its column is split off.
    """
    head, options = _normalized(sql[: sql.index("(")]), _normalized(sql[sql.rindex(")") + 1 :])
    clauses = (piece for clause in table_clauses(sql) for piece in re.split(r" (?=CONSTRAINT )", _normalized(clause)))
    return frozenset({head, *clauses, *([options] if options else [])})
