"""FedBuff: clients train on without waiting for each other, and every few updates make the server's next step.

One round is one step. At its beginning, the clients that have nothing to do are given the newest model; it ends as soon
as ``buffer_size`` updates have come, whoever sent them and whichever model they were trained on. The others train on
over the rounds that follow: their tasks are kept. An update is a change to the model on which it was trained, and that
model is needed to tell the change: ``State.extra`` holds those that somebody still works on, each once, whether or not
the run was interrupted. None is older than ``max_staleness`` steps, so their number is bounded by that, and by the
number of clients.
"""

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np

from hanse.errors import JobInvalid
from hanse.ids import ClientName
from hanse.job import Config
from hanse.learning.aggregate import BLOCK, Allocate, Block, Contributions, write_block
from hanse.learning.participation import Collection, Participation, ask_until_decided, outstanding_at_most
from hanse.learning.training import TRAIN, round_metrics
from hanse.learning.workflow import LONGEST_WAIT_S, Answer, Federation, State, Task
from hanse.model import Array, Model, Update, check

VERSION: Final = "version-"
"""Before a round's number, the name under which ``State.extra`` holds the model that the round made."""


@dataclass(frozen=True, kw_only=True)
class FedBuff:
    """Federated learning with buffered asynchronous aggregation (Nguyen et al. 2022, arXiv:2106.06639, Algorithm 1).

    With ``x`` the model, ``y_k`` what client k has trained, ``x_k`` the model that it was given for that, and ``s_k``
    how many steps were made in between::

        x += server_learning_rate / K * sum((y_k - x_k) / sqrt(1 + s_k))

    over the ``K`` updates of a step. Each counts the same, whatever its number of examples, but for its staleness; one
    without examples does not count. Integer and ``bool`` tensors have no change to speak of: they are averaged as in
    FedAvg.

    The paper gives a client a new task whenever it has answered. Here it gets the next step's model with the next step:
    where organisations take part, and not phones, a step is not long in coming, and all that a round does follows from
    the state and the answers.

    Which updates make a step depends on who is fast; a step that is interrupted takes the same ones again, in the order
    in which the server accepted them. Clients are not asked to evaluate, as they would have to stop training for it:
    an ``evaluation`` of the final model is a job of its own.

    Raises:
        JobInvalid: a field is out of range; the error names it.
    """

    rounds: int = 10
    """How many steps of the server the run has."""

    buffer_size: int = 2
    """How many updates make a step (K), at least ``min_clients``; a run with fewer clients fails in its first step. By
    default the fewest with which a step is more than one client's doing."""

    concurrency: int = 0
    """How many clients train at the same time, enough for a step, drawn from the job's seed; 0 is all."""

    server_learning_rate: float = 1.0
    """The server's learning rate (eta), above 0."""

    max_staleness: int = 10
    """How many steps old a model may be that a client still works on, 1 or more. Older tasks are cancelled, and their
    clients get the newest model; by default when what they do would count for less than a third."""

    min_clients: int = 1
    """The fewest updates of which a step is made when its time is over, or when nobody is left who could answer."""

    deadline_s: float = LONGEST_WAIT_S
    """Seconds that a step waits for ``buffer_size`` updates; by default a day."""

    retries: int = 0
    """How often in a step a client is asked again whose task failed for a reason that may pass. A lost client's task
    waits for it in any case, but after so many losses a step no longer counts on it."""

    config: Config = field(default_factory=dict)
    """What clients' training code reads in ``ctx.config``, over the job's own."""

    def __post_init__(self) -> None:
        Participation(  # refuses what is out of range
            min_clients=self.min_clients,
            deadline_s=self.deadline_s,
            retries=self.retries,
            max_staleness=self.max_staleness,
        )
        _expect(self.rounds >= 1, "rounds", self.rounds, "1 or more")
        _expect(self.buffer_size >= 1, "buffer_size", self.buffer_size, "1 or more")
        enough = self.concurrency == 0 or self.concurrency >= self.updates_a_step
        _expect(enough, "concurrency", self.concurrency, f"0, or {self.updates_a_step} or more, which make a step")
        rate = self.server_learning_rate
        _expect(0 < rate < math.inf, "server_learning_rate", rate, "more than 0")

    @property
    def updates_a_step(self) -> int:
        """``buffer_size``, but at least ``min_clients``."""
        return max(self.buffer_size, self.min_clients)

    def start(self, model: Model) -> State:
        """Return the state of round 0."""
        return State(model)

    async def round(self, state: State, federation: Federation) -> State:
        """Return the state after the server's next step.

        Its metrics are ``round_metrics`` of the step's updates, and their mean ``staleness``.

        Raises:
            TooFewClients: the run has fewer clients than make a step, or too few of them have answered.
            NoUpdates: no client had an example.
        """
        changes = [
            Change(answer.update, _version(state, answer.staleness), answer.staleness)
            for answer in await self._buffer(state, federation)
            if answer.update is not None
        ]
        rate = self.server_learning_rate
        # in a thread, because the arithmetic would hold up heartbeats
        model = await asyncio.to_thread(make_step, state.model, changes, rate, federation.allocate)
        metrics = round_metrics([change.update for change in changes])
        metrics["staleness"] = sum(change.staleness for change in changes) / len(changes)
        extra = self._versions_in_use(state, federation.outstanding(TRAIN))
        return replace(state, model=model, round=state.round + 1, extra=extra, metrics=metrics)

    async def _buffer(self, state: State, federation: Federation) -> list[Answer]:
        """Return the answers that make this step, in client-name order; at first, idle clients get the newest model."""
        Participation(min_clients=self.updates_a_step).select(
            federation.clients, federation.rng()
        )  # or are they too few
        busy = await outstanding_at_most(federation, TRAIN, self.max_staleness)
        idle = [client for client in federation.clients if client not in busy]
        drawn = [idle[position] for position in federation.rng("idle").permutation(len(idle))]
        # Others may stand in for those that are lost, so there may be more of both than train at a time.
        free = max((self.concurrency or len(federation.clients)) - len(busy), 0)
        collection = Collection(
            drawn[:free],
            aim=self.updates_a_step,
            needed=self.min_clients,
            retries=self.retries,
            reserve=drawn[free:],
            busy=busy,
        )
        then = f"the step is made of what has come, and fails with fewer than {self.min_clients} updates"
        task = Task(TRAIN, state.model, self.config)
        await ask_until_decided(federation, task, collection, deadline_s=self.deadline_s, then=lambda: then)
        return list(collection.counted().values())

    def _versions_in_use(self, state: State, outstanding: Mapping[ClientName, int]) -> dict[str, Model]:
        """Return the models that clients still work on, and that the round after this one's will need."""
        ages = {age for age in outstanding.values() if age < self.max_staleness}
        return {f"{VERSION}{state.round - age}": _version(state, age) for age in sorted(ages, reverse=True)}


@dataclass(frozen=True, slots=True)
class Change:
    """An update, the model on which it was trained, and how many steps were made meanwhile."""

    update: Update
    base: Model
    staleness: int = 0

    @property
    def weight(self) -> float:
        """What the change counts for: ``1 / sqrt(1 + staleness)``."""
        return 1 / math.sqrt(1 + self.staleness)


def make_step(model: Model, changes: Sequence[Change], rate: float, allocate: Allocate) -> Model:
    """Return *model* after one step: ``model + rate / K * sum(weight * (update - base))``, over *changes*.

    In float64, in the order given, block by block, rounded once at the end.

    Raises:
        NoUpdates: no client had an example.
        TensorMismatch: an update's tensors are not those of the model.
    """
    contributions = Contributions([change.update for change in changes])
    check(contributions.spec, model.spec)
    arrays = dict(allocate(model.spec))
    counting = [
        (change.update.model, change.base, change.weight)
        for change in changes
        if change.update.num_examples and change.update.model is not None
    ]
    for name, target in arrays.items():
        if target.dtype.kind in "biu":
            contributions.mean_into(target, name)
            continue
        before, after = model[name].reshape(-1), target.reshape(-1)
        flat = [(trained[name].reshape(-1), base[name].reshape(-1), weight) for trained, base, weight in counting]
        for start in range(0, before.size, BLOCK):
            part = slice(start, min(start + BLOCK, before.size))
            step = np.zeros(part.stop - part.start)
            for trained_flat, base_flat, weight in flat:
                step += weight * (_block(trained_flat, part) - _block(base_flat, part))
            step *= rate / len(flat)
            step += _block(before, part)
            write_block(after, part, step)
    return Model(arrays, model.metadata)


def _block(flat: Array, part: slice) -> Block:
    return flat[part].astype(np.float64)


def _version(state: State, staleness: int) -> Model:
    """Return the model that was the newest *staleness* steps before *state*."""
    return state.extra[f"{VERSION}{state.round - staleness}"] if staleness else state.model


def _expect(holds: bool, name: str, got: object, expected: str) -> None:
    if not holds:
        raise JobInvalid(f"workflow.{name}", got=got, expected=expected)
