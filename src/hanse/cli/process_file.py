"""A file that tells which process serves from a workspace: how ``stop`` finds whom to stop.

The process holds a lock on the file for as long as it lives, however it ends, so a number that a crash left behind is
never taken for a running process, and never is another process stopped that has got the number since.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from hanse.errors import TimedOut
from hanse.identity.kits import Kit
from hanse.launch.held import HeldProcess, lock_nowait, number_in, only_holder
from hanse.settings import ClientSettings, ServerSettings

SERVER_FILE: Final = "server.pid"


def workspace_of(kit: Kit[ServerSettings] | Kit[ClientSettings]) -> Path:
    """Return the folder in which the server or client whose *kit* it is keeps its things, and this file."""
    return kit.resolve(kit.settings.workspace).absolute()


@contextmanager
def announced(path: Path, *, what: str) -> Iterator[None]:
    """Tell in the file at *path* that this process is *what*, until the end of the block.

    Raises:
        Conflict: another process is.
    """
    with only_holder(path, what=what) as descriptor:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        try:
            yield
        finally:
            os.ftruncate(descriptor, 0)


def stop(path: Path, *, what: str, timeout_s: float, force: bool = False) -> int | None:
    """End the process that the file at *path* tells of, and return its number when it has ended; ``None``: none runs.

    It is asked with SIGTERM; with *force* it is killed when it has not ended after *timeout_s*.

    Raises:
        TimedOut: it has not ended, and *force* is not set or has not helped.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    pid = number_in(descriptor)
    try:
        process = HeldProcess(pid) if pid else None
    except ProcessLookupError:
        process = None
    try:
        # Only now that the process is held on to: while it holds the lock, the number in the file is its own.
        if process is None or lock_nowait(descriptor):
            return None
        with suppress(ProcessLookupError):  # it has ended by itself meanwhile
            has_ended = _ends(process, signal.SIGTERM, timeout_s) or (
                force and _ends(process, signal.SIGKILL, timeout_s)
            )
            if not has_ended:
                raise TimedOut(f"{what} (process {pid})", "stop", timeout_s)
        return pid
    finally:
        if process is not None:
            process.close()
        os.close(descriptor)


def _ends(process: HeldProcess, number: signal.Signals, timeout_s: float) -> bool:
    """Send *process* a signal, and return whether it ends within *timeout_s*."""
    process.send(number)
    return process.wait(timeout_s)
