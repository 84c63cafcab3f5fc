"""Jobs' processes as tasks of this process: a ``Launcher`` for the server's runs and for clients' jobs.

It is handed the same specifications as a real process would be, and does with them what the processes' programs do,
over links in memory. A run is driven by ``LocalRun``. A client's job is a ``JobConnection`` whose tensor files are the
server's own, so that nothing is copied, and whose trainer hands each task to a ``Crew``.
"""

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, nullcontext
from contextvars import copy_context
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from hanse.cell.connector import Dial
from hanse.cell.transfer import LocalTransfers
from hanse.client.api import Site
from hanse.client.job_process import REPORT_TIMEOUT_S, JobConnection
from hanse.client.process_spec import PROCESS_MODULE as CLIENT_MODULE
from hanse.client.process_spec import JobProcessSpec
from hanse.client.task import TaskContext
from hanse.client.trainer import START
from hanse.coordination.runs import GiveUp, after_death
from hanse.errors import (
    HanseError,
    ImportFailed,
    InternalError,
    JobInvalid,
    MissingDependency,
    ProcessDied,
    SiteError,
    TrainingFailed,
)
from hanse.events import Handlers
from hanse.ids import ClientName, JobId
from hanse.job import JobSpec
from hanse.learning.workflow import WORKFLOWS
from hanse.model import Model, Update
from hanse.run.loading import initial_model_of
from hanse.server.job_cell import connect
from hanse.server.run_folder import RunFolder
from hanse.server.run_manager import LocalRun, RunManager
from hanse.server.run_process import PROCESS_MODULE as RUN_MODULE
from hanse.server.run_spec import RunProcessSpec
from hanse.simulator.code import turn
from hanse.simulator.exchange import (
    Answer,
    Broken,
    Done,
    Faulty,
    Invalid,
    Load,
    Loaded,
    Missing,
    Raised,
    Request,
    Unimportable,
    Work,
)
from hanse.simulator.pool import Crew
from hanse.storage.models import load_model, store_model
from hanse.storage.tensors import TensorFiles

_log = logging.getLogger(__name__)

FEW_TENSORS: Final = 32
P = TypeVar("P")
R = TypeVar("R")


class WorkerFault(SiteError):
    """A simulated client's worker could not do its part of a task; *why* is the sentence."""

    code = "worker-fault"

    def __init__(self, client: str, why: str) -> None:
        super().__init__(f"the worker of {client} could not do its part: {why}")
        self.client, self.why = client, why


class TaskHandle:
    """A job's process that is a task of this one; *ask_to_end* has it end by itself."""

    pid = 0

    def __init__(self, life: Awaitable[None], *, ask_to_end: Callable[[], Awaitable[None]], name: str) -> None:
        self._life, self._ask_to_end = life, ask_to_end
        self._said = ""
        self._task = asyncio.create_task(self._live(), name=name)  # awaited by wait and stop

    async def wait(self) -> int:
        """Wait for the end; return 0 if it went well, else 1."""
        await asyncio.wait({self._task})
        return 1 if self._task.cancelled() else self._task.result()

    async def stop(self, grace_s: float = 5.0) -> int:
        """Ask the task to end, cancel it after *grace_s* seconds; return the status."""
        if not self._task.done():
            try:
                async with asyncio.timeout(grace_s):
                    await self._ask_to_end()
                    await self.wait()
            except TimeoutError:
                pass
            finally:
                self._task.cancel()
        return await self.wait()

    def log_tail(self, lines: int = 20) -> str:
        """Return the sentence that it failed with; empty when it did not."""
        return "\n".join(self._said.splitlines()[-lines:]) if lines else ""

    async def _live(self) -> int:
        try:
            await self._life
        except HanseError as error:
            self._said = error.reason
        except Exception as error:  # noqa: BLE001 - the edge of what stands for a process: its end is its status
            _log.exception("a simulated process failed")
            self._said = f"{type(error).__name__}: {error}"
        return 1 if self._said else 0


@dataclass(frozen=True, slots=True)
class TaskLauncher:
    """Launches the two kinds of jobs' processes as tasks.

    *dial* leads to the server; *run_files* tells where the tensors of a run are; *crew* works on clients' tasks.
    """

    dial: Dial
    run_folder: Callable[[JobId], RunFolder]
    crew: Crew

    async def launch(
        self, module: str, *, spec: bytes, log_path: Path, env: Mapping[str, str], name: str
    ) -> TaskHandle:
        """Start what ``python -m module`` would do, with *spec*."""
        del env, log_path
        match module:
            case _ if module == RUN_MODULE:
                return self._launch_run(msgspec.msgpack.decode(spec, type=RunProcessSpec), name)
            case _ if module == CLIENT_MODULE:
                return self._launch_client(msgspec.msgpack.decode(spec, type=JobProcessSpec), name)
            case _:
                raise InternalError(f"starting {module} in a simulation")

    def _launch_run(self, spec: RunProcessSpec, name: str) -> TaskHandle:
        process = _RunProcess(spec, self.dial)
        return TaskHandle(process.live(), ask_to_end=process.end, name=name)

    def _launch_client(self, spec: JobProcessSpec, name: str) -> TaskHandle:
        folder = self.run_folder(spec.job_id)
        # The server's own folders: every client has the same code, and shares the run's tensors.
        spec = msgspec.structs.replace(spec, code=str(folder.code) if spec.code else "", tensors=str(folder.tensors))
        process = _ClientProcess(spec, self.dial, self.crew)
        return TaskHandle(process.live(), ask_to_end=process.end, name=name)


class _RunProcess:
    """What ``hanse.server.job_process`` does."""

    def __init__(self, spec: RunProcessSpec, dial: Dial) -> None:
        self._spec, self._dial = spec, dial
        self._run: LocalRun | None = None
        self._aborted: str | None = None

    async def live(self) -> None:
        """Drive the run to its end."""
        spec = self._spec
        job_cell = await connect(
            spec.job_id, spec.parent_url, spec.credentials, project=spec.project, on_abort=self._abort, dial=self._dial
        )
        try:
            async with self._code() as initial_model:
                self._run = LocalRun(
                    RunManager(spec.job_id, Path(spec.folder), spec.project, Handlers(), epoch=spec.epoch),
                    spec.spec,
                    job_cell.link,
                    heartbeat_s=spec.check_frequency_s,
                    snapshot=None,
                    importing=lambda _: nullcontext(),
                    initial_model=initial_model,
                )
                if self._aborted is not None:
                    self._run.abort(self._aborted)
                await self._run.drive()
        finally:
            await job_cell.close()

    async def end(self) -> None:
        """Have the run end."""
        self._abort("the simulation is ending")

    def _abort(self, reason: str) -> None:
        self._aborted = reason
        if self._run is not None:
            self._run.abort(reason)

    @asynccontextmanager
    async def _code(self) -> AsyncIterator[Callable[[JobSpec, Path], Model]]:
        """Let the job's code be imported for as long as the run needs that; give what makes its first model."""
        code = RunFolder(Path(self._spec.folder)).code
        if self._spec.spec.workflow.name not in WORKFLOWS:
            async with turn(code):
                yield initial_model_of
            return
        async with turn(code):
            first = await _first_model(self._spec.spec, code)
        yield lambda spec, code: first()


async def _first_model(spec: JobSpec, code: Path) -> Callable[[], Model]:
    """Make the job's first model now; return what gives it, or raises what making it raised."""
    # No task: code that calls ``sys.exit`` would end the event loop with it.
    context = copy_context()
    making = asyncio.get_running_loop().run_in_executor(None, context.run, initial_model_of, spec, code)
    await asyncio.wait({making})
    return making.result


class _ClientProcess:
    """What ``hanse.client.job_process`` does."""

    def __init__(self, spec: JobProcessSpec, dial: Dial, crew: Crew) -> None:
        self._spec, self._crew = spec, crew
        files = TensorFiles(Path(spec.tensors))
        self._trainer = CrewTrainer(spec, crew, files)
        self._connection = JobConnection(
            spec,
            self._trainer,
            rng=random.Random(),  # noqa: S311 - spreads retries, hides nothing
            dial=dial,
            transfers=LocalTransfers(lambda scope: files),
            keep_only=lambda digests: None,
        )

    async def live(self) -> None:
        """Work on the job's tasks until the connection is closed."""
        spec = self._spec
        site = Site(spec.client, spec.job_id, spec.spec.config, spec.site, spec.spec.seed)
        self._crew.enter(site, Path(spec.code))
        life = asyncio.create_task(self._connection.run(), name=f"connection of {spec.client}")  # awaited below
        failing = asyncio.create_task(self._report_failure(), name=f"code of {spec.client}")  # ended below
        try:
            await asyncio.wait({life, failing}, return_when=asyncio.FIRST_COMPLETED)
            if failing.done():
                await self._connection.close()
                raise failing.result()
            await life
        finally:
            life.cancel()
            failing.cancel()
            await asyncio.gather(life, failing, return_exceptions=True)
            await self._crew.leave(spec.client)

    async def _report_failure(self) -> HanseError:
        """Wait for the job's code to be of no use at all; tell the server, if it wants to hear it, and return why."""
        failure = await self._trainer.failure()
        try:
            async with asyncio.timeout(REPORT_TIMEOUT_S):
                await self._connection.report_failure(failure)
        except (HanseError, TimeoutError) as error:
            _log.info("the server was not told", extra={"client": self._spec.client, "reason": str(error)})
        return failure

    async def end(self) -> None:
        """Have the process leave the server and end."""
        await self._connection.close()


async def _aside(tensors: int, work: Callable[[P, TensorFiles], R], subject: P, files: TensorFiles) -> R:
    """Return ``work(subject, files)``, in a thread if there are many *tensors*: with few it is done before a thread is.

    Small ones are hashed, and large ones looked up or mapped, never read: they are files already.
    """
    return work(subject, files) if tensors <= FEW_TENSORS else await asyncio.to_thread(work, subject, files)


class CrewTrainer:
    """Hands a client's tasks to *crew*: a ``hanse.client.trainer.Trainer``."""

    def __init__(self, spec: JobProcessSpec, crew: Crew, files: TensorFiles) -> None:
        self._spec, self._crew, self._files = spec, crew, files
        self._broken: asyncio.Future[HanseError] = asyncio.get_running_loop().create_future()

    async def failure(self) -> HanseError:
        """Return why the job's code can work on no task at all, once that is known; an app is tried at once."""
        if not self._spec.spec.is_script:
            answer = await self._ask(self._load)
            if not isinstance(answer, Loaded):
                return self._error(answer, START)
        return await self._broken

    async def run(self, model: Model, ctx: TaskContext) -> Update:
        """Return the code's answer to the task; see ``Trainer.run``."""
        reference = await _aside(len(model), store_model, model, self._files)
        answer = await self._ask_again(
            lambda number: Work(
                number,
                self._spec.code,
                self._spec.spec.client,
                self._spec.tensors,
                reference,
                ctx.client,
                ctx.job,
                ctx.round,
                ctx.name,
                ctx.config,
                ctx.site,
                ctx.seed,
            ),
            ctx,
        )
        match answer:
            case Done(update=update):
                trained = None
                if update.model is not None:
                    trained = await _aside(len(update.model.tensors), load_model, update.model, self._files)
                return Update(trained, update.num_examples, update.metrics)
            case Broken():
                if not self._broken.done():
                    self._broken.set_result(self._error(answer, START))
                await asyncio.get_running_loop().create_future()  # the job ends by that; this task with it
        raise self._error(answer, ctx.name)

    def _load(self, number: int) -> Load:
        return Load(number, self._spec.code, self._spec.spec.client, self._spec.client)

    async def _ask_again(self, request: Callable[[int], Request], ctx: TaskContext) -> Answer:
        """Return the answer to *request*, asked again of another worker as often as a deployed process is started."""
        attempt, tries = 1, self._spec.spec.process_tries
        while True:
            try:
                return await self._ask(request, ctx)
            except ProcessDied as died:
                verdict = after_death(self._client, attempt=attempt, tries=tries, status=died.status)
                if isinstance(verdict, GiveUp):
                    raise
                _log.warning("a worker died", extra={"client": self._client, "reason": died.reason})
                attempt = verdict.attempt

    async def _ask(self, request: Callable[[int], Request], ctx: TaskContext | None = None) -> Answer:
        on_log = ctx.log_metrics if ctx is not None else (lambda step, metrics: None)
        return await self._crew.ask(self._client, request, on_log)

    def _error(self, answer: Answer, task: str) -> HanseError:
        match answer:
            case Broken(failure=failure):
                return self._error(failure, START)
            case Raised(why=why):
                return TrainingFailed(self._client, task, why)
            case Unimportable(error=error, python=python):
                return ImportFailed(self._client, error, python=python)
            case Missing(module=module, place=place):
                return MissingDependency(self._client, module, place=place)
            case Invalid(expected=expected):
                return JobInvalid("client", got=self._spec.spec.client, expected=expected)
            case Faulty(why=why):
                return WorkerFault(self._client, why)
            case Loaded() | Done():
                return InternalError(f"reading the answer of {self._client}'s worker")

    @property
    def _client(self) -> ClientName:
        return self._spec.client
