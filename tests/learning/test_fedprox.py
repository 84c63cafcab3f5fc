import numpy as np
import pytest

from hanse.learning.fedavg import FedAvg
from hanse.learning.fedprox import FedProx, proximal_gradient
from hanse.learning.local import LocalFederation
from hanse.learning.workflow import Task
from hanse.model import Array, Model, Update

from .clients import Client, model, name


def descending(target: float, n: int, steps: int = 200) -> Client:
    """A client with the loss ``(w - target)**2 / 2`` that heeds ``proximal_mu``, and goes on until it has converged."""

    def client(task: Task) -> Update:
        assert task.model is not None
        mu = float(task.config.get("proximal_mu", 0.0))
        w = {"w": np.array(task.model["w"])}
        for _ in range(steps):
            w["w"] -= 0.1 * ((w["w"] - target) + proximal_gradient(w, task.model, mu)["w"])
        return Update(Model(w), n)

    return client


async def test_clients_are_held_as_far_as_the_closed_form_says() -> None:
    # argmin (w - a)**2 / 2 + mu / 2 * (w - w0)**2 = (a + mu * w0) / (1 + mu); with mu = 3, w0 = 2: 10 -> 4, -2 -> 1
    federation = LocalFederation({name(1): descending(10.0, n=1), name(2): descending(-2.0, n=2)})
    state = await federation.run(FedProx(rounds=1, proximal_mu=3.0), model(2.0))
    assert state.model["w"] == pytest.approx([(4.0 + 2 * 1.0) / 3], rel=1e-12)


async def test_without_a_hold_it_is_fedavg_and_the_jobs_config_is_kept() -> None:
    seen: list[Task] = []

    def noting(task: Task) -> Update:
        seen.append(task)
        return descending(5.0, n=1)(task)

    federation = LocalFederation({name(1): noting})
    held = await federation.run(FedProx(rounds=2, proximal_mu=0.0, config={"epochs": 2}), model(1.0))
    assert held.model == (await federation.run(FedAvg(rounds=2), model(1.0))).model
    assert seen[0].config == {"epochs": 2, "proximal_mu": 0.0}


def test_gradient_is_mu_times_the_distance_in_the_weights_dtype() -> None:
    weights = Model({"w": np.array([3.0, 1.0], np.float32), "count": np.array(3), "mask": np.array([True])})
    received = Model({"w": np.array([1.0, 2.0], np.float32), "count": np.array(1), "mask": np.array([False])})
    gradient = proximal_gradient(weights, received, 0.5)
    assert list(gradient) == ["w"]
    assert gradient["w"].dtype == np.float32
    assert gradient["w"].tolist() == [1.0, -0.5]


def test_gradient_agrees_with_the_difference_quotient_of_the_term() -> None:
    rng = np.random.default_rng(3)
    w, origin, mu, h = rng.normal(size=6), rng.normal(size=6), 0.7, 1e-5

    def term(point: Array) -> float:
        return float(mu / 2 * ((point - origin) ** 2).sum())

    quotient = [(term(w + h * unit) - term(w - h * unit)) / (2 * h) for unit in np.eye(6)]
    assert proximal_gradient({"w": w}, {"w": origin}, mu)["w"] == pytest.approx(quotient, abs=1e-9)
