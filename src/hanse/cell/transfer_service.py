"""Tensors by digest, as the port serves them: the other half of ``transfer``.

Who calls is decided once, when the call starts, and with each chunk whether it may go on; what may be read or written
is decided by the scope's files that the caller is given, or is not. Everything that a call says is checked before a
file is touched. A call that moves nothing for a minute ends, and one peer has a bounded number of calls, so a slow or
hostile one keeps no places from others.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from typing import Final, Protocol, TypeAlias, TypeVar

import grpc.aio
from google.protobuf.message import DecodeError, Message

from hanse.cell import wire_pb2
from hanse.cell.frames import is_fqcn
from hanse.cell.handshake import Authorize
from hanse.cell.link import Peer, PeerCertificate, Transport
from hanse.cell.rpc import (
    CHUNK_BYTES,
    MAX_DIGESTS,
    MAX_SCOPE_CHARS,
    MAX_TENSOR_BYTES,
    decode_chunk,
    encode_chunk,
    hello_of,
    status_of,
)
from hanse.cell.transfer import STALL_S, Files, Inflow, Reading
from hanse.errors import HanseError, InternalError, NotInService, ProtocolError, TimedOut, Unauthenticated
from hanse.ids import Digest, Fqcn, is_digest

MAX_CALLS_PER_PEER: Final = 16

M = TypeVar("M", bound=Message)
Identify: TypeAlias = Callable[[grpc.aio.ServicerContext], tuple[PeerCertificate | None, Transport]]

Stays: TypeAlias = Callable[[Peer], None]
"""Raises why a peer whose call is under way may not go on; quick, and free of I/O waits."""

_log = logging.getLogger(__name__)


class Scopes(Protocol):
    """Says which tensors a peer may see or add to."""

    def __call__(self, peer: Peer, scope: str, *, write: bool) -> Files | Awaitable[Files]:
        """Return the files of *scope*, or raise why *peer* may not have them; quick, or awaited where it is not."""


class TransferService:
    """Answers ``Missing``, ``Download`` and ``Upload`` calls; messages are bytes here, and checked here."""

    def __init__(
        self,
        *,
        authorize: Authorize,
        identify: Identify,
        scopes: Scopes,
        stays: Stays | None = None,
        stall_s: float = STALL_S,
    ) -> None:
        self._authorize, self._identify, self._scopes, self._stays = authorize, identify, scopes, stays
        self._stall_s = stall_s
        self._calls: Counter[str] = Counter()
        self._uploads: dict[tuple[Fqcn, str, Digest], tuple[asyncio.Timeout, Inflow]] = {}

    async def missing(self, request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        """Answer which digests of a scope are not there."""
        async with self._answering(context) as (peer, _):
            asked = _parsed(wire_pb2.MissingRequest, request)
            if len(asked.digests) > MAX_DIGESTS:
                raise ProtocolError(
                    "MissingRequest.digests", got=f"{len(asked.digests)} digests", expected=f"at most {MAX_DIGESTS}"
                )
            digests = [_digest(digest, "MissingRequest.digests") for digest in asked.digests]
            files = await self._files(peer, asked.scope, write=False)
            absent = await asyncio.to_thread(files.missing, digests)
        return wire_pb2.MissingReply(digests=absent).SerializeToString()

    async def download(self, request: bytes, context: grpc.aio.ServicerContext) -> None:
        """Send a tensor's bytes from an offset on."""
        async with self._answering(context) as (peer, limit):
            asked = _parsed(wire_pb2.DownloadRequest, request)
            digest = _digest(asked.digest, "DownloadRequest.digest")
            files = await self._files(peer, asked.scope, write=False)
            tensor = await asyncio.to_thread(files.open, digest)
            if asked.size != tensor.size:
                raise ProtocolError(
                    "DownloadRequest.size", got=asked.size, expected=f"the tensor's {tensor.size} bytes"
                )
            if asked.offset > tensor.size:
                raise ProtocolError("DownloadRequest.offset", got=asked.offset, expected=f"at most {tensor.size}")
            for at in range(asked.offset, tensor.size, CHUNK_BYTES):
                await context.write(await _chunk(tensor, at))
                self._go_on(peer, limit)

    async def upload(self, _requests: object, context: grpc.aio.ServicerContext) -> None:
        """Take a tensor's bytes from where the files have them, verify it and say so."""
        async with self._answering(context) as (peer, limit):
            asked = _parsed(wire_pb2.UploadPart, _whole(await context.read(), "its first part"))
            digest = _digest(asked.digest, "UploadPart.digest")
            if asked.size > MAX_TENSOR_BYTES:
                raise ProtocolError("UploadPart.size", got=asked.size, expected=f"at most {MAX_TENSOR_BYTES} bytes")
            files = await self._files(peer, asked.scope, write=True)
            await self._end_earlier(key := (peer.fqcn, asked.scope, digest))
            if not await asyncio.to_thread(files.has, digest):
                inflow = Inflow(tensor := await asyncio.to_thread(files.begin, digest, asked.size))
                self._uploads[key] = limit, inflow
                try:
                    await context.write(_status(tensor.offset))
                    moved = partial(self._go_on, peer, limit)
                    await self._take(context, moved, inflow, asked.size - tensor.offset)
                    await inflow.finish()
                finally:
                    inflow.close()
                    if self._uploads.get(key) == (limit, inflow):
                        del self._uploads[key]
            await context.write(_status(asked.size, complete=True))

    async def _end_earlier(self, upload: tuple[Fqcn, str, Digest]) -> None:
        """End the call by which a peer has sent the same before, and return when it has let go of the file.

        The connection of that call is dead: who sends it knows, and here that may show much later. What has come by it
        is gone on from.
        """
        if (earlier := self._uploads.pop(upload, None)) is not None:
            limit, inflow = earlier
            with suppress(RuntimeError):  # its time is over at this very moment
                limit.reschedule(asyncio.get_running_loop().time())
            await inflow.closed.wait()

    async def _take(
        self, context: grpc.aio.ServicerContext, moved: Callable[[], None], inflow: Inflow, remaining: int
    ) -> None:
        while remaining > 0:
            message = _whole(await context.read(), f"{remaining} more bytes")
            chunk = decode_chunk(message) or memoryview(_parsed(wire_pb2.UploadPart, message).data)
            if not 0 < len(chunk) <= min(CHUNK_BYTES, remaining):
                most = min(CHUNK_BYTES, remaining)
                raise ProtocolError("UploadPart.data", got=f"{len(chunk)} bytes", expected=f"1 to {most}")
            remaining -= len(chunk)
            await inflow.add(chunk)
            moved()

    async def _files(self, peer: Peer, scope: str, *, write: bool) -> Files:
        files = self._scopes(peer, _scope(scope), write=write)
        return await files if isinstance(files, Awaitable) else files

    @asynccontextmanager
    async def _answering(self, context: grpc.aio.ServicerContext) -> AsyncIterator[tuple[Peer, asyncio.Timeout]]:
        """Say who calls, for the length of a call; what goes wrong in it becomes the call's status."""
        try:
            async with asyncio.timeout(self._stall_s) as limit:
                with self._place_for(self._caller(context)) as peer:
                    yield peer, limit
        except TimeoutError:
            failed: HanseError = TimedOut("the caller", "the transfer", self._stall_s)
        except HanseError as error:
            failed = error
        except grpc.aio.BaseError:
            raise
        except Exception:  # noqa: BLE001 - one call's failure is its status, and hurts no other
            _log.exception("transfer failed")
            failed = InternalError("moving a tensor")
        else:
            return
        code, reason, metadata = status_of(failed)
        await context.abort(code, reason, metadata)

    def _caller(self, context: grpc.aio.ServicerContext) -> Peer:
        hello = hello_of(context.invocation_metadata() or ())
        if not is_fqcn(hello.fqcn):
            raise ProtocolError("hanse-fqcn", got=hello.fqcn, expected="a participant's name, or name.job")
        peer = self._authorize(hello, *self._identify(context))
        if not peer.proven:
            raise Unauthenticated(f"{peer.fqcn} must register before it moves tensors")
        return peer

    @contextmanager
    def _place_for(self, peer: Peer) -> Iterator[Peer]:
        if self._calls[peer.fqcn] >= MAX_CALLS_PER_PEER:
            raise NotInService(f"{peer.fqcn} already moves {MAX_CALLS_PER_PEER} tensors at once")
        self._calls[peer.fqcn] += 1
        try:
            yield peer
        finally:
            self._calls[peer.fqcn] -= 1
            if not self._calls[peer.fqcn]:
                del self._calls[peer.fqcn]

    def _go_on(self, peer: Peer, limit: asyncio.Timeout) -> None:
        """Let a call that has moved something go on, if its caller may."""
        if self._stays is not None:
            self._stays(peer)
        limit.reschedule(asyncio.get_running_loop().time() + self._stall_s)


def _parsed(kind: type[M], data: bytes) -> M:
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise ProtocolError(kind.DESCRIPTOR.name, got=data[:32], expected="what wire.proto says it is") from error


async def _chunk(tensor: Reading, at: int) -> bytes:
    data = tensor.read_nowait(at, CHUNK_BYTES)
    return encode_chunk(await asyncio.to_thread(tensor.read, at, CHUNK_BYTES) if data is None else data)


def _whole(data: bytes | object, what: str) -> bytes:
    if not isinstance(data, bytes):
        raise ProtocolError("upload", got="the end of the stream", expected=what)
    return data


def _digest(text: str, field: str) -> Digest:
    if not is_digest(text):
        raise ProtocolError(field, got=text, expected="64 lower-case hexadecimal digits")
    return Digest(text)


def _scope(text: str) -> str:
    if not 0 < len(text) <= MAX_SCOPE_CHARS:
        raise ProtocolError("scope", got=f"{len(text)} characters", expected=f"1 to {MAX_SCOPE_CHARS}")
    return text


def _status(offset: int, *, complete: bool = False) -> bytes:
    return wire_pb2.UploadStatus(offset=offset, complete=complete).SerializeToString()
