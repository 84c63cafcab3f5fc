"""Processes that die, hang or cannot start, a run's own and its clients': who is told, and what goes on."""

import asyncio
import errno
import os
import queue
import threading
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from hanse.codes import CODES
from hanse.coordination.waiting import (
    HINDERED,
    NOT_TOLD_YET,
    TakingUp,
)
from hanse.errors import (
    NotStarted,
    StoreFailed,
    TensorDamaged,
)
from hanse.ids import ClientName, JobId
from hanse.job import JobState, WorkflowSpec
from hanse.launch.long_logs import TAIL_BYTES
from hanse.launch.process import Handle
from hanse.messages import (
    Channel,
    Heartbeat,
    HeartbeatReply,
    JobEnded,
    Message,
    RunEnded,
    StartJob,
    TaskAssignment,
    TaskKey,
    TaskResult,
    Waiting,
)
from hanse.model import Model
from hanse.server.active_run import ActiveRun
from hanse.server.payloads import expect
from hanse.server.run_journal import RunJournal
from hanse.storage.memory import MemoryStore
from hanse.storage.models import allocate

from ..launch.much import MUCH, is_too_long, log_much
from .job_world import (
    NO_SPACE,
    MakeServer,
    ScriptedLauncher,
    Site,
    StartServer,
    Threads,
    answer,
    outcome,
    plus,
    submit,
    w,
)
from .world import (
    Dialler,
    args,
    on_loop,
    settings,
    wait,
)


def test_a_clients_process_that_died_is_started_again_and_then_given_up(
    start: StartServer, dialler: Dialler, tmp_path: Path
) -> None:
    server = start()
    site = Site(dialler, server, "site-1")
    job_id = submit(server, tmp_path, min_clients=1, process_tries=2)
    first = site.started()
    site.wire.ask(Channel.SERVER, "job_ended", JobEnded(job_id, 1, -9, "training\nkilled"))
    second = site.started()
    assert site.attempts == [1, 2]
    assert first is not second

    site.wire.ask(Channel.SERVER, "job_ended", JobEnded(job_id, 1, -9))  # late news of the first start
    site.wire.ask(Channel.SERVER, "job_ended", JobEnded(job_id, 2, 1, "training\nMemoryError"))

    record = outcome(server, job_id)
    assert record.state is JobState.FAILED
    assert "its log ends with: MemoryError" in record.reason
    assert (record.code, record.client, record.cause) == ("too-few-clients", "site-1", "process-died")
    assert record.log_tail == "training\nMemoryError"
    assert site.attempts == [1, 2]


def test_a_client_whose_process_is_started_again_is_shown_with_what_the_last_one_died_of(
    start: StartServer, dialler: Dialler, tmp_path: Path
) -> None:
    server = start()
    starting = threading.Semaphore(0)
    site = Site(dialler, server, "site-1")
    job_id = submit(server, tmp_path, min_clients=1, process_tries=2)
    site.started()

    async def slowly(message: Message) -> None:
        starting.release()
        await asyncio.Event().wait()

    site.wire.cell.on(Channel.JOB, "start", slowly)
    site.wire.ask(Channel.SERVER, "job_ended", JobEnded(job_id, 1, -9, "epoch 3", "out-of-memory"))
    assert starting.acquire(timeout=20)

    (client,) = wait(server.jobs.board.view(job_id)).clients
    assert (client.state, client.attempt) == ("starting", 2)
    assert "used up the memory" in client.reason
    assert "epoch 3" in client.reason


def test_a_client_that_was_too_late_is_told_as_such_whatever_befell_it_before(
    start: StartServer, dialler: Dialler, tmp_path: Path
) -> None:
    server = start()
    site = Site(dialler, server, "site-1")
    workflow = WorkflowSpec("fedavg", {"rounds": 2, "deadline_s": 3.0})
    job_id = submit(server, tmp_path, min_clients=1, process_tries=2, workflow=workflow)
    site.started()
    site.wire.ask(Channel.SERVER, "job_ended", JobEnded(job_id, 1, -9, "of the first start"))
    site.started()
    site.task()

    record = outcome(server, job_id)

    assert (record.code, record.client, record.cause) == ("too-few-clients", "site-1", "deadline")
    assert record.log_tail == ""
    assert wait(server.jobs.board.view(job_id)).advice == CODES["deadline"].advice


def test_a_client_whose_process_the_system_killed_for_its_memory_is_told_as_such(
    start: StartServer, dialler: Dialler, tmp_path: Path
) -> None:
    server = start()
    site = Site(dialler, server, "site-1")
    job_id = submit(server, tmp_path, min_clients=1, process_tries=1)
    site.started()

    site.wire.ask(Channel.SERVER, "job_ended", JobEnded(job_id, 1, -9, "epoch 3", "out-of-memory"))

    record = outcome(server, job_id)
    assert (record.code, record.client, record.cause) == ("too-few-clients", "site-1", "out-of-memory")
    assert "because it had used up the memory that it may use; its log ends with: epoch 3" in record.reason
    view = wait(server.jobs.board.view(job_id))
    assert view.advice == CODES["out-of-memory"].advice
    assert (view.client, view.cause, view.log_tail) == ("site-1", "out-of-memory", "epoch 3")
    assert wait(server.jobs.board.log_of(job_id, ClientName("site-1"), lines=5)) == "epoch 3"
    assert wait(server.jobs.board.views())[0].log_tail == ""


def test_a_task_is_sent_again_to_a_process_that_is_started_again(
    start: StartServer, dialler: Dialler, tmp_path: Path
) -> None:
    server = start()
    site = Site(dialler, server, "site-1")
    job_id = submit(server, tmp_path, min_clients=1, workflow=WorkflowSpec("fedavg", {"rounds": 1}))
    site.started()
    first = site.task()

    site.wire.ask(Channel.SERVER, "job_ended", JobEnded(job_id, 1, 1))
    site.started()
    again = site.task()
    site.send(answer(again, w(1)))

    assert again == first
    assert outcome(server, job_id).state is JobState.COMPLETED


def test_a_job_that_a_client_lists_no_longer_is_dead(start: StartServer, dialler: Dialler, tmp_path: Path) -> None:
    server = start()
    site = Site(dialler, server, "site-1")
    job_id = submit(server, tmp_path, min_clients=1)
    site.started()

    def beat(*jobs: JobId) -> HeartbeatReply:
        reply = site.wire.ask(Channel.SERVER, "heartbeat", Heartbeat(jobs)).payload
        assert isinstance(reply, HeartbeatReply)
        return reply

    assert beat().abort_jobs == ()  # it may not have started yet
    assert beat(job_id, JobId("another")).abort_jobs == ("another",)
    assert site.attempts == [1]
    beat()
    site.started()

    assert site.attempts == [1, 2]


class SlowToStartAgain(Site):
    """A site at which a process is started again only when ``may_start`` is set."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        self.asked, self.may_start = asyncio.Event(), asyncio.Event()
        super().__init__(*arguments, **more)

    async def _start(self, message: Message) -> None:  # type: ignore[override] - a handler may be either
        if expect(message, StartJob).attempt > 1:
            self.asked.set()
            await self.may_start.wait()
        super()._start(message)


def test_a_heartbeat_while_a_process_is_being_started_again_does_not_count_it_as_dead(
    start: StartServer, dialler: Dialler, tmp_path: Path
) -> None:
    server = start()
    site = SlowToStartAgain(dialler, server, "site-1")
    workflow = WorkflowSpec("fedavg", {"rounds": 1})
    job_id = submit(server, tmp_path, min_clients=1, process_tries=2, workflow=workflow)
    site.started()
    task = site.task()
    site.wire.ask(Channel.SERVER, "heartbeat", Heartbeat((job_id,)))

    site.wire.ask(Channel.SERVER, "job_ended", JobEnded(job_id, 1, -9))
    wait(site.asked.wait())
    site.wire.ask(Channel.SERVER, "heartbeat", Heartbeat(idle=(job_id,)))
    on_loop(site.may_start.set)
    site.started()
    assert site.task() == task
    site.send(answer(task, w(1)))

    assert outcome(server, job_id).state is JobState.COMPLETED
    assert site.attempts == [1, 2]


def test_a_process_that_could_not_be_started_again_just_then_is_not_taken_for_a_dead_one(
    start: StartServer, dialler: Dialler, tmp_path: Path
) -> None:
    refused = asyncio.Event()

    class OnceFull(Site):
        """A site at which a process can be started again only the second time."""

        def _start(self, message: Message) -> None:
            if expect(message, StartJob).attempt == 2:
                self.attempts.append(2)
                refused.set()
                raise NotStarted("the job's process", "No space left on device", folder="/w")
            super()._start(message)

    server = start()
    site = OnceFull(dialler, server, "site-1")
    workflow = WorkflowSpec("fedavg", {"rounds": 1})
    job_id = submit(server, tmp_path, min_clients=1, process_tries=2, workflow=workflow)
    site.started()
    task = site.task()
    site.wire.ask(Channel.SERVER, "heartbeat", Heartbeat((job_id,)))

    site.wire.ask(Channel.SERVER, "job_ended", JobEnded(job_id, 1, -9))
    wait(refused.wait())
    site.wire.ask(Channel.SERVER, "heartbeat", Heartbeat(idle=(job_id,)))
    site.started()
    assert site.task() == task
    site.send(answer(task, w(1)))

    assert outcome(server, job_id).state is JobState.COMPLETED
    assert site.attempts == [1, 2, 3]


def test_a_heartbeat_at_the_moment_at_which_a_run_is_taken_up_ends_nothing(
    start: StartServer, dialler: Dialler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start()
    site = Site(dialler, server, "site-1")
    job_id = submit(server, tmp_path, min_clients=1)
    site.started()
    live = server.jobs.live
    runs = live.runs

    class TakenUpMeanwhile(dict[JobId, Any]):
        """One of the two tables, of which the other thread moves the run to the other when it has been looked at."""

        def items(self) -> Any:
            found = list(super().items())
            live.runs = runs
            live.taking_up = {}
            return found

    monkeypatch.setattr(live, "taking_up", TakenUpMeanwhile({job_id: TakingUp(frozenset({site.name}), 0.0, 60.0)}))
    monkeypatch.setattr(live, "runs", TakenUpMeanwhile())

    assert server.jobs.client_watch.heartbeat(site.name, (job_id,)) == ()


def test_an_agent_that_comes_anew_without_its_job_is_given_it_again(
    start: StartServer, dialler: Dialler, tmp_path: Path
) -> None:
    server = start()
    site = Site(dialler, server, "site-1")
    job_id = submit(server, tmp_path, min_clients=1, workflow=WorkflowSpec("fedavg", {"rounds": 1}))
    site.started()
    first = site.task()
    assert site.job is not None

    again = Site(dialler, server, "site-1")  # before the server has noticed that the old process is gone
    wait(site.job.close())
    again.wire.ask(Channel.SERVER, "heartbeat", Heartbeat())
    again.started()

    assert again.attempts == [2]
    assert again.task() == first
    again.send(answer(first, w(1)))
    assert outcome(server, job_id).state is JobState.COMPLETED


def test_an_agent_that_comes_anew_with_its_job_keeps_it(start: StartServer, dialler: Dialler, tmp_path: Path) -> None:
    server = start()
    site = Site(dialler, server, "site-1")
    job_id = submit(server, tmp_path, min_clients=1, workflow=WorkflowSpec("fedavg", {"rounds": 1}))
    task = site.task()

    again = Site(dialler, server, "site-1")
    again.wire.ask(Channel.SERVER, "heartbeat", Heartbeat((job_id,)))
    again.wire.ask(Channel.SERVER, "heartbeat", Heartbeat((job_id,)))
    site.send(answer(task, w(1)))

    assert outcome(server, job_id).state is JobState.COMPLETED
    assert again.attempts == []


def test_a_runs_process_that_dies_is_started_again_and_then_given_up(
    start: StartServer, dialler: Dialler, tmp_path: Path
) -> None:
    launcher = on_loop(lambda: ScriptedLauncher("RuntimeError: out of memory"))
    server = start(launcher=launcher)
    site = Site(dialler, server, "site-1")
    job_id = submit(server, tmp_path, min_clients=1, process_tries=2)

    launcher.end(launcher.next(), -9)
    launcher.end(launcher.next(), 1)

    record = outcome(server, job_id)
    assert (record.state, record.code) == (JobState.FAILED, "process-died")
    assert "the job's process at server ended with status 1; its log ends with: RuntimeError: out of memory" in (
        record.reason
    )
    assert "start 2 of 2" in record.reason
    assert (record.client, record.log_tail) == ("", "RuntimeError: out of memory")
    assert site.wire.told(Channel.JOB, "abort").reason == record.reason
    assert len({run.credentials.token for run in launcher.specs}) == 2


class BeatingStore(MemoryStore):
    """A store that tells of each beat of its server's lease; *failures* of them find it away."""

    def __init__(self, failures: int) -> None:
        super().__init__()
        self.beats: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.failures = failures

    async def renew_lease(self, epoch: int, **more: Any) -> Any:
        self.beats.put(None)
        if self.failures:
            self.failures -= 1
            raise StoreFailed("renewing the lease", "the database is away")
        return await super().renew_lease(epoch, **more)


@pytest.mark.parametrize("failures", [0, 1_000_000])
def test_the_log_of_a_run_whose_process_does_nothing_but_print_is_shortened_at_each_beat_of_the_lease(
    deployed: MakeServer, dialler: Dialler, tmp_path: Path, failures: int
) -> None:
    launcher, store = on_loop(ScriptedLauncher), BeatingStore(failures)
    server = deployed(
        arguments=args(tmp_path / "ws", launcher=launcher, settings=settings(lease_s=0.3)), snapshot_persistor=store
    )
    Site(dialler, server, "site-1")
    job_id = submit(server, tmp_path, min_clients=1)
    launcher.next()

    log = server.jobs.run_folder(job_id).log
    for _ in range(2):
        log_much(log)
        while is_too_long(log):
            store.beats.get(timeout=20)
    assert log.read_bytes().endswith(MUCH[-TAIL_BYTES:])
    assert wait(store.job(job_id)).state is JobState.RUNNING


def test_a_run_whose_process_says_nothing_any_more_is_given_another_and_fails_of_the_last(
    start: StartServer, dialler: Dialler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hanse.server.run_process.RUN_SILENT_S", 0.2)
    launcher = on_loop(partial(ScriptedLauncher, "the last line"))
    server = start(launcher=launcher)
    Site(dialler, server, "site-1")
    job_id = submit(server, tmp_path, min_clients=1, process_tries=2)

    record = outcome(server, job_id)

    assert [spec.job_id for spec in launcher.specs] == [job_id, job_id]
    assert (record.state, record.code) == (JobState.FAILED, "process-hung")
    assert "killed because it had not said for long that it lives" in record.reason
    assert record.reason.endswith("; its log ends with: the last line; that was start 2 of 2")


def test_a_run_whose_process_says_that_it_lives_is_left_alone(
    deployed: MakeServer, dialler: Dialler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hanse.server.run_process.RUN_SILENT_S", silent_s := 2.0)
    launcher, beats = Threads(), threading.Semaphore(0)
    beat = ActiveRun.beats

    def beats_once(run: ActiveRun) -> None:
        beat(run)
        beats.release()

    monkeypatch.setattr(ActiveRun, "beats", beats_once)
    arguments = args(tmp_path / "ws", launcher=launcher, settings=settings())
    server = deployed(arguments=arguments, check_engine_frequency=(every_s := 0.05))
    site = Site(dialler, server, "site-1")
    job_id = submit(server, tmp_path, min_clients=1)
    task = site.task()
    for _ in range(int(1.5 * silent_s / every_s)):
        assert beats.acquire(timeout=20)
    site.train = plus(1)
    site.send(answer(task, w(1)))

    assert outcome(server, job_id).state is JobState.COMPLETED
    assert len(launcher.started) == 1


def test_a_run_whose_process_the_machine_does_not_start_goes_on_when_it_does_and_says_so_meanwhile(
    start: StartServer, dialler: Dialler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hanse.server.run_process.HINDERED_PAUSE_S", 0.05)
    limit, reasons = threading.Event(), []

    class Limited(Threads):
        async def launch(self, module: str, **more: Any) -> Handle:
            if limit.is_set():
                return await super().launch(module, **more)
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    server = start(launcher=Limited())
    Site(dialler, server, "site-1", train=plus(1))
    job_id = submit(server, tmp_path, min_clients=1, process_tries=1)
    while not reasons:
        waiting = wait(server.jobs.board.view(job_id)).waiting
        reasons = [each for each in waiting if "cannot go on" in each.what]
    limit.set()

    assert outcome(server, job_id).state is JobState.COMPLETED
    assert "the run's process could not be started: Too many open files" in reasons[0].what
    assert reasons[0].until > reasons[0].since


def test_a_deadline_that_a_dead_process_has_set_is_told_of_no_more(
    start: StartServer, dialler: Dialler, tmp_path: Path
) -> None:
    class Limited(Threads):
        async def launch(self, module: str, **more: Any) -> Handle:
            if self.started:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            return await super().launch(module, **more)

    launcher = Limited()
    server = start(launcher=launcher)
    site = Site(dialler, server, "site-1")
    job_id = submit(server, tmp_path, min_clients=1)
    site.task()
    (before,) = wait(server.jobs.board.view(job_id)).waiting
    launcher.started[0].kill()

    waits: tuple[Waiting, ...] = ()
    while not any("cannot go on" in each.what for each in waits):
        waits = wait(server.jobs.board.view(job_id)).waiting

    process, answers = waits
    assert (answers.what, answers.until) == (before.what, process.until)
    assert answers.then == f"{NOT_TOLD_YET}; otherwise {HINDERED}"


def test_a_run_whose_disk_is_full_goes_on_when_there_is_space_and_cancels_nothing_meanwhile(
    start: StartServer, dialler: Dialler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hanse.server.run_process.HINDERED_PAUSE_S", 0.05)
    full = [NO_SPACE] * 3

    def no_space_at_first(*arguments: Any) -> Model:
        if full:
            raise full.pop()
        return allocate(*arguments)

    monkeypatch.setattr("hanse.run.federation.allocate", no_space_at_first)
    launcher = Threads()
    server = start(launcher=launcher)
    trained: list[TaskAssignment] = []

    def train(task: TaskAssignment, model: Model) -> TaskResult:
        trained.append(task)
        return plus(1)(task, model)

    for name in ("site-1", "site-2"):
        Site(dialler, server, name, train=train)
    job_id = submit(server, tmp_path, process_tries=1)

    record = outcome(server, job_id)
    assert (record.state, record.reason) == (JobState.COMPLETED, "")
    assert not full
    assert len(launcher.started) == 4
    keys = sorted((task.key.round, task.key.client) for task in trained)
    assert keys == [(1, "site-1"), (1, "site-2"), (2, "site-1"), (2, "site-2")]


def test_a_run_that_stays_without_space_ends_with_that_reason(
    start: StartServer, dialler: Dialler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hanse.server.run_process.HINDERED_PAUSE_S", 0.05)

    def no_space(*arguments: Any) -> Model:
        raise NO_SPACE

    monkeypatch.setattr("hanse.run.federation.allocate", no_space)
    server = start(mend_within_s=0.1)
    Site(dialler, server, "site-1", train=plus(1))

    job_id = submit(server, tmp_path, min_clients=1)

    record = outcome(server, job_id)
    assert (record.state, record.code) == (JobState.FAILED, "no-space")
    assert "the disk mounted at /disk" in record.reason


def test_a_process_that_met_a_damaged_tensor_has_not_died(
    start: StartServer, dialler: Dialler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RunJournal, "mend", always_mended)
    launcher = on_loop(ScriptedLauncher)
    server = start(launcher=launcher)
    Site(dialler, server, starts=False)
    job_id = submit(server, tmp_path, min_clients=1, process_tries=2)
    first = launcher.next()

    wait(server.jobs.live.runs[job_id].ended(RunEnded(completed=False, code=TensorDamaged.code, again=True)))
    launcher.end(first, 0)
    launcher.end(launcher.next(), -9)
    launcher.next()

    assert wait(server.jobs.board.view(job_id)).state == "running"


def test_a_run_whose_disk_goes_on_losing_tensors_is_waited_for_and_ends_with_that_reason(
    start: StartServer, dialler: Dialler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RunJournal, "mend", always_mended)
    monkeypatch.setattr("hanse.server.run_process.HINDERED_PAUSE_S", 0.05)

    def damaged(*arguments: Any) -> Model:
        raise TensorDamaged("ab12", folder="/disk")

    monkeypatch.setattr("hanse.run.federation.allocate", damaged)
    server = start(mend_within_s=0.1)
    Site(dialler, server, "site-1", train=plus(1))

    job_id = submit(server, tmp_path, min_clients=1)

    record = outcome(server, job_id)
    assert (record.state, record.code) == (JobState.FAILED, TensorDamaged.code)
    assert "tensor ab12 in /disk is missing or damaged" in record.reason


async def always_mended(journal: RunJournal, answered: Collection[TaskKey]) -> list[TaskAssignment]:
    del journal, answered
    return []


def test_a_run_that_is_aborted_in_its_process_is_an_aborted_job(
    start: StartServer, dialler: Dialler, tmp_path: Path
) -> None:
    launcher = Threads()
    server = start(launcher=launcher)
    site = Site(dialler, server, "site-1")
    job_id = submit(server, tmp_path, min_clients=1)
    site.task()

    launcher.started[0].server.abort_run()

    record = outcome(server, job_id)
    assert (record.state, record.code) == (JobState.ABORTED, "aborted")
    assert site.wire.told(Channel.JOB, "abort").job_id == job_id
    assert [entry.round for entry in wait(server.jobs.board.view(job_id)).history] == [0]


def test_a_run_told_to_stop_training_ends_with_the_round_that_it_is_in(
    start: StartServer, dialler: Dialler, tmp_path: Path
) -> None:
    launcher = Threads()
    server = start(launcher=launcher)
    site = Site(dialler, server, "site-1")
    job_id = submit(server, tmp_path, min_clients=1)
    task = site.task()

    launcher.started[0].server.stop_training()
    site.send(answer(task, w(1)))

    record = outcome(server, job_id)
    assert record.state is not JobState.COMPLETED
    assert "stopped after round 1" in record.reason
    assert [entry.round for entry in wait(server.jobs.board.view(job_id)).history] == [0, 1]
