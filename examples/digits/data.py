"""Handwritten digits (8 x 8 pixels, ten classes, 1,797 of them; they come with scikit-learn), split among sites.

A fifth is held out and the same for everybody, so that any two models can be compared on it. The rest is shared out
label by label, in proportions drawn from a Dirichlet distribution: at its concentration of 0.3 a site has many examples
of some digits, few of others, and none of at least one. All of it follows from fixed seeds.
"""

from dataclasses import dataclass
from functools import cache
from itertools import count

import numpy as np
import numpy.typing as npt
from sklearn.datasets import load_digits

CLASSES = 10
HELD_OUT = 0.2
CONCENTRATION = 0.3
SEED = 1


@dataclass(frozen=True)
class Examples:
    """Images as rows of 64 numbers from 0 to 1, and the digit that each shows."""

    images: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: npt.NDArray[np.int64]) -> "Examples":
        return Examples(self.images[rows], self.labels[rows])


def held_out() -> Examples:
    """Return the examples on which nobody trains."""
    return _split()[1]


def pooled() -> Examples:
    """Return all examples to train on: what no site of a federation has."""
    return _split()[0]


def share(partition: int, partitions: int) -> Examples:
    """Return share number *partition* (from 0) of the *partitions* into which the training examples fall."""
    if not 0 <= partition < partitions:
        raise ValueError(f"partition is {partition}; expected 0 to {partitions - 1}")
    return pooled()[_shares(partitions)[partition]]


@cache
def _split() -> tuple[Examples, Examples]:
    digits = load_digits()
    examples = Examples((digits.data / 16.0).astype(np.float32), digits.target.astype(np.int64))
    order = np.random.default_rng(SEED).permutation(len(examples))
    held = int(len(examples) * HELD_OUT)
    return examples[order[held:]], examples[order[:held]]


@cache
def _shares(partitions: int) -> tuple[npt.NDArray[np.int64], ...]:
    """Return the rows of each share: of the first draw in which none is tiny and each lacks a digit."""
    labels = pooled().labels
    if partitions == 1:
        return (np.arange(len(labels)),)
    smallest = max(1, len(labels) // (10 * partitions))
    for attempt in count():
        shares = _draw(labels, partitions, np.random.default_rng([SEED, partitions, attempt]))
        if all(len(rows) >= smallest and len(np.unique(labels[rows])) < CLASSES for rows in shares):
            return shares
    raise AssertionError("count() does not end")


def _draw(
    labels: npt.NDArray[np.int64], partitions: int, rng: np.random.Generator
) -> tuple[npt.NDArray[np.int64], ...]:
    parts: list[list[npt.NDArray[np.int64]]] = [[] for _ in range(partitions)]
    for label in range(CLASSES):
        rows = rng.permutation(np.flatnonzero(labels == label))
        proportions = rng.dirichlet(np.full(partitions, CONCENTRATION))
        cuts = np.round(np.cumsum(proportions)[:-1] * len(rows)).astype(np.int64)
        for part, piece in zip(parts, np.split(rows, cuts), strict=True):
            part.append(piece)
    return tuple(np.sort(np.concatenate(part)) for part in parts)
