"""Where the tensors of a server's jobs lie, and their packages: what is sent to a scope, or asked of it."""

from pathlib import Path

from hanse.cell.transfer import Files
from hanse.errors import NotFound
from hanse.ids import ClientName, JobId
from hanse.server.live_jobs import LiveJobs
from hanse.server.run_folder import RunFolders
from hanse.storage.records import Store
from hanse.storage.tensors import TensorFiles


class JobFiles:
    """The files of the *live* jobs' runs, those that *folders* keep of all jobs, and uploads, in *workspace*."""

    def __init__(self, live: LiveJobs, store: Store, folders: RunFolders, *, workspace: Path) -> None:
        self._live = live
        self._store = store
        self._folders = folders
        self._workspace = workspace

    def run_files(self, job_id: JobId, participant: str, *, write: bool) -> Files | None:
        """Return the tensor files of a running job in which *participant* takes part, else ``None``.

        Raises:
            NotInService: the job is to go on here, and does not yet.
        """
        if (run := self._live.runs.get(job_id)) is None:
            self._live.demand_taken_up(job_id)
        if run is None or run.has_ended or participant not in run.run.clients:
            return None
        return run.inbox(ClientName(participant)) if write else run.files

    def package_files(self, job_id: JobId) -> TensorFiles:
        """Return the files that hold the job's package."""
        return TensorFiles(self._folders.of(job_id).package)

    async def result_files(self, job_id: JobId) -> TensorFiles:
        """Return the files that hold the job's result, if it has one.

        Raises:
            NotFound: there is no such job, or its result is lost.
            StoreFailed: its result is not to be had now.
        """
        folder = self._folders.of(job_id)
        if folder.mirror is not None:
            await folder.have_result(await self._store.job(job_id))
        elif not folder.path.is_dir():
            raise NotFound("job", job_id)
        return TensorFiles(folder.result)

    def upload_files(self, submitter: str) -> TensorFiles:
        """Return the files into which *submitter* uploads packages."""
        return TensorFiles(self._workspace / "uploads" / submitter)

    def takes_part(self, job_id: JobId, client: str) -> bool:
        """Return whether *client* takes part in a running job, or is asked to."""
        return self._live.takes_part(job_id, client)
