"""FedOpt: the clients' mean change is taken for a gradient, and an optimizer at the server makes the step.

One round (Reddi et al. 2021, arXiv:2003.00295, Algorithm 2), with ``x`` the model and ``x_k`` what client k trained::

    delta = sum(n_k * x_k) / sum(n_k) - x
    x    += step(delta, moments)

Clients weigh as much as their examples, as in FedAvg (in the paper's listing all weigh the same). The members of the
family differ in ``step``, which works on blocks in float64. What it remembers, its moments, lies in ``State.extra``
beside the model, in float32 (float64 for float64 tensors), and is read from there even in a run that was not
interrupted: so a resumed one makes the same steps. A moment that the state does not hold yet has its initial value.

Integer and ``bool`` tensors have no gradient: they are averaged as in FedAvg.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import numpy as np

from hanse.errors import JobInvalid
from hanse.learning.aggregate import Allocate, Block, Contributions, write_block
from hanse.learning.training import TrainingSettings, training_round
from hanse.learning.workflow import Federation, State
from hanse.model import Array, Model, ModelSpec, TensorSpec, Update, check

MOMENTUM: Final = "momentum"
SECOND_MOMENT: Final = "second_moment"

_POSITIVE: Final = "more than 0"
_DECAY: Final = "0 or more and less than 1"


@dataclass(frozen=True, kw_only=True)
class FedOpt(TrainingSettings, ABC):
    """A member of the family: its settings, what it remembers, and its step."""

    server_learning_rate: float = 1.0
    """The server's learning rate (eta), above 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _expect(0 < self.server_learning_rate < math.inf, "server_learning_rate", self.server_learning_rate, _POSITIVE)

    async def round(self, state: State, federation: Federation) -> State:
        """Return the next state: one step of the server's optimizer along the clients' mean change."""
        aggregate = partial(make_step, self)
        return await training_round(self, state, federation, aggregate=aggregate, config=self.config)

    @property
    @abstractmethod
    def initial_moments(self) -> Mapping[str, float]:
        """The moments by name, as in ``State.extra``, with the value that each begins with everywhere."""

    @abstractmethod
    def step(self, delta: Block, moments: Mapping[str, Block]) -> Block:
        """Return what to add to the model for the pseudo-gradient *delta*.

        The arrays of *moments* hold those of the last round and are changed in place to this round's.
        """


def make_step(optimizer: FedOpt, state: State, updates: Sequence[Update], allocate: Allocate) -> State:
    """Return *state* with the model and the moments after one step of *optimizer*: the ``Aggregate`` of the family.

    Raises:
        NoUpdates: no client had an example.
        TensorMismatch: an update's tensors are not those of the state's model.
    """
    contributions = Contributions(updates)
    spec, initial = state.model.spec, optimizer.initial_moments
    check(contributions.spec, spec)
    arrays = dict(allocate(spec))
    moment_spec = _moment_spec(spec)
    extra = {moment: allocate(moment_spec) for moment in initial}
    for name, target in arrays.items():
        if name not in moment_spec:
            contributions.mean_into(target, name)
            continue
        before, after = state.model[name].reshape(-1), target.reshape(-1)
        old = {moment: _flat(state.extra.get(moment), name) for moment in initial}
        new = {moment: extra[moment][name].reshape(-1) for moment in initial}
        for part, delta in contributions.blocks(name):
            current = before[part].astype(np.float64)
            delta -= current
            moments = {moment: _block(old[moment], part, initial[moment]) for moment in initial}
            current += optimizer.step(delta, moments)
            write_block(after, part, current)
            for moment, values in moments.items():
                write_block(new[moment], part, values)
    return replace(state, model=Model(arrays, state.model.metadata), extra={**state.extra, **extra})


@dataclass(frozen=True, kw_only=True)
class FedAvgM(FedOpt):
    """FedAvg with momentum at the server (Hsu et al. 2019, arXiv:1909.06335).

    ``m = momentum * m + delta; x += server_learning_rate * m``, with ``m`` 0 at first. Without momentum and with a
    learning rate of 1 it is FedAvg.
    """

    momentum: float = 0.9
    """How much of the last step's direction is kept, from 0 to below 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _expect(0 <= self.momentum < 1, "momentum", self.momentum, _DECAY)

    @property
    def initial_moments(self) -> Mapping[str, float]:
        """The momentum, from 0."""
        return {MOMENTUM: 0.0}

    def step(self, delta: Block, moments: Mapping[str, Block]) -> Block:
        """Return the step for *delta*."""
        first = moments[MOMENTUM]
        first *= self.momentum
        first += delta
        return self.server_learning_rate * first


@dataclass(frozen=True, kw_only=True)
class Adaptive(FedOpt):
    """What FedAdagrad, FedAdam and FedYogi share: all of Algorithm 2 but the second moment.

    ``m = beta_1 * m + (1 - beta_1) * delta; v = second(v, delta**2); x += server_learning_rate * m / (sqrt(v) + tau)``,
    with ``m`` 0 and ``v`` ``tau**2`` at first, and no correction of bias.
    """

    server_learning_rate: float = 0.1
    """The server's learning rate (eta), above 0; worth tuning: the paper tries powers of the square root of 10."""

    beta_1: float = 0.9
    """The decay of the first moment, from 0 to below 1; the default is the paper's."""

    tau: float = 1e-3
    """The degree of adaptivity, above 0: the smaller, the more each number's step depends on its own past."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _expect(0 <= self.beta_1 < 1, "beta_1", self.beta_1, _DECAY)
        _expect(0 < self.tau < math.inf, "tau", self.tau, _POSITIVE)

    @property
    def initial_moments(self) -> Mapping[str, float]:
        """Both moments with what they begin with; the paper asks that ``v`` begin at ``tau**2`` or more."""
        return {MOMENTUM: 0.0, SECOND_MOMENT: self.tau**2}

    def along(self, delta: Block, moments: Mapping[str, Block]) -> Block:
        """Return the step for *delta*, given that the second moment is already this round's."""
        first = moments[MOMENTUM]
        first *= self.beta_1
        first += (1 - self.beta_1) * delta
        step = self.server_learning_rate * first
        step /= np.sqrt(moments[SECOND_MOMENT]) + self.tau
        return step


@dataclass(frozen=True, kw_only=True)
class FedAdagrad(Adaptive):
    """Adagrad at the server: ``second(v, d) = v + d``."""

    beta_1: float = 0.0
    """The decay of the first moment, from 0 to below 1; Adagrad as such has none."""

    def step(self, delta: Block, moments: Mapping[str, Block]) -> Block:
        """Return the step for *delta*."""
        second = moments[SECOND_MOMENT]
        second += delta**2
        return self.along(delta, moments)


@dataclass(frozen=True, kw_only=True)
class FedAdam(Adaptive):
    """Adam at the server: ``second(v, d) = beta_2 * v + (1 - beta_2) * d``."""

    beta_2: float = 0.99
    """The decay of the second moment, from 0 to below 1; the default is the paper's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _expect(0 <= self.beta_2 < 1, "beta_2", self.beta_2, _DECAY)

    def step(self, delta: Block, moments: Mapping[str, Block]) -> Block:
        """Return the step for *delta*."""
        second = moments[SECOND_MOMENT]
        second *= self.beta_2
        second += (1 - self.beta_2) * delta**2
        return self.along(delta, moments)


@dataclass(frozen=True, kw_only=True)
class FedYogi(Adaptive):
    """Yogi at the server: ``second(v, d) = v - (1 - beta_2) * d * sign(v - d)``."""

    beta_2: float = 0.99
    """The decay of the second moment, from 0 to below 1; the default is the paper's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _expect(0 <= self.beta_2 < 1, "beta_2", self.beta_2, _DECAY)

    def step(self, delta: Block, moments: Mapping[str, Block]) -> Block:
        """Return the step for *delta*."""
        second, squared = moments[SECOND_MOMENT], delta**2
        second -= (1 - self.beta_2) * squared * np.sign(second - squared)
        return self.along(delta, moments)


def _moment_spec(spec: ModelSpec) -> dict[str, TensorSpec]:
    return {
        name: TensorSpec("float64" if tensor.dtype == "float64" else "float32", tensor.shape)
        for name, tensor in spec.items()
        if "float" in tensor.dtype
    }


def _flat(moment: Model | None, name: str) -> Array | None:
    return None if moment is None else moment[name].reshape(-1)


def _block(flat: Array | None, part: slice, initial: float) -> Block:
    return np.full(part.stop - part.start, initial) if flat is None else flat[part].astype(np.float64)


def _expect(holds: bool, name: str, got: object, expected: str) -> None:
    if not holds:
        raise JobInvalid(f"workflow.{name}", got=got, expected=expected)
