"""
${message}

Danger: write here which data an error would lose, and when the downgrade refuses.

Rules for migrations; delete this list when all are kept:
- Everything runs in one transaction, with foreign keys off. Never commit; never open another connection.
- New columns are nullable or have a default: other programs insert rows with the columns of the first schema.
- Prefer ADD COLUMN, with its CHECK. Rebuilding a table drops its triggers (create them again) and takes minutes.
- Write out all SQL and columns; import nothing from src: it will have changed when this runs.
- Put constraint names in op.f(), else their prefix is doubled. In partial indexes use literals, not parameters.
- Say what happens on each engine: upgrade() asks op.get_context().dialect.name. What makes the schema on a server is
  returned by server_statements(schema), which upgrade() runs and `kkt_buffer.check` reads.
- Triggers and views of `sqlite.schema` are dropped and created again if their text changes: see `alembic check`.
- The downgrade works: it keeps every row, or refuses with a CommandError that says what to do.
- Test it with data in tests/schema: up, down, up, and compare the rows after each step.
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
