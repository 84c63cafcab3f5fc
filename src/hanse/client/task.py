"""A task as training code sees it: which client, which round, with which configuration, and a source of randomness."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from hanse.ids import ClientName, JobId
from hanse.job import Config
from hanse.learning.workflow import rng_for
from hanse.messages import Metrics


def discard_metrics(step: int, metrics: Metrics) -> None:
    """Take metrics to nowhere: what ``TaskContext.log`` calls where nobody listens."""
    del step, metrics


@dataclass(frozen=True, slots=True)
class TaskContext:
    """What a training function gets beside the model.

    ``config`` is the job's configuration overlaid by the task's. ``site`` is what this site's settings say about
    itself; in the simulator it holds ``partition`` (this client's number) and ``partitions`` (of how many). ``seed``
    is the job's.
    """

    client: ClientName
    job: JobId
    round: int
    name: str
    config: Config
    site: Config
    seed: int
    log_metrics: Callable[[int, Metrics], None] = field(default=discard_metrics, repr=False, compare=False)

    def rng(self) -> np.random.Generator:
        """Return a generator that depends on seed, client, round and task name alone.

        It is the same one each time, wherever the task runs and however often, so that training can be repeated
        exactly.
        """
        return rng_for(self.seed, self.round, "client", self.client, self.name)

    def log(self, metrics: Mapping[str, float], *, step: int = 0) -> None:
        """Report *metrics* while the task runs, for people to see; *step* orders them within the task.

        Returns at once. Nothing waits for these numbers, and some may be lost with a broken connection; what must
        arrive belongs in the ``Update``.
        """
        self.log_metrics(step, {name: float(value) for name, value in metrics.items()})
