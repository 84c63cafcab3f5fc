"""The store's SQL, each statement built once: to build one costs several times what SQLite needs to run it.

A parameter of a ``WHERE`` clause is called ``of_…`` after its column; what an ``INSERT`` or ``UPDATE`` writes are the
columns that its other parameters name.
"""

from collections.abc import Collection
from typing import Any, Final

from sqlalchemy import Column, ColumnElement, Select, bindparam, delete, insert, select, update
from sqlalchemy.dialects import sqlite

from hanse.job import JobState
from hanse.storage.records import AuditEntry
from hanse.storage.tables import audit, disabled, jobs, lease, meta, models, rounds, states, tasks


def _given(column: Column[Any]) -> ColumnElement[bool]:
    return column == bindparam(f"of_{column.key}")


STORE_ID: Final = select(meta.c.value).where(meta.c.key == "store_id")

# Rows are locked where the database can: nobody takes the lease, or moves the job, between the look and the commit.
LEASE: Final = select(lease.c.epoch, lease.c.holder, lease.c.expires_at).with_for_update()
SET_LEASE: Final = update(lease)

ADD_JOB: Final = insert(jobs)
JOB: Final = select(jobs.c.record).where(_given(jobs.c.job_id))
JOB_STATE: Final = select(jobs.c.state, jobs.c.last_round).where(_given(jobs.c.job_id)).with_for_update()
SET_JOB: Final = update(jobs).where(_given(jobs.c.job_id))

RUN_STATE: Final = select(states.c.state).where(_given(states.c.job_id))
ADD_RUN_STATE: Final = insert(states)
DELETE_RUN_STATE: Final = delete(states).where(_given(states.c.job_id))

ADD_ROUND: Final = insert(rounds)
ROUNDS: Final = select(rounds.c.record).where(_given(rounds.c.job_id)).order_by(rounds.c.round)
LAST_ROUND: Final = select(rounds.c.record).where(_given(rounds.c.job_id)).order_by(rounds.c.round.desc()).limit(1)

_TASK_KEY: Final = (tasks.c.job_id, tasks.c.round, tasks.c.name, tasks.c.sequence, tasks.c.client)
ADD_NEW_TASKS: Final = sqlite.insert(tasks).on_conflict_do_nothing()
TASKS: Final = select(tasks.c.task, tasks.c.model, tasks.c.answer).where(_given(tasks.c.job_id)).order_by(*_TASK_KEY)
TASK_EXISTS: Final = select(tasks.c.client).where(*map(_given, _TASK_KEY))
ANSWER_TASK: Final = update(tasks).where(*map(_given, _TASK_KEY), tasks.c.answer.is_(None))
DELETE_TASKS: Final = delete(tasks).where(_given(tasks.c.job_id))

ADD_NEW_MODELS: Final = sqlite.insert(models).on_conflict_do_nothing()
MODELS: Final = select(models.c.digest, models.c.model).where(_given(models.c.job_id))
DELETE_MODELS: Final = delete(models).where(_given(models.c.job_id))

DISABLED: Final = select(disabled.c.client, disabled.c.reason).order_by(disabled.c.client)
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
