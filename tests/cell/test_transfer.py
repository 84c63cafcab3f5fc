import asyncio
import os
import random
import threading
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import grpc.aio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hanse.cell import wire_pb2
from hanse.cell.link import Peer
from hanse.cell.refusals import RemoteError
from hanse.cell.rpc import (
    CHUNK_BYTES,
    DOWNLOAD,
    MISSING,
    UPLOAD,
    decode_chunk,
    encode_chunk,
    hello_of,
    metadata_of,
    open_channel,
)
from hanse.cell.transfer import Files, Inflow, LocalTransfers, Transfers
from hanse.cell.transfer_service import MAX_CALLS_PER_PEER
from hanse.errors import (
    HanseError,
    NoSpace,
    NotFound,
    ProtocolError,
    TimedOut,
    Unauthenticated,
    Unauthorized,
    Unreachable,
)
from hanse.ids import Digest
from hanse.messages import Hello
from hanse.storage.tensors import Reading, TensorFiles, digest_of
from tests.faults.proxy import FAIR, SPLIT, FaultyNetwork

from .world import SITE, Authority, Serving, hello, serving, transferring

pytestmark = pytest.mark.usefixtures("no_task_is_left_behind")

SCOPE = "job/j-1"
BIG = random.Random(7).randbytes(5 * CHUNK_BYTES + 12_345)
SMALL = b"a small tensor"


@pytest.fixture
def there(tmp_path: Path) -> TensorFiles:
    return TensorFiles(tmp_path / "there")


@pytest.fixture
def here(tmp_path: Path) -> TensorFiles:
    return TensorFiles(tmp_path / "here")


def scopes_of(files: Files) -> Callable[..., Files]:
    def scopes(peer: Peer, scope: str, *, write: bool) -> Files:
        if scope != SCOPE:
            raise NotFound("scope", scope)
        if write and peer.fqcn != SITE:
            raise Unauthorized(peer.fqcn, f"write to {scope}", needs="to take part in the job")
        return files

    return scopes


@asynccontextmanager
async def moving(files: Files, **options: Any) -> AsyncIterator[tuple[Serving, Transfers]]:
    async with serving(scopes=scopes_of(files)) as server, transferring(server.target, **options) as transfers:
        yield server, transfers


@pytest.mark.parametrize("data", [BIG, SMALL, b"", bytes(CHUNK_BYTES)], ids=["big", "small", "empty", "one chunk"])
async def test_a_tensor_goes_there_and_back_over_mutual_tls(
    data: bytes, there: TensorFiles, here: TensorFiles, authority: Authority
) -> None:
    digest = digest_of(data)
    async with (
        serving(authority.server_tls(), scopes=scopes_of(there)) as server,
        transferring(server.target, authority.client_tls()) as transfers,
    ):
        assert await transfers.missing(SCOPE, [digest]) == [digest]
        await transfers.upload(SCOPE, digest, memoryview(data))
        assert await transfers.missing(SCOPE, [digest]) == []
        await transfers.download(SCOPE, digest, len(data), here.begin(digest, len(data)))
    assert there.map(digest) == here.map(digest) == memoryview(data)


async def test_a_buffer_of_any_item_size_can_be_sent(there: TensorFiles) -> None:
    data = memoryview(BIG[: 8 * 1000]).cast("d")
    async with moving(there) as (_, transfers):
        await transfers.upload(SCOPE, digest_of(BIG[:8000]), data)
    assert there.map(digest_of(BIG[:8000])) == BIG[:8000]


async def test_an_upload_goes_on_from_what_is_there(there: TensorFiles) -> None:
    digest = digest_of(BIG)
    partial = there.begin(digest, len(BIG))
    partial.write(BIG[: 3 * CHUNK_BYTES])
    partial.close()
    counted = CountingFiles(there)
    async with moving(counted) as (_, transfers):
        await transfers.upload(SCOPE, digest, memoryview(BIG))
    assert counted.written == len(BIG) - 3 * CHUNK_BYTES
    assert there.map(digest) == BIG


async def test_an_upload_whose_beginning_the_servers_disk_has_lost_begins_again(there: TensorFiles) -> None:
    digest = digest_of(BIG)
    partial = there.begin(digest, len(BIG))
    partial.write(bytes(3 * CHUNK_BYTES))  # what a power failure has left of it
    partial.close()
    async with moving(there) as (_, transfers):
        await transfers.upload(SCOPE, digest, memoryview(BIG))
    assert there.map(digest) == BIG


async def test_a_download_goes_on_from_what_is_there(there: TensorFiles, here: TensorFiles) -> None:
    digest = there.put(BIG)
    partial = here.begin(digest, len(BIG))
    partial.write(BIG[:1000])
    partial.close()
    counted = CountingFiles(here)
    async with moving(there) as (_, transfers):
        await transfers.download(SCOPE, digest, len(BIG), counted.begin(digest, len(BIG)))
    assert counted.written == len(BIG) - 1000
    assert here.map(digest) == BIG


async def test_what_is_there_is_not_sent_again(there: TensorFiles) -> None:
    digest = there.put(BIG)
    counted = CountingFiles(there)
    async with moving(counted) as (_, transfers):
        await transfers.upload(SCOPE, digest, memoryview(BIG))
    assert counted.written == 0


async def test_missing_keeps_the_order_and_asks_about_any_number(there: TensorFiles) -> None:
    held = there.put(SMALL)
    asked = [digest_of(str(number).encode()) for number in range(25_000)]
    asked[12_345] = held
    async with moving(there) as (_, transfers):
        found = await transfers.missing(SCOPE, asked)
    assert found == [digest for digest in asked if digest != held]


async def test_bytes_that_are_not_what_their_name_says_are_refused_and_forgotten(there: TensorFiles) -> None:
    digest = digest_of(BIG)
    async with moving(there) as (_, transfers):
        with pytest.raises(RemoteError, match="digest of the received tensor"):
            await transfers.upload(SCOPE, digest, memoryview(bytes(len(BIG))))
        assert not there.has(digest)
        await transfers.upload(SCOPE, digest, memoryview(BIG))
    assert there.map(digest) == BIG


async def test_a_download_is_verified(there: TensorFiles, here: TensorFiles) -> None:
    digest = there.put(BIG)
    there.path(digest).chmod(0o600)
    there.path(digest).write_bytes(bytes(len(BIG)))
    async with moving(there) as (_, transfers):
        with pytest.raises(ProtocolError, match="digest of the received tensor"):
            await transfers.download(SCOPE, digest, len(BIG), here.begin(digest, len(BIG)))
    assert not here.has(digest)


async def test_a_tensor_of_which_the_disk_loses_the_end_while_it_is_sent_ends_that_transfer_alone(
    there: TensorFiles, here: TensorFiles
) -> None:
    digest, other = there.put(BIG), there.put(SMALL)

    def stays(peer: Peer) -> None:  # asked after each chunk
        os.truncate(there.path(digest), CHUNK_BYTES)

    async with serving(scopes=scopes_of(there), stays=stays) as server, transferring(server.target) as transfers:
        with pytest.raises(RemoteError, match=f"expected '?{len(BIG)} bytes") as refused:
            await transfers.download(SCOPE, digest, len(BIG), here.begin(digest, len(BIG)))
        assert refused.value.error_code == "protocol"
        await transfers.download(SCOPE, other, len(SMALL), here.begin(other, len(SMALL)))


@pytest.mark.parametrize("slow", ["has", "open", "read"])
async def test_a_disk_that_takes_its_time_keeps_nobody_else_waiting(
    slow: str, there: TensorFiles, here: TensorFiles
) -> None:
    began, release = threading.Event(), threading.Event()

    class Slow(CountingFiles):
        def has(self, digest: Digest) -> bool:
            return waiting("has", super().has(digest))

        def open(self, digest: Digest) -> Any:
            opened = waiting("open", super().open(digest))
            return SimpleNamespace(
                size=opened.size,
                read=lambda *where: waiting("read", opened.read(*where)),
                read_nowait=lambda *_: None,  # as of a file that is not in memory
            )

    def waiting(what: str, result: Any) -> Any:
        if what == slow:
            began.set()
            assert release.wait(10)
        return result

    held, sent = there.put(BIG), digest_of(SMALL)
    async with moving(Slow(there)) as (_, transfers):
        download = transfers.download(SCOPE, held, len(BIG), here.begin(held, len(BIG)))
        upload = transfers.upload(SCOPE, sent, memoryview(SMALL))
        moved = asyncio.gather(download, upload)
        assert await asyncio.to_thread(began.wait, 10)
        assert await transfers.missing(SCOPE, [held]) == []
        release.set()
        await moved
    assert here.has(held)
    assert there.has(sent)


async def test_several_tensors_move_at_once(there: TensorFiles, here: TensorFiles) -> None:
    tensors = {digest_of(data): data for data in (BIG[number:] for number in range(20))}
    async with moving(there) as (_, transfers):
        await asyncio.gather(*(transfers.upload(SCOPE, name, memoryview(data)) for name, data in tensors.items()))
        await asyncio.gather(
            *(transfers.download(SCOPE, name, len(data), here.begin(name, len(data))) for name, data in tensors.items())
        )
    assert here.missing(tensors) == []


async def test_who_is_not_authorized_moves_nothing(there: TensorFiles) -> None:
    async with moving(there, hello=lambda: hello(project="other")) as (_, transfers):
        with pytest.raises(Unauthenticated, match="this server serves demo"):
            await transfers.missing(SCOPE, [digest_of(SMALL)])


async def test_who_has_yet_to_register_moves_nothing(there: TensorFiles) -> None:
    async with moving(there, hello=lambda: hello(token=None)) as (_, transfers):
        with pytest.raises(Unauthenticated, match="site-1 must register before it moves tensors"):
            await transfers.upload(SCOPE, digest_of(SMALL), memoryview(SMALL))
    assert not there.has(digest_of(SMALL))


async def test_an_upload_under_way_ends_when_its_caller_may_not_go_on(there: TensorFiles) -> None:
    digest = digest_of(BIG)
    stays = Staying(chunks=2)
    async with serving(scopes=scopes_of(there), stays=stays) as server, transferring(server.target, max_tries=1) as up:
        # While it still writes, gRPC tells the client no more than that the call has ended.
        with pytest.raises((Unauthenticated, Unreachable)):
            await up.upload(SCOPE, digest, memoryview(BIG))
    assert stays.seen == [SITE] * 3
    assert not there.has(digest)


async def test_a_download_under_way_ends_when_its_caller_may_not_go_on(there: TensorFiles, here: TensorFiles) -> None:
    digest = there.put(BIG)
    stays = Staying(chunks=2)
    partial = here.begin(digest, len(BIG))
    async with serving(scopes=scopes_of(there), stays=stays) as server, transferring(server.target) as down:
        with pytest.raises(Unauthenticated, match="disabled"):
            await down.download(SCOPE, digest, len(BIG), partial)
    assert stays.seen == [SITE] * 3
    assert not here.has(digest)


class Staying:
    """Lets a caller move so many *chunks* and no more."""

    def __init__(self, chunks: int) -> None:
        self.seen: list[str] = []
        self._chunks = chunks

    def __call__(self, peer: Peer) -> None:
        self.seen.append(peer.fqcn)
        if len(self.seen) > self._chunks:
            raise Unauthenticated("client site-1 is disabled")


async def test_a_scope_decides_who_may_write(there: TensorFiles, here: TensorFiles) -> None:
    digest = there.put(SMALL)
    async with moving(there, fqcn="site-2", hello=lambda: hello("site-2")) as (_, transfers):
        await transfers.download(SCOPE, digest, len(SMALL), here.begin(digest, len(SMALL)))
        with pytest.raises(RemoteError, match="site-2 may not write"):
            await transfers.upload(SCOPE, digest_of(BIG), memoryview(BIG))
        with pytest.raises(RemoteError, match="there is no scope 'job/other'"):
            await transfers.missing("job/other", [digest])


async def test_what_the_server_has_not_cannot_be_fetched(there: TensorFiles, here: TensorFiles) -> None:
    digest = digest_of(BIG)
    async with moving(there) as (_, transfers):
        with pytest.raises(RemoteError) as refused:
            await transfers.download(SCOPE, digest, len(BIG), here.begin(digest, len(BIG)))
    assert refused.value.error_code == "not-found"


def download(**fields: Any) -> bytes:
    known = {"scope": SCOPE, "digest": digest_of(SMALL), "size": len(SMALL), "offset": 0}
    return wire_pb2.DownloadRequest(**{**known, **fields}).SerializeToString()


def upload(**fields: Any) -> bytes:
    known = {"scope": SCOPE, "digest": digest_of(BIG), "size": len(BIG)}
    return wire_pb2.UploadPart(**{**known, **fields}).SerializeToString()


async def status_of(call: Any, *parts: bytes) -> tuple[grpc.StatusCode, str]:
    """Say *parts* on *call*, read what comes until it ends, and return how."""
    with pytest.raises((grpc.aio.AioRpcError, asyncio.InvalidStateError)):
        await say(call, *parts)
    return await call.code(), await call.details()


async def say(call: Any, *parts: bytes) -> None:
    for part in parts:
        await call.write(part)
    if parts:
        await call.done_writing()
    while await call.read() is not grpc.aio.EOF:
        pass


@pytest.mark.parametrize(
    ("request_bytes", "field"),
    [
        (b"\xff\xff", "DownloadRequest"),
        (download(digest="../../etc/passwd"), "DownloadRequest.digest"),
        (download(digest=""), "DownloadRequest.digest"),
        (download(digest="AB" * 32), "DownloadRequest.digest"),
        (download(scope=""), "scope"),
        (download(scope="x" * 1000), "scope"),
        (download(size=1), "DownloadRequest.size"),
        (download(size=2**64 - 1), "DownloadRequest.size"),
        (download(offset=len(SMALL) + 1), "DownloadRequest.offset"),
        (download(offset=2**64 - 1), "DownloadRequest.offset"),
    ],
)
async def test_a_hostile_download_is_refused_by_the_field_that_is_wrong(
    request_bytes: bytes, field: str, there: TensorFiles
) -> None:
    there.put(SMALL)
    async with moving(there) as (server, _), grpc.aio.insecure_channel(server.target) as channel:
        call = channel.unary_stream(DOWNLOAD)(request_bytes, metadata=metadata_of(hello()))
        code, details = await status_of(call)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert details.startswith(field)


@pytest.mark.parametrize(
    ("parts", "field"),
    [
        ([b"\xff\xff"], "UploadPart"),
        ([], "upload is 'the end of the stream'"),
        ([upload(digest="..")], "UploadPart.digest"),
        ([upload(scope="x" * 1000)], "scope"),
        ([upload(size=2**63)], "UploadPart.size"),
        ([upload(), b"\xff\xff"], "UploadPart"),
        ([upload(), wire_pb2.UploadPart().SerializeToString()], "UploadPart.data"),
        ([upload(), encode_chunk(bytes(CHUNK_BYTES + 1))], "UploadPart.data"),
        ([upload(size=10), encode_chunk(bytes(11))], "UploadPart.data"),
        ([upload(), encode_chunk(b"too little")], "upload is 'the end of the stream'"),
    ],
)
async def test_a_hostile_upload_is_refused_by_the_field_that_is_wrong(
    parts: list[bytes], field: str, there: TensorFiles
) -> None:
    async with moving(there) as (server, transfers), grpc.aio.insecure_channel(server.target) as channel:
        call = channel.stream_stream(UPLOAD)(metadata=metadata_of(hello()))
        if not parts:
            await call.done_writing()
        code, details = await status_of(call, *parts)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert details.startswith(field)
        assert not there.has(digest_of(BIG))
        await transfers.upload(SCOPE, digest_of(BIG[1:]), memoryview(BIG)[1:])  # the server serves on


@pytest.mark.parametrize(
    ("request_bytes", "field"),
    [
        (b"\xff", "MissingRequest"),
        (wire_pb2.MissingRequest(scope=SCOPE, digests=["x"]).SerializeToString(), "MissingRequest.digests"),
        (wire_pb2.MissingRequest(scope=SCOPE, digests=[""] * 20_001).SerializeToString(), "MissingRequest.digests"),
    ],
    ids=["bytes", "digest", "number"],
)
async def test_a_hostile_question_is_refused_by_the_field_that_is_wrong(
    request_bytes: bytes, field: str, there: TensorFiles
) -> None:
    async with moving(there) as (server, _), grpc.aio.insecure_channel(server.target) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await channel.unary_unary(MISSING)(request_bytes, metadata=metadata_of(hello()))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert refused.value.details().startswith(field)


@pytest.mark.parametrize("metadata", [(), (("hanse-fqcn", "../x"),), (("hanse-token", "t"),)])
async def test_a_call_that_does_not_say_who_makes_it_is_refused(
    metadata: tuple[tuple[str, str], ...], there: TensorFiles
) -> None:
    async with moving(there) as (server, _), grpc.aio.insecure_channel(server.target) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await channel.unary_unary(MISSING)(b"", metadata=metadata)
    assert refused.value.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.INVALID_ARGUMENT)


async def test_a_crash_in_the_servers_code_is_its_own_and_not_told(
    there: TensorFiles, caplog: pytest.LogCaptureFixture
) -> None:
    def crashing(*_: object, **__: object) -> Files:
        raise KeyError("secret detail")

    async with serving(scopes=crashing) as server, transferring(server.target) as transfers:
        with pytest.raises(RemoteError) as failed:
            await transfers.missing(SCOPE, [digest_of(SMALL)])
    assert "secret detail" not in failed.value.reason
    assert "secret detail" in caplog.text


async def test_one_peer_has_a_bounded_number_of_calls(there: TensorFiles) -> None:
    async with moving(there) as (server, _), grpc.aio.insecure_channel(server.target) as channel:
        calls = [channel.stream_stream(UPLOAD)(metadata=metadata_of(hello())) for _ in range(MAX_CALLS_PER_PEER)]
        for number, call in enumerate(calls):
            await call.write(upload(digest=digest_of(str(number).encode())))
            await call.read()
        late = channel.stream_stream(UPLOAD)(metadata=metadata_of(hello()))
        code, details = await status_of(late, upload())
        assert code is grpc.StatusCode.UNAVAILABLE
        assert "site-1 already moves 16 tensors" in details
        other = channel.stream_stream(UPLOAD)(metadata=metadata_of(hello("site-2")))
        code, _ = await status_of(other, upload())
        assert code is grpc.StatusCode.PERMISSION_DENIED  # and not: no place
        for call in calls:
            call.cancel()


async def test_an_upload_that_is_broken_off_is_resumed_where_it_was(there: TensorFiles) -> None:
    digest = digest_of(BIG)
    counted = CountingFiles(there)
    async with moving(counted) as (server, transfers):
        async with grpc.aio.insecure_channel(server.target) as channel:
            call = channel.stream_stream(UPLOAD)(metadata=metadata_of(hello()))
            await call.write(upload())
            await call.read()
            for at in range(0, 4 * CHUNK_BYTES, CHUNK_BYTES):
                await call.write(encode_chunk(BIG[at : at + CHUNK_BYTES]))
            await counted.until(4 * CHUNK_BYTES)
        await counted.until_closed()
        assert counted.written == 4 * CHUNK_BYTES
        await transfers.upload(SCOPE, digest, memoryview(BIG))
    assert counted.written == len(BIG)
    assert there.map(digest) == BIG


@pytest.mark.parametrize("written", [4, 5], ids=["what is there is written", "some of it is not"])
async def test_an_upload_is_resumed_where_it_was_when_its_first_connection_is_not_known_to_be_dead(
    written: int, there: TensorFiles
) -> None:
    digest = digest_of(BIG)
    counted = CountingFiles(there)
    async with moving(counted) as (server, transfers), grpc.aio.insecure_channel(server.target) as channel:
        first = channel.stream_stream(UPLOAD)(metadata=metadata_of(hello()))
        await first.write(upload())
        await first.read()
        for at in range(0, written * CHUNK_BYTES, CHUNK_BYTES):
            await first.write(encode_chunk(BIG[at : at + CHUNK_BYTES]))
        await counted.until(4 * CHUNK_BYTES)
        await transfers.upload(SCOPE, digest, memoryview(BIG))
        assert counted.written == len(BIG)
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await first.read()
        assert ended.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert there.map(digest) == BIG


async def test_a_transfer_outlives_a_restart_of_the_server(there: TensorFiles, here: TensorFiles) -> None:
    digest = there.put(BIG)
    tried = threading.Event()

    def say_hello() -> Hello:
        tried.set()
        return hello()

    async with serving(scopes=scopes_of(there)) as first:
        target = first.target
    async with transferring(target, max_tries=20, hello=say_hello) as transfers:
        fetching = asyncio.create_task(transfers.download(SCOPE, digest, len(BIG), here.begin(digest, len(BIG))))
        await asyncio.to_thread(tried.wait, 10)
        async with serving(scopes=scopes_of(there), target=target):
            await fetching
    assert here.map(digest) == BIG


async def test_a_transfer_over_a_connection_that_died_without_a_word_goes_on_over_a_new_one(there: TensorFiles) -> None:
    digest = digest_of(BIG)
    async with serving(scopes=scopes_of(there)) as server:
        network = FaultyNetwork(int(server.target.rpartition(":")[2]))
        async with network.serving() as port, transferring(f"127.0.0.1:{port}") as transfers, asyncio.timeout(10):
            assert await transfers.missing(SCOPE, [digest]) == [digest]
            await network.become(SPLIT)
            upload = asyncio.create_task(transfers.upload(SCOPE, digest, memoryview(BIG)))
            await asyncio.sleep(0)
            await network.forget()
            await network.become(FAIR)
            assert not upload.done()
            await transfers.renew()
            await upload
            assert network.connections == 2
    assert there.map(digest) == memoryview(BIG)


async def test_an_upload_goes_on_from_what_is_there_when_its_connection_broke_while_that_was_being_read(
    there: TensorFiles,
) -> None:
    digest = digest_of(BIG)
    partial = there.begin(digest, len(BIG))
    partial.write(BIG[: 3 * CHUNK_BYTES])
    partial.close()
    begun = asyncio.Event()
    asked_again, is_dropped = threading.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    class Slow(CountingPartial):
        """Tells when it and the file that it holds have gone: what it was given last goes last."""

        def __init__(self, files: CountingFiles, partial: Any) -> None:
            super().__init__(files, partial)
            self.last = threading.Event()
            weakref.finalize(self.last, is_dropped.set)

    class SlowFiles(CountingFiles):
        def begin(self, digest: Digest, size: int) -> CountingPartial:
            if begun.is_set():
                asked_again.set()
                assert is_dropped.wait(10)
                return super().begin(digest, size)
            loop.call_soon_threadsafe(begun.set)
            assert asked_again.wait(10)
            return Slow(self, there.begin(digest, size))

    counted = SlowFiles(there)
    async with moving(counted) as (_, transfers):
        upload = asyncio.create_task(transfers.upload(SCOPE, digest, memoryview(BIG)))
        await begun.wait()
        await transfers.renew()
        await upload
    assert counted.written == len(BIG) - 3 * CHUNK_BYTES
    assert [path.name for path in there.root.iterdir()] == [digest]


async def test_a_connection_that_is_renewed_while_what_was_under_way_is_just_ending_is_renewed(
    there: TensorFiles,
) -> None:
    digest = digest_of(BIG)
    async with serving(scopes=scopes_of(there)) as server:
        network = FaultyNetwork(int(server.target.rpartition(":")[2]))
        async with network.serving() as port, transferring(f"127.0.0.1:{port}") as transfers, asyncio.timeout(10):
            assert await transfers.missing(SCOPE, [digest]) == [digest]
            await network.become(SPLIT)
            upload = asyncio.create_task(transfers.upload(SCOPE, digest, memoryview(BIG)))
            await asyncio.sleep(0)
            await network.forget()
            await network.become(FAIR)
            renewed = asyncio.create_task(transfers.renew())
            await asyncio.sleep(0)  # its time is over from here on, and it has not heard of that
            again = asyncio.create_task(transfers.renew())
            await asyncio.gather(renewed, again)
            await upload
    assert there.map(digest) == memoryview(BIG)


async def test_tries_are_bounded_and_the_last_reason_is_told(here: TensorFiles) -> None:
    async with serving() as server:
        target = server.target
    async with transferring(target, max_tries=2) as transfers:
        with pytest.raises(Unreachable, match="Connection refused"):
            await transfers.missing(SCOPE, [digest_of(SMALL)])


async def test_what_the_own_disk_does_not_take_is_fetched_on_when_it_does(
    there: TensorFiles, here: TensorFiles
) -> None:
    digest = there.put(BIG)
    counted = CountingFiles(here)
    into = Filling(counted, here.begin(digest, len(BIG)))
    into.times = 2
    async with moving(there, max_tries=3) as (_, transfers):
        await transfers.download(SCOPE, digest, len(BIG), into)
    assert here.map(digest) == BIG
    assert counted.written == len(BIG)


async def test_a_disk_that_stays_full_is_told_of_after_as_many_tries_as_a_network(
    there: TensorFiles, here: TensorFiles
) -> None:
    digest = there.put(BIG)
    into = Filling(CountingFiles(here), here.begin(digest, len(BIG)))
    into.times = 1000
    async with moving(there, max_tries=3) as (_, transfers):
        with pytest.raises(NoSpace, match="receiving a tensor failed: the disk mounted at /disk"):
            await transfers.download(SCOPE, digest, len(BIG), into)
    assert into.times == 1000 - 3
    assert into.offset == CHUNK_BYTES  # and is gone on from


async def test_a_connection_that_is_opened_while_the_transfers_are_closed_does_not_stay_open(
    there: TensorFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging_up, may_hang_up = asyncio.Event(), asyncio.Event()

    def slow_to_close(*arguments: Any) -> grpc.aio.Channel:
        channel = open_channel(*arguments)
        close = channel.close

        async def slowly(grace: float | None = None) -> None:
            hanging_up.set()
            await may_hang_up.wait()
            await close(grace)

        monkeypatch.setattr(channel, "close", slowly)
        return channel

    monkeypatch.setattr("hanse.cell.transfer.open_channel", slow_to_close)
    async with serving(scopes=scopes_of(there)) as one, serving(scopes=scopes_of(there)) as other:
        targets = [one.target]
        async with transferring(lambda: targets[-1]) as transfers:
            await transfers.missing(SCOPE, [digest_of(SMALL)])
            targets.append(other.target)
            asking = asyncio.create_task(transfers.missing(SCOPE, [digest_of(SMALL)]))
            await hanging_up.wait()
            closing = asyncio.create_task(transfers.close())
            await asyncio.sleep(0)  # a turn of the loop, in which it begins
            may_hang_up.set()
            await closing
            with pytest.raises(Unreachable):
                await asking


async def test_a_server_that_moves_nothing_is_given_up() -> None:
    release = threading.Event()

    class Stuck(TensorFiles):
        def missing(self, digests: Any) -> list[Digest]:
            release.wait(5)
            return []

    async with serving(scopes=lambda *_args, **_kw: Stuck.__new__(Stuck)) as server:
        async with transferring(server.target, max_tries=1, stall_s=0.1) as transfers:
            with pytest.raises(TimedOut, match=r"'Missing' within 0\.1 s"):
                await transfers.missing(SCOPE, [digest_of(SMALL)])
        release.set()


async def test_closed_transfers_move_nothing(there: TensorFiles) -> None:
    async with moving(there) as (_, transfers):
        await transfers.missing(SCOPE, [digest_of(SMALL)])
        await transfers.close()
        with pytest.raises(Unreachable, match="closed"):
            await transfers.missing(SCOPE, [digest_of(SMALL)])


async def test_a_transfer_that_is_under_way_when_they_are_closed_is_unreachable(there: TensorFiles) -> None:
    stuck = StuckFiles(there)
    async with moving(stuck) as (_, transfers):
        sending = asyncio.create_task(transfers.upload(SCOPE, digest_of(BIG), memoryview(BIG)))
        await asyncio.to_thread(stuck.began.wait, 10)
        await transfers.close()
        with pytest.raises(Unreachable, match="closed"):
            await sending
        stuck.release.set()


async def test_a_transfer_that_is_cancelled_is_cancelled(there: TensorFiles) -> None:
    stuck = StuckFiles(there)
    async with moving(stuck) as (_, transfers):
        sending = asyncio.create_task(transfers.upload(SCOPE, digest_of(BIG), memoryview(BIG)))
        await asyncio.to_thread(stuck.began.wait, 10)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        stuck.release.set()
        await transfers.upload(SCOPE, digest_of(SMALL), memoryview(SMALL))


async def test_a_new_target_is_taken_for_the_next_transfer(there: TensorFiles, here: TensorFiles) -> None:
    digest = here.put(SMALL)
    async with serving(scopes=scopes_of(there)) as one, serving(scopes=scopes_of(here)) as other:
        target = one.target
        async with transferring(lambda: target) as transfers:
            assert await transfers.missing(SCOPE, [digest]) == [digest]
            target = other.target
            assert await transfers.missing(SCOPE, [digest]) == []


# One place for both


async def test_where_both_sides_share_a_place_nothing_is_missing_and_nothing_moves(here: TensorFiles) -> None:
    digest = here.put(BIG)
    counted = CountingFiles(here)
    local = LocalTransfers(lambda _scope: counted)
    assert await local.missing(SCOPE, [digest, digest_of(SMALL)]) == [digest_of(SMALL)]
    await local.upload(SCOPE, digest, memoryview(BIG))
    await local.download(SCOPE, digest, len(BIG), counted.begin(digest, len(BIG)))
    assert counted.written == 0


async def test_local_transfers_between_two_places_copy(there: TensorFiles, here: TensorFiles) -> None:
    local = LocalTransfers(lambda _scope: there)
    digest = digest_of(BIG)
    await local.upload(SCOPE, digest, memoryview(BIG))
    await local.download(SCOPE, digest, len(BIG), here.begin(digest, len(BIG)))
    assert here.map(digest) == BIG
    with pytest.raises(NotFound):
        await local.download(SCOPE, digest_of(SMALL), len(SMALL), here.begin(digest_of(SMALL), len(SMALL)))


# Parts


@given(st.binary(max_size=1000))
def test_a_chunk_made_by_hand_is_what_protobuf_makes(data: bytes) -> None:
    made = encode_chunk(data)
    assert wire_pb2.Chunk.FromString(made).data == data
    assert wire_pb2.UploadPart.FromString(made).data == data
    assert decode_chunk(made) == data


@pytest.mark.parametrize("size", [0, 1, 127, 128, 16_383, 16_384, CHUNK_BYTES - 1, CHUNK_BYTES])
def test_chunks_of_any_size_are_read_as_they_were_written(size: int) -> None:
    assert len(decode_chunk(encode_chunk(bytes(size))) or b"") == size
    assert decode_chunk(wire_pb2.Chunk(data=b"x" * size).SerializeToString()) == (b"x" * size if size else None)


@given(st.binary(max_size=60))
def test_any_bytes_are_read_as_protobuf_reads_them_or_left_to_it(data: bytes) -> None:
    chunk = decode_chunk(data)
    if chunk is not None:
        assert wire_pb2.Chunk.FromString(data).data == chunk


def test_metadata_says_what_the_hello_says() -> None:
    said = hello()
    assert hello_of(metadata_of(said)) == Hello((1,), said.fqcn, said.project, credentials=said.credentials)
    anonymous = hello(token=None)
    assert hello_of(metadata_of(anonymous)).credentials is None


async def test_a_write_that_fails_in_its_thread_is_raised_to_the_transfer() -> None:
    class Full:
        offset = 0
        is_closed = False

        def write(self, chunk: bytes | memoryview) -> None:
            raise HanseError("disk full")

        def finish(self) -> None: ...

        def close(self) -> None:
            self.is_closed = True

    full = Full()
    inflow = Inflow(full)
    await inflow.add(SMALL)
    with pytest.raises(HanseError, match="disk full"):
        await inflow.finish()
    inflow.close()
    assert full.is_closed


async def test_of_what_arrives_no_more_is_in_memory_than_is_being_written_and_the_next(there: TensorFiles) -> None:
    begun, release = threading.Event(), threading.Event()

    class Slow(CountingPartial):
        def write(self, chunk: bytes | memoryview) -> None:
            begun.set()
            assert release.wait(10)
            super().write(chunk)

    digest = digest_of(BIG[: 2 * CHUNK_BYTES])
    inflow = Inflow(Slow(CountingFiles(there), there.begin(digest, 2 * CHUNK_BYTES)))
    await inflow.add(BIG[:CHUNK_BYTES])
    second = asyncio.create_task(inflow.add(BIG[CHUNK_BYTES : 2 * CHUNK_BYTES]))
    assert await asyncio.to_thread(begun.wait, 10)
    assert not second.done()
    release.set()
    await second
    await inflow.finish()
    inflow.close()
    assert there.has(digest)


class CountingFiles:
    """Tensor files that count what is written into them."""

    def __init__(self, files: TensorFiles) -> None:
        self._files = files
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self.written = 0
        self.closed = 0

    def has(self, digest: Digest) -> bool:
        return self._files.has(digest)

    def missing(self, digests: Any) -> list[Digest]:
        return self._files.missing(digests)

    def map(self, digest: Digest) -> memoryview:
        return self._files.map(digest)

    def open(self, digest: Digest) -> Reading:
        return self._files.open(digest)

    def begin(self, digest: Digest, size: int) -> "CountingPartial":
        return CountingPartial(self, self._files.begin(digest, size))

    def count(self, size: int, *, closed: bool = False) -> None:
        self.written += size
        self.closed += closed
        self._loop.call_soon_threadsafe(self._changed.set)

    async def until(self, written: int) -> None:
        await self._until(lambda: self.written >= written)

    async def until_closed(self) -> None:
        await self._until(lambda: self.closed > 0)

    async def _until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not holds():
                self._changed.clear()
                await self._changed.wait()


class StuckFiles(CountingFiles):
    """Tensor files that take their time to begin."""

    def __init__(self, files: TensorFiles) -> None:
        super().__init__(files)
        self.began, self.release = threading.Event(), threading.Event()

    def begin(self, digest: Digest, size: int) -> "CountingPartial":
        self.began.set()
        self.release.wait(10)
        return super().begin(digest, size)


class CountingPartial:
    def __init__(self, files: CountingFiles, partial: Any) -> None:
        self._files, self._partial = files, partial

    @property
    def offset(self) -> int:
        return int(self._partial.offset)

    def write(self, chunk: bytes | memoryview) -> None:
        self._partial.write(chunk)
        self._files.count(len(chunk))

    def finish(self) -> None:
        self._partial.finish()

    def close(self) -> None:
        self._partial.close()
        self._files.count(0, closed=True)


class Filling(CountingPartial):
    """A tensor that the own disk does not take the second piece of, *times* times."""

    times = 0

    def write(self, chunk: bytes | memoryview) -> None:
        if self.offset and self.times:
            self.times -= 1
            raise NoSpace("receiving a tensor", disk="/disk", folder="/disk/tensors", why="No space left on device")
        super().write(chunk)
