"""``SqlStore``: the store in a database, through SQLAlchemy Core and one writer thread.

SQLite needs nothing set up; PostgreSQL is for servers that stand by for each other. ``Store`` and its records are in
``records`` and are re-exported here; ``memory`` has the same store without a database. Each method's work is one
function of a connection, so that it is one transaction, or one savepoint of a shared one (``writer``).
"""

import asyncio
import secrets
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import msgspec
from sqlalchemy import URL, Connection, Select, make_url
from sqlalchemy.exc import ArgumentError

from hanse.errors import ConfigError, Conflict, NotFound, StoreFailed
from hanse.ids import JobId, is_job_id
from hanse.job import JobRecord, JobState
from hanse.messages import CommitRound, RoundView, StateRef, TaskAssignment, TaskKey, TaskResult
from hanse.storage import statements as sql
from hanse.storage.database import Database, Listener
from hanse.storage.records import (
    AuditEntry,
    Lease,
    RunState,
    Standby,
    Store,
    check_audit,
    check_carried,
    check_commit,
    check_disabling,
    check_epoch,
    check_job,
    check_lease,
    check_move,
    check_next_round,
    check_result,
    check_running,
    check_standby,
    check_successor,
    check_taking,
    check_tasks,
    has_moved,
    key_order,
    session_id,
    task_title,
    unpack,
    unpack_task,
)
from hanse.storage.sqlite import SqliteDatabase
from hanse.storage.tables import SCHEMA_VERSION, schema_version
from hanse.storage.writer import Writer

__all__ = ["AuditEntry", "Lease", "RunState", "SqlStore", "Standby", "Store"]

T = TypeVar("T")


class SqlStore:
    """A ``Store`` in a database: a SQLite file, by path or by ``sqlite:///`` and its absolute path, or PostgreSQL.

    That is named ``postgresql://user@host/database``. The file is made (mode 0600, its folder 0700) when it is first
    opened, the database must be there; its tables are made, and those of an earlier release become this one's.

    Raises:
        ConfigError: *where* names no database that Hanse can use.
    """

    def __init__(self, where: Path | str, *, new_id: Callable[[], str] = lambda: secrets.token_hex(8)) -> None:
        self._database, self._new_id = database_at(where), new_id
        self._name = self._database.name
        self._writer: Writer | None = None
        self._listener: Listener | None = None
        self._store_id = ""
        self._moved = asyncio.Event()

    async def open(self) -> None:
        """Open the database, and bring its tables to this release's form."""
        if self._writer is not None:
            raise StoreFailed(f"opening {self._name}", "it is open already")
        writer = Writer(self._database.connect, name=self._name)
        writer.start()
        try:
            self._store_id = await writer.write(self._prepare)
        except BaseException:
            await writer.close()
            raise
        self._writer, self._listener = writer, self._database.listener(self._wake)

    async def close(self) -> None:
        """Finish what was asked for before, and close the database."""
        writer, self._writer = self._writer, None
        listener, self._listener = self._listener, None
        if listener is not None:
            await listener.close()
        if writer is not None:
            await writer.close()
        self._wake()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # The lease ----------------------------------------------------------------------------------------------------

    async def lease(self) -> Lease:
        """See ``Store``."""
        return await self._read(lambda connection: self._lease(connection, sql.LEASE))

    async def lease_moved(self, seen: Lease, *, within_s: float) -> Lease:
        """See ``Store``."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + within_s
        while True:
            if self._listener is not None:
                await self._listener.listen()
            moved = self._moved
            lease, now = await self.lease(), loop.time()
            if has_moved(lease, seen) or now >= deadline:
                return lease
            # Where the database tells nobody, the next look is when the holder's next beat is due.
            is_told = self._listener is not None or not seen.ttl_s
            next_look = deadline if is_told else min(deadline, now + seen.ttl_s / 3)
            with suppress(TimeoutError):
                async with asyncio.timeout_at(next_look):
                    await moved.wait()

    async def take_lease(
        self, holder: str, *, name: str, target: str, ttl_s: float, seen: Lease | None = None, force: bool = False
    ) -> Lease:
        """See ``Store``."""
        taken = Lease(0, holder, session_id(self._store_id, 0), ttl_s=ttl_s, name=name, target=target)
        check_lease(taken)

        def take(connection: Connection) -> Lease:
            lease = self._lease(connection, sql.LEASE_TO_CHANGE)
            check_taking(lease, holder, name=name, seen=seen, force=force)
            connection.execute(sql.DELETE_STANDBY, {"of_name": name})
            return self._set_lease(connection, taken, epoch=lease.epoch + 1)

        return await self._move_lease(take)

    async def renew_lease(self, epoch: int) -> Lease:
        """See ``Store``."""

        def renew(connection: Connection) -> Lease:
            lease = self._held_lease(connection, epoch)
            return self._set_lease(connection, msgspec.structs.replace(lease, beat=lease.beat + 1), epoch=epoch)

        return await self._move_lease(renew)

    async def release_lease(self, epoch: int, *, successor: str = "") -> None:
        """See ``Store``."""
        check_successor(successor)

        def release(connection: Connection) -> Lease:
            lease = self._held_lease(connection, epoch)
            free = Lease(0, "", lease.ssid, ttl_s=lease.ttl_s, successor=successor)
            return self._set_lease(connection, free, epoch=epoch + 1)

        await self._move_lease(release)

    async def note_standby(self, standby: Standby) -> None:
        """See ``Store``."""
        check_standby(standby)

        def note(connection: Connection) -> None:
            connection.execute(sql.DELETE_STANDBY, {"of_name": standby.name})
            connection.execute(sql.ADD_STANDBY, msgspec.structs.asdict(standby))

        await self._write(note)

    async def standbys(self) -> list[Standby]:
        """See ``Store``."""

        def read(connection: Connection) -> list[Standby]:
            return sorted((Standby(*row) for row in connection.execute(sql.STANDBYS)), key=lambda standby: standby.name)

        return await self._read(read)

    # Jobs ---------------------------------------------------------------------------------------------------------

    async def add_job(self, epoch: int, record: JobRecord) -> None:
        """See ``Store``."""
        blob = check_job(record)

        def add(connection: Connection) -> None:
            _fence(connection, epoch)
            stored = connection.scalar(sql.JOB, _at_job(record.job_id))
            if stored is None:
                row = {"job_id": record.job_id, "state": record.state.value, "last_round": -1, "record": blob}
                connection.execute(sql.ADD_JOB, row)
            elif stored != blob:
                raise Conflict(f"job {record.job_id}", state="stored already", wanted="added")

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
            _keep_tasks(connection, record.job_id, ())

        await self._write(end)

    async def job(self, job_id: JobId) -> JobRecord:
        """See ``Store``."""

        def read(connection: Connection) -> JobRecord:
            blob = connection.scalar(sql.JOB, _at_job(job_id))
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

    async def accept_answer(self, epoch: int, job_id: JobId, result: TaskResult) -> TaskResult:
        """See ``Store``."""
        blob = check_result(result)
        at_key = _at_key(job_id, result.key)

        def accept(connection: Connection) -> TaskResult:
            _fence(connection, epoch)
            if connection.execute(sql.ANSWER_TASK, {**at_key, "answer": blob}).rowcount:
                return result
            accepted = connection.scalar(sql.ANSWER, at_key)
            if accepted is None:
                raise NotFound("task", task_title(result.key))
            return unpack(accepted, TaskResult)

        return await self._write(accept)

    async def retract_answers(self, epoch: int, job_id: JobId, keys: Sequence[TaskKey]) -> None:
        """See ``Store``."""
        rows = [_at_key(job_id, key) for key in keys]

        def retract(connection: Connection) -> None:
            _fence(connection, epoch)
            if rows:
                connection.execute(sql.RETRACT_ANSWER, rows)

        await self._write(retract)

    async def commit_round(self, epoch: int, job_id: JobId, commit: CommitRound, *, now_s: float) -> None:
        """See ``Store``."""
        state, view = check_commit(commit, now_s=now_s)
        number = commit.state.round
        at_job = _at_job(job_id)

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
            _keep_tasks(connection, job_id, commit.carried)

        await self._write(commit_it)

    async def snapshot(self, job_id: JobId) -> RunState:
        """See ``Store``."""
        return await self._read(lambda connection: _snapshot(connection, job_id))

    async def rounds(self, job_id: JobId) -> list[RoundView]:
        """See ``Store``."""

        def read(connection: Connection) -> list[RoundView]:
            return [unpack(blob, RoundView) for blob in connection.scalars(sql.ROUNDS, _at_job(job_id))]

        return await self._read(read)

    async def last_round(self, job_id: JobId) -> RoundView | None:
        """See ``Store``."""

        def read(connection: Connection) -> RoundView | None:
            blob = connection.scalar(sql.LAST_ROUND, _at_job(job_id))
            return None if blob is None else unpack(blob, RoundView)

        return await self._read(read)

    # Clients and the audit log ------------------------------------------------------------------------------------

    async def set_disabled(self, epoch: int, client: str, disabled: bool, *, reason: str = "") -> None:
        """See ``Store``."""
        check_disabling(client, reason)

        def set_it(connection: Connection) -> None:
            _fence(connection, epoch)
            connection.execute(sql.ENABLE, {"of_client": client})
            if disabled:
                connection.execute(sql.DISABLE, {"client": client, "reason": reason})

        await self._write(set_it)

    async def disabled_clients(self) -> dict[str, str]:
        """See ``Store``."""
        return await self._read(lambda connection: dict(sorted(map(tuple, connection.execute(sql.DISABLED)))))

    async def audit(self, epoch: int, entry: AuditEntry) -> None:
        """See ``Store``."""
        check_audit(entry)

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
            raise StoreFailed(f"using {self._name}", "it is not open")
        return self._writer

    def _prepare(self, connection: Connection) -> str:
        if schema_version(connection) != SCHEMA_VERSION:
            from hanse.storage.migrations import migrate  # noqa: PLC0415 - only an upgrade pays for Alembic

            with self._database.migrating(connection):  # by another server meanwhile, maybe
                migrate(connection, version=schema_version(connection), name=self._name)
        if connection.scalar(sql.STORE_ID) is None:
            connection.execute(sql.ADD_STORE_ID, {"key": "store_id", "value": self._new_id()})
        return str(connection.scalar(sql.STORE_ID))

    async def _move_lease(self, operation: Callable[[Connection], Lease]) -> Lease:
        lease = await self._write(operation)
        self._wake()
        return lease

    def _wake(self) -> None:
        moved, self._moved = self._moved, asyncio.Event()
        moved.set()

    def _lease(self, connection: Connection, query: Select[Any]) -> Lease:
        row = connection.execute(query).one()
        return Lease(ssid=session_id(self._store_id, row.epoch), **row._mapping)

    def _held_lease(self, connection: Connection, epoch: int) -> Lease:
        """Return the lease, locked, having made sure that it is of *epoch*."""
        lease = self._lease(connection, sql.LEASE_TO_CHANGE)
        check_epoch(epoch, lease.epoch)
        return lease

    def _set_lease(self, connection: Connection, lease: Lease, *, epoch: int) -> Lease:
        lease = msgspec.structs.replace(lease, epoch=epoch, ssid=session_id(self._store_id, epoch))
        row = msgspec.structs.asdict(lease)
        del row["ssid"]
        connection.execute(sql.SET_LEASE, row)
        self._database.announce(connection)
        return lease


def database_at(where: Path | str) -> Database:
    """Return the database at *where*, a path or a URL.

    Raises:
        ConfigError: there is none that Hanse can use.
    """
    if isinstance(where, Path):
        return SqliteDatabase(where)
    try:
        url = make_url(where)
    except ArgumentError:
        url = URL.create("no URL")
    path = Path(url.database or "")
    if url.drivername == "sqlite" and path.is_absolute() and not (url.host or url.query):
        return SqliteDatabase(path)
    # Without the URL's query, in which a password may be too.
    shown = URL.create(url.drivername, url.username, None, url.host, url.port, url.database).render_as_string()
    if url.drivername != "postgresql":
        expected = "sqlite:////absolute/path/of/a/file or postgresql://user@host/database"
        raise ConfigError("store", got=shown, expected=expected)
    try:
        from hanse.storage.postgres import PostgresDatabase  # noqa: PLC0415 - its driver is an extra
    except ImportError as missing:
        expected = "PostgreSQL's driver to be installed (pip install 'hanse[postgres]')"
        raise ConfigError("store", got=shown, expected=expected) from missing
    return PostgresDatabase(url, name=shown)


def _fence(connection: Connection, epoch: int) -> None:
    """Make sure that the lease is of *epoch*, and stays so until this transaction ends."""
    check_epoch(epoch, connection.execute(sql.EPOCH).scalar_one())


def _replace_job(connection: Connection, record: JobRecord, blob: bytes, *, was: JobState) -> None:
    at_job = _at_job(record.job_id)
    row = connection.execute(sql.JOB_TO_CHANGE, at_job).one_or_none()
    if row is None:
        raise NotFound("job", record.job_id)
    if row.record == blob:
        return
    check_move(JobState(row.state), record, was=was)
    connection.execute(sql.SET_JOB, {**at_job, "state": record.state.value, "record": blob})


def _last_round(connection: Connection, job_id: JobId, *, doing: str) -> int:
    """Return the job's last committed round, -1 before there is one, having made sure that the job has not ended."""
    row = connection.execute(sql.JOB_STATE, _at_job(job_id)).one_or_none()
    if row is None:
        raise NotFound("job", job_id)
    check_running(job_id, JobState(row.state), doing)
    return int(row.last_round)


def _keep_tasks(connection: Connection, job_id: JobId, kept: Collection[TaskKey]) -> None:
    """Delete the run's tasks but those *kept*, with their answers and the models that they hand out."""
    at_job = _at_job(job_id)
    if not kept:
        connection.execute(sql.DELETE_TASKS, at_job)
        connection.execute(sql.DELETE_MODELS, at_job)
        return
    journalled = {TaskKey(*row) for row in connection.execute(sql.TASK_KEYS, at_job)}
    check_carried(kept, journalled)
    if doomed := [_at_key(job_id, key) for key in journalled.difference(kept)]:
        connection.execute(sql.DELETE_TASK, doomed)
    connection.execute(sql.DELETE_UNUSED_MODELS, at_job)


def _snapshot(connection: Connection, job_id: JobId) -> RunState:
    at_job = _at_job(job_id)
    if connection.execute(sql.JOB_STATE, at_job).one_or_none() is None:
        raise NotFound("job", job_id)
    state = connection.scalar(sql.RUN_STATE, at_job)
    models = {row.digest: row.model for row in connection.execute(sql.MODELS, at_job)}
    rows = connection.execute(sql.TASKS, at_job).all()
    tasks = [unpack_task(row.task, models.get(row.model)) for row in rows if row.answer is None]
    return RunState(
        None if state is None else unpack(state, StateRef),
        # Sorted here, for a database may know another alphabet.
        tuple(sorted(tasks, key=lambda task: key_order(task.key))),
        tuple(unpack(row.answer, TaskResult) for row in rows if row.answer is not None),
    )


def _at_job(job_id: JobId) -> dict[str, Any]:
    """Return the parameters that find the job; what is no job's id, which a database may not take, finds none."""
    return {"of_job_id": job_id if is_job_id(job_id) else ""}


def _at_key(job_id: JobId, key: TaskKey) -> dict[str, Any]:
    """Return the parameters that find the task of *key*."""
    return _at_job(job_id) | {f"of_{name}": value for name, value in msgspec.structs.asdict(key).items()}
