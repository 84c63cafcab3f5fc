"""``SqlStore``: the store in a database, through SQLAlchemy Core and one writer thread.

SQLite (write-ahead log, every commit synced) needs nothing set up. ``Store`` and its records are in ``records`` and are
re-exported here; ``memory`` has the same store without a database. Each method's work is one function of a connection,
so that it is one transaction, or one savepoint of a shared one (``writer``).
"""

import os
import secrets
import sqlite3
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self, TypeVar

import msgspec
from sqlalchemy import Connection, Engine, create_engine, event

from hanse.errors import Conflict, NotFound, StaleEpoch, StoreFailed
from hanse.ids import JobId
from hanse.job import JobRecord, JobState
from hanse.messages import CommitRound, RoundView, StateRef, TaskAssignment, TaskResult
from hanse.storage import statements as sql
from hanse.storage import tables
from hanse.storage.records import (
    AuditEntry,
    Lease,
    RunState,
    Store,
    check_client,
    check_commit,
    check_job,
    check_move,
    check_next_round,
    check_result,
    check_running,
    check_tasks,
    pack,
    session_id,
    task_title,
    unpack,
    unpack_task,
)
from hanse.storage.writer import BEGIN, Writer

__all__ = ["AuditEntry", "Lease", "RunState", "SqlStore", "Store"]

T = TypeVar("T")

BUSY_TIMEOUT_S: Final = 5.0
"""How long a write waits for another process that writes to the same SQLite file."""


class SqlStore:
    """A ``Store`` in the SQLite file *path*, made (mode 0600, its folder 0700) when it is first opened."""

    def __init__(self, path: Path, *, new_id: Callable[[], str] = lambda: secrets.token_hex(8)) -> None:
        self._path, self._new_id = path, new_id
        self._writer: Writer | None = None
        self._store_id = ""

    async def open(self) -> None:
        """Open the database, and create its tables if it is new."""
        if self._writer is not None:
            raise StoreFailed(f"opening {self._path}", "it is open already")
        writer = Writer(self._connect, name=str(self._path))
        writer.start()
        try:
            self._store_id = await writer.write(self._prepare)
        except BaseException:
            await writer.close()
            raise
        self._writer = writer

    async def close(self) -> None:
        """Finish what was asked for before, and close the database."""
        writer, self._writer = self._writer, None
        if writer is not None:
            await writer.close()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # The lease ----------------------------------------------------------------------------------------------------

    async def take_lease(self, holder: str, *, ttl_s: float, now_s: float, force: bool = False) -> Lease:
        """See ``Store``."""

        def take(connection: Connection) -> Lease:
            epoch, held_by, expires_at = connection.execute(sql.LEASE).one()
            if held_by not in ("", holder) and expires_at > now_s and not force:
                raise Conflict("the store's lease", state=f"held by {held_by}", wanted=f"taken by {holder}")
            return self._set_lease(connection, epoch + 1, holder, expires_at=now_s + ttl_s)

        return await self._write(take)

    async def renew_lease(self, epoch: int, *, ttl_s: float, now_s: float) -> Lease:
        """See ``Store``."""

        def renew(connection: Connection) -> Lease:
            holder = _fence(connection, epoch)
            return self._set_lease(connection, epoch, holder, expires_at=now_s + ttl_s)

        return await self._write(renew)

    async def release_lease(self, epoch: int) -> None:
        """See ``Store``."""

        def release(connection: Connection) -> None:
            _fence(connection, epoch)
            self._set_lease(connection, epoch + 1, "", expires_at=0.0)

        await self._write(release)

    # Jobs ---------------------------------------------------------------------------------------------------------

    async def add_job(self, epoch: int, record: JobRecord) -> None:
        """See ``Store``."""
        blob = check_job(record)

        def add(connection: Connection) -> None:
            _fence(connection, epoch)
            if connection.execute(sql.JOB_STATE, {"of_job_id": record.job_id}).one_or_none() is not None:
                raise Conflict(f"job {record.job_id}", state="stored already", wanted="added")
            row = {"job_id": record.job_id, "state": record.state.value, "last_round": -1, "record": blob}
            connection.execute(sql.ADD_JOB, row)

        await self._write(add)

    async def replace_job(self, epoch: int, record: JobRecord, *, was: JobState) -> None:
        """See ``Store``."""
        blob = check_job(record)

        def replace(connection: Connection) -> None:
            _fence(connection, epoch)
            _replace_job(connection, record, blob, was=was)

        await self._write(replace)

    async def end_run(self, epoch: int, record: JobRecord, *, was: JobState) -> None:
        """See ``Store``."""
        blob = check_job(record)

        def end(connection: Connection) -> None:
            _fence(connection, epoch)
            _replace_job(connection, record, blob, was=was)
            _delete_tasks(connection, record.job_id)

        await self._write(end)

    async def job(self, job_id: JobId) -> JobRecord:
        """See ``Store``."""

        def read(connection: Connection) -> JobRecord:
            blob = connection.scalar(sql.JOB, {"of_job_id": job_id})
            if blob is None:
                raise NotFound("job", job_id)
            return unpack(blob, JobRecord)

        return await self._read(read)

    async def jobs(self, *, states: Collection[JobState] = (), limit: int | None = None) -> list[JobRecord]:
        """See ``Store``."""
        query = sql.jobs_in(states, limit)
        return await self._read(lambda connection: [unpack(blob, JobRecord) for blob in connection.scalars(query)])

    # A run's journal ----------------------------------------------------------------------------------------------

    async def issue_tasks(self, epoch: int, job_id: JobId, tasks: Sequence[TaskAssignment]) -> None:
        """See ``Store``."""
        packed, models = check_tasks(tasks)
        model_rows = [{"job_id": job_id, "digest": digest, "model": model} for digest, model in models.items()]
        task_rows = [
            {"job_id": job_id, "task": task.blob, "model": task.model, **msgspec.structs.asdict(task.key)}
            for task in packed
        ]

        def issue(connection: Connection) -> None:
            _fence(connection, epoch)
            last = _last_round(connection, job_id, doing="issued tasks")
            for number in {task.key.round for task in packed}:
                check_next_round(job_id, number, last=last, doing="issued tasks of")
            if model_rows:
                connection.execute(sql.ADD_NEW_MODELS, model_rows)
            if task_rows:
                connection.execute(sql.ADD_NEW_TASKS, task_rows)

        await self._write(issue)

    async def accept_answer(self, epoch: int, job_id: JobId, result: TaskResult) -> bool:
        """See ``Store``."""
        blob = check_result(result)
        at_key = {"of_job_id": job_id} | {f"of_{k}": v for k, v in msgspec.structs.asdict(result.key).items()}

        def accept(connection: Connection) -> bool:
            _fence(connection, epoch)
            if connection.execute(sql.ANSWER_TASK, {**at_key, "answer": blob}).rowcount:
                return True
            if connection.scalar(sql.TASK_EXISTS, at_key) is None:
                raise NotFound("task", task_title(result.key))
            return False

        return await self._write(accept)

    async def commit_round(self, epoch: int, job_id: JobId, commit: CommitRound, *, now_s: float) -> None:
        """See ``Store``."""
        state, view = check_commit(commit, now_s=now_s)
        number = commit.state.round
        at_job = {"of_job_id": job_id}

        def commit_it(connection: Connection) -> None:
            _fence(connection, epoch)
            last = _last_round(connection, job_id, doing=f"committed round {number}")
            if number == last:
                return
            check_next_round(job_id, number, last=last, doing="committed")
            connection.execute(sql.SET_JOB, {**at_job, "last_round": number})
            connection.execute(sql.DELETE_RUN_STATE, at_job)
            connection.execute(sql.ADD_RUN_STATE, {"job_id": job_id, "state": state})
            connection.execute(sql.ADD_ROUND, {"job_id": job_id, "round": number, "record": view})
            _delete_tasks(connection, job_id)

        await self._write(commit_it)

    async def snapshot(self, job_id: JobId) -> RunState:
        """See ``Store``."""
        return await self._read(lambda connection: _snapshot(connection, job_id))

    async def rounds(self, job_id: JobId) -> list[RoundView]:
        """See ``Store``."""

        def read(connection: Connection) -> list[RoundView]:
            return [unpack(blob, RoundView) for blob in connection.scalars(sql.ROUNDS, {"of_job_id": job_id})]

        return await self._read(read)

    async def last_round(self, job_id: JobId) -> RoundView | None:
        """See ``Store``."""

        def read(connection: Connection) -> RoundView | None:
            blob = connection.scalar(sql.LAST_ROUND, {"of_job_id": job_id})
            return None if blob is None else unpack(blob, RoundView)

        return await self._read(read)

    # Clients and the audit log ------------------------------------------------------------------------------------

    async def set_disabled(self, epoch: int, client: str, disabled: bool, *, reason: str = "") -> None:
        """See ``Store``."""
        check_client(client)

        def set_it(connection: Connection) -> None:
            _fence(connection, epoch)
            connection.execute(sql.ENABLE, {"of_client": client})
            if disabled:
                connection.execute(sql.DISABLE, {"client": client, "reason": reason})

        await self._write(set_it)

    async def disabled_clients(self) -> dict[str, str]:
        """See ``Store``."""
        return await self._read(lambda connection: {row.client: row.reason for row in connection.execute(sql.DISABLED)})

    async def audit(self, epoch: int, entry: AuditEntry) -> None:
        """See ``Store``."""
        pack(entry)

        def append(connection: Connection) -> None:
            _fence(connection, epoch)
            connection.execute(sql.ADD_AUDIT, msgspec.structs.asdict(entry))

        await self._write(append)

    async def audit_log(self, limit: int = 100) -> list[AuditEntry]:
        """See ``Store``."""

        def read(connection: Connection) -> list[AuditEntry]:
            return [AuditEntry(*row) for row in connection.execute(sql.AUDIT_LOG, {"limit": limit})]

        return await self._read(read)

    # The database -------------------------------------------------------------------------------------------------

    async def _write(self, operation: Callable[[Connection], T]) -> T:
        return await self._opened().write(operation)

    async def _read(self, operation: Callable[[Connection], T]) -> T:
        return await self._opened().read(operation)

    def _opened(self) -> Writer:
        if self._writer is None:
            raise StoreFailed(f"using {self._path}", "it is not open")
        return self._writer

    def _connect(self) -> Engine:
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        except OSError as error:
            raise StoreFailed(f"opening {self._path}", error.strerror or str(error)) from error
        return sqlite_engine(self._path)

    def _prepare(self, connection: Connection) -> str:
        tables.create(connection, store_id=self._new_id())
        return str(connection.scalar(sql.STORE_ID))

    def _set_lease(self, connection: Connection, epoch: int, holder: str, *, expires_at: float) -> Lease:
        connection.execute(sql.SET_LEASE, {"epoch": epoch, "holder": holder, "expires_at": expires_at})
        return Lease(epoch, holder, session_id(self._store_id, epoch), expires_at)


def sqlite_engine(path: Path) -> Engine:
    """Return an engine for the SQLite file at *path*: write-ahead log, every commit synced, foreign keys held."""
    # The driver must not begin transactions by itself (isolation_level None): it would do so late, and without
    # taking the write lock, so that two servers could both read an epoch before either wrote.
    options = {"timeout": BUSY_TIMEOUT_S, "isolation_level": None}
    engine = create_engine(f"sqlite:///{path}", connect_args=options, pool_reset_on_return=None)

    @event.listens_for(engine, "connect")
    def configure(connection: sqlite3.Connection, _record: object) -> None:
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql(connection.get_execution_options()[BEGIN])

    return engine


def _fence(connection: Connection, epoch: int) -> str:
    """Return the lease's holder, having made sure that *epoch* is the lease's."""
    current, holder, _ = connection.execute(sql.LEASE).one()
    if current != epoch:
        raise StaleEpoch(ours=epoch, current=current)
    return str(holder)


def _replace_job(connection: Connection, record: JobRecord, blob: bytes, *, was: JobState) -> None:
    at_job = {"of_job_id": record.job_id}
    row = connection.execute(sql.JOB_STATE, at_job).one_or_none()
    if row is None:
        raise NotFound("job", record.job_id)
    check_move(JobState(row.state), record, was=was)
    connection.execute(sql.SET_JOB, {**at_job, "state": record.state.value, "record": blob})


def _last_round(connection: Connection, job_id: JobId, *, doing: str) -> int:
    """Return the job's last committed round, -1 before there is one, having made sure that the job has not ended."""
    row = connection.execute(sql.JOB_STATE, {"of_job_id": job_id}).one_or_none()
    if row is None:
        raise NotFound("job", job_id)
    check_running(job_id, JobState(row.state), doing)
    return int(row.last_round)


def _delete_tasks(connection: Connection, job_id: JobId) -> None:
    """Delete the run's tasks, answers and the models handed out: all are of the round that is over."""
    connection.execute(sql.DELETE_TASKS, {"of_job_id": job_id})
    connection.execute(sql.DELETE_MODELS, {"of_job_id": job_id})


def _snapshot(connection: Connection, job_id: JobId) -> RunState:
    at_job = {"of_job_id": job_id}
    if connection.execute(sql.JOB_STATE, at_job).one_or_none() is None:
        raise NotFound("job", job_id)
    state = connection.scalar(sql.RUN_STATE, at_job)
    models = {row.digest: row.model for row in connection.execute(sql.MODELS, at_job)}
    unanswered: list[TaskAssignment] = []
    answers: list[TaskResult] = []
    for row in connection.execute(sql.TASKS, at_job):
        if row.answer is None:
            unanswered.append(unpack_task(row.task, models.get(row.model)))
        else:
            answers.append(unpack(row.answer, TaskResult))
    return RunState(None if state is None else unpack(state, StateRef), tuple(unanswered), tuple(answers))
