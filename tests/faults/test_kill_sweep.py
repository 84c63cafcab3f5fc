"""Kill each process at each step of a run: it completes every time, with the bytes of an undisturbed run.

The steps are the run's own: what the server tells whoever watches the job. When the step that is to be disturbed is
told, the process is killed (-9); a server or an agent is started again, as whatever supervises it would, and a job's
process is the product's own to start again. Until then the run is held up in the round after. One deployment lasts
through a whole sweep, so that each run also shows that the one before left nothing behind.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from _pytest.mark import ParameterSet

from hanse.cell.loop import run
from tests.faults.bench import RUN_WITHIN_S, Bench, Disturbance, bench
from tests.faults.steps import CLIENTS, ROUNDS, STEPS, Step, round_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

VICTIMS = ("server", "run", "agent", "client")
ALL_WORK = range(STEPS.index(Step("result_accepted", 1, CLIENTS)), STEPS.index(Step("round_started", ROUNDS)))
"""The steps at which each victim is there for certain: all clients have answered, and there is a round to come."""


def _cases() -> Iterator[ParameterSet]:
    """Every step with every victim; without the long ones, every step once, with the victims in turn."""
    for index, step in enumerate(STEPS):
        for place, victim in enumerate(VICTIMS):
            is_sample = place == (index + index // len(VICTIMS)) % len(VICTIMS)
            marks = () if is_sample else (pytest.mark.long,)
            yield pytest.param(index, victim, marks=marks, id=f"{str(step).replace(' ', '-')}-{victim}")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A server and two clients."""
    with bench(tmp_path_factory.mktemp("gates")) as made:
        yield made


@pytest.mark.parametrize(("step", "victim"), list(_cases()))
def test_killed_at_a_step_the_run_completes_with_the_same_bytes(
    made: Bench, mark: Callable[[str, str, str, str], None], step: int, victim: str
) -> None:
    killed: list[int] = []

    def kill() -> None:
        killed.append(len(made.victims(victim)))
        made.kill(victim)

    began = time.perf_counter()
    outcome = "FAILED"
    try:
        with ExitStack() as stack:
            disturbances = [Disturbance(step, kill)]
            if (held_round := round_of(step) + 1) <= ROUNDS:
                gate = made.held("site-1", held_round)
                stack.callback(gate.close)
                disturbances.append(Disturbance(step, gate.close))
            view = run(made.run(disturbances), RUN_WITHIN_S)
        assert killed == [1] or (step not in ALL_WORK and killed == [0]), f"{killed} were killed"
        made.check(view)
        if victim in ("server", "run"):
            made.check_worked_once(view.job_id)
        outcome = "ok" if killed == [1] else "ok, none there"
    finally:
        mark("one process killed", str(STEPS[step]), victim, f"{outcome} {time.perf_counter() - began:.1f} s")
