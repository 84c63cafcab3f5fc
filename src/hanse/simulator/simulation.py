"""``simulate``: a server, its clients and one job in this process, from nothing to the job's result.

All of it lives on the process's event loop, in one task: the workspace, the workers, the server, the agents, the job,
in this order, and away in the other. The caller's thread waits meanwhile, or hears of the job's events.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import os
import random
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Final

import msgspec

from hanse.cell.loop import background_loop
from hanse.cell.transfer import Files, LocalTransfers
from hanse.client.agent import ClientAgent
from hanse.client.uplink import first_error
from hanse.coordination.schedule import Candidate, Start, decide
from hanse.errors import ConfigError, Conflict, JobInvalid, WorkflowError
from hanse.identity.private_files import make_private_folder
from hanse.ids import ClientName, Digest, JobId
from hanse.job import Job, JobRecord, JobSpec, JobState
from hanse.messages import JobEvent, JobView, RoundView
from hanse.model import Model
from hanse.run.authoring import package_of, spec_of_folder
from hanse.server.federated_server import FederatedServer
from hanse.server.jobs import Jobs
from hanse.settings import ClientSettings, ServerSettings
from hanse.simulator.code import refuse_simulation_within_job
from hanse.simulator.launcher import TaskLauncher
from hanse.simulator.mailbox import Mailbox
from hanse.simulator.pool import FunctionCrew, ScriptCrew
from hanse.simulator.watch import Watcher, watching
from hanse.storage.memory import MemoryStore
from hanse.storage.models import read_safetensors
from hanse.storage.packages import build_package

PROJECT: Final = "simulation"
TARGET: Final = "localhost:0"
"""Nothing listens there; a server has to have some address."""
LIFETIME_S: Final = 365 * 24 * 3600.0
"""Tokens last as long as anybody would wait for a simulation: nothing here can be stolen."""
HEARTBEAT_S: Final = 60.0
"""Links in memory do not break, so heartbeats find out nothing."""


class SimulationFailed(WorkflowError):
    """A simulated job did not complete; the sentence is the job's own reason, ``view`` the job as it ended."""

    code = "simulation-failed"

    def __init__(self, view: JobView) -> None:
        super().__init__(view.reason or f"the job was {view.state}")
        self.view = view


@dataclasses.dataclass(frozen=True, slots=True)
class SimulationResult:
    """A completed job: its final model, whose arrays are read-only, and the job as a server shows it."""

    model: Model
    view: JobView

    @property
    def history(self) -> tuple[RoundView, ...]:
        """The rounds as they were committed: metrics, time, who answered."""
        return self.view.history

    @property
    def digest(self) -> Digest:
        """The BLAKE3 digest of the model's safetensors file: equal digests are equal bytes."""
        return self.view.result


def simulate(
    job: Job | Path | str,
    clients: int = 10,
    *,
    seed: int | None = None,
    workers: int | None = None,
    workspace: Path | None = None,
    on_event: Callable[[JobEvent], None] | None = None,
) -> SimulationResult:
    """Run *job*, a ``Job`` or the folder of one, with simulated clients, and return what it resulted in.

    The clients are called ``site-1`` to ``site-<clients>``; each finds its share's number in ``ctx.site["partition"]``
    (from 0) and *clients* in ``ctx.site["partitions"]``, offers whatever resources the job asks for, and lets any code
    run. *seed* stands in for the job's own. *workers* bounds how many clients train at once, each in a process; by
    default as many as there are cores, at most *clients*. The result does not depend on it, nor on the order in which
    they finish; a job that says otherwise (a deadline, more clients than needed) depends on time here as it does
    deployed.

    An app's functions are called for any client in any worker, so what they keep in their modules is no client's own; a
    script has a process for each client. *workspace*, a folder, keeps logs and result; without one they are gone
    at the end. *on_event* is called in this thread with each of the job's events; what it raises ends the simulation.

    Raises:
        JobInvalid, ConfigError: the job's definition does not hold, or cannot start with these clients.
        SimulationFailed: the job failed; the sentence is its reason.
    """
    refuse_simulation_within_job()
    _refuse_to_block(background_loop())
    if clients < 1:
        raise ConfigError("clients", got=clients, expected="1 or more")
    if workers is not None and workers < 1:
        raise ConfigError("workers", got=workers, expected="1 or more")
    spec, package = _packed(job, seed)
    names = [ClientName(f"site-{number}") for number in range(1, clients + 1)]
    _demand_start(spec, names)
    with _workspace(workspace) as home:
        (home / "package.zip").write_bytes(package)
        simulation = Simulation(spec, names, workers=min(workers or _cores(), clients), home=home)
        return simulation.run(on_event)


class Simulation:
    """One simulation, in the folder *home*, where the package lies; ``run`` is its life."""

    def __init__(self, spec: JobSpec, names: list[ClientName], *, workers: int, home: Path) -> None:
        self._spec, self._names, self._home = spec, names, home
        self._workspace = home / "server"
        logs = home / "workers"
        self._crew = (
            ScriptCrew(workers, logs=logs, script=spec.client) if spec.is_script else FunctionCrew(workers, logs=logs)
        )
        self._stopping = asyncio.Event()
        self._events: Mailbox[JobEvent | None] = Mailbox()

    def run(self, on_event: Callable[[JobEvent], None] | None) -> SimulationResult:
        """Run the job; when this thread is interrupted, or *on_event* raises, end everything first."""
        loop = background_loop()
        with self._events:
            running = asyncio.run_coroutine_threadsafe(self._run(is_watched=on_event is not None), loop)
            try:
                while (event := self._events.take()) is not None:
                    if on_event is not None:
                        on_event(event)
                return running.result()
            finally:
                if not running.done():
                    loop.call_soon_threadsafe(self._stopping.set)
                    _settle(running)

    async def _run(self, *, is_watched: bool) -> SimulationResult:
        """Do the work until it is done or ``_stopping`` is set; either way nothing is left of it then."""
        work = asyncio.create_task(self._work(is_watched=is_watched), name="simulation")  # awaited below
        stopping = asyncio.create_task(self._stopping.wait(), name="end of the simulation")  # ended below
        try:
            await asyncio.wait({work, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                await self._crew.kill()
                work.cancel()
            return await work
        finally:
            work.cancel()
            stopping.cancel()
            await asyncio.gather(work, stopping, return_exceptions=True)
            self._events.put(None)

    async def _work(self, *, is_watched: bool) -> SimulationResult:
        put = self._events.put if is_watched else None
        try:
            async with (
                self._crew.open(),
                self._server() as server,
                self._agents(server),
                watching(server, PROJECT, put) as watcher,
            ):
                view = await self._run_job(server.jobs, watcher)
                result = server.jobs.run_folder(view.job_id).result
        except ExceptionGroup as errors:
            raise first_error(errors) from None
        if view.state != JobState.COMPLETED:
            raise SimulationFailed(view)
        # Mapped, so its bytes outlive the file's name, and only what is looked at takes memory.
        return SimulationResult(await asyncio.to_thread(read_safetensors, result / view.result), view)

    async def _run_job(self, jobs: Jobs, watcher: Watcher) -> JobView:
        record = await jobs.submit(self._home / "package.zip", submitter=PROJECT)
        watcher.watch(record.job_id)  # before anything else gets to run, so that no event is missed
        await jobs.wait(record.job_id)
        await watcher.wait_end()
        return await jobs.board.view(record.job_id)

    @asynccontextmanager
    async def _server(self) -> AsyncIterator[FederatedServer]:
        server = FederatedServer(
            PROJECT,
            min_num_clients=len(self._names),
            max_num_clients=len(self._names),
            heart_beat_timeout=LIFETIME_S,
            snapshot_persistor=MemoryStore(),
        )
        launcher = TaskLauncher(
            dial=lambda target: server.reception.dial(target),
            run_folder=lambda job_id: server.jobs.run_folder(job_id),
            crew=self._crew,
        )
        settings = ServerSettings(
            project=PROJECT,
            min_num_clients=len(self._names),
            max_num_clients=len(self._names),
            heartbeat_s=HEARTBEAT_S,
            token_lifetime_s=LIFETIME_S,
        )
        arguments = argparse.Namespace(workspace=self._workspace, settings=settings, launcher=launcher)
        where = {"service": {"scheme": "memory", "target": TARGET}}
        # In threads, because both wait for the loop that this runs on; to its end, so that there is something to close.
        deploying = asyncio.create_task(asyncio.to_thread(server.deploy, arguments, where), name="deploy")
        try:
            await asyncio.shield(deploying)
            yield server
        finally:
            await asyncio.wait({deploying})
            await asyncio.to_thread(server.close)

    @asynccontextmanager
    async def _agents(self, server: FederatedServer) -> AsyncIterator[None]:
        """Have all clients registered within the block: only then does the job start with all of them."""
        agents = [self._agent(server, number, name) for number, name in enumerate(self._names)]
        async with asyncio.TaskGroup() as group:
            lives = [group.create_task(agent.run(), name=f"agent {agent.status}") for agent in agents]
            try:
                for agent in agents:
                    await agent.wait_registered()
                yield
                for agent in agents:
                    agent.stop()
                await asyncio.wait(lives)
            finally:
                for life in lives:
                    life.cancel()

    def _agent(self, server: FederatedServer, number: int, name: ClientName) -> ClientAgent:
        settings = ClientSettings(
            project=PROJECT,
            name=name,
            servers=(TARGET,),
            config={"partition": number, "partitions": len(self._names)},
            resources=self._spec.resources,
            tls=False,
        )
        return ClientAgent(
            settings,
            workspace=self._home / "clients" / name,
            launcher=TaskLauncher(server.reception.dial, server.jobs.run_folder, self._crew),
            rng=random.Random(number),  # noqa: S311 - spreads retries, hides nothing
            dial=server.reception.dial,
            transfers=LocalTransfers(lambda scope: _package_files(server, scope)),
        )


def _package_files(server: FederatedServer, scope: str) -> Files:
    return server.jobs.files.package_files(JobId(scope.partition("/")[2]))


def _packed(job: Job | Path | str, seed: int | None) -> tuple[JobSpec, bytes]:
    """Return the job's definition and package, with *seed* for its seed unless that is ``None``."""
    if seed is None:
        return package_of(job)
    if isinstance(job, Job):
        return package_of(dataclasses.replace(job, seed=seed))
    spec = msgspec.structs.replace(spec_of_folder(Path(job)), seed=seed)
    return spec, build_package(Path(job), spec)


def _demand_start(spec: JobSpec, names: list[ClientName]) -> None:
    """Raise if a server with these clients would not start the job: here nobody else will ever come.

    Raises:
        JobInvalid: it waits for what the sentence says.
    """
    record = JobRecord(JobId(PROJECT), spec, PROJECT, 0.0, Digest(""), 0)
    decision = decide(
        record,
        clients=[Candidate(name, spec.resources) for name in names],
        running_jobs=0,
        max_running_jobs=1,
        min_registered=len(names),
        now_s=0.0,
    )
    if not isinstance(decision, Start):
        expected = f"one that {len(names)} simulated clients, site-1 and so on, are enough for ({decision.reason})"
        raise JobInvalid("choice of clients", got=spec.name, expected=expected)


@contextmanager
def _workspace(folder: Path | None) -> Iterator[Path]:
    if folder is not None:
        yield make_private_folder(folder)
        return
    with tempfile.TemporaryDirectory(prefix="hanse-") as name:
        yield Path(name)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _refuse_to_block(loop: asyncio.AbstractEventLoop) -> None:
    with contextlib.suppress(RuntimeError):
        if asyncio.get_running_loop() is not loop:
            return
        raise Conflict("the event loop of this process", state="what called simulate()", wanted="waited for by it")


def _settle(running: "Future[SimulationResult]") -> None:
    """Wait until nothing is left of a simulation that is being ended."""
    with contextlib.suppress(Exception):
        running.exception()
