"""A run's handle on its clients: one answer for each, whatever becomes of them."""

import asyncio
import math
from contextlib import aclosing
from typing import Any

import numpy as np
import pytest

from hanse.coordination.task_keys import FIRST_SEQUENCE, content_of, sequence_of
from hanse.errors import StoreFailed
from hanse.ids import ClientName, JobId
from hanse.job import JobSpec, WorkflowSpec
from hanse.learning.workflow import LONGEST_WAIT_S, THEN, Answer, Task, rng_for
from hanse.messages import IssueTasks, ModelRef, RunSnapshot, TaskFault, TaskKey, TaskResult, TensorRef, UpdateRef
from hanse.model import Model, TensorSpec
from hanse.run.federation import RunFederation
from hanse.storage.models import store_model
from hanse.storage.tensors import TensorFiles, digest_of

from .journal import Journal, changed, federation


def model(value: float) -> Model:
    return Model({"w": np.full(3, value, np.float32)})


def plus(amount: float):  # type: ignore[no-untyped-def]
    return lambda key, given: Model({"w": given["w"] + np.float32(amount)})


def silent(key: TaskKey, given: Model) -> None:
    del key, given


TRAIN = Task("train", model(1), {"rate": 0.1})


async def collected(run: RunFederation, *names: str, task: Task = TRAIN, **options: Any) -> list[Answer]:
    async with aclosing(run.ask(task, list(map(ClientName, names)), **options)) as answers:
        return [answer async for answer in answers]


async def first(count: int, run: RunFederation, *names: str) -> list[Answer]:
    """Ask to keep, and leave after *count* answers."""
    taken: list[Answer] = []
    async with aclosing(run.ask(TRAIN, list(map(ClientName, names)), keep=True)) as answers:
        async for answer in answers:
            taken.append(answer)
            if len(taken) == count:
                break
    return taken


def shown(answers: list[Answer]) -> list[tuple[str, str | None, int]]:
    return [(answer.client, answer.fault and answer.fault.code, answer.staleness) for answer in answers]


def key(client: str, *, round_number: int = 1, number: int = 0) -> TaskKey:
    """The key of ``TRAIN``, asked of *client* for the *number*-th time in a round."""
    ones = np.ones(3, np.float32).tobytes()
    reference = ModelRef((TensorRef("w", "float32", (3,), digest_of(ones), ones),))
    content = content_of(reference, TRAIN.config, expects_model=True)
    return TaskKey(round_number, "train", sequence_of(content, number), ClientName(client))


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
    assert issued.keys == (key("a"), key("b"))
    assert (issued.config, issued.expects_model) == ({"rate": 0.1}, True)
    assert (issued.deadline_s, issued.then) == (LONGEST_WAIT_S, THEN)
    assert journal.cancelled == []
    assert run.answered_clients == {"a", "b"}


async def test_keys_follow_from_what_is_asked_and_how_often_it_was_asked_before_in_the_round(
    files: TensorFiles,
) -> None:
    journal = Journal(files, {"a": plus(1), "b": plus(1)})
    run = federation(journal, "a", "b")

    await collected(run, "a")
    await collected(run, "a", "b")
    await collected(run, "a", task=Task("train", model(2), {"rate": 0.1}))
    await collected(run, "a")
    run.enter_round(2)
    await collected(run, "a")

    again, other = key("a", number=1), journal.asked[3]
    assert journal.asked == [key("a"), again, key("b"), other, key("a", number=2), key("a", round_number=2)]
    assert other.sequence not in {each.sequence for each in journal.asked if each is not other}


async def test_two_questions_with_the_same_number_by_chance_are_two_tasks(
    files: TensorFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hanse.run.federation.sequence_of", lambda content, number: FIRST_SEQUENCE + number)
    journal = Journal(files, {"a": plus(1)})
    run = federation(journal, "a")

    for value in (1, 2, 1):
        (answer,) = await collected(run, "a", task=Task("train", model(value)))
        assert answer.update is not None
        assert answer.update.model == model(value + 1)
    assert len(set(journal.asked)) == 3


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
        ("a", None),
        ("b", "client-lost"),
    ]
    assert run.clients == ("a", "b")
    assert [key.client for key in journal.cancelled] == ["b"]


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


async def test_who_has_not_answered_at_the_deadline_is_cancelled(files: TensorFiles) -> None:
    journal = Journal(files, {"a": plus(1), "b": silent})

    answers = await collected(federation(journal, "a", "b"), "a", "b", deadline_s=0.01)

    assert [(answer.client, answer.fault and answer.fault.code) for answer in answers] == [
        ("a", None),
        ("b", "deadline"),
    ]
    assert [key.client for key in journal.cancelled] == ["b"]


async def test_the_server_hears_how_long_a_run_waits_and_what_happens_then(files: TensorFiles) -> None:
    journal = Journal(files, {"a": plus(1)})

    await collected(federation(journal, "a"), "a", deadline_s=60.0, then="the round goes on without")
    await collected(federation(journal, "a"), deadline_s=30.0, keep=True)

    assert [(issued.keys, issued.deadline_s, issued.then) for issued in journal.issued] == [
        ((key("a"),), 60.0, "the round goes on without"),
        ((), 30.0, THEN),
    ]


@pytest.mark.parametrize("deadline_s", [-1.0, math.inf, math.nan])
async def test_no_ask_waits_for_ever(files: TensorFiles, deadline_s: float) -> None:
    journal = Journal(files, {"a": plus(1)})

    with pytest.raises(ValueError, match="deadline_s is"):
        await collected(federation(journal, "a"), "a", deadline_s=deadline_s)
    assert journal.issued == []


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


async def test_a_model_that_is_asked_with_in_another_round_is_there_again(files: TensorFiles) -> None:
    teacher = Model({"w": np.arange(100_000, dtype=np.float32)})
    journal = Journal(files, {"a": plus(1)})
    run = federation(journal, "a")
    await collected(run, "a", task=Task("evaluate", teacher, expects_model=False))
    files.keep_only([])  # as the commit does with what the state does not hold
    run.enter_round(2)

    await collected(run, "a", task=Task("evaluate", teacher, expects_model=False))

    reference = journal.issued[-1].model
    assert reference is not None
    assert files.has(reference.tensors[0].digest)


async def test_the_servers_refusal_is_raised_where_it_was_asked(files: TensorFiles) -> None:
    journal = Journal(files)
    journal.refuses = StoreFailed("writing", "no space left on device")

    with pytest.raises(StoreFailed):
        await collected(federation(journal, "a"), "a")


async def test_randomness_is_the_seeds_and_the_rounds_alone(files: TensorFiles) -> None:
    run = federation(Journal(files), "a", seed=11)
    run.enter_round(4)

    drawn = run.rng("choice", "a").random(3)

    assert np.array_equal(drawn, rng_for(11, 4, "choice", "a").random(3))


async def test_arrays_are_allocated_as_asked(files: TensorFiles) -> None:
    made = federation(Journal(files), "a").allocate({"w": TensorSpec("float32", (3, 2))})

    assert made["w"].shape == (3, 2)
    assert made["w"].flags.writeable


# after a crash


async def test_answers_come_again_in_the_order_in_which_they_were_accepted(files: TensorFiles) -> None:
    journal = Journal(files, dict.fromkeys("abcd", silent))
    before = federation(journal, *"abcd", carried=[key("d", round_number=0)])
    asking = asyncio.create_task(first(9, before, *"abc"))
    async with asyncio.timeout(10):
        await journal.was_asked.wait()
    for each in (key("c"), key("d", round_number=0), key("a")):
        journal.accept(TaskResult(each, fault=TaskFault("training-failed", "no")))
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    journal.asked.clear()

    run = federation(journal, *"abcd", carried=[key("d", round_number=0)])
    again = await first(3, run, *"abc")

    assert shown(again) == [("c", "training-failed", 0), ("d", "training-failed", 1), ("a", "training-failed", 0)]
    assert journal.asked == [key("b")]
    assert run.outstanding("train") == {"b": 0}


async def test_asks_side_by_side_get_their_own_answers_whichever_went_on_first(files: TensorFiles) -> None:
    async def chain(run: RunFederation, start: int, first: str) -> Model:
        """Have *first* train, and then c what came of it."""
        made = model(start)
        for name in (first, "c"):
            (answer,) = await collected(run, name, task=Task("train", made))
            assert answer.update is not None
            assert answer.update.model is not None
            made = answer.update.model
        return made

    async def both(run: RunFederation) -> list[Model]:
        return await asyncio.gather(chain(run, 10, "a"), chain(run, 20, "b"))

    journal = Journal(files, {"a": silent, "b": plus(1), "c": plus(1)})
    before = asyncio.create_task(both(federation(journal, *"abc")))
    async with asyncio.timeout(10):
        while [each.client for each in journal.answers] != ["b", "c"]:
            journal.was_asked.clear()
            await journal.was_asked.wait()
    before.cancel()
    await asyncio.gather(before, return_exceptions=True)
    journal.clients["a"] = plus(1)
    journal.asked.clear()

    assert await both(federation(journal, *"abc")) == [model(12), model(22)]
    assert [each.client for each in journal.asked] == ["a", "c"], "what b's chain was told, it is told again"


async def test_what_is_asked_otherwise_than_before_the_crash_is_asked_anew(files: TensorFiles) -> None:
    journal = Journal(files, {"a": plus(1)})
    await collected(federation(journal, "a"), "a", task=Task("train", model(1), {"rate": 0.1, "steps": 2}))
    run = federation(journal, "a")

    same = await collected(run, "a", task=Task("train", model(1), {"steps": 2, "rate": 0.1}))
    others = [Task("train", model(5), TRAIN.config), Task("train", model(1), {"rate": 0.2})]
    models = [await collected(run, "a", task=task) for task in others]

    assert [answer.update and answer.update.model for (answer,) in [same, *models]] == [model(2), model(6), model(2)]
    assert len(journal.asked) == 3


async def test_a_round_that_a_release_began_which_counted_its_tasks_goes_on_with_them(files: TensorFiles) -> None:
    journal = Journal(files, {"a": plus(1), "b": silent})
    old = [TaskKey(1, "train", number, ClientName(client)) for client, number in (("a", 0), ("a", 1), ("b", 0))]
    for each, value in zip(old, (5, 6), strict=False):
        journal.accept(TaskResult(each, UpdateRef(store_model(model(value), files), 1)))
    run = federation(journal, "a", "b", counted=old)

    got = [await collected(run, "a") for _ in range(3)]
    await collected(run, "b", deadline_s=0.01)

    assert [answer.update and answer.update.model for (answer,) in got] == [model(5), model(6), model(2)]
    assert journal.asked == [key("a"), old[2]]
    run.enter_round(2)
    await collected(run, "a")
    assert journal.asked[-1] == key("a", round_number=2)


async def test_an_accepted_answer_of_a_client_that_was_lost_since_counts(files: TensorFiles) -> None:
    journal = Journal(files, {"a": plus(1), "b": silent})
    await collected(federation(journal, "a", "b"), "a", "b", deadline_s=0.001)
    journal.asked.clear()

    for change in ([], ["failed"]):
        run = federation(journal, "a", "b", lost=["a", "b"])
        for what in change:
            run.client_changed(changed("a", what))
        answers = await collected(run, "a", "b")
        assert shown(answers) == [("a", None, 0), ("b", "client-lost", 0)]
    assert key("a") not in journal.asked


async def test_an_answer_that_is_told_twice_counts_once(files: TensorFiles) -> None:
    journal = Journal(files, {"a": plus(1), "b": silent})
    run = federation(journal, "a", "b", carried=[key("b", round_number=0)])
    late = TaskResult(key("b", round_number=0), fault=TaskFault("training-failed", "no"))
    for _ in range(2):
        journal.accept(late)

    assert shown(await collected(run, "a", keep=True)) == [("b", "training-failed", 1), ("a", None, 0)]
    journal.accept(late)
    journal.accept(journal.answers[key("a")])
    run.enter_round(2)
    journal.accept(journal.answers[key("a")])
    assert await collected(run, keep=True) == []
    assert run.carried == ()


async def test_who_was_lost_and_who_came_back_is_learnt_when_the_link_is_up_again(files: TensorFiles) -> None:
    journal = Journal(files, {"a": plus(1), "b": silent})
    run = federation(journal, "a", "b", lost=["a"])
    asking = asyncio.create_task(collected(run, "b"))
    async with asyncio.timeout(10):
        await journal.was_asked.wait()

    spec = JobSpec("tiny", WorkflowSpec("fedavg"), client="app:app", model="model:initial")
    run.attached(RunSnapshot(JobId("tiny-1"), spec, run.clients, lost_clients=(ClientName("b"),)))

    assert shown(await asking) == [("b", "client-lost", 0)]
    assert shown(await collected(run, "a")) == [("a", None, 0)]


async def test_a_client_that_has_failed_is_known_as_such_when_the_link_is_up_again(files: TensorFiles) -> None:
    run = federation(Journal(files, {"a": silent, "b": silent}), "a", "b")
    asking = asyncio.create_task(collected(run, "a", "b", keep=True))
    async with asyncio.timeout(10):
        await run._link.was_asked.wait()  # type: ignore[attr-defined]
    gone = (ClientName("a"), ClientName("b"))
    spec = JobSpec("tiny", WorkflowSpec("fedavg"), client="app:app", model="model:initial")

    run.attached(RunSnapshot(JobId("tiny-1"), spec, run.clients, lost_clients=gone, failed_clients=gone))

    assert shown(await asking) == [("a", "client-failed", 0), ("b", "client-failed", 0)]


# tasks that are kept


async def test_a_kept_task_is_answered_in_a_later_round(files: TensorFiles) -> None:
    journal = Journal(files, {"a": plus(1), "b": silent, "c": silent})
    run = federation(journal, "a", "b", "c")

    assert shown(await first(1, run, "a", "b", "c")) == [("a", None, 0)]
    assert journal.cancelled == []
    assert run.carried == (key("b"), key("c"))
    run.enter_round(3)
    assert run.outstanding("train") == {"b": 2, "c": 2}
    assert run.outstanding("evaluate") == {}
    journal.clients["b"] = plus(2)
    journal.work(key("b"))
    assert run.outstanding("train") == {"b": 2, "c": 2}, "until its answer is yielded"
    assert run.carried == (key("b"), key("c"))

    late, fresh = await first(2, run, "a")

    assert late.update is not None
    assert (late.client, late.staleness, late.update.model) == ("b", 2, model(3))
    assert (fresh.client, fresh.staleness) == ("a", 0)
    assert run.answered_clients == {"a", "b"}
    assert run.carried == (key("c"),)
    assert run.outstanding("train") == {"c": 2}


async def test_an_ask_that_keeps_nothing_leaves_kept_tasks_alone(files: TensorFiles) -> None:
    journal = Journal(files, {"a": silent, "b": plus(1)})
    run = federation(journal, "a", "b", carried=[key("a", round_number=0)])

    assert shown(await collected(run, "b")) == [("b", None, 0)]
    assert run.carried == (key("a", round_number=0),)


async def test_a_kept_task_outlives_the_deadline_and_its_ask(files: TensorFiles) -> None:
    journal = Journal(files, {"a": silent})
    run = federation(journal, "a")

    assert shown(await collected(run, "a", keep=True, deadline_s=0.01)) == [("a", "deadline", 0)]
    assert (run.carried, journal.cancelled) == ((key("a"),), [])


async def test_a_kept_task_outlives_the_loss_of_its_client(files: TensorFiles) -> None:
    journal = Journal(files, {"a": silent})
    run = federation(journal, "a", lost=["a"])
    answers = run.ask(TRAIN, [ClientName("a")], keep=True)

    async def following() -> tuple[str, str | None, int]:
        (one,) = shown([await anext(answers)])
        return one

    assert await following() == ("a", "client-lost", 0)
    run.client_changed(changed("a", "back"))
    run.client_changed(changed("a", "lost"))
    assert await following() == ("a", "client-lost", 0)
    run.enter_round(2)
    assert await following() == ("a", "client-lost", 1)
    run.client_changed(changed("a", "back"))
    journal.clients["a"] = plus(1)
    journal.work(key("a"))
    assert await following() == ("a", None, 1)
    with pytest.raises(StopAsyncIteration):
        await anext(answers)


async def test_a_loss_that_nobody_has_heard_of_is_forgotten_when_the_client_is_back(files: TensorFiles) -> None:
    journal = Journal(files, {"a": silent, "b": silent})
    run = federation(journal, "a", "b", carried=[key("a", round_number=0), key("b", round_number=0)])
    for name in ("a", "b"):
        run.client_changed(changed(name, "lost"))
    run.client_changed(changed("a", "back"))
    journal.accept(TaskResult(key("b", round_number=0), fault=TaskFault("training-failed", "no")))

    answers = await collected(run, keep=True, deadline_s=0.01)

    assert shown(answers) == [("b", "training-failed", 1), ("a", "deadline", 1)]


async def test_a_client_that_failed_carries_nothing_on_once_that_was_heard(files: TensorFiles) -> None:
    journal = Journal(files, {"a": silent})
    run = federation(journal, "a")
    await collected(run, "a", keep=True, deadline_s=0.01)
    run.client_changed(changed("a", "failed", "its process died"))

    assert run.carried == (key("a"),)
    assert shown(await collected(run, "a", keep=True)) == [("a", "client-failed", 0), ("a", "client-failed", 0)]
    assert run.carried == ()
    assert run.outstanding("train") == {}


async def test_who_is_outstanding_when_a_round_begins_is_the_same_when_it_begins_again(files: TensorFiles) -> None:
    journal = Journal(files, dict.fromkeys("abcd", silent))
    carried = [key(name, round_number=0) for name in "abcd"]
    before = federation(journal, *"abcd", carried=carried).outstanding("train")
    journal.accept(TaskResult(key("a", round_number=0), fault=TaskFault("training-failed", "no")))

    run = federation(journal, *"abcd", lost=["b"], failed=["c"], carried=carried)

    assert run.outstanding("train") == before == dict.fromkeys("abcd", 1)
    assert shown(await collected(run, keep=True, deadline_s=0.01)) == [
        ("a", "training-failed", 1),
        ("b", "client-lost", 1),
        ("c", "client-failed", 1),
        ("b", "deadline", 1),
        ("d", "deadline", 1),
    ]


async def test_kept_tasks_can_be_cancelled(files: TensorFiles) -> None:
    journal = Journal(files, {"a": silent, "b": silent, "c": silent})
    run = federation(journal, "a", "b", "c")
    await collected(run, "a", "b", "c", keep=True, deadline_s=0.001)
    journal.clients["c"] = plus(1)
    journal.work(key("c"))

    await run.cancel("train", [ClientName("a")])
    assert run.carried == (key("b"), key("c"))
    await run.cancel("train")
    await run.cancel("train")
    await run.cancel("evaluate")

    assert journal.cancelled == [key("a"), key("b")], "c has answered, so there is nothing to cancel"
    assert run.carried == ()
    journal.clients["a"] = plus(1)
    journal.work(key("a"))
    assert await collected(run, keep=True) == []


async def test_tasks_that_could_not_be_issued_are_not_carried(files: TensorFiles) -> None:
    journal = Journal(files)
    journal.refuses = StoreFailed("writing", "no space left on device")
    run = federation(journal, "a")

    with pytest.raises(StoreFailed):
        await collected(run, "a", keep=True)
    assert run.carried == ()


@pytest.mark.parametrize("code", ["deadline", "client-lost", "client-failed"])
async def test_no_client_speaks_for_the_run(files: TensorFiles, code: str) -> None:
    journal = Journal(files, {"a": silent})
    run = federation(journal, "a", carried=[key("a", round_number=0)])
    journal.accept(TaskResult(key("a", round_number=0), fault=TaskFault(code, "I say so", retryable=True)))

    (answer,) = await collected(run, keep=True)

    assert answer.fault == TaskFault("training-failed", "I say so", retryable=True)


async def test_what_the_store_takes_to_journal_tasks_is_taken_from_no_clients_time(files: TensorFiles) -> None:
    loop = asyncio.get_running_loop()
    deadline_s, back = 0.05, asyncio.Event()
    waited: list[float] = []

    class StoreAway(Journal):
        async def issue(self, tasks: IssueTasks) -> None:
            waited.append(loop.time())
            await back.wait()
            waited.append(loop.time())
            await super().issue(tasks)
            self.clients[tasks.keys[0].client] = plus(1)
            loop.call_later(deadline_s / 10, self.work, tasks.keys[0])

    began = loop.time()
    run = federation(StoreAway(files), "a", "b")
    loop.call_later(3 * deadline_s, back.set)
    both = await asyncio.gather(*(collected(run, name, deadline_s=deadline_s) for name in ("a", "b")))

    assert [shown(answers) for answers in both] == [[("a", None, 0)], [("b", None, 0)]]
    assert 0 <= run.elapsed_s <= loop.time() - began - (max(waited) - min(waited))


async def test_a_rounds_time_begins_with_it(files: TensorFiles) -> None:
    loop = asyncio.get_running_loop()
    run = federation(Journal(files), "a")
    await collected(run, "a", deadline_s=0.01)
    began = loop.time()
    run.enter_round(2)
    elapsed_s = run.elapsed_s

    assert 0 <= elapsed_s <= loop.time() - began
