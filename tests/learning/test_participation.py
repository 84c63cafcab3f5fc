import asyncio
import math
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hanse.errors import JobInvalid, TooFewClients
from hanse.ids import ClientName
from hanse.learning.aggregate import BLOCK, weighted_mean
from hanse.learning.local import LocalFederation
from hanse.learning.participation import Collection, Participation, Taken, Verdict, checked, collect
from hanse.learning.workflow import Answer, Task, rng_for
from hanse.model import Array, Model, Update

from .clients import Client, adding, counted, failing, faulty, model, name, returning, update

TRAIN = Task("train", model(0.0))


def sites(count: int) -> list[ClientName]:
    return [name(number) for number in range(1, count + 1)]


def taking(**seconds: float) -> dict[ClientName, float]:
    return {ClientName(client.replace("_", "-")): value for client, value in seconds.items()}


def federation(clients: dict[ClientName, Client], seconds: dict[ClientName, float] | None = None) -> LocalFederation:
    times = seconds or {}
    return LocalFederation(clients, took_s=lambda client, task: times.get(client, 0.0))


# What is declared -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("participation", "clients", "aim", "needed", "selected"),
    [
        (Participation(), 10, 10, 1, 10),
        (Participation(min_clients=3), 10, 10, 3, 10),
        (Participation(fraction=0.5), 10, 5, 1, 5),
        (Participation(fraction=0.7), 10, 7, 1, 7),  # 0.7 * 10 is more than 7 in binary
        (Participation(fraction=0.25), 10, 3, 1, 3),
        (Participation(fraction=0.001), 10, 1, 1, 1),
        (Participation(fraction=0.1, min_clients=4), 10, 4, 4, 4),
        (Participation(fraction=0.5, quorum=0.8), 10, 5, 4, 5),
        (Participation(quorum=1.0), 10, 10, 10, 10),
        (Participation(quorum=1), 10, 10, 1, 10),
        (Participation(fraction=0.2, quorum=6), 10, 6, 6, 6),
        (Participation(min_clients=5, quorum=2), 10, 10, 2, 10),
        (Participation(fraction=0.5, over_selection=0.3), 20, 10, 1, 13),
        (Participation(fraction=0.5, over_selection=0.01), 20, 10, 1, 11),
        (Participation(fraction=0.9, over_selection=1.0), 10, 9, 1, 10),
    ],
)
def test_aim_need_and_selection_follow_from_the_declaration(
    participation: Participation, clients: int, aim: int, needed: int, selected: int
) -> None:
    assert participation.aim(clients) == aim
    assert participation.needed(clients) == needed
    assert participation.selected(clients) == selected


@st.composite
def participations(draw: st.DrawFn) -> Participation:
    quorum = draw(st.none() | st.integers(1, 12) | st.floats(0, 1, exclude_min=True, allow_subnormal=False))
    return Participation(
        fraction=draw(st.floats(0, 1, exclude_min=True, allow_subnormal=False)),
        min_clients=draw(st.integers(1, 12)),
        quorum=quorum,
        over_selection=draw(st.floats(0, 3)),
    )


@given(participations(), st.integers(0, 20))
def test_a_selection_is_large_enough_or_refused(participation: Participation, clients: int) -> None:
    if participation.aim(clients) > clients:
        with pytest.raises(TooFewClients):
            participation.select(sites(clients), rng_for(1, 1))
        return
    chosen = participation.select(sites(clients), rng_for(1, 1))
    assert 1 <= participation.needed(clients) <= participation.aim(clients) <= len(chosen) <= clients
    assert list(chosen) == sorted(set(chosen))
    assert len(chosen) == participation.selected(clients)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("fraction", 0.0),
        ("fraction", 1.1),
        ("fraction", math.nan),
        ("min_clients", 0),
        ("quorum", 0),
        ("quorum", 0.0),
        ("quorum", 1.5),
        ("deadline_s", 0.0),
        ("deadline_s", math.inf),
        ("over_selection", -0.1),
        ("over_selection", math.inf),
    ],
)
def test_value_out_of_range_is_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(JobInvalid, match=f"workflow.{field} is "):
        Participation(**{field: value})  # type: ignore[arg-type]  # the point of the test


def test_selection_depends_on_the_generator_alone_and_not_on_the_order_of_clients() -> None:
    half = Participation(fraction=0.5)
    chosen = half.select(sites(10), rng_for(7, 3, "participation"))
    assert half.select(sites(10)[::-1], rng_for(7, 3, "participation")) == chosen
    assert half.select(sites(10), rng_for(7, 4, "participation")) != chosen


def test_every_client_is_chosen_equally_often() -> None:
    third, rng = Participation(fraction=1 / 3), rng_for(0, 0)
    times = Counter(client for _ in range(3000) for client in third.select(sites(9), rng))
    # 1000 of 3000 expected, with a standard deviation of 26
    assert all(870 < times[client] < 1130 for client in sites(9))


def test_run_with_too_few_clients_is_told_whom_it_has() -> None:
    with pytest.raises(TooFewClients, match=r"only 2 of the 3 .* the run has 2 clients: site-1, site-2"):
        Participation(min_clients=3).select(sites(2), rng_for(0, 0))
    with pytest.raises(TooFewClients, match="the run has 0 clients: none"):
        Participation().select([], rng_for(0, 0))


# Keeping the score ----------------------------------------------------------------------------------------------------


def test_round_without_spare_clients_waits_for_all() -> None:
    collection = Collection(sites(3), aim=3, needed=1)
    assert collection.add(counted(2)) is Taken.COUNTED
    assert collection.add(faulty(1)) is Taken.FAULTY
    assert (collection.verdict, collection.outstanding) == (Verdict.OPEN, (name(3),))
    assert collection.add(counted(3)) is Taken.COUNTED
    assert collection.verdict is Verdict.ENOUGH
    assert list(collection.updates()) == [name(2), name(3)]
    assert collection.faults[name(1)].reason == "out of memory"


def test_round_with_spare_clients_is_decided_by_the_first_and_later_answers_change_nothing() -> None:
    collection = Collection(sites(4), aim=2, needed=2)
    collection.add(counted(4))
    collection.add(counted(2))
    assert collection.is_decided
    before = collection.updates()
    assert collection.add(counted(1)) is Taken.LATE
    assert collection.add(faulty(3)) is Taken.LATE
    assert collection.updates() == before == {name(2): update(2.0), name(4): update(4.0)}
    assert not collection.faults


def test_spare_clients_stand_in_for_faulty_ones() -> None:
    collection = Collection(sites(4), aim=2, needed=2)
    for answer in (faulty(1), faulty(2), counted(3), counted(4)):
        assert not collection.is_decided
        collection.add(answer)
    assert list(collection.updates()) == [name(3), name(4)]


def test_round_fails_as_soon_as_it_cannot_have_enough() -> None:
    collection = Collection(sites(4), aim=4, needed=3)
    collection.add(faulty(3))
    assert not collection.is_decided
    collection.add(faulty(1, "lost"))
    assert collection.verdict is Verdict.FAILED
    assert collection.add(counted(2)) is Taken.LATE
    sentence = r"only 2 of the 3 .*: site-1 \(lost\); site-3 \(out of memory\)$"
    with pytest.raises(TooFewClients, match=sentence):
        collection.updates()


def test_failure_of_many_names_the_first_few() -> None:
    collection = Collection(sites(8), aim=8, needed=2)
    for number in range(1, 8):
        collection.add(faulty(number))
    with pytest.raises(TooFewClients, match=r"site-5 \(out of memory\) and 2 more$"):
        collection.updates()


def test_strangers_and_second_answers_do_not_count() -> None:
    collection = Collection(sites(2), aim=2, needed=2)
    assert collection.add(counted(9)) is Taken.STRANGER
    collection.add(counted(1, 1.0))
    assert collection.add(counted(1, 100.0)) is Taken.LATE
    assert collection.add(faulty(1)) is Taken.LATE
    collection.add(counted(2))
    assert collection.updates()[name(1)] == update(1.0)
    assert not collection.faults


def test_open_round_has_no_result_yet() -> None:
    with pytest.raises(ValueError, match="site-1, site-2 may answer"):
        Collection(sites(2), aim=2, needed=1).updates()


@pytest.mark.parametrize(("aim", "needed"), [(3, 1), (1, 2), (1, 0)])
def test_score_that_cannot_be_is_refused(aim: int, needed: int) -> None:
    with pytest.raises(ValueError, match="does not hold"):
        Collection(sites(2), aim=aim, needed=needed)


@given(st.integers(1, 7), st.data())
def test_verdict_is_what_counting_says_for_any_answers(asked: int, data: st.DataObject) -> None:
    aim = data.draw(st.integers(1, asked))
    needed = data.draw(st.integers(1, aim))
    good = data.draw(st.lists(st.booleans(), min_size=asked, max_size=asked))
    order = data.draw(st.permutations(range(1, asked + 1)))
    collection = Collection(sites(asked), aim=aim, needed=needed)
    updates = faults = 0
    for number in order:
        decided = collection.is_decided
        taken = collection.add(counted(number) if good[number - 1] else faulty(number))
        assert (taken is Taken.LATE) == decided
        updates += taken is Taken.COUNTED
        faults += taken is Taken.FAULTY
        assert updates <= aim
        if asked - faults < needed:
            assert collection.verdict is Verdict.FAILED
        elif updates == aim or updates + faults == asked:
            assert collection.verdict is Verdict.ENOUGH
        else:
            assert collection.verdict is Verdict.OPEN
    assert (collection.verdict is Verdict.ENOUGH) == (sum(good) >= needed)


@given(st.permutations(range(1, 6)))
def test_rounds_result_does_not_depend_on_the_order_of_arrival(order: list[int]) -> None:
    rng = np.random.default_rng(0)
    answers = {
        n: Answer(name(n), Update(Model({"w": rng.normal(size=100).astype(np.float32)}), n)) for n in range(1, 6)
    }
    collection = Collection(sites(5), aim=5, needed=5)
    for number in order:
        collection.add(answers[number])
    in_order = [answer.update for _, answer in sorted(answers.items()) if answer.update is not None]
    assert weighted_mean(tuple(collection.updates().values())) == weighted_mean(in_order)


# Against a federation, on pretended time ------------------------------------------------------------------------------


async def test_collected_updates_come_in_name_order_whoever_was_first() -> None:
    clients = {name(n): adding(float(n)) for n in (1, 2, 3)}
    for times in permutations((1.0, 2.0, 3.0)):
        fed = federation(clients, dict(zip(sites(3), times, strict=True)))
        updates = await collect(fed, TRAIN, Participation())
        assert {client: one.model["w"][0] for client, one in updates.items() if one.model} == {
            name(1): 1.0,
            name(2): 2.0,
            name(3): 3.0,
        }
        assert list(updates) == sites(3)


async def test_straggler_misses_the_deadline_and_the_round_goes_on_with_its_quorum() -> None:
    fed = federation({client: adding(1.0) for client in sites(4)}, taking(site_2=61.0, site_3=60.0))
    updates = await collect(fed, TRAIN, Participation(deadline_s=60.0, quorum=0.75))
    assert list(updates) == [name(1), name(3), name(4)]


async def test_deadline_without_a_quorum_fails_and_names_the_stragglers() -> None:
    fed = federation({client: adding(1.0) for client in sites(3)}, taking(site_2=61.0, site_3=math.inf))
    with pytest.raises(TooFewClients, match=r"site-2 did not answer within 60 s; site-3 was lost"):
        await collect(fed, TRAIN, Participation(deadline_s=60.0, quorum=2))


async def test_lost_client_does_not_hold_up_a_round_that_can_do_without() -> None:
    fed = federation({client: adding(1.0) for client in sites(3)}, taking(site_1=math.inf))
    assert list(await collect(fed, TRAIN, Participation(min_clients=2))) == [name(2), name(3)]


async def test_lost_client_fails_a_round_that_needs_all() -> None:
    fed = federation({client: adding(1.0) for client in sites(3)}, taking(site_1=math.inf))
    with pytest.raises(TooFewClients, match=r"only 2 of the 3 .*: site-1 was lost"):
        await collect(fed, TRAIN, Participation(quorum=1.0))


async def test_over_selected_round_takes_the_fastest_and_cancels_the_rest() -> None:
    called: list[ClientName] = []

    def noting(client: ClientName) -> Client:
        def run(task: Task) -> Update:
            called.append(client)
            return update(1.0)

        return run

    fed = federation({c: noting(c) for c in sites(4)}, taking(site_1=9.0, site_2=1.0, site_3=9.0, site_4=2.0))
    updates = await collect(fed, TRAIN, Participation(fraction=0.5, over_selection=1.0))
    assert list(updates) == [name(2), name(4)]
    assert called == [name(2), name(4)]


async def test_failed_client_is_replaced_by_a_spare_one() -> None:
    fed = federation({name(1): failing, name(2): adding(1.0), name(3): adding(1.0), name(4): adding(1.0)})
    updates = await collect(fed, TRAIN, Participation(fraction=0.5, over_selection=1.0))
    assert list(updates) == [name(2), name(3)]


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        (Update(None, 1), "site-1 sent no model"),
        (Update(model(1.0, 2.0), 1), r"site-1 sent 'w' as float64 \(2,\); the job expects float64 \(1,\)"),
        (Update(Model({"v": np.ones(1)}), 1), "site-1 sent no tensor 'w'"),
        (update(math.nan), "site-1 sent 'w' with NaN in it"),
    ],
)
async def test_update_that_is_not_what_was_asked_for_counts_as_faulty(bad: Update, sentence: str) -> None:
    fed = federation({name(1): returning(bad), name(2): adding(1.0)})
    assert list(await collect(fed, TRAIN, Participation())) == [name(2)]
    with pytest.raises(TooFewClients, match=sentence):
        await collect(fed, TRAIN, Participation(quorum=2))


def test_infinite_numbers_pass_because_masks_are_made_of_them() -> None:
    answer = Answer(name(1), update(-math.inf))
    assert checked(answer, TRAIN) is answer


@pytest.mark.parametrize("position", [0, BLOCK, 2 * BLOCK])
def test_nan_is_found_wherever_it_hides(position: int) -> None:
    array: Array = np.zeros(2 * BLOCK + 1, np.float32)
    answer = Answer(name(1), Update(Model({"w": array}), 1))
    task = Task("train", None)
    assert checked(answer, task) is answer
    array[position] = np.nan
    assert checked(answer, task).fault is not None


def test_evaluations_and_integers_are_not_searched() -> None:
    evaluation = Answer(name(1), Update(None, 3, {"loss": math.nan}))
    assert checked(evaluation, Task("evaluate", model(0.0), expects_model=False)) is evaluation
    counts = Answer(name(1), Update(Model({"w": np.ones(1, np.int64)}), 1))
    assert checked(counts, Task("train", None)) is counts


class Closing:
    """A federation that notes whether what it yields is closed."""

    def __init__(self, answers: Sequence[Answer], *, stuck: bool = False) -> None:
        self.clients = tuple(sites(3))
        self.round, self.seed = 1, 0
        self.closed = asyncio.Event()
        self.waiting = asyncio.Event()
        self._answers, self._stuck = answers, stuck

    def rng(self, *purpose: str) -> np.random.Generator:
        return rng_for(self.seed, self.round, *purpose)

    def allocate(self, spec: object) -> Model:
        raise NotImplementedError

    async def ask(
        self, task: Task, clients: Sequence[ClientName], *, deadline_s: float | None = None
    ) -> AsyncGenerator[Answer, None]:
        try:
            for answer in self._answers:
                yield answer
            if self._stuck:
                self.waiting.set()
                await asyncio.Event().wait()
        finally:
            self.closed.set()


async def test_decided_round_closes_what_is_outstanding_before_it_returns() -> None:
    fed = Closing([counted(2, 1.0), counted(1, 1.0)], stuck=True)
    await collect(fed, TRAIN, Participation(fraction=0.1, quorum=2, over_selection=1.0))
    assert fed.closed.is_set()
    assert not fed.waiting.is_set()


async def test_failed_round_closes_what_is_outstanding() -> None:
    fed = Closing([faulty(1)], stuck=True)
    with pytest.raises(TooFewClients):
        await collect(fed, TRAIN, Participation(quorum=3))
    assert fed.closed.is_set()


async def test_cancelled_round_closes_what_is_outstanding() -> None:
    fed = Closing([counted(1, 1.0)], stuck=True)
    collecting = asyncio.create_task(collect(fed, TRAIN, Participation()))  # awaited below
    await fed.waiting.wait()
    collecting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await collecting
    assert fed.closed.is_set()
