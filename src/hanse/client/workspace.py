"""Where things are in a site's workspace, which is one agent's at a time.

A job has a folder, ``jobs/<job id>``. While it runs there it holds the job's package, code and tensors, what tells of
its process (``hanse.launch.surviving``), and what the agent has started, so that the next agent can take it over. The
log alone stays.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from hanse.errors import Conflict
from hanse.launch.held import only_holder
from hanse.launch.process import SET_ASIDE
from hanse.launch.surviving import end_left_behind, end_survivor
from hanse.messages import DeployJob
from hanse.storage.disk import disk_failure

CLIENT_FILE: Final = "client.pid"
"""The agent locks it as long as it runs, and writes its number into it where it is one process's purpose."""


class StartedJob(msgspec.Struct, frozen=True):
    """What an agent has started, for the next one: the job, which start of its process it was, and how it was started.

    ``terms`` is a digest of the site's side of it: an agent with other settings would start it otherwise. ``authority``
    names the key of who gave its certificate.
    """

    deployed: DeployJob
    attempt: int
    terms: str
    authority: str = ""


@dataclass(frozen=True, slots=True)
class JobFolder:
    """Where a site keeps what belongs to one job."""

    path: Path

    @property
    def package(self) -> Path:
        """The job's package, under its digest."""
        return self.path / "package"

    @property
    def code(self) -> Path:
        """The job's code, unpacked."""
        return self.path / "code"

    @property
    def tensors(self) -> Path:
        """The job's tensor files."""
        return self.path / "tensors"

    @property
    def log(self) -> Path:
        """What the job's process said, all attempts in one."""
        return self.path / "job.log"

    @property
    def _started(self) -> Path:
        return self.path / "started"

    def note(self, started: StartedJob) -> None:
        """Note that the job is about to be started.

        Raises:
            StoreFailed: the disk does not take it.
        """
        partial = self._started.with_suffix(".tmp")
        try:
            with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(msgspec.msgpack.encode(started))
            partial.replace(self._started)
        except OSError as error:
            raise disk_failure(f"noting the start of job {self.path.name}", error, self.path) from error

    def started(self) -> StartedJob | None:
        """Return what was noted last; ``None`` where nothing is, or nothing that this release can read."""
        try:
            return msgspec.msgpack.decode(self._started.read_bytes(), type=StartedJob)
        except (OSError, msgspec.MsgspecError):
            return None

    def clear(self) -> None:
        """Delete all but the log, and the folder where there is none; no process of the job may live.

        What that has left behind is killed. What the disk does not let go stays, for the next agent of the workspace to
        delete.
        """
        end_left_behind(self.log)
        found: list[Path] = []
        with suppress(OSError):  # an end and the agent's stop may clear it at the same time
            found = [*self.path.iterdir()]
        for path in found:
            if path.name in (self.log.name, self.log.name + SET_ASIDE):
                continue
            with suppress(OSError):
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)
        with suppress(OSError):  # not empty, or not there
            self.path.rmdir()


def job_folders(workspace: Path) -> list[JobFolder]:
    """Return the folders of all jobs in *workspace*, which are made if there are none."""
    jobs = workspace / "jobs"
    jobs.mkdir(mode=0o700, parents=True, exist_ok=True)
    return [JobFolder(path) for path in sorted(jobs.iterdir()) if path.is_dir()]


@contextmanager
def only_agent_of(workspace: Path) -> Iterator[int]:
    """Hold *workspace* for one agent, until the end of the block or of the process; give the file's descriptor.

    Raises:
        Conflict: another agent has it.
    """
    workspace.mkdir(mode=0o700, parents=True, exist_ok=True)
    with only_holder(workspace / CLIENT_FILE, what=f"the client of {workspace}") as descriptor:
        yield descriptor


def end_orphans(workspace: Path, *, grace_s: float) -> list[int]:
    """End the jobs' processes that an agent which was killed has left in *workspace*; return their numbers. Blocks.

    Their folders are cleared. Where an agent runs they are its own, and left to it.
    """
    pids = []
    try:
        with only_agent_of(workspace):
            for folder in job_folders(workspace):
                pids.append(end_survivor(folder.path, grace_s=grace_s))
                folder.clear()
    except Conflict:
        return []
    return [pid for pid in pids if pid is not None]
