"""A job's process on this machine: started by exec, fed its specification, always reaped.

A process gets its specification on its standard input, as four bytes of length (big-endian) and that many bytes. The
pipe then stays open as a *life line*: the child reads from it and sees its end when its parent dies, however the
parent dies (``surviving`` has processes that may outlive their parent). The process leads a session of its own, so that
Ctrl-C in a terminal reaches only its parent, who decides; and what it started in turn (data loaders, say) is killed
with it.

When memory runs out, the system kills it rather than its parent (``memory``).

Output and errors go straight to the log file, which is kept from growing without end while the process runs
(``long_logs``). At each start a log beyond ``MAX_LOG_BYTES`` is set aside, in place of the one that was set aside
before.

``Launcher`` and ``Handle`` are what users of this module depend on; the simulator brings others that run jobs
in-process.
"""

import asyncio
import contextlib
import os
import signal
import stat
import struct
import sys
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Final, NoReturn, Protocol

from hanse.errors import ProtocolError
from hanse.launch.left_behind import ProcessNotes
from hanse.launch.memory import first_to_go

MAX_SPEC_BYTES: Final = 64 * 1024 * 1024
_LENGTH: Final = struct.Struct(">I")
MAX_LOG_BYTES: Final = 16 * 1024 * 1024
SET_ASIDE: Final = ".1"
"""What the name of a log that was set aside ends with."""

_TAIL_BYTES: Final = 64 * 1024
_PYTHON_FLAGS: Final = ("-P", "-m")
"""``-P`` keeps the parent's working directory out of the child's module search path: a file that happens to lie there
must not stand in for a module."""
_PYTHON_ENV: Final = {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1", "PYTHONHASHSEED": "0"}
"""Among others, a set of names has the same order in each process: one that takes over computes what the last one did,
also where a job's code goes through a set."""


class Handle(Protocol):
    """A started process."""

    @property
    def pid(self) -> int:
        """The process's number; 0 for one that runs in this process."""
        ...

    async def wait(self) -> int:
        """Wait for the end; return its status: 0 went well, negative is the signal that killed it."""
        ...

    async def stop(self, grace_s: float = 5.0) -> int:
        """Ask it to end, and force it after *grace_s* seconds; return its status. Stopped already is fine."""
        ...

    def log_tail(self, lines: int = 20) -> str:
        """Return at most the last *lines* lines of what it has logged itself."""
        ...


class Launcher(Protocol):
    """Starts processes."""

    async def launch(self, module: str, *, spec: bytes, log_path: Path, env: Mapping[str, str], name: str) -> Handle:
        """Start ``python -m module`` with *spec*; *name* is for people, *env* comes on top of this process's own."""
        ...


class ProcessLauncher:
    """Starts processes with this interpreter, on this machine; each gets the descriptors *pass_fds*, by their numbers.

    Descriptors are for one process: who passes some makes a launcher for it, and closes them here afterwards. The
    variables *withheld* are not in the processes' environment. *notes* are kept of the processes while they live.
    """

    def __init__(
        self,
        python: str = sys.executable,
        *,
        pass_fds: Sequence[int] = (),
        withheld: Collection[str] = (),
        notes: ProcessNotes | None = None,
    ) -> None:
        self._python = python
        self._pass_fds = tuple(pass_fds)
        self._withheld = frozenset(withheld)
        self._notes = notes

    async def launch(
        self, module: str, *, spec: bytes, log_path: Path, env: Mapping[str, str], name: str
    ) -> "RunningProcess":
        """Start ``python -m module``, hand it *spec*, and return when it has been handed over (or the child has died).

        The log file is appended to and readable by its owner alone; missing folders are made likewise. One that is
        longer than ``MAX_LOG_BYTES`` gets another name first, and a new one is begun. When this call is cancelled, the
        child is killed and reaped before it returns.

        Raises:
            OSError: the interpreter or the log file cannot be opened, or the disk does not take the note.
        """
        return await start_process(
            self._python,
            module,
            spec=spec,
            log_path=log_path,
            env=env,
            name=name,
            pass_fds=self._pass_fds,
            withheld=self._withheld,
            notes=self._notes,
        )


async def start_process(
    python: str,
    module: str,
    *,
    spec: bytes,
    log_path: Path,
    env: Mapping[str, str],
    name: str,
    pass_fds: Sequence[int] = (),
    withheld: Collection[str] = (),
    notes: ProcessNotes | None = None,
    life_line: int | None = None,
    on_started: Callable[[int, int], None] = lambda pid, log_start: None,
) -> "RunningProcess":
    """Start ``python -m module``; see ``ProcessLauncher``.

    With a *life_line* of its own, a descriptor that is closed when the process has ended, the pipe of its specification
    is none. *on_started* hears of the process's number, and of where in the log it begins, before it gets its
    specification: what goes wrong until then ends the process, which has done nothing yet.
    """
    inherited = {variable: value for variable, value in os.environ.items() if variable not in withheld}
    child_end, pipe = os.pipe()  # not asyncio's: its ``wait`` also waits for grandchildren that hold the pipe
    try:
        if len(spec) > MAX_SPEC_BYTES:
            raise ValueError(f"the specification of {name} has {len(spec)} bytes; at most {MAX_SPEC_BYTES} are allowed")
        with _log_file(log_path) as log:
            log_start = log.tell()
            process = await asyncio.create_subprocess_exec(
                python,
                *_PYTHON_FLAGS,
                module,
                stdin=child_end,
                stdout=log,
                stderr=asyncio.subprocess.STDOUT,
                env={**inherited, **_PYTHON_ENV, **env},
                start_new_session=True,
                pass_fds=pass_fds,
            )
    except BaseException:
        os.close(pipe)
        if life_line is not None:
            os.close(life_line)
        raise
    finally:
        os.close(child_end)
    ends_with_it = pipe if life_line is None else life_line
    first_to_go(process.pid)
    running = RunningProcess(
        process, life_line=ends_with_it, log_path=log_path, log_start=log_start, notes=notes, name=name
    )
    try:
        if notes is not None:
            notes.keep(running.pid, log_path)
        on_started(running.pid, log_start)
        await asyncio.to_thread(_write_spec, pipe, spec)  # blocks while the child has not read a large one
    except BaseException:
        await running.stop(grace_s=0)
        raise
    finally:
        if life_line is not None:
            os.close(pipe)
    return running


class RunningProcess:
    """A process started by ``ProcessLauncher``; whoever holds it awaits ``wait`` or ``stop``, which reap it."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        *,
        life_line: int,
        log_path: Path,
        log_start: int,
        notes: ProcessNotes | None,
        name: str,
    ) -> None:
        self._process = process
        self._life_line: int | None = life_line
        self._log_path = log_path
        self._log_start = log_start
        self._notes = notes
        self.name = name

    @property
    def pid(self) -> int:
        """The process's number, also of its group."""
        return self._process.pid

    async def wait(self) -> int:
        """Wait for the end, then end what the process left behind; return the status."""
        status = await self._process.wait()
        if self._life_line is not None:
            # Only once: later the number could be another group's.
            self._kill_group()
            os.close(self._life_line)
            self._life_line = None
            if self._notes is not None:
                self._notes.drop(self.pid)
        return status

    async def stop(self, grace_s: float = 5.0) -> int:
        """Ask with SIGTERM, wait *grace_s* seconds, kill the whole group; return the status.

        When the caller is cancelled while it waits, the group is killed at once.
        """
        if self._process.returncode is None:
            await ask_then_force(ask=self._process.terminate, wait=self.wait, force=self._force, grace_s=grace_s)
        return await self.wait()

    def log_tail(self, lines: int = 20) -> str:
        """Return at most the last *lines* lines that this process has logged; its predecessors' are not among them."""
        return last_lines(self._log_path, lines, start=self._log_start)

    def _force(self) -> None:
        if self._process.returncode is None:
            self._kill_group()

    def _kill_group(self) -> None:
        # macOS answers EPERM for a group of which only the dead leader is left.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)


def last_lines(log_path: Path, lines: int, *, start: int) -> str:
    """Return at most the last *lines* lines of the log file that lie behind its first *start* bytes."""
    try:
        with log_path.open("rb") as log:
            end = log.seek(0, os.SEEK_END)
            log.seek(max(start, end - _TAIL_BYTES))
            text = log.read().decode("utf-8", errors="replace")
    except OSError as error:
        return f"(the log {log_path} cannot be read: {error.strerror})"
    return "\n".join(text.splitlines()[-lines:]) if lines else ""


def logged_before() -> int:
    """Return how many bytes the file that this process's output goes to has now; 0 where it goes to no file."""
    output = os.fstat(sys.stderr.fileno())
    return output.st_size if stat.S_ISREG(output.st_mode) else 0


async def ask_then_force(
    *, ask: Callable[[], None], wait: Callable[[], Awaitable[object]], force: Callable[[], None], grace_s: float
) -> None:
    """Ask a process to end, and force it unless it has ended within *grace_s* seconds, or when this is cancelled."""
    has_ended = False
    with contextlib.suppress(ProcessLookupError):
        ask()
    try:
        async with asyncio.timeout(grace_s):
            await wait()
            has_ended = True
    except TimeoutError:
        pass
    finally:
        if not has_ended:
            force()


def end_with_group(status: int) -> NoReturn:
    """End this process at once: by SIGKILL with all that it has started, or with *status* where it leads no group.

    For a process whose parent is gone: nobody else ends what it has started.
    """
    if os.getpgrp() == os.getpid():  # its own, and not that of whoever runs it by hand
        os.killpg(0, signal.SIGKILL)
    os._exit(status)


def read_spec(stream: BinaryIO) -> bytes:
    """Return the specification that a launcher wrote to *stream*, the child's standard input; blocks until it is there.

    Raises:
        ProtocolError: the stream ended early, or holds something else.
    """
    length = _LENGTH.unpack(_read_exactly(stream, _LENGTH.size))[0]
    if length > MAX_SPEC_BYTES:
        raise ProtocolError("the specification's length", got=length, expected=f"at most {MAX_SPEC_BYTES} bytes")
    return _read_exactly(stream, length)


def _read_exactly(stream: BinaryIO, count: int) -> bytes:
    data = stream.read(count)
    if len(data) != count:
        raise ProtocolError("standard input", got=f"{len(data)} bytes", expected=f"{count} bytes of a specification")
    return data


def _write_spec(life_line: int, spec: bytes) -> None:
    remaining = memoryview(_LENGTH.pack(len(spec)) + spec)
    with contextlib.suppress(BrokenPipeError):  # the child has died; its status says how
        while remaining:
            remaining = remaining[os.write(life_line, remaining) :]


def _log_file(path: Path) -> BinaryIO:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.exists() and path.stat().st_size > MAX_LOG_BYTES:
        path.replace(path.with_name(path.name + SET_ASIDE))
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab")
