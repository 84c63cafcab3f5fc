"""The jobs of one server: submitted, scheduled when their clients are there, run, and taken up again after a restart.

One task schedules: it wakes when something changed (a job, a client, a deadline) and acts on what
``coordination.schedule`` decides. Each running job is an ``ActiveRun`` with a task of its own. Messages about a job
find their run here. All of it lives on the event loop; ``heartbeat`` may be called from any thread.
"""

import asyncio
import logging
import re
from collections.abc import Callable, Collection, Coroutine, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import msgspec

from hanse.cell.link import Peer
from hanse.cell.transfer import Files
from hanse.codes import CODES
from hanse.coordination.runs import Run, Sync, heartbeat_sync
from hanse.coordination.schedule import NO_CLIENTS, Decision, GiveUp, Start, Wait, next_deadline, plan
from hanse.coordination.waiting import (
    Deployment,
    StoreTrouble,
    TakingUp,
    waiting_of_fetching,
    waiting_of_held_up,
    waiting_of_scheduled,
    waiting_of_submitted,
    waiting_of_taking_up,
)
from hanse.errors import (
    Conflict,
    HanseError,
    NotFound,
    NotInService,
    ProtocolError,
    StaleEpoch,
    StoreFailed,
    Unauthorized,
)
from hanse.events import EventType, FLContext
from hanse.ids import ClientName, JobId, job_cell, split_cell
from hanse.job import ENDED, JobRecord, JobState, move
from hanse.launch.long_logs import LongLogs
from hanse.messages import (
    JobEvent,
    JobFailure,
    Waiting,
)
from hanse.server.active_run import ActiveRun
from hanse.server.bounds import MAX_CODE_CHARS, shortened
from hanse.server.causes import cause_of, code_of
from hanse.server.client_processes import DEPLOY_TIMEOUT_S, deploy
from hanse.server.clients import Clients
from hanse.server.job_board import JobBoard
from hanse.server.leftovers import Leftovers
from hanse.server.lifetime import start_in
from hanse.server.run_desk import RunDesk
from hanse.server.run_folder import RunFolder, RunFolders
from hanse.server.run_services import RunServices
from hanse.server.run_tensors import needed_tensors, without_lost
from hanse.server.submission import submit
from hanse.storage.objects import Objects
from hanse.storage.records import RunState, is_stored
from hanse.storage.tensors import TensorFiles

_log = logging.getLogger(__name__)

MAX_ABORTS: Final = 1000
"""The most jobs that one heartbeat is answered with; a client that runs more hears of the rest at its next ones."""
POSTPONED_S: Final = 5.0
"""A job that its clients could not take just now (a full disk, a broken line) is tried again after this long."""


@dataclass(frozen=True, slots=True)
class JobLimits:
    """When a job may start, and when a client is lost to its runs."""

    max_running_jobs: int = 4
    min_registered: int = 1
    lost_after_s: float = 15.0


class Jobs:
    """The jobs of one server during one tenure; ``serve`` is its life.

    What belongs to a run is in the folder *runs*, which a project's servers share; or they share *objects*, with which
    each can go on with what another has begun. *workspace* is this server's alone.
    """

    def __init__(
        self,
        services: RunServices,
        *,
        workspace: Path,
        runs: Path,
        objects: Objects | None = None,
        clients: Clients,
        limits: JobLimits,
    ) -> None:
        self._services = services
        self._workspace = workspace
        self._folders = RunFolders(runs, services.epoch, objects)
        self._leftovers = Leftovers(services.store, services.store_id, services.cell, self._folders)
        self._clients = clients
        self._limits = limits
        self._runs: dict[JobId, ActiveRun] = {}
        self._logs = LongLogs()
        self._lives: dict[JobId, asyncio.Task[None]] = {}
        self._taking: dict[JobId, JobRecord] = {}
        self._postponed: dict[JobId, tuple[float, str, str]] = {}  # until when, why, and the code of that
        self._waiting: dict[JobId, Wait] = {}
        self._fetching: dict[JobId, float] = {}
        self._deploying: dict[JobId, Deployment] = {}
        self._held_up: dict[JobId, StoreTrouble] = {}
        self._schedule_held_up: StoreTrouble | None = None
        self._taking_up: dict[JobId, TakingUp] = {}
        self._known: dict[ClientName, frozenset[JobId]] = {}
        self._ended: dict[JobId, asyncio.Event] = {}
        self._in_doubt: set[JobId] = set()  # ended perhaps, and not announced
        self._changed = asyncio.Event()
        self._suspects = asyncio.Event()
        self._accepting = True
        self._knows_runs = False
        self._has_left = False
        self._loop = asyncio.get_running_loop()
        self.board = JobBoard(
            services.store,
            services.cell,
            runs=self._runs,
            waiting_of=self._waiting_of,
            folder_of=self.run_folder,
        )
        RunDesk(services.cell, self._runs, demand_taken_up=self.demand_taken_up)

    @property
    def services(self) -> RunServices:
        """What these jobs work with: the store and the epoch under which they write to it, the cell, the clocks."""
        return self._services

    # its life

    async def serve(self, ready: asyncio.Event) -> None:
        """Take up the committed runs, set *ready*, and schedule jobs until cancelled; then park what runs."""
        async with asyncio.TaskGroup() as group:
            self._group = group
            await self._take_up()
            self._knows_runs = True
            ready.set()
            group.create_task(self._watch_clients(), name="notice lost clients")
            if (objects := self._folders.objects) is not None:
                group.create_task(self._leftovers.clear_bucket(objects), name="clear the bucket")
            try:
                await self._schedule()
            finally:
                self._knows_runs = False
                self._has_left = True
                for ended in self._ended.values():  # nobody here sees the end of what others go on with
                    ended.set()
                for life in self._lives.values():
                    life.cancel()

    async def _take_up(self) -> None:
        running = await self._services.store.jobs(states=(JobState.RUNNING,))
        await self._leftovers.clear_folders({record.job_id for record in running}, group=self._group)
        for record in running:
            self._taking_up[record.job_id] = TakingUp(frozenset(record.clients), self._services.wall())
            self._live(record, self._resume(record))

    async def _resume(self, record: JobRecord) -> None:
        """Go on with a run of an earlier tenure, as soon as all that it needs is here."""
        folder = self.run_folder(record.job_id)
        state = await self._taken_over(record, folder)
        run = Run.resumed(
            record.job_id,
            record.clients,
            process_tries=record.spec.process_tries,
            now=self._services.now(),
            committed=-1 if state.state is None else state.state.round,
            tasks=state.tasks,
            answers=state.answers,
        )
        _log.info("run taken up", extra={"job": record.job_id, "round": run.round})
        await self._run(record, run, folder, resumed=True)

    async def _taken_over(self, record: JobRecord, folder: RunFolder) -> RunState:
        """Return where the run stands, when its code and all tensors that this takes are here.

        Raises:
            TensorsLost: they are nowhere any more.
        """
        while True:
            try:
                await folder.have_package(record)
                state = await self._services.store.snapshot(record.job_id)
                lost = await folder.take_over(needed_tensors(state))
                if not lost:
                    return state
                return await without_lost(self._services.store, self._services.epoch, record.job_id, state, lost)
            except StoreFailed as failed:
                _log.error("taking a run up waits", extra={"job": record.job_id, "reason": failed.reason})
                self._taking_up[record.job_id] = replace(self._taking_up[record.job_id], reason=failed.reason)
            await asyncio.sleep(POSTPONED_S)  # a bucket, or a full disk, tells nobody when it is well again

    async def _schedule(self) -> None:
        while True:
            self._changed.clear()
            delay = await self._planned()
            try:
                async with asyncio.timeout(delay):
                    await self._changed.wait()
            except TimeoutError:
                continue

    async def _planned(self) -> float | None:
        try:
            delay = await self._plan()
        except StoreFailed as failed:
            # A full disk or a locked database must not end the jobs that run; it tells nobody when it is over.
            _log.error("the schedule waits for the store", extra={"reason": failed.reason})
            self._schedule_held_up = self._trouble(failed, self._schedule_held_up)
            return POSTPONED_S
        self._schedule_held_up = None
        return delay

    def _trouble(self, failed: StoreFailed, before: StoreTrouble | None) -> StoreTrouble:
        return StoreTrouble(failed.reason, self._services.wall() if before is None else before.since)

    async def _plan(self) -> float | None:
        """Start or give up the jobs whose time it is; return in how many seconds the next one's is."""
        await self._settle_doubts()
        now_s, now = self._services.wall(), self._services.now()
        submitted = await self._submitted()
        self._postponed = {job_id: later for job_id, later in self._postponed.items() if later[0] > now}
        postponed = {
            record.job_id: Wait(later[1], record.submitted_at + record.spec.start_within_s, later[2])
            for record in submitted
            if (later := self._postponed.get(record.job_id)) is not None
        }
        submitted = [record for record in submitted if record.job_id not in postponed]
        decisions: dict[JobId, Decision] = plan(
            submitted,
            clients=self._clients.candidates(self._jobs_at),
            running_jobs=len(self._lives),
            max_running_jobs=self._limits.max_running_jobs,
            min_registered=self._limits.min_registered,
            now_s=now_s,
            absent=self._services.absent(),
        )
        self._waiting = postponed | {job_id: wait for job_id, wait in decisions.items() if isinstance(wait, Wait)}
        for record in submitted:
            try:
                await self._decided(record, decisions[record.job_id])
            except Conflict as moved:  # it was aborted since it was looked up
                _log.info("not scheduled", extra={"job": record.job_id, "reason": moved.reason})
        delays = [at - now for at, _, _ in self._postponed.values()]
        if (give_up := next_deadline(decisions.values())) is not None:
            delays.append(give_up - now_s)
        return max(min(delays), 0.0) if delays else None

    async def _submitted(self) -> list[JobRecord]:
        """Return the jobs that wait to be scheduled, among them those that are scheduled and not being started.

        An earlier tenure has left them, or the store has taken it that they are scheduled and could not say so.
        """
        found = []
        for record in await self._services.store.jobs(states=(JobState.SUBMITTED, JobState.SCHEDULED)):
            again = record
            if record.state is JobState.SCHEDULED:
                if record.job_id in self._lives:
                    continue
                again = move(record, JobState.SUBMITTED, at=self._services.wall())
                try:
                    await self._services.store.replace_job(self._services.epoch, again, was=record.state)
                except Conflict as moved:
                    _log.info("not scheduled again", extra={"job": record.job_id, "reason": moved.reason})
                    continue
            found.append(again)
        return found

    async def _decided(self, record: JobRecord, decision: Decision) -> None:
        match decision:
            case Start(clients=clients) if self._accepting:
                scheduled = move(record, JobState.SCHEDULED, at=self._services.wall())
                scheduled = msgspec.structs.replace(scheduled, clients=clients)
                await self._services.store.replace_job(self._services.epoch, scheduled, was=record.state)
                self._live(scheduled, self._launch(scheduled))
            case GiveUp(reason=reason):
                await self._fail(record, NO_CLIENTS, reason)
            case _:
                pass

    async def shorten_logs(self) -> None:
        """Shorten the logs of the runs here, as far as they are too long."""
        await self._logs.shorten([run.folder.log for run in self._runs.values()])

    async def _watch_clients(self) -> None:
        """Tell runs of clients that are lost: woken by the earliest deadline of a suspect client, or by a change."""
        while True:
            self._suspects.clear()
            lost_after_s = self._limits.lost_after_s
            for run in list(self._runs.values()):
                run.processes.lose(lost_after_s)
            deadlines = [run.run.next_deadline(lost_after_s) for run in self._runs.values()]
            deadline = min((at for at in deadlines if at is not None), default=None)
            delay = None if deadline is None else max(deadline - self._services.now(), 0.0)
            try:
                async with asyncio.timeout(delay):
                    await self._suspects.wait()
            except TimeoutError:
                continue

    # a job's way

    async def submit(self, package: Path, *, submitter: str) -> JobRecord:
        """Store the job whose package is the file *package*, and return its record.

        Raises:
            JobInvalid: the package or its definition does not hold, or a handler refuses it.
            StoreFailed: it is not stored, or that cannot be told now.
        """
        try:
            return await submit(package, submitter=submitter, services=self._services, folders=self._folders)
        finally:
            self.wake()  # the store may have it, whoever hears of that

    async def _launch(self, record: JobRecord) -> None:
        """Deploy a scheduled job and run it to its end."""
        context = FLContext("server", project=self._services.project, job_id=record.job_id)
        if (refused := self._services.handlers.ask(EventType.BEFORE_JOB_LAUNCH, context)) is not None:
            await self._fail(record, "launch-refused", f"the server does not launch it: {refused}")
            return
        folder = self.run_folder(record.job_id)
        self._fetching[record.job_id] = self._services.wall()
        try:
            await folder.have_package(record)
        except StoreFailed as failed:
            if self._is_past_its_time(record):
                await self._fail(record, failed.code, failed.reason)
            else:
                await self._postpone(record, failed.reason, failed.code)
            return
        finally:
            del self._fetching[record.job_id]
        began = self._services.wall()
        self._deploying[record.job_id] = Deployment(frozenset(record.clients), began, began + DEPLOY_TIMEOUT_S)
        try:
            outcomes = await asyncio.gather(
                *(self._deploy(record, client) for client in record.clients), return_exceptions=True
            )
        finally:
            del self._deploying[record.job_id]
        refusals = {
            client: outcome
            for client, outcome in zip(record.clients, outcomes, strict=True)
            if isinstance(outcome, BaseException)
        }
        remaining = tuple(client for client in record.clients if client not in refusals)
        for client, error in refusals.items():
            if not isinstance(error, HanseError):
                raise error
            self.board.emit(
                JobEvent(record.job_id, "client_refused", self._services.wall(), client=client, text=error.reason)
            )
        if len(remaining) < record.spec.min_clients or not set(record.spec.required_clients) <= set(remaining):
            await self._not_deployed(
                record, {client: error for client, error in refusals.items() if isinstance(error, HanseError)}
            )
            return
        running = move(record, JobState.RUNNING, at=self._services.wall())
        running = msgspec.structs.replace(running, clients=remaining)
        await self._store_move(running, was=record.state)
        self._tell(EventType.JOB_DEPLOYED, record.job_id)
        self._tell(EventType.JOB_STARTED, record.job_id)
        run = Run(record.job_id, remaining, process_tries=record.spec.process_tries, now=self._services.now())
        await self._run(running, run, folder, resumed=False)

    async def _store_move(self, record: JobRecord, *, was: JobState) -> None:
        """Store *record* in place of the job's, which is in state *was*, as soon as the store takes that."""
        has_failed = False
        while True:
            try:
                await self._services.store.replace_job(self._services.epoch, record, was=was)
            except Conflict:
                if has_failed and await is_stored(self._services.store, record):
                    return
                raise
            except StoreFailed as failed:
                _log.error("a job waits for the store", extra={"job": record.job_id, "reason": failed.reason})
                has_failed = True
                self._held_up[record.job_id] = self._trouble(failed, self._held_up.get(record.job_id))
                await asyncio.sleep(POSTPONED_S)  # a full disk tells nobody when it no longer is
            else:
                self._held_up.pop(record.job_id, None)
                return

    async def _deploy(self, record: JobRecord, client: ClientName) -> None:
        try:
            await deploy(self._services.cell, record, client)
        finally:
            waited_for = self._deploying[record.job_id]
            self._deploying[record.job_id] = replace(waited_for, clients=waited_for.clients - {client})

    async def _not_deployed(self, record: JobRecord, refusals: Mapping[ClientName, HanseError]) -> None:
        """End a job that too few clients take; one that they could not take just now is scheduled again, in time."""
        final = {client: error for client, error in refusals.items() if not error.retryable}
        if not final and self._is_past_its_time(record):
            final = dict(refusals)
        why = "; ".join(said_of(client, error.reason) for client, error in (final or refusals).items())
        client, error = next(iter((final or refusals).items()))
        if final:
            await self._fail(record, code_of(error), why, client=client)
            return
        await self._postpone(record, why, code_of(error))

    def _is_past_its_time(self, record: JobRecord) -> bool:
        return self._services.wall() >= record.submitted_at + record.spec.start_within_s

    async def _postpone(self, record: JobRecord, why: str, code: str) -> None:
        """Have a scheduled job scheduled again, but not at once."""
        again = move(record, JobState.SUBMITTED, at=self._services.wall())
        await self._store_move(again, was=record.state)
        self._postponed[record.job_id] = (
            self._services.now() + POSTPONED_S,
            shortened(why),
            shortened(code, MAX_CODE_CHARS),
        )
        self.wake()

    async def _run(self, record: JobRecord, run: Run, folder: RunFolder, *, resumed: bool) -> None:
        active = ActiveRun(
            record,
            run,
            folder,
            self._services,
            emit=self.board.emit,
            suspect=self._suspects.set,
        )
        self._runs[record.job_id] = active
        self._taking_up.pop(record.job_id, None)
        self._suspects.set()  # all clients of a run that is taken up are, until they come
        try:
            for client in record.clients:  # those whose process went on while the server was away
                peer = self._services.cell.peer(job_cell(client, record.job_id))
                if peer is not None and active.processes.stream_up(client, peer):
                    self._spawn_for(active, partial(active.send_out, client))  # which may wait, and the run lives now
            heard = {client: record.job_id in self._known[client] for client in record.clients if client in self._known}
            ended = await active.live(resumed=resumed, heard=heard)
            await self._leftovers.delete_tensors(folder)
            self._announce_end(ended)
        finally:
            del self._runs[record.job_id]
            self._lives.pop(record.job_id, None)  # whoever asks from now on finds no job that is alive

    async def _fail(self, record: JobRecord, code: str, reason: str, *, client: str = "") -> None:
        await self._end_idle(record, JobState.FAILED, code=code, reason=reason, client=client)

    async def _end_idle(
        self, record: JobRecord, to: JobState, *, code: str = "", reason: str = "", client: str = ""
    ) -> None:
        """End a job that does not run."""
        reason = shortened(reason)
        code = shortened(code, MAX_CODE_CHARS)
        ended = move(record, to, at=self._services.wall(), code=code, reason=reason, client=client)
        try:
            await self._end_stored(ended, was=record.state)
        except (StoreFailed, asyncio.CancelledError):
            self._in_doubt.add(record.job_id)
            self.wake()
            raise
        self._has_ended_idle(ended)

    async def _end_stored(self, ended: JobRecord, *, was: JobState) -> None:
        try:
            await self._services.store.end_run(self._services.epoch, ended, was=was)
        except StoreFailed:
            if not await is_stored(self._services.store, ended):
                raise

    async def _settle_doubts(self) -> None:
        """Announce the ends of which the store could not say that it has them."""
        for job_id in tuple(self._in_doubt):
            record = await self._services.store.job(job_id)
            if job_id not in self._in_doubt:
                continue
            self._in_doubt.discard(job_id)
            if record.state in ENDED:
                self._has_ended_idle(record)

    def _has_ended_idle(self, record: JobRecord) -> None:
        """Tell everybody of the end of a job that did not run."""
        self._waiting.pop(record.job_id, None)
        notice = EventType.JOB_FAILED if record.state is JobState.FAILED else EventType.JOB_ABORTED
        self._tell(notice, record.job_id, reason=record.reason)
        for client in record.clients:
            self._leftovers.abort_at(client, record.job_id, record.reason or record.state.value)
        self._announce_end(record)

    def _announce_end(self, record: JobRecord) -> None:
        _log.info("job ended", extra={"job": record.job_id, "state": record.state.value, "reason": record.reason})
        if (ended := self._ended.pop(record.job_id, None)) is not None:
            ended.set()
        self.board.close(record.job_id)
        self.wake()

    def _live(self, record: JobRecord, life: Coroutine[Any, Any, None]) -> None:
        """Give a job a task of its own; whatever goes wrong there ends that job and no other."""
        job_id = record.job_id
        task = start_in(self._group, life, partial(self._guarded, job_id), name=f"job {job_id}")
        if task is not None:
            self._lives[job_id], self._taking[job_id] = task, record
            task.add_done_callback(lambda _: self._has_lived(job_id))

    def _has_lived(self, job_id: JobId) -> None:
        self._lives.pop(job_id, None)
        del self._taking[job_id]
        self._taking_up.pop(job_id, None)
        self._held_up.pop(job_id, None)
        self.wake()

    async def _guarded(self, job_id: JobId, life: Coroutine[Any, Any, None]) -> None:
        try:
            await life
        except StaleEpoch as deposed:
            _log.warning("run given up", extra={"job": job_id, "reason": deposed.reason})
        except Exception as error:  # noqa: BLE001 - one job's trouble ends that job, with a reason, and no other
            _log.exception("a job's task failed", extra={"job": job_id})
            await self._give_up(job_id, cause_of(error, doing=f"running job {job_id}"))

    async def _give_up(self, job_id: JobId, error: HanseError) -> None:
        """End a job whose task failed with *error*, as soon as the store takes that."""
        while True:
            try:
                await self._end_failing(job_id, error)
            except Conflict:  # it went on at this very moment: look again how far it is
                continue
            except StoreFailed as failed:
                _log.error("ending a job waits for the store", extra={"job": job_id, "reason": failed.reason})
                self._held_up[job_id] = self._trouble(failed, self._held_up.get(job_id))
                await asyncio.sleep(POSTPONED_S)  # a full disk tells nobody when it no longer is
            else:
                return

    async def _end_failing(self, job_id: JobId, error: HanseError) -> None:
        if (active := self._runs.get(job_id)) is not None:
            await active.end(JobState.FAILED, code=code_of(error), reason=error.reason)
            return
        if job_id in self._in_doubt:
            await self._settle_doubts()
        record = await self._services.store.job(job_id)
        if record.state in ENDED:
            self._announce_end(record)
            return
        await self._fail(record, code_of(error), error.reason)
        await self._leftovers.delete_tensors(self.run_folder(job_id))

    async def abort(self, job_id: JobId, *, reason: str) -> JobRecord:
        """Abort a job that has not ended, and return its record.

        Raises:
            NotFound: there is no such job.
            Conflict: it has ended.
        """
        while True:
            # First of all: the store may have its end, and not have been able to say so.
            if (active := self._runs.get(job_id)) is not None and not active.has_ended:
                await active.end(JobState.ABORTED, code="aborted", reason=reason)
                return active.record
            record = await self._services.store.job(job_id)
            if record.state in ENDED:
                raise Conflict(f"job {job_id}", state=record.state.value, wanted="aborted")
            if job_id in self._runs:  # it began while the store was asked
                continue
            if (life := self._lives.get(job_id)) is not None:
                life.cancel()
                await asyncio.gather(life, return_exceptions=True)
                record = await self._services.store.job(job_id)
            try:
                await self._end_idle(record, JobState.ABORTED, code="aborted", reason=reason)
            except Conflict:  # it went on at this very moment: look again how far it is
                continue
            if record.state is JobState.RUNNING:
                await self._leftovers.delete_tensors(self.run_folder(job_id))
            return await self._services.store.job(job_id)

    async def wait(self, job_id: JobId) -> JobRecord:
        """Return the job's record once it has ended.

        Raises:
            NotFound: there is no such job.
            NotInService: this server has left its jobs before the end; where they go on is not known here.
        """
        while True:
            # The event comes before the look: what ends in between has set it.
            ended = self._ended.setdefault(job_id, asyncio.Event())
            try:
                record = await self._services.store.job(job_id)
            except NotFound:
                self._ended.pop(job_id, None)
                raise
            if record.state in ENDED:
                ended.set()
                self._ended.pop(job_id, None)
                return record
            if self._has_left:
                raise NotInService
            await ended.wait()

    def current_task(self, client: ClientName) -> tuple[JobId, int] | None:
        """Return the job and round that *client* works for: of its runs, the one that began last."""
        runs = [run for run in self._runs_of(client) if not run.has_ended]
        return (runs[-1].job_id, runs[-1].run.round) if runs else None

    def hand_out_again(self) -> None:
        """Send each client again what it has to answer; from any thread."""
        for run in list(self._runs.values()):
            self._loop.call_soon_threadsafe(self._spawn_for, run, run.hand_out_again)

    def _spawn_for(self, run: ActiveRun, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        start_in(self._group, work(), partial(self._guarded, run.job_id), name=f"work for {run.job_id}")

    def stop_handing_out(self) -> None:
        """Start no further job; what runs goes on."""
        self._accepting = False

    def wake(self) -> None:
        """Have the schedule looked at again; from the event loop."""
        self._changed.set()

    def wake_soon(self) -> None:
        """Have the schedule looked at again; from any thread."""
        self._loop.call_soon_threadsafe(self._changed.set)

    # what clients tell

    def heartbeat(
        self, client: ClientName, reported: Collection[JobId], idle: Collection[JobId] = ()
    ) -> tuple[JobId, ...]:
        """Take note of the jobs that *client* reports, and return those that it should abort; from any thread.

        Of those that are *idle* there it is told which have ended: their end may have come while it was away.
        """
        # In this order: a run that is taken up at this moment is in the one or the other, or in both.
        expected = {job_id for job_id, coming in list(self._taking_up.items()) if client in coming.clients}
        expected |= {job_id for job_id, run in list(self._runs.items()) if client in run.run.clients}
        sync = heartbeat_sync(reported, expected=expected, previously=self._known.get(client, frozenset()))
        self._known[client] = sync.known
        self._loop.call_soon_threadsafe(self._heard, client, sync, expected, tuple(idle))
        starting = set(self._lives) - set(self._runs)
        return tuple(job_id for job_id in sync.abort if job_id not in starting)[:MAX_ABORTS]

    def _heard(self, client: ClientName, sync: Sync, expected: Collection[JobId], idle: Collection[JobId]) -> None:
        for job_id in expected:
            if (run := self._runs.get(job_id)) is not None:
                run.processes.heard(client, reported=job_id in sync.known, dead=job_id in sync.dead)
        self._leftovers.end_at(client, [job_id for job_id in idle if job_id not in self._lives], group=self._group)

    def registered(self, client: ClientName) -> None:
        """Take note that *client*'s agent has registered (anew); from any thread."""
        self._known.pop(client, None)
        self._loop.call_soon_threadsafe(self._agent_is_new, client)

    def _agent_is_new(self, client: ClientName) -> None:
        for run in self._runs_of(client):
            run.processes.agent_is_new(client)
        self.wake()

    def gone(self, client: ClientName) -> None:
        """Take note that *client* was logged out; from any thread. Its runs see it suspect, and lost in time."""
        self._known.pop(client, None)
        self._loop.call_soon_threadsafe(self._agent_is_gone, client)

    def _agent_is_gone(self, client: ClientName) -> None:
        for run in self._runs_of(client):
            run.processes.stream_down(client, None)
        self._suspects.set()
        self.wake()

    def failed_at(self, client: ClientName, failure: JobFailure) -> None:
        """Take *client*'s word that a job failed there for good: the run ends with that reason; from any thread.

        Raises:
            NotFound: no such job runs.
            Unauthorized: the client takes no part in it.
            ProtocolError: it is of no kind that there is.
        """
        run = self._run_of(failure.job_id)
        if client not in run.run.clients:
            raise Unauthorized(client, f"report on job {failure.job_id}", needs="to take part in it")
        if not failure.code and f"client-{failure.kind}" not in CODES:
            raise ProtocolError("JobFailure.kind", got=failure.kind, expected="'config', 'exception' or 'unsafe'")
        self._loop.call_soon_threadsafe(self._end_failed, run, client, failure)

    def _end_failed(self, run: ActiveRun, client: ClientName, failure: JobFailure) -> None:
        code, reason = failure.code or f"client-{failure.kind}", said_of(client, shortened(failure.reason))
        tail = failure.log_tail
        end = partial(run.end_once_stored, JobState.FAILED, code=code, reason=reason, client=client, log_tail=tail)
        self._spawn_for(run, end)

    def link_up(self, peer: Peer) -> None:
        """Take note that a peer can be reached."""
        participant, job_id = split_cell(peer.fqcn)
        if job_id is None:
            self.wake()
        elif (run := self._runs.get(job_id)) is not None and participant in run.run.clients:
            self._spawn_for(run, lambda: run.cell_up(ClientName(participant), peer))

    def link_down(self, peer: Peer) -> None:
        """Take note that a peer can no longer be reached."""
        participant, job_id = split_cell(peer.fqcn)
        self.board.leave(peer.fqcn)
        if job_id is not None and (run := self._runs.get(job_id)) is not None and participant in run.run.clients:
            run.processes.stream_down(ClientName(participant), peer)
        elif job_id is None:
            for run in self._runs_of(ClientName(participant)):
                run.processes.stream_down(ClientName(participant), peer)
        self._suspects.set()
        self.wake()

    # where tensors lie

    def package_files(self, job_id: JobId) -> TensorFiles:
        """Return the files that hold the job's package."""
        return TensorFiles(self.run_folder(job_id).package)

    async def result_files(self, job_id: JobId) -> TensorFiles:
        """Return the files that hold the job's result, if it has one.

        Raises:
            NotFound: there is no such job, or its result is lost.
            StoreFailed: its result is not to be had now.
        """
        folder = self.run_folder(job_id)
        if folder.mirror is not None:
            await folder.have_result(await self._services.store.job(job_id))
        elif not folder.path.is_dir():
            raise NotFound("job", job_id)
        return TensorFiles(folder.result)

    def upload_files(self, submitter: str) -> TensorFiles:
        """Return the files into which *submitter* uploads packages."""
        return TensorFiles(self._workspace / "uploads" / submitter)

    def run_files(self, job_id: JobId, participant: str, *, write: bool) -> Files | None:
        """Return the tensor files of a running job in which *participant* takes part, else ``None``.

        Raises:
            NotInService: the job is to go on here, and does not yet.
        """
        if (run := self._runs.get(job_id)) is None:
            self.demand_taken_up(job_id)
        if run is None or run.has_ended or participant not in run.run.clients:
            return None
        return run.inbox(ClientName(participant)) if write else run.files

    def demand_alive(self, job_id: JobId) -> None:
        """Return if the job is being started or runs, or while that is not known.

        Raises:
            NotFound: it does not.
        """
        run = self._runs.get(job_id)
        lives = job_id in self._lives and (run is None or not run.has_ended)
        if self._knows_runs and not lives:
            raise NotFound("running job", job_id)

    def demand_taken_up(self, job_id: JobId) -> None:
        """Return unless the job is, or may be, a run of this project that goes on, but not here at this moment.

        Raises:
            NotInService: it is still to be taken up here, or this server has left its jobs.
        """
        if job_id in self._taking_up:
            raise NotInService(f"Server not in service: it takes up job {job_id}")
        if not self._knows_runs:
            raise NotInService

    def takes_part(self, job_id: JobId, client: str) -> bool:
        """Return whether *client* takes part in a running job, or is asked to."""
        if (run := self._runs.get(job_id)) is not None:
            return client in run.run.clients
        record = self._taking.get(job_id)
        return record is not None and client in record.clients

    # parts

    def run_folder(self, job_id: JobId) -> RunFolder:
        """Return where the job's run keeps its things."""
        return self._folders.of(job_id)

    def _waiting_of(self, record: JobRecord) -> tuple[Waiting, ...]:
        """Return what a job that has not ended waits for."""
        if (run := self._runs.get(record.job_id)) is not None:
            return run.waiting()
        if (trouble := self._held_up.get(record.job_id)) is not None:
            return (waiting_of_held_up(trouble),)
        if (since := self._fetching.get(record.job_id)) is not None:
            return (waiting_of_fetching(since),)
        if (deployment := self._deploying.get(record.job_id)) is not None:
            return waiting_of_scheduled(deployment)
        if (taking_up := self._taking_up.get(record.job_id)) is not None:
            return waiting_of_taking_up(taking_up)
        wait, held_up = self._waiting.get(record.job_id), self._schedule_held_up
        return (
            *((waiting_of_held_up(held_up),) if held_up is not None else ()),
            *(waiting_of_submitted(record, wait, absent=self._services.absent()) if wait is not None else ()),
        )

    def _run_of(self, job_id: JobId) -> ActiveRun:
        if (run := self._runs.get(job_id)) is None:
            self.demand_taken_up(job_id)
            raise NotFound("running job", job_id)
        return run

    def _runs_of(self, client: ClientName) -> list[ActiveRun]:
        return [run for run in self._runs.values() if client in run.run.clients]

    def _jobs_at(self, client: ClientName) -> list[JobRecord]:
        return [record for record in self._taking.values() if client in record.clients]

    def _tell(self, notice: EventType, job_id: JobId, *, reason: str = "") -> None:
        context = FLContext("server", project=self._services.project, job_id=job_id, reason=reason)
        self._services.handlers.tell(notice, context)
        self.board.emit(JobEvent(job_id, notice.value, self._services.wall(), text=reason))


def said_of(client: ClientName, reason: str) -> str:
    """Return *reason* with *client*, the one that it is about, named in it."""
    is_named = re.search(rf"(?<![\w-]){re.escape(client)}(?![\w-])", reason) is not None
    return reason if is_named else f"{reason} (at {client})"
