"""A federation of plain functions in memory: for notebooks, and for tests of workflows.

Each client is a function from a task to an update. Time is pretended: ``took_s`` says how long each answer takes,
answers come in the order of those times, and deadlines are held against them, all without waiting. So a straggler, a
lost client or a missed deadline is an argument, and a round with them takes as long as its arithmetic. A client works
on one kept task at a time, in the order in which it was asked.
"""

import math
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from hanse.errors import HanseError, NotFound, TrainingFailed
from hanse.ids import ClientName
from hanse.learning.aggregate import in_memory
from hanse.learning.workflow import (
    CLIENT_LOST,
    DEADLINE,
    LONGEST_WAIT_S,
    Answer,
    State,
    Task,
    Workflow,
    afresh,
    check_first,
    check_next,
    check_wait,
    is_over,
    rng_for,
)
from hanse.messages import TaskFault
from hanse.model import Model, ModelSpec, Update

Name = TypeVar("Name", bound=str)


def _at_once(client: ClientName, task: Task) -> float:
    del client, task
    return 0.0


@dataclass(slots=True)
class _Asked:
    """A task at a client: when the answer is due, and whether it was told this round that it never is."""

    client: ClientName
    task: Task
    round: int
    due_s: float
    is_told: bool = False

    @property
    def is_lost(self) -> bool:
        return self.due_s == math.inf


class LocalFederation:
    """Implements ``Federation`` over functions.

    ``took_s(client, task)`` are the pretended seconds until a client's answer, ``math.inf`` for one that is lost as
    soon as it is asked; by default all answer at once, in name order. A client whose function raises answers with a
    fault.

    A client's function is called when its answer is due, so that of a task which was cancelled before is never called.
    """

    def __init__(
        self,
        clients: Mapping[Name, Callable[[Task], Update]],
        *,
        seed: int = 0,
        took_s: Callable[[ClientName, Task], float] = _at_once,
    ) -> None:
        self._functions = {ClientName(name): clients[name] for name in sorted(clients)}
        self._took_s = took_s
        self.clients: tuple[ClientName, ...] = tuple(self._functions)
        self.seed = seed
        self.round = 1
        self._now_s = self._began_s = 0.0
        self._kept: dict[str, list[_Asked]] = {}

    @property
    def elapsed_s(self) -> float:
        """Pretended seconds since this round began."""
        return self._now_s - self._began_s

    def rng(self, *purpose: str) -> np.random.Generator:
        """Return this round's generator for *purpose*."""
        return rng_for(self.seed, self.round, *purpose)

    def allocate(self, spec: ModelSpec) -> Model:
        """Return a model of *spec* in memory."""
        return in_memory(spec)

    async def ask(
        self,
        task: Task,
        clients: Sequence[ClientName],
        *,
        deadline_s: float = LONGEST_WAIT_S,
        then: str = "",
        keep: bool = False,
    ) -> AsyncGenerator[Answer, None]:
        """Yield each client's answer in the order of pretended arrival, lost ones first and late ones last."""
        del then
        unknown = [client for client in clients if client not in self._functions]
        if unknown:
            raise NotFound("client", unknown[0])
        deadline = self._now_s + check_wait(deadline_s)
        open_tasks = self._kept.setdefault(task.name, []) if keep else []
        open_tasks += [self._asked(client, task) for client in clients]
        for asked in [each for each in open_tasks if each.is_lost and not each.is_told]:
            asked.is_told = True
            if not keep:
                open_tasks.remove(asked)
            fault = TaskFault(CLIENT_LOST, f"{asked.client} was lost before it answered", retryable=True)
            yield Answer(asked.client, None, fault, self.round - asked.round)
        while open_tasks:
            following = min(open_tasks, key=lambda each: (each.due_s, each.client))
            if following.due_s > deadline:
                break
            open_tasks.remove(following)
            self._now_s = max(self._now_s, following.due_s)
            yield self._answer(following)
        if open_tasks:
            self._now_s = deadline
        for asked in sorted(open_tasks, key=lambda each: each.client):
            fault = TaskFault(DEADLINE, f"{asked.client} did not answer within {deadline_s:g} s", retryable=True)
            yield Answer(asked.client, None, fault, self.round - asked.round)

    def outstanding(self, name: str) -> Mapping[ClientName, int]:
        """Return who has a kept task *name* that is not answered, and how many rounds ago it was asked."""
        ages: dict[ClientName, int] = {}
        for asked in self._kept.get(name, ()):
            ages.setdefault(asked.client, self.round - asked.round)
        return dict(sorted(ages.items()))

    async def cancel(self, name: str, clients: Collection[ClientName] | None = None) -> None:
        """Have *clients*, or all, drop their kept tasks *name*."""
        kept = self._kept.get(name, [])
        kept[:] = [asked for asked in kept if clients is not None and asked.client not in clients]

    async def states(self, workflow: Workflow, model: Model) -> AsyncIterator[State]:
        """Run *workflow* from *model* and yield each round's state, that of round 0 first.

        What an earlier run's tasks were is forgotten. *workflow* itself stays as it is: each step is a copy's.
        """
        self._kept.clear()
        state = check_first(afresh(workflow, 0).start(model), workflow=type(workflow).__name__)
        yield state
        while not is_over(workflow, state):
            number = state.round + 1
            self._enter_round(number)
            following = await afresh(workflow, number).round(state, self)
            state = check_next(state, following, workflow=type(workflow).__name__)
            yield state

    async def run(self, workflow: Workflow, model: Model) -> State:
        """Run *workflow* from *model* and return the last round's state."""
        last = State(model)
        async for state in self.states(workflow, model):
            last = state
        return last

    def _enter_round(self, number: int) -> None:
        self.round, self._began_s = number, self._now_s
        for asked in (asked for tasks in self._kept.values() for asked in tasks):
            asked.is_told = False

    def _asked(self, client: ClientName, task: Task) -> _Asked:
        dues = [asked.due_s for tasks in self._kept.values() for asked in tasks if asked.client == client]
        begins = max([self._now_s, *(due_s for due_s in dues if due_s < math.inf)])
        return _Asked(client, task, self.round, begins + self._took_s(client, task))

    def _answer(self, asked: _Asked) -> Answer:
        client, task, staleness = asked.client, asked.task, self.round - asked.round
        try:
            return Answer(client, self._functions[client](task), staleness=staleness)
        except HanseError as error:
            return Answer(client, None, TaskFault(error.code, error.reason, retryable=error.retryable), staleness)
        except Exception as error:  # noqa: BLE001 - one client's failure is its answer, as in a real federation
            failed = TrainingFailed(client, task.name, f"{type(error).__name__}: {error}")
            return Answer(client, None, TaskFault(failed.code, failed.reason), staleness)
