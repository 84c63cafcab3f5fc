"""What a run keeps in a bucket, and what another server, or another tenure, makes of it."""

import asyncio
import shutil
from collections.abc import Awaitable, Callable, Collection
from pathlib import Path

import pytest

from hanse.errors import NotFound, ProtocolError, StoreFailed
from hanse.ids import Digest, JobId
from hanse.job import JobRecord, JobSpec, WorkflowSpec
from hanse.server import run_folder, run_mirror
from hanse.server.run_folder import RunFolder
from hanse.server.run_mirror import RunMirror
from hanse.storage import packages
from hanse.storage.packages import build_package
from hanse.storage.tensors import TensorFiles, digest_of

bucket = pytest.importorskip("hanse.storage.bucket", reason="obstore is not installed")

JOB = JobId("digits-1")


class Objects(bucket.Bucket):  # type: ignore[misc, name-defined]
    """A bucket in memory that a test can take away, and whose requests it can hold up."""

    def __init__(self) -> None:
        super().__init__(bucket.MemoryStore(), "s3://memory")
        self.is_away = False
        self.before: Callable[[str, str], Awaitable[None]] | None = None
        self.asked: list[str] = []

    async def _ask(self, what: str, key: str) -> None:
        self.asked.append(what)
        if self.before is not None:
            await self.before(what, key)
        if self.is_away:
            raise StoreFailed(f"{what} {key}", "it is away")

    async def put(self, key: str, path: Path) -> None:
        await self._ask("put", key)
        await super().put(key, path)

    async def fetch(self, key: str, into: object) -> None:
        await self._ask("fetch", key)
        await super().fetch(key, into)

    async def copy(self, source: str, key: str) -> None:
        await self._ask("copy", source)
        await super().copy(source, key)

    async def delete(self, keys: Collection[str]) -> None:
        await self._ask("delete", ",".join(keys))
        await super().delete(keys)

    async def sizes(self, folder: str = "") -> dict[str, int]:
        await self._ask("sizes", folder)
        return await super().sizes(folder)

    async def tensors(self, epoch: int) -> set[Digest]:
        """Return the tensors of a tenure that are there."""
        found = run_mirror.tensors_in(await super().sizes())
        return {tensor.digest for tensor in found if tensor.epoch == epoch}

    async def spoil(self, digest: Digest, files: TensorFiles) -> None:
        """Put other bytes, as many, in place of a tensor's."""
        other = files.put(b"!" * files.size(digest))
        for key in await super().sizes():
            if digest in key:
                await super().put(key, files.path(other))


@pytest.fixture
async def objects() -> Objects:
    return Objects()


@pytest.fixture
def files(tmp_path: Path) -> TensorFiles:
    """Of the server that has the first tenure."""
    return TensorFiles(tmp_path / "here")


@pytest.fixture
def others(tmp_path: Path) -> TensorFiles:
    """Of the server that has the second."""
    return TensorFiles(tmp_path / "there")


def made(files: TensorFiles, *names: str) -> list[Digest]:
    return [files.put(f"the tensor {name}".encode()) for name in names]


# keeping --------------------------------------------------------------------------------------------------------------


async def test_what_is_kept_is_put_once(objects: Objects, files: TensorFiles) -> None:
    mirror = RunMirror(objects, JOB, 1)
    a, b = made(files, "a", "b")

    await mirror.keep(files, [a, a])
    await mirror.keep(files, [a, b])

    assert await objects.tensors(1) == {a, b}
    assert objects.asked == ["put", "put"]


async def test_what_two_wait_for_is_put_once(objects: Objects, files: TensorFiles) -> None:
    mirror = RunMirror(objects, JOB, 1)
    (a,) = made(files, "a")

    await asyncio.gather(mirror.keep(files, [a]), mirror.keep(files, [a]))

    assert objects.asked == ["put"]


async def test_what_is_set_aside_is_deleted_and_can_be_kept_again(objects: Objects, files: TensorFiles) -> None:
    mirror = RunMirror(objects, JOB, 1)
    a, b = made(files, "a", "b")
    await mirror.keep(files, [a, b])

    doomed = mirror.set_aside([b])
    await mirror.keep(files, [a])  # the next round needs it again, and the bucket has not come to delete it
    await mirror.delete(doomed)

    assert await objects.tensors(1) == {a, b}
    assert mirror.set_aside([a, b]) == []


async def test_what_could_not_be_deleted_is_deleted_with_the_next(objects: Objects, files: TensorFiles) -> None:
    mirror = RunMirror(objects, JOB, 1)
    a, b = made(files, "a", "b")
    await mirror.keep(files, [a, b])
    objects.is_away = True
    await mirror.delete(mirror.set_aside([b]))
    objects.is_away = False
    assert await objects.tensors(1) == {a, b}

    await mirror.delete(mirror.set_aside([b]))

    assert await objects.tensors(1) == {b}


async def test_what_fails_is_told_to_who_waits_and_put_when_it_is_asked_for_again(
    objects: Objects, files: TensorFiles
) -> None:
    mirror = RunMirror(objects, JOB, 1)
    (a,) = made(files, "a")
    objects.is_away = True
    with pytest.raises(StoreFailed, match="it is away"):
        await mirror.keep(files, [a])
    objects.is_away = False

    await mirror.keep(files, [a])

    assert await objects.tensors(1) == {a}


async def test_who_waits_for_long_hears_that_it_is_on_its_way_and_it_goes_on(
    objects: Objects, files: TensorFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_mirror, "KEPT_WITHIN_S", 0.0)
    mirror = RunMirror(objects, JOB, 1)
    a, b = made(files, "a", "b")
    going_on = asyncio.Event()

    async def hold(what: str, key: str) -> None:
        if b in key:
            await going_on.wait()

    objects.before = hold
    with pytest.raises(
        StoreFailed, match=r"keeping job digits-1 in s3://memory: after 0 s [12] of 2 files are still on"
    ):
        await mirror.keep(files, [a, b])
    monkeypatch.setattr(run_mirror, "KEPT_WITHIN_S", 60.0)
    going_on.set()
    await mirror.keep(files, [a, b])

    assert await objects.tensors(1) == {a, b}
    assert objects.asked == ["put", "put"]


async def test_a_run_that_is_parked_sends_nothing_any_more(objects: Objects, files: TensorFiles) -> None:
    mirror = RunMirror(objects, JOB, 1)
    (a,) = made(files, "a")
    begun, never = asyncio.Event(), asyncio.Event()

    async def hold(what: str, key: str) -> None:
        begun.set()
        await never.wait()

    objects.before = hold
    keeping = asyncio.create_task(mirror.keep(files, [a]))
    await begun.wait()
    await mirror.close()

    with pytest.raises(StoreFailed, match="this server has left the job"):
        await keeping
    assert await objects.tensors(1) == set()


async def test_a_tensor_that_is_not_here_cannot_be_kept(objects: Objects, files: TensorFiles) -> None:
    with pytest.raises(NotFound):
        await RunMirror(objects, JOB, 1).keep(files, [digest_of(b"nowhere")])


async def test_the_end_of_a_run_leaves_its_package_and_its_result(objects: Objects, files: TensorFiles) -> None:
    mirror, other = RunMirror(objects, JOB, 2), RunMirror(objects, JobId("digits-10"), 2)
    package, result, a = made(files, "package", "result", "a")
    await mirror.keep_package(files, package)
    await mirror.keep_result(files, result)
    await mirror.keep(files, [a])
    await RunMirror(objects, JOB, 1).keep(files, [a])
    await other.keep(files, [a])

    await mirror.delete_tensors()

    assert set(await objects.sizes(JOB)) == {f"{JOB}/package/{package}", f"{JOB}/result/{result}"}
    assert await objects.tensors(2) == {a}, "another job's"


# taking over ----------------------------------------------------------------------------------------------------------


@pytest.fixture
async def kept(objects: Objects, files: TensorFiles) -> list[Digest]:
    """Three tensors that the first tenure has kept, with the package."""
    mirror = RunMirror(objects, JOB, 1)
    digests = made(files, "a", "b", "c")
    await mirror.keep(files, digests)
    await mirror.keep_package(files, *made(files, "package"))
    objects.asked.clear()
    return digests


async def test_another_server_fetches_what_it_needs_and_deletes_the_rest(
    objects: Objects, others: TensorFiles, kept: list[Digest]
) -> None:
    a, b, c = kept

    await RunMirror(objects, JOB, 2).take_over(others, [a, b])

    assert all(map(others.verify, [a, b]))
    assert others.missing([c]) == [c]
    assert await objects.tensors(1) == set()
    assert await objects.tensors(2) == {a, b}


async def test_the_same_server_moves_nothing_through_itself(
    objects: Objects, files: TensorFiles, kept: list[Digest]
) -> None:
    await RunMirror(objects, JOB, 2).take_over(files, kept)

    assert objects.asked == ["sizes", "copy", "copy", "copy", "delete"]
    assert await objects.tensors(2) == set(kept)


async def test_what_s3_does_not_copy_is_put_anew(
    objects: Objects, files: TensorFiles, kept: list[Digest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_mirror, "MAX_COPY_BYTES", 3)

    await RunMirror(objects, JOB, 2).take_over(files, kept)

    assert objects.asked == ["sizes", "put", "put", "put", "delete"]
    assert await objects.tensors(2) == set(kept)


async def test_what_is_here_and_not_in_the_bucket_is_put_there(objects: Objects, files: TensorFiles) -> None:
    digests = made(files, "a", "b")

    await RunMirror(objects, JOB, 2).take_over(files, digests)

    assert await objects.tensors(2) == set(digests)


async def test_what_is_nowhere_is_missing_and_the_rest_is_taken_over(
    objects: Objects, others: TensorFiles, kept: list[Digest]
) -> None:
    lost = digest_of(b"lost")

    await RunMirror(objects, JOB, 2).take_over(others, [*kept, lost])

    assert others.missing([*kept, lost]) == [lost]


async def test_an_object_that_is_damaged_counts_as_lost(
    objects: Objects, files: TensorFiles, others: TensorFiles, kept: list[Digest]
) -> None:
    a, b, _ = kept
    await objects.spoil(a, files)

    await RunMirror(objects, JOB, 2).take_over(others, [a, b])

    assert others.missing([a, b]) == [a]
    assert await objects.tensors(2) == {b}


async def test_of_two_tenures_the_one_that_has_it_whole_gives_it(
    objects: Objects, files: TensorFiles, others: TensorFiles, kept: list[Digest]
) -> None:
    a, *_ = kept
    third = RunMirror(objects, JOB, 3)
    await objects.spoil(a, files)
    await RunMirror(objects, JOB, 2).keep(files, [a])

    await third.take_over(others, [a])

    assert others.verify(a)
    fourth = TensorFiles(others.root.parent / "fourth")
    await RunMirror(objects, JOB, 4).take_over(fourth, [a])
    assert fourth.verify(a), "it was copied from the one that is whole"


async def test_a_server_whose_tenure_has_ended_deletes_nothing_that_is_needed(
    objects: Objects, files: TensorFiles, others: TensorFiles
) -> None:
    first = RunMirror(objects, JOB, 1)
    a, b = made(files, "a", "b")
    await first.keep(files, [a, b])
    doomed = first.set_aside([b])
    await RunMirror(objects, JOB, 2).take_over(others, [a, b])

    await first.delete(doomed)  # it was paused at this very moment
    await first.delete(first.set_aside([]))
    await first.delete_tensors()

    assert await objects.tensors(2) == {a, b}


async def test_a_bucket_that_has_nothing_of_the_job_is_not_believed(
    objects: Objects, files: TensorFiles, others: TensorFiles
) -> None:
    (a,) = made(files, "a")
    with pytest.raises(
        StoreFailed, match="digits-1 in s3://memory: nothing of the job is there, so another server used"
    ):
        await RunMirror(objects, JOB, 2).take_over(others, [a])


@pytest.mark.parametrize("fails", ["sizes", "fetch", "copy", "delete"])
async def test_what_fails_is_done_again_from_where_it_stopped(
    objects: Objects, others: TensorFiles, kept: list[Digest], fails: str
) -> None:
    mirror = RunMirror(objects, JOB, 2)

    async def fail(what: str, key: str) -> None:
        if what == fails:
            raise StoreFailed(what, "once")

    objects.before = fail
    with pytest.raises(StoreFailed, match="once"):
        await mirror.take_over(others, kept)
    objects.before = None

    await mirror.take_over(others, kept)

    assert others.missing(kept) == []
    assert (await objects.tensors(1), await objects.tensors(2)) == (set(), set(kept))


async def test_what_was_taken_over_is_kept(objects: Objects, others: TensorFiles, kept: list[Digest]) -> None:
    mirror = RunMirror(objects, JOB, 2)
    await mirror.take_over(others, kept)
    objects.asked.clear()

    await mirror.keep(others, kept)
    assert objects.asked == []
    await mirror.delete(mirror.set_aside(kept[:1]))

    assert await objects.tensors(2) == set(kept[:1])


async def test_what_a_disk_has_lost_is_fetched_again(objects: Objects, files: TensorFiles) -> None:
    mirror = RunMirror(objects, JOB, 1)
    a, b = made(files, "a", "b")
    await mirror.keep(files, [a, b])
    for digest in (a, b):
        files.path(digest).unlink()

    assert await mirror.restore(files, [a]) == []

    assert files.verify(a)
    assert files.missing([b]) == [b]


async def test_what_the_bucket_has_lost_too_is_put_there_when_it_is_here_again(
    objects: Objects, files: TensorFiles, others: TensorFiles
) -> None:
    mirror = RunMirror(objects, JOB, 1)
    (a,) = made(files, "a")
    await mirror.keep(files, [a])
    await objects.spoil(a, files)
    files.path(a).unlink()

    assert await mirror.restore(files, [a]) == [a]
    made(files, "a")
    await mirror.keep(files, [a])
    await mirror.delete(mirror.set_aside([a]))

    await RunMirror(objects, JOB, 2).take_over(others, [a])
    assert others.verify(a)


# package and result ---------------------------------------------------------------------------------------------------


async def test_a_package_that_another_server_received_is_fetched(
    objects: Objects, files: TensorFiles, others: TensorFiles
) -> None:
    (package,) = made(files, "package")
    await RunMirror(objects, JOB, 1).keep_package(files, package)

    await RunMirror(objects, JOB, 2).have_package(others, package, files.size(package))

    assert others.verify(package)


async def test_a_package_that_is_here_alone_is_kept(objects: Objects, files: TensorFiles) -> None:
    (package,) = made(files, "package")
    mirror = RunMirror(objects, JOB, 1)

    await mirror.have_package(files, package, files.size(package))
    await mirror.have_package(files, package, files.size(package))

    assert objects.asked == ["sizes", "put", "sizes"]


async def test_a_package_that_has_lost_its_end_in_the_bucket_is_kept_anew(
    objects: Objects, files: TensorFiles, others: TensorFiles
) -> None:
    (package,) = made(files, "package")
    size = files.size(package)
    await objects.put(f"{JOB}/package/{package}", files.path(files.put(b"the")))

    await RunMirror(objects, JOB, 1).have_package(files, package, size)

    await RunMirror(objects, JOB, 2).have_package(others, package, size)
    assert others.verify(package)


async def received(objects: Objects, files: TensorFiles, tmp_path: Path) -> JobRecord:
    """Return a job whose package another server has received, and kept in the bucket."""
    spec = JobSpec("tiny", WorkflowSpec("fedavg"), client="app:app", model="model:initial")
    (tmp_path / "job").mkdir()
    package = build_package(tmp_path / "job", spec, {"app.py": b"app = 1"})
    digest = files.put(package)
    await RunMirror(objects, JOB, 1).keep_package(files, digest)
    return JobRecord(JOB, spec, "ada", 0.0, digest, len(package))


async def test_code_has_its_name_only_when_it_is_on_the_disk(
    objects: Objects, files: TensorFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = await received(objects, files, tmp_path)
    folder = RunFolder(tmp_path / "run", 2, RunMirror(objects, JOB, 2))

    def power_fails(path: Path) -> None:
        assert (path / "unsynced" / "code" / "app.py").exists()
        raise StoreFailed("syncing", "the power failed")

    with monkeypatch.context() as patched:
        patched.setattr(run_folder, "sync_tree", power_fails)
        with pytest.raises(StoreFailed, match="power"):
            await folder.have_package(record)
    assert not folder.code.exists()
    await folder.have_package(record)

    assert (folder.code / "app.py").read_bytes() == b"app = 1"
    assert {path.name for path in folder.path.iterdir()} == {"code", "package"}


async def test_what_a_server_had_unpacked_when_it_was_killed_is_deleted_by_the_next_one(
    objects: Objects, files: TensorFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = await received(objects, files, tmp_path)
    folder = RunFolder(tmp_path / "run", 2, RunMirror(objects, JOB, 2))

    def is_killed(archive: object, entry: object, into: Path) -> None:
        (into / "app.py").write_bytes(b"app")
        raise KeyboardInterrupt  # what is deleted on the way out is not, as when nothing runs any more

    with monkeypatch.context() as patched:
        patched.setattr(packages, "_extract", is_killed)
        patched.setattr(shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            folder._have_code(files.path(Digest(record.package)))
    assert list(folder.path.rglob("app.py"))

    await RunFolder(tmp_path / "run", 3, RunMirror(objects, JOB, 3)).have_package(record)

    assert {path.name for path in folder.path.iterdir()} == {"code", "package"}


async def test_the_package_of_a_job_that_was_refused_goes(objects: Objects, files: TensorFiles) -> None:
    (package,) = made(files, "package")
    mirror = RunMirror(objects, JOB, 1)
    await mirror.keep_package(files, package)

    await mirror.delete_package(package)

    assert await objects.sizes() == {}


async def test_a_result_is_fetched_once(objects: Objects, files: TensorFiles, others: TensorFiles) -> None:
    (result,) = made(files, "result")
    await RunMirror(objects, JOB, 1).keep_result(files, result)
    mirror = RunMirror(objects, JOB, 2)

    for _ in range(2):
        await mirror.have_result(others, result, files.size(result))

    assert others.verify(result)
    assert objects.asked == ["put", "fetch"]


async def test_package_and_result_that_a_power_failure_has_left_without_their_bytes_are_fetched_again(
    objects: Objects, files: TensorFiles, others: TensorFiles
) -> None:
    package, result = made(files, "package", "result")
    before, mirror = RunMirror(objects, JOB, 1), RunMirror(objects, JOB, 2)
    await before.keep_package(files, package)
    await before.keep_result(files, result)
    for digest in (package, result):
        others.path(digest).write_bytes(bytes(files.size(digest)))

    await mirror.have_package(others, package, files.size(package))
    await mirror.have_result(others, result, files.size(result))

    assert others.verify(package)
    assert others.verify(result)


async def test_a_result_that_is_lost_or_another_is_none(
    objects: Objects, files: TensorFiles, others: TensorFiles
) -> None:
    (result,) = made(files, "result")
    mirror = RunMirror(objects, JOB, 2)
    with pytest.raises(NotFound, match=f"there is no object 's3://memory/digits-1/result/{result}'"):
        await mirror.have_result(others, result, files.size(result))

    await mirror.keep_result(files, result)
    await objects.spoil(result, files)
    with pytest.raises(ProtocolError, match="digest of the received tensor"):
        await mirror.have_result(others, result, files.size(result))
    assert not others.has(result)
