"""What hostile or unlucky sites, people and disks must not bring about: one's trouble is not everybody's."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from hanse.cell.loop import background_loop
from hanse.coordination.runs import Run
from hanse.coordination.service import ServiceState
from hanse.errors import (
    HanseError,
    NotInService,
    ProtocolError,
    SiteRefused,
    StoreFailed,
    Unauthenticated,
    UpdateRejected,
)
from hanse.ids import SERVER, ClientName, Fqcn, JobId, is_job_id
from hanse.job import JobRecord, JobState, WorkflowSpec
from hanse.messages import (
    Challenge,
    Channel,
    JobEnded,
    JobFailure,
    LogMetrics,
    ModelRef,
    Renew,
    ReturnCode,
    TaskAssignment,
    TaskCancelled,
    TaskFault,
    TaskKey,
    TaskResult,
    TensorRef,
    UpdateRef,
)
from hanse.model import Model
from hanse.server import FederatedServer
from hanse.server.active_run import MAX_LOGS_PER_S
from hanse.server.bounds import MAX_METRICS, MAX_STARTS, MAX_TAIL_CHARS
from hanse.server.inbox import MAX_ANSWERS_PER_TASK, Inbox
from hanse.server.run_journal import RunJournal
from hanse.storage.memory import MemoryStore
from hanse.storage.models import read_safetensors
from hanse.storage.tensors import TensorFiles, digest_of

from .job_world import ScriptedLauncher, Site, Threads, answer, outcome, package, small, spec, submit
from .world import (
    PROJECT,
    Dialler,
    Project,
    args,
    client_named,
    nonce,
    on_loop,
    peer_of,
    register_plain,
    request,
    settings,
    target_of,
    transferring,
    wait,
)

MakeServer = Callable[..., FederatedServer]
LONG = "x" * 1_000_000


ASKS_WITH_ANOTHER_MODEL = b"""
from contextlib import aclosing
from dataclasses import dataclass, replace
import numpy as np
from hanse import Federation, Model, State, Task

@dataclass(frozen=True)
class Probing:
    rounds: int = 1

    def start(self, model: Model) -> State:
        return State(model)

    async def round(self, state: State, federation: Federation) -> State:
        task = Task("probe", Model({"w": np.ones(10_000, np.float32)}), expects_model=False)
        async with aclosing(federation.ask(task, federation.clients)) as answers:
            async for _ in answers:
                pass
        return replace(state, round=state.round + 1)
"""


async def nothing(about: object) -> None:
    del about


class TroubledStore(MemoryStore):
    """A store in which a test meddles between the schedule's look at the jobs and what it does about them."""

    def __init__(self) -> None:
        super().__init__()
        self.after_looking: Callable[[list[JobRecord]], Any] | None = None
        self.before_accepting: Callable[[TaskResult], Awaitable[None]] = nothing
        self.before_issuing: Callable[[Sequence[TaskAssignment]], Awaitable[None]] = nothing
        self.failures = 0
        """How many of the following calls find the disk full."""

    async def jobs(self, **narrowed: Any) -> list[JobRecord]:
        self._may_fail()
        found = await super().jobs(**narrowed)
        if JobState.SUBMITTED in narrowed.get("states", ()) and found and self.after_looking is not None:
            await self.after_looking(found)
        return found

    async def renew_lease(self, epoch: int, **more: Any) -> Any:
        self._may_fail()
        return await super().renew_lease(epoch, **more)

    async def replace_job(self, epoch: int, record: JobRecord, **more: Any) -> None:
        self._may_fail()
        await super().replace_job(epoch, record, **more)

    async def end_run(self, epoch: int, record: JobRecord, **more: Any) -> None:
        self._may_fail()
        await super().end_run(epoch, record, **more)

    async def issue_tasks(self, epoch: int, job_id: JobId, tasks: Sequence[TaskAssignment]) -> None:
        await self.before_issuing(tasks)
        await super().issue_tasks(epoch, job_id, tasks)

    async def accept_answer(self, epoch: int, job_id: JobId, result: TaskResult) -> bool:
        await self.before_accepting(result)
        return await super().accept_answer(epoch, job_id, result)

    def _may_fail(self) -> None:
        if self.failures > 0:
            self.failures -= 1
            raise StoreFailed("writing", "No space left on device")


@pytest.fixture
def store() -> TroubledStore:
    return TroubledStore()


@pytest.fixture
def start(deployed: MakeServer, store: TroubledStore, tmp_path: Path) -> Callable[..., FederatedServer]:
    def make(launcher: Any = None, **more: Any) -> FederatedServer:
        arguments = args(tmp_path / "ws", launcher=launcher or Threads(), settings=settings(**more))
        return deployed(arguments=arguments, snapshot_persistor=store)

    return make


StartServer = Callable[..., FederatedServer]


def w(value: float) -> Model:
    return Model({"w": np.full(3, value, np.float32), "b": np.asarray(value, np.float32)})


def completes(server: FederatedServer, site: Site, folder: Path) -> bool:
    """Return whether a job of one round at *site* completes."""
    workflow = WorkflowSpec("fedavg", {"rounds": 1})
    job_id = submit(server, folder, min_clients=1, clients=(site.name,), workflow=workflow)
    task = site.task()
    site.send(answer(task, w(1)))
    return outcome(server, job_id).state is JobState.COMPLETED


# the schedule and the store -----------------------------------------------------------------------------------------


def test_a_job_aborted_while_it_is_being_scheduled_hurts_no_other(
    start: StartServer, store: TroubledStore, dialler: Dialler, tmp_path: Path
) -> None:
    server = start()
    site = Site(dialler, server, "site-1")

    async def abort(found: list[JobRecord]) -> None:
        store.after_looking = None
        await server.jobs.abort(found[0].job_id, reason="changed my mind")

    store.after_looking = abort
    aborted = submit(server, tmp_path, min_clients=1)

    assert outcome(server, aborted).state is JobState.ABORTED
    assert completes(server, site, tmp_path / "next")


def test_a_job_that_is_scheduled_while_it_is_being_aborted_is_aborted(
    start: StartServer, store: TroubledStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start()
    job_id = submit(server, tmp_path, min_clients=1)

    async def outrun(asked: JobId) -> JobRecord:
        """Return the record as it was, when it has just been scheduled."""
        record = await MemoryStore.job(store, asked)
        if record.state is JobState.SUBMITTED:
            moved = msgspec.structs.replace(record, state=JobState.SCHEDULED)
            await MemoryStore.replace_job(store, server.jobs.services.epoch, moved, was=record.state)
        return record

    monkeypatch.setattr(store, "job", outrun)

    assert wait(server.jobs.abort(job_id, reason="no")).state is JobState.ABORTED


def test_a_store_that_fails_for_a_while_ends_no_tenure(
    start: StartServer, store: TroubledStore, dialler: Dialler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hanse.server.jobs.POSTPONED_S", 0.01)
    server = start(lease_s=0.03)
    site = Site(dialler, server, "site-1")
    store.failures = 5
    on_loop(server.jobs.wake)

    assert completes(server, site, tmp_path)
    assert store.failures == 0
    assert server.service.state is ServiceState.HOT


def test_a_job_that_a_client_ends_while_the_store_is_full_ends_for_its_reason_once_it_can(
    start: StartServer, store: TroubledStore, dialler: Dialler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hanse.server.active_run.STORE_PAUSE_S", 0.01)
    server = start()
    site = Site(dialler, server, "site-1", starts=False)
    job_id = submit(server, tmp_path, min_clients=1)
    site.wire.told(Channel.JOB, "start")
    store.failures = 3

    site.wire.ask(Channel.SERVER, "job_failure", JobFailure(job_id, "exception", "boom"))

    record = outcome(server, job_id)
    assert (record.state, record.code) == (JobState.FAILED, "client-exception")
    assert record.reason == "boom (at site-1)"
    assert completes(server, Site(dialler, server, "site-2"), tmp_path / "next")


def test_who_waits_for_a_job_hears_that_the_server_has_left_it(start: StartServer, tmp_path: Path) -> None:
    server = start()
    job_id = submit(server, tmp_path)
    waiting = asyncio.run_coroutine_threadsafe(server.jobs.wait(job_id), background_loop())
    wait(server.jobs.board.view(job_id))

    server.close()

    with pytest.raises(NotInService):
        waiting.result(20)


def test_files_that_cannot_be_deleted_end_no_run(
    start: StartServer, dialler: Dialler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(files: TensorFiles, paths: list[Path]) -> None:
        raise StoreFailed("deleting tensors", "Input/output error")

    monkeypatch.setattr(TensorFiles, "delete_files", broken)
    server = start()

    assert completes(server, Site(dialler, server, "site-1"), tmp_path)


def test_a_long_name_makes_an_id(start: StartServer, tmp_path: Path) -> None:
    server = start()

    job_id = submit(server, tmp_path, name="a" * 9 + "-" + "b" * 53)

    assert is_job_id(job_id)
    assert wait(server.jobs.board.view(job_id)).state == "submitted"


# answers at the same moment ------------------------------------------------------------------------------------------


def test_an_answer_that_is_being_journalled_counts_and_holds_its_round_up(
    start: StartServer, store: TroubledStore, dialler: Dialler, tmp_path: Path
) -> None:
    server = start()
    site, other = Site(dialler, server, "site-1"), Site(dialler, server, "site-2")
    going_on = on_loop(asyncio.Event)

    async def hold(result: TaskResult) -> None:
        if (result.key.client, result.key.round) == ("site-1", 1):
            await going_on.wait()

    store.before_accepting = hold
    workflow = WorkflowSpec("fedavg", {"rounds": 1, "fraction": 0.5, "over_selection": 1.0})
    job_id = submit(server, tmp_path, workflow=workflow)
    first = site.task()
    assert site.job is not None
    sending = asyncio.run_coroutine_threadsafe(
        site.job.cell.ask(SERVER, Channel.TASK, "result", answer(first, w(100)), timeout_s=20), background_loop()
    )
    cancelled = other.task()  # the run has heard of site-1's answer, and wants no other
    assert other.job is not None
    assert other.job.told(Channel.TASK, "cancelled") == TaskCancelled(cancelled.key)

    assert wait(store.snapshot(job_id)).answers == ()
    assert not sending.done(), "site-1 is told when its answer is in the journal"
    on_loop(going_on.set)
    sending.result(20)
    record = outcome(server, job_id)
    assert record.state is JobState.COMPLETED
    assert read_safetensors(wait(server.jobs.files.result_files(job_id)).path(record.result)) == w(100)


def test_an_answer_that_comes_before_its_task_is_journalled_waits_for_that(
    start: StartServer, store: TroubledStore, dialler: Dialler, tmp_path: Path
) -> None:
    server = start()
    site = Site(dialler, server, "site-1")
    going_on = on_loop(asyncio.Event)

    async def hold(tasks: Sequence[TaskAssignment]) -> None:
        await going_on.wait()

    store.before_issuing = hold
    job_id = submit(server, tmp_path, min_clients=1, workflow=WorkflowSpec("fedavg", {"rounds": 1}))
    task = site.task()  # whose model the journal names
    assert site.job is not None
    sending = asyncio.run_coroutine_threadsafe(
        site.job.cell.ask(SERVER, Channel.TASK, "result", answer(task, w(1)), timeout_s=20), background_loop()
    )
    assert wait(store.snapshot(job_id)).tasks == ()
    on_loop(going_on.set)

    sending.result(20)
    assert outcome(server, job_id).state is JobState.COMPLETED


def test_a_task_with_a_model_that_the_journal_does_not_name_waits_until_it_does(
    start: StartServer, store: TroubledStore, dialler: Dialler, tmp_path: Path
) -> None:
    """A server that died before that would have told a client of tensors which its successor does not keep."""
    server = start()
    site = Site(dialler, server, "site-1")
    begun, going_on = threading.Event(), on_loop(asyncio.Event)

    async def hold(tasks: Sequence[TaskAssignment]) -> None:
        begun.set()
        await going_on.wait()

    store.before_issuing = hold
    of = spec(min_clients=1, workflow=WorkflowSpec("asks_anew:Probing"))
    made = package(tmp_path, of, {"asks_anew.py": ASKS_WITH_ANOTHER_MODEL})
    job_id = wait(server.jobs.submit(made, submitter="ada@demo")).job_id
    job = site.started()
    assert begun.wait(20)
    assert wait(store.snapshot(job_id)).tasks == ()
    assert job.told_nothing(Channel.TASK, "task")
    on_loop(going_on.set)

    task = site.task()
    assert wait(store.snapshot(job_id)).tasks == (task,)
    site.send(TaskResult(task.key, UpdateRef(None, 1)))
    assert outcome(server, job_id).state is JobState.COMPLETED


def test_an_answer_that_could_not_be_journalled_is_when_it_is_sent_again(
    start: StartServer, store: TroubledStore, dialler: Dialler, tmp_path: Path
) -> None:
    server = start()
    site = Site(dialler, server, "site-1")
    Site(dialler, server, "site-2")
    job_id = submit(server, tmp_path)
    result = answer(site.task(), w(1))
    assert site.job is not None
    failures = [StoreFailed("writing", "No space left on device")]

    async def fail_once(result: TaskResult) -> None:
        if failures:
            raise failures.pop()

    store.before_accepting = fail_once

    assert site.job.refused(Channel.TASK, "result", result).reason.startswith("the store failed")
    assert wait(store.snapshot(job_id)).answers == ()
    site.job.ask(Channel.TASK, "result", result)

    assert wait(store.snapshot(job_id)).answers == (result,)


def test_a_job_whose_process_is_given_up_while_the_store_is_full_ends_for_that_reason(
    start: StartServer, store: TroubledStore, dialler: Dialler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hanse.server.active_run.STORE_PAUSE_S", 0.01)
    launcher = on_loop(ScriptedLauncher)
    server = start(launcher)
    Site(dialler, server, "site-1")
    job_id = submit(server, tmp_path, min_clients=1, process_tries=1)
    process = launcher.next()
    store.failures = 3

    launcher.end(process, 7)

    record = outcome(server, job_id)
    assert (record.state, record.code) == (JobState.FAILED, "process-died")
    assert store.failures == 0


def test_the_same_answer_twice_at_the_same_moment_counts_once(
    start: StartServer, store: TroubledStore, dialler: Dialler, tmp_path: Path
) -> None:
    server = start()
    site = Site(dialler, server, "site-1")
    arrived: list[TaskResult] = []
    both = on_loop(asyncio.Event)

    async def meet(result: TaskResult) -> None:
        arrived.append(result)
        if len(arrived) == 2:
            both.set()
        await both.wait()

    store.before_accepting = meet
    job_id = submit(server, tmp_path, min_clients=1, workflow=WorkflowSpec("fedavg", {"rounds": 1}))
    task = site.task()
    watcher = dialler.site(server, "ada@demo", fqcn="ada@demo.cli-1")
    on_loop(lambda: server.jobs.board.watch(job_id, watcher.fqcn))

    async def twice() -> None:
        assert site.job is not None
        ask = site.job.cell.ask
        await asyncio.gather(*(ask(SERVER, Channel.TASK, "result", answer(task, w(1)), timeout_s=20) for _ in range(2)))

    wait(twice())

    record = outcome(server, job_id)
    assert record.state is JobState.COMPLETED
    assert read_safetensors(wait(server.jobs.files.result_files(job_id)).path(record.result)) == w(1)
    kinds = [watcher.told(Channel.ADMIN, "job.event").kind]
    while kinds[-1] != "job_completed":
        kinds.append(watcher.told(Channel.ADMIN, "job.event").kind)
    assert kinds.count("result_accepted") == 1


def test_a_submission_that_the_store_does_not_take_leaves_nothing_behind(
    start: StartServer, store: TroubledStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start()

    async def full(epoch: int, record: JobRecord) -> None:
        raise StoreFailed("writing", "No space left on device")

    monkeypatch.setattr(store, "add_job", full)

    with pytest.raises(StoreFailed, match="No space left"):
        submit(server, tmp_path)
    assert list((tmp_path / "ws" / "runs").iterdir()) == []


# what is kept of what others say --------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["job_failure", "job_ended", "fault", "refusal"])
def test_a_long_word_of_one_site_is_cut_short_in_the_jobs_record(
    start: StartServer, dialler: Dialler, tmp_path: Path, way: str
) -> None:
    server = start()
    refuses = SiteRefused("site-1", LONG[:10_000]) if way == "refusal" else None
    site = Site(dialler, server, "site-1", refuses=refuses)
    job_id = submit(server, tmp_path, min_clients=1, process_tries=1)
    if way == "job_failure":
        site.task()
        site.wire.ask(Channel.SERVER, "job_failure", JobFailure(job_id, "exception", LONG, LONG))
    elif way == "job_ended":
        site.task()
        site.wire.ask(Channel.SERVER, "job_ended", JobEnded(job_id, 1, status=1, log_tail=LONG))
    elif way == "fault":
        task = site.task()
        site.send(TaskResult(task.key, fault=TaskFault(LONG, LONG)))

    record = outcome(server, job_id)

    assert record.state is JobState.FAILED
    assert len(record.reason) <= 2500
    assert len(record.code) <= 64
    assert wait(server.jobs.board.views())[0].reason == record.reason


def test_what_is_kept_of_a_log_is_its_end(start: StartServer, dialler: Dialler, tmp_path: Path) -> None:
    server = start()
    site = Site(dialler, server, "site-1")
    job_id = submit(server, tmp_path, min_clients=1)
    site.task()

    site.wire.ask(Channel.SERVER, "job_ended", JobEnded(job_id, 1, status=1, log_tail=f"{LONG}\nMemoryError"))

    tail = wait(server.jobs.board.log_of(job_id, ClientName("site-1"), lines=10**6))
    assert len(tail) == MAX_TAIL_CHARS
    assert tail.endswith("\nMemoryError")


@pytest.mark.parametrize(
    "metrics", [{f"m{number}": 0.0 for number in range(MAX_METRICS + 1)}, {LONG: 1.0}], ids=["many", "long"]
)
def test_metrics_beyond_measure_are_refused_with_the_update(
    start: StartServer, dialler: Dialler, tmp_path: Path, metrics: dict[str, float]
) -> None:
    server = start()
    site = Site(dialler, server, "site-1")
    job_id = submit(server, tmp_path, min_clients=1)
    task = site.task()

    refused = site.refused(TaskResult(task.key, UpdateRef(small(w(1)), 1, metrics)))

    assert "site-1 sent too much: " in refused.reason
    assert len(refused.reason) < 500
    assert outcome(server, job_id).code == "too-few-clients"


def test_watchers_are_spared_a_flood_of_metrics(start: StartServer, dialler: Dialler, tmp_path: Path) -> None:
    server = start()
    site = Site(dialler, server, "site-1")
    job_id = submit(server, tmp_path, min_clients=1)
    task = site.task()
    watcher = dialler.site(server, "ada@demo", fqcn="ada@demo.cli-1")
    on_loop(lambda: server.jobs.board.watch(job_id, watcher.fqcn))
    assert site.job is not None
    site.job.tell(Channel.TASK, "metrics", LogMetrics(task.key, 0, {LONG: 1.0}))

    async def flood() -> None:
        for step in range(1, 10 * MAX_LOGS_PER_S):
            site.job.cell.tell(SERVER, Channel.TASK, "metrics", LogMetrics(task.key, step, {"loss": 1.0}))  # type: ignore[union-attr]

    began = time.monotonic()
    wait(flood())
    site.send(answer(task, w(1)))
    kinds = [watcher.told(Channel.ADMIN, "job.event").kind]
    while kinds[-1] != "result_accepted":
        kinds.append(watcher.told(Channel.ADMIN, "job.event").kind)

    seconds = int(time.monotonic() - began) + 2
    assert 0 < kinds.count("metrics") <= seconds * MAX_LOGS_PER_S


def test_a_client_keeps_a_short_release(deployed_plain: MakeServer) -> None:
    server = deployed_plain()
    register_plain(server, release=LONG)

    assert len(str(client_named(server, "site-1").props["release"])) <= 64


def test_a_stranger_is_not_remembered_under_a_long_name(deployed: MakeServer, project: Project) -> None:
    server = deployed()
    challenge = Challenge(LONG, PROJECT, nonce(), project.site("site-1").certificate)

    reply = server.client_challenge(request(challenge))

    assert reply.return_code is ReturnCode.UNAUTHENTICATED
    assert "cannot be a participant's name" in reply.reason
    assert len(reply.reason) < 300


# tensors --------------------------------------------------------------------------------------------------------------


def test_tensors_are_taken_from_who_has_a_task_for_them_alone(
    start: StartServer, dialler: Dialler, tmp_path: Path
) -> None:
    server = start()
    site = Site(dialler, server, "site-1")
    job_id = submit(server, tmp_path, min_clients=1, model="tiny_model:large")
    task = site.task()
    assert site.job is not None
    scope, tls = f"job/{job_id}", dialler.tls(project_site(dialler, "site-1"))

    def upload(data: bytes) -> HanseError | None:
        try:
            wait(transfers.upload(scope, digest_of(data), memoryview(data)))
        except HanseError as error:
            return error
        return None

    with transferring(site.job, target_of(server), tls) as transfers:
        refused = upload(bytes(50_000))
        assert refused is not None
        assert "a tensor of 50000 bytes, which no task that it has asks for" in refused.reason
        outcomes = [upload(bytes([number]) * 40_000) for number in range(1, MAX_ANSWERS_PER_TASK + 2)]
        assert outcomes[:-1] == [None] * MAX_ANSWERS_PER_TASK
        assert "more than the" in str(outcomes[-1])
        site.send(TaskResult(task.key, fault=TaskFault("x", "y")))
        outcome(server, job_id)
        assert upload(bytes(40_000)) is not None


def test_an_update_of_which_a_tensor_is_another_is_refused(
    start: StartServer, dialler: Dialler, tmp_path: Path
) -> None:
    server = start()
    site = Site(dialler, server)
    submit(server, tmp_path, min_clients=1, model="tiny_model:uneven")
    task = site.task()
    w, v = (task.model or ModelRef()).tensors
    swapped = ModelRef((msgspec.structs.replace(w, digest=v.digest), v))

    refused = site.refused(TaskResult(task.key, UpdateRef(swapped, 1)))

    assert refused.reason == ("site-1 sent tensor 'w' of 80000 bytes; the job expects 40000")


def test_a_number_of_a_start_beyond_measure_hurts_no_other(
    start: StartServer, dialler: Dialler, tmp_path: Path
) -> None:
    server = start()
    site = Site(dialler, server)
    job_id = submit(server, tmp_path, min_clients=1)
    site.task()

    refused = site.wire.refused(Channel.SERVER, "job_ended", JobEnded(job_id, attempt=2**64 - 1, status=-9))

    assert refused.reason == f"JobEnded.attempt is {2**64 - 1}; expected a number of a start, up to {MAX_STARTS}"
    assert wait(server.jobs.board.view(job_id)).state == "running"


def test_empty_tensors_are_taken_in_numbers_that_answers_may_have(tmp_path: Path) -> None:
    client = ClientName("site-1")
    empty = ModelRef((TensorRef("w", "float32", (0,), digest_of(b"")),))
    inbox = Inbox(TensorFiles(tmp_path), client)
    inbox.expect([TaskAssignment(TaskKey(1, "train", 0, client), empty)])

    for number in range(MAX_ANSWERS_PER_TASK):
        inbox.begin(digest_of(bytes([number])), 0).close()

    with pytest.raises(UpdateRejected, match="more than the 8 tensors that its answers may need"):
        inbox.begin(digest_of(b"one more"), 0)


def test_a_client_that_tells_of_one_damaged_tensor_many_times_has_it_looked_for_once(
    start: StartServer, dialler: Dialler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked, mend = [], RunJournal.mend
    judged, judge, all_judged = [], Run.judge, on_loop(asyncio.Event)

    def noting(run: Run, result: TaskResult, *, sender: ClientName) -> Any:
        judged.append(result)
        if len(judged) == 8:
            all_judged.set()
        return judge(run, result, sender=sender)

    async def counting(journal: RunJournal, answered: Collection[TaskKey]) -> Sequence[TaskAssignment] | None:
        looked.append(answered)
        await all_judged.wait()
        return await mend(journal, answered)

    monkeypatch.setattr(Run, "judge", noting)
    monkeypatch.setattr(RunJournal, "mend", counting)
    server = start()
    site = Site(dialler, server)
    submit(server, tmp_path, min_clients=1)
    fault = TaskResult(site.task().key, fault=TaskFault(ProtocolError.code, "other bytes than the digest names"))
    assert site.job is not None
    cell = site.job.cell

    async def tell() -> None:
        asks = [cell.ask(Fqcn(SERVER), Channel.TASK, "result", fault, timeout_s=20) for _ in range(8)]
        await asyncio.gather(*asks)

    wait(tell())

    assert len(looked) == 1


def test_a_disabled_clients_transfer_under_way_ends(start: StartServer, dialler: Dialler, tmp_path: Path) -> None:
    server = start()
    site = Site(dialler, server, "site-1")
    job_id = submit(server, tmp_path, min_clients=1, model="tiny_model:large")
    task = site.task()
    assert site.job is not None
    assert task.model is not None
    digest = max(task.model.tensors, key=lambda tensor: tensor.size_bytes).digest
    peer = peer_of(server, site.job.fqcn)
    admittance = server._admittance()

    admittance.stays(peer)
    server.set_disabled(ClientName("site-1"), "broken data")

    with pytest.raises(Unauthenticated, match="disabled"):
        admittance.stays(peer)
    with (
        transferring(site.job, target_of(server), dialler.tls(project_site(dialler, "site-1"))) as transfers,
        pytest.raises(Unauthenticated, match="disabled"),
    ):
        wait(transfers.download(f"job/{job_id}", digest, 40_000, TensorFiles(tmp_path / "d").begin(digest, 40_000)))


# tokens ---------------------------------------------------------------------------------------------------------------


def test_a_jobs_token_ends_with_its_job(start: StartServer, dialler: Dialler, tmp_path: Path) -> None:
    server = start()
    site = Site(dialler, server, "site-1")
    job_id = submit(server, tmp_path, min_clients=1)
    site.task()
    job = site.job
    assert job is not None
    job.ask(Channel.SERVER, "renew", Renew())
    given = server.clients.job_credentials(job.fqcn, job_id)

    wait(server.jobs.abort(job_id, reason="enough"))

    assert "there is no running job" in job.refused(Channel.SERVER, "renew", Renew()).reason
    assert "there is no running job" in dialler.refused(dialler.job_wire(server, job.fqcn, given)).reason


def project_site(dialler: Dialler, name: str) -> Any:
    return dialler.project.site(name)
