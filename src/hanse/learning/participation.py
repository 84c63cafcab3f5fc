"""Who takes part in a round and when the round has enough: a declared contract.

A run has *n* clients. A round *aims* at some number of updates, *selects* that many clients and some to spare, and
*needs* a number below which it fails. ``Participation`` says how the three follow from what a job declares, what
becomes of answers that come too late, and who is asked again or instead when a client fails; ``Collection`` keeps the
score for one round, as a value without clock or loop; ``collect`` plays the one against a ``Federation``. An answer
does one of these: it counts; it is faulty (it failed, was lost, missed the deadline, or its tensors are not what was
asked for) for good or for now; it is late (the round was decided before it came); or it is a stranger's.
"""

import asyncio
import math
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from enum import StrEnum
from fractions import Fraction
from typing import Final, Literal

import numpy as np

from hanse.errors import JobInvalid, TooFewClients, UpdateRejected
from hanse.ids import ClientName
from hanse.learning.aggregate import BLOCK
from hanse.learning.workflow import (
    CLIENT_FAILED,
    CLIENT_LOST,
    DEADLINE,
    LONGEST_WAIT_S,
    Answer,
    Federation,
    Task,
)
from hanse.messages import TaskFault
from hanse.model import Array, Model, TensorMismatch, Update, check

_SHOWN: Final = 5


@dataclass(frozen=True, slots=True)
class Selection:
    """Whom a round asks, in name order, and who stands in for those that drop out, first come first."""

    asked: tuple[ClientName, ...]
    reserve: tuple[ClientName, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Participation:
    """How many of a run's clients a round asks, waits for, and needs.

    With *n* clients in the run, ``aim(n)`` is ``fraction`` of them, rounded up, but at least ``min_clients`` and at
    least a ``quorum`` given as a number. ``selected(n)`` clients are asked: the aim and ``over_selection`` of it to
    spare. The round is decided as soon as

    - the aim is reached: what the others still do is late;
    - everybody has answered, or ``deadline_s`` is over, and at least ``needed(n)`` updates have come;
    - so many have failed that ``needed(n)`` cannot come any more: the round fails at once with ``TooFewClients``.

    Nobody waits for more than that. Before a client that is lost, refuses or fails is given up, ``retries`` and
    ``substitutes`` say who is asked again, and who instead.

    Which answers count depends on who is fast when there is a deadline or over-selection that makes itself felt;
    otherwise a round's result depends on the seed and the data alone.

    Raises:
        JobInvalid: a field is out of range; the error names it.
    """

    fraction: float = 1.0
    """The share of the run's clients to aim at, above 0 and at most 1."""

    min_clients: int = 1
    """The fewest clients that a round aims at; a run with fewer clients fails in its first round."""

    quorum: float | int | None = None
    """The fewest updates that a round goes on with. A whole number counts updates; a fraction above 0 and at most 1
    (``1.0`` too) is a share of the aim, rounded up. By default ``min_clients``: a run outlives the loss of clients as
    long as it would have started without them."""

    deadline_s: float = LONGEST_WAIT_S
    """Seconds from asking until those that have not answered are given up; by default a day."""

    over_selection: float = 0.0
    """How many more clients than the aim are asked, as a share of the aim, rounded up: 0.3 asks 13 for 10."""

    late: Literal["drop", "next", "discount"] = "drop"
    """What becomes of the answers that come after the round was decided. ``drop`` cancels their tasks. With the others
    the clients work on, are asked nothing new meanwhile, and their answers count in the round in which they come, as
    any other: with ``next`` fully, with ``discount`` by their weight divided by the square root of one more than the
    rounds that they are late (Nguyen et al. 2022, arXiv:2106.06639)."""

    max_staleness: int = 1
    """How many rounds late an answer may be, 1 or more; a task that is older is cancelled, and its client is free for
    another. It matters unless ``late`` is ``drop``."""

    retries: int = 0
    """How often in a round a client is asked again: one whose task failed for a reason that may pass (a full disk, a
    broken line), or one that was lost, whose task waits for it until the deadline."""

    substitutes: int = 0
    """How many clients that were not selected may stand in for others that are lost, refuse or fail; they are asked, in
    an order that the seed gives, whenever fewer than the aim are left who could answer."""

    def __post_init__(self) -> None:
        _expect(0 < self.fraction <= 1, "fraction", self.fraction, "more than 0 and at most 1")
        _expect(self.min_clients >= 1, "min_clients", self.min_clients, "1 or more")
        if isinstance(self.quorum, float):
            _expect(0 < self.quorum <= 1, "quorum", self.quorum, "a share above 0 and at most 1, or a whole number")
        elif self.quorum is not None:
            _expect(self.quorum >= 1, "quorum", self.quorum, "1 or more, or a share such as 0.8")
        _expect(0 < self.deadline_s < math.inf, "deadline_s", self.deadline_s, "more than 0 seconds, and an end")
        _expect(0 <= self.over_selection < math.inf, "over_selection", self.over_selection, "0 or more")
        _expect(self.late in ("drop", "next", "discount"), "late", self.late, "'drop', 'next' or 'discount'")
        _expect(self.max_staleness >= 1, "max_staleness", self.max_staleness, "1 or more")
        _expect(self.retries >= 0, "retries", self.retries, "0 or more")
        _expect(self.substitutes >= 0, "substitutes", self.substitutes, "0 or more")

    def aim(self, clients: int) -> int:
        """Return how many updates a round of a run with so many *clients* wants."""
        counted = self.quorum if isinstance(self.quorum, int) else 0
        return max(_share(self.fraction, clients), self.min_clients, counted)

    def needed(self, clients: int) -> int:
        """Return how many updates a round of a run with so many *clients* must have."""
        if isinstance(self.quorum, float):
            return _share(self.quorum, self.aim(clients))
        return self.min_clients if self.quorum is None else self.quorum

    def selected(self, clients: int) -> int:
        """Return how many clients a round of a run with so many *clients* asks."""
        aim = self.aim(clients)
        return min(clients, aim + _share(self.over_selection, aim))

    def select(self, clients: Sequence[ClientName], rng: np.random.Generator) -> Selection:
        """Return those of *clients* that a round asks, and who may stand in: each equally likely, by *rng* alone.

        Raises:
            TooFewClients: the run has fewer clients than a round aims at.
        """
        ordered, aim = sorted(clients), self.aim(len(clients))
        if len(ordered) < aim:
            why = f"the run has {len(ordered)} clients: {_listed(ordered) or 'none'}"
            raise TooFewClients(got=len(ordered), needed=aim, why=why)
        drawn = [ordered[position] for position in rng.permutation(len(ordered))]
        selected = self.selected(len(ordered))
        return Selection(tuple(sorted(drawn[:selected])), tuple(drawn[selected : selected + self.substitutes]))

    def discounted(self, answer: Answer) -> Answer:
        """Return *answer* as it counts: with ``late`` as ``discount``, a late one for less."""
        if self.late != "discount" or answer.update is None or not answer.staleness:
            return answer
        discount = answer.update.discount / math.sqrt(1 + answer.staleness)
        return replace(answer, update=replace(answer.update, discount=discount))


class Taken(StrEnum):
    """What became of an answer."""

    COUNTED = "counted"
    FAULTY = "faulty"
    AWAITED = "awaited"
    AGAIN = "again"
    LATE = "late"
    STRANGER = "stranger"


class Verdict(StrEnum):
    """Where a round stands."""

    OPEN = "open"
    ENOUGH = "enough"
    FAILED = "failed"


class Collection:
    """The score of one round: who was asked, who answered what, whom to ask next, and whether that decides it.

    *asked* are to be asked, and *busy* still have a task of an earlier round whose answer counts in this one.
    *aim*, *needed* and *retries* are ``Participation``'s, and *reserve* are its substitutes;
    ``1 <= needed <= aim <= len(asked | busy)``. Once decided, it stays as it is.

    A client is in one of these ways: it may answer; it is away (lost, and may come back); its update counts; or it is
    faulty. Of a lost client an update counts even when it was given up, as long as the round is open.
    """

    def __init__(
        self,
        asked: Iterable[ClientName],
        *,
        aim: int,
        needed: int,
        retries: int = 0,
        reserve: Iterable[ClientName] = (),
        busy: Iterable[ClientName] = (),
    ) -> None:
        at_work = frozenset(busy)
        self._due = sorted(frozenset(asked) - at_work)
        self._taking_part = {*self._due, *at_work}
        if not 1 <= needed <= aim <= len(self._taking_part):
            count = len(self._taking_part)
            raise ValueError(f"1 <= needed ({needed}) <= aim ({aim}) <= asked ({count}) does not hold")
        self._aim, self._needed, self._retries = aim, needed, retries
        self._reserve = deque(client for client in reserve if client not in self._taking_part)
        self._counted: dict[ClientName, Answer] = {}
        self._faults: dict[ClientName, TaskFault] = {}
        self._away: set[ClientName] = set()
        self._tries: Counter[ClientName] = Counter()

    def add(self, answer: Answer) -> Taken:
        """Take *answer* into account; a late one, a client's second one and a stranger's change nothing."""
        client = answer.client
        if client not in self._taking_part:
            return Taken.STRANGER
        if self.is_decided or client in self._counted:
            return Taken.LATE
        before = self._faults.get(client)
        if answer.fault is not None:
            return Taken.LATE if before is not None else self._add_fault(client, answer.fault)
        if answer.update is None or (before is not None and before.code != CLIENT_LOST):
            return Taken.LATE
        self._faults.pop(client, None)
        self._away.discard(client)
        self._counted[client] = answer
        return Taken.COUNTED

    def _add_fault(self, client: ClientName, fault: TaskFault) -> Taken:
        if fault.code == DEADLINE:  # there is no time left to ask anybody
            self._reserve.clear()
            self._due.clear()
        taken = self._second_chance(client, fault)
        if taken is Taken.FAULTY:
            self._away.discard(client)
            self._faults[client] = fault
        self._call_substitutes()
        return taken

    def _second_chance(self, client: ClientName, fault: TaskFault) -> Taken:
        may_pass = fault.code == CLIENT_LOST or (fault.retryable and fault.code not in (DEADLINE, CLIENT_FAILED))
        if not may_pass or self._tries[client] == self._retries:
            return Taken.FAULTY
        self._tries[client] += 1
        if fault.code == CLIENT_LOST:
            self._away.add(client)
            return Taken.AWAITED
        self._away.discard(client)
        self._due.append(client)
        return Taken.AGAIN

    def _call_substitutes(self) -> None:
        while self._reserve and len(self._taking_part) - len(self._faults) - len(self._away) < self._aim:
            substitute = self._reserve.popleft()
            self._taking_part.add(substitute)
            self._due.append(substitute)

    @property
    def has_due(self) -> bool:
        """Whether somebody is to be asked now."""
        return bool(self._due) and not self.is_decided

    def take_due(self) -> tuple[ClientName, ...]:
        """Return whom to ask now, each once: at first those that are asked at all, later some again or instead."""
        due, self._due = tuple(self._due), []
        return due

    @property
    def taking_part(self) -> tuple[ClientName, ...]:
        """Those whose answers count, in name order: asked at first or later, whatever became of them."""
        return tuple(sorted(self._taking_part))

    @property
    def outstanding(self) -> tuple[ClientName, ...]:
        """Those that have not answered, and may, in name order."""
        return tuple(sorted(self._taking_part - self._counted.keys() - self._faults.keys()))

    @property
    def verdict(self) -> Verdict:
        """Where the round stands."""
        if len(self._counted) >= self._aim:
            return Verdict.ENOUGH
        possible = len(self._taking_part) - len(self._faults)
        if possible < self._needed:
            return Verdict.FAILED
        return Verdict.ENOUGH if possible == len(self._counted) else Verdict.OPEN

    @property
    def is_decided(self) -> bool:
        """Whether further answers change nothing."""
        return self.verdict is not Verdict.OPEN

    @property
    def faults(self) -> Mapping[ClientName, TaskFault]:
        """The faulty ones and why, in name order."""
        return dict(sorted(self._faults.items()))

    def updates(self) -> dict[ClientName, Update]:
        """Return the updates that count, in client-name order, whatever the order of arrival was.

        Raises:
            TooFewClients: the round failed; the sentence names who did not answer, and why.
        """
        counted = self.counted()
        return {client: answer.update for client, answer in counted.items() if answer.update is not None}

    def counted(self) -> dict[ClientName, Answer]:
        """Return the answers that count, those with the updates.

        Raises:
            TooFewClients: the round failed; the sentence names who did not answer, and why.
        """
        match self.verdict:
            case Verdict.OPEN:
                raise ValueError(f"the round is still open: {_listed(self.outstanding)} may answer")
            case Verdict.FAILED:
                why = _listed([_told(client, fault) for client, fault in self.faults.items()], separator="; ")
                first, fault = next(iter(self._faults.items()))
                got = len(self._taking_part) - len(self._faults)
                raise TooFewClients(got=got, needed=self._needed, why=why, client=first, cause=fault.code)
            case Verdict.ENOUGH:
                return dict(sorted(self._counted.items()))


async def collect(
    federation: Federation,
    task: Task,
    participation: Participation,
    *,
    among: Sequence[ClientName] | None = None,
) -> dict[ClientName, Update]:
    """Ask *task* of the clients that *participation* selects; return the updates that count, in client-name order.

    It selects *among* the given clients, by default all of the run. Whoever is outstanding when the round is decided,
    also by this being cancelled, is late.

    Raises:
        TooFewClients: the round cannot have the updates that it needs; the sentence names who did not answer, and why.
    """
    clients = federation.clients if among is None else tuple(among)
    needed = participation.needed(len(clients))
    selection = participation.select(clients, federation.rng("participation", task.name))
    collection = Collection(
        selection.asked,
        aim=participation.aim(len(clients)),
        needed=needed,
        retries=participation.retries,
        reserve=selection.reserve,
        busy=await outstanding_at_most(federation, task.name, participation.max_staleness),
    )
    try:
        await ask_until_decided(
            federation,
            task,
            collection,
            deadline_s=participation.deadline_s,
            then=lambda: at_deadline(needed, len(collection.taking_part)),
            as_it_counts=participation.discounted,
        )
    finally:
        if participation.late == "drop":
            await federation.cancel(task.name)
    return collection.updates()


async def ask_until_decided(
    federation: Federation,
    task: Task,
    collection: Collection,
    *,
    deadline_s: float,
    then: Callable[[], str],
    as_it_counts: Callable[[Answer], Answer] = lambda answer: answer,
) -> None:
    """Ask *task*, to keep, of whomever *collection* wants to be asked, and add the answers until it is decided.

    *deadline_s* is for all of it, and *then* says what happens then. Kept tasks that are outstanding stay so.
    """
    began_s = federation.elapsed_s
    while True:
        left_s = max(deadline_s - (federation.elapsed_s - began_s), 0.0)
        asking = ask_checked(federation, task, collection.take_due(), deadline_s=left_s, then=then(), keep=True)
        async with aclosing(asking) as answers:
            async for answer in answers:
                collection.add(as_it_counts(answer))
                if collection.is_decided or collection.has_due:
                    break
        if not collection.has_due:
            return


async def outstanding_at_most(federation: Federation, name: str, max_staleness: int) -> tuple[ClientName, ...]:
    """Return who has an outstanding task *name* at most *max_staleness* rounds old, having cancelled the older ones."""
    ages = federation.outstanding(name)
    if stale := [client for client, staleness in ages.items() if staleness > max_staleness]:
        await federation.cancel(name, stale)
    return tuple(client for client in ages if client not in stale)


def at_deadline(needed: int, of: int) -> str:
    """Return what happens at the deadline of a round that goes on with the answers of so many of its clients."""
    clients = "client" if of == 1 else "clients"
    return f"the round goes on with the answers of at least {needed} of its {of} {clients}, and fails with fewer"


async def ask_checked(
    federation: Federation,
    task: Task,
    clients: Sequence[ClientName],
    *,
    deadline_s: float = LONGEST_WAIT_S,
    then: str = "",
    keep: bool = False,
) -> AsyncGenerator[Answer, None]:
    """Ask as ``federation.ask`` does, and yield a fault in place of each update that is not what *task* asks for.

    That is one without a model, one with other tensors than ``task.model``, and one that holds a NaN: a client whose
    training diverged must not spoil everybody's model. Close it as ``Federation.ask`` says.
    """
    async with aclosing(federation.ask(task, clients, deadline_s=deadline_s, then=then, keep=keep)) as answers:
        async for answer in answers:
            # in a thread, because looking through a large update would hold up the loop
            yield await asyncio.to_thread(checked, answer, task)


def checked(answer: Answer, task: Task) -> Answer:
    """Return *answer*, or the fault that stands for it when its update is not what *task* asked for."""
    if answer.update is None or not task.expects_model:
        return answer
    why = _objection(answer.update.model, task.model)
    if why is None:
        return answer
    rejected = UpdateRejected(answer.client, why)
    return Answer(answer.client, None, TaskFault(rejected.code, rejected.reason), answer.staleness)


def _objection(got: Model | None, expected: Model | None) -> str | None:
    if got is None:
        return "no model; the task asks for one"
    if expected is not None:
        try:
            check(got.spec, expected.spec)
        except TensorMismatch as mismatch:
            return str(mismatch)
    for name, array in got.items():
        if array.dtype.kind not in "biu" and _has_nan(array):
            return f"{name!r} with NaN in it, so its training has diverged; lower the learning rate"
    return None


def _has_nan(array: Array) -> bool:
    flat = array.reshape(-1)  # block by block, because isnan makes an array as long as what it looks at
    return any(bool(np.isnan(flat[start : start + BLOCK]).any()) for start in range(0, flat.size, BLOCK))


def _share(share: float, of: int) -> int:
    # Through the decimal that a person wrote: 0.7 * 10 is 7.000000000000001 in binary, and would round up to 8.
    return math.ceil(Fraction(repr(float(share))) * of)


def _expect(holds: bool, name: str, got: object, expected: str) -> None:
    if not holds:
        raise JobInvalid(f"workflow.{name}", got=got, expected=expected)


def _told(client: ClientName, fault: TaskFault) -> str:
    return fault.reason if fault.reason.startswith(f"{client} ") else f"{client} ({fault.reason})"


def _listed(items: Sequence[str], *, separator: str = ", ") -> str:
    shown = separator.join(items[:_SHOWN])
    return shown if len(items) <= _SHOWN else f"{shown} and {len(items) - _SHOWN} more"
