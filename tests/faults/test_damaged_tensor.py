"""A disk that gives back other bytes than it was given: it is noticed, and what was damaged is never used.

A byte of a tensor file is flipped where it lies, in the middle of a round. What can be had again is asked for again,
and the run ends with the bytes of an undisturbed one; what cannot ends it, with a sentence that names the file.
"""

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from hanse.cell.loop import run
from hanse.ids import is_digest
from hanse.messages import JobView
from tests.faults.bench import RUN_WITHIN_S, Bench, Disturbance, Told, bench
from tests.faults.steps import STEPS, Step

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

AFTER_ONE_ANSWER = STEPS.index(Step("result_accepted", 2, 1))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A server and two clients."""
    with bench(tmp_path_factory.mktemp("gates")) as made:
        yield made


def tensors_at_server(made: Bench, job_id: str) -> list[Path]:
    """Return the run's tensor files, the oldest first: that of the model, then those of answers."""
    (folder,) = (made.running.workspace("server") / "runs" / job_id).glob("tensors-*")
    return sorted((path for path in folder.iterdir() if is_digest(path.name)), key=lambda path: path.stat().st_mtime_ns)


def damage(path: Path) -> None:
    """Flip a bit in the middle of the file at *path*, as a disk would: in place."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        (byte,) = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))


def disturbed(made: Bench, step: int, hurt: Callable[[str], None], told: Told) -> JobView:
    """Run the job, hold site-1 up in round 2, call *hurt* with the job's id after *step*, and let it on."""
    with closing(made.held("site-1", 2)) as gate:
        disturbances = [Disturbance(step, lambda: hurt(told.job_id)), Disturbance(step, gate.close)]
        return run(made.run(disturbances, told=told), RUN_WITHIN_S)


def test_damaged_answer_is_asked_for_again(made: Bench) -> None:
    told = Told()
    view = disturbed(made, AFTER_ONE_ANSWER, lambda job_id: damage(tensors_at_server(made, job_id)[-1]), told)
    made.check(view, may_be_answered_again=True)
    answers = [event.client for event in told.events if event.kind == "result_accepted" and event.round == 2]
    assert sorted(answers) == ["site-1", "site-2", "site-2"], "the damaged one was given again, and no other"


def test_damaged_answer_is_asked_for_again_by_a_server_that_is_started_again(made: Bench) -> None:
    def hurt(job_id: str) -> None:
        made.running.kill("server")
        damage(tensors_at_server(made, job_id)[-1])
        made.running.start("server")

    view = disturbed(made, AFTER_ONE_ANSWER, hurt, Told())
    made.check(view, may_be_answered_again=True)


@pytest.mark.parametrize("is_restarted", [False, True], ids=["noticed-at-the-commit", "noticed-at-the-next-start"])
def test_damaged_model_ends_the_run_with_a_sentence(made: Bench, is_restarted: bool) -> None:
    def hurt(job_id: str) -> None:
        if is_restarted:
            made.running.kill("server")
        damage(tensors_at_server(made, job_id)[0])
        if is_restarted:
            made.running.start("server")

    view = disturbed(made, AFTER_ONE_ANSWER, hurt, Told())
    assert (view.state, view.code) == ("failed", "tensors-lost")
    assert view.reason.startswith("tensor ")
    assert f"of round 1 of job {view.job_id} is missing or damaged on the server's disk" in view.reason
    assert view.advice
    made.check_processes()
    made.check_files(view.job_id)


def test_model_that_was_damaged_before_a_client_fetched_it_is_the_servers_fault(made: Bench) -> None:
    """The client that is held up in round 2 dies, and its next process fetches the model of round 1 anew."""
    told = Told()

    def hurt(job_id: str) -> None:
        damage(tensors_at_server(made, job_id)[0])
        made.kill("client", "site-1")

    view = disturbed(made, AFTER_ONE_ANSWER, hurt, told)
    assert (view.state, view.code) == ("failed", "tensors-lost")
    assert f"of round 1 of job {view.job_id}" in view.reason


def test_damaged_model_at_a_client_is_fetched_again(made: Bench) -> None:
    """Damaged while its training waits, the file is what the process that takes over the task finds."""

    def hurt(job_id: str) -> None:
        folder = made.running.workspace("site-1") / "jobs" / job_id / "tensors"
        for path in folder.iterdir():
            damage(path)
        made.kill("client", "site-1")

    made.check(disturbed(made, AFTER_ONE_ANSWER, hurt, Told()))
