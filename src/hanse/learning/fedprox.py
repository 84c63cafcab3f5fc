"""FedProx: FedAvg whose clients are held near the model that they received.

What holds them is a term of the local objective, so the server only tells clients how strong it is, and their training
code adds its gradient: ``proximal_gradient``.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from hanse.errors import JobInvalid
from hanse.learning.fedavg import take_mean
from hanse.learning.training import TrainingSettings, training_round
from hanse.learning.workflow import Federation, State
from hanse.model import Array

PROXIMAL_MU = "proximal_mu"
"""The name under which clients find ``FedProx.proximal_mu`` in ``ctx.config``."""


@dataclass(frozen=True, kw_only=True)
class FedProx(TrainingSettings):
    """FedAvg with a proximal term (Li et al. 2020, arXiv:1812.06127, Algorithm 2).

    Clients minimise ``F_k(w) + proximal_mu / 2 * ||w - w_received||**2``. That is theirs to do: a client whose code
    does not read ``proximal_mu`` trains as in FedAvg.
    """

    proximal_mu: float = 0.01
    """How strongly clients are held, 0 or more; 0 is FedAvg. The paper tries 0.001 to 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.proximal_mu < math.inf:
            raise JobInvalid("workflow.proximal_mu", got=self.proximal_mu, expected="0 or more")

    async def round(self, state: State, federation: Federation) -> State:
        """Return the next state, as FedAvg does; clients are told ``proximal_mu`` in their task's config."""
        config = {**self.config, PROXIMAL_MU: self.proximal_mu}
        return await training_round(self, state, federation, aggregate=take_mean, config=config)


def proximal_gradient(weights: Mapping[str, Array], received: Mapping[str, Array], mu: float) -> dict[str, Array]:
    """Return the gradient of ``mu / 2 * ||weights - received||**2``, which is ``mu * (weights - received)``.

    It has the names, shapes and dtypes of *weights*, and no entry for a tensor without a gradient (integers, masks).
    Add it to the loss's own gradient in each local step.
    """
    return {
        name: (array - received[name]) * np.asarray(mu, array.dtype)
        for name, array in weights.items()
        if array.dtype.kind not in "biu"
    }
