"""Tensors by digest, as a client moves them: ask what is missing, fetch, send; resumable and verified.

A tensor's bytes go in chunks of 1 MiB from the offset that the receiving side already has; the receiving side verifies
the digest before the tensor exists for anyone. A connection that breaks is dialled again and the transfer goes on from
where it was, as long as each try moves something or the tries without progress are few. Files are written in threads, a
chunk while the next one arrives: of more that waits in memory, each client that sends at the same time would add some.
"""

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, Final, Protocol, TypeVar

import grpc.aio
from google.protobuf.message import DecodeError, Message

from hanse.cell import wire_pb2
from hanse.cell.backoff import Backoff
from hanse.cell.rpc import (
    CHUNK_BYTES,
    DOWNLOAD,
    MAX_DIGESTS,
    MISSING,
    UPLOAD,
    ClientTls,
    decode_chunk,
    encode_chunk,
    error_of,
    metadata_of,
    open_channel,
)
from hanse.errors import HanseError, ProtocolError, TimedOut, Unreachable
from hanse.ids import Digest
from hanse.messages import Hello

MAX_AT_ONCE: Final = 2
MAX_TRIES: Final = 6
STALL_S: Final = 60.0
"""A transfer that moves nothing for this long is given up, or tried again."""

_log = logging.getLogger(__name__)
T = TypeVar("T")
M = TypeVar("M", bound=Message)


class Partial(Protocol):
    """A tensor on its way into a file."""

    @property
    def offset(self) -> int:
        """How many of its bytes are there."""

    def write(self, chunk: bytes | memoryview) -> object:
        """Append *chunk*."""

    def finish(self) -> object:
        """Verify digest and size, and make it a tensor; raise ``ProtocolError`` and forget it when they do not hold."""

    def close(self) -> None:
        """Keep what is there for another time; harmless after ``finish``."""


class Reading(Protocol):
    """A tensor that is being read from its file."""

    @property
    def size(self) -> int:
        """How many bytes it has."""

    def read(self, at: int, most: int) -> bytes:
        """Return *most* of its bytes from *at* on, or all that follow if they are fewer."""

    def read_nowait(self, at: int, most: int) -> memoryview | None:
        """Return the same, until this is called again; ``None`` where a disk would have to be waited for."""


class Files(Protocol):
    """Tensors by digest in a place of their own (``hanse.storage.tensors.TensorFiles``)."""

    def has(self, digest: Digest) -> bool:
        """Return whether the tensor is there, whole."""

    def missing(self, digests: Iterable[Digest]) -> list[Digest]:
        """Return those of *digests* that are not there."""

    def map(self, digest: Digest) -> memoryview:
        """Return the tensor's bytes, read-only and unread."""

    def open(self, digest: Digest) -> Reading:
        """Return the tensor to be read; not mapped, for what a disk cannot read of a mapping ends the process."""

    def begin(self, digest: Digest, size: int) -> Partial:
        """Begin to write a tensor of *size* bytes, or go on with one begun before."""


class TensorTransfers(Protocol):
    """Moves tensors between here and the server's *scope*: ``job/<job id>``, or what else the server offers."""

    async def missing(self, scope: str, digests: Sequence[Digest]) -> list[Digest]:
        """Return those of *digests* that the server has not, in the order given."""

    async def download(self, scope: str, digest: Digest, size: int, into: Partial) -> None:
        """Fetch a tensor into *into*, from its offset on, and finish it; on failure what came is kept."""

    async def upload(self, scope: str, digest: Digest, buffer: memoryview) -> None:
        """Send a tensor, from what the server has of it on; return when the server has verified it."""


class Inflow:
    """Writes arriving chunks into a ``Partial`` in threads: one is being written while the next comes in."""

    def __init__(self, into: Partial) -> None:
        self._into = into
        self._writing: asyncio.Future[object] | None = None
        self.closed = asyncio.Event()
        """Set when the ``Partial`` has been closed, so that another can go on with the file."""

    async def add(self, chunk: bytes | memoryview) -> None:
        """Take *chunk*, once the one before is written."""
        await self.flush()
        self._writing = asyncio.get_running_loop().run_in_executor(None, self._into.write, chunk)

    async def flush(self) -> None:
        """Return when all that was taken is written; a write that failed is told of once, and may be tried again."""
        if (writing := self._writing) is None:
            return
        try:
            await asyncio.shield(writing)
        finally:
            if writing.done():  # a cancelled transfer must still know when its thread is done with the file
                self._writing = None

    async def finish(self) -> None:
        """Write what is left, verify the tensor and put it in its place."""
        await self.flush()
        self._writing = asyncio.get_running_loop().run_in_executor(None, self._into.finish)
        await self.flush()

    def close(self) -> None:
        """Close the ``Partial``, as soon as no thread writes to it."""
        if self._writing is not None and not self._writing.done():
            self._writing.add_done_callback(lambda _: self._close())
        else:
            self._close()

    def _close(self) -> None:
        self._into.close()
        self.closed.set()


class Transfers:
    """``TensorTransfers`` over gRPC, on a connection of its own, so that no heartbeat waits behind a tensor.

    *target* tells where to (a ``Connector``'s ``target``), *hello* what proves who calls. At most two tensors move at
    once; more wait. ``close`` gives up what is under way.

    Raises, from each method: ``Unreachable`` or ``TimedOut`` when the tries are used up, and whatever the server
    refuses with.
    """

    def __init__(
        self,
        *,
        target: Callable[[], str],
        hello: Callable[[], Hello],
        tls: ClientTls | None,
        rng: random.Random,
        max_tries: int = MAX_TRIES,
        stall_s: float = STALL_S,
    ) -> None:
        self._target, self._hello, self._tls, self._rng = target, hello, tls, rng
        self._max_tries, self._stall_s = max_tries, stall_s
        self._places = asyncio.Semaphore(MAX_AT_ONCE)
        self._channel: tuple[str, grpc.aio.Channel] | None = None
        self._limits: set[asyncio.Timeout] = set()
        self._is_closed = False

    async def missing(self, scope: str, digests: Sequence[Digest]) -> list[Digest]:
        """Return those of *digests* that the server has not, in the order given."""
        found: list[Digest] = []
        for at in range(0, len(digests), MAX_DIGESTS):
            some = digests[at : at + MAX_DIGESTS]
            found += await self._persist(partial(self._missing, scope, some), moved=lambda: 0)
        return found

    async def download(self, scope: str, digest: Digest, size: int, into: Partial) -> None:
        """Fetch a tensor into *into*, from its offset on, and finish it; if that fails, what came is kept."""
        inflow = Inflow(into)
        try:
            async with self._places:
                if into.offset < size:
                    await self._persist(
                        lambda: self._download(scope, digest, size, into, inflow), moved=lambda: into.offset
                    )
                await inflow.finish()
        finally:
            inflow.close()

    async def upload(self, scope: str, digest: Digest, buffer: memoryview) -> None:
        """Send a tensor, from what the server has of it on; return when the server has verified it."""
        view = buffer.cast("B") if buffer.nbytes else memoryview(b"")
        first = wire_pb2.UploadPart(scope=scope, digest=digest, size=len(view)).SerializeToString()
        there = 0

        async def attempt() -> None:
            nonlocal there
            async with self._call(UPLOAD) as (call, limit):
                await call.write(first)
                status = await _upload_status(call, digest)
                there = status.offset
                if not status.complete:
                    await _send(call, view[there:], moved=lambda: self._extend(limit))
                    status = await _upload_status(call, digest)
                if not status.complete:
                    raise ProtocolError("UploadStatus.complete", got=False, expected="the tensor to be complete")

        async with self._places:
            await self._persist(attempt, moved=lambda: there)

    async def renew(self) -> None:
        """Have the connection dialled anew, and what is under way go on there.

        For when another connection to the same place broke: this one may be as dead, and would be waited for until it
        has moved nothing for long.
        """
        await self._hang_up()

    async def close(self) -> None:
        """Close the connection; transfers that are under way raise ``Unreachable``."""
        self._is_closed = True
        await self._hang_up()

    async def _missing(self, scope: str, digests: Sequence[Digest]) -> list[Digest]:
        request = wire_pb2.MissingRequest(scope=scope, digests=digests).SerializeToString()
        async with self._call(MISSING, request) as (call, _):
            reply = await call
        return [Digest(digest) for digest in _parsed(wire_pb2.MissingReply, reply).digests]

    async def _download(self, scope: str, digest: Digest, size: int, into: Partial, inflow: Inflow) -> None:
        offset = into.offset
        request = wire_pb2.DownloadRequest(scope=scope, digest=digest, size=size, offset=offset).SerializeToString()
        try:
            async with self._call(DOWNLOAD, request) as (call, limit):
                async for message in call:
                    chunk = decode_chunk(message) or memoryview(_parsed(wire_pb2.Chunk, message).data)
                    offset += len(chunk)
                    if offset > size:
                        raise ProtocolError(f"tensor {digest}", got=f"{offset} bytes", expected=f"{size} bytes")
                    await inflow.add(chunk)
                    self._extend(limit)
        finally:
            # What came before the break is kept, and the next try goes on from there.
            await inflow.flush()
        if offset < size:
            raise Unreachable(self._target(), f"it sent {offset} of the {size} bytes of tensor {digest}")

    async def _persist(self, attempt: Callable[[], Awaitable[T]], *, moved: Callable[[], int]) -> T:
        """Return what *attempt* returns; try again while that may help, unless too many tries have *moved* nothing."""
        backoff = Backoff(self._rng)
        tries = 0
        while True:
            before = moved()
            try:
                return await attempt()
            except HanseError as error:
                tries = tries + 1 if moved() == before else 1
                if not error.retryable or tries >= self._max_tries or self._is_closed:
                    raise
                delay_s = backoff.next_s()
                _log.info("transfer will be tried again", extra={"in_s": delay_s, "reason": error.reason})
            await asyncio.sleep(delay_s)  # before it is tried again what failed

    @asynccontextmanager
    async def _call(self, path: str, request: bytes | None = None) -> AsyncIterator[tuple[Any, asyncio.Timeout]]:
        """Open a call to *path* (with one *request*, or with a stream of them); translate what can go wrong with it."""
        target = self._target()
        channel = await self._connected(target)
        open_call = {MISSING: channel.unary_unary, DOWNLOAD: channel.unary_stream, UPLOAD: channel.stream_stream}[path]
        metadata = metadata_of(self._hello())
        try:
            async with asyncio.timeout(self._stall_s) as limit:
                if request is None:
                    call = open_call(path)(metadata=metadata)
                else:
                    call = open_call(path)(request, metadata=metadata)
                self._limits.add(limit)
                try:
                    yield call, limit
                finally:
                    self._limits.discard(limit)
                    call.cancel()
        except TimeoutError:
            if self._channel is None or self._channel[1] is not channel:
                raise Unreachable(target, "the connection was closed") from None
            raise TimedOut(target, path.rpartition("/")[2], self._stall_s) from None
        except grpc.aio.AioRpcError as error:
            raise error_of(error, target) from error
        except (asyncio.InvalidStateError, grpc.aio.UsageError) as error:
            raise Unreachable(target, "the connection was closed") from error
        except asyncio.CancelledError:
            # gRPC says the same whether this task was cancelled or the connection was closed under the call.
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise Unreachable(target, "the connection was closed") from None

    def _extend(self, limit: asyncio.Timeout) -> None:
        limit.reschedule(asyncio.get_running_loop().time() + self._stall_s)

    async def _connected(self, target: str) -> grpc.aio.Channel:
        if self._is_closed:
            raise Unreachable(target, "its transfers are closed")
        if self._channel is not None and self._channel[0] == target:
            return self._channel[1]
        channel = open_channel(target, self._tls)
        # At once, for others may want it, or close it, while the one before is being closed.
        await self._hang_up(following=(target, channel))
        return channel

    async def _hang_up(self, following: tuple[str, grpc.aio.Channel] | None = None) -> None:
        channel, self._channel = self._channel, following
        for limit in self._limits:  # for a call that has only just begun is not ended by closing its channel
            with suppress(RuntimeError):  # its time is over at this very moment
                limit.reschedule(asyncio.get_running_loop().time())
        if channel is not None:
            await channel[1].close(None)


class LocalTransfers:
    """``TensorTransfers`` where both sides share one place: nothing moves, and what is there is missing nowhere."""

    def __init__(self, files: Callable[[str], Files]) -> None:
        self._files = files

    async def missing(self, scope: str, digests: Sequence[Digest]) -> list[Digest]:
        """Return those of *digests* that the scope's place has not."""
        return self._files(scope).missing(digests)

    async def download(self, scope: str, digest: Digest, size: int, into: Partial) -> None:
        """Copy the tensor into *into*, from its offset on; nothing to copy where *into* lies in the same place."""
        inflow = Inflow(into)
        try:
            if into.offset < size:
                await inflow.add(self._files(scope).map(digest)[into.offset :])
            await inflow.finish()
        finally:
            inflow.close()

    async def upload(self, scope: str, digest: Digest, buffer: memoryview) -> None:
        """Copy *buffer* to the scope's place, unless it is there."""
        files = self._files(scope)
        if files.has(digest):
            return
        inflow = Inflow(await asyncio.to_thread(files.begin, digest, buffer.nbytes))
        try:
            await inflow.add(buffer)
            await inflow.finish()
        finally:
            inflow.close()


async def _send(call: Any, view: memoryview, *, moved: Callable[[], None]) -> None:
    try:
        for at in range(0, len(view), CHUNK_BYTES):
            await call.write(encode_chunk(view[at : at + CHUNK_BYTES]))
            moved()
        await call.done_writing()
    except asyncio.InvalidStateError:
        pass  # the server has ended the call; reading its answer tells why


async def _upload_status(call: Any, digest: Digest) -> wire_pb2.UploadStatus:
    data = await call.read()
    if data is grpc.aio.EOF:
        raise Unreachable("the server", f"it ended the upload of tensor {digest} without a word")
    return _parsed(wire_pb2.UploadStatus, data)


def _parsed(kind: type[M], data: bytes) -> M:
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise ProtocolError(kind.DESCRIPTOR.name, got=data[:32], expected="what wire.proto says it is") from error
