"""Late answers, retries and substitutes over several rounds, on pretended time."""

import math
from typing import Any

import pytest

from hanse.errors import JobInvalid, StoreFailed, TooFewClients
from hanse.ids import ClientName
from hanse.learning.evaluation import Evaluation
from hanse.learning.fedavg import FedAvg
from hanse.learning.local import LocalFederation
from hanse.learning.workflow import State, Task
from hanse.model import Update

from .clients import Client, adding, failing, model, name, update

SLOW = name(3)


def noting(asked: list[tuple[ClientName, float]], client: ClientName, change: float) -> Client:
    """A client that adds *change*, and notes which model it was given when it answers."""
    train = adding(change)

    def run(task: Task) -> Update:
        assert task.model is not None
        asked.append((client, float(task.model["w"][0])))
        return train(task)

    return run


def three(slow_s: float, asked: list[tuple[ClientName, float]] | None = None) -> LocalFederation:
    """Two clients that answer at once and add nothing, and a slow one that adds 6 to the model that it was given."""
    notes = asked if asked is not None else []
    clients = {name(number): noting(notes, name(number), 6.0 * (number == 3)) for number in (1, 2, 3)}
    return LocalFederation(clients, took_s=lambda client, task: slow_s if client == SLOW else 0.0)


async def models(federation: LocalFederation, **settings: Any) -> list[float]:
    """The model's number after each round."""
    workflow = FedAvg(deadline_s=10.0, **settings)
    return [float(state.model["w"][0]) async for state in federation.states(workflow, model(1.0))][1:]


async def test_late_answers_are_dropped_by_default() -> None:
    asked: list[tuple[ClientName, float]] = []
    assert await models(three(15.0, asked), rounds=4) == [1.0] * 4
    assert SLOW not in dict(asked)


async def test_late_answer_counts_fully_in_the_next_round() -> None:
    # round 1 is over at 10 without site-3, which was given 1 and answers 7 at 15: (1 + 1 + 7) / 3 = 3.
    # In round 3 it is asked anew, with that 3, and answers 9 in round 4: (3 + 3 + 9) / 3 = 5.
    asked: list[tuple[ClientName, float]] = []
    assert await models(three(15.0, asked), rounds=4, late="next") == [1.0, 3.0, 3.0, 5.0]
    assert [given for client, given in asked if client == SLOW] == [1.0, 3.0]


async def test_late_answer_counts_for_less() -> None:
    # (1 + 1 + 7 / sqrt(2)) / (1 + 1 + 1 / sqrt(2)), as FedBuff's polynomial with a = 1/2 has it for one round
    less = 1 / math.sqrt(2)
    assert await models(three(15.0), rounds=2, late="discount") == [1.0, pytest.approx((2 + 7 * less) / (2 + less))]


async def test_answer_that_is_later_than_declared_is_given_up_and_its_client_asked_anew() -> None:
    # asked at 0, and due at 25: in round 3, two rounds late
    asked: list[tuple[ClientName, float]] = []
    assert await models(three(25.0, asked), rounds=4, late="discount") == [1.0] * 4
    assert SLOW not in dict(asked)
    less = 1 / math.sqrt(3)
    in_round_3 = pytest.approx((2 + 7 * less) / (2 + less))
    assert await models(three(25.0), rounds=3, late="discount", max_staleness=2) == [1.0, 1.0, in_round_3]
    assert await models(three(25.0), rounds=3, late="next", max_staleness=2) == [1.0, 1.0, 3.0]


async def test_late_answer_counts_for_the_aim_and_for_what_is_needed() -> None:
    settings: dict[str, Any] = {"rounds": 2, "late": "next", "quorum": 3}
    federation = three(15.0)
    with pytest.raises(TooFewClients, match="site-3 did not answer within 10 s"):
        await models(federation, **settings)
    assert federation.outstanding("train") == {SLOW: 0}
    federation._enter_round(2)
    after = await FedAvg(deadline_s=10.0, **settings).round(State(model(1.0), 1), federation)
    assert after.model == model(3.0)


async def test_clients_that_still_train_are_not_asked_to_evaluate() -> None:
    evaluated: list[ClientName] = []

    def client(which: ClientName) -> Client:
        def run(task: Task) -> Update:
            if task.name == "evaluate":
                evaluated.append(which)
            return update(1.0) if task.expects_model else Update(None, 1, {"loss": 0.5})

        return run

    clients = {name(number): client(name(number)) for number in (1, 2, 3)}
    federation = LocalFederation(
        clients, took_s=lambda who, task: 15.0 if who == SLOW and task.name == "train" else 0.0
    )
    settings: dict[str, Any] = {"rounds": 2, "deadline_s": 10.0, "late": "next", "evaluate_every": 1, "min_clients": 3}
    last = await federation.run(FedAvg(quorum=2, **settings), model(0.0))
    assert evaluated == [name(1), name(2), name(1), name(2), name(3)]
    assert last.metrics["eval_loss"] == 0.5
    assert federation.elapsed_s == 5.0


def test_no_late_answer_counts_where_no_round_follows() -> None:
    with pytest.raises(JobInvalid, match=r"workflow\.late is 'next'; expected 'drop', as no round follows"):
        Evaluation(late="next")


def failing_first(times: int) -> Client:
    """A client whose disk is full for its first tasks."""
    left = [times]

    def run(task: Task) -> Update:
        if left[0]:
            left[0] -= 1
            raise StoreFailed("writing a tensor", "no space left on device")
        return update(5.0)

    return run


@pytest.mark.parametrize(("times", "retries", "expected"), [(1, 0, 1.0), (1, 1, 3.0), (2, 1, 1.0), (2, 2, 3.0)])
async def test_client_whose_fault_may_pass_is_asked_again_in_the_same_round(
    times: int, retries: int, expected: float
) -> None:
    federation = LocalFederation({name(1): failing_first(times), name(2): adding(0.0)})
    assert (await federation.run(FedAvg(rounds=1, retries=retries), model(1.0))).model == model(expected)


async def test_substitutes_make_a_round_complete() -> None:
    clients = {name(number): adding(float(number)) for number in range(1, 6)}
    drawn = FedAvg(fraction=0.4, substitutes=3).select(
        sorted(clients), LocalFederation(clients).rng("participation", "train")
    )
    clients[drawn.asked[0]] = failing
    lost = drawn.reserve[0]
    federation = LocalFederation(clients, took_s=lambda client, task: math.inf if client == lost else 1.0)
    for substitutes, complete in ((0, False), (1, False), (2, True)):
        workflow = FedAvg(rounds=1, fraction=0.4, substitutes=substitutes, quorum=1.0)
        if complete:
            last = await federation.run(workflow, model(0.0))
            counted = [int(client.removeprefix("site-")) for client in (drawn.asked[1], drawn.reserve[1])]
            assert last.model == model(sum(counted) / 2)
        else:
            with pytest.raises(TooFewClients):
                await federation.run(workflow, model(0.0))
