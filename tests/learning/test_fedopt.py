import math
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from hanse.learning.aggregate import BLOCK, NoUpdates, in_memory
from hanse.learning.fedavg import FedAvg
from hanse.learning.fedopt import (
    MOMENTUM,
    SECOND_MOMENT,
    FedAdagrad,
    FedAdam,
    FedAvgM,
    FedOpt,
    FedYogi,
    make_step,
)
from hanse.learning.local import LocalFederation
from hanse.learning.workflow import State, Task
from hanse.model import Array, Model, TensorMismatch, Update

from .clients import adding, model, name, update

FAMILY = [FedAvgM, FedAdagrad, FedAdam, FedYogi]


def step(optimizer: FedOpt, state: State, *numbers: float) -> State:
    """The state after a round in which the clients' mean is *numbers*."""
    return make_step(optimizer, state, [update(*numbers)], in_memory)


def test_fedavgm_makes_the_steps_computed_by_hand() -> None:
    optimizer = FedAvgM(server_learning_rate=0.5, momentum=0.9)
    # round 1: delta = 4 - 1 = 3; m = 0.9 * 0 + 3 = 3; x = 1 + 0.5 * 3 = 2.5
    first = step(optimizer, State(model(1.0)), 4.0)
    assert first.extra[MOMENTUM]["w"] == pytest.approx([3.0], rel=1e-15)
    assert first.model["w"] == pytest.approx([2.5], rel=1e-15)
    # round 2: delta = 2 - 2.5 = -0.5; m = 0.9 * 3 - 0.5 = 2.2; x = 2.5 + 0.5 * 2.2 = 3.6
    second = step(optimizer, first, 2.0)
    assert second.extra[MOMENTUM]["w"] == pytest.approx([2.2], rel=1e-15)
    assert second.model["w"] == pytest.approx([3.6], rel=1e-15)


def test_fedadagrad_makes_the_steps_computed_by_hand() -> None:
    optimizer = FedAdagrad(server_learning_rate=0.1, tau=0.5)
    # round 1: delta = 3; m = 3; v = 0.25 + 9 = 9.25; x = 1 + 0.1 * 3 / (sqrt(9.25) + 0.5)
    first = step(optimizer, State(model(1.0)), 4.0)
    assert first.extra[SECOND_MOMENT]["w"] == pytest.approx([9.25], rel=1e-15)
    x = 1 + 0.3 / (math.sqrt(9.25) + 0.5)
    assert x == pytest.approx(1.084713, abs=1e-6)
    assert first.model["w"] == pytest.approx([x], rel=1e-15)
    # round 2: delta = x; m = x; v = 9.25 + x**2; x = x + 0.1 * x / (sqrt(9.25 + x**2) + 0.5)
    second = step(optimizer, first, 2 * x)
    assert second.extra[SECOND_MOMENT]["w"] == pytest.approx([9.25 + x**2], rel=1e-15)
    assert second.model["w"] == pytest.approx([x + 0.1 * x / (math.sqrt(9.25 + x**2) + 0.5)], rel=1e-14)


def test_fedadam_makes_the_steps_computed_by_hand() -> None:
    optimizer = FedAdam(server_learning_rate=0.1, beta_1=0.9, beta_2=0.75, tau=0.5)
    # round 1: delta = 3; m = 0.1 * 3 = 0.3; v = 0.75 * 0.25 + 0.25 * 9 = 2.4375
    first = step(optimizer, State(model(1.0)), 4.0)
    assert first.extra[MOMENTUM]["w"] == pytest.approx([0.3], rel=1e-15)
    assert first.extra[SECOND_MOMENT]["w"] == pytest.approx([2.4375], rel=1e-15)
    x = 1 + 0.1 * 0.3 / (math.sqrt(2.4375) + 0.5)
    assert x == pytest.approx(1.014555, abs=1e-6)
    assert first.model["w"] == pytest.approx([x], rel=1e-15)
    # round 2: delta = -2; m = 0.9 * 0.3 - 0.1 * 2 = 0.07; v = 0.75 * 2.4375 + 0.25 * 4 = 2.828125
    second = step(optimizer, first, x - 2)
    assert second.extra[MOMENTUM]["w"] == pytest.approx([0.07], rel=1e-14)
    assert second.extra[SECOND_MOMENT]["w"] == pytest.approx([2.828125], rel=1e-14)
    assert second.model["w"] == pytest.approx([x + 0.1 * 0.07 / (math.sqrt(2.828125) + 0.5)], rel=1e-14)


def test_fedyogi_makes_the_steps_computed_by_hand() -> None:
    optimizer = FedYogi(server_learning_rate=0.1, beta_1=0.9, beta_2=0.75, tau=0.5)
    # round 1: delta = 3; v - delta**2 = 0.25 - 9 < 0, so v = 0.25 + 0.25 * 9 = 2.5
    first = step(optimizer, State(model(1.0)), 4.0)
    assert first.extra[SECOND_MOMENT]["w"] == pytest.approx([2.5], rel=1e-15)
    x = 1 + 0.1 * 0.3 / (math.sqrt(2.5) + 0.5)
    assert first.model["w"] == pytest.approx([x], rel=1e-15)
    # round 2: delta = -1; v - delta**2 = 2.5 - 1 > 0, so v = 2.5 - 0.25 * 1 = 2.25; m = 0.27 - 0.1 = 0.17
    second = step(optimizer, first, x - 1)
    assert second.extra[SECOND_MOMENT]["w"] == pytest.approx([2.25], rel=1e-14)
    assert second.model["w"] == pytest.approx([x + 0.1 * 0.17 / (1.5 + 0.5)], rel=1e-14)
    # v equal to delta**2 has the sign 0, and stays
    still = step(FedYogi(tau=0.5), State(model(1.0)), 1.5)
    assert still.extra[SECOND_MOMENT]["w"].tolist() == [0.25]


def test_first_moment_of_fedadagrad_can_be_switched_on() -> None:
    # m = 0.1 * 3 = 0.3; x = 0.1 * 0.3 / (sqrt(9.25) + 0.5) from 1
    first = step(FedAdagrad(beta_1=0.9, tau=0.5), State(model(1.0)), 4.0)
    assert first.model["w"] == pytest.approx([1 + 0.03 / (math.sqrt(9.25) + 0.5)], rel=1e-15)


async def test_fedavgm_without_momentum_is_fedavg() -> None:
    federation = LocalFederation({name(1): adding(0.25, n=1), name(2): adding(0.5, n=3)})
    initial = Model({"w": np.arange(5.0)})
    plain = await federation.run(FedAvg(rounds=4), initial)
    assert (await federation.run(FedAvgM(rounds=4, momentum=0.0), initial)).model == plain.model


@pytest.mark.parametrize("member", FAMILY)
async def test_resumed_run_makes_the_same_steps(member: type[FedOpt]) -> None:
    def client(task: Task) -> Update:
        assert task.model is not None
        return Update(Model({"w": np.sin(task.model["w"] * 3)}), 1)

    workflow, federation = member(rounds=4), LocalFederation({name(1): client})
    states = [
        state async for state in federation.states(workflow, Model({"w": np.linspace(-1, 1, 9, dtype=np.float32)}))
    ]
    copies = {moment: Model({"w": np.array(value["w"])}) for moment, value in states[2].extra.items()}
    resumed = State(Model({"w": np.array(states[2].model["w"])}), round=2, extra=copies)
    for number in (3, 4):
        federation.round = number
        resumed = await workflow.round(resumed, federation)
    assert resumed.model == states[4].model
    assert resumed.extra == states[4].extra


@pytest.mark.parametrize("member", FAMILY)
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_steps_are_computed_in_float64_whatever_the_dtype(member: type[FedOpt], dtype: type) -> None:
    before: Array = np.array([0.5, -2.0]).astype(dtype)
    trained: Array = np.array([1.5, 2.0]).astype(dtype)
    exact = make_step(member(), State(model(0.5, -2.0)), [update(1.5, 2.0)], in_memory)
    state = make_step(member(), State(Model({"w": before})), [Update(Model({"w": trained}), 1)], in_memory)
    assert np.array_equal(state.model["w"], exact.model["w"].astype(dtype))
    for moment, value in state.extra.items():
        expected: type = np.float64 if dtype is np.float64 else np.float32
        assert value["w"].dtype == expected
        assert np.array_equal(value["w"], exact.extra[moment]["w"].astype(expected))


@pytest.mark.parametrize("member", FAMILY)
def test_tensors_longer_than_a_block_are_stepped_number_by_number(member: type[FedOpt]) -> None:
    numbers = np.linspace(-3, 3, 2 * BLOCK + 5)

    def run(before: Array, first: Array, second: Array) -> State:
        state = State(Model({"w": before}))
        for trained in (first, second):
            state = make_step(member(), state, [Update(Model({"w": trained}), 2)], in_memory)
        return state

    whole = run(numbers, numbers**2, np.cos(numbers))
    for part in (slice(0, 3), slice(BLOCK - 1, BLOCK + 2), slice(2 * BLOCK - 1, None)):
        piece = run(numbers[part], numbers[part] ** 2, np.cos(numbers[part]))
        np.testing.assert_allclose(whole.model["w"][part], piece.model["w"], rtol=1e-15)


@pytest.mark.parametrize("member", FAMILY)
def test_counters_and_masks_are_averaged_and_have_no_moments(member: type[FedOpt]) -> None:
    def model_of(count: int, weight: float) -> Model:
        return Model({"count": np.array(count), "mask": np.array([True, False]), "w": np.array([weight])})

    updates = [Update(model_of(4, 1.0), 1), Update(model_of(8, 1.0), 1)]
    before = State(Model(dict(model_of(0, 0.0)), {"task": "demo"}), extra={"mine": model(1.0)}, values={"k": 1})
    state = make_step(member(), before, updates, in_memory)
    assert (int(state.model["count"]), state.model["mask"].tolist()) == (6, [True, False])
    assert list(state.extra[MOMENTUM]) == ["w"]
    assert state.extra["mine"] is before.extra["mine"]
    assert (state.model.metadata, state.values) == ({"task": "demo"}, {"k": 1})
    assert float(before.model["w"][0]) == 0.0


@pytest.mark.parametrize("optimizer", [FedAvgM(), FedAdagrad(server_learning_rate=1.0), FedAdam(), FedYogi()])
async def test_family_finds_the_minimum_of_a_quadratic(optimizer: FedOpt) -> None:
    def client(task: Task) -> Update:
        assert task.model is not None
        return Update(Model({"w": task.model["w"] - 0.1 * (task.model["w"] - 1.0)}), 1)

    federation = LocalFederation({name(1): client, name(2): client})
    state = await federation.run(replace(optimizer, rounds=150), model(3.0, -2.0))
    assert state.model["w"] == pytest.approx([1.0, 1.0], abs=0.05)


def test_updates_that_do_not_fit_or_weigh_nothing_are_refused() -> None:
    with pytest.raises(TensorMismatch, match=r"'w' as float64 \(2,\); the job expects float64 \(1,\)"):
        make_step(FedAdam(), State(model(1.0)), [update(1.0, 2.0)], in_memory)
    with pytest.raises(NoUpdates):
        make_step(FedAdam(), State(model(1.0)), [update(1.0, n=0)], in_memory)
