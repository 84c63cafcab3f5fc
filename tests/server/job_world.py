"""What the tests of jobs share: a tiny job, sites that take part as a test says, and runs in threads."""

import argparse
import asyncio
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from hanse.cell.cell import Cell
from hanse.errors import HanseError, NoSpace, SiteRefused
from hanse.ids import ClientName, Digest, JobId
from hanse.job import JobRecord, JobSpec, WorkflowSpec
from hanse.launch.process import Handle
from hanse.messages import (
    Channel,
    JobSubmitted,
    Message,
    ModelRef,
    StartJob,
    SubmitJob,
    TaskAssignment,
    TaskFault,
    TaskResult,
    TensorRef,
    UpdateRef,
    ok,
)
from hanse.model import Model
from hanse.server import FederatedServer
from hanse.server.payloads import expect
from hanse.server.run_spec import RunProcessSpec
from hanse.storage.packages import build_package
from hanse.storage.tensors import TensorFiles, digest_of

from .world import Dialler, Wire, args, on_loop, target_of, transferring, wait

MakeServer = Callable[..., FederatedServer]
StartServer = Callable[..., FederatedServer]
NO_SPACE = NoSpace("taking space", disk="/disk", folder="/disk/runs", why="No space left on device")

MODEL_CODE = """
import numpy as np
from hanse.model import Model

def initial(seed=0):
    return Model({"w": np.full(3, float(seed), np.float32), "b": np.zeros((), np.float32)})

def large():
    return Model({"w": np.zeros(10_000, np.float32)})

def uneven():
    return Model({"w": np.zeros(10_000, np.float32), "v": np.zeros(20_000, np.float32)})

def loud():
    raise RuntimeError("x" * 5_000_000)

def broken():
    raise RuntimeError("no such data")
"""


def spec(**fields: Any) -> JobSpec:
    """Two rounds of FedAvg over a model of four numbers."""
    values: dict[str, Any] = {
        "name": "tiny",
        "workflow": WorkflowSpec("fedavg", {"rounds": 2}),
        "client": "app:app",
        "model": "tiny_model:initial",
        "min_clients": 2,
        "start_within_s": 60.0,
    }
    return JobSpec(**(values | fields))


def package(folder: Path, of: JobSpec, extra: Mapping[str, bytes] | None = None) -> Path:
    """Return the file that holds the package of the job *of*."""
    source = folder / "source"
    source.mkdir(parents=True, exist_ok=True)
    (source / "tiny_model.py").write_text(MODEL_CODE)
    path = folder / "job.zip"
    path.write_bytes(build_package(source, of, extra))
    return path


def submit(server: FederatedServer, folder: Path, **fields: Any) -> JobId:
    """Submit the tiny job, but for *fields*, as ada; return its id."""
    return wait(server.jobs.submit(package(folder, spec(**fields)), submitter="ada@demo")).job_id


def outcome(server: FederatedServer, job_id: JobId) -> JobRecord:
    """Return the job's record once it has ended."""
    return wait(server.jobs.wait(job_id))


class Submissions:
    """A command module: takes jobs that administrators have uploaded."""

    def register(self, server: FederatedServer, cell: Cell) -> None:
        async def take(message: Message) -> Message:
            asked = expect(message, SubmitJob)
            files = server.jobs.files.upload_files(message.headers["client"])
            record = await server.jobs.submit(files.path(asked.package), submitter=message.headers["client"])
            return ok(JobSubmitted(record.job_id, record.spec.name))

        cell.on(Channel.ADMIN, "job.submit", take)


# The server's side: runs in threads -----------------------------------------------------------------------------------


class RunThread:
    """A run's process, as a thread of this one: what ``hanse.server.job_process`` does, but for the process."""

    pid = 0

    def __init__(self, run_spec: RunProcessSpec) -> None:
        self.spec = run_spec
        self.server = FederatedServer(
            run_spec.project, args=args(Path(run_spec.folder)), check_engine_frequency=run_spec.check_frequency_s
        )
        self._done: Future[int] = Future()
        self._last_words = ""
        self._is_killed = False
        threading.Thread(target=self._run, name=f"run {run_spec.job_id}", daemon=True).start()

    def _run(self) -> None:
        try:
            self.server.create_job_cell(
                self.spec.job_id, "", self.spec.parent_url, False, {"credentials": self.spec.credentials}
            )
            try:
                tenure = argparse.Namespace(epoch=self.spec.epoch)
                self.server.start_run(self.spec.job_id, Path(self.spec.folder), self.spec.spec, tenure, None)
            finally:
                self.server.stop_run_engine_cell()
        except Exception as error:  # noqa: BLE001 - a process would end with a traceback and a status
            self._last_words = f"{type(error).__name__}: {error}"
            self._done.set_result(1)
        else:
            self._done.set_result(-9 if self._is_killed else 0)

    def kill(self) -> None:
        """Have it end as if it was killed: where it is, without a word."""
        self._is_killed = True
        self.server.stop_run_engine_cell()

    async def wait(self) -> int:
        return await asyncio.shield(asyncio.wrap_future(self._done))

    async def stop(self, grace_s: float = 5.0) -> int:
        self.server.abort_run()
        try:
            async with asyncio.timeout(grace_s):
                return await self.wait()
        except TimeoutError:  # one that has not begun yet has not heard it
            await asyncio.to_thread(self.kill)
            return await self.wait()

    def log_tail(self, lines: int = 20) -> str:
        del lines
        return self._last_words


class Threads:
    """A launcher of ``RunThread``."""

    def __init__(self) -> None:
        self.started: list[RunThread] = []

    async def launch(self, module: str, *, spec: bytes, log_path: Path, env: Mapping[str, str], name: str) -> Handle:
        assert module == "hanse.server.job_process"
        del log_path, env, name
        thread = RunThread(msgspec.msgpack.decode(spec, type=RunProcessSpec))
        self.started.append(thread)
        return thread


class ScriptedProcess:
    """A run's process that does nothing: it ends when a test says so, with the status that it says."""

    pid = 0

    def __init__(self, last_line: str, *, stopping: threading.Event, stops: asyncio.Event) -> None:
        self._last_line = last_line
        self._stopping, self._stops = stopping, stops
        self._ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def end(self, status: int) -> None:
        if not self._ended.done():
            self._ended.set_result(status)

    async def wait(self) -> int:
        return await asyncio.shield(self._ended)

    async def stop(self, grace_s: float = 5.0) -> int:
        del grace_s
        self._stopping.set()
        await self._stops.wait()
        self.end(-15)
        return await self.wait()

    def log_tail(self, lines: int = 20) -> str:
        del lines
        return self._last_line


class ScriptedLauncher:
    """A launcher whose processes do nothing. *stops* unset keeps them from stopping: how a test looks at parking."""

    def __init__(self, last_line: str = "") -> None:
        self.started: asyncio.Queue[ScriptedProcess] = asyncio.Queue()
        self.specs: list[RunProcessSpec] = []
        self.stopping = threading.Event()
        """Set when a process has been asked to stop."""
        self.stops = asyncio.Event()
        self.stops.set()
        self._last_line = last_line

    async def launch(self, module: str, *, spec: bytes, log_path: Path, env: Mapping[str, str], name: str) -> Handle:
        del module, log_path, env, name
        process = ScriptedProcess(self._last_line, stopping=self.stopping, stops=self.stops)
        self.specs.append(msgspec.msgpack.decode(spec, type=RunProcessSpec))
        self.started.put_nowait(process)
        return process

    def next(self) -> ScriptedProcess:
        return wait(self.started.get())

    def end(self, process: ScriptedProcess, status: int) -> None:
        on_loop(lambda: process.end(status))


# The clients' side ----------------------------------------------------------------------------------------------------

Train = Callable[[TaskAssignment, Model], TaskResult | None]


def plus(amount: float, num_examples: int = 1) -> Train:
    """Training that adds *amount* to every number."""

    def train(task: TaskAssignment, model: Model) -> TaskResult:
        return answer(task, Model({name: array + np.float32(amount) for name, array in model.items()}), num_examples)

    return train


def answer(task: TaskAssignment, model: Model | None, num_examples: int = 1, **metrics: float) -> TaskResult:
    """The answer to *task* with a small *model*, whose tensors ride along."""
    return TaskResult(task.key, UpdateRef(None if model is None else small(model), num_examples, metrics))


def small(model: Model) -> ModelRef:
    """The reference of a model whose tensors all ride along."""
    tensors = [(name, array, array.tobytes()) for name, array in model.items()]
    return ModelRef(
        tuple(TensorRef(name, array.dtype.name, array.shape, digest_of(raw), raw) for name, array, raw in tensors)
    )


def opened(reference: ModelRef) -> Model:
    """The model that *reference* holds, as far as its tensors ride along."""
    return Model(
        {
            tensor.name: np.frombuffer(tensor.inline, tensor.dtype).reshape(tensor.shape)
            for tensor in reference.tensors
            if tensor.inline is not None
        }
    )


def silent(task: TaskAssignment, model: Model) -> None:
    """No answer: the test gives it."""
    del task, model


def faulty(reason: str) -> Train:
    def train(task: TaskAssignment, model: Model) -> TaskResult:
        del model
        return TaskResult(task.key, fault=TaskFault("training-failed", reason, log_tail="Traceback ..."))

    return train


class Site:
    """A client and its job's cell, both scripted: it takes every job (or refuses, with *refuses*) and trains."""

    def __init__(
        self,
        dialler: Dialler,
        server: FederatedServer,
        name: str = "site-1",
        *,
        train: Train = silent,
        refuses: HanseError | None = None,
        starts: bool = True,
        **more: Any,
    ) -> None:
        self.name = ClientName(name)
        self.train = train
        self.job: Wire | None = None
        self.attempts: list[int] = []
        self.answered: asyncio.Queue[HanseError | None] = asyncio.Queue()
        """For each answer that went by itself: ``None``, or what the server refused it with."""
        self._dialler, self._server, self._refuses, self._starts = dialler, server, refuses, starts
        self._started: asyncio.Queue[Wire] = asyncio.Queue()
        answers = {(Channel.JOB, "deploy"): self._deploy, (Channel.JOB, "start"): self._start}
        self.wire = dialler.site(server, name, answers=answers, **more)

    def _deploy(self, message: Message) -> None:
        del message
        if self._refuses is not None:
            raise self._refuses

    def _start(self, message: Message) -> None:
        start = expect(message, StartJob)
        self.attempts.append(start.attempt)
        if self._starts:
            asyncio.get_running_loop().create_task(self.run(start), name=f"process at {self.name}")

    async def run(self, start: StartJob) -> None:
        """Be the job's process."""
        fqcn = f"{self.name}.{start.job_id}"
        answers = {(Channel.TASK, "task"): self._task}
        self.job = self._dialler.job_wire(self._server, fqcn, start.identity, answers=answers)
        self._dialler.open.append(self.job)
        await self.job.open()
        self._started.put_nowait(self.job)

    def started(self) -> Wire:
        """Return the cell of the job's process once it is connected."""
        return wait(self._started.get())

    async def _task(self, message: Message) -> None:
        task = expect(message, TaskAssignment)
        model = Model({}) if task.model is None else opened(task.model)
        result = self.train(task, model)
        if result is None or self.job is None:
            return
        asyncio.get_running_loop().create_task(self._answer(self.job, result), name=f"answer of {self.name}")

    async def _answer(self, job: Wire, result: TaskResult) -> None:
        try:
            await job.cell.ask("server", Channel.TASK, "result", result, timeout_s=20)  # type: ignore[arg-type]
        except HanseError as error:
            self.answered.put_nowait(error)
        else:
            self.answered.put_nowait(None)

    def outcome(self) -> HanseError | None:
        """Return how the server took the next answer that went by itself."""
        return wait(self.answered.get())

    def task(self) -> TaskAssignment:
        """Return the next task that the server has sent."""
        job = self.job or self.started()
        given = job.told(Channel.TASK, "task")
        assert isinstance(given, TaskAssignment)
        return given

    def send(self, result: TaskResult) -> None:
        """Send an answer; what the server refuses it with is raised."""
        assert self.job is not None
        self.job.ask(Channel.TASK, "result", result)

    def refused(self, result: TaskResult) -> HanseError:
        assert self.job is not None
        return self.job.refused(Channel.TASK, "result", result)


class Large:
    """Models of one tensor that is too large to ride along, as a site's process moves them."""

    def __init__(self, site: Site, server: FederatedServer, job_id: JobId) -> None:
        self._site, self._server, self._scope = site, server, f"job/{job_id}"

    @contextmanager
    def _transfers(self) -> Any:
        assert self._site.job is not None
        with transferring(self._site.job, target_of(self._server), self._site.job._tls) as transfers:
            yield transfers

    def upload(self, value: float) -> UpdateRef:
        data = np.full(10_000, value, np.float32).tobytes()
        with self._transfers() as transfers:
            wait(transfers.upload(self._scope, digest_of(data), memoryview(data)))
        return UpdateRef(ModelRef((TensorRef("w", "float32", (10_000,), digest_of(data)),)), 1)

    def download(self, model: ModelRef | None, into: TensorFiles) -> float:
        assert model is not None
        (tensor,) = model.tensors
        with self._transfers() as transfers:
            partial = into.begin(tensor.digest, tensor.size_bytes)
            wait(transfers.download(self._scope, tensor.digest, tensor.size_bytes, partial))
        return float(np.frombuffer(into.map(tensor.digest), np.float32)[0])


def refusing(why: str) -> SiteRefused:
    return SiteRefused("site", why)


def w(value: float) -> Model:
    """Return the model of the tiny job with this value everywhere."""
    return Model({"w": np.full(3, value, np.float32), "b": np.asarray(value, np.float32)})


async def tensor_file(server: FederatedServer, job_id: JobId, digest: Digest) -> Path:
    """Return where *server* has a tensor of a run."""
    return (await server.jobs.files.result_files(job_id)).path(digest)
