"""A job's process that may outlive the agent that started it, and how the next agent finds it again.

Two files of the job's folder, beside its log, tie the two together, and nothing else does:

``process``
    is locked by the process from its first moment to its last: it is started with the lock, so there is no moment in
    which it lives without. The file tells its number and when it started; number and lock together name it for sure.
``life-line``
    is a named pipe. The agent holds it open and never writes; the process reads it, and sees its end when the agent has
    died, however. Then it waits for the next agent to open the pipe (``LifeLine``), but not for ever.

The file ``process`` is written before the process gets its specification. So one whose file tells nothing has been left
before it knew what to do, does nothing, and ends by itself.
"""

import asyncio
import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import msgspec

from hanse.errors import ConfigError, Conflict
from hanse.launch.held import HeldProcess, kill_session, lock_nowait, started_at
from hanse.launch.process import RunningProcess, ask_then_force, last_lines, start_process

LOCK_FILE: Final = "process"
LINE_FILE: Final = "life-line"
_LOCK_VARIABLE: Final = "HANSE_PROCESS_LOCK"
_LINE_VARIABLE: Final = "HANSE_LIFE_LINE"

_log = logging.getLogger(__name__)


class _Note(msgspec.Struct, frozen=True):
    """What the file ``process`` tells: who holds its lock, since when (``started_at``), and where in the log it began.

    ``started`` is 0 on systems that do not tell.
    """

    pid: int
    started: int
    log_start: int


class SurvivingLauncher:
    """Starts processes with this interpreter, on this machine, that go on when this process dies; see the module."""

    def __init__(self, python: str = sys.executable) -> None:
        self._python = python

    async def launch(
        self, module: str, *, spec: bytes, log_path: Path, env: Mapping[str, str], name: str
    ) -> RunningProcess:
        """Start ``python -m module`` as ``ProcessLauncher`` does; it is found again beside *log_path*.

        Raises:
            Conflict: one that was started there before lives.
            OSError: the interpreter or a file cannot be opened.
        """
        folder = log_path.parent
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = _claim(folder, name)
        try:
            return await start_process(
                self._python,
                module,
                spec=spec,
                log_path=log_path,
                env={**env, _LOCK_VARIABLE: str(lock), _LINE_VARIABLE: str((folder / LINE_FILE).absolute())},
                name=name,
                pass_fds=(lock,),
                life_line=_new_line(folder / LINE_FILE),
                on_started=lambda pid, log_start: _write_note(lock, _Note(pid, started_at(pid), log_start)),
            )
        finally:
            os.close(lock)  # the process has it


class Survivor:
    """A process that an earlier agent has started and that goes on: a ``Handle``, to be awaited like any.

    Belongs to the running event loop. Until ``take_over`` it takes its agent for dead.
    """

    def __init__(self, held: HeldProcess, *, log_path: Path, log_start: int, name: str) -> None:
        self.name = name
        self._held = held
        self._log_path, self._log_start = log_path, log_start
        self._life_line: int | None = None
        self._loop = asyncio.get_running_loop()
        self._status: asyncio.Future[int] = self._loop.create_future()
        self._loop.add_reader(held.fileno(), self._has_ended)

    @property
    def pid(self) -> int:
        """The process's number, also of its group."""
        return self._held.pid

    def take_over(self) -> None:
        """Be the agent that the process has waited for, from now on.

        Raises:
            OSError: its life line is gone or cannot be opened; the process will end by itself.
        """
        self._life_line = _open_line(self._log_path.parent / LINE_FILE)

    async def wait(self) -> int:
        """Wait for the end, of which what the process left behind is part; return the status.

        It is ``UNKNOWN_STATUS`` where the system tells it only to whoever started the process.
        """
        return await asyncio.shield(self._status)

    async def stop(self, grace_s: float = 5.0) -> int:
        """Ask with SIGTERM, wait *grace_s* seconds, kill the whole group; return the status.

        When the caller is cancelled while it waits, the group is killed at once.
        """
        if not self._status.done():
            await ask_then_force(ask=self._ask_to_end, wait=self.wait, force=self._force, grace_s=grace_s)
        return await self.wait()

    def log_tail(self, lines: int = 20) -> str:
        """Return at most the last *lines* lines that this process has logged; its predecessors' are not among them."""
        return last_lines(self._log_path, lines, start=self._log_start)

    def _has_ended(self) -> None:
        self._loop.remove_reader(self._held.fileno())
        status = self._held.exit_status()
        self._held.kill_group()
        end_left_behind(self._log_path)  # an older kernel does not kill the group of a process that has ended
        self._held.close()
        if self._life_line is not None:
            os.close(self._life_line)
        self._status.set_result(status)

    def _ask_to_end(self) -> None:
        self._held.send(signal.SIGTERM)

    def _force(self) -> None:
        if not self._status.done():
            self._held.kill_group()


def survivor_at(log_path: Path, *, name: str) -> Survivor | None:
    """Return the process that was started with the log *log_path* and goes on; ``None`` when none does.

    Whoever gets one takes it over or stops it.
    """
    found = _living(log_path.parent)
    if found is None:
        return None
    held, note = found
    return Survivor(held, log_path=log_path, log_start=note.log_start, name=name)


def pid_at(folder: Path) -> int | None:
    """Return the number of the process that goes on in *folder*; ``None`` when none does."""
    found = _living(folder)
    if found is None:
        return None
    found[0].close()
    return found[0].pid


def end_survivor(folder: Path, *, grace_s: float) -> int | None:
    """End the process that goes on in *folder*, and return its number; ``None`` when none does. Blocks.

    It is asked with SIGTERM, and its group killed after *grace_s* seconds.
    """
    found = _living(folder)
    if found is None:
        return None
    held, _ = found
    try:
        with contextlib.suppress(ProcessLookupError):
            held.send(signal.SIGTERM)
        has_ended = held.wait(grace_s)
        held.kill_group()
        if not has_ended:
            held.wait(grace_s)
    finally:
        held.close()
    return held.pid


def end_left_behind(log_path: Path) -> None:
    """Kill what the process with the log *log_path* had started and has left behind; it must have ended. Blocks.

    Where that was killed, and its agent as well, nobody else does.
    """
    try:
        note = msgspec.json.decode((log_path.parent / LOCK_FILE).read_bytes(), type=_Note)
    except (msgspec.MsgspecError, OSError):
        return
    kill_session(note.pid, started=note.started, output=log_path)


class LifeLine:
    """What a process that may outlive its agent holds of it; made once, before the process starts threads or children.

    Raises:
        ConfigError: this process was not started by a ``SurvivingLauncher``.
    """

    def __init__(self) -> None:
        number, path = os.environ.pop(_LOCK_VARIABLE, ""), os.environ.pop(_LINE_VARIABLE, "")
        if not number.isdigit() or not path:
            raise ConfigError(_LOCK_VARIABLE, got=number, expected="what a SurvivingLauncher sets; start it by one")
        lock, self._path = int(number), Path(path)
        self._guard = threading.Lock()
        self._is_held = self._is_over = False
        # The lock is to tell of this process alone: what it starts, and what it forks, must not have it.
        os.set_inheritable(lock, False)
        file = os.fstat(lock)
        os.register_at_fork(after_in_child=lambda: _close(lock, file))

    def watch(self, *, grace_s: float, on_alone: Callable[[str], None]) -> None:
        """Call *on_alone*, once and from a thread, when no agent has held the line for *grace_s* seconds; say why."""
        threading.Thread(target=self._watch, args=(grace_s, on_alone), name="life line", daemon=True).start()

    def _watch(self, grace_s: float, on_alone: Callable[[str], None]) -> None:
        why = f"its agent has been gone for {grace_s:g} s, and no other has come"
        while True:
            alone = threading.Timer(grace_s, self._give_up, (on_alone, why))
            alone.daemon = True
            alone.start()
            try:
                line = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)  # waits for an agent to open it, too
            except OSError as error:
                alone.cancel()
                self._give_up(on_alone, f"its life line to the agent is gone ({error.strerror})")
                return
            alone.cancel()
            with self._guard:
                self._is_held = True
            while os.read(line, 64):
                continue
            os.close(line)
            with self._guard:
                self._is_held = False
            _log.warning("the agent is gone; the job goes on and waits for the next", extra={"wait_s": grace_s})

    def _give_up(self, on_alone: Callable[[str], None], why: str) -> None:
        with self._guard:
            if self._is_held or self._is_over:
                return  # an agent has come at the last moment
            self._is_over = True
        on_alone(why)


def _claim(folder: Path, name: str) -> int:
    """Return a descriptor of the file ``process``, locked and empty.

    Raises:
        Conflict: a process that lives holds it.
    """
    path = folder / LOCK_FILE
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if lock_nowait(lock):
            os.ftruncate(lock, 0)
            return lock
        os.close(lock)
        if (found := _living(folder)) is not None:
            found[0].close()
            raise Conflict(name, state=f"running already, as process {found[0].pid}", wanted="started again")
        # What a dead process has left behind holds its lock, or one that got no specification and will end.
        path.unlink(missing_ok=True)


def _living(folder: Path) -> tuple[HeldProcess, _Note] | None:
    """Return the process that holds the lock in *folder*, held on to, and what its file tells."""
    try:
        lock = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        if lock_nowait(lock):
            return None
        note = msgspec.json.decode(os.pread(lock, 4096, 0), type=_Note)
        held = HeldProcess(note.pid)
    except (msgspec.MsgspecError, OSError, OverflowError):  # it tells nothing, or of none that lives
        return None
    else:
        # Held on to by now: as long as the lock is not free, and it started when it should have, it is the one.
        if not lock_nowait(lock) and started_at(note.pid) == note.started and not held.wait(0):
            return held, note
        held.close()
        return None
    finally:
        os.close(lock)


def _close(descriptor: int, file: os.stat_result) -> None:
    """Close *descriptor* if it is still that of *file*: it may have been closed, and its number be another file's."""
    with contextlib.suppress(OSError):
        if os.path.samestat(os.fstat(descriptor), file):
            os.close(descriptor)


def _write_note(lock: int, note: _Note) -> None:
    os.pwrite(lock, msgspec.json.encode(note), 0)


def _new_line(path: Path) -> int:
    path.unlink(missing_ok=True)
    os.mkfifo(path, 0o600)
    return _open_line(path)


def _open_line(path: Path) -> int:
    # For reading too, so that it opens whether or not the process reads just now.
    return os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
