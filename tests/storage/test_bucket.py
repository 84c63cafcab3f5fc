"""Objects in a bucket: of a server that speaks S3, and of a folder, which is as good as one where nothing can fail."""

import asyncio
import http.server
import os
import random
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hanse.errors import ConfigError, NotFound, ProtocolError, StoreFailed
from hanse.ids import Digest
from hanse.storage.objects import Objects, objects_at
from hanse.storage.tensors import TensorFiles, digest_of
from tests.s3 import S3

bucket = pytest.importorskip("hanse.storage.bucket", reason="obstore is not installed")

MIB = 1024 * 1024


@pytest.fixture(params=["s3", "folder"])
async def objects(request: pytest.FixtureRequest, tmp_path: Path) -> Objects:
    """An empty bucket."""
    if request.param == "s3":
        return objects_at(request.getfixturevalue("bucket_url"))
    return bucket.Bucket(bucket.LocalStore(tmp_path / "bucket", mkdir=True), "s3://in-a-folder")


@pytest.fixture
def files(tmp_path: Path) -> TensorFiles:
    return TensorFiles(tmp_path / "here")


@pytest.fixture
def others(tmp_path: Path) -> TensorFiles:
    return TensorFiles(tmp_path / "there")


async def fetch(objects: Objects, key: str, digest: Digest, size: int, into: TensorFiles) -> None:
    with into.begin(digest, size) as partial:
        await objects.fetch(key, partial)


@pytest.mark.parametrize("size", [0, 1, 100_000, 8 * MIB, 64 * MIB + 5])
async def test_what_was_put_comes_back_the_same(
    objects: Objects, files: TensorFiles, others: TensorFiles, size: int
) -> None:
    data = random.Random(size).randbytes(size)
    digest = files.put(data)

    await objects.put(f"job/{digest}", files.path(digest))
    await fetch(objects, f"job/{digest}", digest, size, others)

    assert others.verify(digest)
    assert await objects.sizes() == {f"job/{digest}": size}


async def test_a_fetch_goes_on_from_what_an_earlier_one_left(
    objects: Objects, files: TensorFiles, others: TensorFiles
) -> None:
    data = random.Random(7).randbytes(3 * MIB)
    digest = files.put(data)
    await objects.put("job/x", files.path(digest))
    with others.begin(digest, len(data)) as partial:
        partial.write(data[:MIB])

    await fetch(objects, "job/x", digest, len(data), others)

    assert others.verify(digest)


async def test_objects_are_listed_by_the_folders_of_their_keys(objects: Objects, files: TensorFiles) -> None:
    path = files.path(files.put(b"abc"))
    for key in ("job-1/tensors-1/x", "job-1/tensors-11/x", "job-1/tensors-1/y", "job-10/tensors-1/x"):
        await objects.put(key, path)

    assert await objects.sizes("job-1") == dict.fromkeys(
        ("job-1/tensors-1/x", "job-1/tensors-11/x", "job-1/tensors-1/y"), 3
    )
    assert set(await objects.sizes("job-1/tensors-1")) == {"job-1/tensors-1/x", "job-1/tensors-1/y"}
    assert await objects.sizes("job-2") == {}


async def test_a_copy_stays_when_its_source_is_deleted(
    objects: Objects, files: TensorFiles, others: TensorFiles
) -> None:
    digest = files.put(b"abc")
    await objects.put("job/tensors-1/x", files.path(digest))

    await objects.copy("job/tensors-1/x", "job/tensors-2/x")
    await objects.delete(["job/tensors-1/x"])

    await fetch(objects, "job/tensors-2/x", digest, 3, others)
    assert await objects.sizes() == {"job/tensors-2/x": 3}


async def test_what_is_not_there_is_deleted_as_well(objects: Objects, files: TensorFiles) -> None:
    await objects.put("job/x", files.path(files.put(b"abc")))

    await objects.delete(["job/none", "job/x", "job/none-either"])
    await objects.delete([])

    assert await objects.sizes() == {}


async def test_an_empty_bucket_and_a_full_one_can_be_reached(objects: Objects, files: TensorFiles) -> None:
    await objects.reach()
    await objects.put("job/x", files.path(files.put(b"abc")))
    await objects.reach()


async def test_more_objects_than_one_request_takes_are_listed_and_deleted(objects: Objects, files: TensorFiles) -> None:
    path = files.path(files.put(b"abc"))
    keys = [f"job/{number}" for number in range(1100)]
    await asyncio.gather(*(objects.put(key, path) for key in keys))

    assert set(await objects.sizes("job")) == set(keys)
    await objects.delete(keys)

    assert await objects.sizes() == {}


async def test_what_is_not_there_is_named(objects: Objects, files: TensorFiles, others: TensorFiles) -> None:
    digest = digest_of(b"abc")
    with pytest.raises(NotFound, match=f"there is no object '{objects.url}/job/none'"):
        await fetch(objects, "job/none", digest, 3, others)
    with pytest.raises(NotFound, match=f"there is no object '{objects.url}/job/none'"):
        await objects.copy("job/none", "job/x")
    with pytest.raises(NotFound, match=f"there is no file '{files.path(digest)}'"):
        await objects.put("job/x", files.path(digest))
    assert await objects.sizes() == {}


@pytest.mark.parametrize("found", [b"abd", b"ab", b"", b"abcd"])
async def test_an_object_that_is_not_what_its_name_says_becomes_no_tensor(
    objects: Objects, files: TensorFiles, others: TensorFiles, found: bytes
) -> None:
    await objects.put("job/x", files.path(files.put(found)))
    digest = digest_of(b"abc")

    if found == b"abcd":  # its first bytes are right, and that is all that was asked for
        await fetch(objects, "job/x", digest, 3, others)
        return
    with pytest.raises(ProtocolError):
        await fetch(objects, "job/x", digest, 3, others)
    assert not others.has(digest)


async def test_a_fetch_that_is_cancelled_keeps_what_came(
    objects: Objects, files: TensorFiles, others: TensorFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = random.Random(3).randbytes(20 * MIB)
    digest = files.put(data)
    await objects.put("job/x", files.path(digest))
    came = asyncio.Event()
    partial = others.begin(digest, len(data))
    write, loop = partial.write, asyncio.get_running_loop()

    def noticed(chunk: Any) -> None:
        write(chunk)
        loop.call_soon_threadsafe(came.set)

    monkeypatch.setattr(partial, "write", noticed)
    with partial:
        fetching = asyncio.create_task(objects.fetch("job/x", partial))
        await came.wait()
        fetching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await fetching
        kept = partial.offset

    assert kept >= 8 * MIB
    with others.begin(digest, len(data)) as again:
        assert again.offset == kept
        await objects.fetch("job/x", again)
    assert others.verify(digest)


# what fails -----------------------------------------------------------------------------------------------------------


@contextmanager
def answering(status: int, body: str = "") -> Iterator[str]:
    """Run a server that gives every request this answer; its URL."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("content-length") or 0))
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        do_GET = do_PUT = do_POST = answer  # noqa: N815 - what http.server calls them

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            serving.join()


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``environment(endpoint)``: have buckets be looked for there, with credentials."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)

    def set_up(endpoint: str, **more: str) -> None:
        values = {"AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "sesame", **more}
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_up


def error(code: str) -> str:
    return f"<Error><Code>{code}</Code><Message>some text</Message></Error>"


@pytest.mark.parametrize(
    ("status", "body", "why"),
    [
        (
            403,
            error("SignatureDoesNotMatch"),
            r"it refuses this server \(403 Forbidden, SignatureDoesNotMatch\); check",
        ),
        (403, "", r"it refuses this server \(403 Forbidden\); check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY"),
        (403, error("RequestTimeTooSkewed"), "by its clock this machine's is wrong; set it by NTP"),
        (401, error("Unknown"), r"it refuses this server \(401 Unauthorized, Unknown\)"),
        (404, error("NoSuchBucket"), "there is no such bucket; check its name in the setting 'runs', and AWS_REGION"),
        (301, error("PermanentRedirect"), "it is in another region; set AWS_REGION"),
        (503, error("SlowDown"), "it answered 503 Service Unavailable, SlowDown$"),
        (400, error("InvalidRequest"), "it answered 400 Bad Request, InvalidRequest$"),
    ],
)
async def test_what_a_bucket_refuses_is_one_sentence_that_says_what_to_look_at(
    environment: Callable[..., None],
    files: TensorFiles,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    body: str,
    why: str,
) -> None:
    monkeypatch.setattr(bucket, "MAX_RETRIES", 0)
    path = files.path(files.put(b"abc"))
    with answering(status, body) as endpoint:
        environment(endpoint)
        objects = objects_at("s3://hanse/demo")
        for doing, asking in (
            ("writing s3://hanse/demo/job/x", lambda: objects.put("job/x", path)),
            ("listing s3://hanse/demo/job", lambda: objects.sizes("job")),
            ("listing s3://hanse/demo", lambda: objects.sizes()),
            ("looking into s3://hanse/demo", objects.reach),
            ("deleting s3://hanse/demo/job/x", lambda: objects.delete(["job/x", "job/y"])),
            ("copying s3://hanse/demo/job/x", lambda: objects.copy("job/x", "job/y")),
        ):
            with pytest.raises(StoreFailed, match=f"^the store failed while {doing}: {why}") as failed:
                await asking()
            assert failed.value.retryable
            assert "sesame" not in str(failed.value)
            assert "\n" not in str(failed.value)


async def test_a_bucket_that_is_not_there_is_said_to_be_out_of_reach(
    environment: Callable[..., None], free_port: int
) -> None:
    environment(f"http://127.0.0.1:{free_port}")
    with pytest.raises(
        StoreFailed, match=r"it cannot be reached \(Connection refused\); check the network and AWS_ENDP"
    ):
        await objects_at("s3://hanse").sizes()


@pytest.fixture
def free_port() -> Iterator[int]:
    """A port at which nobody listens, and nobody else will."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


async def test_without_credentials_the_environment_is_named(
    environment: Callable[..., None], free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment("http://127.0.0.1:1", AWS_METADATA_ENDPOINT=f"http://127.0.0.1:{free_port}")
    monkeypatch.setattr(bucket, "METADATA_SERVICE", f"127.0.0.1:{free_port}")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StoreFailed, match="there are no credentials for it; set AWS_ACCESS_KEY_ID and AWS_SECRET"):
        await objects_at("s3://hanse").sizes()


def test_an_environment_that_cannot_be_is_named(environment: Callable[..., None]) -> None:
    environment("http://127.0.0.1:1", AWS_CHECKSUM_ALGORITHM="md4")
    with pytest.raises(ConfigError, match=r"^runs is 's3://hanse/demo'; expected a bucket that can be used"):
        objects_at("s3://hanse/demo")


async def test_a_bucket_that_was_away_is_used_again(
    s3: S3, bucket_url: str, files: TensorFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucket, "MAX_RETRIES", 0)
    objects, path = objects_at(bucket_url), files.path(files.put(b"abc"))
    s3.stop()
    try:
        with pytest.raises(
            StoreFailed, match=f"^the store failed while writing {bucket_url}/job/x: it cannot be reached"
        ):
            await objects.put("job/x", path)
    finally:
        s3.start()
    await objects.put("job/x", path)
    assert await objects.sizes() == {"job/x": 3}


def test_without_the_driver_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hanse.storage.bucket", None)
    with pytest.raises(ConfigError, match=r"the driver of buckets to be installed \(pip install 'hanse\[s3\]'\)"):
        objects_at("s3://hanse")
