"""FedAvg: clients train the model for a while, and its successor is the mean of what they come back with."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from hanse.learning.aggregate import Allocate, weighted_mean, with_metadata
from hanse.learning.training import TrainingSettings, training_round
from hanse.learning.workflow import Federation, State
from hanse.model import Update


@dataclass(frozen=True, kw_only=True)
class FedAvg(TrainingSettings):
    """Federated averaging (McMahan et al. 2017, arXiv:1602.05629, Algorithm 1).

    Each round's model is the mean of the clients' models, weighted by their numbers of examples. With a single step of
    gradient descent at each client, it is one step of gradient descent on all data pooled.
    """

    async def round(self, state: State, federation: Federation) -> State:
        """Return the next state: its model is the mean of what clients trained from *state*'s."""
        return await training_round(self, state, federation, aggregate=take_mean, config=self.config)


def take_mean(state: State, updates: Sequence[Update], allocate: Allocate) -> State:
    """Return *state* with the mean of *updates* as its model: the ``Aggregate`` of FedAvg."""
    return replace(state, model=with_metadata(weighted_mean(updates, allocate), state.model))
