"""What tells that a process lives: its lock on a file, and a hold on the process by which its number is no other's.

A number alone tells nothing: its process may have ended, and the system have given it to another since. A lock of
``flock`` is gone with its last holder, however that ends. A process that is held on to (by a ``pidfd``; by ``kqueue``
where there is none) can be signalled and waited for by whoever did not start it.
"""

import contextlib
import fcntl
import os
import select
import signal
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from hanse.errors import UNKNOWN_STATUS, Conflict


def lock_nowait(descriptor: int) -> bool:
    """Lock the file that *descriptor* is open on, for as long as it is open anywhere; return whether nobody else has.

    What inherits the descriptor holds the lock too.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def held_by(path: Path) -> int | None:
    """Return the number of the process that holds the file at *path*, 0 if it does not tell; ``None``: none does."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        # A lock that others may share, for as long as it takes to close the file: whoever else only asks gets one too.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return number_in(descriptor)
    else:
        return None
    finally:
        os.close(descriptor)


@contextmanager
def only_holder(path: Path, *, what: str) -> Iterator[int]:
    """Hold the file at *path* for *what* until the end of the block, or of this process; give its descriptor.

    Raises:
        Conflict: another process does; the sentence has its number, if the file tells it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if not lock_nowait(descriptor):
            holder = number_in(descriptor)
            state = f"running already{f', as process {holder}' if holder else ''}"
            raise Conflict(what, state=state, wanted="started again")
        yield descriptor
    finally:
        os.close(descriptor)


def number_in(descriptor: int) -> int:
    """Return the process's number that the file begins with; 0 where there is none."""
    text = os.pread(descriptor, 32, 0).strip()
    return int(text) if text.isdigit() else 0


def started_at(pid: int) -> int:
    """Return when process *pid* started, in ticks since the machine did; 0 where that cannot be told.

    Number and start together name one process.
    """
    fields = _stat(pid)
    return int(fields[_STARTED]) if fields else 0


_PROC: Final = Path("/proc")
_STATE: Final = 0
_SESSION: Final = 3
_STARTED: Final = 19
_EXIT_CODE: Final = 49
"""Fields of ``/proc/<pid>/stat`` behind the name: the third, the sixth, the 22nd and the 52nd of proc(5)."""


def kill_session(leader: int, *, started: int, output: Path) -> None:
    """Kill what is left of the session that process *leader* led and writes to the file *output*, where that is told.

    The leader *started* then (``started_at``), or its number is another's by now, and the session is over. Where it has
    ended, the number may be another session's; the file is nobody else's output.
    """
    if not _PROC.is_dir() or started_at(leader) not in (0, started):
        return
    killed: set[int] = set()
    while left := {pid for pid in _numbers() - killed if _is_of(pid, leader, output)}:  # one may have started another
        for pid in left:
            with contextlib.suppress(OSError), contextlib.closing(HeldProcess(pid)) as held:
                if _is_of(pid, leader, output):  # held on to by now, it is the one
                    held.send(signal.SIGKILL)
        killed |= left


def _numbers() -> set[int]:
    return {int(path.name) for path in _PROC.iterdir() if path.name.isdigit()}


def _is_of(pid: int, session: int, output: Path) -> bool:
    fields = _stat(pid)
    if len(fields) <= _SESSION or int(fields[_SESSION]) != session:
        return False
    try:
        return any((_PROC / str(pid) / "fd" / number).samefile(output) for number in ("1", "2"))
    except OSError:  # it has ended meanwhile, or has closed them
        return False


def _stat(pid: int) -> list[str]:
    try:
        return (_PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


if sys.platform == "linux":
    _PROCESS_GROUP: Final = 1 << 2
    """``PIDFD_SIGNAL_PROCESS_GROUP``, of Linux 6.9: the signal is for the group that the process leads, or led."""

    _GET_INFO: Final = 0xC040FF0B
    _INFO: Final = struct.Struct("=QQ11Ii")
    _EXIT: Final = 1 << 3
    """``PIDFD_GET_INFO`` of Linux 6.13, its first 64 bytes, and of 6.15 what asks for the status of a reaped one."""

    class HeldProcess:
        """A process that is held on to until ``close``; readable, as a file, once it has ended.

        Raises:
            ProcessLookupError: there is no process *pid*.
        """

        def __init__(self, pid: int) -> None:
            self.pid = pid
            self._descriptor = os.pidfd_open(pid)
            self._started = started_at(pid)

        def fileno(self) -> int:
            """Return the descriptor by which to wait for its end."""
            return self._descriptor

        def send(self, number: signal.Signals) -> None:
            """Send it a signal.

            Raises:
                ProcessLookupError: it has ended.
            """
            signal.pidfd_send_signal(self._descriptor, number)

        def kill_group(self) -> None:
            """Kill it and what it started in its group, also when it has ended itself and left that behind.

            An older kernel cannot say whose a group's number is once its leader is gone: there the process alone dies.
            """
            with contextlib.suppress(ProcessLookupError):
                try:
                    signal.pidfd_send_signal(self._descriptor, signal.SIGKILL, None, _PROCESS_GROUP)
                except OSError as error:
                    if isinstance(error, ProcessLookupError):
                        raise
                    self.send(signal.SIGKILL)

        def wait(self, timeout_s: float) -> bool:
            """Return whether it has ended, within *timeout_s*."""
            return _is_readable(self._descriptor, timeout_s)

        def exit_status(self) -> int:
            """Return what it has ended with, negative for a signal; ``UNKNOWN_STATUS`` where the system does not tell.

            Only a process's parent is told for sure. Others can read it off one that its parent has not reaped yet,
            and of one that is reaped a kernel since 6.15 keeps it.
            """
            fields = _stat(self.pid)
            if len(fields) > _EXIT_CODE and (fields[_STATE], int(fields[_STARTED])) == ("Z", self._started):
                return os.waitstatus_to_exitcode(int(fields[_EXIT_CODE]))
            info = bytearray(_INFO.pack(_EXIT, *[0] * 13))
            try:
                fcntl.ioctl(self._descriptor, _GET_INFO, info)
            except OSError:
                return UNKNOWN_STATUS
            mask, *_, code = _INFO.unpack(info)
            return os.waitstatus_to_exitcode(code) if mask & _EXIT else UNKNOWN_STATUS

        def close(self) -> None:
            """Hold on to it no longer."""
            os.close(self._descriptor)

else:

    class HeldProcess:
        """A process whose end is heard of until ``close``; readable, as a file, once it has ended.

        Raises:
            ProcessLookupError: there is no process *pid*.
        """

        def __init__(self, pid: int) -> None:
            self.pid = pid
            self._queue = select.kqueue()
            at_exit = select.kevent(pid, select.KQ_FILTER_PROC, select.KQ_EV_ADD, select.KQ_NOTE_EXIT)
            self._queue.control([at_exit], 0)

        def fileno(self) -> int:
            """Return the descriptor by which to wait for its end."""
            return self._queue.fileno()

        def send(self, number: signal.Signals) -> None:
            """Send it a signal, unless it has ended."""
            if not self.wait(0):
                os.kill(self.pid, number)

        def kill_group(self) -> None:
            """Kill it and what it started in its group; what it left behind when it ended is not its any more."""
            if not self.wait(0):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self.pid, signal.SIGKILL)

        def wait(self, timeout_s: float) -> bool:
            """Return whether it has ended, within *timeout_s*."""
            return _is_readable(self.fileno(), timeout_s)

        def exit_status(self) -> int:
            """Return ``UNKNOWN_STATUS``: the system tells only a process's parent."""
            return UNKNOWN_STATUS

        def close(self) -> None:
            """Listen to it no longer."""
            self._queue.close()


def _is_readable(descriptor: int, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(1000 * timeout_s))
