"""Who takes part in a round and when the round has enough: a declared contract.

A run has *n* clients. A round *aims* at some number of updates, *selects* that many clients and some to spare, and
*needs* a number below which it fails. ``Participation`` says how the three follow from what a job declares;
``Collection`` keeps the score for one round, as a value without clock or loop; ``collect`` plays the one against a
``Federation``. An answer does one of four things: it counts, it is faulty (it failed, was lost, missed the deadline,
or its tensors are not what was asked for), it is late (the round was decided before it came), or it is a stranger's.
"""

import asyncio
import math
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction
from typing import Final

import numpy as np

from hanse.errors import JobInvalid, TooFewClients, UpdateRejected
from hanse.ids import ClientName
from hanse.learning.aggregate import BLOCK
from hanse.learning.workflow import LONGEST_WAIT_S, Answer, Federation, Task
from hanse.messages import TaskFault
from hanse.model import Array, Model, TensorMismatch, Update, check

_SHOWN: Final = 5


@dataclass(frozen=True, kw_only=True)
class Participation:
    """How many of a run's clients a round asks, waits for, and needs.

    With *n* clients in the run, ``aim(n)`` is ``fraction`` of them, rounded up, but at least ``min_clients`` and at
    least a ``quorum`` given as a number. ``selected(n)`` clients are asked: the aim and ``over_selection`` of it to
    spare. The round is decided as soon as

    - the aim is reached: the others are cancelled, and their answers are late;
    - everybody has answered, or ``deadline_s`` is over, and at least ``needed(n)`` updates have come;
    - so many have failed that ``needed(n)`` cannot come any more: the round fails at once with ``TooFewClients``.

    Nobody waits for more than that, and without a deadline a round waits for as long as a client lives.

    Which answers count depends on who is fast when there is a deadline or over-selection; without both, a round's
    result depends on the seed and the data alone.

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
    """Seconds from the beginning until those that have not answered are given up; by default a day."""

    over_selection: float = 0.0
    """How many more clients than the aim are asked, as a share of the aim, rounded up: 0.3 asks 13 for 10."""

    def __post_init__(self) -> None:
        _expect(0 < self.fraction <= 1, "fraction", self.fraction, "more than 0 and at most 1")
        _expect(self.min_clients >= 1, "min_clients", self.min_clients, "1 or more")
        if isinstance(self.quorum, float):
            _expect(0 < self.quorum <= 1, "quorum", self.quorum, "a share above 0 and at most 1, or a whole number")
        elif self.quorum is not None:
            _expect(self.quorum >= 1, "quorum", self.quorum, "1 or more, or a share such as 0.8")
        _expect(0 < self.deadline_s < math.inf, "deadline_s", self.deadline_s, "more than 0 seconds, and an end")
        _expect(0 <= self.over_selection < math.inf, "over_selection", self.over_selection, "0 or more")

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

    def select(self, clients: Sequence[ClientName], rng: np.random.Generator) -> tuple[ClientName, ...]:
        """Return those of *clients* that a round asks, in name order: each equally likely, by *rng* alone.

        Raises:
            TooFewClients: the run has fewer clients than a round aims at.
        """
        ordered, aim = sorted(clients), self.aim(len(clients))
        if len(ordered) < aim:
            why = f"the run has {len(ordered)} clients: {_listed(ordered) or 'none'}"
            raise TooFewClients(got=len(ordered), needed=aim, why=why)
        chosen = rng.permutation(len(ordered))[: self.selected(len(ordered))]
        return tuple(ordered[position] for position in sorted(chosen))


class Taken(StrEnum):
    """What became of an answer."""

    COUNTED = "counted"
    FAULTY = "faulty"
    LATE = "late"
    STRANGER = "stranger"


class Verdict(StrEnum):
    """Where a round stands."""

    OPEN = "open"
    ENOUGH = "enough"
    FAILED = "failed"


class Collection:
    """The score of one round: who was asked, who answered what, and whether that decides it.

    *aim* and *needed* are ``Participation``'s; ``1 <= needed <= aim <= len(asked)``. Once decided, it stays as it is.
    """

    def __init__(self, asked: Iterable[ClientName], *, aim: int, needed: int) -> None:
        self._asked = frozenset(asked)
        if not 1 <= needed <= aim <= len(self._asked):
            raise ValueError(f"1 <= needed ({needed}) <= aim ({aim}) <= asked ({len(self._asked)}) does not hold")
        self._aim, self._needed = aim, needed
        self._updates: dict[ClientName, Update] = {}
        self._faults: dict[ClientName, TaskFault] = {}

    def add(self, answer: Answer) -> Taken:
        """Take *answer* into account; a late one, a client's second one and a stranger's change nothing."""
        if answer.client not in self._asked:
            return Taken.STRANGER
        if self.is_decided or answer.client in self._updates or answer.client in self._faults:
            return Taken.LATE
        if answer.fault is not None:
            self._faults[answer.client] = answer.fault
            return Taken.FAULTY
        if answer.update is not None:  # as it is then, by what an Answer is
            self._updates[answer.client] = answer.update
        return Taken.COUNTED

    @property
    def outstanding(self) -> tuple[ClientName, ...]:
        """Those that have not answered, in name order."""
        return tuple(sorted(self._asked - self._updates.keys() - self._faults.keys()))

    @property
    def verdict(self) -> Verdict:
        """Where the round stands."""
        if len(self._updates) >= self._aim:
            return Verdict.ENOUGH
        possible = len(self._asked) - len(self._faults)
        if possible < self._needed:
            return Verdict.FAILED
        return Verdict.ENOUGH if possible == len(self._updates) else Verdict.OPEN

    @property
    def is_decided(self) -> bool:
        """Whether further answers change nothing."""
        return self.verdict is not Verdict.OPEN

    @property
    def faults(self) -> Mapping[ClientName, TaskFault]:
        """The faulty ones and why, in name order."""
        return dict(sorted(self._faults.items()))

    def updates(self) -> dict[ClientName, Update]:
        """Return what counts, in client-name order, whatever the order of arrival was.

        Raises:
            TooFewClients: the round failed; the sentence names who did not answer, and why.
        """
        match self.verdict:
            case Verdict.OPEN:
                raise ValueError(f"the round is still open: {_listed(self.outstanding)} may answer")
            case Verdict.FAILED:
                why = _listed([_told(client, fault) for client, fault in self.faults.items()], separator="; ")
                raise TooFewClients(got=len(self._asked) - len(self._faults), needed=self._needed, why=why)
            case Verdict.ENOUGH:
                return dict(sorted(self._updates.items()))


async def collect(federation: Federation, task: Task, participation: Participation) -> dict[ClientName, Update]:
    """Ask *task* of the clients that *participation* selects; return the updates that count, in client-name order.

    Whoever is outstanding when the round is decided is cancelled, also when this is.

    Raises:
        TooFewClients: the round cannot have the updates that it needs; the sentence names who did not answer, and why.
    """
    selected = participation.select(federation.clients, federation.rng("participation", task.name))
    total = len(federation.clients)
    collection = Collection(selected, aim=participation.aim(total), needed=participation.needed(total))
    async with aclosing(ask_checked(federation, task, selected, deadline_s=participation.deadline_s)) as answers:
        async for answer in answers:
            collection.add(answer)
            if collection.is_decided:
                break
    return collection.updates()


async def ask_checked(
    federation: Federation, task: Task, clients: Sequence[ClientName], *, deadline_s: float = LONGEST_WAIT_S
) -> AsyncGenerator[Answer, None]:
    """Ask as ``federation.ask`` does, and yield a fault in place of each update that is not what *task* asks for.

    That is one without a model, one with other tensors than ``task.model``, and one that holds a NaN: a client whose
    training diverged must not spoil everybody's model. Close it as ``Federation.ask`` says.
    """
    async with aclosing(federation.ask(task, clients, deadline_s=deadline_s)) as answers:
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
    return Answer(answer.client, fault=TaskFault(rejected.code, rejected.reason))


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
