"""Processes with a mark in their environment: those that were started with it, and all that they have started in turn.

The mark stays with a process whose parent has died, and which nobody else can tell from a stranger.
"""

from contextlib import closing, suppress
from typing import Final

import psutil

from hanse.launch.held import HeldProcess

VARIABLE: Final = "HANSE_TEST_MARK"
"""The variable of the environment that has the mark."""
ENDED_WITHIN_S: Final = 30.0


def living(mark: str) -> list[psutil.Process]:
    """Return all processes with this *mark* that run, whoever their parent is by now."""
    return [process for process in psutil.process_iter() if _mark_of(process) == mark]


def kill(mark: str) -> None:
    """Kill all processes with this *mark*, and return when none is left; whoever has started one reaps it."""
    while left := living(mark):  # again: what was killed may have started another before
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        for process in left:
            with suppress(ProcessLookupError), closing(HeldProcess(process.pid)) as held:
                held.wait(ENDED_WITHIN_S)


def _mark_of(process: psutil.Process) -> str | None:
    try:
        return process.environ().get(VARIABLE) if process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.Error:  # it has ended, or is none of ours
        return None
