"""``MemoryStore``: the store without a database, for the simulator and for tests.

It keeps the same promises as ``SqlStore``, but for the one that what it holds outlives the process: what is kept is
packed, so that nobody can change it from outside, and reads back as it would from a database. All of a method's
changes happen in one step of the event loop.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from hanse.errors import Conflict, NotFound, StaleEpoch, StoreFailed
from hanse.ids import JobId
from hanse.job import JobRecord, JobState
from hanse.messages import CommitRound, RoundView, StateRef, TaskAssignment, TaskKey, TaskResult
from hanse.storage.records import (
    AuditEntry,
    Lease,
    PackedTask,
    RunState,
    check_client,
    check_commit,
    check_job,
    check_move,
    check_next_round,
    check_result,
    check_running,
    check_tasks,
    key_order,
    pack,
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

    def forget_tasks(self) -> None:
        self.tasks.clear()
        self.models.clear()
        self.answers.clear()


class MemoryStore:
    """A ``Store`` in this process's memory; *store_id* distinguishes its sessions from those of other stores.

    After ``close`` it can be opened again, and holds what it held: that is how a test restarts a server.
    """

    def __init__(self, *, store_id: str = "memory") -> None:
        self._store_id = store_id
        self._is_open = False
        self._lease = Lease(0, "", session_id(store_id, 0), 0.0)
        self._jobs: dict[JobId, _Job] = {}
        self._disabled: dict[str, str] = {}
        self._audit: list[AuditEntry] = []

    async def open(self) -> None:
        """Make the store usable."""
        if self._is_open:
            raise StoreFailed("opening the store", "it is open already")
        self._is_open = True

    async def close(self) -> None:
        """Refuse further use."""
        self._is_open = False

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def take_lease(self, holder: str, *, ttl_s: float, now_s: float, force: bool = False) -> Lease:
        """See ``Store``."""
        self._check_open()
        held_by = self._lease.holder
        if held_by not in ("", holder) and self._lease.expires_at > now_s and not force:
            raise Conflict("the store's lease", state=f"held by {held_by}", wanted=f"taken by {holder}")
        return self._set_lease(self._lease.epoch + 1, holder, expires_at=now_s + ttl_s)

    async def renew_lease(self, epoch: int, *, ttl_s: float, now_s: float) -> Lease:
        """See ``Store``."""
        self._fence(epoch)
        return self._set_lease(epoch, self._lease.holder, expires_at=now_s + ttl_s)

    async def release_lease(self, epoch: int) -> None:
        """See ``Store``."""
        self._fence(epoch)
        self._set_lease(epoch + 1, "", expires_at=0.0)

    async def add_job(self, epoch: int, record: JobRecord) -> None:
        """See ``Store``."""
        blob = check_job(record)
        self._fence(epoch)
        if record.job_id in self._jobs:
            raise Conflict(f"job {record.job_id}", state="stored already", wanted="added")
        self._jobs[record.job_id] = _Job(record.state, blob)

    async def replace_job(self, epoch: int, record: JobRecord, *, was: JobState) -> None:
        """See ``Store``."""
        self._replace_job(epoch, record, was=was)

    async def end_run(self, epoch: int, record: JobRecord, *, was: JobState) -> None:
        """See ``Store``."""
        self._replace_job(epoch, record, was=was).forget_tasks()

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

    async def accept_answer(self, epoch: int, job_id: JobId, result: TaskResult) -> bool:
        """See ``Store``."""
        blob = check_result(result)
        self._fence(epoch)
        job = self._jobs.get(job_id)
        if job is None or result.key not in job.tasks:
            raise NotFound("task", task_title(result.key))
        return job.answers.setdefault(result.key, blob) is blob

    async def commit_round(self, epoch: int, job_id: JobId, commit: CommitRound, *, now_s: float) -> None:
        """See ``Store``."""
        state, view = check_commit(commit, now_s=now_s)
        number = commit.state.round
        self._fence(epoch)
        job = self._running_job(job_id, doing=f"committed round {number}")
        if number == job.last_round:
            return
        check_next_round(job_id, number, last=job.last_round, doing="committed")
        job.last_round, job.run_state = number, state
        job.rounds.append(view)
        job.forget_tasks()

    async def snapshot(self, job_id: JobId) -> RunState:
        """See ``Store``."""
        job = self._job(job_id)
        tasks = [job.tasks[key] for key in sorted(job.tasks, key=key_order) if key not in job.answers]
        return RunState(
            None if job.run_state is None else unpack(job.run_state, StateRef),
            tuple(unpack_task(task.blob, job.models[task.model] if task.model else None) for task in tasks),
            tuple(unpack(job.answers[key], TaskResult) for key in sorted(job.answers, key=key_order)),
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
        check_client(client)
        self._fence(epoch)
        self._disabled.pop(client, None)
        if disabled:
            self._disabled[client] = reason

    async def disabled_clients(self) -> dict[str, str]:
        """See ``Store``."""
        self._check_open()
        return dict(sorted(self._disabled.items()))

    async def audit(self, epoch: int, entry: AuditEntry) -> None:
        """See ``Store``."""
        pack(entry)
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
        if epoch != self._lease.epoch:
            raise StaleEpoch(ours=epoch, current=self._lease.epoch)

    def _set_lease(self, epoch: int, holder: str, *, expires_at: float) -> Lease:
        self._lease = Lease(epoch, holder, session_id(self._store_id, epoch), expires_at)
        return self._lease

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
        check_move(job.state, record, was=was)
        job.state, job.record = record.state, blob
        return job
