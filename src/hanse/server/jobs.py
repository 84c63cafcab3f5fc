"""The jobs of one server: submitted, scheduled when their clients are there, run, and taken up again after a restart.

One task schedules: it wakes when something changed (a job, a client, a deadline) and acts on what
``coordination.schedule`` decides. Each job that is alive has a task of its own; one that runs is an ``ActiveRun``. All
of it lives on the event loop.
"""

import asyncio
import logging
from collections.abc import Callable, Collection, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import msgspec

from hanse.coordination.runs import Run
from hanse.coordination.schedule import NO_CLIENTS, Decision, GiveUp, Start, Wait, next_deadline, plan
from hanse.coordination.waiting import TakingUp
from hanse.errors import Conflict, HanseError, NotFound, NotInService, StaleEpoch, StoreFailed
from hanse.events import EventType, FLContext
from hanse.ids import ClientName, JobId, job_cell
from hanse.job import ENDED, JobRecord, JobState, move
from hanse.launch.long_logs import LongLogs
from hanse.messages import JobEvent, Waiting
from hanse.server.active_run import ActiveRun
from hanse.server.bounds import MAX_CODE_CHARS, shortened
from hanse.server.causes import cause_of, code_of, said_of
from hanse.server.client_processes import deploy
from hanse.server.client_watch import ClientWatch
from hanse.server.clients import Clients
from hanse.server.job_board import JobBoard
from hanse.server.job_files import JobFiles
from hanse.server.job_waits import JobWaits
from hanse.server.leftovers import Leftovers
from hanse.server.lifetime import start_in
from hanse.server.live_jobs import LiveJobs
from hanse.server.run_desk import RunDesk
from hanse.server.run_folder import RunFolder, RunFolders
from hanse.server.run_services import RunServices
from hanse.server.submission import submit
from hanse.server.take_up import FETCH_WITHIN_S, fetch, take_over
from hanse.storage.objects import Objects
from hanse.storage.records import is_stored

_log = logging.getLogger(__name__)

POSTPONED_S: Final = 5.0
"""A job that its clients could not take just now (a full disk, a broken line) is tried again after this long."""


@dataclass(frozen=True, slots=True)
class Postponed:
    """A job is tried again at the monotonic time *until*, because of what *why* says and *code* names."""

    until: float
    why: str
    code: str


@dataclass(frozen=True, slots=True)
class JobLimits:
    """When a job may start, and when a client is lost to its runs."""

    max_running_jobs: int = 4
    min_registered: int = 1
    lost_after_s: float = 15.0


class Jobs:
    """The jobs of one server during one tenure; ``serve`` is its life.

    *live* has those that are alive, *files* their files; *client_watch* hears their clients; *board* shows them.

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
        self._folders = RunFolders(runs, services.epoch, objects)
        self._leftovers = Leftovers(services.store, services.store_id, services.cell, self._folders)
        self._clients = clients
        self._limits = limits
        self._logs = LongLogs()
        self._postponed: dict[JobId, Postponed] = {}
        self._ended: dict[JobId, asyncio.Event] = {}
        self._in_doubt: set[JobId] = set()  # ended perhaps, and not announced
        self._changed = asyncio.Event()
        self._accepting = True
        self._has_left = False
        self._loop = asyncio.get_running_loop()
        self._waits = JobWaits(wall=services.wall, absent=services.absent)
        self.live = LiveJobs()
        self.files = JobFiles(self.live, services.store, self._folders, workspace=workspace)
        self.client_watch = ClientWatch(
            self.live,
            lost_after_s=limits.lost_after_s,
            now=services.now,
            spawn=self._spawn_for,
            idle=self._end_left_at,
            changed=self.wake,
        )
        self.board = JobBoard(
            services.store,
            services.cell,
            runs=self.live.runs,
            waiting_of=self._waiting_of,
            folder_of=self.run_folder,
        )
        RunDesk(services.cell, self.live)

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
            self.live.are_known = True
            ready.set()
            group.create_task(self.client_watch.watch(), name="notice lost clients")
            if (objects := self._folders.objects) is not None:
                group.create_task(self._leftovers.clear_bucket(objects), name="clear the bucket")
            try:
                await self._schedule()
            finally:
                self.live.are_known = False
                self._has_left = True
                for ended in self._ended.values():  # nobody here sees the end of what others go on with
                    ended.set()
                self.live.cancel()

    async def _take_up(self) -> None:
        running = await self._services.store.jobs(states=(JobState.RUNNING,))
        await self._leftovers.clear_folders({record.job_id for record in running}, group=self._group)
        for record in running:
            self._begin_again(record)

    def _begin_again(self, record: JobRecord) -> None:
        """Have a run taken up that is to go on here."""
        began = self._services.wall()
        until = began + self._services.mend_within_s
        self.live.taking_up[record.job_id] = TakingUp(frozenset(record.clients), began, until)
        self._begin(record, self._resume(record))

    async def _resume(self, record: JobRecord) -> None:
        """Go on with a run of an earlier tenure, as soon as all that it needs is here."""
        folder = self.run_folder(record.job_id)
        state = await take_over(record, folder, self._services, failed=partial(self._not_taken_up, record.job_id))
        run = Run.resumed(
            record.job_id,
            record.clients,
            process_tries=record.spec.process_tries,
            now=self._services.now(),
            committed=-1 if state.state is None else state.state.round,
            tasks=state.tasks,
            answers=state.answers,
            failed={failed.client: failed.reason for failed in record.failed_clients},
        )
        _log.info("run taken up", extra={"job": record.job_id, "round": run.round})
        await self._run(record, run, folder, resumed=True)

    def _not_taken_up(self, job_id: JobId, failed: StoreFailed) -> None:
        self.live.taking_up[job_id] = replace(self.live.taking_up[job_id], reason=failed.reason)

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
            self._waits.schedule_held_up(failed, again_in_s=POSTPONED_S)
            self._changed.clear()  # an end that the store has not taken is to be looked at again, and not at once
            return POSTPONED_S
        self._waits.schedule_goes_on()
        return delay

    async def _plan(self) -> float | None:
        """Start or give up the jobs whose time it is; return in how many seconds the next one's is."""
        await self._settle_doubts()
        now_s, now = self._services.wall(), self._services.now()
        submitted = await self._submitted()
        self._postponed = {job_id: later for job_id, later in self._postponed.items() if later.until > now}
        postponed = {
            record.job_id: Wait(
                later.why,
                max(record.submitted_at + record.spec.start_within_s, now_s + later.until - now),  # then it is tried
                later.code,
            )
            for record in submitted
            if (later := self._postponed.get(record.job_id)) is not None
        }
        submitted = [record for record in submitted if record.job_id not in postponed]
        decisions: dict[JobId, Decision] = plan(
            submitted,
            clients=self._clients.candidates(self.live.records_of),
            running_jobs=len(self.live),
            max_running_jobs=self._limits.max_running_jobs if self._accepting else 0,
            min_registered=self._limits.min_registered,
            now_s=now_s,
            absent=self._services.absent(),
        )
        waits = {job_id: wait for job_id, wait in decisions.items() if isinstance(wait, Wait)}
        self._waits.scheduled(postponed | waits)
        for record in submitted:
            try:
                await self._decided(record, decisions[record.job_id])
            except Conflict as moved:  # it was aborted since it was looked up
                _log.info("not scheduled", extra={"job": record.job_id, "reason": moved.reason})
        delays = [later.until - now for later in self._postponed.values()]
        if (give_up := next_deadline(decisions.values())) is not None:
            delays.append(give_up - now_s)
        return max(min(delays), 0.0) if delays else None

    async def _submitted(self) -> list[JobRecord]:
        """Return the jobs that wait to be scheduled, among them those that are scheduled and have no task of their own.

        An earlier tenure has left those, or the store has taken it that they are scheduled and could not say so.
        """
        found = []
        for record in await self._services.store.jobs(states=(JobState.SUBMITTED, JobState.SCHEDULED)):
            if record.job_id in self.live:  # it is being started, or put back, of which the store may know already
                continue
            again = record
            if record.state is JobState.SCHEDULED:
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
            case Start(clients=clients):
                scheduled = move(record, JobState.SCHEDULED, at=self._services.wall())
                scheduled = msgspec.structs.replace(scheduled, clients=clients)
                await self._services.store.replace_job(self._services.epoch, scheduled, was=record.state)
                self._begin(scheduled, self._launch(scheduled))
            case GiveUp(reason=reason):
                await self._fail(record, NO_CLIENTS, reason)
            case _:
                pass

    async def shorten_logs(self) -> None:
        """Shorten the logs of the runs here, as far as they are too long."""
        await self._logs.shorten([run.folder.log for run in self.live.runs.values()])

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
        try:
            with self._waits.fetching(record.job_id, within_s=FETCH_WITHIN_S):
                await fetch(record, folder)
        except StoreFailed as failed:
            if self._is_past_its_time(record):
                await self._fail(record, failed.code, failed.reason)
            else:
                await self._postpone(record, failed.reason, failed.code)
            return
        with self._waits.deploying(record):
            outcomes = await asyncio.gather(
                *(self._deploy(record, client) for client in record.clients), return_exceptions=True
            )
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
        """Store *record* in place of the job's, which is in state *was*, as soon as the store takes that.

        Raises:
            StoreFailed: it has not taken that for so long that the job is given up.
        """
        has_failed = False
        give_up_at = self._services.now() + self._services.mend_within_s
        while True:
            try:
                await self._services.store.replace_job(self._services.epoch, record, was=was)
            except Conflict:
                if has_failed and await is_stored(self._services.store, record):
                    return
                raise
            except StoreFailed as failed:
                _log.error("a job waits for the store", extra={"job": record.job_id, "reason": failed.reason})
                if self._services.now() > give_up_at:
                    raise
                has_failed = True
                self._waits.held_up(record.job_id, failed, mend_within_s=self._services.mend_within_s)
                await asyncio.sleep(POSTPONED_S)  # a full disk tells nobody when it no longer is
            else:
                self._waits.goes_on(record.job_id)
                return

    async def _deploy(self, record: JobRecord, client: ClientName) -> None:
        try:
            await deploy(self._services.cell, record, client)
        finally:
            self._waits.deployed(record.job_id, client)

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
        until = self._services.now() + POSTPONED_S
        self._postponed[record.job_id] = Postponed(until, shortened(why), shortened(code, MAX_CODE_CHARS))
        self.wake()

    async def _run(self, record: JobRecord, run: Run, folder: RunFolder, *, resumed: bool) -> None:
        active = ActiveRun(
            record,
            run,
            folder,
            self._services,
            emit=self.board.emit,
            suspect=self.client_watch.look,
        )
        self.live.run(active)
        self.client_watch.look()  # all clients of a run that is taken up are, until they come
        try:
            for client in record.clients:  # those whose process went on while the server was away
                peer = self._services.cell.peer(job_cell(client, record.job_id))
                if peer is not None and active.processes.stream_up(client, peer):
                    self._spawn_for(active, partial(active.send_out, client))  # which may wait, and the run lives now
            heard = self.client_watch.heard_of(record.job_id, record.clients)
            ended = await active.live(resumed=resumed, heard=heard)
            await self._leftovers.delete_tensors(folder)
            self._announce_end(ended)
        finally:
            self.live.has_run(record.job_id)

    async def _fail(self, record: JobRecord, code: str, reason: str, *, client: str = "") -> None:
        await self._end_idle(record, JobState.FAILED, code=code, reason=reason, client=client)

    async def _end_idle(
        self, record: JobRecord, to: JobState, *, code: str = "", reason: str = "", client: str = ""
    ) -> None:
        """End a job that does not run."""
        reason = shortened(reason)
        code = shortened(code, MAX_CODE_CHARS)
        ended = move(record, to, at=self._services.wall(), code=code, reason=reason, client=client)
        with self._doubted(record.job_id):
            await self._end_stored(ended, was=record.state)
        self._has_ended_idle(ended)

    @contextmanager
    def _doubted(self, job_id: JobId) -> Iterator[None]:
        """End a job that does not run within the block; where it is not known to have ended, the store is asked."""
        try:
            yield
        except (StoreFailed, asyncio.CancelledError):
            self._in_doubt.add(job_id)
            self.wake()
            raise

    async def _end_stored(self, ended: JobRecord, *, was: JobState) -> None:
        try:
            await self._services.store.end_run(self._services.epoch, ended, was=was)
        except StoreFailed:
            if not await is_stored(self._services.store, ended):
                raise

    async def _settle_doubts(self) -> None:
        """Announce the ends of which the store could not say that it has them; a run that has none goes on."""
        for job_id in tuple(self._in_doubt):
            record = await self._services.store.job(job_id)
            if job_id not in self._in_doubt:
                continue
            self._in_doubt.discard(job_id)
            if record.state in ENDED:
                self._has_ended_idle(record)
            elif record.state is JobState.RUNNING and job_id not in self.live:
                self._begin_again(record)

    def _has_ended_idle(self, record: JobRecord) -> None:
        """Tell everybody of the end of a job that did not run."""
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

    def _begin(self, record: JobRecord, life: Coroutine[Any, Any, None]) -> None:
        """Give a job a task of its own; whatever goes wrong there ends that job and no other."""
        job_id = record.job_id
        task = start_in(self._group, life, partial(self._guarded, job_id), name=f"job {job_id}")
        if task is not None:
            self.live.begin(record, task)
            task.add_done_callback(lambda _: self._has_lived(job_id))

    def _has_lived(self, job_id: JobId) -> None:
        self.live.end(job_id)
        self._waits.goes_on(job_id)
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
                self._waits.end_held_up(job_id, failed, again_in_s=POSTPONED_S)
                await asyncio.sleep(POSTPONED_S)  # a full disk tells nobody when it no longer is
            else:
                return

    async def _end_failing(self, job_id: JobId, error: HanseError) -> None:
        if (active := self.live.runs.get(job_id)) is not None:
            await active.end_once_stored(JobState.FAILED, code=code_of(error), reason=error.reason)
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
            if (active := self.live.runs.get(job_id)) is not None and not active.has_ended:
                await active.end(JobState.ABORTED, code="aborted", reason=reason)
                return active.record
            record = await self._services.store.job(job_id)
            if record.state in ENDED:
                raise Conflict(f"job {job_id}", state=record.state.value, wanted="aborted")
            if job_id in self.live.runs:  # it began while the store was asked
                continue
            if (life := self.live.task_of(job_id)) is not None:
                with self._doubted(job_id):
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

    def hand_out_again(self) -> None:
        """Send each client again what it has to answer; from any thread."""
        for run in list(self.live.runs.values()):
            self._loop.call_soon_threadsafe(self._spawn_for, run, run.hand_out_again)

    def _spawn_for(self, run: ActiveRun, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        start_in(self._group, work(), partial(self._guarded, run.job_id), name=f"work for {run.job_id}")

    def _end_left_at(self, client: ClientName, idle: Collection[JobId]) -> None:
        self._leftovers.end_at(client, idle, group=self._group)

    def stop_handing_out(self) -> None:
        """Start no further job; what runs goes on. From any thread."""
        self._accepting = False
        self.wake_soon()

    def wake(self) -> None:
        """Have the schedule looked at again; from the event loop."""
        self._changed.set()

    def wake_soon(self) -> None:
        """Have the schedule looked at again; from any thread."""
        self._loop.call_soon_threadsafe(self._changed.set)

    # parts

    def run_folder(self, job_id: JobId) -> RunFolder:
        """Return where the job's run keeps its things."""
        return self._folders.of(job_id)

    def _waiting_of(self, record: JobRecord) -> tuple[Waiting, ...]:
        """Return what a job that has not ended waits for."""
        if (run := self.live.runs.get(record.job_id)) is not None:
            return run.waiting()
        return self._waits.of(record, self.live.taking_up.get(record.job_id))

    def _tell(self, notice: EventType, job_id: JobId, *, reason: str = "") -> None:
        context = FLContext("server", project=self._services.project, job_id=job_id, reason=reason)
        self._services.handlers.tell(notice, context)
        self.board.emit(JobEvent(job_id, notice.value, self._services.wall(), text=reason))
