import math

import numpy as np
import pytest

from hanse.errors import TooFewClients
from hanse.ids import ClientName
from hanse.learning.cyclic import Cyclic
from hanse.learning.local import LocalFederation
from hanse.learning.workflow import Task
from hanse.model import Model, Update

from .clients import Client, failing, model, name, returning, update


def appending(digit: int, calls: list[int] | None = None) -> Client:
    """A client whose training appends *digit* to the number: the result tells the order."""

    def client(task: Task) -> Update:
        assert task.model is not None
        if calls is not None:
            calls.append(digit)
        return Update(Model({"w": task.model["w"] * 10 + digit}, {"by": str(digit)}), digit, {"loss": float(digit)})

    return client


def federation(**clients: Client) -> LocalFederation:
    return LocalFederation({client.replace("_", "-"): run for client, run in clients.items()})


async def test_each_client_trains_on_what_the_one_before_it_made() -> None:
    fed = federation(site_2=appending(2), site_1=appending(1), site_3=appending(3))
    state = await fed.run(Cyclic(rounds=2), Model({"w": np.zeros(1)}, {"task": "demo"}))
    assert state.model["w"].tolist() == [123123.0]
    assert state.model.metadata == {"task": "demo"}
    assert (state.round, state.metrics["clients"], state.metrics["num_examples"]) == (2, 3.0, 6.0)
    assert state.metrics["loss"] == pytest.approx((1 + 4 + 9) / 6)


async def test_random_order_differs_between_laps_and_is_the_same_for_the_same_seed() -> None:
    calls: list[int] = []
    clients = {name(digit): appending(digit, calls) for digit in range(1, 7)}
    workflow = Cyclic(rounds=3, order="random")
    first = await LocalFederation(clients, seed=1).run(workflow, model(0.0))
    laps = [tuple(calls[start : start + 6]) for start in (0, 6, 12)]
    assert all(sorted(lap) == [1, 2, 3, 4, 5, 6] for lap in laps)
    assert len(set(laps)) > 1
    assert await LocalFederation(clients, seed=1).run(workflow, model(0.0)) == first
    assert (await LocalFederation(clients, seed=2).run(workflow, model(0.0))).model != first.model


@pytest.mark.parametrize("bad", [failing, returning(update(math.nan)), returning(Update(None, 1))])
async def test_faulty_client_is_passed_over(bad: Client) -> None:
    fed = federation(site_1=appending(1), site_2=bad, site_3=appending(3))
    assert (await fed.run(Cyclic(rounds=1), model(0.0))).model["w"].tolist() == [13.0]


async def test_client_that_misses_its_deadline_is_passed_over() -> None:
    times = {name(1): 59.0, name(2): 61.0, name(3): 59.0}
    clients = {name(digit): appending(digit) for digit in (1, 2, 3)}
    fed = LocalFederation(clients, took_s=lambda client, task: times[ClientName(client)])
    assert (await fed.run(Cyclic(rounds=1, deadline_s=60.0), model(0.0))).model["w"].tolist() == [13.0]


async def test_lap_ends_as_soon_as_it_cannot_have_enough_clients() -> None:
    calls: list[int] = []
    fed = federation(site_1=appending(1, calls), site_2=failing, site_3=appending(3, calls))
    with pytest.raises(TooFewClients, match="site-2"):
        await fed.run(Cyclic(rounds=1, min_clients=3), model(0.0))
    assert calls == [1]


async def test_run_with_fewer_clients_than_declared_fails() -> None:
    with pytest.raises(TooFewClients, match="the run has 1 clients"):
        await federation(site_1=appending(1)).run(Cyclic(min_clients=2), model(0.0))
