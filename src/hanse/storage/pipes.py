"""Word between the processes of one machine: a folder with one named pipe for each who listens.

Whoever has changed what others wait for writes a byte into every pipe there, which means "look". Nobody waits for
anybody: a pipe that is full is heard anyway. One that nobody reads was left by a process that was killed, and whoever
meets it deletes it.

A pipe gets its name in two steps. Somebody who tells may come after it was made and before it is read, and delete it as
a dead one's. Its maker then misses it when giving it its second name, and makes another. So what has a second name is
read for as long as its process lives, and no word to it is lost.
"""

import asyncio
import errno
import logging
import os
import secrets
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hanse.errors import StoreFailed
from hanse.storage.disk import disk_failure

_log = logging.getLogger(__name__)

_WORD: Final = b"!"
_AT_ONCE_BYTES: Final = 4096
_NO_PIPES: Final = frozenset({errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP})
"""How file systems say that they have none."""


class Listeners:
    """All who listen, each by a pipe in *folder*, which the first of them makes (mode 0700)."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._has_failed = False

    def tell(self) -> None:
        """Wake all of them. Never blocks, and never raises: who was not told is only late."""
        try:
            self._tell_all()
        except FileNotFoundError:  # nobody has ever listened
            return
        except OSError as error:
            if not self._has_failed:  # once, not with each beat
                self._has_failed = True
                extra = {"folder": str(self._folder), "reason": error.strerror}
                _log.warning("the lease has moved, and not all who wait for it could be told", extra=extra)
        else:
            self._has_failed = False

    def _tell_all(self) -> None:
        failures: list[OSError] = []
        folder = _open_folder(self._folder)
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    try:
                        _tell(entry, folder)
                    except FileNotFoundError:  # who listened there has just closed it
                        continue
                    except OSError as error:  # the others are told all the same
                        failures.append(error)
        finally:
            os.close(folder)
        if failures:
            raise failures[0]


def _tell(entry: os.DirEntry[str], folder: int) -> None:
    """Write into the pipe *entry*, or delete it if nobody reads it; leave alone what is no pipe."""
    # That is not even opened: it may be a link to the database's file, and closing that would end this process's locks
    # on it (https://sqlite.org/howtocorrupt.html, 2.2).
    if not stat.S_ISFIFO(entry.stat(follow_symlinks=False).st_mode):
        return
    try:
        pipe = os.open(entry.name, os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        os.unlink(entry.name, dir_fd=folder)
        return
    try:
        if stat.S_ISFIFO(os.fstat(pipe).st_mode):
            with suppress(BlockingIOError, BrokenPipeError):  # it is full, or was closed just now
                os.write(pipe, _WORD)
    finally:
        os.close(pipe)


@dataclass(frozen=True, slots=True)
class _Pipe:
    """A pipe that is read, and the event loop that does it."""

    path: Path
    descriptor: int
    loop: asyncio.AbstractEventLoop

    def is_heard_in(self, loop: asyncio.AbstractEventLoop) -> bool:
        """Return whether who tells finds it, and *loop* hears it."""
        return self.loop is loop and os.path.lexists(self.path)


class PipeListener:
    """See ``Listener``: a pipe of its own in *folder*, made when it is first needed, and anew when it was deleted."""

    def __init__(self, folder: Path, heard: Callable[[], None], *, name: str) -> None:
        self._folder, self._heard, self._name = folder, heard, name
        self._pipe: _Pipe | None = None

    async def listen(self) -> None:
        """See ``Listener``."""
        loop = asyncio.get_running_loop()
        if self._pipe is not None and self._pipe.is_heard_in(loop):
            return
        self._drop()
        try:
            path, descriptor = self._make()
        except OSError as error:
            doing = f"listening to {self._name}"
            if error.errno in _NO_PIPES:
                why = "its file system has no named pipes, by which servers hear of each other; keep it on one that has"
                raise StoreFailed(doing, why) from error
            raise disk_failure(doing, error, self._folder) from error
        self._pipe = _Pipe(path, descriptor, loop)
        loop.add_reader(descriptor, self._hear, descriptor)

    async def close(self) -> None:
        """See ``Listener``."""
        self._drop()

    def _make(self) -> tuple[Path, int]:
        while True:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            with suppress(FileNotFoundError):  # it, or the folder, was deleted meanwhile
                return _make_pipe(self._folder)

    def _hear(self, descriptor: int) -> None:
        with suppress(BlockingIOError):
            os.read(descriptor, _AT_ONCE_BYTES)
        self._heard()

    def _drop(self) -> None:
        pipe, self._pipe = self._pipe, None
        if pipe is None:
            return
        if not pipe.loop.is_closed():
            pipe.loop.remove_reader(pipe.descriptor)
        with suppress(OSError):  # then the next who tells deletes it
            pipe.path.unlink()
        os.close(pipe.descriptor)


def _make_pipe(path: Path) -> tuple[Path, int]:
    """Make a pipe in the folder at *path*; return where it is, and what it is read by."""
    name = secrets.token_hex(16)
    folder = _open_folder(path)
    try:
        os.mkfifo(f".{name}", 0o600, dir_fd=folder)
        # For writing, too, so that it never ends, however often those close it who write.
        pipe = os.open(f".{name}", os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
        try:
            os.rename(f".{name}", name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            os.close(pipe)
            raise
        return path / name, pipe
    finally:
        os.close(folder)


def _open_folder(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
