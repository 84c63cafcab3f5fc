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
from hanse.storage.store import SqlStore
from hanse.storage.tensors import TensorFiles

from .job_world import Site, Threads, answer, outcome, plus, submit
from .world import Dialler, args, settings

StartServer = Callable[[], FederatedServer]


@pytest.fixture
def start(deployed: Callable[..., FederatedServer], tmp_path: Path) -> StartServer:
    """``start()``: a deployed server whose runs are threads."""
    return lambda: deployed(arguments=args(tmp_path / "ws", launcher=Threads(), settings=settings()))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Where the servers' runs are."""
    return tmp_path / "ws" / "runs"


def test_a_server_started_again_deletes_the_tensors_of_runs_that_ended_when_it_was_killed(
    start: StartServer, runs: Path
) -> None:
    ended, other = runs / "ended-1", runs / "ended-2"
    for run in (ended, other):
        TensorFiles(run / "tensors-0").put(b"a tensor")
        TensorFiles(run / "result").put(b"a result")
    (runs / ".incoming-0-5f").mkdir()
    start()
    assert [path.name for path in sorted(runs.iterdir())] == ["ended-1", "ended-2"]
    assert [path.name for run in (ended, other) for path in run.iterdir()] == ["result", "result"]


def test_a_server_serves_while_what_was_left_is_still_being_deleted(
    start: StartServer, dialler: Dialler, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = runs / "ended-1" / "tensors-0"
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
    start: StartServer, runs: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("broken-1", "ended-2"):
        TensorFiles(runs / name / "tensors-0").put(b"a tensor")
    glob = Path.glob

    def fail_in_one(path: Path, pattern: str) -> Iterator[Path]:
        if path.name == "broken-1":
            raise OSError(errno.EIO, "Input/output error")
        return glob(path, pattern)

    monkeypatch.setattr(Path, "glob", fail_in_one)
    start()

    assert [path.name for path in sorted(runs.rglob("tensors-0"))] == ["tensors-0"]
    assert (runs / "broken-1" / "tensors-0").is_dir()
    (told,) = (line for line in caplog.records if line.message == "files left behind")
    assert vars(told)["folder"] == str(runs / "broken-1")
    assert "Input/output error" in vars(told)["reason"]


def test_a_server_started_again_deletes_a_submission_that_the_store_was_never_told_of(
    start: StartServer, runs: Path, tmp_path: Path
) -> None:
    first = start()
    waiting, never_told = (submit(first, tmp_path, min_clients=1) for _ in range(2))
    first.close()
    (runs / never_told).rename(runs / "tiny-00c0ffee")
    (runs / "mine").mkdir()

    start()

    assert {path.name for path in runs.iterdir()} == {waiting, "mine"}


def test_a_run_is_taken_up_while_the_store_cannot_tell_what_is_left_and_the_next_server_deletes_that(
    start: StartServer, dialler: Dialler, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = start()
    site = Site(dialler, first, "site-1")
    job_id = submit(first, tmp_path, min_clients=1)
    site.task()
    dialler.close()
    first.close()
    left = runs / "tiny-00c0ffee"
    TensorFiles(left / "package").put(b"a package")
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
