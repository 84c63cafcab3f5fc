"""A run's handle on its clients: one answer for each, whatever becomes of them."""

import asyncio
from contextlib import aclosing

import numpy as np
import pytest

from hanse.errors import StoreFailed
from hanse.ids import ClientName
from hanse.learning.workflow import Answer, Task, rng_for
from hanse.messages import TaskKey
from hanse.model import Model, TensorSpec
from hanse.run.federation import RunFederation
from hanse.storage.tensors import TensorFiles

from .journal import Journal, changed, federation


def model(value: float) -> Model:
    return Model({"w": np.full(3, value, np.float32)})


def plus(amount: float):  # type: ignore[no-untyped-def]
    return lambda key, given: Model({"w": given["w"] + np.float32(amount)})


def silent(key: TaskKey, given: Model) -> None:
    del key, given


TRAIN = Task("train", model(1), {"rate": 0.1})


async def collected(
    run: RunFederation, *names: str, task: Task = TRAIN, deadline_s: float | None = None
) -> list[Answer]:
    async with aclosing(run.ask(task, list(map(ClientName, names)), deadline_s=deadline_s)) as answers:
        return [answer async for answer in answers]


async def test_each_client_answers_once(files: TensorFiles) -> None:
    journal = Journal(files, {"a": plus(1), "b": plus(2)})
    run = federation(journal, "b", "a")

    answers = await collected(run, "a", "b")

    assert run.clients == ("a", "b")
    assert {answer.client: answer.update and answer.update.model for answer in answers} == {
        "a": model(2),
        "b": model(3),
    }
    assert all(answer.update is not None and answer.update.metrics == {"loss": 0.5} for answer in answers)
    (issued,) = journal.issued
    assert issued.keys == (TaskKey(1, "train", 0, ClientName("a")), TaskKey(1, "train", 0, ClientName("b")))
    assert (issued.config, issued.expects_model) == ({"rate": 0.1}, True)
    assert journal.cancelled == []
    assert run.answered_clients == {"a", "b"}


async def test_keys_count_the_asks_of_one_name_to_one_client_within_a_round(files: TensorFiles) -> None:
    journal = Journal(files, {"a": plus(1), "b": plus(1)})
    run = federation(journal, "a", "b")

    await collected(run, "a")
    await collected(run, "a", "b")
    await collected(run, "a", task=Task("evaluate", model(1), expects_model=False))
    run.enter_round(2)
    await collected(run, "a")

    assert [(key.round, key.name, key.sequence, key.client) for key in journal.asked] == [
        (1, "train", 0, "a"),
        (1, "train", 1, "a"),
        (1, "train", 0, "b"),
        (1, "evaluate", 0, "a"),
        (2, "train", 0, "a"),
    ]


async def test_an_ask_made_again_after_a_crash_gets_the_answers_that_were_accepted(files: TensorFiles) -> None:
    journal = Journal(files, {"a": plus(1), "b": silent})
    async with aclosing(federation(journal, "a", "b").ask(TRAIN, [ClientName("a"), ClientName("b")])) as answers:
        await anext(answers)
    journal.clients["b"] = plus(2)
    journal.asked.clear()

    again = await collected(federation(journal, "a", "b"), "a", "b")

    assert sorted(answer.client for answer in again) == ["a", "b"]
    assert [key.client for key in journal.asked] == ["b"]


async def test_a_task_without_a_model_and_an_evaluation(files: TensorFiles) -> None:
    journal = Journal(files, {"a": lambda key, given: given})

    (answer,) = await collected(federation(journal, "a"), "a", task=Task("ping", None, expects_model=False))

    assert journal.issued[0].model is None
    assert answer.update is not None
    assert answer.update.model is None


async def test_a_client_that_is_lost_answers_with_a_fault(files: TensorFiles) -> None:
    journal = Journal(files, {"a": plus(1), "b": silent})
    run = federation(journal, "a", "b")
    asking = asyncio.create_task(collected(run, "a", "b"))
    async with asyncio.timeout(10):
        await journal.was_asked.wait()
    run.client_changed(changed("b", "lost", "b was not connected for 15 s"))

    answers = {answer.client: answer for answer in await asking}

    fault = answers[ClientName("b")].fault
    assert fault is not None
    assert (fault.code, fault.reason) == ("client-lost", "b was not connected for 15 s")
    assert [key.client for key in journal.cancelled] == ["b"]
    assert run.answered_clients == {"a"}


async def test_a_client_that_was_lost_before_is_not_waited_for(files: TensorFiles) -> None:
    journal = Journal(files, {"a": plus(1), "b": silent})
    run = federation(journal, "a", "b", lost=["b"])

    answers = await collected(run, "a", "b")

    assert [(answer.client, answer.fault and answer.fault.code) for answer in answers] == [
        ("b", "client-lost"),
        ("a", None),
    ]
    assert run.clients == ("a", "b")


async def test_a_client_that_came_back_is_asked_again(files: TensorFiles) -> None:
    journal = Journal(files, {"a": plus(1)})
    run = federation(journal, "a", lost=["a"])
    run.client_changed(changed("a", "back"))

    (answer,) = await collected(run, "a")

    assert answer.update is not None


async def test_a_client_that_failed_says_why_for_the_rest_of_the_run(files: TensorFiles) -> None:
    journal = Journal(files, {"a": silent})
    run = federation(journal, "a")
    run.client_changed(changed("a", "failed", "its process died"))

    for _ in range(2):
        (answer,) = await collected(run, "a")
        assert answer.fault is not None
        assert (answer.fault.code, answer.fault.reason) == ("client-failed", "its process died")
    assert journal.issued == []


async def test_who_has_not_answered_at_the_deadline_is_cancelled(files: TensorFiles) -> None:
    journal = Journal(files, {"a": plus(1), "b": silent})

    answers = await collected(federation(journal, "a", "b"), "a", "b", deadline_s=0.01)

    assert [(answer.client, answer.fault and answer.fault.code) for answer in answers] == [
        ("a", None),
        ("b", "deadline"),
    ]
    assert [key.client for key in journal.cancelled] == ["b"]


async def test_leaving_early_cancels_what_is_open(files: TensorFiles) -> None:
    journal = Journal(files, {"a": plus(1), "b": silent, "c": silent})
    run = federation(journal, "a", "b", "c")

    async with aclosing(run.ask(TRAIN, list(run.clients))) as answers:
        assert (await anext(answers)).client == "a"

    assert [key.client for key in journal.cancelled] == ["b", "c"]


async def test_an_answer_that_nobody_waits_for_is_dropped(files: TensorFiles) -> None:
    journal = Journal(files, {"a": plus(1)})
    run = federation(journal, "a")
    await collected(run, "a")
    (result,) = journal.answers.values()

    run.answered(result)
    run.enter_round(2)

    assert len(await collected(run, "a")) == 1


async def test_a_model_that_is_asked_with_twice_is_stored_once(
    files: TensorFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = []
    honest = files.put
    monkeypatch.setattr(files, "put", lambda buffer: stored.append(1) or honest(buffer))
    journal = Journal(files, {"a": silent, "b": silent})
    run = federation(journal, "a", "b", lost=[])
    task = Task("train", Model({"w": np.zeros(10_000, np.float32)}))

    for name in ("a", "b"):
        await collected(run, name, task=task, deadline_s=0.001)

    assert len(stored) == 1


async def test_the_servers_refusal_is_raised_where_it_was_asked(files: TensorFiles) -> None:
    journal = Journal(files)
    journal.refuses = StoreFailed("writing", "no space left on device")

    with pytest.raises(StoreFailed):
        await collected(federation(journal, "a"), "a")


def test_randomness_is_the_seeds_and_the_rounds_alone(files: TensorFiles) -> None:
    run = federation(Journal(files), "a", seed=11)
    run.enter_round(4)

    drawn = run.rng("choice", "a").random(3)

    assert np.array_equal(drawn, rng_for(11, 4, "choice", "a").random(3))


def test_arrays_are_allocated_as_asked(files: TensorFiles) -> None:
    made = federation(Journal(files), "a").allocate({"w": TensorSpec("float32", (3, 2))})

    assert made["w"].shape == (3, 2)
    assert made["w"].flags.writeable
