"""A job's code in a process that is not its own: only a workflow of the job's needs this, or its first model.

A deployed run has a process to itself, in which ``run.loading.importing_from`` may do as it likes. Here the process is
the user's, with modules of their own, perhaps of the same names (they have just imported ``model`` from the folder
that they simulate), and perhaps with other simulations beside this one. ``sys.modules`` is one for all of them, so
code takes turns: a simulation whose workflow comes with the job has its turn for as long as it runs, any other for as
long as its first model takes to make. Training code takes no part in this: it runs in worker processes.

During a turn, what the process had imported by the names that the job's folder has is set aside, and put back after.
Other threads that import at that moment may see the job's modules; a program that minds simulates in a process apart.
"""

import asyncio
import os
import sys
import sysconfig
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType
from typing import Final

from hanse.errors import JobInvalid
from hanse.run.loading import importing_from

_INSTALLED: Final = tuple(
    {sysconfig.get_path(name) + "/" for name in ("stdlib", "platstdlib", "purelib", "platlib")}
)  # a deployed run's process has loaded some of what is installed before the job's code, and that stays first

WORKER_MARK: Final = "HANSE_SIMULATION_WORKER"
"""The variable that is set in the environment of workers."""

_is_jobs_code: ContextVar[bool] = ContextVar("hanse job's code", default=False)
_turn = asyncio.Lock()  # one for the process, as sys.modules is; all simulations share one event loop


@asynccontextmanager
async def turn(code: Path) -> AsyncIterator[None]:
    """Wait for this process's import system, and have it find the modules in the folder *code* within the block."""
    async with _turn:
        token = _is_jobs_code.set(True)
        try:
            with set_aside(code), importing_from(code):
                yield
        finally:
            _is_jobs_code.reset(token)


def refuse_simulation_within_job() -> None:
    """Raise when a job's code is what calls: a file that simulates itself would do so again and again.

    Raises:
        JobInvalid: it is.
    """
    if _is_jobs_code.get() or os.environ.get(WORKER_MARK):
        expected = "that call under \"if __name__ == '__main__':\", so that the code can be imported"
        raise JobInvalid("code", got="a call of simulate() while it is imported", expected=expected)


@contextmanager
def set_aside(code: Path) -> Iterator[None]:
    """Within the block, forget the modules that others imported by names that *code* has files or folders for."""
    names = {path.stem for path in code.iterdir() if path.suffix == ".py" or path.is_dir()} - {"__main__", "hanse"}
    hidden = {
        name: module
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] in names and not _is_installed(name, module)
    }
    for name in hidden:
        del sys.modules[name]
    try:
        yield
    finally:
        sys.modules.update(hidden)


def _is_installed(name: str, module: ModuleType) -> bool:
    if name.partition(".")[0] in sys.stdlib_module_names:
        return True
    return (getattr(module, "__file__", None) or "").startswith(_INSTALLED)
