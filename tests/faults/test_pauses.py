"""Stop each process for a while (SIGSTOP), short of and beyond what makes it count as lost: the bytes are the same.

A process that is stopped keeps its connections and says nothing: its machine sleeps, swaps, or is being moved. For how
long is the fault itself; what is waited for beyond that is what somebody says: a log, or the job's own events.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from hanse.cell.loop import run
from hanse.cell.rpc import KEEPALIVE_S
from hanse.messages import JobEvent
from tests.faults.bench import RUN_WITHIN_S, Bench, Disturbance, bench, job_like
from tests.faults.changes import wait_line
from tests.faults.steps import STEPS, Step

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

LOST_AFTER_S = 2.0
SHORT_S = 1.0
BEYOND_S = 2 * LOST_AFTER_S
LOST_WITHIN_S = 180.0
"""A silent connection is given up by the server after a minute and a few seconds, and its client is lost then."""
VICTIMS = ("server", "run", "agent", "client")
AT = tuple(STEPS.index(step) for step in (Step("job_started"), Step("task_sent", 1, 1), Step("result_accepted", 2, 1)))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A server and two clients, whose patience is short."""
    settings = f"settings = {{ heartbeat_s = 1, lost_after_s = {LOST_AFTER_S} }}"
    with bench(tmp_path_factory.mktemp("gates"), settings=settings) as made:
        yield made


@pytest.mark.parametrize(
    ("step", "pause_s"),
    [
        pytest.param(
            step,
            pause_s,
            id=f"{STEPS[step]}-{name}".replace(" ", "-"),
            marks=() if pause_s == BEYOND_S or step == AT[1] else (pytest.mark.long,),
        )
        for step in AT
        for pause_s, name in ((SHORT_S, "short"), (BEYOND_S, "beyond-lost"))
    ],
)
@pytest.mark.parametrize("victim", VICTIMS)
def test_stopped_for_a_while_the_run_completes_with_the_same_bytes(
    made: Bench, mark: Callable[[str, str, str, str], None], victim: str, step: int, pause_s: float
) -> None:
    def pause() -> None:
        with made.paused(victim):
            time.sleep(pause_s)  # the fault itself

    began = time.perf_counter()
    outcome = "FAILED"
    try:
        made.check(run(made.run([Disturbance(step, pause)]), RUN_WITHIN_S))
        outcome = "ok"
    finally:
        took_s = time.perf_counter() - began
        mark("one process stopped", f"{STEPS[step]}, {pause_s:g} s", victim, f"{outcome} {took_s:.1f} s")


def test_server_stopped_until_its_clients_have_given_up_their_connections(made: Bench) -> None:
    log = made.running.log("site-1")

    def pause() -> None:
        said = log.stat().st_size
        with made.paused("server"):
            wait_line(log, "the connection to the server ended", after=said, within_s=4 * KEEPALIVE_S)

    made.check(run(made.run([Disturbance(AT[1], pause)]), RUN_WITHIN_S))


@pytest.mark.long
def test_client_stopped_until_it_is_lost_delivers_when_it_goes_on(made: Bench, tmp_path: Path) -> None:
    stopped: list[psutil.Process] = []

    def stop() -> None:
        stopped.extend(made.victims("client"))
        for process in stopped:
            process.suspend()

    def go_on_when_lost(event: JobEvent) -> None:
        if event.kind == "client_lost":
            for process in stopped:
                process.resume()

    patient = job_like(tmp_path, retries=3)
    with closing(made.held("site-1", 2)) as gate:
        disturbances = [Disturbance(AT[2], stop), Disturbance(AT[2], gate.close)]
        view = run(made.run(disturbances, job=patient, hear=go_on_when_lost, within_s=LOST_WITHIN_S), 2 * LOST_WITHIN_S)
    made.check(view)
