"""A wall clock of a participant's own, which a test sets while it runs (libfaketime, which Debian calls ``faketime``).

Only the wall clock is another: time that passes (the monotonic clock) passes as it does, as it would on a machine whose
clock is set.
"""

from pathlib import Path
from typing import Final

from tests.faults.requirements import missing

DAY_S: Final = 24 * 3600
_LIBRARIES: Final = ("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib", "/usr/lib64")


class Clock:
    """A clock that is right until it is ``set``; *file* is where the processes that go by it look."""

    def __init__(self, file: Path) -> None:
        self._library = _library()
        self._file = file
        self.set(0)

    @property
    def environment(self) -> dict[str, str]:
        """What a process, and all that it starts, is to have in its environment to go by this clock."""
        return {
            "LD_PRELOAD": str(self._library),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "NO_FAKE_STAT": "1",
        }

    def set(self, ahead_s: int) -> None:
        """Have the clock be *ahead_s* seconds ahead of the right time, or behind it where that is negative."""
        draft = self._file.with_suffix(".draft")
        draft.write_text(f"{ahead_s:+d}\n")
        draft.replace(self._file)


def _library() -> Path:
    paths = [Path(folder) / "faketime" / "libfaketimeMT.so.1" for folder in _LIBRARIES]
    found = next((path for path in paths if path.exists()), None)
    return found or missing("faketime", "libfaketime is not installed")
