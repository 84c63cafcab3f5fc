"""Which error stands for what the disk, the database or the machine did not do; a full disk is told apart.

And what it takes to have the disk keep what was written.
"""

import errno
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from hanse.errors import NoSpace, NotStarted, StoreFailed

_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
_DISK_FULL: Final = "53100"
"""What PostgreSQL calls it."""


@contextmanager
def on_disk(doing: str, folder: Path, on_trouble: Callable[[StoreFailed], None] = lambda _: None) -> Iterator[None]:
    """Have what the disk with *folder* refuses in the block raise ``StoreFailed``; *on_trouble* hears of it first."""
    try:
        yield
    except OSError as error:
        failed = disk_failure(doing, error, folder)
        on_trouble(failed)
        raise failed from error


def disk_failure(doing: str, error: OSError, folder: Path) -> StoreFailed:
    """Return the error that says that the disk with *folder* failed by *error* while *doing*."""
    why = error.strerror or str(error)
    if error.errno in _FULL:
        return NoSpace(doing, disk=str(mount_point(folder)), folder=str(folder), why=why)
    return StoreFailed(doing, why if str(folder) in doing else f"{why} (in {folder})")


def start_failure(what: str, error: OSError, folder: Path) -> NoSpace | NotStarted:
    """Return the error that says that *what*, a process in *folder*, could not be started because of *error*."""
    failed = disk_failure(f"starting {what}", error, folder)
    return failed if isinstance(failed, NoSpace) else NotStarted(what, error.strerror or str(error), folder=str(folder))


def database_failure(error: BaseException, name: str, *, doing: str = "using") -> StoreFailed:
    """Return the error that says that the database *name* failed by *error*, its driver's own, while *doing* it."""
    why = " ".join(str(error).split())
    if getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_FULL:
        folder = Path(name).absolute().parent
        return NoSpace(f"{doing} {name}", disk=str(mount_point(folder)), folder=str(folder), why=why)
    if getattr(error, "sqlstate", "") == _DISK_FULL:
        return NoSpace(f"{doing} {name}", disk="the database's server", folder=name, why=why)
    return StoreFailed(f"{doing} {name}", why)


def delete_tree(folder: Path) -> None:
    """Delete *folder* with all that is in it, also while another deletes some of that."""
    while folder.exists():
        with suppress(FileNotFoundError):  # of what another was faster with; the rest is still there
            shutil.rmtree(folder)


def sync_tree(folder: Path) -> None:
    """Return when *folder* with all that is in it, and its name, are on the disk, to survive a power failure.

    Raises:
        StoreFailed: the disk does not take it.
    """
    with on_disk(f"syncing {folder}", folder):
        for path, _, names in os.walk(folder, topdown=False):
            for name in names:
                fsync(Path(path, name))
            fsync(Path(path))
        fsync(folder.parent)


def mount_point(path: Path) -> Path:
    """Return where the disk is mounted that holds *path*, or would hold it."""
    path = path.absolute()
    while not os.path.ismount(path) and path != path.parent:
        path = path.parent
    return path


def fsync(path: Path) -> None:
    """Return when the file or folder at *path* itself is on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
