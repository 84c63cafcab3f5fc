"""What a process has started in turn and leaves behind where it is killed at once with whoever started it.

Whoever has started a process kills what that leaves behind (``process``), and a process whose parent dies ends with all
that it has started. Where both are killed, nobody does. So whoever starts processes keeps a note of each while it
lives, in a folder that is its own, and whoever comes after it ends what those that are noted there have left.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path

import msgspec

from hanse.launch.held import kill_session, started_at


class _Note(msgspec.Struct, frozen=True):
    """When a process started (``started_at``), and the file that its output goes to; its number is the note's name."""

    started: int
    log: str


@dataclass(frozen=True, slots=True)
class ProcessNotes:
    """The notes in *folder*, which is one process's at a time."""

    folder: Path

    def keep(self, pid: int, log_path: Path) -> None:
        """Note that process *pid* lives, whose output goes to the file *log_path*.

        Raises:
            OSError: the disk does not take it.
        """
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        note = _Note(started_at(pid), str(log_path.absolute()))
        (self.folder / str(pid)).write_bytes(msgspec.json.encode(note))

    def drop(self, pid: int) -> None:
        """Have no note of process *pid* any more: it has ended, and what it left behind, too."""
        with contextlib.suppress(OSError):  # one that stays is of a session that there is not
            (self.folder / str(pid)).unlink()

    def end_left_behind(self) -> None:
        """Kill the processes that are noted, as far as they live, and what they have left behind. Blocks.

        A note that tells nothing is of a process that got no specification, and has ended by itself.
        """
        for path in [*self.folder.glob("[0-9]*")]:
            pid = int(path.name)
            with contextlib.suppress(OSError, msgspec.MsgspecError):
                note = msgspec.json.decode(path.read_bytes(), type=_Note)
                kill_session(pid, started=note.started, output=Path(note.log))
            self.drop(pid)
