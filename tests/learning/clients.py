"""Clients for the tests of workflows: plain functions, and the answers that they give."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from hanse.errors import TrainingFailed
from hanse.ids import ClientName
from hanse.learning.workflow import CLIENT_LOST, DEADLINE, Answer, Task
from hanse.messages import TaskFault
from hanse.model import Model, Update

Client = Callable[[Task], Update]


def name(number: int) -> ClientName:
    return ClientName(f"site-{number}")


def model(*numbers: float, dtype: npt.DTypeLike = np.float64) -> Model:
    return Model({"w": np.array(numbers, dtype)})


def update(*numbers: float, n: int = 1, **metrics: float) -> Update:
    return Update(model(*numbers), n, metrics)


def returning(value: Update) -> Client:
    """A client that answers every task with *value*."""
    return lambda task: value


def adding(change: float, *, n: int = 1) -> Client:
    """A client whose training adds *change* to every number, and whose evaluation measures the mean of the model."""

    def client(task: Task) -> Update:
        assert task.model is not None
        if task.expects_model:
            return Update(Model({key: array + change for key, array in task.model.items()}), n, {"loss": change})
        return Update(None, n, {"mean": float(np.mean(task.model["w"]))})

    return client


def failing(task: Task) -> Update:
    raise TrainingFailed("site", task.name, "out of memory")


def counted(number: int, *numbers: float) -> Answer:
    return Answer(name(number), update(*(numbers or (float(number),))))


def faulty(number: int, reason: str = "out of memory") -> Answer:
    return Answer(name(number), fault=TaskFault("training-failed", reason))


def transient(number: int) -> Answer:
    return Answer(name(number), fault=TaskFault("store-failed", "no space left on device", retryable=True))


def lost(number: int) -> Answer:
    return Answer(name(number), fault=TaskFault(CLIENT_LOST, f"{name(number)} was lost"))


def too_late(number: int) -> Answer:
    return Answer(name(number), fault=TaskFault(DEADLINE, f"{name(number)} did not answer within 60 s"))
