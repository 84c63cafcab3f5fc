"""Jobs that do not progress: what they wait for, until when, and that this is what happens then."""

import asyncio
import queue
import threading
from pathlib import Path
from typing import Any

import pytest

from hanse.coordination.waiting import (
    END_TRIED_AGAIN,
    GIVEN_UP,
    HINDERED,
    IF_NEEDED,
    SCHEDULED_AGAIN,
)
from hanse.errors import (
    NoSpace,
    NotInService,
    SiteRefused,
    StoreFailed,
)
from hanse.events import EventType
from hanse.ids import SERVER, JobId, job_cell
from hanse.job import JobRecord, JobState, Resources, WorkflowSpec
from hanse.messages import (
    Channel,
    JobFailure,
    Message,
)
from hanse.server.active_run import ActiveRun
from hanse.server.client_processes import DEPLOY_TIMEOUT_S
from hanse.server.run_folder import RunFolder
from hanse.server.take_up import FETCH_WITHIN_S
from hanse.storage.tensors import TensorFiles

from .job_world import (
    NO_SPACE,
    Site,
    StartServer,
    answer,
    outcome,
    plus,
    submit,
    w,
)
from .world import (
    Dialler,
    Recorder,
    on_loop,
    wait,
)


def test_a_job_says_what_it_waits_for_and_until_when(start: StartServer, dialler: Dialler, tmp_path: Path) -> None:
    server = start()
    Site(dialler, server, "site-1")
    job_id = submit(server, tmp_path, start_within_s=1000.0)

    view = wait(server.jobs.board.view(job_id))
    assert view.state == "submitted"
    (waiting,) = view.waiting
    assert waiting.what == "1 of the 2 clients that the job needs can take it"
    assert (waiting.since, waiting.until) == (view.submitted_at, pytest.approx(view.submitted_at + 1000))
    assert waiting.then == "the job is given up (no-clients)"


def test_a_running_job_says_for_whom_it_waits_and_how_each_of_them_stands(
    start: StartServer, dialler: Dialler, tmp_path: Path
) -> None:
    server = start()
    site, other = Site(dialler, server, "site-1"), Site(dialler, server, "site-2")
    job_id = submit(server, tmp_path)
    began = wait(server.jobs.board.view(job_id)).started_at
    site.task()
    other.send(answer(other.task(), w(1)))

    (waiting,) = wait(server.jobs.board.view(job_id)).waiting
    assert waiting.what == "answers to 'train' of round 1 from 1 of 2 clients"
    (awaited,) = waiting.whom
    assert (awaited.name, awaited.state, awaited.attempt) == ("site-1", "running", 1)
    assert began <= awaited.since
    assert began <= waiting.since

    assert site.job is not None
    gone = threading.Event()
    on_loop(lambda: server.jobs.services.cell.on_link_down(lambda peer, reason: gone.set()))
    wait(site.job.close())
    assert gone.wait(20)
    (awaited,) = wait(server.jobs.board.view(job_id)).waiting[0].whom
    assert (awaited.name, awaited.state) == ("site-1", "suspect")


def test_a_job_that_is_being_deployed_waits_for_those_that_have_not_taken_it(
    start: StartServer, dialler: Dialler, tmp_path: Path
) -> None:
    server = start()
    fetching, fetched = threading.Event(), asyncio.Event()
    site = Site(dialler, server, "site-1")

    async def slowly(message: Message) -> None:
        fetching.set()
        await fetched.wait()

    site.wire.cell.on(Channel.JOB, "deploy", slowly)
    job_id = submit(server, tmp_path, min_clients=1)
    assert fetching.wait(20)

    view = wait(server.jobs.board.view(job_id))

    assert view.state == "scheduled"
    (waiting,) = view.waiting
    assert [client.name for client in waiting.whom] == ["site-1"]
    assert waiting.until == waiting.since + DEPLOY_TIMEOUT_S
    on_loop(fetched.set)
    site.started()


def test_a_job_that_runs_is_shown_while_the_store_is_away(
    start: StartServer, dialler: Dialler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start()
    site = Site(dialler, server, "site-1")
    job_id = submit(server, tmp_path, min_clients=1)
    task = site.task()
    store = server.jobs.services.store

    async def away(*_: object, **__: object) -> None:
        raise StoreFailed("using the database", "no route to host")

    with monkeypatch.context() as patched:
        for method in ("job", "jobs", "rounds", "last_round"):
            patched.setattr(store, method, away)
        view = wait(server.jobs.board.view(wait(server.jobs.board.find("tiny"))))
        with pytest.raises(StoreFailed):
            wait(server.jobs.board.view(JobId("another")))
        with pytest.raises(StoreFailed):
            wait(server.jobs.board.find("another"))

    assert (view.job_id, view.state, view.round) == (job_id, "running", 0)
    store_waiting, clients = view.waiting
    assert "no route to host" in store_waiting.what
    assert [client.name for client in clients.whom] == ["site-1"]
    site.send(answer(task, w(1)))
    site.task()
    assert [waiting.what[:10] for waiting in wait(server.jobs.board.view(job_id)).waiting] == ["answers to"]


def test_a_run_that_needs_nothing_of_the_store_outlives_it_that_people_could_not_look_it_up(
    start: StartServer, dialler: Dialler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start(mend_within_s=0.05)
    site, other = Site(dialler, server, "site-1"), Site(dialler, server, "site-2")
    job_id = submit(server, tmp_path, workflow=WorkflowSpec("fedavg", {"rounds": 1}))
    task = site.task()
    other.send(answer(other.task(), w(1)))  # when that is accepted, nothing is being written any more

    async def away(*_: object, **__: object) -> None:
        raise StoreFailed("using the database", "no route to host")

    with monkeypatch.context() as patched:
        patched.setattr(server.jobs.services.store, "job", away)
        store_waiting, _ = wait(server.jobs.board.view(job_id)).waiting
    assert store_waiting.then == IF_NEEDED
    assert [waiting.what[:10] for waiting in wait(server.jobs.board.view(job_id)).waiting] == ["answers to"]
    wait(asyncio.sleep(0.2))  # timers of one loop are due in their order
    site.send(answer(task, w(1)))

    assert outcome(server, job_id).state is JobState.COMPLETED


def test_a_run_whose_rounds_the_store_does_not_take_for_too_long_fails_for_that_reason(
    start: StartServer, dialler: Dialler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start(mend_within_s=0.2)
    site = Site(dialler, server, "site-1")
    job_id = submit(server, tmp_path, min_clients=1)
    task = site.task()

    async def away(*_: object, **__: object) -> None:
        raise StoreFailed("committing a round", "no route to host")

    monkeypatch.setattr(server.jobs.services.store, "commit_round", away)
    site.send(answer(task, w(1)))

    record = outcome(server, job_id)
    assert (record.state, record.code) == (JobState.FAILED, "store-failed")
    assert "no route to host" in record.reason


def test_a_run_whose_process_asks_anew_where_it_stands_has_no_more_time_for_what_is_not_written(
    start: StartServer, dialler: Dialler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hanse.run.server_link.Backoff.next_s", lambda _: 0.05)
    server = start(mend_within_s=1.0)
    site = Site(dialler, server, "site-1")
    job_id = submit(server, tmp_path, min_clients=1)
    task, services = site.task(), server.jobs.services

    async def away(*_: object, **__: object) -> None:
        services.cell.drop(job_cell(SERVER, job_id), NotInService())
        raise StoreFailed("committing a round", "no route to host")

    monkeypatch.setattr(services.store, "commit_round", away)
    site.send(answer(task, w(1)))

    assert outcome(server, job_id).code == "store-failed"


def test_a_run_whose_disk_lets_go_of_nothing_for_too_long_fails_for_that_reason(
    start: StartServer, dialler: Dialler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start(mend_within_s=0.2)
    site = Site(dialler, server, "site-1")
    job_id = submit(server, tmp_path, min_clients=1)
    task = site.task()

    def away(*_: object) -> None:
        raise StoreFailed("setting tensors aside", "Input/output error")

    monkeypatch.setattr(TensorFiles, "set_aside", away)
    site.send(answer(task, w(1)))

    record = outcome(server, job_id)
    assert (record.state, record.code) == (JobState.FAILED, "store-failed")
    assert "Input/output error" in record.reason


@pytest.mark.parametrize("what", ["a client's word", "what is done for the run"])
def test_an_end_that_the_store_does_not_take_is_told_of_and_when_it_is_asked_again(
    what: str, start: StartServer, dialler: Dialler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hanse.server.active_run.STORE_PAUSE_S", 0.1)
    server = start()
    site = Site(dialler, server, "site-1")
    job_id = submit(server, tmp_path, min_clients=1)
    site.task()
    store, refused = server.jobs.services.store, threading.Semaphore(0)
    end_run, is_away = store.end_run, threading.Event()

    async def broken(run: ActiveRun) -> None:
        raise StoreFailed("handing out a task", "boom")

    is_away.set()

    async def ended(*arguments: Any, **more: Any) -> None:
        if is_away.is_set():
            refused.release()
            raise StoreFailed("ending a run", "no route to host")
        await end_run(*arguments, **more)

    monkeypatch.setattr(store, "end_run", ended)
    if what == "a client's word":
        site.wire.ask(Channel.SERVER, "job_failure", JobFailure(job_id, "exception", "boom"))
    else:
        monkeypatch.setattr(ActiveRun, "hand_out_again", broken)
        server.reset_tokens()
    for _ in range(2):  # at its second refusal all is done that follows the first
        assert refused.acquire(timeout=20)

    waiting, *_ = wait(server.jobs.board.view(job_id)).waiting
    is_away.clear()

    assert "no route to host" in waiting.what
    assert waiting.since < waiting.until < waiting.since + 20
    assert waiting.then == END_TRIED_AGAIN
    assert "boom" in outcome(server, job_id).reason


def test_a_job_whose_end_the_store_does_not_take_does_not_keep_the_schedule_asking(
    start: StartServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start()
    refused: queue.Queue[JobId] = queue.Queue()

    async def full(epoch: int, record: JobRecord, **_: object) -> None:
        refused.put(record.job_id)
        raise NO_SPACE

    monkeypatch.setattr(server.jobs.services.store, "end_run", full)
    job_id = submit(server, tmp_path, start_within_s=0.01)
    assert refused.get(timeout=20) == job_id

    for _ in range(10):  # what the schedule does at once, it has done by then
        wait(server.jobs.board.view(job_id))

    assert refused.empty()
    view = wait(server.jobs.board.view(job_id))
    assert {waiting.until > server.jobs.services.wall() for waiting in view.waiting} == {True}


@pytest.mark.parametrize("state", [JobState.SCHEDULED, JobState.RUNNING])
def test_a_job_that_the_store_does_not_let_begin_says_so_and_begins_as_soon_as_it_does(
    state: JobState, start: StartServer, dialler: Dialler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hanse.server.jobs.POSTPONED_S", 0.01)
    server = start()
    store, refused = server.jobs.services.store, threading.Semaphore(0)
    replace_job, is_full = store.replace_job, threading.Event()
    is_full.set()

    async def replaced(epoch: int, record: JobRecord, **more: Any) -> None:
        if record.state is state and is_full.is_set():
            refused.release()
            raise NoSpace("using the database", disk="/", folder="/hanse", why="No space left on device")
        await replace_job(epoch, record, **more)

    monkeypatch.setattr(store, "replace_job", replaced)
    site = Site(dialler, server, "site-1")
    job_id = submit(server, tmp_path, min_clients=1, start_within_s=1000.0)
    for _ in range(2):  # at its second refusal all is done that follows the first
        assert refused.acquire(timeout=20)

    view = wait(server.jobs.board.view(job_id))

    assert view.state == ("submitted" if state is JobState.SCHEDULED else "scheduled")
    (waiting,) = view.waiting
    assert "No space left on device" in waiting.what
    assert view.submitted_at <= waiting.since <= server.jobs.services.wall()
    if state is JobState.SCHEDULED:
        assert waiting.until == view.submitted_at + 1000.0
        assert waiting.then == f"{GIVEN_UP}, as soon as the store takes note of that"
    else:
        assert (waiting.until, waiting.then) == (waiting.since + server.jobs.services.mend_within_s, HINDERED)
    is_full.clear()
    site.task()
    assert [each.what for each in wait(server.jobs.board.view(job_id)).waiting] == [
        "answers to 'train' of round 1 from 1 of 1 client"
    ]


def test_a_job_whose_package_cannot_be_had_is_given_up_in_time_and_says_so_before(
    start: StartServer, dialler: Dialler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hanse.server.jobs.POSTPONED_S", 0.01)
    asked, is_away = threading.Event(), asyncio.Event()

    async def away(folder: RunFolder, record: JobRecord) -> None:
        asked.set()
        await is_away.wait()
        raise StoreFailed("fetching a package from the bucket", "no route to host")

    monkeypatch.setattr(RunFolder, "have_package", away)
    server = start()
    Site(dialler, server, "site-1")
    job_id = submit(server, tmp_path, min_clients=1, start_within_s=0.000_001)
    assert asked.wait(20)

    view = wait(server.jobs.board.view(job_id))
    on_loop(is_away.set)

    assert view.state == "scheduled"
    (waiting,) = view.waiting
    assert waiting.what == "the server to have the job's package"
    assert (waiting.until - waiting.since, waiting.then) == (FETCH_WITHIN_S, SCHEDULED_AGAIN)
    assert waiting.since >= view.submitted_at
    record = outcome(server, job_id)
    assert (record.state, record.code) == (JobState.FAILED, "store-failed")
    assert "no route to host" in record.reason


def test_a_job_starts_when_its_clients_have_come(start: StartServer, dialler: Dialler, tmp_path: Path) -> None:
    server = start()
    Site(dialler, server, "site-1", train=plus(1))
    job_id = submit(server, tmp_path)

    Site(dialler, server, "site-2", train=plus(1))

    assert outcome(server, job_id).state is JobState.COMPLETED


def test_a_job_that_waits_in_vain_fails_with_what_it_waited_for(start: StartServer, tmp_path: Path) -> None:
    server = start()

    record = outcome(server, submit(server, tmp_path, start_within_s=0.05))

    assert (record.state, record.code) == (JobState.FAILED, "no-clients")
    assert "client" in record.reason


def test_a_sites_refusal_reaches_the_submitter(start: StartServer, dialler: Dialler, tmp_path: Path) -> None:
    server = start()
    Site(dialler, server, "site-1")
    Site(dialler, server, "site-2", refuses=SiteRefused("site-2", "code that comes with a job may not run here"))

    record = outcome(server, submit(server, tmp_path))

    assert (record.state, record.code, record.client) == (JobState.FAILED, "site-refused", "site-2")
    assert record.reason == "site-2 refused the job: code that comes with a job may not run here"


def test_a_disk_that_is_full_at_a_site_is_waited_for_and_then_what_the_job_failed_of(
    start: StartServer, dialler: Dialler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start()
    postponed, plan = threading.Event(), server.jobs._plan

    async def planned() -> float | None:
        delay = await plan()
        if server.jobs._postponed:
            postponed.set()
        return delay

    monkeypatch.setattr(server.jobs, "_plan", planned)
    full = NoSpace("receiving a package", disk="/", folder="/hanse", why="No space left on device")
    Site(dialler, server, "site-1", refuses=full)
    waiting_job = submit(server, tmp_path, min_clients=1)
    assert postponed.wait(20)
    view = wait(server.jobs.board.view(waiting_job))
    assert view.state == "submitted"
    assert view.waiting[0].what == f"{full.reason} (at site-1)"
    assert view.waiting[0].until == view.submitted_at + 60
    assert view.waiting[0].then == "the job is given up (no-space)"

    record = outcome(server, submit(server, tmp_path, min_clients=1, start_within_s=0.000_001))

    assert (record.code, record.client) == ("no-space", "site-1")
    assert record.reason == f"{full.reason} (at site-1)"


def test_a_job_runs_without_a_site_that_refuses_where_enough_are_left(
    start: StartServer, dialler: Dialler, tmp_path: Path
) -> None:
    server = start()
    Site(dialler, server, "site-1", train=plus(1))
    Site(dialler, server, "site-2", refuses=SiteRefused("site-2", "no"))

    record = outcome(server, submit(server, tmp_path, min_clients=1))

    assert (record.state, record.clients) == (JobState.COMPLETED, ("site-1",))


def test_what_the_jobs_code_raises_fails_the_job_with_its_reason(
    start: StartServer, dialler: Dialler, tmp_path: Path
) -> None:
    server = start()
    Site(dialler, server, "site-1")

    record = outcome(server, submit(server, tmp_path, min_clients=1, model="tiny_model:broken"))

    assert (record.state, record.code) == (JobState.FAILED, "workflow-failed")
    assert "RuntimeError: no such data" in record.reason


def test_an_exception_that_says_more_than_fits_into_a_message_ends_the_run_as_any_other(
    start: StartServer, dialler: Dialler, tmp_path: Path
) -> None:
    server = start()
    Site(dialler, server, "site-1", train=plus(1))

    record = outcome(server, submit(server, tmp_path, min_clients=1, process_tries=1, model="tiny_model:loud"))

    assert "RuntimeError: xxx" in record.reason
    assert record.code == "workflow-failed"


def test_a_model_that_cannot_be_imported_fails_the_job_and_is_named(
    start: StartServer, dialler: Dialler, tmp_path: Path
) -> None:
    server = start()
    Site(dialler, server, "site-1")

    record = outcome(server, submit(server, tmp_path, min_clients=1, model="no_such:model"))

    assert (record.state, record.code) == (JobState.FAILED, "job-invalid")
    assert "no_such:model" in record.reason


def test_a_job_wants_what_its_clients_offer(start: StartServer, dialler: Dialler, tmp_path: Path) -> None:
    server = start()
    Site(dialler, server, "site-1")

    record = outcome(server, submit(server, tmp_path, min_clients=1, resources=Resources(gpus=1), start_within_s=0.05))

    assert record.state is JobState.FAILED


def test_stop_training_starts_no_further_job(
    start: StartServer, dialler: Dialler, recorder: Recorder, tmp_path: Path
) -> None:
    server = start()
    site = Site(dialler, server, "site-1")
    first = submit(server, tmp_path, min_clients=1, workflow=WorkflowSpec("fedavg", {"rounds": 1}))
    task = site.task()

    server.stop_training()
    second = submit(server, tmp_path, min_clients=1)
    site.send(answer(task, w(1)))

    assert outcome(server, first).state is JobState.COMPLETED
    view = wait(server.jobs.board.view(second))
    assert view.state == "submitted"
    (waiting,) = view.waiting
    assert waiting.what == "the server starts no further jobs"
    assert (waiting.until, waiting.then) == (view.submitted_at + 60.0, "the job is given up (no-clients)")
    assert len(recorder.of(EventType.BEFORE_JOB_LAUNCH)) == 1
