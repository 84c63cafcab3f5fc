"""The second role of ``FederatedServer``: in a job's own process, one cell linked to the parent, and one run."""

from pathlib import Path

from hanse.cell.cell import Cell
from hanse.cell.loop import background_loop, run
from hanse.errors import Conflict
from hanse.events import Handlers
from hanse.ids import JobId
from hanse.job import JobSpec
from hanse.messages import Credentials, RunEnded, RunSnapshot
from hanse.server.job_cell import JobCell, connect
from hanse.server.run_manager import LocalRun, RunManager


class RunHost:
    """The job cell and the run of this process; its methods are called from plain threads."""

    def __init__(self, project: str, handlers: Handlers, *, heartbeat_s: float) -> None:
        self._project = project
        self._handlers = handlers
        self._heartbeat_s = heartbeat_s
        self._job_cell: JobCell | None = None
        self._run: LocalRun | None = None

    def connect(self, job_id: JobId, parent_url: str, credentials: Credentials) -> Cell:
        """Return the job's cell, linked to its parent at *parent_url*.

        Raises:
            HanseError: the parent does not answer, or does not take the credentials.
        """
        self._job_cell = run(
            connect(job_id, parent_url, credentials, project=self._project, on_abort=self._abort_as_told)
        )
        return self._job_cell.cell

    def manager(self, workspace: Path, job_id: JobId) -> RunManager:
        """Return what holds a run's components, handlers and context."""
        return RunManager(job_id, workspace, self._project, self._handlers)

    def start(self, manager: RunManager, spec: JobSpec, snapshot: RunSnapshot | None) -> LocalRun:
        """Return the run of *spec*, which is the current one until ``end``.

        Raises:
            Conflict: there is no job cell, or a run already.
        """
        if self._job_cell is None or self._run is not None:
            state = "without a job cell" if self._job_cell is None else "running another"
            raise Conflict(f"run {manager.job_id}", state=state, wanted="started")
        self._run = LocalRun(manager, spec, self._job_cell.link, heartbeat_s=self._heartbeat_s, snapshot=snapshot)
        return self._run

    def drive(self) -> RunEnded:
        """Drive the current run to its end.

        Raises:
            Conflict: there is none.
        """
        if self._run is None:
            raise Conflict("the run", state="not started", wanted="run")
        return run(self._run.drive())

    def end(self) -> None:
        """Have no current run any more."""
        self._run = None

    def abort(self, reason: str) -> None:
        """Abort the current run, if there is one; from any thread."""
        if self._run is not None:
            background_loop().call_soon_threadsafe(self._run.abort, reason)

    def stop_after_round(self) -> None:
        """Have the current run, if there is one, end with its present round; from any thread."""
        if self._run is not None:
            background_loop().call_soon_threadsafe(self._run.stop_after_round)

    def close_cell(self) -> None:
        """Close the job's cell, if there is one; a run that still goes on ends, for it can do nothing without."""
        if self._run is not None:
            background_loop().call_soon_threadsafe(self._run.cut_off)
        if self._job_cell is not None:
            run(self._job_cell.close())
            self._job_cell = None

    def _abort_as_told(self, reason: str) -> None:
        if self._run is not None:
            self._run.abort(reason)
