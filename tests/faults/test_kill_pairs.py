"""Kill two processes, of any kind and at any two steps of a run, or at once: it completes with the same bytes.

The pairs follow from a seed, which is printed; each of them also by itself, so that one that failed can be run alone:
``HANSE_FAULTS_SEED=<seed> pytest -m slow tests/faults/test_kill_pairs.py -k pair-17``.
"""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass

import pytest

from hanse.cell.loop import run
from tests.faults.bench import RUN_WITHIN_S, Bench, Disturbance, bench
from tests.faults.conftest import SEED
from tests.faults.steps import CLIENTS, ROUNDS, STEPS, round_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

PAIRS = 200
SAMPLE = 12
VICTIMS = ("server", "run", "agent", "client")
SITES = tuple(f"site-{number}" for number in range(1, CLIENTS + 1))


@dataclass(frozen=True)
class Kill:
    """Whom to kill, and after which step of ``STEPS``; *site* is where an agent or a client is."""

    step: int
    victim: str
    site: str

    def __str__(self) -> str:
        where = f" of {self.site}" if self.victim in ("agent", "client") else ""
        return f"{self.victim}{where} at {STEPS[self.step]}"


def pair(number: int) -> tuple[Kill, Kill]:
    """Return the pair of that *number* of this session's seed, in the order of their steps: every fourth at once."""
    rng = random.Random(f"{SEED}/{number}")
    first, second = sorted(rng.randrange(len(STEPS)) for _ in range(2))
    if number % 4 == 0:
        second = first
    one, other = (Kill(step, rng.choice(VICTIMS), rng.choice(SITES)) for step in (first, second))
    return one, other


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A server and two clients."""
    with bench(tmp_path_factory.mktemp("gates")) as made:
        yield made


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(number, id=f"pair-{number}", marks=() if number < SAMPLE else (pytest.mark.long,))
        for number in range(PAIRS)
    ],
)
def test_two_killed_the_run_completes_with_the_same_bytes(made: Bench, note: Callable[..., None], number: int) -> None:
    first, second = pair(number)
    began = time.perf_counter()
    outcome = "FAILED"
    try:
        with ExitStack() as stack:
            view = run(made.run(_disturbances(made, first, second, stack)), RUN_WITHIN_S)
        made.check(view)
        outcome = "ok"
    finally:
        took_s = time.perf_counter() - began
        note("two processes killed", f"pair-{number}", str(first), str(second), f"{outcome} {took_s:.1f} s")


def _disturbances(made: Bench, first: Kill, second: Kill, stack: ExitStack) -> list[Disturbance]:
    if first.step == second.step:
        both = ((first.victim, first.site), (second.victim, second.site))
        return [Disturbance(first.step, lambda: made.kill_at_once(both))]
    kill_first = Disturbance(first.step, lambda: made.kill(first.victim, first.site))
    kill_second = Disturbance(second.step, lambda: made.kill(second.victim, second.site))
    held_round = max(round_of(second.step), round_of(first.step) + 1)
    if held_round > ROUNDS:
        return [kill_first, kill_second]
    # While the server is away nobody is told how far the run is: it is held up where the second is to be killed, or in
    # the next round, until somebody is told again.
    gate = stack.enter_context(closing(made.held(SITES[0], held_round)))
    return [kill_first, Disturbance(first.step, gate.close, once_back=first.victim == "server"), kill_second]
