"""Kill the server, or a run's process, right before and right after each write of a run's journal.

What is told of a run comes a moment after it was written, and while that is told the run goes on. So here the server
itself does it, at the write: before it nothing of it is in the store, after it all is, and nobody has been told. The
run completes with the bytes of an undisturbed one.
"""

import itertools
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from _pytest.mark import ParameterSet

from hanse.cell.loop import run
from tests.faults.at_writes import MET, VARIABLE, WRITES
from tests.faults.bench import RUN_WITHIN_S, Bench, bench
from tests.faults.steps import CLIENTS, ROUNDS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

TIMES = {
    "replace_job": 2,  # to scheduled, to running
    "issue_tasks": ROUNDS,
    "accept_answer": ROUNDS * CLIENTS,
    "commit_round": ROUNDS + 1,
    "end_run": 1,
}
"""How often a run of the tests' job makes each write."""
SAMPLES = {
    ("replace_job", "before", "server"),
    ("issue_tasks", "after", "server"),
    ("accept_answer", "after", "server"),
    ("accept_answer", "before", "run"),
    ("commit_round", "after", "server"),
    ("commit_round", "after", "run"),
    ("end_run", "after", "server"),
}
OF_A_PROCESS = ("issue_tasks", "accept_answer", "commit_round", "end_run")
"""The writes during which a run has a process."""
MOMENTS = ("before", "after")


def test_every_write_is_among_them() -> None:
    assert tuple(TIMES) == WRITES


def _cases() -> Iterator[ParameterSet]:
    """Every write with every victim, before and after; without the long ones, some of each kind."""
    for write, times in TIMES.items():
        for nth, moment, victim in itertools.product(range(1, times + 1), MOMENTS, ("server", "run")):
            if victim == "run" and write not in OF_A_PROCESS:
                continue
            is_sample = nth == (times + 1) // 2 and (write, moment, victim) in SAMPLES
            marks = () if is_sample else (pytest.mark.long,)
            yield pytest.param(write, nth, moment, victim, marks=marks, id=f"{moment}-{write}-{nth}-{victim}")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A server and two clients."""
    with bench(tmp_path_factory.mktemp("gates")) as made:
        yield made


@pytest.mark.parametrize(("write", "nth", "moment", "victim"), list(_cases()))
def test_killed_at_a_write_the_run_completes_with_the_same_bytes(
    made: Bench, mark: Callable[[str, str, str, str], None], write: str, nth: int, moment: str, victim: str
) -> None:
    said = made.running.log("server").stat().st_size
    began, outcome = time.perf_counter(), "FAILED"
    server = serve_with_fault(made, f"{write} {nth} {moment} kill-{victim}")
    try:
        with ThreadPoolExecutor(1) as beside:
            back = beside.submit(started_again, made, server) if victim == "server" else None
            view = run(made.run(), RUN_WITHIN_S)
            if back is not None:
                assert back.result() == -9, "the server was not killed"
        with made.running.log("server").open("rb") as log:
            log.seek(said)
            assert log.read().count(MET.encode()) == 1, "it was not killed there, or more than once"
        made.check(view)
        made.check_worked_once(view.job_id)
        outcome = "ok"
    finally:
        mark(f"killed {moment} a write", f"{write} {nth}", victim, f"{outcome} {time.perf_counter() - began:.1f} s")


def serve_with_fault(made: Bench, fault: str) -> "subprocess.Popen[str]":
    """Have the server be one that meets with *fault*, until it is started again, and return its process."""
    made.running.end("server")
    made.running.programs["server"] = [sys.executable, "-m", "tests.faults.at_writes"]
    made.running.environments["server"] = {VARIABLE: fault}
    try:
        made.running.start("server")
    finally:
        del made.running.programs["server"], made.running.environments["server"]
    return made.running.processes["server"]


def started_again(made: Bench, server: "subprocess.Popen[str]") -> int:
    """Start the server again when it has ended, as whatever supervises it would, and return its exit status."""
    status = server.wait(RUN_WITHIN_S)
    made.running.kill("server")  # what is left of it
    made.running.start("server")
    return status
