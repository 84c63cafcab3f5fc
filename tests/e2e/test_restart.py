"""Whatever process is killed or stopped in the middle of a round, the job completes with an undisturbed run's bytes."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from benchmarks.deployment import Deployment, deployment

from hanse.client.workspace import job_folders

JOB = Path(__file__).parent / "job"
ROUND = 3
STOPPED_WITHIN_S = 60.0


@pytest.fixture(scope="module")
def undisturbed() -> Iterator[str]:
    """Return the digest of the model that a run without trouble ends with."""
    with deployment() as running:
        running.start("server", *running.names)
        yield running.run(JOB)["result"]


@pytest.fixture
def running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Deployment]:
    """Run a server and two clients whose training waits at gates in *tmp_path*."""
    monkeypatch.setenv("HANSE_TEST_GATES", str(tmp_path))
    with deployment() as up:
        up.start("server", *up.names)
        yield up


def gate(folder: Path, client: str) -> Path:
    """Make the gate at which *client* will wait in the round that is disturbed."""
    path = folder / f"{client}-{ROUND}"
    os.mkfifo(path)
    return path


def job_log(running: Deployment, client: str) -> str:
    """Return what the processes of *client*'s one job have said."""
    (folder,) = job_folders(running.workspace(client))
    return (folder.path / "job.log").read_text()


def times_received(running: Deployment, client: str, job: str) -> list[int]:
    """Return how often *client* was given its task of each round."""
    log = job_log(running, client)
    return [log.count(f"task received job={job} task=train round={number}") for number in range(1, 5)]


def serve_by(running: Deployment, program: str) -> None:
    """Have the server be, from now on, the one that the module *program* of these tests makes of it."""
    running.end("server")
    running.programs["server"] = [sys.executable, "-m", f"tests.e2e.{program}"]
    running.start("server")


def test_a_killed_server_goes_on_where_it_was_when_it_is_started_again(
    running: Deployment, tmp_path: Path, undisturbed: str
) -> None:
    waiting = gate(tmp_path, "site-1")
    job = running.hanse("job", "submit", str(JOB))["job_id"]
    with waiting.open("wb"):  # from here on site-1 is in the middle of its training
        running.kill("server")
        running.start("server")
    ended = running.hanse("job", "wait", job)
    assert (ended["state"], ended["reason"]) == ("completed", "")
    assert ended["result"] == undisturbed
    assert [each["round"] for each in ended["history"]] == list(range(5))


@pytest.mark.parametrize(
    "killed",
    [
        "the server",
        pytest.param(
            "both", marks=pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what is left behind")
        ),
    ],
)
def test_what_a_run_process_has_started_is_ended_when_their_server_is_killed(
    running: Deployment, tmp_path: Path, undisturbed: str, killed: str
) -> None:
    waiting = gate(tmp_path, "site-1")
    (tmp_path / "starts").touch()
    job = running.hanse("job", "submit", str(JOB))["job_id"]
    with waiting.open("wb"):
        process = running.job_process("server")
        (started,) = process.children()
        if killed == "both":
            running.process("server").suspend()  # it sees nothing of what happens to the other
            process.kill()
        running.kill("server")
        if killed == "both":
            assert started.is_running()
            running.start("server")
        assert psutil.wait_procs([process, started], timeout=STOPPED_WITHIN_S)[1] == []
        if killed == "the server":
            running.start("server")
    ended = running.hanse("job", "wait", job)
    assert (ended["state"], ended["reason"]) == ("completed", "")
    assert ended["result"] == undisturbed
    assert list((running.workspace("server") / "processes").iterdir()) == []


@pytest.mark.parametrize("by", ["its kit", "an administrator"])
def test_a_server_that_is_stopped_in_order_goes_on_where_it_was_when_it_is_started_again(
    running: Deployment, tmp_path: Path, undisturbed: str, by: str
) -> None:
    waiting = gate(tmp_path, "site-1")
    job = running.hanse("job", "submit", str(JOB))["job_id"]
    with waiting.open("wb"):  # from here on site-1 is in the middle of its training
        running.hanse("server", "stop", *([str(running.kit("server"))] if by == "its kit" else []))
        assert running.processes["server"].wait(STOPPED_WITHIN_S) == 0
        running.kill("server")  # what is left of it
        running.start("server")
    ended = running.hanse("job", "wait", job)
    assert (ended["state"], ended["reason"]) == ("completed", "")
    assert ended["result"] == undisturbed
    assert [each["round"] for each in ended["history"]] == list(range(5))
    for name in running.names:
        assert times_received(running, name, job) == [1] * 4, "nobody's work is done again"


def test_a_task_that_was_out_before_it_was_in_the_journal_is_done_once(
    running: Deployment, tmp_path: Path, undisturbed: str
) -> None:
    serve_by(running, "unjournalled")
    waiting = gate(tmp_path, "site-1")
    job = running.hanse("job", "submit", str(JOB))["job_id"]
    with waiting.open("wb"):
        waiting.unlink()
        running.kill("server")
        del running.programs["server"]
    running.start("server")
    ended = running.hanse("job", "wait", job)
    assert (ended["state"], ended["reason"]) == ("completed", "")
    assert ended["result"] == undisturbed
    for name in running.names:
        assert times_received(running, name, job) == [1] * 4
        assert "answer refused" not in job_log(running, name)


def test_a_killed_run_process_is_started_again_and_asks_nothing_twice(
    running: Deployment, tmp_path: Path, undisturbed: str
) -> None:
    waiting = gate(tmp_path, "site-2")
    job = running.hanse("job", "submit", str(JOB))["job_id"]
    with waiting.open("wb"):
        running.job_process("server").kill()
    ended = running.hanse("job", "wait", job)
    assert (ended["state"], ended["reason"]) == ("completed", "")
    assert ended["result"] == undisturbed


def test_a_run_process_that_hangs_is_killed_and_started_again(
    running: Deployment, tmp_path: Path, undisturbed: str
) -> None:
    serve_by(running, "impatient")
    waiting = gate(tmp_path, "site-2")
    job = running.hanse("job", "submit", str(JOB))["job_id"]
    with waiting.open("wb"):
        hanging = running.job_process("server")
        hanging.suspend()
    ended = running.hanse("job", "wait", job)
    assert (ended["state"], ended["reason"]) == ("completed", "")
    assert ended["result"] == undisturbed
    assert not hanging.is_running()


def test_a_killed_client_process_is_started_again_and_gets_its_task_again(
    running: Deployment, tmp_path: Path, undisturbed: str
) -> None:
    waiting = gate(tmp_path, "site-1")
    job = running.hanse("job", "submit", str(JOB))["job_id"]
    with waiting.open("wb"):
        waiting.unlink()
        running.job_process("site-1").kill()
    ended = running.hanse("job", "wait", job)
    assert (ended["state"], ended["reason"]) == ("completed", "")
    assert ended["result"] == undisturbed


def test_a_killed_agent_takes_its_job_up_again_when_it_is_started_again(
    running: Deployment, tmp_path: Path, undisturbed: str
) -> None:
    waiting = gate(tmp_path, "site-1")
    job = running.hanse("job", "submit", str(JOB))["job_id"]
    with waiting.open("wb"):
        waiting.unlink()
        running.kill("site-1")
    running.start("site-1")
    ended = running.hanse("job", "wait", job)
    assert (ended["state"], ended["reason"]) == ("completed", "")
    assert ended["result"] == undisturbed
