import math
from functools import partial

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_breast_cancer

from hanse.errors import TooFewClients
from hanse.ids import ClientName
from hanse.learning.aggregate import NoUpdates
from hanse.learning.fedavg import FedAvg
from hanse.learning.local import LocalFederation
from hanse.learning.workflow import State, Task
from hanse.model import Model, Update

from .clients import Client, adding, failing, model, name, returning, update

Numbers = npt.NDArray[np.float64]

RATE = 0.1


def linear_gradient(w: Numbers, x: Numbers, y: Numbers) -> Numbers:
    """The gradient of the mean of ``(x @ w - y)**2 / 2``."""
    gradient: Numbers = x.T @ (x @ w - y) / len(y)
    return gradient


def logistic_gradient(w: Numbers, x: Numbers, y: Numbers) -> Numbers:
    """The gradient of the mean cross entropy of ``sigmoid(x @ w)``."""
    gradient: Numbers = x.T @ (1 / (1 + np.exp(-x @ w)) - y) / len(y)
    return gradient


def stepping(gradient: object, x: Numbers, y: Numbers) -> Client:
    """A client that makes one step of gradient descent on its data."""

    def client(task: Task) -> Update:
        assert task.model is not None
        w = task.model["w"]
        return Update(Model({"w": w - RATE * gradient(w, x, y)}), len(y))  # type: ignore[operator]  # one of the two above

    return client


@pytest.mark.parametrize("gradient", [linear_gradient, logistic_gradient])
async def test_one_local_step_is_pooled_gradient_descent(gradient: object) -> None:
    data = load_breast_cancer()
    x = (data.data - data.data.mean(axis=0)) / data.data.std(axis=0)
    y = data.target.astype(np.float64)
    cuts = [(0, 50), (50, 51), (51, 400), (400, len(y))]
    federation = LocalFederation(
        {f"site-{a}": stepping(gradient, x[a:b], y[a:b]) for a, b in cuts},
    )
    pooled = np.zeros(x.shape[1])
    async for state in federation.states(FedAvg(rounds=20), Model({"w": pooled})):
        # a few roundings a round of numbers near 1: nothing but rounding separates the two
        np.testing.assert_allclose(state.model["w"], pooled, rtol=0, atol=state.round * 8 * np.finfo(float).eps)
        pooled = pooled - RATE * gradient(pooled, x, y)  # type: ignore[operator]  # one of the two above
    assert np.abs(pooled).max() > 0.05


async def test_one_local_step_is_pooled_gradient_descent_to_the_bit_where_nothing_is_rounded() -> None:
    # halves, quarters and a power of two of examples: all of it is exact in binary, so the two must agree exactly
    x, y = np.array([[1.0], [2.0], [3.0], [4.0]]), np.array([2.0, 3.0, 5.0, 8.0])

    def client(x: Numbers, y: Numbers, task: Task) -> Update:
        assert task.model is not None
        return Update(Model({"w": task.model["w"] - 0.125 * linear_gradient(task.model["w"], x, y)}), len(y))

    federation = LocalFederation(
        {"site-1": partial(client, x[:2], y[:2]), "site-2": partial(client, x[2:], y[2:])},
    )
    state = await federation.run(FedAvg(rounds=1), model(0.5))
    assert state.model["w"].tolist() == (0.5 - 0.125 * linear_gradient(np.array([0.5]), x, y)).tolist()


@given(st.permutations(range(1, 6)), st.integers(0, 2**32))
async def test_result_does_not_depend_on_who_answers_first(order: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    clients = {
        name(n): returning(Update(Model({"w": rng.normal(size=50).astype(np.float32)}), int(rng.integers(1, 100))))
        for n in range(1, 6)
    }
    initial = Model({"w": np.zeros(50, np.float32)})
    times = {name(n): float(position) for position, n in enumerate(order)}
    late = LocalFederation(clients, took_s=lambda client, task: times[client])
    assert await late.run(FedAvg(rounds=1), initial) == await LocalFederation(clients).run(FedAvg(rounds=1), initial)


async def test_round_reports_what_clients_measured_and_what_it_is_made_of() -> None:
    federation = LocalFederation({name(1): adding(4.0, n=1), name(2): adding(0.0, n=3), name(3): failing})
    state = await federation.run(FedAvg(rounds=1), model(1.0))
    assert state.model["w"].tolist() == [2.0]
    assert state.metrics == {"loss": 1.0, "clients": 2.0, "num_examples": 4.0}


async def test_new_model_is_evaluated_every_so_many_rounds_and_at_the_end() -> None:
    federation = LocalFederation({name(1): adding(1.0), name(2): adding(1.0)})
    seen = [
        (state.round, state.metrics.get("eval_mean"))
        async for state in federation.states(FedAvg(rounds=5, evaluate_every=2), model(0.0))
    ]
    assert seen == [(0, None), (1, None), (2, 2.0), (3, None), (4, 4.0), (5, 5.0)]


async def test_clients_get_the_model_and_the_config_of_the_workflow() -> None:
    tasks: list[Task] = []

    def client(task: Task) -> Update:
        tasks.append(task)
        return update(1.0)

    await LocalFederation({name(1): client}).run(FedAvg(rounds=1, config={"epochs": 3}), model(7.0))
    assert [(task.name, task.config, task.expects_model) for task in tasks] == [("train", {"epochs": 3}, True)]
    assert tasks[0].model == model(7.0)


async def test_next_model_keeps_the_jobs_metadata_and_the_state_keeps_the_rest() -> None:
    def client(task: Task) -> Update:
        return Update(Model({"w": np.ones(1)}, {"injected": "by a client"}), 1)

    before = State(Model({"w": np.zeros(1)}, {"task": "demo"}), round=3, extra={"mine": model(9.0)}, values={"k": 1})
    federation = LocalFederation({name(1): client})
    federation.round = 4
    after = await FedAvg().round(before, federation)
    assert after.model.metadata == {"task": "demo"}
    assert (after.round, after.extra, after.values) == (4, before.extra, before.values)
    assert before.model["w"].tolist() == [0.0]


async def test_sampled_rounds_ask_other_clients_each_time_and_the_same_ones_again() -> None:
    asked: list[ClientName] = []

    def noting(client: ClientName) -> Client:
        def run(task: Task) -> Update:
            asked.append(client)
            return update(0.0)

        return run

    federation = LocalFederation({name(n): noting(name(n)) for n in range(1, 10)}, seed=5)
    await federation.run(FedAvg(rounds=6, fraction=1 / 3), model(0.0))
    rounds = [tuple(asked[start : start + 3]) for start in range(0, 18, 3)]
    assert len(set(rounds)) > 1
    first = list(asked)
    asked.clear()
    await federation.run(FedAvg(rounds=6, fraction=1 / 3), model(0.0))
    assert asked == first


async def test_diverged_client_does_not_spoil_the_model() -> None:
    federation = LocalFederation({name(1): returning(update(math.nan)), name(2): adding(1.0)})
    assert (await federation.run(FedAvg(rounds=2), model(0.0))).model["w"].tolist() == [2.0]


async def test_round_without_examples_fails_with_its_reason() -> None:
    federation = LocalFederation({name(1): adding(1.0, n=0), name(2): adding(1.0, n=0)})
    with pytest.raises(NoUpdates, match="all 2 updates"):
        await federation.run(FedAvg(rounds=1), model(0.0))


async def test_run_with_fewer_clients_than_declared_fails_in_its_first_round() -> None:
    with pytest.raises(TooFewClients, match="the run has 1 clients: site-1"):
        await LocalFederation({name(1): adding(1.0)}).run(FedAvg(min_clients=2), model(0.0))
