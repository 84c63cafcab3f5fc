"""Evaluation across clients: each measures the job's model on its own data, and nobody changes it."""

from dataclasses import dataclass, field, replace
from typing import Final

from hanse.errors import JobInvalid
from hanse.job import Config
from hanse.learning.participation import Participation, collect
from hanse.learning.training import EVALUATE, round_metrics
from hanse.learning.workflow import Federation, State, Task
from hanse.model import Model

CLIENTS: Final = "clients"
"""Where ``State.values`` holds what each client measured: ``{client: {"num_examples": n, metric: value}}``."""


@dataclass(frozen=True, kw_only=True)
class Evaluation(Participation):
    """One round in which clients evaluate the initial model, taking part as ``Participation`` says.

    The state's metrics are the means over clients, weighted by their examples; what each client measured stands in the
    state's values. No round follows in which a late answer could count, so ``late`` must be ``drop``.
    """

    config: Config = field(default_factory=dict)
    """What clients' evaluating code reads in ``ctx.config``, over the job's own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.late != "drop":
            raise JobInvalid("workflow.late", got=self.late, expected="'drop', as no round follows")

    @property
    def rounds(self) -> int:
        """One."""
        return 1

    def start(self, model: Model) -> State:
        """Return the state of round 0."""
        return State(model)

    async def round(self, state: State, federation: Federation) -> State:
        """Return *state* with what the clients measured, and done.

        Raises:
            TooFewClients: the participation is not met.
        """
        task = Task(EVALUATE, state.model, self.config, expects_model=False)
        updates = await collect(federation, task, self)
        measured = {
            str(client): {**update.metrics, "num_examples": update.num_examples} for client, update in updates.items()
        }
        return replace(
            state,
            round=state.round + 1,
            values={**state.values, CLIENTS: measured},
            metrics=round_metrics(tuple(updates.values())),
            done=True,
        )
