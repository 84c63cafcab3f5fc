"""Filters: what a site does to its own update before anybody else sees it.

A filter is a callable from the update and the model that the client received to the update that leaves. A site's policy
puts them after the job's code, so they have the last word. What they cannot make safe they refuse by raising; an update
never leaves unfiltered.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from hanse.errors import ConfigError
from hanse.learning.aggregate import BLOCK, Block, write_block
from hanse.model import Array, Model, ModelInvalid, Update, check, dtype_name


class Filter(Protocol):
    """Something that stands between the job's code at a site and the network."""

    def __call__(self, update: Update, received: Model | None) -> Update:
        """Return the update that leaves the site for *update*, which was trained from *received*.

        Neither is changed. What it raises takes the update's place.
        """


def apply(filters: Sequence[Filter], update: Update, received: Model | None) -> Update:
    """Return *update* after *filters*, the first one first."""
    for one in filters:
        update = one(update, received)
    return update


@dataclass(frozen=True)
class NormClip:
    """Scales an update down so that it lies at most ``max_norm`` from the received model.

    ``x + (w - x) * min(1, max_norm / ||w - x||)``, the norm being the L2 norm over all numbers of all floating-point
    tensors together (as in McMahan et al. 2018, arXiv:1710.06963, "flat clipping"), in float64. The bound holds up to
    the rounding of the result to the tensors' dtypes. Other tensors pass as they are, and so does an update that is
    within the bound, to the bit, and one without a model.

    Raises:
        ConfigError: ``max_norm`` is not a positive number.
    """

    max_norm: float

    def __post_init__(self) -> None:
        if not 0 < self.max_norm < math.inf:
            raise ConfigError("max_norm", got=self.max_norm, expected="more than 0")

    def __call__(self, update: Update, received: Model | None) -> Update:
        """Return the clipped update.

        Raises:
            ModelInvalid: there is no received model to measure from, or the distance is not a finite number.
            TensorMismatch: the update's tensors are not the received model's.
        """
        if update.model is None:
            return update
        if received is None:
            raise ModelInvalid("the update was trained from no model, so its distance cannot be clipped")
        check(update.model.spec, received.spec)
        norm = distance(update.model, received)
        if not math.isfinite(norm):
            raise ModelInvalid(f"the update lies {norm} away from the received model, so it cannot be clipped")
        if norm <= self.max_norm:
            return update
        return replace(update, model=_scaled(update.model, received, self.max_norm / norm))


@dataclass(frozen=True)
class Withhold:
    """Keeps tensors at the site: those whose whole name matches the regular expression leave as they were received.

    Raises:
        ConfigError: ``pattern`` is not a regular expression.
    """

    pattern: str

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ConfigError("pattern", got=self.pattern, expected=f"a regular expression ({error})") from error

    def __call__(self, update: Update, received: Model | None) -> Update:
        """Return the update with the received tensors in the matching ones' place.

        Raises:
            ModelInvalid: there is no received model, or it lacks a tensor that is to be withheld.
        """
        if update.model is None:
            return update
        kept = [name for name in update.model if re.fullmatch(self.pattern, name)]
        missing = kept if received is None else [name for name in kept if name not in received]
        if missing:
            raise ModelInvalid(f"tensor {missing[0]!r} may not leave this site, and none was received to stand for it")
        stand_ins = {name: received[name] for name in kept} if received is not None else {}
        return replace(update, model=Model({**update.model, **stand_ins}, update.model.metadata))


def distance(model: Model, received: Model) -> float:
    """Return the L2 norm of *model* - *received* over all floating-point tensors together, in float64."""
    squares = [
        float(np.square(_float64(array, part) - _float64(received[name], part)).sum())
        for name, array in model.items()
        if _is_floating(array)
        for part in _parts(array.size)
    ]
    return math.sqrt(math.fsum(squares))


def _scaled(model: Model, received: Model, factor: float) -> Model:
    arrays = dict(model)
    for name, array in model.items():
        if _is_floating(array):
            arrays[name] = np.empty_like(array)
            flat = arrays[name].reshape(-1)
            for part in _parts(array.size):
                origin = _float64(received[name], part)
                write_block(flat, part, origin + factor * (_float64(array, part) - origin))
    return Model(arrays, model.metadata)


def _is_floating(array: Array) -> bool:
    return "float" in dtype_name(array.dtype)


def _parts(size: int) -> Iterator[slice]:
    return (slice(start, min(start + BLOCK, size)) for start in range(0, size, BLOCK))


def _float64(array: Array, part: slice) -> Block:
    return array.reshape(-1)[part].astype(np.float64)
