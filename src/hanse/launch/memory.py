"""Which process the system kills when memory runs out, and whether it has killed one.

A process that it kills ends by signal 9 and says nothing, but the system counts. The count is of its control group,
version 2 or 1; without one that counts, of the whole machine. It is read before the process does anything, and when it
has ended: if it has grown, and nobody of us sent the signal, memory is why.
"""

import contextlib
import signal
from pathlib import Path
from typing import Final

OUT_OF_MEMORY: Final = "out-of-memory"
"""The code of this cause."""

MADE_LIKELIER: Final = 500
"""How much likelier a job's process is killed than it would be, as if it used half of the memory that there is more."""

MOST_LIKELY: Final = 1000

_PROC: Final = Path("/proc")
_GROUPS: Final = Path("/sys/fs/cgroup")


class KillCounter:
    """How many processes the system has killed for memory where process *pid* runs; by default, where this one does.

    *proc* and *groups* are where the system tells of processes and of control groups.
    """

    def __init__(self, pid: int | None = None, *, proc: Path = _PROC, groups: Path = _GROUPS) -> None:
        own = _read(proc / str(pid or "self") / "cgroup")
        self._file = next((path for path in _counters(own, groups) if _count(path) is not None), proc / "vmstat")
        self.before = self.read()
        """The count when this was made; ``None`` where nothing counts."""

    def read(self) -> int | None:
        """Return the count now; ``None`` where nothing counts, or not any more."""
        return _count(self._file)


def first_to_go(pid: int, *, proc: Path = _PROC) -> None:
    """Have the system kill process *pid*, and what it starts, rather than others when memory runs out.

    A job's process can be started again, and its agent tells why; what else is on the machine cannot know. Where the
    system does not take it, nothing is changed.
    """
    score = proc / str(pid) / "oom_score_adj"
    with contextlib.suppress(OSError, ValueError):
        score.write_text(str(min(int(score.read_text()) + MADE_LIKELIER, MOST_LIKELY)))


def cause_of(status: int, *, kills_before: int | None, kills_after: int | None) -> str:
    """Return ``OUT_OF_MEMORY`` if a process that nobody asked to end, and that ended with *status*, ran out of memory.

    Empty when it did not, or nothing tells.
    """
    if status != -signal.SIGKILL or kills_before is None or kills_after is None:
        return ""
    return OUT_OF_MEMORY if kills_after > kills_before else ""


def _counters(own: str, groups: Path) -> list[Path]:
    """Return the files that may count for a process whose ``/proc/<pid>/cgroup`` is *own*, the nearest first.

    A container may see its own group as the root of the tree, whatever the path says.
    """
    files = []
    for line in own.splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":  # version 2, alone or beside version 1
            files += [root / path.lstrip("/") / "memory.events" for root in (groups, groups / "unified")]
            files += [root / "memory.events" for root in (groups, groups / "unified")]
        elif "memory" in controllers.split(","):
            root = groups / "memory"
            files += [root / path.lstrip("/") / "memory.oom_control", root / "memory.oom_control"]
    return files


def _count(path: Path) -> int | None:
    for line in _read(path).splitlines():
        name, _, count = line.partition(" ")
        if name == "oom_kill" and count.strip().isdigit():
            return int(count)
    return None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
