"""Every workflow that ships, and one of a user's own, has the same bytes when processes of its run are killed.

Each runs once without trouble: what happens then, in that order, are the steps at which its runs are disturbed, and
their model, rounds and journal must be those of that run. Where rounds depend on who is fast, gates of the tests' job
fix the order in which answers come.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet

from hanse.cell.loop import run
from hanse.learning.workflow import WORKFLOWS
from hanse.messages import JobView
from tests.faults.bench import RUN_WITHIN_S, Bench, Disturbance, Gate, Told, Undisturbed, bench, job_with

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

VICTIMS = ("server", "run", "agent", "client")


@dataclass(frozen=True)
class Case:
    """A workflow's table in a job, *files* that come with it, and *opened*: the committed round that opens a gate.

    A gate is a client and a round, as in ``Bench.held``; one that no round opens stays closed up to the job's end.
    """

    workflow: Mapping[str, object]
    files: Sequence[Path] = ()
    opened: Mapping[tuple[str, int], int | None] = field(default_factory=dict)


SLOW_FIRST_CLIENT: Mapping[tuple[str, int], int | None] = {("site-1", 1): 2, ("site-2", 3): 3, ("site-1", 4): None}
"""Rounds 1 and 2 are site-2's, round 3 is made of what site-1 was asked in round 1, round 4 of what site-2 was in 3."""

TRAINING = {"rounds": 3, "quorum": 2}
CASES = {
    "fedavg": Case({"name": "fedavg", **TRAINING, "evaluate_every": 2}),
    "fedavgm": Case({"name": "fedavgm", **TRAINING}),
    "fedadagrad": Case({"name": "fedadagrad", **TRAINING}),
    "fedadam": Case({"name": "fedadam", **TRAINING}),
    "fedyogi": Case({"name": "fedyogi", **TRAINING}),
    "fedprox": Case({"name": "fedprox", "rounds": 3, "fraction": 0.5, "proximal_mu": 0.1}),
    "fedbuff": Case({"name": "fedbuff", "rounds": 4, "buffer_size": 1, "max_staleness": 3}, opened=SLOW_FIRST_CLIENT),
    "cyclic": Case({"name": "cyclic", "rounds": 3, "min_clients": 2, "order": "random"}),
    "evaluation": Case({"name": "evaluation", "quorum": 2}),
    "late answers": Case(
        {"name": "fedavg", "rounds": 4, "fraction": 0.5, "over_selection": 1.0, "late": "discount", "max_staleness": 3},
        opened=SLOW_FIRST_CLIENT,
    ),
    "a user's own": Case(
        {"name": "wandering:Wandering", "rounds": 4}, files=[Path(__file__).with_name("wandering.py")]
    ),
}


@dataclass(frozen=True)
class Play:
    """A case's job, and what its runs without trouble come to."""

    job: Path
    opened: Mapping[tuple[str, int], int | None]
    undisturbed: Undisturbed


class Stage:
    """A bench on which every case's job runs; once without trouble, before it is disturbed for the first time."""

    def __init__(self, made: Bench, folder: Path) -> None:
        self.bench = made
        self._folder = folder
        self._plays: dict[str, Play] = {}

    def play(self, name: str) -> Play:
        if name not in self._plays:
            case, folder = CASES[name], self._folder / name.replace(" ", "-")
            job, told = job_with(folder, case.workflow, *case.files), Told()
            view = self._run(job, case.opened, told=told)
            self._plays[name] = Play(job, case.opened, self.bench.undisturbed_run(told, view))
        return self._plays[name]

    def kill(self, name: str, index: int, victim: str) -> int:
        """Kill *victim* at that step of a run, check how the run ended, and return how many were killed."""
        play, killed = self.play(name), list[int]()

        def kill() -> None:
            killed.append(len(self.bench.victims(victim)))
            self.bench.kill(victim)

        steps = play.undisturbed.steps
        view = self._run(play.job, play.opened, disturbances=[Disturbance(index, kill)], steps=steps)
        self.bench.check_as(view, play.undisturbed)
        return sum(killed)

    def _run(self, job: Path, opened: Mapping[tuple[str, int], int | None], **how: object) -> JobView:
        with ExitStack() as stack:
            gates = {gate: self.bench.held(*gate) for gate in opened}
            for gate in gates.values():
                stack.callback(gate.close)
            return run(self.bench.run(job=job, committed=lambda done: _open(gates, opened, done), **how), RUN_WITHIN_S)


def _open(gates: Mapping[tuple[str, int], Gate], opened: Mapping[tuple[str, int], int | None], committed: int) -> None:
    for gate, opener in opened.items():
        if opener is not None and committed >= opener:
            gates[gate].close()


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """A server and two clients."""
    with bench(tmp_path_factory.mktemp("gates")) as made:
        yield Stage(made, tmp_path_factory.mktemp("jobs"))


def test_every_workflow_that_ships_is_among_them() -> None:
    assert {str(case.workflow["name"]) for case in CASES.values()} >= set(WORKFLOWS)


def _samples() -> Iterator[ParameterSet]:
    """Each workflow once, with the victims in turn, and from its run's first steps to its last."""
    for place, (name, victim) in enumerate(zip(CASES, itertools.cycle(VICTIMS), strict=False)):
        yield pytest.param(name, victim, (place + 1) / (len(CASES) + 1), id=_id(name, victim))


def _id(name: str, victim: str) -> str:
    return f"{name}-{victim}".replace(" ", "-")


@pytest.mark.parametrize(("name", "victim", "part"), list(_samples()))
def test_killed_once_a_workflow_completes_with_the_same_bytes(
    stage: Stage, note: Callable[..., None], name: str, victim: str, part: float
) -> None:
    steps = stage.play(name).undisturbed.steps
    index = int(part * len(steps))
    began = time.perf_counter()
    assert stage.kill(name, index, victim) == 1
    took = f"ok {time.perf_counter() - began:.1f} s"
    note("every workflow, one process killed", name, str(steps[index]), victim, took)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("name", "victim"),
    [pytest.param(name, victim, id=_id(name, victim)) for name, victim in itertools.product(CASES, VICTIMS)],
)
def test_killed_at_any_step_a_workflow_completes_with_the_same_bytes(
    stage: Stage, mark: Callable[[str, str, str, str], None], name: str, victim: str
) -> None:
    failed: dict[str, AssertionError] = {}
    for index, step in enumerate(stage.play(name).undisturbed.steps):
        began, outcome = time.perf_counter(), "ok"
        try:
            if not stage.kill(name, index, victim):
                outcome = "ok, none there"
        except AssertionError as error:  # the table is to have all steps
            failed[str(step)], outcome = error, "FAILED"
        mark(f"{name}, one process killed", str(step), victim, f"{outcome} {time.perf_counter() - began:.1f} s")
    assert not failed, "\n\n".join(f"{victim} killed at {step}: {error}" for step, error in failed.items())
