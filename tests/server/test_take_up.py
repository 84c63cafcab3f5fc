"""A server that is started again: what its runs go on from, and with whom."""

import asyncio
import itertools
import threading
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

from hanse.errors import (
    NotInService,
    StoreFailed,
)
from hanse.events import EventType
from hanse.ids import Digest, JobId
from hanse.job import JobRecord, JobState, WorkflowSpec
from hanse.messages import (
    Channel,
    Heartbeat,
    JobCredentials,
    JobEnded,
    Message,
    ModelRef,
    RunSnapshot,
    TaskFault,
    TaskResult,
)
from hanse.run.server_link import ServerLink
from hanse.server.run_folder import RunFolder
from hanse.storage.models import read_safetensors

from .job_world import (
    ScriptedLauncher,
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
    Dialler,
    Recorder,
    names,
    on_loop,
    wait,
)


@pytest.mark.parametrize("how", ["close", "fl_shutdown"])
def test_a_server_started_again_goes_on_from_the_last_committed_round(
    start: StartServer, dialler: Dialler, recorder: Recorder, tmp_path: Path, how: str
) -> None:
    first = start()
    sites = [Site(dialler, first, name) for name in ("site-1", "site-2")]
    job_id = submit(first, tmp_path, workflow=WorkflowSpec("fedavg", {"rounds": 3}))
    for site in sites:
        site.send(answer(site.task(), w(1)))
    tasks = [site.task() for site in sites]
    assert [task.key.round for task in tasks] == [2, 2]
    sites[0].send(answer(tasks[0], w(2)))
    credentials = [site.wire.credentials for site in sites]
    given = [site.job.credentials for site in sites if site.job is not None and site.job.credentials is not None]
    job_tls = [site.job._tls for site in sites if site.job is not None]
    if how == "close":
        first.close()
        dialler.close()
    else:
        leaving = threading.Thread(target=first.fl_shutdown)
        leaving.start()
        assert [site.wire.told(Channel.JOB, "goodbye").retry for site in sites] == [True, True]
        dialler.close()
        leaving.join(20)
        assert not leaving.is_alive()

    second = start()
    assert wait(second.jobs.board.view(job_id)).state == "running"
    assert [entry.round for entry in wait(second.jobs.board.view(job_id)).history] == [0, 1]
    jobs = []
    for site, known, job_known, tls in zip(sites, credentials, given, job_tls, strict=True):
        agent = dialler.site(second, site.name, credentials=known)
        agent.ask(Channel.SERVER, "heartbeat", Heartbeat((job_id,)))
        wire = dialler.job_wire(second, f"{site.name}.{job_id}", JobCredentials(job_known), tls=tls)
        jobs.append(dialler.dial(wire))
        site.job = wire
    assert names(second) == ["site-1", "site-2"]

    again = sites[1].task()
    assert (again.key, opened(again.model or ModelRef())) == (tasks[1].key, w(1))
    sites[1].send(answer(again, w(4)))
    third = [site.task() for site in sites]
    assert [task.key.round for task in third] == [3, 3]  # so nobody was asked twice for what was answered
    assert opened(third[0].model or ModelRef()) == w(3)
    for site, task in zip(sites, third, strict=True):
        site.send(answer(task, w(5)))

    record = outcome(second, job_id)
    assert record.state is JobState.COMPLETED, record.reason
    assert read_safetensors(wait(tensor_file(second, job_id, record.result))) == w(5)


def test_a_client_that_failed_stays_out_of_its_run_when_the_server_is_started_again(
    start: StartServer, dialler: Dialler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hanse.server.active_run.STORE_PAUSE_S", 0.0)
    first = start()
    sites = [Site(dialler, first, name) for name in ("site-1", "site-2")]
    workflow = WorkflowSpec("fedavg", {"rounds": 2, "quorum": 1})
    job_id = submit(first, tmp_path, workflow=workflow, process_tries=1)
    task = sites[0].task()
    sites[1].started()
    store, noted = first.jobs.services.store, threading.Event()
    honest, tries = store.replace_job, iter([StoreFailed("writing", "the disk is away")])

    async def replace_job(epoch: int, record: JobRecord, *, was: JobState) -> None:
        for failed in tries:
            raise failed
        await honest(epoch, record, was=was)
        noted.set()

    monkeypatch.setattr(store, "replace_job", replace_job)
    sites[1].wire.ask(Channel.SERVER, "job_ended", JobEnded(job_id, 1, -9, "epoch 3"))
    assert noted.wait(20)
    sites[0].send(answer(task, w(1)))
    assert sites[0].task().key.round == 2
    credentials, job_wire = [site.wire.credentials for site in sites], sites[0].job
    assert job_wire is not None
    assert job_wire.credentials is not None
    (before,) = [view for view in wait(first.jobs.board.view(job_id)).clients if view.name == "site-2"]
    first.close()
    dialler.close()

    second = start()
    started: list[Message] = []
    for site, known, reported in zip(sites, credentials, ((job_id,), ()), strict=True):
        answers = {(Channel.JOB, "deploy"): started.append, (Channel.JOB, "start"): started.append}
        agent = dialler.site(second, site.name, credentials=known, answers=answers)
        agent.ask(Channel.SERVER, "heartbeat", Heartbeat(reported))
    wire = dialler.job_wire(second, f"site-1.{job_id}", JobCredentials(job_wire.credentials), tls=job_wire._tls)
    sites[0].job = dialler.dial(wire)
    (after,) = [view for view in wait(second.jobs.board.view(job_id)).clients if view.name == "site-2"]
    assert (after.state, after.reason) == (before.state, before.reason)
    sites[0].send(answer(sites[0].task(), w(2)))

    record = outcome(second, job_id)
    assert record.state is JobState.COMPLETED, record.reason
    assert [entry.answered for entry in wait(second.jobs.board.view(job_id)).history] == [(), ("site-1",), ("site-1",)]
    assert started == []


def test_a_round_that_went_on_without_a_failed_client_counts_when_it_is_noted_that_it_failed(
    start: StartServer, dialler: Dialler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start()
    sites = [Site(dialler, server, name) for name in ("site-1", "site-2")]
    workflow = WorkflowSpec("fedavg", {"rounds": 1, "quorum": 1})
    job_id = submit(server, tmp_path, workflow=workflow, process_tries=1)
    task = sites[0].task()
    sites[1].started()
    store, refused, noted = server.jobs.services.store, threading.Event(), []
    replace_job, commit_round = store.replace_job, store.commit_round

    async def replaced(*arguments: Any, **more: Any) -> None:
        if not refused.is_set():
            refused.set()
            raise StoreFailed("writing", "the disk is away")
        await replace_job(*arguments, **more)

    async def committed(*arguments: Any, **more: Any) -> None:
        noted.extend((await store.job(job_id)).failed_clients)
        await commit_round(*arguments, **more)

    monkeypatch.setattr(store, "replace_job", replaced)
    monkeypatch.setattr(store, "commit_round", committed)
    sites[1].wire.ask(Channel.SERVER, "job_ended", JobEnded(job_id, 1, -9, "epoch 3"))
    assert refused.wait(20)
    sites[0].send(answer(task, w(1)))

    assert outcome(server, job_id).state is JobState.COMPLETED
    assert [failed.client for failed in noted] == ["site-2"]


def test_what_befell_a_client_is_known_to_the_server_started_again(
    start: StartServer, dialler: Dialler, tmp_path: Path
) -> None:
    first = start()
    sites = [Site(dialler, first, name) for name in ("site-1", "site-2")]
    workflow = WorkflowSpec("fedavg", {"rounds": 1, "quorum": 1})
    job_id = submit(first, tmp_path, workflow=workflow)
    task, other_task = sites[0].task(), sites[1].task()
    sites[0].send(TaskResult(task.key, fault=TaskFault("no-space", "a full disk", log_tail="the end of the log")))
    credentials = [site.wire.credentials for site in sites]
    job_wire = sites[1].job
    assert job_wire is not None
    assert job_wire.credentials is not None
    first.close()
    dialler.close()

    second = start()
    for site, known in zip(sites, credentials, strict=True):
        agent = dialler.site(second, site.name, credentials=known)
        agent.ask(Channel.SERVER, "heartbeat", Heartbeat((job_id,)))
    wire = dialler.job_wire(second, f"site-2.{job_id}", JobCredentials(job_wire.credentials), tls=job_wire._tls)
    sites[1].job = dialler.dial(wire)
    assert sites[1].task().key == other_task.key
    sites[1].send(TaskResult(other_task.key, fault=TaskFault("training-failed", "ValueError")))

    record = outcome(second, job_id)
    assert (record.code, record.client, record.cause) == ("too-few-clients", "site-1", "no-space")
    assert record.log_tail == "the end of the log"


def test_answers_come_to_a_runs_next_process_in_the_order_in_which_they_were_accepted(
    start: StartServer, dialler: Dialler, recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = Threads()
    server = start(launcher=launcher)
    sites = [Site(dialler, server, name) for name in ("site-1", "site-2")]
    job_id = submit(server, tmp_path, workflow=WorkflowSpec("fedavg", {"rounds": 1, "quorum": 1}))
    tasks = [site.task() for site in sites]
    sites[0].send(TaskResult(tasks[0].key, fault=TaskFault("no-space", "a full disk")))
    store, may_go_on = server.jobs.services.store, on_loop(asyncio.Event)
    snapshot = store.snapshot

    async def slowly(job_id: JobId) -> Any:
        await may_go_on.wait()
        return await snapshot(job_id)

    monkeypatch.setattr(store, "snapshot", slowly)
    launcher.started[0].kill()
    recorder.wait_for(EventType.START_RUN, count=2)  # its next process asks where it stands
    sites[1].send(TaskResult(tasks[1].key, fault=TaskFault("training-failed", "ValueError")))
    on_loop(may_go_on.set)

    record = outcome(server, job_id)
    assert (record.code, record.client, record.cause) == ("too-few-clients", "site-1", "no-space")


def test_an_answer_that_comes_before_a_runs_next_process_has_begun_comes_to_it_after_those_before(
    start: StartServer, dialler: Dialler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = Threads()
    server = start(launcher=launcher)
    sites = [Site(dialler, server, name) for name in ("site-1", "site-2")]
    job_id = submit(server, tmp_path, workflow=WorkflowSpec("fedavg", {"rounds": 1, "quorum": 1}))
    tasks = [site.task() for site in sites]
    sites[0].send(TaskResult(tasks[0].key, fault=TaskFault("no-space", "a full disk")))
    is_linked, may_go_on, attach = threading.Event(), on_loop(asyncio.Event), ServerLink.attach

    async def slowly(link: ServerLink) -> RunSnapshot:
        is_linked.set()
        await may_go_on.wait()
        return await attach(link)

    monkeypatch.setattr(ServerLink, "attach", slowly)
    launcher.started[0].kill()
    assert is_linked.wait(10)
    sites[1].send(TaskResult(tasks[1].key, fault=TaskFault("training-failed", "ValueError")))
    on_loop(may_go_on.set)

    record = outcome(server, job_id)
    assert (record.code, record.client, record.cause) == ("too-few-clients", "site-1", "no-space")


def test_a_run_whose_process_has_not_begun_again_waits_for_it_though_answers_come(
    start: StartServer, dialler: Dialler, tmp_path: Path
) -> None:
    first = start()
    site = Site(dialler, first, "site-1")
    job_id = submit(first, tmp_path, min_clients=1)
    task = site.task()
    credentials, job_wire = site.wire.credentials, site.job
    assert job_wire is not None
    assert job_wire.credentials is not None
    first.close()
    dialler.close()

    launcher = on_loop(ScriptedLauncher)
    second = start(launcher=launcher)
    dialler.site(second, "site-1", credentials=credentials)
    wire = dialler.job_wire(second, f"site-1.{job_id}", JobCredentials(job_wire.credentials), tls=job_wire._tls)
    site.job = dialler.dial(wire)
    launcher.next()
    assert [waiting.what for waiting in wait(second.jobs.board.view(job_id)).waiting] == [
        "the run's process at the server to begin (start 1)",
        "answers to 'train' of round 1 from 1 of 1 client",
    ]

    site.send(answer(task, w(1)))

    assert [waiting.what for waiting in wait(second.jobs.board.view(job_id)).waiting] == [
        "the run's process at the server to begin (start 1)"
    ]


@pytest.mark.parametrize("is_listed_first", [False, True])
def test_a_client_without_its_process_is_given_one_by_the_server_started_again(
    start: StartServer, dialler: Dialler, tmp_path: Path, is_listed_first: bool
) -> None:
    first = start()
    site = Site(dialler, first, "site-1")
    job_id = submit(first, tmp_path, min_clients=1, workflow=WorkflowSpec("fedavg", {"rounds": 1}))
    site.task()
    credentials = site.wire.credentials
    first.close()
    dialler.close()

    second = start()
    back = Site(dialler, second, "site-1", credentials=credentials)
    if is_listed_first:
        back.wire.ask(Channel.SERVER, "heartbeat", Heartbeat((job_id,)))
    back.wire.ask(Channel.SERVER, "heartbeat", Heartbeat())
    back.send(answer(back.task(), w(2)))

    assert outcome(second, job_id).state is JobState.COMPLETED


def test_the_end_of_a_clients_process_is_not_missed_while_its_run_is_taken_up(
    start: StartServer, dialler: Dialler, recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = start()
    site = Site(dialler, first, "site-1")
    job_id = submit(first, tmp_path, min_clients=1, process_tries=1)
    site.task()
    credentials = site.wire.credentials
    first.close()
    dialler.close()
    may_go_on, take_over = on_loop(asyncio.Event), RunFolder.take_over

    async def slowly(folder: RunFolder, needed: Collection[Digest]) -> list[Digest]:
        await may_go_on.wait()
        return await take_over(folder, needed)

    monkeypatch.setattr(RunFolder, "take_over", slowly)
    second = start()
    back = Site(dialler, second, "site-1", credentials=credentials)
    back.wire.ask(Channel.SERVER, "heartbeat", Heartbeat((job_id,)))
    end = JobEnded(job_id, attempt=1, status=-9, cause="out-of-memory")

    assert isinstance(back.wire.refused(Channel.SERVER, "job_ended", end), NotInService)
    on_loop(may_go_on.set)
    recorder.wait_for(EventType.START_RUN, count=2)
    back.wire.ask(Channel.SERVER, "job_ended", end)
    assert outcome(second, job_id).cause == "out-of-memory"


@pytest.mark.parametrize("failing", ["end_run", "job"])
def test_a_run_that_could_not_be_aborted_while_it_was_taken_up_is_taken_up_all_the_same(
    failing: str, start: StartServer, dialler: Dialler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hanse.server.jobs.POSTPONED_S", 0.01)
    first = start()
    site = Site(dialler, first, "site-1")
    job_id = submit(first, tmp_path, min_clients=1)
    task, credentials = site.task(), site.wire.credentials
    first.close()
    dialler.close()
    may_go_on, begun, take_over = on_loop(asyncio.Event), threading.Event(), RunFolder.take_over

    async def slowly(folder: RunFolder, needed: Collection[Digest]) -> list[Digest]:
        begun.set()
        await may_go_on.wait()
        return await take_over(folder, needed)

    monkeypatch.setattr(RunFolder, "take_over", slowly)
    second = start()
    assert begun.wait(20)
    store, asked = second.jobs.services.store, itertools.count(1)
    honest = getattr(store, failing)

    async def away(*arguments: Any, **more: Any) -> Any:
        if failing == "end_run" or next(asked) == 2:  # what is asked of the store first is how far the job is
            raise StoreFailed("using the database", "no route to host")
        return await honest(*arguments, **more)

    with monkeypatch.context() as patched:
        patched.setattr(store, failing, away)
        with pytest.raises(StoreFailed):
            wait(second.jobs.abort(job_id, reason="not needed any more"))
    on_loop(may_go_on.set)

    back = Site(dialler, second, "site-1", credentials=credentials)
    back.wire.ask(Channel.SERVER, "heartbeat", Heartbeat())
    assert back.task() == task


def test_a_run_that_is_taken_up_does_not_wait_for_ever_for_a_client_that_does_not_come_back(
    start: StartServer, dialler: Dialler, tmp_path: Path
) -> None:
    first = start()
    site = Site(dialler, first, "site-1")
    job_id = submit(first, tmp_path, min_clients=1)
    site.task()
    dialler.close()
    first.close()

    record = outcome(start(lost_after_s=0.05), job_id)

    assert (record.state, record.code) == (JobState.FAILED, "too-few-clients")
    assert (record.client, record.cause) == ("site-1", "client-lost")


def test_a_job_that_waited_waits_again_after_a_restart(start: StartServer, dialler: Dialler, tmp_path: Path) -> None:
    first = start()
    job_id = submit(first, tmp_path, min_clients=1)
    first.close()
    second = start()

    Site(dialler, second, "site-1", train=plus(1))

    assert outcome(second, job_id).state is JobState.COMPLETED
