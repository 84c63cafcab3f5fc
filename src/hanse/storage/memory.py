"""``MemoryStore``: the store without a database, for the simulator and for tests.

It keeps the same promises as ``SqlStore``, but for the one that what it holds outlives the process: what is kept is
packed, so that nobody can change it from outside, and reads back as it would from a database. All of a method's
changes happen in one step of the event loop.
"""

import asyncio
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import msgspec

from hanse.errors import Conflict, NotFound, StoreFailed
from hanse.ids import JobId
from hanse.job import JobRecord, JobState
from hanse.messages import CommitRound, RoundView, StateRef, TaskAssignment, TaskKey, TaskResult
from hanse.storage.records import (
    AuditEntry,
    Lease,
    PackedTask,
    RunState,
    Standby,
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


@dataclass(slots=True)
class _Job:
    """A job's row, and the rows of its run."""

    state: JobState
    record: bytes
    last_round: int = -1
    run_state: bytes | None = None
    rounds: list[bytes] = field(default_factory=list)
    tasks: dict[TaskKey, PackedTask] = field(default_factory=dict)
    models: dict[bytes, bytes] = field(default_factory=dict)
    answers: dict[TaskKey, bytes] = field(default_factory=dict)

    def keep_tasks(self, kept: Collection[TaskKey]) -> None:
        """Forget all tasks but those *kept*, with their answers and the models that they hand out."""
        self.tasks = {key: task for key, task in self.tasks.items() if key in kept}
        self.answers = {key: answer for key, answer in self.answers.items() if key in kept}
        needed = {task.model for task in self.tasks.values()}
        self.models = {digest: model for digest, model in self.models.items() if digest in needed}


class MemoryStore:
    """A ``Store`` in this process's memory; *store_id* distinguishes its sessions from those of other stores.

    After ``close`` it can be opened again, and holds what it held: that is how a test restarts a server.
    """

    def __init__(self, *, store_id: str = "memory") -> None:
        self._store_id = store_id
        self._is_open = False
        self._lease = Lease(0, "", session_id(store_id, 0))
        self._moved = asyncio.Event()
        self._standbys: dict[str, Standby] = {}
        self._jobs: dict[JobId, _Job] = {}
        self._disabled: dict[str, str] = {}
        self._tokens: dict[str, tuple[str, float]] = {}
        self._certificate_ends: dict[str, float] = {}
        self._audit: list[AuditEntry] = []

    async def open(self) -> None:
        """Make the store usable."""
        if self._is_open:
            raise StoreFailed("opening the store", "it is open already")
        self._is_open = True

    async def close(self) -> None:
        """Refuse further use."""
        self._is_open = False
        self._wake()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def lease(self) -> Lease:
        """See ``Store``."""
        self._check_open()
        return self._lease

    async def lease_moved(self, seen: Lease, *, within_s: float) -> Lease:
        """See ``Store``."""
        self._check_open()
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                while self._is_open and not has_moved(self._lease, seen):
                    await self._moved.wait()
        return await self.lease()

    async def take_lease(
        self, holder: str, *, name: str, target: str, ttl_s: float, seen: Lease | None = None, force: bool = False
    ) -> Lease:
        """See ``Store``."""
        self._check_open()
        epoch = self._lease.epoch + 1
        taken = Lease(epoch, holder, session_id(self._store_id, epoch), ttl_s=ttl_s, name=name, target=target)
        check_lease(taken)
        check_taking(self._lease, holder, name=name, seen=seen, force=force)
        self._standbys.pop(name, None)
        return self._set_lease(taken)

    async def renew_lease(self, epoch: int) -> Lease:
        """See ``Store``."""
        self._fence(epoch)
        return self._set_lease(msgspec.structs.replace(self._lease, beat=self._lease.beat + 1))

    async def release_lease(self, epoch: int, *, successor: str = "") -> None:
        """See ``Store``."""
        self._fence(epoch)
        check_successor(successor)
        ssid = session_id(self._store_id, epoch + 1)
        self._set_lease(Lease(epoch + 1, "", ssid, ttl_s=self._lease.ttl_s, successor=successor))

    async def note_standby(self, standby: Standby) -> None:
        """See ``Store``."""
        check_standby(standby)
        self._check_open()
        self._standbys[standby.name] = msgspec.structs.replace(standby, seen_at=time.time())

    async def standbys(self, *, within_s: float) -> list[Standby]:
        """See ``Store``."""
        self._check_open()
        now = time.time()
        found = [standby for standby in self._standbys.values() if abs(standby.seen_at - now) <= within_s]
        return sorted(found, key=lambda standby: standby.name)

    async def add_job(self, epoch: int, record: JobRecord) -> None:
        """See ``Store``."""
        blob = check_job(record)
        self._fence(epoch)
        if self._jobs.setdefault(record.job_id, _Job(record.state, blob)).record != blob:
            raise Conflict(f"job {record.job_id}", state="stored already", wanted="added")

    async def replace_job(self, epoch: int, record: JobRecord, *, was: JobState) -> None:
        """See ``Store``."""
        self._replace_job(epoch, record, was=was)

    async def end_run(self, epoch: int, record: JobRecord, *, was: JobState) -> None:
        """See ``Store``."""
        self._replace_job(epoch, record, was=was).keep_tasks(())

    async def job(self, job_id: JobId) -> JobRecord:
        """See ``Store``."""
        return unpack(self._job(job_id).record, JobRecord)

    async def jobs(self, *, states: Collection[JobState] = (), limit: int | None = None) -> list[JobRecord]:
        """See ``Store``."""
        self._check_open()
        found = [job.record for job in reversed(self._jobs.values()) if not states or job.state in states]
        return [unpack(record, JobRecord) for record in found[:limit]]

    async def issue_tasks(self, epoch: int, job_id: JobId, tasks: Sequence[TaskAssignment]) -> None:
        """See ``Store``."""
        packed, models = check_tasks(tasks)
        self._fence(epoch)
        job = self._running_job(job_id, doing="issued tasks")
        for task in packed:
            check_next_round(job_id, task.key.round, last=job.last_round, doing="issued tasks of")
        job.models |= models
        for task in packed:
            job.tasks.setdefault(task.key, task)

    async def accept_answer(self, epoch: int, job_id: JobId, result: TaskResult) -> TaskResult:
        """See ``Store``."""
        blob = check_result(result)
        self._fence(epoch)
        job = self._jobs.get(job_id)
        if job is None or result.key not in job.tasks:
            raise NotFound("task", task_title(result.key))
        return unpack(job.answers.setdefault(result.key, blob), TaskResult)

    async def retract_answers(self, epoch: int, job_id: JobId, keys: Sequence[TaskKey]) -> None:
        """See ``Store``."""
        self._fence(epoch)
        answers = self._jobs[job_id].answers if job_id in self._jobs else {}
        for key in keys:
            answers.pop(key, None)

    async def commit_round(self, epoch: int, job_id: JobId, commit: CommitRound, *, now_s: float) -> None:
        """See ``Store``."""
        state, view = check_commit(commit, now_s=now_s)
        number = commit.state.round
        self._fence(epoch)
        job = self._running_job(job_id, doing=f"committed round {number}")
        if number == job.last_round:
            return
        check_next_round(job_id, number, last=job.last_round, doing="committed")
        check_carried(commit.carried, job.tasks)
        job.last_round, job.run_state = number, state
        job.rounds.append(view)
        job.keep_tasks(commit.carried)

    async def snapshot(self, job_id: JobId) -> RunState:
        """See ``Store``."""
        job = self._job(job_id)
        tasks = [job.tasks[key] for key in sorted(job.tasks, key=key_order) if key not in job.answers]
        return RunState(
            None if job.run_state is None else unpack(job.run_state, StateRef),
            tuple(unpack_task(task.blob, job.models[task.model] if task.model else None) for task in tasks),
            tuple(unpack(answer, TaskResult) for answer in job.answers.values()),
        )

    async def rounds(self, job_id: JobId) -> list[RoundView]:
        """See ``Store``."""
        self._check_open()
        return [unpack(view, RoundView) for view in self._jobs[job_id].rounds] if job_id in self._jobs else []

    async def last_round(self, job_id: JobId) -> RoundView | None:
        """See ``Store``."""
        self._check_open()
        views = self._jobs[job_id].rounds if job_id in self._jobs else []
        return unpack(views[-1], RoundView) if views else None

    async def set_disabled(self, epoch: int, client: str, disabled: bool, *, reason: str = "") -> None:
        """See ``Store``."""
        check_disabling(client, reason)
        self._fence(epoch)
        self._disabled.pop(client, None)
        if disabled:
            self._disabled[client] = reason
            if client in self._tokens:
                self._tokens[client] = ("", self._tokens[client][1])

    async def disabled_clients(self) -> dict[str, str]:
        """See ``Store``."""
        self._check_open()
        return dict(sorted(self._disabled.items()))

    async def keep_token(self, epoch: int, client: str, fingerprint: str, *, now_s: float, until_s: float) -> None:
        """See ``Store``."""
        check_token(client, fingerprint, now_s=now_s, until_s=until_s)
        self._fence(epoch)
        self._tokens = {name: kept for name, kept in self._tokens.items() if kept[1] > now_s}
        _, before = self._tokens.get(client, ("", 0.0))
        self._tokens[client] = (fingerprint, max(before, until_s))

    async def kept_tokens(self) -> dict[str, str]:
        """See ``Store``."""
        self._check_open()
        return {name: fingerprint for name, (fingerprint, _) in sorted(self._tokens.items())}

    async def keep_certificate_ends(self, epoch: int, ends: Mapping[str, float], *, since_s: float) -> None:
        """See ``Store``."""
        check_certificate_ends(ends)
        self._fence(epoch)
        known = self._certificate_ends | dict(ends)
        self._certificate_ends = {client: ends_at for client, ends_at in known.items() if ends_at >= since_s}

    async def certificate_ends(self) -> dict[str, float]:
        """See ``Store``."""
        self._check_open()
        return dict(sorted(self._certificate_ends.items()))

    async def audit(self, epoch: int, entry: AuditEntry) -> None:
        """See ``Store``."""
        check_audit(entry)
        self._fence(epoch)
        self._audit.append(entry)

    async def audit_log(self, limit: int = 100) -> list[AuditEntry]:
        """See ``Store``."""
        self._check_open()
        return self._audit[::-1][:limit]

    def _check_open(self) -> None:
        if not self._is_open:
            raise StoreFailed("using the store", "it is not open")

    def _fence(self, epoch: int) -> None:
        self._check_open()
        check_epoch(epoch, self._lease.epoch)

    def _set_lease(self, lease: Lease) -> Lease:
        self._lease = lease
        self._wake()
        return lease

    def _wake(self) -> None:
        moved, self._moved = self._moved, asyncio.Event()
        moved.set()

    def _job(self, job_id: JobId) -> _Job:
        self._check_open()
        if job_id not in self._jobs:
            raise NotFound("job", job_id)
        return self._jobs[job_id]

    def _running_job(self, job_id: JobId, *, doing: str) -> _Job:
        job = self._job(job_id)
        check_running(job_id, job.state, doing)
        return job

    def _replace_job(self, epoch: int, record: JobRecord, *, was: JobState) -> _Job:
        blob = check_job(record)
        self._fence(epoch)
        job = self._job(record.job_id)
        if job.record != blob:
            check_move(job.state, record, was=was)
        job.state, job.record = record.state, blob
        return job
