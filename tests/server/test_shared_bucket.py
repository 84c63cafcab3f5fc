"""Servers that share a store and a bucket, and no disk: each goes on with what the other has begun."""

from collections.abc import Callable, Collection
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest

from hanse.cell.cell import RemoteError
from hanse.coordination.waiting import HINDERED
from hanse.errors import HanseError, StaleEpoch, StoreFailed
from hanse.ids import Digest, JobId
from hanse.job import JobRecord, JobState, WorkflowSpec
from hanse.messages import (
    Channel,
    Heartbeat,
    JobCredentials,
    ModelRef,
    TaskAssignment,
    TaskFault,
    TaskResult,
    TensorRef,
    UpdateRef,
)
from hanse.model import Model
from hanse.server import FederatedServer, jobs, leftovers, take_up
from hanse.storage.models import read_safetensors
from hanse.storage.objects import objects_at
from hanse.storage.store import SqlStore
from hanse.storage.tensors import TensorFiles, digest_of
from tests.s3 import S3

from .job_world import ScriptedLauncher, Site, Threads, outcome, submit
from .world import WITHIN_S, Dialler, Project, args, on_loop, settings, target_of, transferring, wait

bucket = pytest.importorskip("hanse.storage.bucket", reason="obstore is not installed")

Start = Callable[..., FederatedServer]
LARGE: dict[str, Any] = {
    "min_clients": 1,
    "model": "tiny_model:large",
    "workflow": WorkflowSpec("fedavg", {"rounds": 2}),
}
"""A job whose one tensor does not ride along."""


@pytest.fixture
def start(make_server: Callable[..., FederatedServer], project: Project, bucket_url: str, tmp_path: Path) -> Start:
    """``start(name)``: a server with a workspace of its own; all have one store, one bucket and one secret."""
    secret = tmp_path / "servers.secret"
    secret.touch(0o600)
    secret.write_text("5e" * 32)

    def starting(name: str, launcher: Any = None, **changed: Any) -> FederatedServer:
        server = make_server(snapshot_persistor=SqlStore(tmp_path / "store.db"))
        arguments = args(tmp_path / name, launcher=launcher or Threads(), settings=settings(runs=bucket_url, **changed))
        server.deploy(arguments, project.grpc_args(servers_secret=secret), secure_train=True)
        return server

    return starting


@pytest.fixture
def kept(bucket_url: str) -> Callable[[], list[str]]:
    """What is in the bucket: ``job/kind``, or ``job/kind-epoch``, of each object."""

    def listing() -> list[str]:
        async def listed() -> dict[str, int]:
            return await objects_at(bucket_url).sizes()

        return sorted(key.rpartition("/")[0] for key in wait(listed()))

    return listing


@pytest.fixture
def deleted(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """``deleted(key)``: return when a server has deleted an object whose key begins so."""
    gone: SimpleQueue[str] = SimpleQueue()
    delete = bucket.Bucket.delete

    async def tell(objects: Any, keys: Collection[str]) -> None:
        await delete(objects, keys)
        for key in keys:
            gone.put(key)

    def wait_for(key: str) -> None:
        while not gone.get(timeout=WITHIN_S).startswith(key):
            continue

    monkeypatch.setattr(bucket.Bucket, "delete", tell)
    return wait_for


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have nobody wait for a bucket that is away."""
    monkeypatch.setattr(bucket, "MAX_RETRIES", 0)
    monkeypatch.setattr(jobs, "POSTPONED_S", 0.01)
    monkeypatch.setattr(take_up, "RETRY_PAUSE_S", 0.01)
    monkeypatch.setattr(leftovers, "CLEARED_AGAIN_S", 0.01)


def large(value: float) -> bytes:
    return np.full(10_000, value, np.float32).tobytes()


def trained(task: TaskAssignment, value: float) -> TaskResult:
    """An answer with one large tensor, which has to be uploaded."""
    return TaskResult(
        task.key, UpdateRef(ModelRef((TensorRef("w", "float32", (10_000,), digest_of(large(value))),)), 1)
    )


def upload(site: Site, server: FederatedServer, job_id: JobId, value: float) -> None:
    assert site.job is not None
    with transferring(site.job, target_of(server), site.job._tls) as transfers:
        wait(transfers.upload(f"job/{job_id}", digest_of(large(value)), memoryview(large(value))))


def model_of(site: Site, server: FederatedServer, job_id: JobId, task: TaskAssignment, folder: Path) -> np.ndarray:
    """What the task's model is, fetched from the server."""
    assert site.job is not None
    assert task.model is not None
    (tensor,) = task.model.tensors
    files = TensorFiles(folder)
    with transferring(site.job, target_of(server), site.job._tls) as transfers:
        wait(
            transfers.download(
                f"job/{job_id}", tensor.digest, tensor.size_bytes, files.begin(tensor.digest, tensor.size_bytes)
            )
        )
    return np.frombuffer(files.map(tensor.digest), np.float32)


def back_at(dialler: Dialler, server: FederatedServer, name: str, **more: Any) -> Site:
    """A client that comes to another server, without the job's process."""
    site = Site(dialler, server, name, **more)
    site.wire.ask(Channel.SERVER, "heartbeat", Heartbeat())
    return site


def test_of_a_run_its_package_and_its_result_stay(
    start: Start, dialler: Dialler, kept: Callable[[], list[str]], tmp_path: Path
) -> None:
    server = start("one")
    site = Site(dialler, server, "site-1")
    job_id = submit(server, tmp_path, **LARGE)
    assert kept() == [f"{job_id}/package"]
    for value in (1, 2):
        task = site.task()
        assert f"{job_id}/tensors-{server.jobs.services.epoch}" in kept(), "the committed state"
        upload(site, server, job_id, value)
        site.send(trained(task, value))

    assert outcome(server, job_id).state is JobState.COMPLETED
    assert kept() == [f"{job_id}/package", f"{job_id}/result"]
    assert {path.name for path in (tmp_path / "one" / "runs" / job_id).iterdir()} == {"package", "code", "result"}


def test_a_run_goes_on_at_a_server_that_has_nothing_of_it(
    start: Start, dialler: Dialler, kept: Callable[[], list[str]], tmp_path: Path
) -> None:
    first = start("one")
    sites = [Site(dialler, first, name) for name in ("site-1", "site-2")]
    job_id = submit(first, tmp_path, **(LARGE | {"min_clients": 2}))
    tasks = [site.task() for site in sites]
    upload(sites[0], first, job_id, 1)
    sites[0].send(trained(tasks[0], 1))
    first.close()
    dialler.close()

    second = start("two")
    one, two = (back_at(dialler, second, name) for name in ("site-1", "site-2"))
    again = two.task()
    assert again.key == tasks[1].key
    assert not model_of(two, second, job_id, again, tmp_path / "site-2").any()
    upload(two, second, job_id, 3)
    two.send(trained(again, 3))
    following = one.task()

    assert following.key.round == 2, "site-1's answer to round 1 was accepted at the other server"
    assert set(model_of(one, second, job_id, following, tmp_path / "site-1")) == {np.float32(2)}
    for site, task in ((one, following), (two, two.task())):
        upload(site, second, job_id, 5)
        site.send(trained(task, 5))
    record = outcome(second, job_id)
    assert (record.state, record.reason) == (JobState.COMPLETED, "")
    assert kept() == [f"{job_id}/package", f"{job_id}/result"]


def lose(path: Path) -> None:
    path.unlink()


def damage(path: Path) -> None:
    path.write_bytes(b"!" * 40_000)


def cut_short(path: Path) -> None:
    path.write_bytes(b"!" * 100)


@pytest.mark.parametrize("harm", [lose, damage, cut_short])
def test_a_tensor_that_the_disk_has_lost_is_had_from_the_bucket(
    start: Start, dialler: Dialler, tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    server = start("one")
    sites = [Site(dialler, server, name) for name in ("site-1", "site-2")]
    job_id = submit(server, tmp_path, **(LARGE | {"min_clients": 2}))
    task, _ = (site.task() for site in sites)
    (damaged,) = (tmp_path / "one" / "runs" / job_id).glob("tensors-*/*")
    damaged.chmod(0o600)
    harm(damaged)

    with pytest.raises(HanseError) as met:
        model_of(sites[0], server, job_id, task, tmp_path / "site-1")
    code = met.value.error_code if isinstance(met.value, RemoteError) else met.value.code
    sites[0].send(TaskResult(task.key, fault=TaskFault(code, met.value.reason)))

    assert damaged.read_bytes() == large(0)
    assert not model_of(sites[1], server, job_id, task, tmp_path / "site-2").any()


def test_a_package_whose_job_the_store_was_never_told_of_goes_when_its_server_is_started_again(
    start: Start,
    kept: Callable[[], list[str]],
    deleted: Callable[[str], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = start("one")
    other = submit(first, tmp_path, min_clients=1)

    async def away(*_: object, **__: object) -> None:
        raise StoreFailed("using the database", "the server was killed at this moment")

    with monkeypatch.context() as patched:
        patched.setattr(SqlStore, "add_job", away)
        patched.setattr(SqlStore, "job", away)
        with pytest.raises(StoreFailed):
            submit(first, tmp_path, name="untold", min_clients=1)
    first.close()
    (untold,) = (key.partition("/")[0] for key in kept() if key.startswith("untold-"))

    start("two").close()
    assert f"{untold}/package" in kept()
    start("one")

    deleted(f"{untold}/package/")
    assert kept() == [f"{other}/package"]


@pytest.mark.usefixtures("impatient")
def test_a_client_whose_process_goes_on_while_the_run_is_taken_up_is_given_no_other(
    start: Start, dialler: Dialler, s3: S3, tmp_path: Path
) -> None:
    first = start("one")
    site = Site(dialler, first, "site-1")
    job_id = submit(first, tmp_path, **LARGE)
    site.task()
    before = site.job
    assert before is not None
    assert before.credentials is not None
    first.close()
    dialler.close()
    s3.stop()
    try:
        second = start("two")
        back = Site(dialler, second, "site-1")
        aborted = back.wire.ask(Channel.SERVER, "heartbeat", Heartbeat((job_id,))).payload.abort_jobs  # type: ignore[union-attr]
    finally:
        s3.start()
    fqcn = f"site-1.{job_id}"
    job = dialler.dial(dialler.job_wire(second, fqcn, JobCredentials(before.credentials), tls=before._tls))

    assert aborted == ()
    assert job.told(Channel.TASK, "task").key.round == 1
    assert back.wire.told_nothing(Channel.JOB, "deploy")


def test_a_job_that_waited_is_started_by_the_other_server(start: Start, dialler: Dialler, tmp_path: Path) -> None:
    first = start("one")
    job_id = submit(first, tmp_path, min_clients=1)
    first.close()

    second = start("two", launcher=on_loop(ScriptedLauncher))
    site = Site(dialler, second, "site-1", starts=False)
    job = site.wire.told(Channel.JOB, "deploy")

    with transferring(site.wire, target_of(second), dialler.tls(dialler.project.site("site-1"))) as transfers:
        assert wait(transfers.missing(f"job/{job_id}", [job.package])) == []
    assert (tmp_path / "two" / "runs" / job_id / "code" / "tiny_model.py").is_file()


def test_a_result_is_had_from_the_server_that_has_not_seen_it(start: Start, dialler: Dialler, tmp_path: Path) -> None:
    first = start("one")
    site = Site(dialler, first, "site-1")
    job_id = submit(first, tmp_path, **(LARGE | {"workflow": WorkflowSpec("fedavg", {"rounds": 1})}))
    task = site.task()
    upload(site, first, job_id, 7)
    site.send(trained(task, 7))
    record = outcome(first, job_id)
    first.close()

    second = start("two")
    files = wait(second.jobs.files.result_files(job_id))

    assert read_safetensors(files.path(record.result)) == Model({"w": np.full(10_000, 7, np.float32)})


def test_a_job_that_the_store_does_not_take_leaves_nothing(
    start: Start, kept: Callable[[], list[str]], bucket_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start("one")
    seen: list[list[str]] = []

    async def refuse(store: SqlStore, epoch: int, record: JobRecord) -> None:
        del store
        seen.append(list(await objects_at(bucket_url).sizes(record.job_id)))
        raise StaleEpoch(ours=epoch, current=epoch + 1)

    monkeypatch.setattr(SqlStore, "add_job", refuse)
    with pytest.raises(StaleEpoch):
        submit(server, tmp_path)

    assert [len(keys) for keys in seen] == [1], "the package was kept before the store was told"
    assert kept() == []
    assert list((tmp_path / "one" / "runs").iterdir()) == []


# away -----------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("impatient")
def test_a_job_is_not_taken_while_the_bucket_is_away(start: Start, s3: S3, tmp_path: Path) -> None:
    server = start("one")
    s3.stop()
    try:
        with pytest.raises(StoreFailed, match="it cannot be reached"):
            submit(server, tmp_path)
    finally:
        s3.start()

    assert wait(server.jobs.board.views()) == []
    assert list((tmp_path / "one" / "runs").iterdir()) == []
    assert submit(server, tmp_path)


@pytest.mark.usefixtures("impatient")
def test_a_run_waits_for_the_bucket_and_says_so(start: Start, dialler: Dialler, s3: S3, tmp_path: Path) -> None:
    server = start("one")
    site = Site(dialler, server, "site-1")
    job_id = submit(server, tmp_path, **LARGE)
    task = site.task()
    upload(site, server, job_id, 1)
    s3.stop()
    try:
        refused = site.refused(trained(task, 1))
        waiting = [each.what for each in wait(server.jobs.board.view(job_id)).waiting]
    finally:
        s3.start()

    assert refused.retryable
    assert "while keeping" in refused.reason or "while writing s3://" in refused.reason
    assert waiting[0].startswith("the server's store, which fails (the store failed while writing s3://hanse-")
    following = site.task()  # the run has the answer, and could not commit what follows from it
    assert not any("store" in each.what for each in wait(server.jobs.board.view(job_id)).waiting)
    upload(site, server, job_id, 2)
    site.send(trained(following, 2))
    assert outcome(server, job_id).state is JobState.COMPLETED


@pytest.mark.usefixtures("impatient")
def test_a_server_serves_while_it_cannot_take_a_run_up_and_says_so(
    start: Start, dialler: Dialler, s3: S3, tmp_path: Path
) -> None:
    first = start("one")
    site = Site(dialler, first, "site-1")
    job_id = submit(first, tmp_path, **LARGE)
    task = site.task()
    first.close()
    dialler.close()
    s3.stop()
    try:
        second = start("two")
        assert second.jobs.files.takes_part(job_id, "site-1")
        with pytest.raises(HanseError, match=f"it takes up job {job_id}") as coming:
            second.jobs.files.run_files(job_id, "site-1", write=True)
        assert coming.value.retryable
        view = wait(second.jobs.board.view(job_id))
    finally:
        s3.start()

    (waiting,) = view.waiting
    assert (waiting.until, waiting.then) == (waiting.since + second.jobs.services.mend_within_s, HINDERED)
    back = back_at(dialler, second, "site-1")
    for value in (1, 2):
        again = back.task()
        upload(back, second, job_id, value)
        back.send(trained(again, value))
    assert task.key.round == 1
    assert outcome(second, job_id).state is JobState.COMPLETED


@pytest.mark.usefixtures("impatient")
def test_a_run_that_cannot_be_taken_up_for_too_long_fails_for_that_reason(
    start: Start, dialler: Dialler, s3: S3, tmp_path: Path
) -> None:
    first = start("one")
    site = Site(dialler, first, "site-1")
    job_id = submit(first, tmp_path, **LARGE)
    site.task()
    first.close()
    dialler.close()
    s3.stop()
    try:
        second = start("two", mend_within_s=0.2)
        back = Site(dialler, second, "site-1", starts=False)
        record = outcome(second, job_id)
    finally:
        s3.start()

    assert (record.state, record.code) == (JobState.FAILED, "store-failed")
    assert "it cannot be reached" in record.reason
    back.wire.told(Channel.JOB, "abort")


@pytest.mark.usefixtures("impatient")
def test_a_run_that_cannot_be_taken_up_can_be_aborted(
    start: Start,
    dialler: Dialler,
    s3: S3,
    kept: Callable[[], list[str]],
    deleted: Callable[[str], None],
    tmp_path: Path,
) -> None:
    first = start("one")
    site = Site(dialler, first, "site-1")
    job_id = submit(first, tmp_path, **LARGE)
    site.task()
    first.close()
    s3.stop()
    try:
        second = start("two")
        assert wait(second.jobs.abort(job_id, reason="enough")).state is JobState.ABORTED
    finally:
        s3.start()

    deleted(f"{job_id}/tensors-1/")
    assert kept() == [f"{job_id}/package"]


def test_a_run_whose_tensors_are_lost_ends_with_that_reason(
    start: Start, dialler: Dialler, bucket_url: str, kept: Callable[[], list[str]], tmp_path: Path
) -> None:
    first = start("one")
    site = Site(dialler, first, "site-1")
    job_id = submit(first, tmp_path, **LARGE)
    site.task()
    first.close()

    async def lose() -> Digest:
        objects = objects_at(bucket_url)
        (key,) = [key for key in await objects.sizes(job_id) if "/tensors-" in key]
        await objects.delete([key])
        return Digest(key.rpartition("/")[2].partition("-")[0])

    lost = wait(lose())
    record = outcome(start("two"), job_id)

    assert (record.state, record.code) == (JobState.FAILED, "tensors-lost")
    assert lost in record.reason
    assert kept() == [f"{job_id}/package"]


def test_what_a_killed_server_left_of_runs_that_have_ended_is_deleted_by_the_next(
    start: Start,
    dialler: Dialler,
    bucket_url: str,
    kept: Callable[[], list[str]],
    deleted: Callable[[str], None],
    tmp_path: Path,
) -> None:
    first = start("one")
    site = Site(dialler, first, "site-1", train=lambda task, _: TaskResult(task.key, UpdateRef(task.model, 1)))
    job_id = submit(first, tmp_path, min_clients=1)
    assert outcome(first, job_id).state is JobState.COMPLETED
    del site
    first.close()
    tensor = TensorFiles(tmp_path / "left").put(b"a tensor")

    async def leave(job: str) -> None:
        path = tmp_path / "left" / tensor
        await objects_at(bucket_url).put(f"{job}/tensors-1/{tensor}-1", path)

    wait(leave(job_id))
    wait(leave("anothers-job-5f5f5f5f"))
    start("two")

    deleted(f"{job_id}/tensors-1/")
    assert kept() == ["anothers-job-5f5f5f5f/tensors-1", f"{job_id}/package", f"{job_id}/result"]
