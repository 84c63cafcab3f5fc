"""Folding: many clients' updates become one model, block by block.

The law: ``sum(n_k * w_k) / sum(n_k)`` for each number, in float64, in the order given, divided once at the end, then
rounded to the tensor's own dtype (``bfloat16`` by way of float32), with ``n_k`` the update's weight: its number of
examples, or less where a workflow takes a late one for less. So the same updates in the same order give the
same bytes on every machine; no library that may reorder a sum takes part. Callers give updates in client-name order.

Models may be larger than memory: updates are mapped files, the result lies where ``allocate`` puts it, and what is in
between is two float64 blocks that fit a processor's cache, however many clients and however large the model.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from hanse.errors import WorkflowError
from hanse.messages import Metrics
from hanse.model import Array, Model, ModelSpec, TensorMismatch, Update, check, dtype_named

Block: TypeAlias = npt.NDArray[np.float64]
Allocate: TypeAlias = Callable[[ModelSpec], Model]

BLOCK: Final = 64 * 1024
"""Numbers per block. Two blocks of float64 are 1 MiB: large enough that Python's share of the time is lost in the
noise, small enough that they stay in the cache while clients' numbers stream by."""


class NoUpdates(WorkflowError):
    """There is nothing to take a mean of."""

    code = "no-updates"

    def __init__(self, count: int) -> None:
        got = f"all {count} updates say that no example is behind them" if count else "there are no updates"
        super().__init__(
            f"{got}, so there is nothing to take a mean of; check the data and num_examples at the clients"
        )
        self.count = count


def in_memory(spec: ModelSpec) -> Model:
    """Return a model of *spec* with arrays of undefined content in memory: the plainest ``Allocate``."""
    return Model({name: np.empty(tensor.shape, dtype_named(tensor.dtype)) for name, tensor in spec.items()})


def weighted_mean(updates: Sequence[Update], out: Allocate = in_memory) -> Model:
    """Return the mean of *updates*, each by its weight (``Update.weight``), in arrays from *out*.

    ``sum(n_k * w_k) / sum(n_k)`` per number (McMahan et al. 2017, arXiv:1602.05629, Algorithm 1), as the module's law
    says; names, order, dtypes and shapes are the first update's. Updates without examples are checked, not read.

    Integers are rounded to the nearest, halves to even; those that float64 does not hold (beyond 2**53) lose their last
    digits. Truth values have no mean: a ``bool`` tensor is a mask, and must be the same in every update with examples.

    Raises:
        NoUpdates: *updates* is empty, or no client had an example.
        TensorMismatch: an update has no model, or a tensor's name, dtype, shape (or mask) differs from the first one's.
    """
    contributions = Contributions(updates)
    result = out(contributions.spec)
    for name in contributions.spec:
        contributions.mean_into(result[name], name)
    return result


class Contributions:
    """Updates that have been checked against each other and can be folded tensor by tensor.

    Raises:
        NoUpdates: *updates* is empty, or no client had an example.
        TensorMismatch: an update has no model, or its spec differs from the first one's.
    """

    def __init__(self, updates: Sequence[Update]) -> None:
        models = [_model_of(update) for update in updates]
        for model in models[1:]:
            check(model.spec, models[0].spec)
        weighted = [(model, update.weight) for model, update in zip(models, updates, strict=True)]
        self._weighted = [(model, weight) for model, weight in weighted if weight > 0]
        if not self._weighted:
            raise NoUpdates(len(updates))
        self.spec: ModelSpec = models[0].spec

    def blocks(self, name: str) -> Iterator[tuple[slice, Block]]:
        """Yield the mean of tensor *name* in float64, block by block, each with its place in the flattened tensor.

        A block is the caller's to change until the next one is asked for; then its memory is used again.
        """
        flat = [(model[name].reshape(-1), weight) for model, weight in self._weighted]
        size, total = flat[0][0].size, sum(weight for _, weight in self._weighted)
        sums, terms = np.empty(min(size, BLOCK)), np.empty(min(size, BLOCK))
        for start in range(0, size, BLOCK):
            part = slice(start, min(start + BLOCK, size))
            acc, term = sums[: part.stop - start], terms[: part.stop - start]
            for position, (array, weight) in enumerate(flat):
                into = term if position else acc
                into[...] = array[part]  # a cast and then a product in place are faster than a casting product
                into *= weight
                if position:
                    acc += term
            acc /= total
            yield part, acc

    def mean_into(self, target: Array, name: str) -> None:
        """Write the mean of tensor *name* into *target*, an array of its dtype and shape."""
        if target.dtype == np.bool_:
            self._same_into(target, name)
            return
        flat = target.reshape(-1)
        for part, mean in self.blocks(name):
            write_block(flat, part, mean)

    def _same_into(self, target: Array, name: str) -> None:
        first = self._weighted[0][0][name]
        if any(not np.array_equal(model[name], first) for model, _ in self._weighted[1:]):
            raise TensorMismatch(f"{name!r} as bool with other values than another client; a mask has no mean")
        target[...] = first


def write_block(flat: Array, part: slice, values: Block) -> None:
    """Write *values* (which it may change) into *flat* at *part*, rounded to *flat*'s dtype: integers half to even."""
    if np.issubdtype(flat.dtype, np.integer):
        low, high = _bounds(flat.dtype)
        np.clip(np.rint(values, out=values), low, high, out=values)
    flat[part] = values


def mean_metrics(updates: Sequence[Update]) -> Metrics:
    """Return the mean of each metric over the *updates* that have it, each by its weight.

    Names come in alphabetical order; the sums are exact before they are rounded (``math.fsum``), so the order of
    *updates* does not matter. A metric that only updates without examples have is left out.
    """
    pairs: dict[str, list[tuple[float, float]]] = {}
    for update in updates:
        if update.num_examples:
            for name, value in update.metrics.items():
                pairs.setdefault(name, []).append((value, update.weight))
    return {name: _mean(pairs[name]) for name in sorted(pairs)}


def with_metadata(model: Mapping[str, Array], of: Model) -> Model:
    """Return the arrays of *model*, themselves and not copies, as a model with the metadata *of* another.

    A model's metadata is the job's: what clients put there does not reach the next round.
    """
    return Model(model, of.metadata)


def _mean(pairs: Sequence[tuple[float, float]]) -> float:
    try:
        total = math.fsum(value * weight for value, weight in pairs)
    except (ValueError, OverflowError):  # infinities of both signs, or beyond what a float holds
        total = sum(value * weight for value, weight in pairs)
    return total / sum(weight for _, weight in pairs)


def _model_of(update: Update) -> Model:
    if update.model is None:
        raise TensorMismatch("an update without a model; the mean needs one from every client")
    return update.model


def _bounds(dtype: np.dtype[np.integer]) -> tuple[float, float]:
    limits = np.iinfo(dtype)
    high = float(limits.max)
    # float(2**63 - 1) is 2**63, which an int64 does not hold: the next float below it is the last that fits
    return float(limits.min), high if int(high) <= limits.max else math.nextafter(high, 0)
