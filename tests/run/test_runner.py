"""Driving a workflow from its last committed state to its end."""

import contextlib
import threading
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np
import pytest

from hanse.errors import StoreFailed, TensorDamaged, TooFewClients, WorkflowFailed
from hanse.ids import JobId
from hanse.job import JobSpec, WorkflowSpec
from hanse.learning.cyclic import Cyclic
from hanse.learning.fedavg import FedAvg
from hanse.learning.local import LocalFederation
from hanse.learning.workflow import Federation, State, Task
from hanse.messages import RunSnapshot, StateRef
from hanse.model import Model, TensorSpec
from hanse.run.runner import drive, load_state, store_state
from hanse.storage.models import load_model
from hanse.storage.tensors import TensorFiles

from .journal import Client, Journal, federation

SPEC = JobSpec("tiny", WorkflowSpec("fedavg"), client="app:app", model="model:initial")


def model(value: float, size: int = 3) -> Model:
    return Model({"w": np.full(size, value, np.float32)})


@dataclass
class Counting:
    """Adds one a round, and keeps what it has seen."""

    rounds: int = 3
    raises: Exception | None = None
    returns: Any = None
    done_after: int = 99

    def start(self, initial: Model) -> State:
        return State(initial, extra={"first": initial}, values={"seen": [0]})

    async def round(self, state: State, federation: Federation) -> State:
        assert federation.round == state.round + 1
        if self.raises is not None:
            raise self.raises
        if self.returns is not None:
            return self.returns  # type: ignore[no-any-return]
        number = state.round + 1
        return State(
            Model({"w": state.model["w"] + np.float32(1)}),
            number,
            state.extra,
            {"seen": [*state.values["seen"], number]},  # type: ignore[misc]
            {"accuracy": number / 10},
            done=number >= self.done_after,
        )


async def driven(journal: Journal, workflow: Any, state: StateRef | None = None, **more: Any) -> State:
    return await drive(
        workflow,
        spec=SPEC,
        snapshot=RunSnapshot(JobId("tiny-1"), SPEC, (), state),
        initial=lambda: model(5),
        link=journal,  # type: ignore[arg-type]
        files=journal.files,
        federation=federation(journal, "a", "b"),
        **more,
    )


async def test_every_round_is_committed_the_initial_model_first(files: TensorFiles) -> None:
    journal = Journal(files)

    last = await driven(journal, Counting())

    assert (last.round, last.model, last.values) == (3, model(8), {"seen": [0, 1, 2, 3]})
    assert [state.round for state, _ in journal.commits] == [0, 1, 2, 3]
    assert journal.commits[2][0].metrics == {"accuracy": 0.2}


async def test_a_run_goes_on_from_its_last_committed_state(files: TensorFiles) -> None:
    whole = Journal(files)
    expected = await driven(whole, Counting())
    journal = Journal(files)

    def no_initial_model() -> Model:
        raise AssertionError("a state was committed before")

    last = await drive(
        Counting(),
        spec=SPEC,
        snapshot=RunSnapshot(JobId("tiny-1"), SPEC, (), whole.commits[1][0]),
        initial=no_initial_model,
        link=journal,  # type: ignore[arg-type]
        files=files,
        federation=federation(journal, "a"),
    )

    assert (last.model, last.values, last.extra["first"]) == (expected.model, expected.values, model(5))
    assert [state.round for state, _ in journal.commits] == [2, 3]


async def test_a_round_sees_the_values_of_the_last_one_as_it_does_after_a_crash(files: TensorFiles) -> None:
    seen: list[Any] = []

    class Noting(Counting):
        async def round(self, state: State, federation: Federation) -> State:
            seen.append((state.values, [type(value) for value in state.metrics.values()]))
            return State(state.model, state.round + 1, values={"bounds": (1, 2)}, metrics={"clients": 3})

    journal = Journal(files)
    await driven(journal, Noting(rounds=2))
    stored = msgspec.msgpack.encode(journal.commits[1][0])
    await driven(journal, Noting(rounds=2), msgspec.msgpack.decode(stored, type=StateRef))

    _, undisturbed, after_a_crash = seen
    assert undisturbed == after_a_crash == ({"bounds": [1, 2]}, [float])


@dataclass
class Remembering(Counting):
    """Keeps on itself, too, in how many rounds it was, and in which."""

    def __post_init__(self) -> None:
        self.calls, self.rounds_seen = 0, list[int]()

    async def round(self, state: State, federation: Federation) -> State:
        self.calls += 1
        self.rounds_seen.append(state.round + 1)
        following = await super().round(state, federation)
        return replace(following, values={**following.values, "kept": [self.calls, *self.rounds_seen]})


async def test_what_a_round_keeps_on_the_workflow_is_gone_in_the_next_one_as_after_a_crash(files: TensorFiles) -> None:
    journal, workflow = Journal(files), Remembering()
    undisturbed = await driven(journal, workflow)
    after_a_crash = await driven(Journal(files), Remembering(), journal.commits[1][0])
    on_one_machine = await LocalFederation({}).run(workflow, model(5))

    assert undisturbed.values["kept"] == after_a_crash.values["kept"] == on_one_machine.values["kept"] == [1, 3]
    assert (workflow.calls, workflow.rounds_seen) == (0, [])


async def test_a_workflow_that_cannot_be_copied_fails_with_what_it_holds(files: TensorFiles) -> None:
    workflow = Counting(returns=threading.Lock())

    with pytest.raises(WorkflowFailed, match=r"in round 0: it cannot be copied, as it is for each round \(.*lock"):
        await driven(Journal(files), workflow)


async def test_a_round_that_has_read_a_damaged_state_is_not_committed(files: TensorFiles) -> None:
    class Unlucky(Counting):
        async def round(self, state: State, federation: Federation) -> State:
            for path in files.root.iterdir():
                path.write_bytes(b"?" * path.stat().st_size)
            return await super().round(state, federation)

        def start(self, initial: Model) -> State:
            return State(model(1, size=10_000), values={"seen": [0]})

    journal = Journal(files)

    with pytest.raises(TensorDamaged):
        await driven(journal, Unlucky())
    assert [state.round for state, _ in journal.commits] == [0]


async def test_a_round_that_has_read_a_damaged_answer_is_not_committed(files: TensorFiles) -> None:
    class Unlucky(Counting):
        async def round(self, state: State, federation: Federation) -> State:
            task = Task("train", model(1, size=10_000))
            async with aclosing(federation.ask(task, federation.clients)) as answers:
                async for answer in answers:
                    assert answer.update is not None
            for path in files.root.iterdir():
                if path.read_bytes() == model(2, size=10_000)["w"].tobytes():
                    path.unlink()
            return await super().round(state, federation)

    journal = Journal(files, {"a": lambda key, _: model(2, size=10_000)})

    with pytest.raises(TensorDamaged):
        await drive(
            Unlucky(),
            spec=SPEC,
            snapshot=RunSnapshot(JobId("tiny-1"), SPEC, (), None),
            initial=lambda: model(5),
            link=journal,  # type: ignore[arg-type]
            files=files,
            federation=federation(journal, "a"),
        )
    assert [state.round for state, _ in journal.commits] == [0]


async def test_a_round_whose_disk_failed_is_not_committed_whatever_the_workflow_makes_of_that(
    files: TensorFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = StoreFailed("making room for a tensor", "no space left on device")

    def no_space(size: int) -> None:
        raise full

    class Careless(Counting):
        async def round(self, state: State, federation: Federation) -> State:
            with contextlib.suppress(StoreFailed):
                federation.allocate({"w": TensorSpec("float32", (10_000,))})
            return await super().round(state, federation)

    monkeypatch.setattr(files, "scratch", no_space)
    journal = Journal(files)

    with pytest.raises(StoreFailed) as raised:
        await driven(journal, Careless())
    assert raised.value is full
    assert [state.round for state, _ in journal.commits] == [0]


async def test_a_run_that_was_over_commits_nothing_more(files: TensorFiles) -> None:
    whole = Journal(files)
    await driven(whole, Counting())
    journal = Journal(files)

    assert (await driven(journal, Counting(), whole.commits[-1][0])).round == 3
    assert journal.commits == []


async def test_a_state_that_is_done_ends_the_run(files: TensorFiles) -> None:
    journal = Journal(files)

    assert (await driven(journal, Counting(done_after=2))).round == 2
    assert journal.commits[-1][0].done


async def test_a_run_that_is_asked_to_stop_ends_between_rounds(files: TensorFiles) -> None:
    journal = Journal(files)

    last = await driven(journal, Counting(), is_stopping=lambda: len(journal.commits) == 2)

    assert last.round == 1


async def test_commits_say_who_answered(files: TensorFiles) -> None:
    clients = {name: lambda key, given: Model({"w": given["w"] + np.float32(2)}) for name in ("a", "b")}
    journal = Journal(files, clients)

    last = await driven(journal, FedAvg(rounds=2))

    assert last.model == model(9)
    assert [answered for _, answered in journal.commits] == [(), ("a", "b"), ("a", "b")]


@dataclass
class Leaving:
    """Asks everybody in its first round, takes the first answer of each, and counts what comes from earlier rounds."""

    rounds: int = 3

    def start(self, initial: Model) -> State:
        return State(initial, values={"late": 0})

    async def round(self, state: State, federation: Federation) -> State:
        idle = [client for client in federation.clients if client not in federation.outstanding("train")]
        late = 0
        async with aclosing(federation.ask(Task("train", state.model), idle, keep=True)) as answers:
            async for answer in answers:
                late += answer.staleness
                break
        return State(state.model, state.round + 1, values={"late": state.values["late"] + late})  # type: ignore[operator]


async def test_commits_carry_on_what_was_kept_but_for_the_last(files: TensorFiles) -> None:
    clients = {name: lambda key, given: given for name in ("a", "b")}
    journal = Journal(files, clients)

    last = await driven(journal, Leaving())

    carried = [[(key.round, key.name, key.client) for key in keys] for keys in journal.carried]
    assert carried == [[], [(1, "train", "b")], [(2, "train", "a")], []]
    assert last.values == {"late": 2}


class CommitLost(Exception):
    """The run's process dies where it would commit."""


class WithoutCommit(Journal):
    async def commit(self, state: StateRef, **more: Any) -> None:
        if state.round:
            raise CommitLost
        await super().commit(state, **more)


async def test_a_lap_that_is_run_again_with_a_client_that_had_been_lost_takes_no_model_past_it(
    files: TensorFiles,
) -> None:
    def appending(digit: int) -> Client:
        return lambda key, given: Model({"w": given["w"] * np.float32(10) + np.float32(digit)})

    clients = {"a": appending(1), "b": appending(2), "c": appending(3)}
    journal = WithoutCommit(files, clients)

    async def lap(lost: Sequence[str]) -> State:
        return await drive(
            Cyclic(rounds=1),
            spec=SPEC,
            snapshot=RunSnapshot(JobId("tiny-1"), SPEC, (), None),
            initial=lambda: model(0),
            link=journal,  # type: ignore[arg-type]
            files=files,
            federation=federation(journal, *clients, lost=lost),
        )

    journal.clients = {**clients, "b": lambda key, given: None}
    with pytest.raises(CommitLost):
        await lap(["b"])
    assert [key.client for key in journal.answers] == ["a", "c"]
    journal.clients = clients
    journal.asked.clear()

    with pytest.raises(CommitLost):
        await lap([])

    assert [key.client for key in journal.asked] == ["b", "c"], "a is not asked again"
    last = journal.answers[journal.asked[-1]].update
    assert last is not None
    assert last.model is not None
    assert load_model(last.model, files) == model(123)


@pytest.mark.parametrize(
    ("error", "said"), [(KeyError("w"), "KeyError: 'w'"), (SystemExit("no GPU"), "SystemExit: no GPU")]
)
async def test_what_the_workflows_code_raises_names_workflow_and_round(
    files: TensorFiles, error: BaseException, said: str
) -> None:
    with pytest.raises(WorkflowFailed, match=f"workflow 'fedavg' failed in round 1: {said}") as raised:
        await driven(Journal(files), Counting(raises=error))

    assert raised.value.round_number == 1


@pytest.mark.parametrize("error", [OSError("no data"), SystemExit("no data")])
async def test_what_makes_the_initial_model_fails_in_round_0(files: TensorFiles, error: BaseException) -> None:
    class Broken(Counting):
        def start(self, initial: Model) -> State:
            raise error

    with pytest.raises(WorkflowFailed, match=f"in round 0: {type(error).__name__}: no data"):
        await driven(Journal(files), Broken())


async def test_the_workflows_own_refusals_pass_as_they_are(files: TensorFiles) -> None:
    class Lonely(Counting):
        async def round(self, state: State, federation: Federation) -> State:
            raise TooFewClients(got=1, needed=2, why="site-1 was lost")

    with pytest.raises(TooFewClients):
        await driven(Journal(files), Lonely())


@pytest.mark.parametrize("returned", ["no state", State(model(1), 0), State(model(1), 7)])
async def test_what_is_no_next_state_is_a_failure(files: TensorFiles, returned: Any) -> None:
    journal = Journal(files)

    with pytest.raises(WorkflowFailed, match=r"round\(\) returned"):
        await driven(journal, Counting(returns=returned))
    assert [state.round for state, _ in journal.commits] == [0]


async def test_the_servers_refusal_to_commit_ends_the_run(files: TensorFiles) -> None:
    journal = Journal(files)
    journal.refuses = StoreFailed("committing a round", "no space left on device")

    with pytest.raises(StoreFailed):
        await driven(journal, Counting())


def test_a_state_is_the_same_when_it_is_read_again(files: TensorFiles) -> None:
    state = State(
        model(1, size=10_000),
        4,
        {"moment": model(2), "big": model(3, size=10_000)},
        {"rate": 0.5, "names": ["a"], "nested": {"deep": True}},
        {"loss": 0.25},
        done=True,
    )

    assert load_state(store_state(state, files), files) == state
