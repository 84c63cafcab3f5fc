"""A lease that beats, the servers that stand by, and the order in which answers were accepted."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Give an existing store what two servers on one store need, and a run that carries tasks on."""
    _renew_lease()
    op.create_table(
        "standbys",
        sa.Column("name", sa.String, primary_key=True),
        sa.Column("holder", sa.String, nullable=False),
        sa.Column("target", sa.String, nullable=False),
        sa.Column("seen_at", sa.Double, nullable=False),
    )
    op.add_column("tasks", sa.Column("accepted", sa.BigInteger))
    _number_answers()
    # The first release reads this, and so refuses the store with a sentence.
    op.execute("UPDATE meta SET value = '2' WHERE key = 'schema_version'")


def _renew_lease() -> None:
    """Make the lease anew, and free: whoever held it is of the first release, and its tenure is over."""
    epoch, holder = op.get_bind().execute(sa.text("SELECT epoch, holder FROM lease")).one()
    op.drop_table("lease")
    lease = op.create_table(
        "lease",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("epoch", sa.BigInteger, nullable=False),
        sa.Column("holder", sa.String, nullable=False),
        sa.Column("beat", sa.BigInteger, nullable=False),
        sa.Column("ttl_s", sa.Double, nullable=False),
        sa.Column("name", sa.String, nullable=False),
        sa.Column("target", sa.String, nullable=False),
        sa.Column("successor", sa.String, nullable=False),
    )
    free = {"holder": "", "beat": 0, "ttl_s": 0.0, "name": "", "target": "", "successor": ""}
    op.bulk_insert(lease, [{"id": 1, "epoch": epoch + 1 if holder else epoch, **free}])


def _number_answers() -> None:
    """Note down the order in which answers were accepted; the first release handed them out by their keys."""
    op.execute("""
        UPDATE tasks SET accepted = (
            SELECT count(*) FROM tasks AS other
            WHERE other.job_id = tasks.job_id AND other.answer IS NOT NULL
            AND (other.round, other.name, other.sequence, other.client)
                <= (tasks.round, tasks.name, tasks.sequence, tasks.client)
        ) WHERE answer IS NOT NULL
    """)
