"""``SqlStore``: the store in a database, through SQLAlchemy Core and one writer thread.

SQLite needs nothing set up; PostgreSQL is for servers that stand by for each other. ``Store`` and its records are in
``records`` and are re-exported here; ``memory`` has the same store without a database. Each method's work is one
function of a transaction, so that it is one transaction, or one savepoint of a shared one (``writer``).
"""

import asyncio
import itertools
import logging
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import msgspec
from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError

from hanse.errors import ConfigError, Conflict, NotFound, StoreFailed
from hanse.ids import JobId, is_job_id
from hanse.job import JobRecord, JobState
from hanse.messages import CommitRound, RoundView, StateRef, TaskAssignment, TaskKey, TaskResult
from hanse.storage import statements as sql
from hanse.storage.database import Database, Listener
from hanse.storage.disk import database_failure
from hanse.storage.records import (
    AuditEntry,
    Lease,
    RunState,
    Standby,
    Store,
    check_audit,
    check_carried,
    check_certificate_ends,
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
    check_token,
    has_moved,
    key_order,
    session_id,
    task_title,
    unpack,
    unpack_task,
)
from hanse.storage.sqlite import SqliteDatabase
from hanse.storage.tables import SCHEMA_VERSION, schema_version
from hanse.storage.transaction import Statement, Transaction
from hanse.storage.writer import Writer

__all__ = ["AuditEntry", "Lease", "RunState", "SqlStore", "Standby", "Store"]

T = TypeVar("T")

ANSWERS_BITS: Final = 32
"""Answers are numbered as they are accepted, by the only server that has the epoch; so many bits are for the number."""


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
        self._answers = itertools.count()

    async def open(self) -> None:
        """Open the database, and bring its tables to this release's form."""
        if self._writer is not None:
            raise StoreFailed(f"opening {self._name}", "it is open already")
        self._store_id = await asyncio.to_thread(self._prepare)
        self._writer, self._listener = Writer(self._database), self._database.listener(self._wake)
        self._writer.start()

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
        return await self._read(lambda transaction: self._lease(transaction, sql.LEASE))

    async def lease_moved(self, seen: Lease, *, within_s: float) -> Lease:
        """See ``Store``."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + within_s
        while True:
            if self._listener is not None:
                await self._listener.listen()
            moved = self._moved
            lease = await self.lease()
            if has_moved(lease, seen) or loop.time() >= deadline:
                return lease
            with suppress(TimeoutError):
                async with asyncio.timeout_at(deadline):
                    await moved.wait()

    async def take_lease(
        self, holder: str, *, name: str, target: str, ttl_s: float, seen: Lease | None = None, force: bool = False
    ) -> Lease:
        """See ``Store``."""
        taken = Lease(0, holder, session_id(self._store_id, 0), ttl_s=ttl_s, name=name, target=target)
        check_lease(taken)

        def take(transaction: Transaction) -> Lease:
            lease = self._lease(transaction, sql.LEASE_TO_CHANGE)
            if transaction.value(sql.SCHEMA) != SCHEMA_VERSION:
                why = "a later release of Hanse has upgraded it meanwhile; start this server again with that release"
                raise StoreFailed(f"taking the lease of {self._name}", why)
            check_taking(lease, holder, name=name, seen=seen, force=force)
            transaction.run(sql.DELETE_STANDBY, {"of_name": name})
            return self._set_lease(transaction, taken, epoch=lease.epoch + 1)

        return await self._write(take)

    async def renew_lease(self, epoch: int) -> Lease:
        """See ``Store``."""

        def renew(transaction: Transaction) -> Lease:
            lease = self._held_lease(transaction, epoch)
            return self._set_lease(transaction, msgspec.structs.replace(lease, beat=lease.beat + 1), epoch=epoch)

        return await self._write(renew)

    async def release_lease(self, epoch: int, *, successor: str = "") -> None:
        """See ``Store``."""
        check_successor(successor)

        def release(transaction: Transaction) -> Lease:
            lease = self._held_lease(transaction, epoch)
            free = Lease(0, "", lease.ssid, ttl_s=lease.ttl_s, successor=successor)
            return self._set_lease(transaction, free, epoch=epoch + 1)

        await self._write(release)

    async def note_standby(self, standby: Standby) -> None:
        """See ``Store``."""
        check_standby(standby)

        def note(transaction: Transaction) -> None:
            transaction.run(sql.DELETE_STANDBY, {"of_name": standby.name})
            row = {"holder": standby.holder, "name": standby.name, "target": standby.target}
            transaction.run(sql.ADD_STANDBY, row)

        await self._write(note)

    async def standbys(self, *, within_s: float) -> list[Standby]:
        """See ``Store``."""

        def read(transaction: Transaction) -> list[Standby]:
            found = [Standby(*row) for row in transaction.rows(sql.STANDBYS, {"within_s": within_s})]
            return sorted(found, key=lambda standby: standby.name)

        return await self._read(read)

    # Jobs ---------------------------------------------------------------------------------------------------------

    async def add_job(self, epoch: int, record: JobRecord) -> None:
        """See ``Store``."""
        blob = check_job(record)

        def add(transaction: Transaction) -> None:
            _fence(transaction, epoch)
            stored = transaction.value(sql.JOB, _at_job(record.job_id))
            if stored is None:
                row = {"job_id": record.job_id, "state": record.state.value, "last_round": -1, "record": blob}
                transaction.run(sql.ADD_JOB, row)
            elif stored != blob:
                raise Conflict(f"job {record.job_id}", state="stored already", wanted="added")

        await self._write(add)

    async def replace_job(self, epoch: int, record: JobRecord, *, was: JobState) -> None:
        """See ``Store``."""
        blob = check_job(record)

        def replace(transaction: Transaction) -> None:
            _fence(transaction, epoch)
            _replace_job(transaction, record, blob, was=was)

        await self._write(replace)

    async def end_run(self, epoch: int, record: JobRecord, *, was: JobState) -> None:
        """See ``Store``."""
        blob = check_job(record)

        def end(transaction: Transaction) -> None:
            _fence(transaction, epoch)
            _replace_job(transaction, record, blob, was=was)
            _keep_tasks(transaction, record.job_id, ())

        await self._write(end)

    async def job(self, job_id: JobId) -> JobRecord:
        """See ``Store``."""

        def read(transaction: Transaction) -> JobRecord:
            blob = transaction.value(sql.JOB, _at_job(job_id))
            if blob is None:
                raise NotFound("job", job_id)
            return unpack(blob, JobRecord)

        return await self._read(read)

    async def jobs(self, *, states: Collection[JobState] = (), limit: int | None = None) -> list[JobRecord]:
        """See ``Store``."""
        query = sql.jobs_in(frozenset(states))
        most = {"limit": sql.NO_LIMIT if limit is None else limit}
        return await self._read(
            lambda transaction: [unpack(blob, JobRecord) for blob in transaction.values(query, most)]
        )

    # A run's journal ----------------------------------------------------------------------------------------------

    async def issue_tasks(self, epoch: int, job_id: JobId, tasks: Sequence[TaskAssignment]) -> None:
        """See ``Store``."""
        packed, models = check_tasks(tasks)
        model_rows = [{"job_id": job_id, "digest": digest, "model": model} for digest, model in models.items()]
        task_rows = [
            {"job_id": job_id, "task": task.blob, "model": task.model, **msgspec.structs.asdict(task.key)}
            for task in packed
        ]

        def issue(transaction: Transaction) -> None:
            _fence(transaction, epoch)
            last = _last_round(transaction, job_id, doing="issued tasks")
            for number in {task.key.round for task in packed}:
                check_next_round(job_id, number, last=last, doing="issued tasks of")
            transaction.run_many(sql.ADD_NEW_MODELS, model_rows)
            transaction.run_many(sql.ADD_NEW_TASKS, task_rows)

        await self._write(issue)

    async def accept_answer(self, epoch: int, job_id: JobId, result: TaskResult) -> TaskResult:
        """See ``Store``."""
        blob = check_result(result)
        at_key = _at_key(job_id, result.key)

        def accept(transaction: Transaction) -> TaskResult:
            _fence(transaction, epoch)
            accepted = epoch << ANSWERS_BITS | next(self._answers)
            if transaction.run(sql.ANSWER_TASK, {**at_key, "answer": blob, "accepted": accepted}):
                return result
            earlier = transaction.value(sql.ANSWER, at_key)
            if earlier is None:
                raise NotFound("task", task_title(result.key))
            return unpack(earlier, TaskResult)

        return await self._write(accept)

    async def retract_answers(self, epoch: int, job_id: JobId, keys: Sequence[TaskKey]) -> None:
        """See ``Store``."""
        rows = [_at_key(job_id, key) for key in keys]

        def retract(transaction: Transaction) -> None:
            _fence(transaction, epoch)
            transaction.run_many(sql.RETRACT_ANSWER, rows)

        await self._write(retract)

    async def commit_round(self, epoch: int, job_id: JobId, commit: CommitRound, *, now_s: float) -> None:
        """See ``Store``."""
        state, view = check_commit(commit, now_s=now_s)
        number = commit.state.round
        at_job = _at_job(job_id)

        def commit_it(transaction: Transaction) -> None:
            _fence(transaction, epoch)
            last = _last_round(transaction, job_id, doing=f"committed round {number}")
            if number == last:
                return
            check_next_round(job_id, number, last=last, doing="committed")
            transaction.run(sql.SET_LAST_ROUND, {**at_job, "last_round": number})
            transaction.run(sql.DELETE_RUN_STATE, at_job)
            transaction.run(sql.ADD_RUN_STATE, {"job_id": job_id, "state": state})
            transaction.run(sql.ADD_ROUND, {"job_id": job_id, "round": number, "record": view})
            _keep_tasks(transaction, job_id, commit.carried)

        await self._write(commit_it)

    async def snapshot(self, job_id: JobId) -> RunState:
        """See ``Store``."""
        return await self._read(lambda transaction: _snapshot(transaction, job_id))

    async def rounds(self, job_id: JobId) -> list[RoundView]:
        """See ``Store``."""

        def read(transaction: Transaction) -> list[RoundView]:
            return [unpack(blob, RoundView) for blob in transaction.values(sql.ROUNDS, _at_job(job_id))]

        return await self._read(read)

    async def last_round(self, job_id: JobId) -> RoundView | None:
        """See ``Store``."""

        def read(transaction: Transaction) -> RoundView | None:
            blob = transaction.value(sql.LAST_ROUND, _at_job(job_id))
            return None if blob is None else unpack(blob, RoundView)

        return await self._read(read)

    # Clients and the audit log ------------------------------------------------------------------------------------

    async def set_disabled(self, epoch: int, client: str, disabled: bool, *, reason: str = "") -> None:
        """See ``Store``."""
        check_disabling(client, reason)

        def set_it(transaction: Transaction) -> None:
            _fence(transaction, epoch)
            transaction.run(sql.ENABLE, {"of_client": client})
            if disabled:
                transaction.run(sql.DISABLE, {"client": client, "reason": reason})
                transaction.run(sql.VOID_TOKEN, {"of_client": client, "fingerprint": ""})

        await self._write(set_it)

    async def disabled_clients(self) -> dict[str, str]:
        """See ``Store``."""
        return await self._read(lambda transaction: dict(sorted(transaction.rows(sql.DISABLED))))

    async def keep_token(self, epoch: int, client: str, fingerprint: str, *, now_s: float, until_s: float) -> None:
        """See ``Store``."""
        check_token(client, fingerprint, now_s=now_s, until_s=until_s)

        def keep(transaction: Transaction) -> None:
            _fence(transaction, epoch)
            transaction.run(sql.DELETE_OLD_TOKENS, {"now_s": now_s})
            before = transaction.value(sql.TOKEN_UNTIL, {"of_client": client})
            transaction.run(sql.DELETE_TOKEN, {"of_client": client})
            row = {"client": client, "fingerprint": fingerprint, "until_s": max(before or 0.0, until_s)}
            transaction.run(sql.ADD_TOKEN, row)

        await self._write(keep)

    async def kept_tokens(self) -> dict[str, str]:
        """See ``Store``."""
        return await self._read(lambda transaction: dict(sorted(transaction.rows(sql.TOKENS))))

    async def keep_certificate_ends(self, epoch: int, ends: Mapping[str, float], *, since_s: float) -> None:
        """See ``Store``."""
        check_certificate_ends(ends)
        rows = [{"client": client, "ends_at": ends_at} for client, ends_at in ends.items()]

        def keep(transaction: Transaction) -> None:
            _fence(transaction, epoch)
            transaction.run_many(sql.DELETE_CERTIFICATE_END, [{"of_client": client} for client in ends])
            transaction.run_many(sql.ADD_CERTIFICATE_END, rows)
            transaction.run(sql.DELETE_OLD_CERTIFICATE_ENDS, {"since_s": since_s})

        await self._write(keep)

    async def certificate_ends(self) -> dict[str, float]:
        """See ``Store``."""
        return await self._read(lambda transaction: dict(sorted(transaction.rows(sql.CERTIFICATE_ENDS))))

    async def audit(self, epoch: int, entry: AuditEntry) -> None:
        """See ``Store``."""
        check_audit(entry)

        def append(transaction: Transaction) -> None:
            _fence(transaction, epoch)
            transaction.run(sql.ADD_AUDIT, msgspec.structs.asdict(entry))

        await self._write(append)

    async def audit_log(self, limit: int = 100) -> list[AuditEntry]:
        """See ``Store``."""

        def read(transaction: Transaction) -> list[AuditEntry]:
            return [AuditEntry(*row) for row in transaction.rows(sql.AUDIT_LOG, {"limit": limit})]

        return await self._read(read)

    # The database -------------------------------------------------------------------------------------------------

    async def _write(self, operation: Callable[[Transaction], T]) -> T:
        return await self._opened().write(operation)

    async def _read(self, operation: Callable[[Transaction], T]) -> T:
        return await self._opened().read(operation)

    def _opened(self) -> Writer:
        if self._writer is None:
            raise StoreFailed(f"using {self._name}", "it is not open")
        return self._writer

    def _prepare(self) -> str:
        """Make the database's schema this release's, and return the store's id."""
        try:
            # Who only begins to use a store must not wait for one who hangs while he does the same.
            with self._database.looking() as connection:
                if schema_version(connection) == SCHEMA_VERSION and (found := connection.scalar(sql.STORE_ID)):
                    return str(found)
            with self._database.migrating() as connection:
                if (version := schema_version(connection)) != SCHEMA_VERSION:
                    # What it tells at each start, from its import on, is of no use to an operator.
                    logging.getLogger("alembic").setLevel(logging.WARNING)
                    from hanse.storage.migrations import migrate  # noqa: PLC0415 - only an upgrade pays for Alembic

                    migrate(connection, version=version, name=self._name)
                if (store_id := connection.scalar(sql.STORE_ID)) is None:
                    store_id = self._new_id()
                    connection.execute(sql.ADD_STORE_ID, {"key": "store_id", "value": store_id})
                return store_id
        except DBAPIError as error:
            raise database_failure(error.orig or error, self._name, doing="opening") from error

    def _wake(self) -> None:
        moved, self._moved = self._moved, asyncio.Event()
        moved.set()

    def _lease(self, transaction: Transaction, query: Statement) -> Lease:
        epoch, holder, *rest = transaction.row(query)
        return Lease(epoch, holder, session_id(self._store_id, epoch), *rest)

    def _held_lease(self, transaction: Transaction, epoch: int) -> Lease:
        """Return the lease, locked, having made sure that it is of *epoch*."""
        lease = self._lease(transaction, sql.LEASE_TO_CHANGE)
        check_epoch(epoch, lease.epoch)
        return lease

    def _set_lease(self, transaction: Transaction, lease: Lease, *, epoch: int) -> Lease:
        lease = msgspec.structs.replace(lease, epoch=epoch, ssid=session_id(self._store_id, epoch))
        row = msgspec.structs.asdict(lease)
        del row["ssid"]
        transaction.run(sql.SET_LEASE, row)
        self._database.announce(transaction)
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
    except (ArgumentError, ValueError):  # the latter of a port that is no number, and says what stands there
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
        expected = "PostgreSQL's driver to be installed (pip install 'psycopg[binary]')"
        raise ConfigError("store", got=shown, expected=expected) from missing
    return PostgresDatabase(url, name=shown)


def _fence(transaction: Transaction, epoch: int) -> None:
    """Make sure that the lease is of *epoch*, and stays so until this transaction ends."""
    check_epoch(epoch, transaction.value(sql.EPOCH))


def _replace_job(transaction: Transaction, record: JobRecord, blob: bytes, *, was: JobState) -> None:
    at_job = _at_job(record.job_id)
    row = transaction.row(sql.JOB_TO_CHANGE, at_job)
    if row is None:
        raise NotFound("job", record.job_id)
    state, stored = row
    if stored == blob:
        return
    check_move(JobState(state), record, was=was)
    transaction.run(sql.SET_JOB, {**at_job, "state": record.state.value, "record": blob})


def _last_round(transaction: Transaction, job_id: JobId, *, doing: str) -> int:
    """Return the job's last committed round, -1 before there is one, having made sure that the job has not ended."""
    row = transaction.row(sql.JOB_STATE, _at_job(job_id))
    if row is None:
        raise NotFound("job", job_id)
    state, last_round = row
    check_running(job_id, JobState(state), doing)
    return int(last_round)


def _keep_tasks(transaction: Transaction, job_id: JobId, kept: Collection[TaskKey]) -> None:
    """Delete the run's tasks but those *kept*, with their answers and the models that they hand out."""
    at_job = _at_job(job_id)
    if not kept:
        transaction.run(sql.DELETE_TASKS, at_job)
        transaction.run(sql.DELETE_MODELS, at_job)
        return
    journalled = {TaskKey(*row) for row in transaction.rows(sql.TASK_KEYS, at_job)}
    check_carried(kept, journalled)
    transaction.run_many(sql.DELETE_TASK, [_at_key(job_id, key) for key in journalled.difference(kept)])
    transaction.run(sql.DELETE_UNUSED_MODELS, at_job)


def _snapshot(transaction: Transaction, job_id: JobId) -> RunState:
    at_job = _at_job(job_id)
    if transaction.row(sql.JOB_STATE, at_job) is None:
        raise NotFound("job", job_id)
    state = transaction.value(sql.RUN_STATE, at_job)
    models = dict(transaction.rows(sql.MODELS, at_job))
    rows = transaction.rows(sql.TASKS, at_job)
    tasks = [unpack_task(task, models.get(model)) for task, model, answer in rows if answer is None]
    return RunState(
        None if state is None else unpack(state, StateRef),
        # Sorted here, for a database may know another alphabet.
        tuple(sorted(tasks, key=lambda task: key_order(task.key))),
        tuple(unpack(answer, TaskResult) for _, _, answer in rows if answer is not None),
    )


def _at_job(job_id: JobId) -> dict[str, Any]:
    """Return the parameters that find the job; what is no job's id, which a database may not take, finds none."""
    return {"of_job_id": job_id if is_job_id(job_id) else ""}


def _at_key(job_id: JobId, key: TaskKey) -> dict[str, Any]:
    """Return the parameters that find the task of *key*."""
    return _at_job(job_id) | {f"of_{name}": value for name, value in msgspec.structs.asdict(key).items()}
