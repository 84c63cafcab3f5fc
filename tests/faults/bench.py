"""A deployment on which runs are disturbed, and everything that must hold when such a run has ended.

A run is followed as any administrator follows it; when it has come to a step, its disturbance is carried out. Steps are
the run's own events, so nothing here waits for luck. Afterwards ``check`` looks at the model's bytes, the journal, the
processes and the files, as they would be after a run without trouble.
"""

import asyncio
import fcntl
import json
import os
import re
import shutil
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import psutil
from benchmarks.deployment import Deployment, deployment

from hanse.admin.session import AdminSession
from hanse.cell.loop import run
from hanse.client.workspace import job_folders
from hanse.identity.kits import Kit
from hanse.launch.surviving import pid_at
from hanse.messages import JobEvent, JobView
from hanse.run.authoring import PROJECT_FILE
from hanse.settings import AdminSettings
from tests.faults import journal
from tests.faults.changes import wait_none
from tests.faults.steps import CLIENTS, ROUNDS, STEPS, Progress, Step, steps_of

JOB: Final = Path(__file__).parents[1] / "e2e" / "job"
RUN_WITHIN_S: Final = 120.0
"""How long a disturbed run may take to end; the slowest wait for a few heartbeats and restarts."""
SETTLED_WITHIN_S: Final = 30.0
"""How long a job's processes and files may stay after its end."""
PATIENCE_S: Final = 60.0


@dataclass(frozen=True)
class Disturbance:
    """What is done to a run, after the step of that index in ``STEPS``; *once_back*: when the server is back, too."""

    at: int
    act: Callable[[], object]
    once_back: bool = False

    def is_due(self, seen: JobView | JobEvent, index: int) -> bool:
        """Return whether it is time, now that *seen* was told and step *index* is the last."""
        return self.at <= index and (isinstance(seen, JobView) or not self.once_back)


@dataclass
class Told:
    """What was told of a run while it was disturbed."""

    job_id: str = ""
    events: list[JobEvent] = field(default_factory=list)


@dataclass(frozen=True)
class Undisturbed:
    """A run of some job without trouble: its *steps*, in order, and what every disturbed run must come to, too.

    *rounds* are the metrics of each round and who answered; *writes* its journal's tasks and answers.
    """

    steps: Sequence[Step]
    result: str
    rounds: Sequence[tuple[int, dict[str, float], tuple[str, ...]]]
    writes: Sequence[journal.Write]


class Bench:
    """A running deployment whose runs are disturbed; ``undisturbed`` is the digest of the model that they must give."""

    def __init__(self, running: Deployment, gates: Path) -> None:
        self.running = running
        self.gates = gates
        self.undisturbed = ""

    def begin(self) -> None:
        """Start everybody, and run the job once without trouble: its steps are those that the tests know."""
        self.running.start(*self.running.servers[:1], *self.running.names)
        journal.record(self.store)
        told = Told()
        view = run(self.run(told=told), RUN_WITHIN_S)
        steps = steps_of(told.events)
        assert sorted(steps, key=STEPS.index) == list(STEPS[-len(steps) :]), f"not the steps of {STEPS}: {steps}"
        self.undisturbed = view.result
        self.check(view)

    @property
    def store(self) -> journal.Where:
        """The server's database."""
        return self.running.workspace("server") / "store.db"

    @asynccontextmanager
    async def session(self) -> AsyncIterator[AdminSession]:
        """Give a session of the administrator."""
        kit = Kit.load(self.running.kit("admin@bench"), AdminSettings)
        async with AdminSession(kit, patience_s=PATIENCE_S) as session:
            yield session

    async def run(
        self,
        disturbances: Sequence[Disturbance] = (),
        *,
        told: Told | None = None,
        job: Path = JOB,
        steps: Sequence[Step] = STEPS,
        hear: Callable[[JobEvent], object] = lambda _: None,
        committed: Callable[[int], object] = lambda _: None,
        within_s: float = RUN_WITHIN_S,
    ) -> JobView:
        """Run *job*, whose steps are *steps*, with *disturbances* at theirs, in order, and return its end.

        Events while nobody can be told (the server is away) are not seen; a disturbance whose step went by unseen is
        carried out at the next thing told, at the latest when the job has ended. What was told is added to *told*.
        *hear* is called with each event, and *committed*, whenever anything was told, with the last committed round;
        both in a thread, and *committed* after the disturbances that are due.

        Raises:
            AssertionError: the run does not end in time; the message says how far it came.
        """
        progress, waiting, told = Progress(steps), list(disturbances), told if told is not None else Told()
        try:
            async with asyncio.timeout(within_s), self.session() as session:
                told.job_id = (await session.submit(job)).job_id
                async for seen in session.follow(told.job_id):
                    if isinstance(seen, JobEvent):
                        told.events.append(seen)
                        await asyncio.to_thread(hear, seen)
                    progress.take(seen)
                    while waiting and waiting[0].is_due(seen, progress.index):
                        await asyncio.to_thread(waiting.pop(0).act)
                    await asyncio.to_thread(committed, progress.round)
                for late in waiting:
                    await asyncio.to_thread(late.act)
                return await session.wait(told.job_id)
        except TimeoutError:
            raise AssertionError(
                f"job {told.job_id} has not ended within {within_s:g} s; the last that was heard of it is {progress}"
            ) from None

    def check(
        self,
        view: JobView,
        *,
        may_be_asked_again: bool = False,
        may_be_answered_again: bool = False,
        may_be_unwritten: bool = False,
    ) -> None:
        """Assert that the job of *view* has ended as one without trouble, and has left nothing behind.

        With *may_be_asked_again* a client may have been given more than one task in a round; with
        *may_be_answered_again* an answer may have been taken back, and the task answered once more; with
        *may_be_unwritten* the database may have broken off the write of an answer that its round's commit has.
        """
        assert (view.state, view.code, view.reason) == ("completed", "", "")
        assert view.result == self.undisturbed, "the model has other bytes than that of an undisturbed run"
        assert [each.round for each in view.history] == list(range(ROUNDS + 1))
        assert all(each.answered == tuple(self.running.names) for each in view.history[1:])
        names = self.running.names
        journal.check_completed(
            self.store,
            view.job_id,
            clients=names,
            rounds=ROUNDS,
            may_be_asked_again=may_be_asked_again,
            may_be_answered_again=may_be_answered_again,
            may_be_unwritten=may_be_unwritten,
        )
        self.check_left_nothing(view.job_id)

    def undisturbed_run(self, told: Told, view: JobView) -> Undisturbed:
        """Return what runs of a job must be like of which one ended with *view* without trouble, and *told* this."""
        assert (view.state, view.code, view.reason) == ("completed", "", "")
        writes = journal.written(self.store, view.job_id)
        assert len(set(writes)) == len(writes), (
            f"more than once without trouble: {Counter(writes) - Counter(set(writes))}"
        )
        made = Undisturbed(steps_of(told.events), view.result, _rounds_of(view), writes)
        self.check_as(view, made)
        return made

    def check_as(self, view: JobView, undisturbed: Undisturbed) -> None:
        """Assert that the job of *view* has ended as *undisturbed*, and has left nothing behind."""
        ended = (view.state, view.code, view.reason)
        assert ended == ("completed", "", ""), f"it ended as {ended}"
        assert view.result == undisturbed.result, "the model has other bytes than that of an undisturbed run"
        rounds = _rounds_of(view)
        assert rounds == undisturbed.rounds, f"its rounds were {rounds}, and not {undisturbed.rounds}"
        journal.check_written(self.store, view.job_id, undisturbed.writes, rounds=len(undisturbed.rounds) - 1)
        self.check_left_nothing(view.job_id)

    def check_worked_once(self, job_id: str) -> None:
        """Assert that no client of that job, whose processes have lived throughout, worked on any task twice."""
        for name in self.running.names:
            log = (self.running.workspace(name) / "jobs" / job_id / "job.log").read_text()
            received = Counter(re.findall(r"task received job=\S+ (task=\S+ round=\d+)", log))
            assert len(received) >= ROUNDS, f"{name} worked on {sorted(received)} only"
            assert set(received.values()) == {1}, f"{name} worked more than once on a task: {received}"

    def check_left_nothing(self, job_id: str) -> None:
        """Assert that soon neither a process nor a file is left of the job but what is meant to stay."""
        self.check_processes()
        self.check_files(job_id)

    def check_processes(self) -> None:
        """Assert that soon no process is left of this deployment but its participants'."""
        pids = {process.pid for process in self.running.processes.values()}
        others = [process for process in self.running.living() if process.pid not in pids]
        _, alive = psutil.wait_procs(others, timeout=SETTLED_WITHIN_S)
        assert not alive, f"{SETTLED_WITHIN_S:g} s after the job's end there still is {[_described(p) for p in alive]}"

    def check_files(self, job_id: str) -> None:
        """Assert that soon no file is left of the job but what is meant to stay."""
        folders = [self.running.workspace(name) for name in (*self.running.servers, *self.running.names)]
        if self.running.shared != self.running.root:
            folders.append(self.running.shared)
        wait_none(
            lambda: [str(path) for folder in folders for path in leftovers(folder, job_id)],
            folders,
            what=f"the files of job {job_id} to be deleted",
            within_s=SETTLED_WITHIN_S,
        )

    # what can be done to it

    def victims(self, victim: str, site: str = "site-1") -> list[psutil.Process]:
        """Return the processes that *victim* names: ``server``, ``run``, ``agent`` or ``client``; those of *site*."""
        match victim:
            case "server":
                return [self.running.process("server")]
            case "run":
                return self.job_processes_of("server")
            case "agent":
                return [self.running.process(site)]
            case "client":
                return self.job_processes_of(site)
        raise ValueError(f"there is no victim {victim!r}")

    def job_processes_of(self, name: str) -> list[psutil.Process]:
        """Return a participant's jobs' processes; a client's may be such as an earlier agent has started."""
        if name in self.running.servers:
            return self.running.process(name).children()
        pids = [pid_at(folder.path) for folder in job_folders(self.running.workspace(name))]
        return [psutil.Process(pid) for pid in pids if pid is not None and psutil.pid_exists(pid)]

    def kill(self, victim: str, site: str = "site-1") -> None:
        """Kill *victim*; a server and an agent are started again, as whatever supervises them would."""
        name = {"server": "server", "agent": site}.get(victim)
        if name is not None:
            self.running.kill(name)
            self.running.start(name)
            return
        for process in self.victims(victim, site):
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def kill_at_once(self, victims: Sequence[tuple[str, str]]) -> None:
        """Kill several, before any of them is started again."""
        named = {"server": "server"}
        names = [named.get(victim, site) for victim, site in victims if victim in ("server", "agent")]
        processes = [process for victim, site in victims for process in self.victims(victim, site)]
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        for name in dict.fromkeys(names):
            self.running.kill(name)
        self.running.start(*dict.fromkeys(names))

    @contextmanager
    def paused(self, victim: str, site: str = "site-1") -> Iterator[None]:
        """Stop *victim* (SIGSTOP) until the end of the block."""
        processes = self.victims(victim, site)
        for process in processes:
            process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            for process in processes:
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGCONT)

    def held(self, site: str, round_number: int) -> "Gate":
        """Hold *site* up before its training in a round until the gate that this returns is closed."""
        return Gate(self.gates / f"{site}-{round_number}")

    def logs(self) -> str:
        """Return what the server and the agents have said."""
        return "".join(self.running.log(name).read_text() for name in (*self.running.servers, *self.running.names))


def job_like(folder: Path, **settings: object) -> Path:
    """Return the folder of a job that is the tests' but for these *settings* of its workflow; made in *folder*."""
    made = _copied(folder)
    with (made / PROJECT_FILE).open("a") as file:  # whose last table is the workflow's
        file.writelines(f"{key} = {json.dumps(value)}\n" for key, value in settings.items())
    return made


def job_with(folder: Path, workflow: Mapping[str, object], *files: Path) -> Path:
    """Return the folder of a job that is the tests' but for its *workflow*, and has these *files* too; in *folder*."""
    made = _copied(folder)
    project = made / PROJECT_FILE
    head, table, _ = project.read_text().partition("[tool.hanse.workflow]\n")
    project.write_text(head + table + "".join(f"{key} = {json.dumps(value)}\n" for key, value in workflow.items()))
    for path in files:
        shutil.copy(path, made)
    return made


def _copied(folder: Path) -> Path:
    return Path(shutil.copytree(JOB, folder / "job", ignore=shutil.ignore_patterns("__pycache__")))


class Gate:
    """A gate of the tests' job: a locked file that holds training up until it is closed; twice is once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)

    def close(self) -> None:
        """Let whoever waits at the gate, or comes later, on."""
        if self._descriptor is not None:
            self._path.unlink()
            os.close(self._descriptor)
            self._descriptor = None


def leftovers(workspace: Path, job_id: str) -> Iterator[Path]:
    """Yield what lies in a participant's *workspace* that should not, now that *job_id* has ended."""
    run, site = workspace / "runs" / job_id, workspace / "jobs" / job_id
    staying = {run / name for name in ("package", "code", "result", "server.log")} | {site / "job.log"}
    for place, folders, names in os.walk(workspace):  # which takes it well when a folder goes meanwhile
        for path in (Path(place) / name for name in (*folders, *names)):
            is_of_job = path.parent in (run, site) and path not in staying
            is_unfinished = path.suffix in (".part", ".tmp") or path.name.startswith(".incoming-")
            is_upload = path.parent.parent == workspace / "uploads" and path.is_file()
            if is_of_job or is_unfinished or is_upload:
                yield path


def _rounds_of(view: JobView) -> list[tuple[int, dict[str, float], tuple[str, ...]]]:
    return [(each.round, dict(each.metrics), each.answered) for each in view.history]


def _described(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return f"{process.pid} {' '.join(process.cmdline())}"
    return str(process.pid)


@contextmanager
def provisioned(gates: Path, **project: Any) -> Iterator[Bench]:
    """Give a bench, whose deployment has still to ``begin``, until the block ends."""
    gates.mkdir(exist_ok=True)
    with _environment("HANSE_TEST_GATES", str(gates)), deployment(clients=CLIENTS, **project) as running:
        yield Bench(running, gates)


@contextmanager
def bench(gates: Path, **project: Any) -> Iterator[Bench]:
    """Give a bench that has begun, until the block ends."""
    with provisioned(gates, **project) as made:
        made.begin()
        yield made


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before
