"""What jobs wait for that have not ended and do not run: clients, their package, the store."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from hanse.coordination.absence import Absence
from hanse.coordination.schedule import Wait
from hanse.coordination.waiting import (
    END_TRIED_AGAIN,
    Deployment,
    StoreTrouble,
    TakingUp,
    waiting_of_fetching,
    waiting_of_held_up,
    waiting_of_schedule_held_up,
    waiting_of_scheduled,
    waiting_of_submitted,
    waiting_of_taking_up,
)
from hanse.errors import StoreFailed
from hanse.ids import ClientName, JobId
from hanse.job import JobRecord
from hanse.messages import Waiting
from hanse.server.client_processes import DEPLOY_TIMEOUT_S


class JobWaits:
    """Keeps what each job waits for that does not run; ``of`` tells it, for people.

    *wall* tells POSIX time, *absent* of clients that are not there why.
    """

    def __init__(self, *, wall: Callable[[], float], absent: Callable[[], Mapping[ClientName, Absence]]) -> None:
        self._wall = wall
        self._absent = absent
        self._scheduled: Mapping[JobId, Wait] = {}
        self._fetching: dict[JobId, tuple[float, float]] = {}
        self._deploying: dict[JobId, Deployment] = {}
        self._held_up: dict[JobId, StoreTrouble] = {}
        self._schedule_held_up: tuple[str, float, float] | None = None

    def of(self, record: JobRecord, taking_up: TakingUp | None) -> tuple[Waiting, ...]:
        """Return what a job that has not ended, and does not run, waits for; it may be one that is *taking_up*."""
        if (trouble := self._held_up.get(record.job_id)) is not None:
            return (waiting_of_held_up(trouble),)
        if (fetching := self._fetching.get(record.job_id)) is not None:
            return (waiting_of_fetching(*fetching),)
        if (deployment := self._deploying.get(record.job_id)) is not None:
            return waiting_of_scheduled(deployment)
        if taking_up is not None:
            return waiting_of_taking_up(taking_up)
        wait, held_up = self._scheduled.get(record.job_id), self._schedule_held_up
        if wait is not None and held_up is not None:
            wait = replace(wait, until=max(wait.until, held_up[-1]))  # it is not given up before the schedule goes on
        return (
            *((waiting_of_schedule_held_up(record, *held_up),) if held_up is not None else ()),
            *(waiting_of_submitted(record, wait, absent=self._absent()) if wait is not None else ()),
        )

    # the schedule

    def scheduled(self, waits: Mapping[JobId, Wait]) -> None:
        """Take note of the jobs that the schedule has found to wait."""
        self._scheduled = waits

    def schedule_held_up(self, failed: StoreFailed, *, again_in_s: float) -> None:
        """Take note that the store keeps the schedule from its work, which is tried again in *again_in_s*."""
        now = self._wall()
        _, since, _ = self._schedule_held_up or ("", now, 0.0)
        self._schedule_held_up = failed.reason, since, now + again_in_s

    def schedule_goes_on(self) -> None:
        """Take note that the store does not keep the schedule from its work any more."""
        self._schedule_held_up = None

    # a job that is started or ends

    @contextmanager
    def fetching(self, job_id: JobId, *, within_s: float) -> Iterator[None]:
        """Within the block, which takes *within_s* at most, the server fetches the job's package."""
        began = self._wall()
        self._fetching[job_id] = began, began + within_s
        try:
            yield
        finally:
            del self._fetching[job_id]

    @contextmanager
    def deploying(self, record: JobRecord) -> Iterator[None]:
        """Within the block, the job's clients fetch it and check it."""
        began = self._wall()
        self._deploying[record.job_id] = Deployment(frozenset(record.clients), began, began + DEPLOY_TIMEOUT_S)
        try:
            yield
        finally:
            del self._deploying[record.job_id]

    def deployed(self, job_id: JobId, client: ClientName) -> None:
        """Take note that *client* has taken the job that is being deployed, or will not."""
        deployment = self._deploying[job_id]
        self._deploying[job_id] = replace(deployment, clients=deployment.clients - {client})

    def held_up(self, job_id: JobId, failed: StoreFailed, *, mend_within_s: float) -> None:
        """Take note that the store does not take what becomes of the job, which fails after *mend_within_s* of that."""
        since = self._held_up_since(job_id)
        self._held_up[job_id] = StoreTrouble(failed.reason, since, since + mend_within_s)

    def end_held_up(self, job_id: JobId, failed: StoreFailed, *, again_in_s: float) -> None:
        """Take note that the store does not take it that the job has ended, and is asked again in *again_in_s*."""
        again_at = self._wall() + again_in_s
        self._held_up[job_id] = StoreTrouble(failed.reason, self._held_up_since(job_id), again_at, END_TRIED_AGAIN)

    def goes_on(self, job_id: JobId) -> None:
        """Take note that the store has taken what becomes of the job, or that this is not waited for any more."""
        self._held_up.pop(job_id, None)

    def _held_up_since(self, job_id: JobId) -> float:
        before = self._held_up.get(job_id)
        return self._wall() if before is None else before.since
