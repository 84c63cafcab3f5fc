import asyncio
import math
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace
from itertools import permutations
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hanse.errors import JobInvalid, TooFewClients
from hanse.ids import ClientName
from hanse.learning.aggregate import BLOCK, weighted_mean
from hanse.learning.local import LocalFederation
from hanse.learning.participation import Collection, Participation, Taken, Verdict, checked, collect
from hanse.learning.workflow import LONGEST_WAIT_S, Answer, Task, rng_for
from hanse.model import Array, Model, Update

from .clients import Client, adding, counted, failing, faulty, lost, model, name, returning, too_late, transient, update

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
        substitutes=draw(st.integers(0, 5)),
    )


@given(participations(), st.integers(0, 20))
def test_a_selection_is_large_enough_or_refused(participation: Participation, clients: int) -> None:
    if participation.aim(clients) > clients:
        with pytest.raises(TooFewClients):
            participation.select(sites(clients), rng_for(1, 1))
        return
    selection = participation.select(sites(clients), rng_for(1, 1))
    chosen = selection.asked
    assert 1 <= participation.needed(clients) <= participation.aim(clients) <= len(chosen) <= clients
    assert list(chosen) == sorted(set(chosen))
    assert len(chosen) == participation.selected(clients)
    assert len(selection.reserve) == min(participation.substitutes, clients - len(chosen))
    assert len({*chosen, *selection.reserve}) == len(chosen) + len(selection.reserve)


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
        ("late", "sometimes"),
        ("max_staleness", 0),
        ("retries", -1),
        ("substitutes", -1),
    ],
)
def test_value_out_of_range_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(JobInvalid, match=f"workflow.{field} is "):
        Participation(**{field: value})  # type: ignore[arg-type]  # the point of the test


def test_selection_depends_on_the_generator_alone_and_not_on_the_order_of_clients() -> None:
    half = Participation(fraction=0.5)
    chosen = half.select(sites(10), rng_for(7, 3, "participation"))
    assert half.select(sites(10)[::-1], rng_for(7, 3, "participation")) == chosen
    assert half.select(sites(10), rng_for(7, 4, "participation")) != chosen


def test_substitutes_come_in_the_order_of_the_draw_and_change_nothing_of_who_is_asked() -> None:
    alone = Participation(fraction=0.3)
    with_two, with_many = (replace(alone, substitutes=number) for number in (2, 100))
    draws = [each.select(sites(10), rng_for(7, 3)) for each in (alone, with_two, with_many)]
    assert draws[0].asked == draws[1].asked == draws[2].asked
    assert draws[0].reserve == ()
    assert draws[1].reserve == draws[2].reserve[:2]
    assert sorted([*draws[2].asked, *draws[2].reserve]) == sorted(sites(10))


def test_every_client_is_chosen_equally_often() -> None:
    third, rng = Participation(fraction=1 / 3), rng_for(0, 0)
    times = Counter(client for _ in range(3000) for client in third.select(sites(9), rng).asked)
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


# Asked again, and asked instead ---------------------------------------------------------------------------------------


def test_client_whose_fault_may_pass_is_asked_again_as_often_as_declared() -> None:
    collection = Collection(sites(2), aim=2, needed=1, retries=2)
    assert collection.take_due() == (name(1), name(2))
    assert collection.take_due() == ()
    assert collection.add(counted(2)) is Taken.COUNTED
    for _ in range(2):
        assert not collection.has_due
        assert collection.add(transient(1)) is Taken.AGAIN
        assert collection.has_due
        assert collection.take_due() == (name(1),)
        assert collection.outstanding == (name(1),)
    assert collection.add(transient(1)) is Taken.FAULTY
    assert (collection.verdict, list(collection.updates())) == (Verdict.ENOUGH, [name(2)])


def test_fault_that_will_not_pass_is_final() -> None:
    collection = Collection(sites(1), aim=1, needed=1, retries=2)
    assert collection.add(faulty(1)) is Taken.FAULTY
    assert (collection.verdict, collection.has_due) == (Verdict.FAILED, False)


def test_lost_client_is_waited_for_as_often_as_declared_and_counts_when_it_is_back() -> None:
    collection = Collection(sites(3), aim=3, needed=2, retries=1)
    collection.take_due()
    assert collection.add(lost(1)) is Taken.AWAITED
    assert collection.add(lost(2)) is Taken.AWAITED
    assert collection.add(counted(3)) is Taken.COUNTED
    assert (collection.verdict, collection.has_due) == (Verdict.OPEN, False), "its task waits for it; nobody asks again"
    assert collection.add(counted(1)) is Taken.COUNTED
    assert collection.add(lost(2)) is Taken.FAULTY
    assert list(collection.updates()) == [name(1), name(3)]


def test_lost_client_that_was_given_up_counts_as_long_as_the_round_is_open() -> None:
    collection = Collection(sites(3), aim=3, needed=1)
    assert collection.add(lost(1)) is Taken.FAULTY
    assert collection.add(lost(1)) is Taken.LATE
    assert collection.add(counted(1)) is Taken.COUNTED
    assert not collection.faults
    collection.add(lost(2))
    collection.add(counted(3))
    assert collection.is_decided
    assert collection.add(counted(2)) is Taken.LATE
    assert list(collection.updates()) == [name(1), name(3)]


def test_lost_client_that_comes_back_and_fails_has_used_up_its_chance() -> None:
    collection = Collection(sites(2), aim=2, needed=1, retries=1)
    collection.add(lost(1))
    assert collection.add(transient(1)) is Taken.FAULTY
    assert collection.add(counted(1)) is Taken.LATE


def test_deadline_ends_all_waiting_and_asking() -> None:
    collection = Collection(sites(4), aim=4, needed=1, retries=3, reserve=[name(5)])
    collection.take_due()
    collection.add(counted(1))
    collection.add(lost(2))
    assert collection.take_due() == (name(5),)
    collection.add(transient(3))
    for number in (2, 3, 4, 5):
        assert not collection.is_decided
        assert collection.add(too_late(number)) is Taken.FAULTY
        assert not collection.has_due
    assert list(collection.updates()) == [name(1)]


def test_substitutes_stand_in_in_their_order_for_those_that_are_gone() -> None:
    collection = Collection(sites(3), aim=3, needed=3, reserve=[name(9), name(4), name(7)])
    collection.take_due()
    assert collection.add(faulty(2)) is Taken.FAULTY
    assert collection.take_due() == (name(9),)
    assert collection.add(counted(9)) is Taken.COUNTED
    collection.add(lost(1))
    assert collection.take_due() == (name(4),)
    collection.add(faulty(4))
    assert collection.take_due() == (name(7),)
    collection.add(counted(7))
    collection.add(counted(3))
    assert list(collection.updates()) == [name(3), name(7), name(9)]
    assert collection.taking_part == tuple(name(number) for number in (1, 2, 3, 4, 7, 9))


def test_substitute_stands_in_for_a_lost_client_that_is_still_hoped_for() -> None:
    collection = Collection(sites(2), aim=2, needed=2, retries=1, reserve=[name(3)])
    collection.take_due()
    collection.add(lost(1))
    assert collection.take_due() == (name(3),)
    collection.add(lost(1))
    assert collection.take_due() == (), "one for one"
    collection.add(counted(1))
    collection.add(counted(2))
    assert list(collection.updates()) == [name(1), name(2)]


def test_clients_to_spare_come_before_substitutes() -> None:
    collection = Collection(sites(4), aim=3, needed=3, reserve=[name(5)])
    collection.take_due()
    collection.add(faulty(1))
    assert not collection.has_due
    collection.add(faulty(2))
    assert collection.take_due() == (name(5),)


def test_round_fails_when_the_substitutes_are_used_up() -> None:
    collection = Collection(sites(1), aim=1, needed=1, reserve=[name(2)])
    collection.add(faulty(1))
    assert not collection.is_decided
    collection.add(faulty(2, "out of memory too"))
    with pytest.raises(TooFewClients, match=r"site-1 \(out of memory\); site-2 \(out of memory too\)$"):
        collection.updates()


def test_busy_clients_are_not_asked_and_take_part() -> None:
    collection = Collection(sites(2), aim=2, needed=1, retries=1, reserve=[name(5), name(6)], busy=[name(2), name(5)])
    assert collection.take_due() == (name(1),)
    assert collection.outstanding == (name(1), name(2), name(5))
    assert collection.add(transient(2)) is Taken.AGAIN
    assert collection.take_due() == (name(2),), "its old task has failed, so it is free for this round's"
    collection.add(faulty(1))
    assert not collection.has_due
    collection.add(faulty(5))
    assert collection.take_due() == (name(6),)


class Scoring(RuleBasedStateMachine):
    """Whatever comes, and in whatever order: a client counts once, the score never waits when it is decided, and ends.

    ``working`` are those with a task, as a federation would know them, and ``gone`` those of them that are lost.
    """

    @initialize(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        asked = data.draw(st.sets(st.integers(1, 6), min_size=1))
        busy = data.draw(st.sets(st.integers(1, 8)))
        self.aim = data.draw(st.integers(1, len(asked | busy)))
        self.needed = data.draw(st.integers(1, self.aim))
        self.retries = data.draw(st.integers(0, 2))
        self.reserve = data.draw(st.lists(st.integers(7, 9), unique=True))
        self.collection = Collection(
            [name(each) for each in asked],
            aim=self.aim,
            needed=self.needed,
            retries=self.retries,
            reserve=[name(each) for each in self.reserve],
            busy=[name(each) for each in busy],
        )
        self.working = {name(each) for each in busy}
        self.times_asked: Counter[ClientName] = Counter()
        self.counted: set[ClientName] = set()
        self.decided: Verdict | None = None
        self._ask()

    def _ask(self) -> None:
        """Do as ``collect`` does: ask whoever is due, until the round is decided."""
        if not self.collection.has_due:
            return
        due = self.collection.take_due()
        assert len(set(due)) == len(due)
        assert not self.working & set(due), "nobody is asked who works on a task already"
        assert not self.counted & set(due)
        self.times_asked.update(due)
        self.working |= set(due)

    def _add(self, answer: Answer) -> Taken:
        before = self.collection.verdict
        taken = self.collection.add(answer)
        if before is not Verdict.OPEN:
            assert taken in (Taken.LATE, Taken.STRANGER)
            assert self.collection.verdict is before
        if taken is Taken.COUNTED:
            assert answer.client not in self.counted
            self.counted.add(answer.client)
        self._ask()
        return taken

    def _some_worker(self, data: st.DataObject) -> int:
        return int(data.draw(st.sampled_from(sorted(self.working))).removeprefix("site-"))

    @precondition(lambda self: self.working)
    @rule(data=st.data())
    def answers(self, data: st.DataObject) -> None:
        number = self._some_worker(data)
        self.working.discard(name(number))
        self._add(counted(number))

    @precondition(lambda self: self.working)
    @rule(data=st.data(), fault=st.sampled_from([faulty, transient]))
    def fails(self, data: st.DataObject, fault: Callable[[int], Answer]) -> None:
        number = self._some_worker(data)
        self.working.discard(name(number))
        self._add(fault(number))

    @precondition(lambda self: self.working)
    @rule(data=st.data())
    def is_lost(self, data: st.DataObject) -> None:
        self._add(lost(self._some_worker(data)))

    @rule(number=st.integers(1, 10), answer=st.sampled_from([counted, faulty, lost]))
    def somebody_says_something_again(self, number: int, answer: Callable[[int], Answer]) -> None:
        if name(number) in self.counted or number == 10:
            assert self._add(answer(number)) in (Taken.LATE, Taken.STRANGER)

    @rule()
    def time_is_up(self) -> None:
        for client in sorted(self.working):
            self._add(too_late(int(client.removeprefix("site-"))))
        assert self.collection.is_decided

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "collection"):
            return
        collection = self.collection
        assert len(self.counted) <= self.aim
        assert all(times <= 1 + self.retries for times in self.times_asked.values())
        assert not (collection.is_decided and collection.has_due)
        gone = set(collection.faults)
        possible = set(collection.taking_part) - gone
        assert set(collection.outstanding) == possible - self.counted
        match collection.verdict:
            case Verdict.OPEN:
                assert len(self.counted) < self.aim
                assert self.needed <= len(possible)
                assert self.working & set(collection.outstanding), "there is somebody to wait for"
            case Verdict.ENOUGH:
                assert set(collection.updates()) == self.counted
                assert self.needed <= len(self.counted)
                assert len(self.counted) == self.aim or self.counted == possible
            case Verdict.FAILED:
                assert len(possible) < self.needed
                with pytest.raises(TooFewClients):
                    collection.updates()


TestScoring = Scoring.TestCase


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


class Scripted:
    """A federation whose asks yield what a test says, one list an ask; it notes what it was asked."""

    def __init__(self, *asks: Sequence[Answer], clients: int = 3, stuck: bool = False) -> None:
        self.clients = tuple(sites(clients))
        self.round, self.seed, self.elapsed_s = 1, 0, 0.0
        self.asked: list[tuple[tuple[ClientName, ...], float, str]] = []
        self.cancelled: list[str] = []
        self.closed = asyncio.Event()
        self.waiting = asyncio.Event()
        self._asks, self._stuck = list(asks), stuck

    def rng(self, *purpose: str) -> np.random.Generator:
        return rng_for(self.seed, self.round, *purpose)

    def allocate(self, spec: object) -> Model:
        raise NotImplementedError

    def outstanding(self, name: str) -> dict[ClientName, int]:
        return {}

    async def cancel(self, name: str, clients: object = None) -> None:
        assert self.closed.is_set()
        self.cancelled.append(name)

    async def ask(
        self,
        task: Task,
        clients: Sequence[ClientName],
        *,
        deadline_s: float = LONGEST_WAIT_S,
        then: str = "",
        keep: bool = False,
    ) -> AsyncGenerator[Answer, None]:
        assert keep
        self.asked.append((tuple(clients), deadline_s, then))
        self.elapsed_s += 10.0
        try:
            for answer in self._asks.pop(0):
                yield answer
            if self._stuck:
                self.waiting.set()
                await asyncio.Event().wait()
        finally:
            self.closed.set()


async def test_decided_round_closes_what_is_outstanding_before_it_returns() -> None:
    fed = Scripted([counted(2, 1.0), counted(1, 1.0)], stuck=True)
    await collect(fed, TRAIN, Participation(fraction=0.1, quorum=2, over_selection=1.0))
    assert fed.cancelled == ["train"]
    assert not fed.waiting.is_set()


async def test_failed_round_closes_what_is_outstanding() -> None:
    fed = Scripted([faulty(1)], stuck=True)
    with pytest.raises(TooFewClients):
        await collect(fed, TRAIN, Participation(quorum=3))
    assert fed.cancelled == ["train"]


async def test_cancelled_round_closes_what_is_outstanding() -> None:
    fed = Scripted([counted(1, 1.0)], stuck=True)
    collecting = asyncio.create_task(collect(fed, TRAIN, Participation()))  # awaited below
    await fed.waiting.wait()
    collecting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await collecting
    assert fed.cancelled == ["train"]


@pytest.mark.parametrize("late", ["next", "discount"])
async def test_nothing_is_cancelled_where_late_answers_count(late: Literal["next", "discount"]) -> None:
    fed = Scripted([counted(2, 1.0), counted(1, 1.0)], stuck=True)
    await collect(fed, TRAIN, Participation(fraction=0.1, quorum=2, over_selection=1.0, late=late))
    assert fed.cancelled == []


async def test_round_says_how_long_it_waits_and_what_happens_then() -> None:
    fed = Scripted([transient(1)], [faulty(3)], [counted(1), counted(2), counted(4)], clients=5)
    three_of_four = Participation(fraction=0.6, quorum=2, retries=1, substitutes=1, deadline_s=60.0)
    fed.rng = lambda *purpose: rng_for(16, 1)  # type: ignore[method-assign]
    selection = three_of_four.select(fed.clients, fed.rng())
    assert (selection.asked, selection.reserve) == ((name(1), name(2), name(3)), (name(4),)), "or another seed"

    await collect(fed, TRAIN, three_of_four)

    assert fed.asked == [
        (
            selection.asked,
            60.0,
            "the round goes on with the answers of at least 2 of its 3 clients, and fails with fewer",
        ),
        ((name(1),), 50.0, "the round goes on with the answers of at least 2 of its 3 clients, and fails with fewer"),
        ((name(4),), 40.0, "the round goes on with the answers of at least 2 of its 4 clients, and fails with fewer"),
    ]


async def test_federation_that_answers_for_too_few_is_no_reason_to_ask_for_ever() -> None:
    with pytest.raises(ValueError, match="the round is still open: site-2, site-3 may answer"):
        await collect(Scripted([counted(1)]), TRAIN, Participation())
