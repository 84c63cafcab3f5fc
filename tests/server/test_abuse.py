"""What hostile or unlucky sites, people and disks must not bring about: one's trouble is not everybody's."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hanse.errors import Conflict, HanseError, StoreFailed
from hanse.ids import ClientName, JobId
from hanse.job import JobRecord, JobState, WorkflowSpec
from hanse.messages import Channel, JobEnded, JobFailure, LogMetrics, TaskFault, TaskResult, UpdateRef
from hanse.model import Model
from hanse.server import FederatedServer
from hanse.server.bounds import MAX_METRICS, MAX_TAIL_CHARS
from hanse.storage.memory import MemoryStore

from .job_world import Site, Threads, answer, outcome, package, small, spec, submit
from .world import Dialler, args, on_loop, settings, wait

MakeServer = Callable[..., FederatedServer]
LONG = "x" * 1_000_000


class TroubledStore(MemoryStore):
    """A store in which a test meddles between the schedule's look at the jobs and what it does about them."""

    def __init__(self) -> None:
        super().__init__()
        self.after_looking: Callable[[list[JobRecord]], Any] | None = None
        self.failures = 0
        """How many of the following calls find the disk full."""

    async def jobs(self, **narrowed: Any) -> list[JobRecord]:
        self._may_fail()
        found = await super().jobs(**narrowed)
        if narrowed.get("states") == (JobState.SUBMITTED,) and found and self.after_looking is not None:
            await self.after_looking(found)
        return found

    async def renew_lease(self, epoch: int, **more: Any) -> Any:
        self._may_fail()
        return await super().renew_lease(epoch, **more)

    async def replace_job(self, epoch: int, record: JobRecord, **more: Any) -> None:
        self._may_fail()
        await super().replace_job(epoch, record, **more)

    async def end_run(self, epoch: int, record: JobRecord, **more: Any) -> None:
        self._may_fail()
        await super().end_run(epoch, record, **more)

    def _may_fail(self) -> None:
        if self.failures > 0:
            self.failures -= 1
            raise StoreFailed("writing", "No space left on device")


@pytest.fixture
def store() -> TroubledStore:
    return TroubledStore()


@pytest.fixture
def start(deployed: MakeServer, store: TroubledStore, tmp_path: Path) -> Callable[..., FederatedServer]:
    def make(launcher: Any = None, **more: Any) -> FederatedServer:
        arguments = args(tmp_path / "ws", launcher=launcher or Threads(), settings=settings(**more))
        return deployed(arguments=arguments, snapshot_persistor=store)

    return make


StartServer = Callable[..., FederatedServer]


def w(value: float) -> Model:
    return Model({"w": np.full(3, value, np.float32), "b": np.asarray(value, np.float32)})


def completes(server: FederatedServer, site: Site, folder: Path) -> bool:
    """Return whether a job of one round at *site* completes."""
    job_id = submit(server, folder, min_clients=1, workflow=WorkflowSpec("fedavg", {"rounds": 1}))
    task = site.task()
    while not task.key.client == site.name:
        task = site.task()
    site.send(answer(task, w(1)))
    return outcome(server, job_id).state is JobState.COMPLETED


# the schedule


def test_a_job_aborted_while_it_is_being_scheduled_hurts_no_other(
    start: StartServer, store: TroubledStore, dialler: Dialler, tmp_path: Path
) -> None:
    server = start()
    site = Site(dialler, server, "site-1")

    async def abort(found: list[JobRecord]) -> None:
        store.after_looking = None
        await server.jobs.abort(found[0].job_id, reason="changed my mind")

    store.after_looking = abort
    aborted = submit(server, tmp_path, min_clients=1)

    assert outcome(server, aborted).state is JobState.ABORTED
    assert completes(server, site, tmp_path / "next")


def test_a_job_that_is_scheduled_while_it_is_being_aborted_is_aborted(
    start: StartServer, store: TroubledStore, dialler: Dialler, tmp_path: Path
) -> None:
    server = start()
    job_id = submit(server, tmp_path, min_clients=1)
    looked = store.job
    site: list[Site] = []

    async def too_early(asked: JobId) -> JobRecord:
        record = await looked(asked)
        if record.state is JobState.SUBMITTED:
            epoch = server.jobs.services.epoch
            taken = record.__class__(**{f: getattr(record, f) for f in record.__struct_fields__})
            moved = msgspec_replace(taken, state=JobState.SCHEDULED)
            await MemoryStore.replace_job(store, epoch, moved, was=JobState.SUBMITTED)
        return record

    store.job = too_early  # type: ignore[method-assign]

    assert wait(server.jobs.abort(job_id, reason="no")).state is JobState.ABORTED
    del site


def msgspec_replace(record: JobRecord, **changes: Any) -> JobRecord:
    import msgspec

    return msgspec.structs.replace(record, **changes)
