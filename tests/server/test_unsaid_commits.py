"""A store that does what it is asked and cannot say so, as when the line to the database breaks at that moment."""

import asyncio
import itertools
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hanse.cell.cell import RemoteError
from hanse.errors import NoSpace, ProtocolError, StoreFailed
from hanse.events import EventType
from hanse.ids import JobId
from hanse.job import JobRecord, JobState
from hanse.messages import Channel, CommitRound, JobFailure, Message, TaskFault, TaskKey, TaskResult
from hanse.model import Model
from hanse.server import FederatedServer
from hanse.storage.memory import MemoryStore
from hanse.storage.models import read_safetensors

from .job_world import Large, Site, Threads, outcome, plus, submit
from .world import Dialler, Recorder, args, on_loop, settings, wait

MakeServer = Callable[..., FederatedServer]


class UnsureStore(MemoryStore):
    """A store whose next operation of each kind in *unsure* is done and reported as failed.

    Those that are to be *unsure_then* are so from that moment on. *before_commit* comes before each commit.
    """

    def __init__(self) -> None:
        super().__init__()
        self.unsure: set[str] = set()
        self.unsure_then: set[str] = set()
        self.before_commit: Callable[[CommitRound], Any] | None = None

    async def add_job(self, epoch: int, record: JobRecord) -> None:
        await super().add_job(epoch, record)
        self._say("add_job")

    async def job(self, job_id: JobId) -> JobRecord:
        record = await super().job(job_id)
        self._say("job")
        return record

    async def replace_job(self, epoch: int, record: JobRecord, **more: Any) -> None:
        await super().replace_job(epoch, record, **more)
        self._say("replace_job")

    async def end_run(self, epoch: int, record: JobRecord, **more: Any) -> None:
        await super().end_run(epoch, record, **more)
        self._say("end_run")

    async def commit_round(self, epoch: int, job_id: JobId, commit: CommitRound, **more: Any) -> None:
        if self.before_commit is not None:
            await self.before_commit(commit)
        await super().commit_round(epoch, job_id, commit, **more)
        self._say("commit_round")

    async def accept_answer(self, epoch: int, job_id: JobId, result: TaskResult) -> TaskResult:
        accepted = await super().accept_answer(epoch, job_id, result)
        self._say("accept_answer")
        return accepted

    async def retract_answers(self, epoch: int, job_id: JobId, keys: Sequence[TaskKey]) -> None:
        await super().retract_answers(epoch, job_id, keys)
        self._say("retract_answers")

    def _say(self, write: str) -> None:
        if write in self.unsure:
            self.unsure.remove(write)
            self.unsure, self.unsure_then = self.unsure | self.unsure_then, set()
            raise StoreFailed("using the database", "the connection was lost")


@pytest.fixture
def store() -> UnsureStore:
    return UnsureStore()


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def launcher() -> Threads:
    return Threads()


@pytest.fixture
def server(
    deployed: MakeServer,
    store: UnsureStore,
    recorder: Recorder,
    launcher: Threads,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> FederatedServer:
    monkeypatch.setattr("hanse.server.jobs.POSTPONED_S", 0.01)
    arguments = args(tmp_path / "ws", launcher=launcher, settings=settings())
    return deployed(arguments=arguments, snapshot_persistor=store, handlers=[recorder])


def result_of(server: FederatedServer, job_id: JobId) -> Model:
    record = outcome(server, job_id)
    assert record.state is JobState.COMPLETED, record.reason
    return read_safetensors(wait(server.jobs.files.result_files(job_id)).path(record.result))


PLUS_TWO = Model({"w": np.full(3, 2, np.float32), "b": np.asarray(2, np.float32)})


def test_a_submission_that_was_stored_is_a_job(
    server: FederatedServer, store: UnsureStore, dialler: Dialler, tmp_path: Path
) -> None:
    Site(dialler, server, train=plus(1))
    store.unsure = {"add_job"}

    assert result_of(server, submit(server, tmp_path, min_clients=1)) == PLUS_TWO


def test_a_submission_of_which_nobody_knows_whether_it_was_stored_is_a_job_if_it_was(
    server: FederatedServer, store: UnsureStore, dialler: Dialler, tmp_path: Path
) -> None:
    Site(dialler, server, train=plus(1))
    store.unsure, store.unsure_then = {"add_job"}, {"job"}

    with pytest.raises(StoreFailed):
        submit(server, tmp_path, min_clients=1)
    (record,) = wait(store.jobs())

    assert result_of(server, record.job_id) == PLUS_TWO


def test_a_job_that_was_scheduled_is_started(
    server: FederatedServer, store: UnsureStore, dialler: Dialler, tmp_path: Path
) -> None:
    Site(dialler, server, train=plus(1))
    store.unsure = {"replace_job"}

    assert result_of(server, submit(server, tmp_path, min_clients=1)) == PLUS_TWO


def test_a_job_that_is_scheduled_again_is_started_once(
    server: FederatedServer,
    store: UnsureStore,
    recorder: Recorder,
    dialler: Dialler,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    deploys, postponed, replace_job = itertools.count(1), asyncio.Event(), store.replace_job

    async def deploy(message: Message) -> None:
        if next(deploys) == 1:
            raise NoSpace("unpacking a job", disk="/", folder="/hanse", why="No space left on device")
        await postponed.wait()  # as long as another task of the job is at it, this one must not have begun

    async def replaced(epoch: int, record: JobRecord, *, was: JobState) -> None:
        if record.state is JobState.SUBMITTED:
            if store.unsure_then:
                store.unsure, store.unsure_then = {"replace_job"}, set()
                server.jobs.wake()
            else:
                postponed.set()
        await replace_job(epoch, record, was=was)

    site = Site(dialler, server, train=plus(1))
    site.wire.cell.on(Channel.JOB, "deploy", deploy)
    store.unsure_then = {"replace_job"}
    monkeypatch.setattr(store, "replace_job", replaced)

    assert result_of(server, submit(server, tmp_path, min_clients=1)) == PLUS_TWO
    assert len(recorder.of(EventType.BEFORE_JOB_LAUNCH)) == 2


def test_a_job_that_was_given_up_is_announced(server: FederatedServer, store: UnsureStore, tmp_path: Path) -> None:
    store.unsure = {"end_run"}

    record = outcome(server, submit(server, tmp_path, start_within_s=0.1))

    assert (record.state, record.code) == (JobState.FAILED, "no-clients")


def test_a_job_of_which_nobody_knows_whether_it_was_given_up_is_announced_if_it_was(
    server: FederatedServer, store: UnsureStore, recorder: Recorder, tmp_path: Path
) -> None:
    store.unsure, store.unsure_then = {"end_run"}, {"job"}

    record = outcome(server, submit(server, tmp_path, start_within_s=0.1))

    assert (record.state, record.code) == (JobState.FAILED, "no-clients")
    assert [context.job_id for context in recorder.of(EventType.JOB_FAILED)] == [record.job_id]


def test_a_job_of_which_nobody_knows_whether_its_refusal_was_stored_is_announced_once(
    server: FederatedServer, store: UnsureStore, recorder: Recorder, dialler: Dialler, tmp_path: Path
) -> None:
    Site(dialler, server)
    watcher = dialler.site(server, "ada@demo", fqcn="ada@demo.cli-1")
    recorder.raising[EventType.BEFORE_JOB_LAUNCH] = ZeroDivisionError("not today")
    store.unsure, store.unsure_then = {"end_run"}, {"job"}
    submitted = server.jobs.submit

    async def watched(*arguments: Any, **more: Any) -> JobRecord:
        record = await submitted(*arguments, **more)
        server.jobs.board.watch(record.job_id, watcher.fqcn)
        return record

    server.jobs.submit = watched  # type: ignore[method-assign]  # before anything happens to it
    record = outcome(server, submit(server, tmp_path, min_clients=1))

    assert (record.state, record.code) == (JobState.FAILED, "launch-refused")
    assert watcher.told(Channel.ADMIN, "job.event").kind == EventType.JOB_FAILED.value
    assert [context.job_id for context in recorder.of(EventType.JOB_FAILED)] == [record.job_id]


def test_a_round_that_was_committed_is_over_for_the_runs_next_process(
    server: FederatedServer, store: UnsureStore, launcher: Threads, recorder: Recorder, dialler: Dialler, tmp_path: Path
) -> None:
    async def die_meanwhile(commit: CommitRound) -> None:
        if commit.state.round == 1 and len(launcher.started) == 1:
            store.unsure = {"commit_round"}
            await asyncio.to_thread(launcher.started[0].kill)

    Site(dialler, server, train=plus(1))
    store.before_commit = die_meanwhile
    job_id = submit(server, tmp_path, min_clients=1)

    assert result_of(server, job_id) == PLUS_TWO
    assert [context.round for context in recorder.of(EventType.ROUND_DONE)] == [0, 1, 2]


def test_the_runs_next_process_waits_for_a_commit_that_its_predecessor_has_asked_for(
    server: FederatedServer, store: UnsureStore, launcher: Threads, recorder: Recorder, dialler: Dialler, tmp_path: Path
) -> None:
    begun, may_go_on = threading.Event(), on_loop(asyncio.Event)

    async def slowly(commit: CommitRound) -> None:
        if commit.state.round == 1 and not begun.is_set():
            begun.set()
            await may_go_on.wait()

    Site(dialler, server, train=plus(1))
    store.before_commit = slowly
    job_id = submit(server, tmp_path, min_clients=1)
    assert begun.wait(20)
    launcher.started[0].kill()
    recorder.wait_for(EventType.START_RUN, count=2)
    on_loop(may_go_on.set)

    assert result_of(server, job_id) == PLUS_TWO
    assert [context.round for context in recorder.of(EventType.ROUND_DONE)] == [0, 1, 2]


def test_an_answer_that_was_taken_back_is_asked_for_again(
    server: FederatedServer, store: UnsureStore, dialler: Dialler, tmp_path: Path
) -> None:
    one, two, other = (Site(dialler, server, name) for name in ("site-1", "site-2", "site-3"))
    job_id = submit(server, tmp_path, min_clients=3, model="tiny_model:large")
    two.send(TaskResult(two.task().key, Large(two, server, job_id).upload(2)))
    task, update = one.task(), Large(one, server, job_id).upload(1)
    one.send(TaskResult(task.key, update))
    assert update.model is not None
    (tensor,) = update.model.tensors
    server.jobs.live.runs[job_id].files.path(tensor.digest).unlink()
    store.unsure = {"retract_answers"}
    found_it = TaskResult(other.task().key, fault=TaskFault(ProtocolError.code, "other bytes than the digest names"))

    refused = other.refused(found_it)
    other.send(found_it)

    assert isinstance(refused, RemoteError)
    assert refused.error_code == StoreFailed.code
    assert one.task() == task


def test_a_job_that_was_aborted_is_announced_as_that_whatever_ends_it_for_the_server(
    server: FederatedServer, store: UnsureStore, recorder: Recorder, dialler: Dialler, tmp_path: Path
) -> None:
    site = Site(dialler, server)
    job_id = submit(server, tmp_path, min_clients=1)
    site.task()
    store.unsure, store.unsure_then = {"end_run"}, {"job"}

    with pytest.raises(StoreFailed):
        wait(server.jobs.abort(job_id, reason="not needed any more"))
    on_loop(lambda: server.jobs.client_watch.failed_at(site.name, JobFailure(job_id, "exception", "it is broken")))

    assert outcome(server, job_id).state is JobState.ABORTED
    assert recorder.wait_for(EventType.JOB_ABORTED).reason == "not needed any more"
    assert recorder.of(EventType.JOB_FAILED) == []
    assert site.wire.told(Channel.JOB, "abort").reason == "not needed any more"


@pytest.mark.parametrize("can_be_asked", [True, False])
def test_a_job_that_was_aborted_does_not_go_on(
    server: FederatedServer,
    store: UnsureStore,
    recorder: Recorder,
    dialler: Dialler,
    tmp_path: Path,
    can_be_asked: bool,
) -> None:
    site = Site(dialler, server)
    job_id = submit(server, tmp_path, min_clients=1)
    site.task()
    store.unsure, store.unsure_then = {"end_run"}, set() if can_be_asked else {"job"}

    if not can_be_asked:
        with pytest.raises(StoreFailed):
            wait(server.jobs.abort(job_id, reason="not needed any more"))
    assert wait(server.jobs.abort(job_id, reason="not needed any more")).state is JobState.ABORTED

    assert recorder.wait_for(EventType.JOB_ABORTED).reason == "not needed any more"
    assert site.wire.told(Channel.JOB, "abort").reason == "not needed any more"


def test_a_task_that_a_handler_refuses_is_a_fault_also_while_the_store_is_away(
    server: FederatedServer, store: UnsureStore, recorder: Recorder, dialler: Dialler, tmp_path: Path
) -> None:
    site = Site(dialler, server)
    job_id = submit(server, tmp_path, min_clients=1)
    site.task()
    recorder.raising[EventType.BEFORE_TASK_DATA] = ZeroDivisionError("not today")
    store.unsure = {"accept_answer"}

    server.reset_tokens()

    record = outcome(server, job_id)
    assert (record.state, record.code, record.cause) == (JobState.FAILED, "too-few-clients", "task-refused")
