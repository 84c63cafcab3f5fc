"""Tasks that outlive their round: answered in a later one, over restarts too, and counted once."""

import asyncio
import math
import threading
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hanse.errors import ProtocolError, Unreachable
from hanse.events import EventType
from hanse.ids import SERVER, ClientName, Digest, JobId, job_cell
from hanse.job import JobState, WorkflowSpec
from hanse.messages import (
    Channel,
    CommitRound,
    Heartbeat,
    JobCredentials,
    ModelRef,
    StateRef,
    TaskAssignment,
    TaskCancelled,
    TaskFault,
    TaskKey,
    TaskResult,
    TensorRef,
)
from hanse.model import Model
from hanse.server import FederatedServer
from hanse.server.run_folder import RunFolder
from hanse.storage.memory import MemoryStore
from hanse.storage.models import read_safetensors
from hanse.storage.tensors import TensorFiles, digest_of

from .job_world import Large, ScriptedLauncher, Site, Threads, answer, opened, outcome, submit
from .world import WITHIN_S, Dialler, Recorder, args, on_loop, settings, wait

MakeServer = Callable[..., FederatedServer]
Start = Callable[..., FederatedServer]


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def start(deployed: MakeServer, recorder: Recorder, tmp_path: Path) -> Start:
    """``start(launcher)``: a deployed server, by default one whose runs are threads."""

    def make(launcher: Any = None) -> FederatedServer:
        arguments = args(tmp_path / "ws", launcher=launcher or Threads(), settings=settings())
        return deployed(arguments=arguments, handlers=[recorder])

    return make


def w(value: float) -> Model:
    return Model({"w": np.full(3, value, np.float32), "b": np.asarray(value, np.float32)})


def fedbuff(**fields: Any) -> WorkflowSpec:
    return WorkflowSpec("fedbuff", fields)


def result_of(server: FederatedServer, job_id: JobId) -> Model:
    record = outcome(server, job_id)
    assert record.state is JobState.COMPLETED, record.reason

    async def path(digest: Digest) -> Path:
        return (await server.jobs.files.result_files(job_id)).path(digest)

    return read_safetensors(wait(path(record.result)))


def answered(server: FederatedServer, job_id: JobId) -> list[tuple[str, ...]]:
    return [entry.answered for entry in wait(server.jobs.board.view(job_id)).history]


def reconnect(sites: Iterable[Site], server: FederatedServer, dialler: Dialler, job_id: JobId) -> None:
    """Have the sites' agents and processes, which went on without a server, come to *server*."""
    for site in sites:
        assert site.job is not None
        assert site.job.credentials is not None
        agent = dialler.site(server, site.name, credentials=site.wire.credentials)
        agent.ask(Channel.SERVER, "heartbeat", Heartbeat((job_id,)))
        wire = dialler.job_wire(
            server, f"{site.name}.{job_id}", JobCredentials(site.job.credentials), tls=site.job._tls
        )
        site.job = dialler.dial(wire)


def test_a_task_is_answered_two_rounds_later_and_then_cancelled_with_the_last(
    start: Start, dialler: Dialler, tmp_path: Path
) -> None:
    server = start()
    fast, slow = Site(dialler, server, "site-1"), Site(dialler, server, "site-2")
    job_id = submit(server, tmp_path, workflow=fedbuff(rounds=3, buffer_size=1))
    late = slow.task()
    for value in (1, 3):
        fast.send(answer(fast.task(), w(value)))
    third = fast.task()
    assert opened(third.model or ModelRef()) == w(3)
    assert slow.job is not None
    assert slow.job.told_nothing(Channel.TASK, "cancelled")

    slow.send(answer(late, w(4)))

    assert result_of(server, job_id) == w(np.float32(3 + 4 / math.sqrt(3)))
    assert answered(server, job_id) == [(), ("site-1",), ("site-1",), ("site-2",)]
    assert fast.job is not None
    assert fast.job.told(Channel.TASK, "cancelled") == TaskCancelled(third.key)


def test_an_answer_to_a_task_that_was_not_carried_is_stale(start: Start, dialler: Dialler, tmp_path: Path) -> None:
    server = start()
    fast, slow = Site(dialler, server, "site-1"), Site(dialler, server, "site-2")
    submit(server, tmp_path, workflow=fedbuff(rounds=9, buffer_size=1, max_staleness=1))
    late = slow.task()
    fast.send(answer(fast.task(), w(1)))
    fast.send(answer(fast.task(), w(2)))
    fresh = slow.task().key
    assert (fresh.round, fresh.name, fresh.client) == (3, "train", "site-2"), "it gets the newest model"

    assert slow.job is not None
    assert slow.job.told(Channel.TASK, "cancelled") == TaskCancelled(late.key)
    assert slow.refused(answer(late, w(4))).reason == (
        "site-2 sent a stale answer: task 'train' of round 1 is no longer wanted"
    )
    fast.send(answer(fast.task(), w(3)))
    fast.task()
    assert slow.refused(answer(late, w(4))).reason == (
        "site-2 sent a stale answer: task 'train' of round 1 is over: round 3 is committed"
    )


@pytest.fixture(params=["server", "run"])
def interrupted(
    request: pytest.FixtureRequest, start: Start, dialler: Dialler, recorder: Recorder
) -> Callable[..., FederatedServer]:
    """``interrupted(launcher, server, sites, job_id)``: what goes on when a process was killed."""

    def interrupt(launcher: Threads, server: FederatedServer, sites: list[Site], job_id: JobId) -> FederatedServer:
        if request.param == "run":
            launcher.started[-1].kill()
            recorder.wait_for(EventType.START_RUN, count=2)
            return server
        server.close()
        dialler.close()
        again = start()
        reconnect(sites, again, dialler, job_id)
        return again

    return interrupt


def test_what_a_carried_task_was_answered_with_outlives_a_kill_and_counts_once(
    start: Start, dialler: Dialler, tmp_path: Path, interrupted: Callable[..., FederatedServer]
) -> None:
    launcher = Threads()
    server = start(launcher)
    sites = [Site(dialler, server, f"site-{number}") for number in (1, 2, 3)]
    job_id = submit(server, tmp_path, min_clients=3, workflow=fedbuff(rounds=3, buffer_size=2))
    first = [site.task() for site in sites]
    for site, task, value in zip(sites[:2], first, (1, 3), strict=False):
        site.send(answer(task, w(value)))  # step 1: the mean, 2
    second = [site.task() for site in sites[:2]]
    sites[2].send(answer(first[2], w(8)))  # counts in step 2, for 8 / sqrt(2), and the step lacks another

    before, server = server, interrupted(launcher, server, sites, job_id)

    if server is not before:
        assert [site.task().key for site in sites[:2]] == [task.key for task in second], "they go out again, no other"
    sites[0].send(answer(second[0], w(4)))  # step 2: 2 + ((4 - 2) + 8 / sqrt(2)) / 2
    step_2 = np.float32(3 + 4 / math.sqrt(2))
    third = [site.task() for site in (sites[0], sites[2])]
    assert [opened(task.model or ModelRef()) for task in third] == [w(step_2)] * 2
    sites[1].send(answer(second[1], w(2)))  # of the model of step 1, so it changes nothing, and counts one
    sites[2].send(answer(third[1], w(step_2 + 1)))

    assert result_of(server, job_id) == w(
        np.float32(np.float64(step_2) + (np.float64(np.float32(step_2 + 1)) - step_2) / 2)
    )
    assert answered(server, job_id) == [(), ("site-1", "site-2"), ("site-1", "site-3"), ("site-2", "site-3")]


def test_an_open_carried_task_outlives_a_kill_and_goes_out_again(
    start: Start, dialler: Dialler, tmp_path: Path, interrupted: Callable[..., FederatedServer]
) -> None:
    launcher = Threads()
    server = start(launcher)
    fast, slow = sites = [Site(dialler, server, "site-1"), Site(dialler, server, "site-2")]
    job_id = submit(server, tmp_path, workflow=fedbuff(rounds=2, buffer_size=1))
    late = slow.task()
    fast.send(answer(fast.task(), w(1)))
    fast.task()

    before, server = server, interrupted(launcher, server, sites, job_id)

    if server is not before:
        again = slow.task()
        assert (again.key, opened(again.model or ModelRef())) == (late.key, w(0))
    slow.send(answer(late, w(4)))
    assert result_of(server, job_id) == w(np.float32(1 + 4 / math.sqrt(2)))
    assert answered(server, job_id) == [(), ("site-1",), ("site-2",)]


def test_an_accepted_answer_of_a_client_that_is_lost_since_counts_after_a_restart(
    start: Start, dialler: Dialler, tmp_path: Path
) -> None:
    server = start()
    sites = [Site(dialler, server, f"site-{number}") for number in (1, 2)]
    job_id = submit(server, tmp_path, workflow=WorkflowSpec("fedavg", {"rounds": 1, "quorum": 2}))
    tasks = [site.task() for site in sites]
    sites[0].send(answer(tasks[0], w(1)))
    server.close()
    dialler.close()
    again = start()
    reconnect(sites[1:], again, dialler, job_id)  # site-1 does not come back

    assert sites[1].task().key == tasks[1].key, "it comes again once the run is taken up; before, no answer is taken"
    sites[1].send(answer(tasks[1], w(3)))

    assert result_of(again, job_id) == w(2)


def test_a_run_whose_link_broke_hears_what_it_missed(
    start: Start, dialler: Dialler, recorder: Recorder, tmp_path: Path
) -> None:
    server = start()
    site = Site(dialler, server, "site-1")
    job_id = submit(server, tmp_path, min_clients=1, workflow=WorkflowSpec("fedavg", {"rounds": 1}))
    task, cell = site.task(), server.get_cell()
    assert cell is not None

    on_loop(lambda: cell.drop(job_cell(SERVER, job_id), Unreachable("the run", "a test has cut its link")))
    site.send(answer(task, w(3)))

    assert result_of(server, job_id) == w(3)
    assert recorder.kinds.count(EventType.START_RUN) == 2


def test_the_tensors_of_carried_tasks_are_kept_and_no_others(start: Start, dialler: Dialler, tmp_path: Path) -> None:
    server = start()
    fast, slow = Site(dialler, server, "site-1"), Site(dialler, server, "site-2")
    late_counts = {"rounds": 3, "fraction": 0.5, "over_selection": 1.0, "late": "next", "max_staleness": 5}
    job_id = submit(server, tmp_path, model="tiny_model:large", workflow=WorkflowSpec("fedavg", late_counts))
    late, task = slow.task(), fast.task()
    here, there = Large(fast, server, job_id), Large(slow, server, job_id)
    fast.send(TaskResult(task.key, here.upload(1)))
    task = fast.task()
    update = there.upload(7)  # and then its process takes a while to say so
    fast.send(TaskResult(task.key, here.upload(2)))
    fast.task()

    def tensors() -> set[str]:
        folder = tmp_path / "ws" / "runs" / job_id
        return {path.name for path in folder.rglob("tensors*/*") if path.suffix == ""}

    kept = [late.model, update.model, fast_model(2)]
    assert tensors() == {tensor.digest for model in kept for tensor in (model or ModelRef()).tensors}
    assert there.download(late.model, TensorFiles(tmp_path / "site-2")) == 0.0
    slow.send(TaskResult(late.key, update))

    assert result_of(server, job_id) == Model({"w": np.full(10_000, 7, np.float32)})


def test_a_round_that_is_committed_while_tensors_are_looked_for_that_may_be_lost_loses_none(
    start: Start, dialler: Dialler, recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looking, verify = threading.Event(), TensorFiles.verify

    def slowly(files: TensorFiles, digest: Digest) -> bool:
        if not looking.is_set():
            looking.set()
            recorder.has_come(EventType.ROUND_DONE, count=2, within_s=1)
        return verify(files, digest)

    def other_bytes(task: TaskAssignment, model: Model) -> TaskResult:
        del model
        return TaskResult(task.key, fault=TaskFault(ProtocolError.code, "other bytes than the digest names"))

    monkeypatch.setattr(TensorFiles, "verify", slowly)
    server = start()
    fast, _ = Site(dialler, server, "site-1"), Site(dialler, server, "site-2", train=other_bytes)
    one_is_enough = WorkflowSpec("fedavg", {"rounds": 2, "fraction": 0.5, "over_selection": 1.0})
    job_id = submit(server, tmp_path, model="tiny_model:large", workflow=one_is_enough)
    task, here = fast.task(), Large(fast, server, job_id)
    assert looking.wait(10)
    fast.send(TaskResult(task.key, here.upload(1)))
    fast.send(TaskResult(fast.task().key, here.upload(2)))

    assert result_of(server, job_id) == Model({"w": np.full(10_000, 2, np.float32)})


class Ordered(MemoryStore):
    """A store that notes, at each commit, whose answers it holds, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.answered: list[list[str]] = []

    async def commit_round(self, epoch: int, job_id: JobId, commit: CommitRound, **more: Any) -> None:
        self.answered.append([answer.key.client for answer in (await self.snapshot(job_id)).answers])
        await super().commit_round(epoch, job_id, commit, **more)


def test_answers_are_journalled_in_the_order_in_which_the_run_has_heard_of_them(
    deployed: MakeServer, dialler: Dialler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeping, has_kept, may_keep = threading.Event(), threading.Event(), on_loop(asyncio.Event)
    keep = RunFolder.keep_tensors
    slow, quick = fast_model(1).tensors[0].digest, fast_model(2).tensors[0].digest

    async def keep_slowly(folder: RunFolder, files: TensorFiles, digests: Collection[Digest]) -> None:
        if slow in digests:
            keeping.set()
            await may_keep.wait()
        await keep(folder, files, digests)
        if quick in digests:
            has_kept.set()

    monkeypatch.setattr(RunFolder, "keep_tensors", keep_slowly)
    store = on_loop(Ordered)
    arguments = args(tmp_path / "ws", launcher=Threads(), settings=settings())
    server = deployed(arguments=arguments, snapshot_persistor=store)
    first, second = Site(dialler, server, "site-1"), Site(dialler, server, "site-2")
    once = WorkflowSpec("fedavg", {"rounds": 1})
    job_id = submit(server, tmp_path, model="tiny_model:large", workflow=once)
    answers = [
        (site, TaskResult(site.task().key, Large(site, server, job_id).upload(value)))
        for site, value in ((first, 1), (second, 2))
    ]
    sending = [threading.Thread(target=site.send, args=(result,)) for site, result in answers]
    sending[0].start()
    assert keeping.wait(WITHIN_S)
    sending[1].start()
    assert has_kept.wait(WITHIN_S)
    on_loop(may_keep.set)
    for thread in sending:
        thread.join(WITHIN_S)

    assert outcome(server, job_id).state is JobState.COMPLETED
    assert store.answered == [[], ["site-1", "site-2"]]


def fast_model(value: float) -> ModelRef:
    data = np.full(10_000, value, np.float32).tobytes()
    return ModelRef((TensorRef("w", "float32", (10_000,), digest_of(data)),))


def lose(path: Path) -> None:
    path.unlink()


def cut_short(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(100)


@pytest.mark.parametrize("harm", [lose, cut_short])
def test_an_answer_that_the_disk_has_lost_is_asked_for_again_by_the_runs_next_process(
    start: Start, dialler: Dialler, tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    launcher = Threads()
    server = start(launcher)
    one, other = Site(dialler, server, "site-1"), Site(dialler, server, "site-2")
    job_id = submit(server, tmp_path, model="tiny_model:large", workflow=WorkflowSpec("fedavg", {"rounds": 1}))
    here, there = Large(one, server, job_id), Large(other, server, job_id)
    task, update, last = one.task(), here.upload(1), other.task()
    one.send(TaskResult(task.key, update))
    (tensor,) = (update.model or ModelRef()).tensors
    harm(server.jobs.live.runs[job_id].files.path(tensor.digest))
    launcher.started[0].kill()

    assert one.task() == task
    one.send(TaskResult(task.key, here.upload(1)))
    other.send(TaskResult(last.key, there.upload(3)))

    assert result_of(server, job_id) == Model({"w": np.full(10_000, 2, np.float32)})


def test_a_commit_carries_no_task_that_there_is_not(start: Start, dialler: Dialler, tmp_path: Path) -> None:
    launcher = on_loop(ScriptedLauncher)
    server = start(launcher)
    Site(dialler, server, "site-1", starts=False)
    job_id = submit(server, tmp_path, min_clients=1)
    launcher.next()

    async def commit() -> None:
        strange = TaskKey(0, "train", 0, ClientName("site-1"))
        await server.jobs.live.runs[job_id].commit(CommitRound(StateRef(0, ModelRef()), carried=(strange,)))

    with pytest.raises(ProtocolError, match=r"CommitRound\.carried is .*; expected tasks out or answered"):
        wait(commit())
    assert wait(server.jobs.board.view(job_id)).history == ()
