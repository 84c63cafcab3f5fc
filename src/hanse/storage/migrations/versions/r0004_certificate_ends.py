"""When clients' certificates end, so that a server says of one that has ended what the server before it said."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Add the table; a client comes to be in it when it shows its certificate next."""
    op.create_table(
        "certificate_ends",
        sa.Column("client", sa.String, primary_key=True),
        sa.Column("ends_at", sa.Double, nullable=False),
    )
