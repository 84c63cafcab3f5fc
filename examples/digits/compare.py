"""What the federation is worth: the same model trained at each site alone, and on all data pooled.

``python compare.py`` prints it; the demo puts the federated model's accuracy beside it.
"""

import tomllib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data import SEED, Examples, held_out, pooled, share
from hanse import Model
from model import initial, measure, train


@dataclass(frozen=True)
class Comparison:
    """Accuracies on the held-out examples: of each site alone, by its share's number, and of all data pooled."""

    alone: tuple[float, ...]
    pooled: float


def compare(partitions: int) -> Comparison:
    """Return what each of *partitions* shares reaches alone, and all data together, without a federation.

    Each trains as a client of this folder's job does (its learning rate and batch size), and makes as many passes over
    its data as a client makes in the whole job: rounds x local epochs.
    """
    job = tomllib.loads(Path(__file__).with_name("pyproject.toml").read_text(encoding="utf-8"))["tool"]["hanse"]
    config = job["config"]

    def accuracy_after(examples: Examples) -> float:
        trained = train(
            initial(),
            examples,
            epochs=job["workflow"]["rounds"] * config["local_epochs"],
            learning_rate=config["learning_rate"],
            batch_size=config["batch_size"],
            rng=np.random.default_rng(SEED),
        )
        return accuracy(trained)

    return Comparison(
        alone=tuple(accuracy_after(share(number, partitions)) for number in range(partitions)),
        pooled=accuracy_after(pooled()),
    )


def accuracy(model: Model) -> float:
    """Return the part of the held-out examples, 0 to 1, that *model* recognises."""
    return measure(model, held_out())["accuracy"]


if __name__ == "__main__":
    comparison = compare(3)
    for number, reached in enumerate(comparison.alone):
        print(f"share {number} alone: {reached:.3f}")
    print(f"all data pooled: {comparison.pooled:.3f}")
