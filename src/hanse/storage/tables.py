"""The store's tables, as SQLAlchemy Core knows them.

What is searched or compared is a column; all else is msgpack of the types in ``hanse.job`` and ``hanse.messages``,
which add fields only with defaults, so that a newer release reads what an older one wrote. These are the tables as they
are now; ``migrations`` makes them, step by step, and says which step was the last. A test holds the two together.
"""

from typing import Final

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    inspect,
    text,
)

SCHEMA_VERSION: Final = "0004"
"""The migration that makes the schema below."""
FIRST_RELEASE: Final = "0001"
"""The schema of the first release, which did not note it down as the later ones do."""

metadata = MetaData()

# SQLite counts rows by itself only under the very type INTEGER.
_Counter = BigInteger().with_variant(Integer, "sqlite")


def _job_id() -> Column[str]:
    return Column("job_id", ForeignKey("jobs.job_id"), primary_key=True)


meta = Table("meta", metadata, Column("key", String, primary_key=True), Column("value", String, nullable=False))

lease = Table(
    "lease",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("epoch", BigInteger, nullable=False),
    Column("holder", String, nullable=False),
    Column("beat", BigInteger, nullable=False),
    Column("ttl_s", Double, nullable=False),
    Column("name", String, nullable=False),
    Column("target", String, nullable=False),
    Column("successor", String, nullable=False),
)
"""One row, from the start, so that taking the lease is an update of it."""

standbys = Table(
    "standbys",
    metadata,
    Column("name", String, primary_key=True),
    Column("holder", String, nullable=False),
    Column("target", String, nullable=False),
    Column("seen_at", Double, nullable=False),
)

jobs = Table(
    "jobs",
    metadata,
    Column("number", _Counter, primary_key=True, autoincrement=True),
    Column("job_id", String, nullable=False, unique=True),
    Column("state", String, nullable=False),
    Column("last_round", Integer, nullable=False),
    Column("record", LargeBinary, nullable=False),
    Index("jobs_by_state", "state"),
)
"""``number`` gives the order of submission; ``last_round`` is the last committed round, -1 before there is one."""

states = Table("states", metadata, _job_id(), Column("state", LargeBinary, nullable=False))
"""The newest state of each run: a ``StateRef``."""

rounds = Table(
    "rounds",
    metadata,
    _job_id(),
    Column("round", Integer, primary_key=True),
    Column("record", LargeBinary, nullable=False),
)
"""The committed rounds, for people: a ``RoundView`` each."""

tasks = Table(
    "tasks",
    metadata,
    _job_id(),
    Column("round", Integer, primary_key=True),
    Column("name", String, primary_key=True),
    Column("sequence", Integer, primary_key=True),
    Column("client", String, primary_key=True),
    Column("task", LargeBinary, nullable=False),
    Column("model", LargeBinary),
    Column("answer", LargeBinary),
    Column("accepted", BigInteger),
)
"""The tasks of each run's present round, and those carried on: a ``TaskAssignment`` without its model, the model's key
in ``models``, and the ``TaskResult`` once there is one. ``accepted`` gives the order of a run's answers: the epoch, and
the number within its tenure."""

models = Table(
    "models",
    metadata,
    _job_id(),
    Column("digest", LargeBinary, primary_key=True),
    Column("model", LargeBinary, nullable=False),
)
"""The models (``ModelRef``) that a run's tasks hand out, once each, however many clients get them."""

disabled = Table(
    "disabled", metadata, Column("client", String, primary_key=True), Column("reason", String, nullable=False)
)

tokens = Table(
    "tokens",
    metadata,
    Column("client", String, primary_key=True),
    Column("fingerprint", String, nullable=False),
    Column("until_s", Double, nullable=False),
    Index("tokens_by_until", "until_s"),
)
"""The fingerprint of the one token of each client that counts (nothing: none does), and how long that matters."""

certificate_ends = Table(
    "certificate_ends",
    metadata,
    Column("client", String, primary_key=True),
    Column("ends_at", Double, nullable=False),
)

audit = Table(
    "audit",
    metadata,
    Column("number", _Counter, primary_key=True, autoincrement=True),
    Column("at", Double, nullable=False),
    Column("actor", String, nullable=False),
    Column("action", String, nullable=False),
    Column("object", String, nullable=False),
    Column("outcome", String, nullable=False),
    Column("reason", String, nullable=False),
)


def schema_version(connection: Connection) -> str:
    """Return which migration made the schema of the store, ``""`` when there is none."""
    names = inspect(connection).get_table_names()
    if "alembic_version" in names:
        return str(connection.scalar(text("SELECT version_num FROM alembic_version")))
    return FIRST_RELEASE if meta.name in names else ""
