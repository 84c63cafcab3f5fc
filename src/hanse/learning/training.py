"""One round of training: ask, fold, measure; what FedAvg and its kin share.

``TrainingSettings`` are their settings. ``training_round`` is their round: it asks the task ``train`` as the settings'
participation says, lets an ``Aggregate`` make the next state of the updates, and every so often asks ``evaluate`` of
the new model. The algorithms differ in their ``Aggregate`` and in what they tell clients.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, TypeAlias

from hanse.errors import JobInvalid
from hanse.job import Config
from hanse.learning.aggregate import Allocate, mean_metrics
from hanse.learning.participation import Participation, collect
from hanse.learning.workflow import Federation, State, Task
from hanse.messages import Metrics
from hanse.model import Model, Update

TRAIN: Final = "train"
EVALUATE: Final = "evaluate"

Aggregate: TypeAlias = Callable[[State, Sequence[Update], Allocate], State]
"""From the last state and the updates, in client-name order: a state with the next ``model`` and ``extra``."""


@dataclass(frozen=True, kw_only=True)
class TrainingSettings(Participation):
    """The settings of a workflow that trains in rounds.

    Raises:
        JobInvalid: a field is out of range; the error names it.
    """

    rounds: int = 10
    """How many rounds the run has."""

    config: Config = field(default_factory=dict)
    """What clients' training code reads in ``ctx.config``, over the job's own: epochs, learning rate, batch size."""

    evaluate_every: int = 0
    """Every so many rounds, and after the last, clients evaluate the new model; 0 never asks them to. Clients that
    still train for a late answer are left out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounds < 1:
            raise JobInvalid("workflow.rounds", got=self.rounds, expected="1 or more")
        if self.evaluate_every < 0:
            raise JobInvalid("workflow.evaluate_every", got=self.evaluate_every, expected="0 or more")

    def start(self, model: Model) -> State:
        """Return the state of round 0."""
        return State(model)

    def is_evaluated(self, round_number: int) -> bool:
        """Return whether the model that round *round_number* makes is evaluated by clients."""
        if not self.evaluate_every:
            return False
        return round_number % self.evaluate_every == 0 or round_number == self.rounds


async def training_round(
    settings: TrainingSettings, state: State, federation: Federation, *, aggregate: Aggregate, config: Config
) -> State:
    """Return the state after *state*: clients trained its model with *config*, and *aggregate* made the next one.

    Its metrics are ``round_metrics`` of the training, and the weighted means of what clients measured when they
    evaluated the new model, with ``eval_`` in front.

    Raises:
        TooFewClients: the settings' participation is not met.
        NoUpdates: no client had an example.
    """
    updates = await collect(federation, Task(TRAIN, state.model, config), settings)
    ordered = tuple(updates.values())
    # in a thread, because the arithmetic would hold up heartbeats
    following = await asyncio.to_thread(aggregate, state, ordered, federation.allocate)
    metrics = round_metrics(ordered)
    if settings.is_evaluated(state.round + 1):
        busy = federation.outstanding(TRAIN)
        idle = [client for client in federation.clients if client not in busy]
        task = Task(EVALUATE, following.model, config, expects_model=False)
        answers = await collect(federation, task, _evaluation(settings, len(idle)), among=idle)
        measured = mean_metrics(tuple(answers.values()))
        metrics |= {f"eval_{name}": value for name, value in measured.items()}
    return replace(following, round=state.round + 1, metrics=metrics)


def _evaluation(settings: TrainingSettings, clients: int) -> Participation:
    """Return how *clients* of the run evaluate: as they train, but that nobody wants to know of late answers."""
    quorum = min(settings.quorum, clients) if isinstance(settings.quorum, int) else settings.quorum
    return replace(settings, late="drop", min_clients=min(settings.min_clients, clients), quorum=quorum)


def round_metrics(updates: Sequence[Update]) -> Metrics:
    """Return the weighted means of what clients measured, and ``clients`` and ``num_examples`` of the whole.

    These two names are the round's own: they say how many updates and examples it is made of, so that a round which
    went on without some clients shows it. A client's metric of the same name is not seen.
    """
    total = sum(update.num_examples for update in updates)
    return {**mean_metrics(updates), "clients": float(len(updates)), "num_examples": float(total)}
