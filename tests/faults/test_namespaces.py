"""Lines on which packets vanish without a word: the run completes with the same bytes.

Each client is on a machine of its own, a network namespace, and at work on a task when its line fails. It delivers into
nothing, and again when its line is back.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest

from hanse.cell.loop import run
from hanse.cell.rpc import KEEPALIVE_S
from tests.faults.bench import RUN_WITHIN_S, Bench, Disturbance, provisioned
from tests.faults.namespaces import Machine, machines
from tests.faults.steps import STEPS, Step

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

AFTER_ONE_ANSWER = STEPS.index(Step("result_accepted", 2, 1))
SHORT_S = 3.0
"""As long as nobody notices: what was sent is sent again by the system."""
LONG_S = 2 * KEEPALIVE_S + 2.0
"""As long as it takes until both ends have given their connection up."""


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Bench, Machine, str]]:
    """A server, two clients on machines of their own, that of site-1, and the server's address."""
    with (
        machines(["site-1", "site-2"]) as (address, each),
        provisioned(tmp_path_factory.mktemp("gates"), hosts=(address,), listen="0.0.0.0") as made,
    ):
        made.running.prefixes.update({name: machine.prefix for name, machine in each.items()})
        made.begin()
        yield made, each["site-1"], address
        made.running.stop()


def failing(machine: Machine, address: str) -> dict[str, Callable[[Callable[[], None]], None]]:
    """Return what can happen to *machine*'s line, each with what the client does meanwhile for an argument."""

    def cut(meanwhile: Callable[[], None], for_s: float) -> None:
        machine.cut()
        meanwhile()
        time.sleep(for_s)  # the fault itself
        machine.mend()

    def no_way(meanwhile: Callable[[], None]) -> None:
        machine.lose_the_way(address)
        meanwhile()
        time.sleep(LONG_S)  # the fault itself
        machine.find_the_way(address)

    def moved(meanwhile: Callable[[], None]) -> None:
        machine.move(3)
        meanwhile()

    return {
        "cut-for-a-moment": lambda meanwhile: cut(meanwhile, SHORT_S),
        "cut-until-given-up": lambda meanwhile: cut(meanwhile, LONG_S),
        "no-route": no_way,
        "another-address": moved,
    }


@pytest.mark.parametrize("fault", ["cut-for-a-moment", "cut-until-given-up", "no-route", "another-address"])
def test_a_line_fails_and_the_run_completes_with_the_same_bytes(
    apart: tuple[Bench, Machine, str], mark: Callable[[str, str, str, str], None], fault: str
) -> None:
    made, machine, address = apart
    began, outcome = time.perf_counter(), "FAILED"
    with closing(made.held("site-1", 2)) as gate:
        disturb = failing(machine, address)[fault]
        try:
            view = run(made.run([Disturbance(AFTER_ONE_ANSWER, lambda: disturb(gate.close))]), RUN_WITHIN_S)
            made.check(view)
            outcome = "ok"
        finally:
            mark("a line fails", "site-1", fault, f"{outcome} {time.perf_counter() - began:.1f} s")


def test_a_line_that_delays_and_loses_packets(apart: tuple[Bench, Machine, str]) -> None:
    made, machine, _ = apart
    machine.spoil("delay", "50ms", "10ms", "loss", "5%")

    made.check(run(made.run(), RUN_WITHIN_S))
