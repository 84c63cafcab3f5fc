"""A log that its process writes without end: what lies between its beginning and its last part is given up.

A hole is made in the file there: the disk gets its space back, and the rest stays where it was, at the same offsets. So
nothing that is being written can be lost, whoever writes, and neither can the last lines.

A file tells nobody how long it gets, so whoever runs processes has their logs shortened at each of its own beats
(``LongLogs``). A log exceeds its limit by what is written between two of them.
"""

import asyncio
import contextlib
import ctypes
import errno
import logging
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from hanse.launch.process import MAX_LOG_BYTES

HEAD_BYTES: Final = 1024 * 1024
TAIL_BYTES: Final = MAX_LOG_BYTES // 2

_BLOCK_BYTES: Final = 512
"""The unit of ``st_blocks``: stat(2)."""
_KEEP_SIZE: Final = 0x01
_PUNCH_HOLE: Final = 0x02
"""Modes of fallocate(2)."""

_log = logging.getLogger(__name__)


class LongLogs:
    """The logs of processes that run; a beat of whoever runs them keeps what they occupy within ``MAX_LOG_BYTES``."""

    def __init__(self) -> None:
        self._shortening = asyncio.Lock()
        self._unlimited: set[Path] = set()

    async def shorten(self, paths: Iterable[Path]) -> None:
        """Do as ``shorten`` with each of *paths*; nothing while an earlier call still does, as on a slow disk.

        Where the system or the file's disk has no holes, a warning says so, once for each log, and the log grows.
        """
        if self._shortening.locked():
            return
        async with self._shortening:
            for path in paths:
                try:
                    await asyncio.to_thread(shorten, path)
                except OSError as error:
                    if path not in self._unlimited:
                        _log.warning("a log's size is not limited", extra={"path": str(path), "reason": error.strerror})
                    self._unlimited.add(path)


def shorten(path: Path) -> None:
    """Make a hole in the log at *path* if it occupies more than ``MAX_LOG_BYTES``; no log is fine.

    Its first ``HEAD_BYTES`` stay, and its last ``TAIL_BYTES``.

    Raises:
        OSError: the file cannot be opened, or no hole can be made there.
    """
    with contextlib.suppress(FileNotFoundError):
        log = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            now = os.fstat(log)
            hole_bytes = now.st_size - TAIL_BYTES - HEAD_BYTES
            if stat.S_ISREG(now.st_mode) and now.st_blocks * _BLOCK_BYTES > MAX_LOG_BYTES and hole_bytes > 0:
                _make_hole(log, HEAD_BYTES, hole_bytes)
        finally:
            os.close(log)


def _make_hole(descriptor: int, start: int, count: int) -> None:
    fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if fallocate is None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
    fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    if fallocate(descriptor, _KEEP_SIZE | _PUNCH_HOLE, start, count) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
