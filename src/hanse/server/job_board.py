"""Jobs as people see them: one, several, their logs, and their events as they happen."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from hanse.cell.cell import Cell
from hanse.codes import advice
from hanse.errors import Conflict, HanseError, NotFound, StoreFailed
from hanse.ids import ClientName, Fqcn, JobId
from hanse.job import ENDED, JobRecord, JobState
from hanse.messages import Channel, ClientView, JobEvent, JobView, RoundView, Waiting
from hanse.server.active_run import ActiveRun
from hanse.server.run_folder import RunFolder
from hanse.storage.records import Store

WATCHERS_PER_JOB: Final = 64
LOG_BYTES: Final = 256 * 1024
"""The most that is read of a log's end to show its last lines."""
LOOK_S: Final = 5.0
"""How long the store may take to answer a question that people wait for the answer of."""

T = TypeVar("T")


class JobBoard:
    """What a tenure's jobs look like from outside; nothing here changes one.

    *runs* are those that run now, *waiting_of* tells what a job waits for, *folder_of* where a run keeps its things.
    While the store does not answer, jobs that run are still shown, by what their runs know.
    """

    def __init__(
        self,
        store: Store,
        cell: Cell,
        *,
        runs: Mapping[JobId, ActiveRun],
        waiting_of: Callable[[JobRecord], tuple[Waiting, ...]],
        folder_of: Callable[[JobId], RunFolder],
    ) -> None:
        self._store = store
        self._cell = cell
        self._runs = runs
        self._waiting_of = waiting_of
        self._folder_of = folder_of
        self._watchers: dict[JobId, set[Fqcn]] = {}

    async def view(self, job_id: JobId, *, history: bool = True) -> JobView:
        """Return a job, for people.

        Raises:
            NotFound: there is none.
            StoreFailed: the store does not answer, and the job does not run.
        """
        try:
            record = await looked_up(self._store.job(job_id))
            rounds, last = await self._rounds(job_id, history=history)
        except StoreFailed as failed:
            if (run := self._runs.get(job_id)) is None:
                raise
            return self._view(run.record, [], None, waiting=run.waiting(looked=failed))
        return self._view(record, rounds, last, waiting=self._waiting(record))

    async def views(self, *, state: str = "", limit: int = 100) -> list[JobView]:
        """Return the jobs, newest first, without their rounds' history and logs."""
        states = (JobState(state),) if state else ()
        views = []
        for record in await looked_up(self._store.jobs(states=states, limit=limit)):
            rounds, last = await self._rounds(record.job_id, history=False)
            bare = msgspec.structs.replace(record, log_tail="")
            views.append(self._view(bare, rounds, last, waiting=self._waiting(record)))
        return views

    async def find(self, prefix: str) -> JobId:
        """Return the id of the one job whose id is, or begins with, *prefix*.

        Raises:
            NotFound: no job, or several.
            StoreFailed: the store does not answer, and no job that runs is meant.
        """
        try:
            ids = [record.job_id for record in await looked_up(self._store.jobs())]
        except StoreFailed:
            ids = list(self._runs)
            if not any(job_id.startswith(prefix) for job_id in ids):
                raise
        if prefix in ids:
            return JobId(prefix)
        matching = [job_id for job_id in ids if prefix and job_id.startswith(prefix)]
        if len(matching) != 1:
            raise NotFound("job" if not matching else f"one job (there are {len(matching)}) with the prefix", prefix)
        return matching[0]

    def watch(self, job_id: JobId, watcher: Fqcn) -> None:
        """Send *watcher* the job's events from now on, until it ends or the watcher leaves."""
        watchers = self._watchers.setdefault(job_id, set())
        if len(watchers) >= WATCHERS_PER_JOB and watcher not in watchers:
            raise Conflict(
                f"job {job_id}", state=f"watched by {WATCHERS_PER_JOB} already", wanted="watched by one more"
            )
        watchers.add(watcher)

    def emit(self, event: JobEvent) -> None:
        """Send *event* to whoever watches its job."""
        for watcher in tuple(self._watchers.get(event.job_id, ())):
            try:
                self._cell.tell(watcher, Channel.ADMIN, "job.event", event)
            except HanseError:
                self._watchers[event.job_id].discard(watcher)

    async def log_of(self, job_id: JobId, client: ClientName | None, *, lines: int) -> str:
        """Return the last *lines* lines of the run's log here, or of what *client* last told of its log."""
        if client is not None:
            if (run := self._runs.get(job_id)) is not None:
                return _last_of(run.processes.trouble(client).log_tail, lines)
            record = await looked_up(self._store.job(job_id))
            return _last_of(record.log_tail, lines) if record.client == client else ""
        path = self._folder_of(job_id).log
        return await asyncio.to_thread(_last_lines, path, lines)

    def leave(self, watcher: Fqcn) -> None:
        """Send *watcher* nothing any more: it has left."""
        for watchers in self._watchers.values():
            watchers.discard(watcher)

    def close(self, job_id: JobId) -> None:
        """Forget who watches a job: it has ended."""
        self._watchers.pop(job_id, None)

    async def _rounds(self, job_id: JobId, *, history: bool) -> tuple[list[RoundView], RoundView | None]:
        """Return a job's committed rounds, or none of them without *history*, and the last of them."""
        if not history:
            return [], await looked_up(self._store.last_round(job_id))
        rounds = await looked_up(self._store.rounds(job_id))
        return rounds, rounds[-1] if rounds else None

    def _waiting(self, record: JobRecord) -> tuple[Waiting, ...]:
        return () if record.state in ENDED else self._waiting_of(record)

    def _view(
        self, record: JobRecord, rounds: list[RoundView], last: RoundView | None, *, waiting: tuple[Waiting, ...]
    ) -> JobView:
        run = self._runs.get(record.job_id)
        total = record.spec.workflow.settings.get("rounds", 0)
        return JobView(
            job_id=record.job_id,
            name=record.spec.name,
            state=record.state.value,
            submitter=record.submitter,
            submitted_at=record.submitted_at,
            started_at=record.started_at,
            ended_at=record.ended_at,
            code=record.code,
            reason=record.reason,
            round=last.round if last else max(run.run.committed_round, 0) if run else 0,
            rounds=total if isinstance(total, int) else 0,
            metrics=last.metrics if last else {},
            clients=run.views() if run else tuple(ClientView(name, "") for name in record.clients),
            history=tuple(rounds),
            result=record.result,
            result_bytes=record.result_bytes,
            waiting=waiting,
            client=record.client,
            cause=record.cause if record.cause != record.code else "",
            log_tail=record.log_tail,
            advice=advice(record.cause, record.code),
        )


async def looked_up(looking: Awaitable[T], *, what: str = "jobs") -> T:
    """Return what the store answers that is asked for *what*.

    Raises:
        StoreFailed: it does not, or not in time.
    """
    try:
        async with asyncio.timeout(LOOK_S):
            return await looking
    except TimeoutError:
        raise StoreFailed(f"looking up {what}", f"it has not answered for {LOOK_S:g} s") from None


def _last_of(text: str, lines: int) -> str:
    return "\n".join(text.splitlines()[-lines:])


def _last_lines(path: Path, lines: int) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(path.stat().st_size - LOG_BYTES, 0))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
    return _last_of(text, lines)
