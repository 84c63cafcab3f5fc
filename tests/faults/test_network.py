"""A network that breaks in all the ways that lines break: the run completes with the same bytes.

Everything that clients say goes through a proxy of the tests' own, which delays, throttles, resets, half-opens, splits
and half-closes real connections. The administrator who watches has a line of their own.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator

import pytest
from _pytest.mark import ParameterSet

from hanse.cell.loop import run
from tests.e2e.loop import on_the_loop
from tests.faults.bench import RUN_WITHIN_S, Bench, Disturbance, provisioned
from tests.faults.proxy import FAIR, SPLIT, FaultyNetwork, Weather
from tests.faults.steps import STEPS, Step

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

OUTAGE_S = 2.0
"""How long a split or a refusing network lasts: shorter than it takes for a client to count as lost."""


async def outage(network: FaultyNetwork, weather: Weather) -> None:
    """Have the network be like *weather* for a while."""
    await network.become(weather)
    if not weather.accepts:
        await network.reset()
    await asyncio.sleep(OUTAGE_S)  # the fault itself is a time
    await network.become(FAIR)


FAULTS: dict[str, Callable[[FaultyNetwork], Awaitable[None]]] = {
    "reset": lambda network: network.reset(),
    "half-open": lambda network: network.forget(),
    "half-closed": lambda network: network.half_close(),
    "split": lambda network: outage(network, SPLIT),
    "clients cut off": lambda network: outage(network, Weather(up=False)),
    "server cut off": lambda network: outage(network, Weather(down=False)),
    "refusing": lambda network: outage(network, Weather(accepts=False)),
    "slow": lambda network: network.become(Weather(delay_s=0.05, bytes_per_s=500_000)),
}

SAMPLE = tuple(
    STEPS.index(step) for step in (Step("job_started"), Step("task_sent", 1, 1), Step("result_accepted", 2, 1))
)


def _cases() -> Iterator[ParameterSet]:
    """Every fault at every step; without the long ones, at one step each, in turn."""
    for place, fault in enumerate(FAULTS):
        for index, step in enumerate(STEPS[:-1]):
            is_sample = index == SAMPLE[place % len(SAMPLE)]
            marks = () if is_sample else (pytest.mark.long,)
            yield pytest.param(fault, index, marks=marks, id=f"{fault}-{step}".replace(" ", "-"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Bench, FaultyNetwork]]:
    """A server and two clients behind a faulty network."""
    with provisioned(tmp_path_factory.mktemp("gates")) as made:
        network = FaultyNetwork(made.running.port)
        with on_the_loop(network.serving()) as port:
            for name in made.running.names:
                made.running.configure(name, servers=[f"localhost:{port}"])
            made.begin()
            yield made, network


@pytest.mark.parametrize(("fault", "step"), list(_cases()))
def test_the_network_fails_and_the_run_completes_with_the_same_bytes(
    made: tuple[Bench, FaultyNetwork], mark: Callable[[str, str, str, str], None], fault: str, step: int
) -> None:
    behind, network = made
    began = time.perf_counter()
    outcome = "FAILED"
    try:
        view = run(behind.run([Disturbance(step, lambda: run(FAULTS[fault](network), RUN_WITHIN_S))]), RUN_WITHIN_S)
        run(network.become(FAIR))
        behind.check(view)
        outcome = "ok"
    finally:
        run(network.become(FAIR))
        mark("the network fails", str(STEPS[step]), fault, f"{outcome} {time.perf_counter() - began:.1f} s")
