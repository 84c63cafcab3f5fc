"""Hanse: organisations train one model together while each keeps its data at home.

These are the names that the author of a job or of a workflow imports; everything else is the product's own. They are
loaded when first used, so that ``import hanse`` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hanse.client.app import ClientApp
    from hanse.client.task import TaskContext
    from hanse.errors import HanseError
    from hanse.events import EventType, FLComponent, FLContext
    from hanse.job import Job, Resources
    from hanse.learning.aggregate import weighted_mean
    from hanse.learning.cyclic import Cyclic
    from hanse.learning.evaluation import Evaluation
    from hanse.learning.fedavg import FedAvg
    from hanse.learning.fedbuff import FedBuff
    from hanse.learning.fedopt import FedAdagrad, FedAdam, FedAvgM, FedYogi
    from hanse.learning.fedprox import FedProx
    from hanse.learning.workflow import Answer, Federation, State, Task, Workflow
    from hanse.model import Model, Update
    from hanse.simulator import simulate
    from hanse.storage.models import read_safetensors, write_safetensors

_HOME = {
    "Answer": "hanse.learning.workflow",
    "ClientApp": "hanse.client.app",
    "Cyclic": "hanse.learning.cyclic",
    "Evaluation": "hanse.learning.evaluation",
    "EventType": "hanse.events",
    "FLComponent": "hanse.events",
    "FLContext": "hanse.events",
    "FedAdagrad": "hanse.learning.fedopt",
    "FedAdam": "hanse.learning.fedopt",
    "FedAvg": "hanse.learning.fedavg",
    "FedAvgM": "hanse.learning.fedopt",
    "FedBuff": "hanse.learning.fedbuff",
    "FedProx": "hanse.learning.fedprox",
    "FedYogi": "hanse.learning.fedopt",
    "Federation": "hanse.learning.workflow",
    "HanseError": "hanse.errors",
    "Job": "hanse.job",
    "Model": "hanse.model",
    "Resources": "hanse.job",
    "State": "hanse.learning.workflow",
    "Task": "hanse.learning.workflow",
    "TaskContext": "hanse.client.task",
    "Update": "hanse.model",
    "Workflow": "hanse.learning.workflow",
    "read_safetensors": "hanse.storage.models",
    "simulate": "hanse.simulator",
    "weighted_mean": "hanse.learning.aggregate",
    "write_safetensors": "hanse.storage.models",
}

__all__ = [
    "Answer",
    "ClientApp",
    "Cyclic",
    "Evaluation",
    "EventType",
    "FLComponent",
    "FLContext",
    "FedAdagrad",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedBuff",
    "FedProx",
    "FedYogi",
    "Federation",
    "HanseError",
    "Job",
    "Model",
    "Resources",
    "State",
    "Task",
    "TaskContext",
    "Update",
    "Workflow",
    "read_safetensors",
    "simulate",
    "weighted_mean",
    "write_safetensors",
]


def __getattr__(name: str) -> object:
    """Load *name* from where it is defined (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the names below too, although they are loaded on first use."""
    return sorted({*globals(), *__all__})
