"""A federation of plain functions in memory: for notebooks, and for tests of workflows.

Each client is a function from a task to an update. Time is pretended: ``took_s`` says how long each answer takes,
answers come in the order of those times, and deadlines are held against them, all without waiting. So a straggler, a
lost client or a missed deadline is an argument, and a round with them takes as long as its arithmetic.
"""

import math
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from hanse.errors import HanseError, NotFound, TrainingFailed
from hanse.ids import ClientName
from hanse.learning.aggregate import in_memory
from hanse.learning.workflow import (
    CLIENT_LOST,
    DEADLINE,
    Answer,
    State,
    Task,
    Workflow,
    check_next,
    is_over,
    rng_for,
)
from hanse.messages import TaskFault
from hanse.model import Model, ModelSpec, Update

Name = TypeVar("Name", bound=str)


def _at_once(client: ClientName, task: Task) -> float:
    del client, task
    return 0.0


class LocalFederation:
    """Implements ``Federation`` over functions.

    ``took_s(client, task)`` are the pretended seconds until a client's answer, ``math.inf`` for one that is lost before
    it answers; by default all answer at once, in name order. A client whose function raises answers with a fault.

    A client's function is called when its answer is due, so clients that are cancelled or late are never called.
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

    def rng(self, *purpose: str) -> np.random.Generator:
        """Return this round's generator for *purpose*."""
        return rng_for(self.seed, self.round, *purpose)

    def allocate(self, spec: ModelSpec) -> Model:
        """Return a model of *spec* in memory."""
        return in_memory(spec)

    async def ask(
        self, task: Task, clients: Sequence[ClientName], *, deadline_s: float | None = None
    ) -> AsyncGenerator[Answer, None]:
        """Yield each client's answer in the order of pretended arrival, then the faults of those that never answer."""
        unknown = [client for client in clients if client not in self._functions]
        if unknown:
            raise NotFound("client", unknown[0])
        deadline = math.inf if deadline_s is None else deadline_s
        arrivals = sorted((self._took_s(client, task), client) for client in clients)
        for took_s, client in arrivals:
            if took_s <= deadline and took_s < math.inf:
                yield self._answer(client, task)
            elif deadline_s is None:
                yield Answer(client, fault=TaskFault(CLIENT_LOST, "was lost before it answered", retryable=True))
            else:
                yield Answer(
                    client, fault=TaskFault(DEADLINE, f"did not answer within {deadline_s:g} s", retryable=True)
                )

    async def states(self, workflow: Workflow, model: Model) -> AsyncIterator[State]:
        """Run *workflow* from *model* and yield each round's state, that of round 0 first."""
        state = workflow.start(model)
        yield state
        while not is_over(workflow, state):
            self.round = state.round + 1
            state = check_next(state, await workflow.round(state, self), workflow=type(workflow).__name__)
            yield state

    async def run(self, workflow: Workflow, model: Model) -> State:
        """Run *workflow* from *model* and return the last round's state."""
        last = workflow.start(model)
        async for state in self.states(workflow, model):
            last = state
        return last

    def _answer(self, client: ClientName, task: Task) -> Answer:
        try:
            return Answer(client, self._functions[client](task))
        except HanseError as error:
            return Answer(client, fault=TaskFault(error.code, error.reason, retryable=error.retryable))
        except Exception as error:  # noqa: BLE001 - one client's failure is its answer, as in a real federation
            failed = TrainingFailed(client, task.name, f"{type(error).__name__}: {error}")
            return Answer(client, fault=TaskFault(failed.code, failed.reason))
