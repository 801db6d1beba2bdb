"""The number of the last report of each run.

Revision ID: 0004
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.add_column("runs", sa.Column("outbox_id", sa.String(), nullable=True))
    op.add_column("runs", sa.Column("outbox_sequence", sa.BigInteger(), nullable=True))
