"""The whole federation in one process: ``simulate`` runs a job as deployed, without network, certificates or sites.

Here belongs what stands in for a deployment's surroundings: a launcher that runs jobs' processes as tasks
(``launcher``), the pool of worker processes in which users' training code runs (``pool``, ``worker``, and ``exchange``,
what the two say to each other), the importing of a job's code into a process that is not its own (``code``), the way of
events to the caller (``watch``, ``mailbox``), and the composition of it all (``simulation``). No rule belongs here:
server, agents, runs, tasks and frames are the deployed ones, so what runs here runs there, with the same bytes.

The names below are loaded when they are first used: a worker must not pay for the server.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hanse.simulator.simulation import SimulationFailed, SimulationResult, simulate

__all__ = ["SimulationFailed", "SimulationResult", "simulate"]


def __getattr__(name: str) -> object:
    """Load *name* from where it is defined (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module("hanse.simulator.simulation"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the names below too, although they are loaded on first use."""
    return sorted({*globals(), *__all__})
