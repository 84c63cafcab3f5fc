"""What jobs have left behind is deleted, by the next server too, and none of it is in a run's way."""

import errno
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from hanse.errors import StoreFailed
from hanse.ids import JobId
from hanse.job import JobRecord, JobState, WorkflowSpec
from hanse.messages import Channel, Heartbeat
from hanse.model import Model
from hanse.server import FederatedServer, leftovers
from hanse.server.leftovers import DELETED_WITHIN_S
from hanse.server.run_folder import RunFolder
from hanse.storage.records import store_of
from hanse.storage.store import SqlStore
from hanse.storage.tensors import TensorFiles

from .job_world import Site, Threads, answer, outcome, plus, submit
from .world import Dialler, args, on_loop, settings, wait

StartServer = Callable[[], FederatedServer]


@pytest.fixture
def start(deployed: Callable[..., FederatedServer], tmp_path: Path) -> StartServer:
    """``start()``: a deployed server whose runs are threads."""
    return lambda: deployed(arguments=args(tmp_path / "ws", launcher=Threads(), settings=settings()))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Where the servers' runs are."""
    return tmp_path / "ws" / "runs"


def ended(server: FederatedServer, tmp_path: Path) -> JobId:
    """Return a job that has ended."""
    job_id = submit(server, tmp_path, min_clients=1)
    wait(server.jobs.abort(job_id, reason="it is to leave something"))
    return job_id


def test_a_server_started_again_deletes_the_tensors_of_runs_that_ended_when_it_was_killed(
    start: StartServer, runs: Path, tmp_path: Path
) -> None:
    first = start()
    jobs = [runs / ended(first, tmp_path) for _ in range(2)]
    first.close()
    for job in jobs:
        TensorFiles(job / "tensors-0").put(b"a tensor")
    (runs / ".incoming-0-5f").mkdir()

    start()

    assert set(runs.iterdir()) == set(jobs)
    assert {path.name for job in jobs for path in job.iterdir()} == {"package", "code"}


def test_jobs_that_another_store_has_are_left_alone(
    start: StartServer, deployed: Callable[..., FederatedServer], runs: Path, tmp_path: Path
) -> None:
    first = start()
    waiting, running = (submit(first, tmp_path, min_clients=1) for _ in range(2))
    first.close()
    TensorFiles(runs / running / "tensors-1").put(b"a tensor")

    for _ in range(3):  # started with a store that was named by mistake
        other = on_loop(lambda: SqlStore(tmp_path / "other.db"))
        with_other = args(tmp_path / "ws", launcher=Threads(), settings=settings())
        deployed(snapshot_persistor=other, arguments=with_other).close()

    assert {path.name for path in runs.iterdir()} == {waiting, running}
    assert {path.name for path in (runs / running).iterdir()} == {"package", "code", "tensors-1"}
    assert {path.name for path in (runs / waiting).iterdir()} == {"package", "code"}


def test_a_server_serves_while_what_was_left_is_still_being_deleted(
    start: StartServer, dialler: Dialler, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = start()
    left = runs / ended(first, tmp_path) / "tensors-0"
    first.close()
    TensorFiles(left).put(b"a tensor")
    may_delete, has_deleted = threading.Event(), threading.Event()
    delete = RunFolder.delete_earlier_tensors

    def delete_when_let(folder: RunFolder) -> None:
        may_delete.wait()
        delete(folder)
        has_deleted.set()

    monkeypatch.setattr(RunFolder, "delete_earlier_tensors", delete_when_let)
    monkeypatch.setattr(leftovers, "CLEARED_WITHIN_S", 0.0)
    try:
        server = start()
        Site(dialler, server, "site-1", train=plus(1))
        job_id = submit(server, tmp_path, min_clients=1)

        assert outcome(server, job_id).state is JobState.COMPLETED
        assert left.is_dir()
    finally:
        may_delete.set()
    assert has_deleted.wait(DELETED_WITHIN_S)
    assert not left.exists()


def test_a_folder_that_the_disk_does_not_give_is_in_no_servers_way(
    start: StartServer,
    runs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    first = start()
    broken, other = (runs / ended(first, tmp_path) for _ in range(2))
    first.close()
    for job in (broken, other):
        TensorFiles(job / "tensors-0").put(b"a tensor")
    glob = Path.glob

    def fail_in_one(path: Path, pattern: str) -> Iterator[Path]:
        if path == broken:
            raise OSError(errno.EIO, "Input/output error")
        return glob(path, pattern)

    monkeypatch.setattr(Path, "glob", fail_in_one)
    start()

    assert (broken / "tensors-0").is_dir()
    assert not (other / "tensors-0").exists()
    (told,) = (line for line in caplog.records if line.message == "files left behind")
    assert vars(told)["folder"] == str(broken)
    assert "Input/output error" in vars(told)["reason"]


def test_a_server_started_again_deletes_a_submission_that_the_store_was_never_told_of(
    start: StartServer, runs: Path, tmp_path: Path
) -> None:
    first = start()
    waiting, never_told = (submit(first, tmp_path, min_clients=1) for _ in range(2))
    store_id = store_of(first.service.ssid)
    first.close()
    (runs / never_told).rename(runs / "tiny-00c0ffee")
    (runs / "mine").mkdir()
    for job in ("tiny-00c0ffee", waiting):  # the second server was killed when it had told the store
        (runs / job / "untold").write_text(store_id)

    start()

    assert {path.name for path in runs.iterdir()} == {waiting, "mine"}
    assert not (runs / waiting / "untold").exists()


def test_a_run_is_taken_up_while_the_store_cannot_tell_what_is_left_and_the_next_server_deletes_that(
    start: StartServer, dialler: Dialler, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = start()
    site = Site(dialler, first, "site-1")
    job_id = submit(first, tmp_path, min_clients=1)
    site.task()
    store_id = store_of(first.service.ssid)
    dialler.close()
    first.close()
    left = runs / "tiny-00c0ffee"
    TensorFiles(left / "package").put(b"a package")
    (left / "untold").write_text(store_id)
    asked: list[JobId] = []
    job = SqlStore.job

    async def fail_first(store: SqlStore, job_id: JobId) -> JobRecord:
        asked.append(job_id)
        if len(asked) == 1:
            raise StoreFailed("reading", "it is away")
        return await job(store, job_id)

    monkeypatch.setattr(SqlStore, "job", fail_first)
    second = start()
    Site(dialler, second, "site-1", train=plus(1)).wire.ask(Channel.SERVER, "heartbeat", Heartbeat())

    assert outcome(second, job_id).state is JobState.COMPLETED
    assert asked[0] == left.name
    assert left.is_dir()
    second.close()
    start()
    assert {path.name for path in runs.iterdir()} == {job_id}


def test_a_client_that_holds_a_job_without_a_process_is_told_once_the_job_has_ended(
    start: StartServer, dialler: Dialler, tmp_path: Path
) -> None:
    server = start()
    site = Site(dialler, server, "site-1")
    running = submit(server, tmp_path, min_clients=1, workflow=WorkflowSpec("fedavg", {"rounds": 1}))
    task = site.task()
    waiting = submit(server, tmp_path, min_clients=2)

    def told(*idle: str) -> list[JobId]:
        """Return the jobs that site-1 is told to abort once it has told that these are idle there."""
        site.wire.ask(Channel.SERVER, "heartbeat", Heartbeat(idle=(*map(JobId, idle), JobId("unknown"))))
        aborted: list[JobId] = []
        while "unknown" not in aborted:  # the last to be looked up
            aborted.append(site.wire.told(Channel.JOB, "abort").job_id)
        return aborted[:-1]

    assert told(running, waiting) == [], "its process may be started again, and the other will be"
    site.send(answer(task, Model({"w": np.ones(3, np.float32), "b": np.ones((), np.float32)})))
    assert outcome(server, running).state is JobState.COMPLETED
    site.wire.told(Channel.JOB, "abort")

    assert told(running, waiting) == [running]
