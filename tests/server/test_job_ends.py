"""Jobs that end early: aborted, or failed for good at a client."""

from pathlib import Path

import pytest

from hanse.errors import (
    Conflict,
    NotFound,
)
from hanse.events import EventType
from hanse.ids import ClientName, JobId
from hanse.job import JobState
from hanse.messages import (
    AbortJob,
    Channel,
    JobFailure,
    ReturnCode,
)
from hanse.server.federated_server import TaskMetaInfo

from .job_world import (
    Site,
    StartServer,
    answer,
    outcome,
    submit,
    w,
)
from .world import (
    PROJECT,
    Dialler,
    Recorder,
    request,
    wait,
)


def test_an_aborted_job_tells_its_clients_and_takes_nothing_more(
    start: StartServer, dialler: Dialler, recorder: Recorder, tmp_path: Path
) -> None:
    server = start()
    site = Site(dialler, server, "site-1")
    job_id = submit(server, tmp_path, min_clients=1)
    task = site.task()

    record = wait(server.jobs.abort(job_id, reason="ada wants another"))

    assert (record.state, record.code, record.reason) == (JobState.ABORTED, "aborted", "ada wants another")
    assert site.wire.told(Channel.JOB, "abort") == AbortJob(job_id, "ada wants another")
    assert outcome(server, job_id) == record
    refused = site.refused(answer(task, w(1)))
    assert "stale" in refused.reason or "there is no running job" in refused.reason
    assert [context.job_id for context in recorder.of(EventType.JOB_ABORTED)] == [job_id]
    assert server.task_meta_info("site-1") == TaskMetaInfo(PROJECT, JobId(""), -1, ClientName("site-1"))
    with pytest.raises(Conflict, match="aborted"):
        wait(server.jobs.abort(job_id, reason="again"))
    with pytest.raises(NotFound):
        wait(server.jobs.abort(JobId("no-such"), reason="?"))


def test_a_job_that_waits_can_be_aborted(start: StartServer, tmp_path: Path) -> None:
    server = start()
    job_id = submit(server, tmp_path)

    assert wait(server.jobs.abort(job_id, reason="changed my mind")).state is JobState.ABORTED
    assert outcome(server, job_id).reason == "changed my mind"


@pytest.mark.parametrize("kind", ["config", "exception", "unsafe"])
@pytest.mark.parametrize("by", ["agent", "process"])
def test_a_job_failure_that_a_client_reports_ends_the_run_with_that_reason(
    start: StartServer, dialler: Dialler, recorder: Recorder, tmp_path: Path, kind: str, by: str
) -> None:
    server = start()
    site = Site(dialler, server, "site-1")
    job_id = submit(server, tmp_path, min_clients=1)
    site.task()
    assert site.job is not None
    reporter = site.wire if by == "agent" else site.job

    reporter.ask(
        Channel.SERVER, "job_failure", JobFailure(job_id, kind, "KeyError: 'label'", log_tail="Traceback\nKeyError")
    )

    record = outcome(server, job_id)
    assert (record.state, record.code, record.client) == (JobState.FAILED, f"client-{kind}", "site-1")
    assert record.reason == "KeyError: 'label' (at site-1)"
    assert record.log_tail == "Traceback\nKeyError"
    assert site.wire.told(Channel.JOB, "abort").reason == record.reason
    assert [context.reason for context in recorder.of(EventType.JOB_FAILED)] == [record.reason]


def test_a_job_failure_by_a_direct_call(start: StartServer, dialler: Dialler, tmp_path: Path) -> None:
    server = start()
    site = Site(dialler, server, "site-1")
    job_id = submit(server, tmp_path, min_clients=1)
    site.task()

    reply = server.process_job_failure(request(JobFailure(job_id, "exception", "boom"), client="site-1"))

    assert reply.return_code is ReturnCode.OK
    assert outcome(server, job_id).reason == "boom (at site-1)"


@pytest.mark.parametrize("kind", ["", "of-my-own"])
def test_a_job_failure_of_a_kind_that_there_is_not_ends_nothing(
    kind: str, start: StartServer, dialler: Dialler, tmp_path: Path
) -> None:
    server = start()
    site = Site(dialler, server, "site-1")
    job_id = submit(server, tmp_path, min_clients=1)
    site.task()

    refused = site.wire.refused(Channel.SERVER, "job_failure", JobFailure(job_id, kind, "boom"))

    assert "JobFailure.kind" in refused.reason
    assert wait(server.jobs.board.view(job_id)).state == "running"


def test_only_who_takes_part_may_report_a_failure(start: StartServer, dialler: Dialler, tmp_path: Path) -> None:
    server = start()
    site = Site(dialler, server, "site-1")
    outsider = Site(dialler, server, "site-2")
    job_id = submit(server, tmp_path, min_clients=1, clients=("site-1",))
    site.task()

    refused = outsider.wire.refused(Channel.SERVER, "job_failure", JobFailure(job_id, "exception", "boom"))

    assert "site-2 may not report on job" in refused.reason
    assert wait(server.jobs.board.view(job_id)).state == "running"


def test_a_jobs_process_reports_on_its_own_job_alone(start: StartServer, dialler: Dialler, tmp_path: Path) -> None:
    server = start()
    site = Site(dialler, server, "site-1")
    job_id = submit(server, tmp_path, min_clients=1)
    site.task()
    another = submit(server, tmp_path, min_clients=1)
    while (other := site.started()).fqcn != f"site-1.{another}":
        continue

    refused = other.refused(Channel.SERVER, "job_failure", JobFailure(job_id, "exception", "boom"))

    assert "may not report on job" in refused.reason
    assert wait(server.jobs.board.view(job_id)).state == "running"
