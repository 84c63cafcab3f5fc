"""The jobs that are alive at a server: being started, being taken up, or running; and who takes part in them."""

import asyncio
from collections.abc import Collection

from hanse.coordination.waiting import TakingUp
from hanse.errors import NotFound, NotInService
from hanse.ids import ClientName, JobId
from hanse.job import JobRecord
from hanse.server.active_run import ActiveRun


class LiveJobs:
    """Which jobs a tenure has a task for, from when it starts a job or takes it up until that has ended here.

    *runs* are those that run, *taking_up* those that an earlier tenure has begun and that do not run here yet. Once
    *are_known*, all of the project's runs are in here. Changed on the event loop alone, and read from any thread.
    """

    def __init__(self) -> None:
        self.runs: dict[JobId, ActiveRun] = {}
        self.taking_up: dict[JobId, TakingUp] = {}
        self.are_known = False
        self._tasks: dict[JobId, asyncio.Task[None]] = {}
        self._records: dict[JobId, JobRecord] = {}

    def __contains__(self, job_id: JobId) -> bool:
        return job_id in self._tasks

    def __len__(self) -> int:
        return len(self._tasks)

    # a job's way

    def begin(self, record: JobRecord, task: asyncio.Task[None]) -> None:
        """Take note that *task* starts the job, or takes it up, and then runs it."""
        self._tasks[record.job_id], self._records[record.job_id] = task, record

    def run(self, active: ActiveRun) -> None:
        """Take note that the job runs."""
        self.runs[active.job_id] = active
        self.taking_up.pop(active.job_id, None)

    def has_run(self, job_id: JobId) -> None:
        """Take note that its run has ended: whoever asks from now on finds no job that is alive."""
        del self.runs[job_id]
        self._tasks.pop(job_id, None)

    def end(self, job_id: JobId) -> None:
        """Take note that the job's task is over, and with it all that is known here of the job."""
        self._tasks.pop(job_id, None)
        del self._records[job_id]
        self.taking_up.pop(job_id, None)

    def task_of(self, job_id: JobId) -> asyncio.Task[None] | None:
        """Return the task of a job that is alive."""
        return self._tasks.get(job_id)

    def cancel(self) -> None:
        """Have the tasks of all jobs end."""
        for task in self._tasks.values():
            task.cancel()

    def starting(self) -> Collection[JobId]:
        """Return the jobs that are alive and do not run yet."""
        return set(self._tasks) - set(self.runs)

    # who takes part

    def expected_at(self, client: ClientName) -> set[JobId]:
        """Return the jobs that are to run at *client*."""
        # In this order: a run that is taken up at this moment is in the one or the other, or in both.
        expected = {job_id for job_id, coming in list(self.taking_up.items()) if client in coming.clients}
        return expected | {job_id for job_id, run in list(self.runs.items()) if client in run.run.clients}

    def runs_of(self, client: ClientName) -> list[ActiveRun]:
        """Return the runs in which *client* takes part, the latest last."""
        return [run for run in self.runs.values() if client in run.run.clients]

    def records_of(self, client: ClientName) -> list[JobRecord]:
        """Return the jobs that are alive and meant for *client*."""
        return [record for record in self._records.values() if client in record.clients]

    def takes_part(self, job_id: JobId, client: str) -> bool:
        """Return whether *client* takes part in a running job, or is asked to."""
        if (run := self.runs.get(job_id)) is not None:
            return client in run.run.clients
        record = self._records.get(job_id)
        return record is not None and client in record.clients

    def current_task(self, client: ClientName) -> tuple[JobId, int] | None:
        """Return the job and round that *client* works for: of its runs, the one that began last."""
        runs = [run for run in self.runs_of(client) if not run.has_ended]
        return (runs[-1].job_id, runs[-1].run.round) if runs else None

    # a run that is asked for

    def run_of(self, job_id: JobId) -> ActiveRun:
        """Return the run of a job.

        Raises:
            NotFound: it does not run.
            NotInService: it is to go on here, and does not yet.
        """
        if (run := self.runs.get(job_id)) is None:
            self.demand_taken_up(job_id)
            raise NotFound("running job", job_id)
        return run

    def demand_alive(self, job_id: JobId) -> None:
        """Return if the job is being started or runs, or while that is not known.

        Raises:
            NotFound: it does not.
        """
        run = self.runs.get(job_id)
        is_alive = job_id in self._tasks and (run is None or not run.has_ended)
        if self.are_known and not is_alive:
            raise NotFound("running job", job_id)

    def demand_taken_up(self, job_id: JobId) -> None:
        """Return unless the job is, or may be, a run of this project that goes on, but not here at this moment.

        Raises:
            NotInService: it is still to be taken up here, or this server has left its jobs.
        """
        if job_id in self.taking_up:
            raise NotInService(f"Server not in service: it takes up job {job_id}")
        if not self.are_known:
            raise NotInService
