"""Parse names, table definitions and references in SQLite's SQL, also those that other programs wrote."""

import re

# Every foreign key that refers to receipts; other programs may have added some.
REFERENCES = """\
SELECT m.name, f."from" AS origin, COALESCE(f."to", 'id') AS target
FROM sqlite_master AS m, pragma_foreign_key_list(m.name) AS f
WHERE m.type = 'table' AND f."table" = 'receipts' COLLATE NOCASE"""

_TOKENS = re.compile(
    r"""'(?:[^']|'')*' | "(?:[^"]|"")*" | `[^`]*` | \[[^]]*\] | --[^\n]* | /\*.*?\*/ | [(),] | [^'"`[(),/-]+ | .""",
    re.DOTALL | re.VERBOSE,
)
_CLOSING = {'"': '"', "`": "`", "[": "]"}


def quoted(name: str) -> str:
    """A name as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def table_clauses(sql: str) -> list[str]:
    """The definitions of columns and constraints in a CREATE TABLE, without comments."""
    found, depth = [""], 0
    for piece in _TOKENS.findall(sql[sql.index("(") + 1 : sql.rindex(")")]):
        depth += {"(": 1, ")": -1}.get(piece, 0)
        if piece == "," and not depth:
            found.append("")
        elif not piece.startswith(("--", "/*")):
            found[-1] += piece
    return [clause.strip() for clause in found]


def first_word(clause: str) -> str:
    """The column that a clause defines, or the keyword of a constraint, in lower case and without quotes."""
    if clause[:1] in _CLOSING:
        return clause[1 : clause.index(_CLOSING[clause[0]], 1)].lower()
    return re.split(r"[\s(]", clause, maxsplit=1)[0].lower()
