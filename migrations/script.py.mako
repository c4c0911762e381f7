"""
${message}

Danger: say what is lost if this goes wrong, and what the downgrade refuses.

Rules of our migrations; delete them once they are kept:
- Everything runs in one transaction, with foreign keys off. Never commit, never open another connection.
- Add what is nullable or has a default: other programs insert rows by the first schema's columns.
- Prefer ADD COLUMN, its CHECK with it. Rebuilding a table drops its triggers (make them again) and takes minutes.
- Write SQL and columns out; import nothing from src, which will have changed when this runs.
- Names of constraints in op.f(), or they come out doubled. Literals, not parameters, in partial indexes.
- Triggers and views of `sqlite.schema` are dropped and created again where their text changes. `alembic check` tells.
- The downgrade is real: it keeps every row, or refuses with a CommandError that says what to do.
- Test it with data in tests/schema: up, down, up, with what each step keeps.
"""

import sqlalchemy as sa
from alembic import op
${imports if imports else ""}
revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = ${repr(branch_labels)}
depends_on = ${repr(depends_on)}


def upgrade() -> None:
    ${upgrades if upgrades else "pass"}


def downgrade() -> None:
    ${downgrades if downgrades else "pass"}
