"""The jobs at one site: deployed if the site's policy lets them, each run in a process of its own, always reaped.

What the server asks about one job happens in order, and may be asked twice. A process that ends without having been
asked is reported until the server has heard of it, or wants the job ended.

An agent that stops ends its jobs' processes. One that is killed leaves them, and they go on; the next agent of the same
workspace takes over those that it would have started in the same way, and ends the others. What it took over counts as
running from its first heartbeat on, so the server starts no other.
"""

import asyncio
import hashlib
import importlib.util
import logging
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, ParamSpec, TypeVar

import msgspec

from hanse.cell.transfer import TensorTransfers
from hanse.client.process_spec import PROCESS_MODULE, TAIL_CHARS, JobProcessSpec
from hanse.client.uplink import ANSWER_TIMEOUT_S, Uplink
from hanse.client.workspace import JobFolder, StartedJob, job_folders
from hanse.coordination.policy import may_run
from hanse.errors import (
    HanseError,
    JobInvalid,
    NotFound,
    ProtocolError,
    SiteRefused,
    Unauthenticated,
    Unreachable,
)
from hanse.ids import SERVER, ClientName, JobId, Ssid, Token, is_job_id
from hanse.job import JobSpec
from hanse.launch.long_logs import LongLogs
from hanse.launch.memory import KillCounter, cause_of
from hanse.launch.process import Handle, Launcher
from hanse.launch.surviving import Survivor, survivor_at
from hanse.messages import AbortJob, Channel, Credentials, DeployJob, JobCredentials, JobEnded, Message, StartJob
from hanse.settings import ClientSettings
from hanse.storage.disk import start_failure
from hanse.storage.packages import MAX_PACKAGE_BYTES, comes_with, unpack_package
from hanse.storage.tensors import TensorFiles

P = ParamSpec("P")
T = TypeVar("T")

_log = logging.getLogger(__name__)

STOP_GRACE_S: Final = 5.0
"""How long a job's process may take to end once asked; it needs two seconds at most."""

_NOBODY: Final = JobCredentials(Credentials("", Token(""), "", Ssid("")))


@dataclass(slots=True, eq=False)
class _Process:
    """A job's process; ``is_asked`` once the agent has asked it to end, so that its end is no news.

    ``authority`` names the key of who gave its certificate.
    """

    handle: Handle
    attempt: int
    kills: KillCounter
    authority: str
    is_asked: bool = False
    watcher: asyncio.Task[None] | None = None


@dataclass(slots=True, eq=False)
class _Job:
    """A job with a folder here, in which its package is once it ``is_here``."""

    deployed: DeployJob
    folder: JobFolder
    process: _Process | None = None
    is_here: bool = False

    @property
    def is_running(self) -> bool:
        return self.process is not None and not self.process.is_asked


class SiteJobs:
    """The jobs at one site; they live within ``serving``, after which no process of theirs is left.

    ``uplink`` is the agent's; *roots* is what TLS is checked against, in PEM; empty without TLS. *require_valid* raises
    ``Unauthenticated`` while the agent's certificate is not valid.
    """

    def __init__(
        self,
        uplink: Uplink,
        *,
        settings: ClientSettings,
        workspace: Path,
        roots: bytes,
        launcher: Launcher,
        transfers: TensorTransfers,
        require_valid: Callable[[], None],
    ) -> None:
        self._require_valid = require_valid
        self._uplink, self._settings, self._roots = uplink, settings, roots
        self._workspace = workspace
        self._launcher, self._transfers = launcher, transfers
        self._client = ClientName(settings.name)
        self._jobs: dict[JobId, _Job] = {}
        self._logs = LongLogs()
        self._locks: weakref.WeakValueDictionary[JobId, asyncio.Lock] = weakref.WeakValueDictionary()
        self._group: asyncio.TaskGroup | None = None
        cell = uplink.cell
        cell.on(Channel.JOB, "deploy", self._on_deploy)
        cell.on(Channel.JOB, "start", self._on_start)
        cell.on(Channel.JOB, "abort", self._on_abort)

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Answer the server within this block; at its end, stop and reap every process.

        What an agent that was killed left behind is taken over first, or cleared away.
        """
        async with asyncio.TaskGroup() as group:
            self._group = group
            try:
                folders = await asyncio.to_thread(job_folders, self._workspace)
                await asyncio.gather(*(self._take_over(folder) for folder in folders))
                yield
            finally:
                self._group = None
                await self._stop_all()

    @property
    def running(self) -> tuple[JobId, ...]:
        """The jobs with a process here that goes on, or with one whose end the server has not heard of yet; sorted."""
        return tuple(sorted(job_id for job_id, job in self._jobs.items() if job.is_running))

    @property
    def idle(self) -> tuple[JobId, ...]:
        """The jobs that have files here, if only a part of a package, but no process that goes on; sorted."""
        return tuple(sorted(job_id for job_id, job in self._jobs.items() if not job.is_running))

    def shorten_logs(self) -> None:
        """Have the logs of the jobs here shortened, as far as they are too long; returns at once."""
        if self._group is not None:
            shortening = self._logs.shorten([job.folder.log for job in self._jobs.values()])
            self._group.create_task(shortening, name="shorten logs")

    def abort(self, job_id: JobId, reason: str) -> None:
        """End *job_id*, if it is here, and forget it; returns at once."""
        if job_id in self._jobs:
            _log.info("ending job", extra={"job": job_id, "reason": reason})
            self._serving_group().create_task(self._end(job_id), name=f"end job {job_id}")

    def end_strangers(self, authority: str) -> None:
        """End the jobs whose processes have a certificate of another authority than *authority*; returns at once.

        The server takes no such certificate any more, so they could never connect again. It starts them anew once it
        hears that they are not here. An empty *authority* ends none: there, no certificates are needed.
        """
        for job_id, job in self._jobs.items():
            if job.process is not None and authority and job.process.authority not in ("", authority):
                self.abort(job_id, "the servers' secret is another than its process began with")

    # What the server asks ---------------------------------------------------------------------------------------------

    async def _on_deploy(self, message: Message) -> None:
        deploy = message.payload
        if not isinstance(deploy, DeployJob) or not is_job_id(deploy.job_id):
            raise ProtocolError("DeployJob.job_id", got=deploy, expected="lower-case letters, digits and dashes")
        if not 0 < deploy.package_bytes <= MAX_PACKAGE_BYTES:
            expected = f"1 to {MAX_PACKAGE_BYTES} bytes"
            raise ProtocolError("DeployJob.package_bytes", got=deploy.package_bytes, expected=expected)
        refusal = may_run(
            self._settings.policy,
            submitter=deploy.submitter,
            spec=deploy.spec,
            installed=_is_installed(deploy.spec),
        )
        if refusal is not None:
            _log.warning("job refused", extra={"job": deploy.job_id, "job_name": deploy.name, "reason": refusal})
            raise SiteRefused(self._client, refusal)
        async with self._lock_of(deploy.job_id):
            job = self._jobs.get(deploy.job_id)
            if job is not None and job.is_here and job.deployed.package == deploy.package:
                return
            if job is not None:
                await self._stop_process(job)
            await self._deploy(deploy)

    async def _on_start(self, message: Message) -> None:
        start = message.payload
        if not isinstance(start, StartJob):
            raise ProtocolError("payload", got=start, expected="StartJob")
        async with self._lock_of(start.job_id):
            job = self._jobs.get(start.job_id)
            if job is None or not job.is_here:
                raise NotFound("deployed job", start.job_id)
            if job.process is not None and job.process.attempt >= start.attempt:
                return  # asked again because the answer was lost
            await self._stop_process(job)
            await self._start(job, start)

    def _on_abort(self, message: Message) -> None:
        if not isinstance(message.payload, AbortJob):
            raise ProtocolError("payload", got=message.payload, expected="AbortJob")
        self.abort(message.payload.job_id, message.payload.reason)

    # What an earlier agent left ---------------------------------------------------------------------------------------

    async def _take_over(self, folder: JobFolder) -> None:
        """Take over the process that an agent which was killed has left in *folder*; clear away what none lives of."""
        job_id = JobId(folder.path.name)
        survivor = survivor_at(folder.log, name=f"job {job_id}")
        if survivor is not None:
            job = self._adopted(folder, survivor)
            if job is not None:
                self._jobs[job_id] = job
                return
            await survivor.stop(STOP_GRACE_S)
        await asyncio.to_thread(folder.clear)

    def _adopted(self, folder: JobFolder, survivor: Survivor) -> _Job | None:
        """Return the job that *survivor* runs, taken over; ``None`` when this agent would not run it like that."""
        started = folder.started()
        extra = {"job": folder.path.name, "pid": survivor.pid}
        if started is None or started.terms != self._terms(started.deployed, folder):
            _log.warning(
                "a job's process is ended: this agent's settings are others than it was started with", extra=extra
            )
            return None
        try:
            survivor.take_over()
        except OSError as error:
            _log.warning("a job's process is ended: it cannot be taken over", extra={**extra, "reason": error.strerror})
            return None
        job = _Job(started.deployed, folder, is_here=True)
        self._run(job, _Process(survivor, started.attempt, KillCounter(survivor.pid), started.authority))
        _log.info("job taken over from an agent that was killed", extra={**extra, "attempt": started.attempt})
        return job

    # Doing it ---------------------------------------------------------------------------------------------------------

    async def _deploy(self, deploy: DeployJob) -> None:
        folder = JobFolder(self._workspace / "jobs" / deploy.job_id)
        self._jobs[deploy.job_id] = job = _Job(deploy, folder)
        packages = await _in_thread(TensorFiles, folder.package)
        partial = await _in_thread(packages.begin, deploy.package, deploy.package_bytes)
        try:
            await self._transfers.download(f"job/{deploy.job_id}", deploy.package, deploy.package_bytes, partial)
        except Unauthenticated as error:  # the agent has had another token since, or is about to
            self._require_valid()  # or there is none to be had
            raise Unreachable(SERVER, error.reason) from error
        spec = await _in_thread(unpack_package, packages.path(deploy.package), folder.code)
        if spec != deploy.spec:
            raise JobInvalid("package", got=f"another definition of {spec.name}", expected="the one that was announced")
        if not _is_there(spec, folder.code) and not _is_installed(spec):
            raise JobInvalid("client", got=spec.client, expected="a module of the job, or one installed at the site")
        job.is_here = True
        _log.info("job deployed", extra={"job": deploy.job_id, "job_name": deploy.name, "submitter": deploy.submitter})

    async def _start(self, job: _Job, start: StartJob) -> None:
        terms, authority = self._terms(job.deployed, job.folder), start.identity.authority
        await _in_thread(job.folder.note, StartedJob(job.deployed, start.attempt, terms, authority))
        kills = KillCounter()
        try:
            handle = await self._launcher.launch(
                PROCESS_MODULE,
                spec=msgspec.msgpack.encode(self._process_spec(job.deployed, job.folder, start.identity)),
                log_path=job.folder.log,
                env={},
                name=f"job {start.job_id}",
            )
        except OSError as error:
            raise start_failure(f"the job's process at {self._client}", error, job.folder.path) from error
        self._run(job, _Process(handle, start.attempt, kills, authority))
        _log.info("job started", extra={"job": start.job_id, "attempt": start.attempt, "pid": handle.pid})

    def _run(self, job: _Job, process: _Process) -> None:
        group = self._serving_group()
        job.process = process
        process.watcher = group.create_task(self._watch(job, process), name=f"watch job {job.deployed.job_id}")

    def _terms(self, deployed: DeployJob, folder: JobFolder) -> str:
        """Return a digest of all that a job's process is told but for its credentials."""
        spec = self._process_spec(deployed, folder, _NOBODY)
        return hashlib.sha256(msgspec.msgpack.encode(spec, order="deterministic")).hexdigest()

    def _process_spec(self, deployed: DeployJob, folder: JobFolder, identity: JobCredentials) -> JobProcessSpec:
        settings = self._settings
        return JobProcessSpec(
            job_id=deployed.job_id,
            client=self._client,
            project=settings.project,
            spec=deployed.spec,
            identity=identity,
            servers=settings.servers,
            roots=self._roots,
            # A file of the job must not stand in for the installed module that the site agreed to.
            code=str(folder.code) if settings.policy.job_code == "allow" else "",
            tensors=str(folder.tensors),
            log=str(folder.log),
            site=settings.config,
            policy=settings.policy,
        )

    async def _watch(self, job: _Job, process: _Process) -> None:
        """Wait for the process to end; if nobody asked it to, tell the server until it has heard."""
        status = await process.handle.wait()
        if process.is_asked:
            return
        cause = cause_of(status, kills_before=process.kills.before, kills_after=process.kills.read())
        tail = process.handle.log_tail(self._settings.policy.log_lines)[-TAIL_CHARS:]
        extra = {"job": job.deployed.job_id, "attempt": process.attempt, "status": status, "cause": cause}
        _log.warning("a job's process ended unasked", extra=extra)
        end = JobEnded(job.deployed.job_id, process.attempt, status, tail, cause)
        try:
            await self._uplink.persist(lambda: self._tell(end), doing="telling of the end of a job's process")
        except HanseError as error:
            _log.info("the server does not want to hear of it", extra={**extra, "reason": error.reason})
        if job.process is process:
            job.process = None

    async def _tell(self, end: JobEnded) -> None:
        try:
            await self._uplink.ask(Channel.SERVER, "job_ended", end, timeout_s=ANSWER_TIMEOUT_S)
        except Unauthenticated as error:  # with another token it may: the agent registers anew, or ends
            raise Unreachable(SERVER, error.reason) from error

    async def _end(self, job_id: JobId) -> None:
        async with self._lock_of(job_id):
            job = self._jobs.get(job_id)
            if job is None:
                return
            await self._stop_process(job)
            await asyncio.to_thread(job.folder.clear)
            self._jobs.pop(job_id, None)
            _log.info("job ended", extra={"job": job_id})

    async def _stop_process(self, job: _Job) -> None:
        process = job.process
        if process is None:
            return
        process.is_asked = True
        await process.handle.stop(STOP_GRACE_S)
        if process.watcher is not None:
            process.watcher.cancel()  # it may be reporting an end that came before
        if job.process is process:  # what ends at the same time as another asks for it is ended once
            job.process = None

    async def _stop_all(self) -> None:
        jobs = list(self._jobs.values())
        self._jobs.clear()
        await asyncio.gather(*(self._stop_process(job) for job in jobs))
        await asyncio.gather(*(asyncio.to_thread(job.folder.clear) for job in jobs))

    # Parts ------------------------------------------------------------------------------------------------------------

    def _lock_of(self, job_id: JobId) -> asyncio.Lock:
        return self._locks.setdefault(job_id, asyncio.Lock())

    def _serving_group(self) -> asyncio.TaskGroup:
        if self._group is None:
            raise SiteRefused(self._client, "its agent is stopping")
        return self._group


async def _in_thread(work: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
    """Return what *work* returns, done in a thread. Cancelled, this ends when *work* does: it has a job's files."""
    working = asyncio.ensure_future(asyncio.to_thread(work, *arguments, **named))
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        await asyncio.gather(working, return_exceptions=True)
        raise


def _is_installed(spec: JobSpec) -> bool:
    """Return whether the job's client is a module that is installed here; only found, never imported."""
    if spec.is_script:
        return False
    try:
        return importlib.util.find_spec(_module(spec).partition(".")[0]) is not None
    except (ImportError, ValueError):
        return False


def _is_there(spec: JobSpec, code: Path) -> bool:
    return (code / spec.client).is_file() if spec.is_script else comes_with(code, _module(spec))


def _module(spec: JobSpec) -> str:
    return spec.client.partition(":")[0]
