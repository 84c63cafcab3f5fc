"""Softmax regression in NumPy: a model as plain arrays, and functions from model and examples to model or numbers.

Each image's scores are ``images @ weight + bias``; the softmax of the scores is the probability of each digit.
"""

import numpy as np
import numpy.typing as npt

from data import CLASSES, Examples
from hanse import Model

PIXELS = 64


def initial() -> Model:
    """Return the model before any training, which knows nothing: every digit is equally likely."""
    return Model({"weight": np.zeros((PIXELS, CLASSES), np.float32), "bias": np.zeros(CLASSES, np.float32)})


def train(
    model: Model,
    examples: Examples,
    *,
    epochs: int,
    learning_rate: float,
    batch_size: int,
    rng: np.random.Generator,
) -> Model:
    """Return *model* after *epochs* passes of stochastic gradient descent, each in an order drawn from *rng*."""
    weight, bias = model["weight"].copy(), model["bias"].copy()
    for _ in range(epochs):
        order = rng.permutation(len(examples))
        for first in range(0, len(examples), batch_size):
            batch = examples[order[first : first + batch_size]]
            error = _probabilities(weight, bias, batch.images)
            error[np.arange(len(batch)), batch.labels] -= 1.0
            weight -= learning_rate / len(batch) * (batch.images.T @ error)
            bias -= learning_rate / len(batch) * error.sum(axis=0)
    return Model({"weight": weight, "bias": bias})


def measure(model: Model, examples: Examples) -> dict[str, float]:
    """Return the ``accuracy`` (0 to 1) and the ``loss`` (mean cross entropy, in nats) of *model* on *examples*."""
    probabilities = _probabilities(model["weight"], model["bias"], examples.images)
    of_the_right_one = probabilities[np.arange(len(examples)), examples.labels]
    return {
        "accuracy": float(np.mean(probabilities.argmax(axis=1) == examples.labels)),
        "loss": float(-np.mean(np.log(np.maximum(of_the_right_one, 1e-12)))),
    }


def _probabilities(
    weight: npt.NDArray[np.float32], bias: npt.NDArray[np.float32], images: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    scores = images @ weight + bias
    exponents = np.exp(scores - scores.max(axis=1, keepdims=True))
    probabilities: npt.NDArray[np.float32] = exponents / exponents.sum(axis=1, keepdims=True)
    return probabilities
