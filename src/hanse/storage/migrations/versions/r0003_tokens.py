"""Which token of a client counts, so that one that it has given up is refused by every server."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Add the table; a client that is not in it yet goes on with the token that it has."""
    op.create_table(
        "tokens",
        sa.Column("client", sa.String, primary_key=True),
        sa.Column("fingerprint", sa.String, nullable=False),
        sa.Column("until_s", sa.Double, nullable=False),
    )
    op.create_index("tokens_by_until", "tokens", ["until_s"])
