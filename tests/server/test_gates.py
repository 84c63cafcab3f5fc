"""Handlers that refuse: a submission, a launch, a task, an answer."""

from pathlib import Path

import pytest

from hanse.errors import (
    JobInvalid,
)
from hanse.events import EventType, Refused
from hanse.job import JobState
from hanse.messages import (
    Channel,
)

from .job_world import (
    Site,
    StartServer,
    outcome,
    plus,
    submit,
)
from .world import (
    Dialler,
    Recorder,
    wait,
)


@pytest.mark.parametrize("error", [Refused("not today"), ZeroDivisionError("not today")])
def test_a_handler_may_refuse_a_submission(
    start: StartServer, recorder: Recorder, tmp_path: Path, error: Exception
) -> None:
    server = start()
    recorder.raising[EventType.JOB_SUBMITTED] = error

    with pytest.raises(JobInvalid, match="not today"):
        submit(server, tmp_path)
    assert wait(server.jobs.board.views()) == []
    assert not list((tmp_path / "ws" / "runs").iterdir())


@pytest.mark.parametrize("error", [Refused("not today"), ZeroDivisionError("not today")])
def test_a_handler_may_refuse_a_launch(
    start: StartServer, dialler: Dialler, recorder: Recorder, tmp_path: Path, error: Exception
) -> None:
    server = start()
    recorder.raising[EventType.BEFORE_JOB_LAUNCH] = error
    site = Site(dialler, server, "site-1")
    job_id = submit(server, tmp_path, min_clients=1)

    record = outcome(server, job_id)

    assert (record.state, record.code) == (JobState.FAILED, "launch-refused")
    assert "not today" in record.reason
    assert site.wire.told_nothing(Channel.JOB, "deploy")


@pytest.mark.parametrize("error", [Refused("not today"), ZeroDivisionError("not today")])
def test_a_handler_may_refuse_to_send_a_task(
    start: StartServer, dialler: Dialler, recorder: Recorder, tmp_path: Path, error: Exception
) -> None:
    server = start()
    recorder.raising[EventType.BEFORE_TASK_DATA] = error
    site = Site(dialler, server, "site-1", train=plus(1))
    job_id = submit(server, tmp_path, min_clients=1)

    record = outcome(server, job_id)

    assert record.state is JobState.FAILED
    assert "not today" in record.reason
    assert site.started().told_nothing(Channel.TASK, "task")
    assert recorder.of(EventType.TASK_SENT) == []


@pytest.mark.parametrize("error", [Refused("not today"), ZeroDivisionError("not today")])
def test_a_handler_may_refuse_an_answer(
    start: StartServer, dialler: Dialler, recorder: Recorder, tmp_path: Path, error: Exception
) -> None:
    server = start()
    recorder.raising[EventType.BEFORE_TASK_RESULT] = error
    site = Site(dialler, server, "site-1", train=plus(1))
    job_id = submit(server, tmp_path, min_clients=1)

    refused = site.outcome()

    assert refused is not None
    assert "not today" in refused.reason
    record = outcome(server, job_id)
    assert record.state is JobState.FAILED
    assert "not today" in record.reason
