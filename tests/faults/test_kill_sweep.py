"""Kill each process at each step of a run: it completes every time, with the bytes of an undisturbed run.

The steps are the run's own: what the server tells whoever watches the job. When the step that is to be disturbed is
told,
the process is killed (-9); a server or an agent is started again, as whatever supervises it would, and a job's
process is
the product's own to start again. One deployment lasts through a whole sweep, so that each run also shows that the one
before left nothing behind.
"""

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from benchmarks.deployment import Deployment, deployment

from hanse.admin.session import AdminSession
from hanse.cell.loop import run
from hanse.identity.kits import Kit
from hanse.messages import JobEvent, JobView
from hanse.settings import AdminSettings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

JOB = Path(__file__).parents[1] / "e2e" / "job"
VICTIMS = ("server", "run", "agent", "client")
ROUNDS = 6
STEPS_A_ROUND = ("round_started", "task_sent", "task_sent", "result_accepted", "result_accepted", "round_done")
STEPS = ("job_deployed", "job_started", *STEPS_A_ROUND * 2, "round_started")
"""The first steps of a run, in the order in which they are told: two rounds, and the beginning of the third."""


@pytest.fixture(scope="module")
def running() -> Iterator[Deployment]:
    """A server and two clients."""
    with deployment() as up:
        up.start("server", *up.names)
        yield up


@pytest.fixture(scope="module")
def undisturbed(running: Deployment) -> str:
    """Return the digest of the model that a run without trouble ends with."""
    return str(running.run(JOB)["result"])


@pytest.mark.parametrize("victim", VICTIMS)
@pytest.mark.parametrize("step", range(len(STEPS)), ids=[f"{n}-{step}" for n, step in enumerate(STEPS)])
def test_killed_at_a_step_the_run_completes_with_the_same_bytes(
    running: Deployment, undisturbed: str, step: int, victim: str
) -> None:
    view = run(_run_and_kill(running, step, victim), 120)
    assert (view.state, view.reason) == ("completed", "")
    assert view.result == undisturbed
    assert [each.round for each in view.history] == list(range(ROUNDS + 1)), "no round is missing, none counted twice"
    assert all(each.answered == ("site-1", "site-2") for each in view.history[1:])
    assert not _strays(running), "no process is left of the run"


async def _run_and_kill(running: Deployment, step: int, victim: str) -> JobView:
    kit = Kit.load(running.root / "kits" / "admin@bench", AdminSettings)
    async with AdminSession(kit, patience_s=60) as session:
        submitted = await session.submit(JOB)
        seen = 0
        async for happened in session.follow(submitted.job_id):
            if not isinstance(happened, JobEvent):
                continue
            if seen == step:
                _kill(running, victim)
            seen += 1
        return await session.wait(submitted.job_id)


def _kill(running: Deployment, victim: str) -> None:
    match victim:
        case "server":
            running.kill("server")
            running.start("server")
        case "agent":
            running.kill("site-1")
            running.start("site-1")
        case "run":
            _kill_children(running.process("server"))
        case "client":
            _kill_children(running.process("site-1"))


def _kill_children(parent: psutil.Process) -> None:
    for child in parent.children():
        child.kill()


def _strays(running: Deployment) -> list[psutil.Process]:
    parents = [running.process(name) for name in ("server", *running.names)]
    children = [child for parent in parents for child in parent.children()]
    _, alive = psutil.wait_procs(children, timeout=20)
    return alive
