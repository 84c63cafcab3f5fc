"""The store's SQL, each statement built once: to build one costs several times what SQLite needs to run it.

A parameter of a ``WHERE`` clause is called ``of_…`` after its column; what an ``INSERT`` or ``UPDATE`` writes are the
columns that its other parameters name.
"""

from collections.abc import Collection
from typing import Any, Final

from sqlalchemy import (
    Column,
    ColumnElement,
    Select,
    bindparam,
    delete,
    func,
    insert,
    select,
    text,
    update,
)

from hanse.job import JobState
from hanse.messages import TaskKey
from hanse.storage.records import AuditEntry, Standby
from hanse.storage.tables import audit, disabled, jobs, lease, meta, models, rounds, standbys, states, tasks


def _given(column: Column[Any]) -> ColumnElement[bool]:
    return column == bindparam(f"of_{column.key}")


STORE_ID: Final = select(meta.c.value).where(meta.c.key == "store_id")
ADD_STORE_ID: Final = insert(meta)

# Rows are locked where the database can: nobody takes the lease, or moves the job, between the look and the commit. It
# is the strongest lock also where only the epoch is compared, for two transactions that both want more could not have
# it.
EPOCH: Final = select(lease.c.epoch).with_for_update()
LEASE: Final = select(*(column for column in lease.c if column is not lease.c.id))
LEASE_TO_CHANGE: Final = LEASE.with_for_update()
SET_LEASE: Final = update(lease)

STANDBYS: Final = select(*(standbys.c[name] for name in Standby.__struct_fields__))
ADD_STANDBY: Final = insert(standbys)
DELETE_STANDBY: Final = delete(standbys).where(_given(standbys.c.name))

ADD_JOB: Final = insert(jobs)
JOB: Final = select(jobs.c.record).where(_given(jobs.c.job_id))
JOB_TO_CHANGE: Final = (
    select(jobs.c.state, jobs.c.last_round, jobs.c.record).where(_given(jobs.c.job_id)).with_for_update()
)
JOB_STATE: Final = select(jobs.c.state, jobs.c.last_round).where(_given(jobs.c.job_id)).with_for_update()
SET_JOB: Final = update(jobs).where(_given(jobs.c.job_id))

RUN_STATE: Final = select(states.c.state).where(_given(states.c.job_id))
ADD_RUN_STATE: Final = insert(states)
DELETE_RUN_STATE: Final = delete(states).where(_given(states.c.job_id))

ADD_ROUND: Final = insert(rounds)
ROUNDS: Final = select(rounds.c.record).where(_given(rounds.c.job_id)).order_by(rounds.c.round)
LAST_ROUND: Final = select(rounds.c.record).where(_given(rounds.c.job_id)).order_by(rounds.c.round.desc()).limit(1)

_KEY_IN_RUN: Final = tuple(tasks.c[name] for name in TaskKey.__struct_fields__)
_OF_RUN: Final = _given(tasks.c.job_id)
_AT_KEY: Final = (_OF_RUN, *map(_given, _KEY_IN_RUN))
# As text, for SQLAlchemy knows this clause, which is the same in both databases, as a thing of either.
ADD_NEW_TASKS: Final = text("""
    INSERT INTO tasks (job_id, round, name, sequence, client, task, model)
    VALUES (:job_id, :round, :name, :sequence, :client, :task, :model) ON CONFLICT DO NOTHING
""")
TASKS: Final = select(tasks.c.task, tasks.c.model, tasks.c.answer).where(_OF_RUN).order_by(tasks.c.accepted)
TASK_KEYS: Final = select(*_KEY_IN_RUN).where(_OF_RUN)
_last_accepted = tasks.alias("others")
_NEXT_ACCEPTED: Final = (
    select(func.coalesce(func.max(_last_accepted.c.accepted), 0) + 1)
    .where(_last_accepted.c.job_id == bindparam("of_job_id"))
    .scalar_subquery()
)
ANSWER_TASK: Final = update(tasks).where(*_AT_KEY, tasks.c.answer.is_(None)).values(accepted=_NEXT_ACCEPTED)
ANSWER: Final = select(tasks.c.answer).where(*_AT_KEY)
RETRACT_ANSWER: Final = update(tasks).where(*_AT_KEY).values(answer=None, accepted=None)
DELETE_TASKS: Final = delete(tasks).where(_OF_RUN)
DELETE_TASK: Final = delete(tasks).where(*_AT_KEY)

ADD_NEW_MODELS: Final = text("""
    INSERT INTO models (job_id, digest, model) VALUES (:job_id, :digest, :model) ON CONFLICT DO NOTHING
""")
MODELS: Final = select(models.c.digest, models.c.model).where(_given(models.c.job_id))
DELETE_MODELS: Final = delete(models).where(_given(models.c.job_id))
DELETE_UNUSED_MODELS: Final = DELETE_MODELS.where(
    models.c.digest.not_in(select(tasks.c.model).where(_OF_RUN, tasks.c.model.is_not(None)))
)

DISABLED: Final = select(disabled.c.client, disabled.c.reason)
DISABLE: Final = insert(disabled)
ENABLE: Final = delete(disabled).where(_given(disabled.c.client))

ADD_AUDIT: Final = insert(audit)
AUDIT_LOG: Final = (
    select(*(audit.c[name] for name in AuditEntry.__struct_fields__))
    .order_by(audit.c.number.desc())
    .limit(bindparam("limit"))
)


def jobs_in(some: Collection[JobState], limit: int | None) -> Select[bytes]:
    """Return the query for the newest *limit* jobs (``None``: all) in one of the states *some* (empty: any)."""
    query = select(jobs.c.record).order_by(jobs.c.number.desc()).limit(limit)
    return query.where(jobs.c.state.in_(sorted(some))) if some else query
