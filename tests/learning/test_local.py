import math
from typing import Any

import numpy as np
import pytest

from hanse.errors import NotFound, WorkflowFailed
from hanse.ids import ClientName
from hanse.learning.local import LocalFederation
from hanse.learning.workflow import Answer, Federation, State, Task, rng_for
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


def shown(answers: list[Answer]) -> list[tuple[str, str | None, int]]:
    return [(one.client, one.fault and one.fault.code, one.staleness) for one in answers]


async def asked(federation: LocalFederation, *clients: ClientName, **options: Any) -> list[tuple[str, str | None, int]]:
    return shown([answer async for answer in federation.ask(TASK, clients, **options)])


async def test_answers_come_in_the_order_of_pretended_time_lost_ones_first_and_late_ones_last() -> None:
    times = {name(1): math.inf, name(2): 2.0, name(3): 1.0, name(4): 30.0}
    federation = LocalFederation({n: adding(1.0) for n in times}, took_s=lambda client, task: times[client])
    assert await asked(federation, *federation.clients, deadline_s=10.0) == [
        (name(1), "client-lost", 0),
        (name(3), None, 0),
        (name(2), None, 0),
        (name(4), "deadline", 0),
    ]
    assert federation.elapsed_s == 10.0
    assert (await asked(federation, *federation.clients))[-1] == (name(4), None, 0)
    assert federation.elapsed_s == 40.0


@pytest.mark.parametrize("deadline_s", [-1.0, math.inf, math.nan])
async def test_no_ask_waits_for_ever(deadline_s: float) -> None:
    with pytest.raises(ValueError, match="deadline_s is"):
        await asked(LocalFederation({name(1): adding(1.0)}), name(1), deadline_s=deadline_s)


async def test_kept_tasks_are_answered_in_later_rounds_one_after_the_other() -> None:
    times = {name(1): 25.0, name(2): 1.0, name(3): math.inf}
    federation = LocalFederation({n: adding(1.0) for n in times}, took_s=lambda client, task: times[client])
    first = [(name(3), "client-lost", 0), (name(2), None, 0), (name(1), "deadline", 0), (name(3), "deadline", 0)]
    assert await asked(federation, *federation.clients, deadline_s=10.0, keep=True) == first
    assert federation.outstanding("train") == {name(1): 0, name(3): 0}
    federation._enter_round(2)
    assert federation.outstanding("train") == {name(1): 1, name(3): 1}
    assert federation.outstanding("evaluate") == {}
    await federation.cancel("train", [name(3)])
    again = [(name(2), None, 0), (name(1), None, 1), (name(1), "deadline", 0)]
    assert await asked(federation, name(1), name(2), deadline_s=20.0, keep=True) == again
    assert federation.elapsed_s == 20.0  # the client began its second task at 15 and ends it at 40
    await federation.cancel("train")
    assert await asked(federation, keep=True) == []


async def test_client_that_is_lost_with_a_kept_task_is_told_of_once_a_round() -> None:
    federation = LocalFederation({name(1): adding(1.0)}, took_s=lambda client, task: math.inf)
    told = [(name(1), "client-lost", 0), (name(1), "deadline", 0)]
    assert await asked(federation, name(1), keep=True, deadline_s=1.0) == told
    assert await asked(federation, keep=True, deadline_s=1.0) == told[1:]
    federation._enter_round(2)
    assert await asked(federation, keep=True, deadline_s=1.0) == [(name(1), "client-lost", 1), (name(1), "deadline", 1)]


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
