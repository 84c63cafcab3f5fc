"""A control group in which little memory may be used, so that the system kills who uses more; version 1 or 2."""

import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tests.faults.requirements import missing

_GROUPS: Final = Path("/sys/fs/cgroup")


class SmallMemory:
    """The control group in *folder*."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, pid: int) -> None:
        """Have process *pid*, and what it starts from now on, be of the group."""
        (self.folder / "cgroup.procs").write_text(str(pid))

    @property
    def prefix(self) -> Sequence[str]:
        """The words before a command that runs it in the group."""
        return ["sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', str(self.folder)]


@contextmanager
def small_memory(*, megabytes: int) -> Iterator[SmallMemory]:
    """Make a control group below this process's own until the block ends; skip where that cannot be.

    Nobody may be left in it then.
    """
    parent, limits = _limits(megabytes << 20)
    folder = parent / f"hanse-test-{secrets.token_hex(4)}"
    try:
        folder.mkdir()
    except OSError as error:
        missing("memcg", f"no control group can be made in {parent}: {error.strerror}")
    try:
        for name, most in limits.items():
            try:
                (folder / name).write_text(str(most))
            except OSError as error:
                if "sw" not in name:  # a system that counts no swap has no file for it
                    missing("memcg", f"{folder / name} cannot be written: {error.strerror}")
        yield SmallMemory(folder)
    finally:
        folder.rmdir()


def _limits(size_bytes: int) -> tuple[Path, dict[str, int]]:
    """Return this process's group, and what a group below it that may use *size_bytes* has in which files, in order."""
    found = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        found.update(dict.fromkeys(controllers.split(","), path.lstrip("/")))
    if "memory" in found:
        limits = dict.fromkeys(("memory.limit_in_bytes", "memory.memsw.limit_in_bytes"), size_bytes)
        return _GROUPS / "memory" / found["memory"], limits
    parent = _GROUPS / found.get("", "")
    controllers_file = parent / "cgroup.subtree_control"
    if not controllers_file.exists() or "memory" not in controllers_file.read_text().split():
        missing("memcg", f"the control group {parent} gives its children no limit of memory")
    return parent, {"memory.max": size_bytes, "memory.swap.max": 0}
