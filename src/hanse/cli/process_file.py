"""A file that tells which process serves from a workspace: how ``stop`` finds whom to stop.

The process holds a lock on the file for as long as it lives, however it ends, so a number that a crash left behind is
never taken for a running process, and never is another process stopped that has got the number since.
"""

import fcntl
import os
import select
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from hanse.errors import Conflict, TimedOut
from hanse.identity.kits import Kit
from hanse.settings import ClientSettings, ServerSettings

SERVER_FILE: Final = "server.pid"
CLIENT_FILE: Final = "client.pid"
_NUMBER_BYTES: Final = 32


def workspace_of(kit: Kit[ServerSettings] | Kit[ClientSettings]) -> Path:
    """Return the folder in which the server or client whose *kit* it is keeps its things, and this file."""
    return kit.resolve(kit.settings.workspace).absolute()


@contextmanager
def announced(path: Path, *, what: str) -> Iterator[None]:
    """Tell in the file at *path* that this process is *what*, until the end of the block.

    Raises:
        Conflict: another process is.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if not _lock(descriptor):
            state = f"running already, as process {_number(descriptor) or '(starting)'}"
            raise Conflict(what, state=state, wanted="started again")
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        try:
            yield
        finally:
            os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def holder(path: Path) -> int | None:
    """Return the number of the process that holds the file at *path*, 0 if it does not tell; ``None``: none does."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        # A lock that others may share: of two that ask this at once, neither takes the other for the holder.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _number(descriptor)
    else:
        return None
    finally:
        os.close(descriptor)


def stop(path: Path, *, what: str, timeout_s: float, force: bool = False) -> int | None:
    """End the process that the file at *path* tells of, and return its number when it has ended; ``None``: none runs.

    It is asked with SIGTERM; with *force* it is killed when it has not ended after *timeout_s*.

    Raises:
        TimedOut: it has not ended, and *force* is not set.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    pid = _number(descriptor)
    try:
        process = _Process(pid) if pid else None
    except ProcessLookupError:
        process = None
    try:
        # Only now that the process is held on to: while it holds the lock, the number in the file is its own.
        if process is None or _lock(descriptor):
            return None
        process.send(signal.SIGTERM)
        if not process.wait(timeout_s):
            if not force:
                raise TimedOut(f"{what} (process {pid})", "stop", timeout_s)
            process.send(signal.SIGKILL)
            process.wait(timeout_s)
        return pid
    finally:
        if process is not None:
            process.close()
        os.close(descriptor)


if sys.platform == "linux":

    class _Process:
        """A process that is held on to: its number is no other's while this is open."""

        def __init__(self, pid: int) -> None:
            self._descriptor = os.pidfd_open(pid)

        def send(self, number: signal.Signals) -> None:
            signal.pidfd_send_signal(self._descriptor, number)

        def wait(self, timeout_s: float) -> bool:
            """Return whether it has ended, within *timeout_s*."""
            return bool(select.select([self._descriptor], [], [], timeout_s)[0])

        def close(self) -> None:
            os.close(self._descriptor)

else:

    class _Process:
        """A process whose end is heard of."""

        def __init__(self, pid: int) -> None:
            self._pid = pid
            self._queue = select.kqueue()
            at_exit = select.kevent(pid, select.KQ_FILTER_PROC, select.KQ_EV_ADD, select.KQ_NOTE_EXIT)
            self._queue.control([at_exit], 0)

        def send(self, number: signal.Signals) -> None:
            os.kill(self._pid, number)

        def wait(self, timeout_s: float) -> bool:
            """Return whether it has ended, within *timeout_s*."""
            return bool(self._queue.control(None, 1, timeout_s))

        def close(self) -> None:
            self._queue.close()


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _number(descriptor: int) -> int:
    """Return the number in the file; 0 where there is none."""
    text = os.pread(descriptor, _NUMBER_BYTES, 0).strip()
    return int(text) if text.isdigit() else 0
