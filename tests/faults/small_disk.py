"""A disk of a few megabytes (a size-limited tmpfs) that a test fills up and gives space back on."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.faults.requirements import missing


class SmallDisk:
    """A disk mounted at *folder*."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._filler = folder / "filler"

    def fill(self, *, but_bytes: int = 0) -> None:
        """Leave no more than *but_bytes* free."""
        with self._filler.open("ab") as file:
            while (free := self._free_bytes() - but_bytes) > 0:
                os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), free)

    def give_back(self) -> None:
        """Take up no space any more."""
        self._filler.unlink(missing_ok=True)

    def _free_bytes(self) -> int:
        state = os.statvfs(self.folder)
        return state.f_bavail * state.f_frsize


@contextmanager
def small_disk(folder: Path, *, megabytes: int) -> Iterator[SmallDisk]:
    """Mount a disk of this size at *folder*, which is made, until the block ends; skip where that cannot be."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    options = f"size={megabytes}m,mode=0700"
    try:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        missing("tmpfs", "there is no 'mount'")
    if done.returncode != 0:
        missing("tmpfs", f"mounting one needs root: {done.stderr.strip()}")
    try:
        yield SmallDisk(folder)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
