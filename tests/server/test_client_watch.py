"""Clients that are lost, late or quit while a run goes on, and that come back."""

from pathlib import Path

from hanse.errors import (
    Unauthenticated,
)
from hanse.ids import ClientName
from hanse.job import JobState, WorkflowSpec
from hanse.messages import (
    Channel,
    Heartbeat,
    Message,
    ModelRef,
    Quit,
)
from hanse.server.federated_server import TaskMetaInfo
from hanse.storage.models import read_safetensors

from .job_world import (
    NO_SPACE,
    Site,
    StartServer,
    Threads,
    answer,
    opened,
    outcome,
    plus,
    submit,
    tensor_file,
    w,
)
from .world import (
    PROJECT,
    Dialler,
    names,
    on_loop,
    wait,
)


def test_a_client_that_is_lost_is_a_fault_and_the_round_goes_on_without_it(
    start: StartServer, dialler: Dialler, tmp_path: Path
) -> None:
    server = start(lost_after_s=0.05)
    site, other = Site(dialler, server, "site-1"), Site(dialler, server, "site-2", train=plus(2))
    job_id = submit(server, tmp_path, workflow=WorkflowSpec("fedavg", {"rounds": 1}))
    site.task()
    assert site.job is not None

    wait(site.job.close())

    record = outcome(server, job_id)
    assert record.state is JobState.COMPLETED, record.reason
    assert other.outcome() is None
    (last,) = [entry for entry in wait(server.jobs.board.view(job_id)).history if entry.round == 1]
    assert last.answered == ("site-2",)


def test_a_client_that_was_lost_and_is_started_again_is_waited_for_again(
    start: StartServer, dialler: Dialler, tmp_path: Path
) -> None:
    server = start(lost_after_s=0.05)
    site, gone = Site(dialler, server, "site-1"), Site(dialler, server, "site-2")
    job_id = submit(server, tmp_path)
    task = site.task()
    gone.task()
    watcher = dialler.site(server, "ada@demo", fqcn="ada@demo.cli-1")
    on_loop(lambda: server.jobs.board.watch(job_id, watcher.fqcn))
    assert gone.job is not None
    wait(gone.job.close())
    wait(gone.wire.close())
    while watcher.told(Channel.ADMIN, "job.event").kind != "client_lost":
        continue

    back = Site(dialler, server, "site-2")
    back.wire.ask(Channel.SERVER, "heartbeat", Heartbeat())
    back.task()
    while watcher.told(Channel.ADMIN, "job.event").kind != "client_back":
        continue
    site.send(answer(task, w(1)))  # which decides the round: the other was lost in it
    site.send(answer(site.task(), w(2)))
    back.send(answer(back.task(), w(4)))

    assert outcome(server, job_id).state is JobState.COMPLETED
    assert [entry.answered for entry in wait(server.jobs.board.view(job_id)).history] == [
        (),
        ("site-1",),
        ("site-1", "site-2"),
    ]


def test_a_client_whose_task_was_cancelled_is_given_it_again_when_a_runs_next_process_waits_for_it(
    start: StartServer, dialler: Dialler, tmp_path: Path
) -> None:
    launcher = Threads()
    server = start(launcher=launcher, lost_after_s=0.05)
    gone, other = Site(dialler, server, "site-1"), Site(dialler, server, "site-2")
    job_id = submit(server, tmp_path, workflow=WorkflowSpec("cyclic", {"rounds": 1}))
    gone.task()
    watcher = dialler.site(server, "ada@demo", fqcn="ada@demo.cli-1")
    on_loop(lambda: server.jobs.board.watch(job_id, watcher.fqcn))
    assert gone.job is not None
    wait(gone.job.close())
    wait(gone.wire.close())
    following = other.task()  # the first was lost, and its task cancelled
    back = Site(dialler, server, "site-1")
    back.wire.ask(Channel.SERVER, "heartbeat", Heartbeat())
    while watcher.told(Channel.ADMIN, "job.event").kind != "client_back":
        continue

    launcher.started[0].kill()
    back.send(answer(back.task(), w(1)))
    other.send(answer(following, w(5)))  # which the lap has no use for any more: it is not what follows from w(1)
    following = other.task()
    assert opened(following.model or ModelRef()) == w(1)
    other.send(answer(following, w(6)))

    record = outcome(server, job_id)
    assert record.state is JobState.COMPLETED
    assert read_safetensors(wait(tensor_file(server, job_id, record.result))) == w(6)
    assert wait(server.jobs.board.view(job_id)).history[1].answered == ("site-1", "site-2")


def test_a_client_that_cannot_start_its_process_just_now_is_lost_in_time(
    start: StartServer, dialler: Dialler, tmp_path: Path
) -> None:
    server = start(lost_after_s=0.05)
    Site(dialler, server, "site-1", train=plus(2))
    full = Site(dialler, server, "site-2")

    def no_space(message: Message) -> None:
        raise NO_SPACE

    full.wire.cell.on(Channel.JOB, "start", no_space)
    job_id = submit(server, tmp_path, workflow=WorkflowSpec("fedavg", {"rounds": 1}))

    assert outcome(server, job_id).state is JobState.COMPLETED
    assert wait(server.jobs.board.view(job_id)).history[1].answered == ("site-1",)


def test_a_client_that_quits_is_lost_to_its_run(start: StartServer, dialler: Dialler, tmp_path: Path) -> None:
    server = start(lost_after_s=0.05)
    site = Site(dialler, server, "site-1")
    job_id = submit(server, tmp_path, min_clients=1)
    task = site.task()
    assert site.job is not None

    site.wire.ask(Channel.SERVER, "quit", Quit())

    ended = wait(site.job.ended())
    assert isinstance(ended, Unauthenticated)
    record = outcome(server, job_id)
    assert record.state is JobState.FAILED
    assert "site-1" in record.reason
    assert names(server) == []
    assert task.key.client == "site-1"


def test_reset_tokens_hands_out_again_what_is_to_be_answered(
    start: StartServer, dialler: Dialler, tmp_path: Path
) -> None:
    server = start()
    site, other = Site(dialler, server, "site-1"), Site(dialler, server, "site-2")
    submit(server, tmp_path)
    first = site.task()
    other.send(answer(other.task(), w(1)))

    server.reset_tokens()

    assert site.task() == first
    site.send(answer(first, w(1)))
    assert other.task().key.round == 2


def test_task_meta_info_names_the_model_that_a_client_works_on(
    start: StartServer, dialler: Dialler, tmp_path: Path
) -> None:
    server = start()
    site = Site(dialler, server, "site-1")
    job_id = submit(server, tmp_path, min_clients=1)
    task = site.task()
    assert server.task_meta_info("site-1") == TaskMetaInfo(PROJECT, job_id, 1, ClientName("site-1"))

    site.send(answer(task, w(1)))
    site.task()

    assert server.task_meta_info("site-1").round == 2
    assert server.task_meta_info("site-9").job_id == ""
