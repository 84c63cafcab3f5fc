"""A plain training script's way to take part: four lines in an existing loop.

::

    import hanse.client as hanse               # 1

    while hanse.is_running():                  # 2
        task = hanse.receive()                 # 3
        weights = train(task.model, ...)
        hanse.send(weights, num_examples=n)    # 4

These functions talk to the ``Session`` that the job's process has opened for the script: each thread that runs a script
has its own, so several may run in one process. A script that ends is run again when the next task comes; so one without
a loop (receive, train, send) is fine too.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from hanse.client.task import TaskContext
from hanse.errors import OperatorError
from hanse.ids import ClientName, JobId
from hanse.job import Config
from hanse.model import Model, Update


class OutsideJob(OperatorError):
    """A function that only works within a running job was called outside one."""

    code = "outside-job"

    def __init__(self, function: str) -> None:
        super().__init__(
            f"hanse.client.{function} was called outside a running job; submit the script as a job's client, or try it "
            f"with 'hanse simulate'"
        )
        self.function = function


class OutOfTurn(OperatorError):
    """A script called one of these functions when there was nothing for it to do."""

    code = "out-of-turn"


@dataclass(frozen=True, slots=True)
class Site:
    """Where the script runs; ``config`` and ``seed`` are the job's, ``site`` is what the site says of itself."""

    name: ClientName
    job: JobId
    config: Config
    site: Config
    seed: int


@dataclass(frozen=True, slots=True)
class ReceivedTask:
    """A task to work on; ``model`` is read-only, and empty when the task has none. ``ctx`` holds the rest."""

    model: Model
    ctx: TaskContext

    @property
    def round(self) -> int:
        """The round that the task belongs to."""
        return self.ctx.round

    @property
    def name(self) -> str:
        """What is asked for: ``train``, ``evaluate``, or a name that the workflow chose."""
        return self.ctx.name

    @property
    def config(self) -> Config:
        """The job's configuration overlaid by the task's."""
        return self.ctx.config

    def rng(self) -> np.random.Generator:
        """Return the task's own generator (see ``TaskContext.rng``)."""
        return self.ctx.rng()


class Session(Protocol):
    """What the functions below talk to."""

    site: Site

    def wait_task(self) -> bool:
        """Block until a task is there (``True``) or the run has ended (``False``)."""
        ...

    def receive(self) -> ReceivedTask:
        """Take the next task, blocking until it is there."""
        ...

    def send(self, update: Update) -> None:
        """Answer the task in hand."""
        ...

    @property
    def task(self) -> ReceivedTask | None:
        """The task in hand; ``None`` between tasks."""
        ...


_session: ContextVar[Session] = ContextVar("hanse script session")


@contextmanager
def session_of(session: Session) -> Iterator[None]:
    """Have the functions of this module talk to *session* in this thread, within this block."""
    token = _session.set(session)
    try:
        yield
    finally:
        _session.reset(token)


def init() -> Site:
    """Return where the script runs. Optional: a script that needs nothing of its site can go without."""
    return _current("init").site


def is_running() -> bool:
    """Wait for the next task; return whether there is one: ``False`` means that the run has ended.

    A script that has received a task answers it before it asks for the next.
    """
    return _current("is_running").wait_task()


def receive() -> ReceivedTask:
    """Return the next task, waiting until it is there.

    Raises:
        OutOfTurn: the run has ended, or the task before has not been answered.
    """
    return _current("receive").receive()


def send(
    model: Model | Mapping[str, npt.ArrayLike] | None = None,
    *,
    num_examples: int,
    metrics: Mapping[str, float] | None = None,
) -> None:
    """Answer the task in hand with *model*, or with metrics alone where the task was an evaluation.

    *num_examples* is the number of examples behind it: its weight in the mean.

    Raises:
        OutOfTurn: there is no task in hand.
        ModelInvalid: *model* or *num_examples* is not one.
    """
    answer = model if model is None or isinstance(model, Model) else Model(model)
    _current("send").send(Update(answer, num_examples, dict(metrics or {})))


def log(metrics: Mapping[str, float], *, step: int = 0) -> None:
    """Report *metrics* while a task is in hand, for people to see (see ``TaskContext.log``).

    Raises:
        OutOfTurn: there is no task in hand.
    """
    task = _current("log").task
    if task is None:
        raise OutOfTurn("hanse.client.log was called between tasks; call it between receive and send")
    task.ctx.log(metrics, step=step)


def _current(function: str) -> Session:
    try:
        return _session.get()
    except LookupError:
        raise OutsideJob(function) from None
