"""The schema of the first release, 0.1."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

# SQLite counts rows by itself only under the very type INTEGER.
_COUNTER = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    """Make the tables of a new store."""
    meta = op.create_table(
        "meta",
        sa.Column("key", sa.String, primary_key=True),
        sa.Column("value", sa.String, nullable=False),
    )
    lease = op.create_table(
        "lease",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("epoch", sa.BigInteger, nullable=False),
        sa.Column("holder", sa.String, nullable=False),
        sa.Column("expires_at", sa.Double, nullable=False),
    )
    op.create_table(
        "jobs",
        sa.Column("number", _COUNTER, primary_key=True, autoincrement=True),
        sa.Column("job_id", sa.String, nullable=False, unique=True),
        sa.Column("state", sa.String, nullable=False),
        sa.Column("last_round", sa.Integer, nullable=False),
        sa.Column("record", sa.LargeBinary, nullable=False),
    )
    op.create_index("jobs_by_state", "jobs", ["state"])
    op.create_table("states", _job_id(), sa.Column("state", sa.LargeBinary, nullable=False))
    op.create_table(
        "rounds",
        _job_id(),
        sa.Column("round", sa.Integer, primary_key=True),
        sa.Column("record", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "tasks",
        _job_id(),
        sa.Column("round", sa.Integer, primary_key=True),
        sa.Column("name", sa.String, primary_key=True),
        sa.Column("sequence", sa.Integer, primary_key=True),
        sa.Column("client", sa.String, primary_key=True),
        sa.Column("task", sa.LargeBinary, nullable=False),
        sa.Column("model", sa.LargeBinary),
        sa.Column("answer", sa.LargeBinary),
    )
    op.create_table(
        "models",
        _job_id(),
        sa.Column("digest", sa.LargeBinary, primary_key=True),
        sa.Column("model", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "disabled",
        sa.Column("client", sa.String, primary_key=True),
        sa.Column("reason", sa.String, nullable=False),
    )
    op.create_table(
        "audit",
        sa.Column("number", _COUNTER, primary_key=True, autoincrement=True),
        sa.Column("at", sa.Double, nullable=False),
        sa.Column("actor", sa.String, nullable=False),
        sa.Column("action", sa.String, nullable=False),
        sa.Column("object", sa.String, nullable=False),
        sa.Column("outcome", sa.String, nullable=False),
        sa.Column("reason", sa.String, nullable=False),
    )
    op.bulk_insert(meta, [{"key": "schema_version", "value": "1"}])
    op.bulk_insert(lease, [{"id": 1, "epoch": 0, "holder": "", "expires_at": 0.0}])


def _job_id() -> sa.Column[str]:
    return sa.Column("job_id", sa.String, sa.ForeignKey("jobs.job_id"), primary_key=True)
