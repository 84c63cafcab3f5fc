"""A run's process that is killed anywhere goes on, in another, to the same bytes, also where tasks outlive their round.

The server's side is a ``Run`` without a server: it journals, and accepts answers by a rule that depends on nothing but
the journal. So an undisturbed run and one that is killed accept the same answers in the same order.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from blake3 import blake3

from hanse.coordination.runs import Accepted, Run
from hanse.ids import ClientName, JobId
from hanse.job import JobSpec, WorkflowSpec
from hanse.learning.fedavg import FedAvg
from hanse.learning.fedbuff import FedBuff
from hanse.learning.workflow import State
from hanse.messages import IssueTasks, RunSnapshot, StateRef, TaskAssignment, TaskFault, TaskKey, TaskResult, UpdateRef
from hanse.model import Model
from hanse.run.federation import RunFederation
from hanse.run.runner import drive
from hanse.run.server_link import RunListener
from hanse.storage.models import load_model, store_model
from hanse.storage.tensors import TensorFiles

SPEC = JobSpec("tiny", WorkflowSpec("fedbuff"), client="app:app", model="model:initial")
JOB = JobId("tiny-1")
CLIENTS = tuple(ClientName(f"site-{number}") for number in range(1, 6))
FIRST = Model({"w": np.zeros(5, np.float32), "large": np.zeros(10_000, np.float32)})


class Killed(BaseException):
    """The run's process is gone."""


class Ledger:
    """A server in small, and its clients: one process after the other asks it, each killed after *lives* steps.

    Whenever a process waits, clients answer until ``enough`` updates are there that no commit has settled; which of
    them answer first, follows from the tasks' keys. ``counted`` are the answers that commits have settled.
    """

    def __init__(self, files: TensorFiles, *, enough: int, lives: Sequence[int] = ()) -> None:
        self.files, self.enough = files, enough
        self.run = Run(JOB, CLIENTS)
        self.state: StateRef | None = None
        self.accepted: list[TaskKey] = []
        self.asked: list[TaskKey] = []
        self.counted: list[TaskKey] = []
        self.carried_answers = self.carried_tasks = 0
        self.steps = 0
        self._lives = list(lives)
        self._left = self._lives.pop(0) if self._lives else math.inf
        self._is_dead = False
        self._listener: RunListener | None = None

    def _step(self) -> None:
        """Be killed here, if it is time."""
        self.steps += 1
        self._left -= 1
        if self._left <= 0:
            self._is_dead = True
            raise Killed

    def begin(self) -> tuple[RunSnapshot, RunFederation]:
        """Start the next process."""
        if self._is_dead:
            self._left = self._lives.pop(0) if self._lives else math.inf
            self._is_dead = False
        snapshot = RunSnapshot(JOB, SPEC, CLIENTS, self.state, carried=self.run.carried)
        made = RunFederation(
            self,  # type: ignore[arg-type]
            self.files,
            clients=CLIENTS,
            seed=3,
            carried=snapshot.carried,
        )
        self._listener = made
        for answer in self.run.answers:
            made.answered(answer)
        return snapshot, made

    async def issue(self, issue: IssueTasks) -> None:
        self._step()
        tasks = [TaskAssignment(key, issue.model, issue.config, issue.expects_model) for key in issue.keys]
        self.asked += [task.key for task in self.run.issue(tasks)]
        self._step()
        while sum(answer.update is not None for answer in self.run.answers) < self.enough and self.run.tasks:
            self._work(min(self.run.tasks, key=lambda task: _drawn(task.key)))

    def _work(self, task: TaskAssignment) -> None:
        """Have a client answer: a few fail, the others add a number that is this task's own."""
        assert task.model is not None
        model = load_model(task.model, self.files)
        if _drawn(task.key, "fault") % 7 == 0:
            result = TaskResult(task.key, fault=TaskFault("training-failed", "ValueError: no"))
        else:
            change = np.float32(_drawn(task.key, "change") % 1000 / 7)
            trained = store_model(Model({name: array + change for name, array in model.items()}), self.files)
            result = TaskResult(task.key, UpdateRef(trained, 1))
        assert self.run.accept(result, sender=task.key.client) == Accepted()
        self.accepted.append(task.key)
        self._step()
        assert self._listener is not None
        self._listener.answered(result)
        self._step()

    async def cancel(self, keys: Sequence[TaskKey]) -> None:
        if not self._is_dead:
            self._step()
            self.run.cancel(keys)

    async def commit(
        self, state: StateRef, *, took_s: float, answered: Sequence[ClientName], carried: Sequence[TaskKey] = ()
    ) -> None:
        self._step()
        before = {answer.key for answer in self.run.answers}
        self.carried_answers += len(before & set(carried))
        self.carried_tasks += len(set(carried) - before)
        self.run.committed(state.round, carried=carried)
        self.counted += sorted(before - set(carried), key=str)
        self.state = state
        self._step()


def _drawn(key: TaskKey, purpose: str = "") -> int:
    return int.from_bytes(blake3(f"{key}{purpose}".encode()).digest()[:8], "little")


async def lived(ledger: Ledger, workflow: Any) -> State:
    """Drive *workflow* to its end, through as many processes as it takes."""
    while True:
        snapshot, federation = ledger.begin()
        try:
            return await drive(
                workflow,
                spec=SPEC,
                snapshot=snapshot,
                initial=lambda: FIRST,
                link=ledger,  # type: ignore[arg-type]
                files=ledger.files,
                federation=federation,
            )
        except Killed:
            continue


# with one answer more than a step takes, there is always one that was accepted and not counted yet
BUFFERED = FedBuff(rounds=8, buffer_size=2, max_staleness=3)
DRAWN = FedBuff(rounds=8, buffer_size=2, concurrency=4, max_staleness=2, retries=1)
LATE = FedAvg(rounds=6, fraction=0.4, over_selection=1.0, late="discount", max_staleness=2, substitutes=1)
WORKFLOWS = {"buffered": BUFFERED, "drawn": DRAWN, "late": LATE}


@pytest.mark.parametrize("name", WORKFLOWS)
async def test_killed_at_any_step_a_run_ends_with_the_same_bytes(files: TensorFiles, name: str) -> None:
    workflow = WORKFLOWS[name]
    whole = Ledger(files, enough=3)
    expected = await lived(whole, workflow)
    assert len(set(whole.accepted)) == len(whole.accepted)
    assert len(set(whole.counted)) == len(whole.counted)
    assert whole.carried_answers
    assert whole.carried_tasks

    for step in range(1, whole.steps + 1):
        ledger = Ledger(files, enough=3, lives=[step])
        assert await lived(ledger, workflow) == expected, f"killed at step {step}"
        assert ledger.accepted == whole.accepted
        assert ledger.asked == whole.asked, "nobody is asked twice"
        assert ledger.counted == whole.counted


@pytest.mark.parametrize("every", [5, 9, 14])
async def test_killed_again_and_again_a_run_ends_with_the_same_bytes(files: TensorFiles, every: int) -> None:
    whole = Ledger(files, enough=3)
    expected = await lived(whole, BUFFERED)
    ledger = Ledger(files, enough=3, lives=[every] * (2 * whole.steps))
    assert await lived(ledger, BUFFERED) == expected
    assert (ledger.accepted, ledger.asked, ledger.counted) == (whole.accepted, whole.asked, whole.counted)
