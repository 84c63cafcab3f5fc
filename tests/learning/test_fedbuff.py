import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hanse.errors import JobInvalid, TooFewClients
from hanse.ids import ClientName
from hanse.learning.aggregate import BLOCK, NoUpdates, in_memory
from hanse.learning.fedavg import FedAvg
from hanse.learning.fedbuff import Change, FedBuff, make_step
from hanse.learning.local import LocalFederation
from hanse.learning.workflow import Answer, Task
from hanse.model import Model, TensorMismatch, Update

from .clients import Client, adding, failing, model, name


def noting(given: list[tuple[str, float]], client: ClientName, change: float, n: int = 1) -> Client:
    """A client that adds *change* to the model that it was given, and notes which that was when it answers."""
    train = adding(change, n=n)

    def run(task: Task) -> Update:
        assert task.model is not None
        given.append((client, float(task.model["w"][0])))
        return train(task)

    return run


async def numbers(federation: LocalFederation, workflow: FedBuff, first: float = 0.0) -> list[float]:
    """The model's number after each step."""
    return [float(state.model["w"][0]) async for state in federation.states(workflow, model(first))][1:]


def paced(**took_s: float) -> Any:
    return lambda client, task: took_s[client.replace("-", "_")]


# The step -------------------------------------------------------------------------------------------------------------


def test_step_by_hand() -> None:
    # Trained on the newest model (8): from 8 to 9, counting 1. Trained on one that is three steps old (2): from 2 to 6,
    # counting 1 / sqrt(4). So 8 + 0.5 / 2 * (1 * 1 + 4 * 0.5) = 8.75
    newest, old = model(8.0), model(2.0)
    changes = [Change(Update(model(9.0), 7), newest), Change(Update(model(6.0), 1), old, 3)]
    assert make_step(newest, changes, 0.5, in_memory) == model(8.75)


@given(st.data())
def test_step_is_what_a_plain_loop_says(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    size = data.draw(st.sampled_from([1, 7, BLOCK, BLOCK + 3]))
    draw = lambda: Model({"w": rng.normal(size=size).astype(np.float32), "b": rng.normal(size=())})  # noqa: E731
    stalenesses = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=5))
    newest, changes = draw(), [Change(Update(draw(), 1), draw(), staleness) for staleness in stalenesses]
    step = make_step(newest, changes, 0.7, in_memory)
    for key in ("w", "b"):
        total = 0
        for change in changes:
            assert change.update.model is not None
            difference = change.update.model[key].astype(np.float64) - change.base[key].astype(np.float64)
            total = total + difference / math.sqrt(1 + change.staleness)
        expected = newest[key] + 0.7 * total / len(changes)
        np.testing.assert_allclose(step[key], expected.astype(newest[key].dtype), rtol=1e-6, atol=1e-7)


def test_updates_without_examples_do_not_count() -> None:
    base = model(1.0)
    changes = [Change(Update(model(3.0), 1), base), Change(Update(model(100.0), 0), base)]
    assert make_step(base, changes, 1.0, in_memory) == model(3.0)
    with pytest.raises(NoUpdates):
        make_step(base, changes[1:], 1.0, in_memory)


def test_integers_are_averaged_and_masks_are_kept() -> None:
    base = Model({"w": np.zeros(1), "n": np.array([10]), "m": np.array([True])}, {"task": "demo"})
    first = Model({"w": np.ones(1), "n": np.array([20]), "m": np.array([True])}, {"by": "a client"})
    second = Model({"w": np.ones(1), "n": np.array([40]), "m": np.array([True])})
    step = make_step(base, [Change(Update(first, 1), base), Change(Update(second, 1), base)], 1.0, in_memory)
    assert step == Model({"w": np.ones(1), "n": np.array([30]), "m": np.array([True])}, {"task": "demo"})


def test_update_with_other_tensors_is_refused() -> None:
    other = Update(Model({"v": np.ones(1)}), 1)
    with pytest.raises(TensorMismatch):
        make_step(model(0.0), [Change(other, model(0.0))], 1.0, in_memory)


# The run --------------------------------------------------------------------------------------------------------------


async def test_one_client_and_a_buffer_of_one_are_a_plain_sequence() -> None:
    given: list[tuple[str, float]] = []
    federation = LocalFederation({name(1): noting(given, name(1), 3.0)}, took_s=lambda client, task: 5.0)
    assert await numbers(federation, FedBuff(rounds=4, buffer_size=1)) == [3.0, 6.0, 9.0, 12.0]
    assert given == [(name(1), 0.0), (name(1), 3.0), (name(1), 6.0), (name(1), 9.0)]


@given(st.integers(1, 5), st.integers(0, 2**32))
async def test_equally_fast_clients_that_fill_the_buffer_are_fedavg_with_equal_weights(clients: int, seed: int) -> None:
    # Every update is of the newest model x, so x + 1/n * sum(y_k - x) = 1/n * sum(y_k): the mean with equal weights.
    targets = np.random.default_rng(seed).normal(size=(clients, 3))

    def client(target: Any) -> Client:
        return lambda task: Update(Model({"w": task.model["w"] + 0.5 * (target - task.model["w"])}), 4)  # type: ignore[index]

    federation = LocalFederation({name(number): client(target) for number, target in enumerate(targets)})
    buffered = await federation.run(FedBuff(rounds=5, buffer_size=clients), model(0.0, 1.0, 2.0))
    averaged = await federation.run(FedAvg(rounds=5), model(0.0, 1.0, 2.0))
    np.testing.assert_allclose(buffered.model["w"], averaged.model["w"], rtol=1e-12)
    assert buffered.metrics["staleness"] == 0.0
    assert buffered.extra == {}


async def test_fast_clients_go_on_and_a_slow_ones_update_counts_for_less() -> None:
    # site-1 and site-2 take 1 s and add 1 and 3; site-3 takes 2.5 s and adds 6, so what it does is two steps old:
    # 2, 4, and then, as site-3 answers at 2.5 and site-1 at 3: 4 + ((5 - 4) + (6 - 0) / sqrt(3)) / 2.
    given: list[tuple[str, float]] = []
    clients = {name(n): noting(given, name(n), change) for n, change in ((1, 1.0), (2, 3.0), (3, 6.0))}
    federation = LocalFederation(clients, took_s=paced(site_1=1.0, site_2=1.0, site_3=2.5))
    states = [state async for state in federation.states(FedBuff(rounds=3, buffer_size=2), model(0.0))]
    third = 4.0 + (1.0 + 6.0 / math.sqrt(3)) / 2
    assert [float(state.model["w"][0]) for state in states] == [0.0, 2.0, 4.0, pytest.approx(third)]
    assert given == [(name(1), 0.0), (name(2), 0.0), (name(1), 2.0), (name(2), 2.0), (name(3), 0.0), (name(1), 4.0)]
    assert [sorted(state.extra) for state in states] == [[], ["version-0"], ["version-0"], ["version-2"]]
    assert states[1].extra["version-0"] == model(0.0)
    assert states[3].metrics == {
        "loss": 3.5,
        "clients": 2.0,
        "num_examples": 2.0,
        "staleness": 1.0,
    }


async def test_an_update_of_too_old_a_model_is_given_up_and_its_client_gets_the_newest() -> None:
    given: list[tuple[str, float]] = []
    clients = {name(n): noting(given, name(n), 1.0) for n in (1, 2)}
    federation = LocalFederation(clients, took_s=paced(site_1=1.0, site_2=3.5))
    workflow = FedBuff(rounds=8, buffer_size=1, max_staleness=2)
    assert await numbers(federation, workflow) == [float(n) for n in range(1, 9)]
    assert {client for client, _ in given} == {name(1)}
    states = [state async for state in federation.states(workflow, model(0.0))]
    assert max(len(state.extra) for state in states) <= 2
    more = FedBuff(rounds=8, buffer_size=1, max_staleness=3)
    given.clear()
    await numbers(LocalFederation(clients, took_s=paced(site_1=1.0, site_2=3.5)), more)
    assert (name(2), 0.0) in given


async def test_models_of_old_steps_are_kept_only_as_long_as_somebody_works_on_them() -> None:
    took = {name(n): 1.0 + 0.9 * n for n in range(1, 7)}
    federation = LocalFederation({client: adding(1.0) for client in took}, took_s=lambda client, task: took[client])
    async for state in federation.states(FedBuff(rounds=30, buffer_size=2, max_staleness=4), model(0.0)):
        versions = {int(key.removeprefix("version-")) for key in state.extra}
        ages = {state.round - 1 - age for age in federation.outstanding("train").values() if age < 4}
        assert versions == (ages if state.round else set())
        assert all(state.round - 4 <= version < state.round for version in versions)


async def test_as_many_clients_train_at_a_time_as_declared() -> None:
    at_work: Counter[str] = Counter()
    most = 0

    class Watching(LocalFederation):
        def _asked(self, client: ClientName, task: Task) -> Any:
            nonlocal most
            at_work[client] += 1
            most = max(most, sum(at_work.values()))
            return super()._asked(client, task)

        def _answer(self, asked: Any) -> Answer:
            at_work[asked.client] -= 1
            return super()._answer(asked)

    federation = Watching(
        {name(n): adding(1.0) for n in range(1, 8)}, seed=3, took_s=lambda client, task: float(client[-1]) % 3 + 1.0
    )
    await federation.run(FedBuff(rounds=20, buffer_size=2, concurrency=3), model(0.0))
    assert most == 3
    assert max(at_work.values()) <= 1


async def test_no_more_clients_are_asked_when_more_are_lost_than_may_train_at_a_time() -> None:
    asked: list[int] = []

    def first_five_are_lost(client: ClientName, task: Task) -> float:
        asked.append(federation.round)
        return math.inf if len(asked) <= 5 else 1.0

    federation = LocalFederation({name(n): adding(1.0) for n in range(1, 21)}, took_s=first_five_are_lost)
    await federation.run(FedBuff(rounds=2, buffer_size=2, concurrency=3), model(0.0))

    assert Counter(asked) == {1: 5 + 2, 2: 2}, "two that stand in for the lost make a step"


async def test_step_goes_on_without_clients_that_fail_and_asks_others_in_their_place() -> None:
    clients: dict[ClientName, Client] = {name(n): failing for n in (1, 2, 3)} | {name(n): adding(2.0) for n in (4, 5)}
    last = await LocalFederation(clients).run(FedBuff(rounds=3, buffer_size=2, concurrency=2), model(0.0))
    assert last.model == model(6.0)
    assert last.metrics["clients"] == 2.0


async def test_step_is_made_of_what_there_is_when_nobody_else_can_answer_or_its_time_is_over() -> None:
    clients: dict[ClientName, Client] = {name(1): adding(2.0), name(2): failing}
    assert await numbers(LocalFederation(clients), FedBuff(rounds=2)) == [2.0, 4.0]
    slow = LocalFederation({name(1): adding(2.0), name(2): adding(4.0)}, took_s=paced(site_1=1.0, site_2=100.0))
    assert await numbers(slow, FedBuff(rounds=2, deadline_s=10.0)) == [2.0, 4.0]
    assert slow.elapsed_s == 10.0
    with pytest.raises(TooFewClients, match=r"only 1 of the 2 .*site-2 did not answer within 10 s"):
        await numbers(
            LocalFederation({name(1): adding(2.0), name(2): adding(4.0)}, took_s=paced(site_1=1.0, site_2=100.0)),
            FedBuff(rounds=2, deadline_s=10.0, min_clients=2),
        )


async def test_lost_clients_task_waits_for_it() -> None:
    # site-2 is lost: steps are made of site-1's updates alone, and its task is carried until it is too old
    federation = LocalFederation(
        {name(1): adding(1.0), name(2): adding(1.0)}, took_s=paced(site_1=1.0, site_2=math.inf)
    )
    states = [state async for state in federation.states(FedBuff(rounds=3, buffer_size=2, max_staleness=5), model(0.0))]
    assert [state.metrics.get("clients") for state in states] == [None, 1.0, 1.0, 1.0]
    assert federation.outstanding("train") == {name(2): 2}
    assert set(states[-1].extra) == {"version-0"}


async def test_run_with_fewer_clients_than_a_step_needs_fails_in_its_first() -> None:
    with pytest.raises(TooFewClients, match="the run has 1 clients: site-1"):
        await numbers(LocalFederation({name(1): adding(1.0)}), FedBuff())


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("rounds", 0, "1 or more"),
        ("buffer_size", 0, "1 or more"),
        ("concurrency", 1, "0, or 2 or more, which make a step"),
        ("concurrency", -1, "0, or 2 or more, which make a step"),
        ("server_learning_rate", 0.0, "more than 0"),
        ("server_learning_rate", math.inf, "more than 0"),
        ("max_staleness", 0, "1 or more"),
        ("min_clients", 0, "1 or more"),
        ("deadline_s", 0.0, "more than 0 seconds, and an end"),
        ("deadline_s", math.inf, "more than 0 seconds, and an end"),
        ("retries", -1, "0 or more"),
    ],
)
def test_value_out_of_range_is_refused_by_name(field: str, value: float, expected: str) -> None:
    with pytest.raises(JobInvalid, match=rf"workflow\.{field} is .*; expected {expected}"):
        FedBuff(**{field: value})  # type: ignore[arg-type]  # the point of the test


def test_a_step_has_at_least_as_many_updates_as_it_needs() -> None:
    assert FedBuff(buffer_size=2, min_clients=5).updates_a_step == 5
    with pytest.raises(JobInvalid, match=r"workflow\.concurrency"):
        FedBuff(buffer_size=2, min_clients=5, concurrency=4)
