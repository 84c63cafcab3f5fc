"""A site's side: the agent that registers and starts jobs, the process that trains, and what training code imports.

Here belong a site's lifetimes: its agent (``agent``) with its jobs (``jobs``), a job's process (``job_process``) with
the tasks it works on (``job_cell``), the handing of tasks to user code (``trainer``), where all this is on disk
(``workspace``), and the names that user code uses: ``ClientApp`` for functions, ``init``, ``is_running``, ``receive``,
``send`` and ``log`` for a plain training script. No algorithm belongs here, and nothing that only a server or a run
needs.

The names below are loaded when they are first used: an agent at rest must not pay for NumPy.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hanse.client.api import ReceivedTask, Site, init, is_running, log, receive, send
    from hanse.client.app import ClientApp
    from hanse.client.task import TaskContext

_HOME = {
    "ClientApp": "hanse.client.app",
    "ReceivedTask": "hanse.client.api",
    "Site": "hanse.client.api",
    "TaskContext": "hanse.client.task",
    "init": "hanse.client.api",
    "is_running": "hanse.client.api",
    "log": "hanse.client.api",
    "receive": "hanse.client.api",
    "send": "hanse.client.api",
}

__all__ = [
    "ClientApp",
    "ReceivedTask",
    "Site",
    "TaskContext",
    "init",
    "is_running",
    "log",
    "receive",
    "send",
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
