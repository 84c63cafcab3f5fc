"""Jobs as people see them: one, several, their logs, and their events as they happen."""

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from hanse.cell.cell import Cell
from hanse.coordination.schedule import Wait
from hanse.errors import Conflict, HanseError, NotFound
from hanse.ids import ClientName, Fqcn, JobId
from hanse.job import JobRecord, JobState
from hanse.messages import Channel, ClientView, JobEvent, JobView
from hanse.server.active_run import ActiveRun
from hanse.server.run_folder import RunFolder
from hanse.storage.records import Store

WATCHERS_PER_JOB: Final = 64
LOG_BYTES: Final = 256 * 1024
"""The most that is read of a log's end to show its last lines."""


class JobBoard:
    """What a tenure's jobs look like from outside; nothing here changes one.

    *runs* are those that run now, *waiting_of* tells what a job waits for, *folder_of* where a run keeps its things.
    """

    def __init__(
        self,
        store: Store,
        cell: Cell,
        *,
        runs: Mapping[JobId, ActiveRun],
        waiting_of: Callable[[JobId], Wait | None],
        folder_of: Callable[[JobId], RunFolder],
    ) -> None:
        self._store = store
        self._cell = cell
        self._runs = runs
        self._waiting_of = waiting_of
        self._folder_of = folder_of
        self._watchers: dict[JobId, set[Fqcn]] = {}

    async def view(self, job_id: JobId, *, history: bool = True) -> JobView:
        """Return a job, for people."""
        return await self._view(await self._store.job(job_id), history=history)

    async def views(self, *, state: str = "", limit: int = 100) -> list[JobView]:
        """Return the jobs, newest first, without their rounds' history."""
        states = (JobState(state),) if state else ()
        records = await self._store.jobs(states=states, limit=limit)
        return [await self._view(record, history=False) for record in records]

    async def find(self, prefix: str) -> JobId:
        """Return the id of the one job whose id is, or begins with, *prefix*.

        Raises:
            NotFound: no job, or several.
        """
        ids = [record.job_id for record in await self._store.jobs()]
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
        """Return the last *lines* lines of the run's log here, or of what *client*'s process last left behind."""
        if client is not None:
            run = self._runs.get(job_id)
            return run.log_tail(client) if run is not None else ""
        path = self._folder_of(job_id).log
        return await asyncio.to_thread(_last_lines, path, lines)

    def leave(self, watcher: Fqcn) -> None:
        """Send *watcher* nothing any more: it has left."""
        for watchers in self._watchers.values():
            watchers.discard(watcher)

    def close(self, job_id: JobId) -> None:
        """Forget who watches a job: it has ended."""
        self._watchers.pop(job_id, None)

    async def _view(self, record: JobRecord, *, history: bool) -> JobView:
        if history:
            rounds = await self._store.rounds(record.job_id)
            last = rounds[-1] if rounds else None
        else:
            rounds, last = [], await self._store.last_round(record.job_id)
        waiting = self._waiting_of(record.job_id)
        run = self._runs.get(record.job_id)
        total = record.spec.workflow.settings.get("rounds", 0)
        parts = run.run.participants if run is not None else ()
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
            waiting_for=waiting.reason if waiting else "",
            waiting_until=waiting.until if waiting else 0.0,
            round=last.round if last else 0,
            rounds=total if isinstance(total, int) else 0,
            metrics=last.metrics if last else {},
            clients=tuple(ClientView(part.name, part.state.value, part.reason) for part in parts)
            or tuple(ClientView(name, "") for name in record.clients),
            history=tuple(rounds),
            result=record.result,
            result_bytes=record.result_bytes,
        )


def _last_lines(path: Path, lines: int) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(path.stat().st_size - LOG_BYTES, 0))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
    return "\n".join(text.splitlines()[-lines:])
