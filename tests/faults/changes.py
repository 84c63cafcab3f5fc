"""Waiting for files to come, go or change: woken by the kernel (inotify), never by a look now and then."""

import ctypes
import os
import select
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

_libc: Final = ctypes.CDLL(None, use_errno=True)
_ANY_CHANGE: Final = 0x00000002 | 0x00000040 | 0x00000080 | 0x00000100 | 0x00000200 | 0x00000400
"""Modified, moved from or to, created, deleted, deleted itself: ``inotify(7)``."""


def wait_none(found: Callable[[], list[str]], folders: Iterable[Path], *, what: str, within_s: float) -> None:
    """Return when *found* finds nothing any more, looking anew whenever something in *folders*, at any depth, changes.

    A file in place of a folder is fine too.

    Raises:
        AssertionError: it still finds something after *within_s*; the message says what was waited for.
    """
    roots = list(folders)
    give_up_at = time.monotonic() + within_s
    descriptor = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    if descriptor < 0:
        raise OSError(ctypes.get_errno(), "inotify_init1")
    try:
        while True:
            _watch(descriptor, roots)
            if not (left := found()):
                return
            remaining_s = give_up_at - time.monotonic()
            if remaining_s <= 0 or not select.select([descriptor], [], [], remaining_s)[0]:
                raise AssertionError(f"waited {within_s:g} s for {what}; there still is: {', '.join(left)}")
            os.read(descriptor, 65536)
    finally:
        os.close(descriptor)


def wait_line(log: Path, text: str, *, after: int, within_s: float) -> None:
    """Return when the file *log* holds *text* beyond its first *after* bytes.

    Raises:
        AssertionError: it does not within *within_s*.
    """

    def missing() -> list[str]:
        with log.open("rb") as file:
            file.seek(after)
            said = file.read().decode(errors="replace")
        return [] if text in said else [f"only {said[-2000:]!r}"]

    wait_none(missing, [log], what=f"{text!r} in {log}", within_s=within_s)


def _watch(descriptor: int, roots: list[Path]) -> None:
    """Watch *roots* and the folders in them; one that is watched already stays so."""
    for root in roots:
        for folder, _, _ in os.walk(root) if root.is_dir() else [(root, [], [])]:
            _libc.inotify_add_watch(descriptor, os.fsencode(folder), _ANY_CHANGE)
