"""The store's SQL, each statement built and compiled once.

A parameter of a ``WHERE`` clause is called ``of_…`` after its column; what an ``INSERT`` or ``UPDATE`` writes are
parameters called as the columns.
"""

from functools import cache
from typing import Any, Final

from sqlalchemy import (
    Column,
    ColumnElement,
    Double,
    Table,
    bindparam,
    cast,
    delete,
    extract,
    func,
    insert,
    null,
    or_,
    select,
    text,
    update,
)

from hanse.job import JobState
from hanse.messages import TaskKey
from hanse.storage.records import AuditEntry, Standby
from hanse.storage.tables import (
    audit,
    certificate_ends,
    disabled,
    jobs,
    lease,
    meta,
    models,
    rounds,
    standbys,
    states,
    tasks,
    tokens,
)
from hanse.storage.transaction import Statement

NO_LIMIT: Final = 2**31 - 1


def _given(column: Column[Any]) -> ColumnElement[bool]:
    return column == bindparam(f"of_{column.key}")


def _row(*columns: Column[Any]) -> dict[str, Any]:
    return {column.key: bindparam(column.key) for column in columns}


def _but(table: Table, *left_out: Column[Any]) -> list[Column[Any]]:
    return [column for column in table.c if column not in left_out]


STORE_ID: Final = select(meta.c.value).where(meta.c.key == "store_id")
ADD_STORE_ID: Final = insert(meta)
"""These two are run once, before there is a ``Transaction``."""

SCHEMA: Final = Statement(text("SELECT version_num FROM alembic_version"))

# Rows are locked where the database can: nobody takes the lease, or moves the job, between the look and the commit. It
# is the strongest lock also where only the epoch is compared, for two transactions that both want more could not have
# it.
_LEASE = select(*_but(lease, lease.c.id))
EPOCH: Final = Statement(select(lease.c.epoch).with_for_update())
LEASE: Final = Statement(_LEASE)
LEASE_TO_CHANGE: Final = Statement(_LEASE.with_for_update())
SET_LEASE: Final = Statement(update(lease).values(_row(*_but(lease, lease.c.id))))

_NOW = cast(extract("epoch", func.now()), Double)
_WITHIN_S = bindparam("within_s", type_=Double)
STANDBYS: Final = Statement(
    select(*(standbys.c[name] for name in Standby.__struct_fields__)).where(
        standbys.c.seen_at.between(_NOW - _WITHIN_S, _NOW + _WITHIN_S)
    )
)
ADD_STANDBY: Final = Statement(insert(standbys).values(_row(*_but(standbys, standbys.c.seen_at)) | {"seen_at": _NOW}))
DELETE_STANDBY: Final = Statement(delete(standbys).where(_given(standbys.c.name)))

_AT_JOB: Final = _given(jobs.c.job_id)
ADD_JOB: Final = Statement(insert(jobs).values(_row(*_but(jobs, jobs.c.number))))
JOB: Final = Statement(select(jobs.c.record).where(_AT_JOB))
JOB_STATE: Final = Statement(select(jobs.c.state, jobs.c.last_round).where(_AT_JOB).with_for_update())
JOB_TO_CHANGE: Final = Statement(select(jobs.c.state, jobs.c.record).where(_AT_JOB).with_for_update())
SET_JOB: Final = Statement(update(jobs).where(_AT_JOB).values(_row(jobs.c.state, jobs.c.record)))
SET_LAST_ROUND: Final = Statement(update(jobs).where(_AT_JOB).values(_row(jobs.c.last_round)))

RUN_STATE: Final = Statement(select(states.c.state).where(_given(states.c.job_id)))
ADD_RUN_STATE: Final = Statement(insert(states).values(_row(*states.c)))
DELETE_RUN_STATE: Final = Statement(delete(states).where(_given(states.c.job_id)))

_ROUNDS = select(rounds.c.record).where(_given(rounds.c.job_id))
ADD_ROUND: Final = Statement(insert(rounds).values(_row(*rounds.c)))
ROUNDS: Final = Statement(_ROUNDS.order_by(rounds.c.round))
LAST_ROUND: Final = Statement(_ROUNDS.order_by(rounds.c.round.desc()).limit(1))

_KEY_IN_RUN: Final = tuple(tasks.c[name] for name in TaskKey.__struct_fields__)
_OF_RUN: Final = _given(tasks.c.job_id)
_AT_KEY: Final = (_OF_RUN, *map(_given, _KEY_IN_RUN))
# As text, for SQLAlchemy knows this clause, which is the same in both databases, as a thing of either.
ADD_NEW_TASKS: Final = Statement(
    text("""
    INSERT INTO tasks (job_id, round, name, sequence, client, task, model)
    VALUES (:job_id, :round, :name, :sequence, :client, :task, :model) ON CONFLICT DO NOTHING
    """)
)
TASKS: Final = Statement(
    select(tasks.c.task, tasks.c.model, tasks.c.answer).where(_OF_RUN).order_by(tasks.c.accepted, *_KEY_IN_RUN)
)
TASK_KEYS: Final = Statement(select(*_KEY_IN_RUN).where(_OF_RUN))
ANSWER_TASK: Final = Statement(
    update(tasks).where(*_AT_KEY, tasks.c.answer.is_(None)).values(_row(tasks.c.answer, tasks.c.accepted))
)
ANSWER: Final = Statement(select(tasks.c.answer).where(*_AT_KEY))
RETRACT_ANSWER: Final = Statement(update(tasks).where(*_AT_KEY).values(answer=null(), accepted=null()))
DELETE_TASKS: Final = Statement(delete(tasks).where(_OF_RUN))
DELETE_TASK: Final = Statement(delete(tasks).where(*_AT_KEY))

_DELETE_MODELS = delete(models).where(_given(models.c.job_id))
_HANDED_OUT: Final = select(tasks.c.model).where(_OF_RUN, tasks.c.model.is_not(None))
ADD_NEW_MODELS: Final = Statement(
    text("INSERT INTO models (job_id, digest, model) VALUES (:job_id, :digest, :model) ON CONFLICT DO NOTHING")
)
MODELS: Final = Statement(select(models.c.digest, models.c.model).where(_given(models.c.job_id)))
DELETE_MODELS: Final = Statement(_DELETE_MODELS)
DELETE_UNUSED_MODELS: Final = Statement(_DELETE_MODELS.where(models.c.digest.not_in(_HANDED_OUT)))

DISABLED: Final = Statement(select(disabled.c.client, disabled.c.reason))
DISABLE: Final = Statement(insert(disabled).values(_row(*disabled.c)))
ENABLE: Final = Statement(delete(disabled).where(_given(disabled.c.client)))

TOKENS: Final = Statement(select(tokens.c.client, tokens.c.fingerprint))
TOKEN_UNTIL: Final = Statement(select(tokens.c.until_s).where(_given(tokens.c.client)))
ADD_TOKEN: Final = Statement(insert(tokens).values(_row(*tokens.c)))
VOID_TOKEN: Final = Statement(update(tokens).where(_given(tokens.c.client)).values(_row(tokens.c.fingerprint)))
DELETE_TOKEN: Final = Statement(delete(tokens).where(_given(tokens.c.client)))
DELETE_OLD_TOKENS: Final = Statement(delete(tokens).where(tokens.c.until_s <= bindparam("now_s")))

CERTIFICATE_ENDS: Final = Statement(select(certificate_ends.c.client, certificate_ends.c.ends_at))
ADD_CERTIFICATE_END: Final = Statement(insert(certificate_ends).values(_row(*certificate_ends.c)))
DELETE_CERTIFICATE_END: Final = Statement(delete(certificate_ends).where(_given(certificate_ends.c.client)))
DELETE_OLD_CERTIFICATE_ENDS: Final = Statement(
    delete(certificate_ends).where(certificate_ends.c.ends_at < bindparam("since_s"))
)

_AUDIT_COLUMNS: Final = [audit.c[name] for name in AuditEntry.__struct_fields__]
ADD_AUDIT: Final = Statement(insert(audit).values(_row(*_AUDIT_COLUMNS)))
AUDIT_LOG: Final = Statement(select(*_AUDIT_COLUMNS).order_by(audit.c.number.desc()).limit(bindparam("limit")))


@cache
def jobs_in(some: frozenset[JobState]) -> Statement:
    """Return the query for the newest ``limit`` jobs in one of the states *some* (empty: any)."""
    query = select(jobs.c.record).order_by(jobs.c.number.desc()).limit(bindparam("limit"))
    return Statement(query.where(or_(*(jobs.c.state == state.value for state in sorted(some)))) if some else query)
