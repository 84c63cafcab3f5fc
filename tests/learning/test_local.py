import math

import numpy as np
import pytest

from hanse.errors import NotFound, WorkflowFailed
from hanse.ids import ClientName
from hanse.learning.local import LocalFederation
from hanse.learning.workflow import Federation, State, Task, rng_for
from hanse.model import Model, Update

from .clients import adding, failing, model, name

TASK = Task("train", model(0.0))


class Standing:
    """A workflow that never gets anywhere."""

    rounds = 3

    def start(self, model: Model) -> State:
        return State(model)

    async def round(self, state: State, federation: Federation) -> State:
        return state


async def test_answers_come_in_the_order_of_pretended_time_and_missing_ones_last() -> None:
    times = {name(1): math.inf, name(2): 2.0, name(3): 1.0, name(4): 30.0}
    federation = LocalFederation({n: adding(1.0) for n in times}, took_s=lambda client, task: times[client])
    answers = [answer async for answer in federation.ask(TASK, federation.clients, deadline_s=10.0)]
    assert [(one.client, one.fault and one.fault.code) for one in answers] == [
        (name(3), None),
        (name(2), None),
        (name(4), "deadline"),
        (name(1), "deadline"),
    ]
    answers = [answer async for answer in federation.ask(TASK, federation.clients)]
    assert [(one.client, one.fault and one.fault.code) for one in answers][2:] == [
        (name(4), None),
        (name(1), "client-lost"),
    ]


async def test_client_that_raises_answers_with_its_reason() -> None:
    def broken(task: Task) -> Update:
        raise ZeroDivisionError("division by zero")

    federation = LocalFederation({"site-1": failing, "site-2": broken})
    faults = {one.client: one.fault async for one in federation.ask(TASK, federation.clients)}
    for fault in faults.values():
        assert fault is not None
        assert fault.code == "training-failed"
    assert "task 'train' failed at site-2: ZeroDivisionError: division by zero" in str(faults[ClientName("site-2")])


async def test_unknown_client_cannot_be_asked() -> None:
    with pytest.raises(NotFound, match="client 'site-9'"):
        async for _ in LocalFederation({"site-1": adding(1.0)}).ask(TASK, [name(9)]):
            pass


async def test_step_that_stands_still_is_an_error() -> None:
    with pytest.raises(WorkflowFailed, match="'Standing' failed in round 1"):
        await LocalFederation({}).run(Standing(), model(0.0))


def test_randomness_and_arrays_are_what_a_workflow_expects() -> None:
    federation: Federation = LocalFederation({"b": adding(1.0), "a": adding(1.0)}, seed=3)
    assert federation.clients == ("a", "b")
    assert federation.rng("x").integers(10**9) == rng_for(3, 1, "x").integers(10**9)
    allocated = federation.allocate(Model({"w": np.zeros((2, 3), np.float16)}).spec)
    assert str(allocated.spec["w"]) == "float16 (2, 3)"
    assert allocated["w"].flags.writeable
