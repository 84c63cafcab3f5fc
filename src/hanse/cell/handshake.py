"""How a stream opens: HELLO, then WELCOME or BYE, over any pipe.

The side that dials says which protocol versions it speaks, which cell it is and, where it can, what proves that. The
side that listens takes the highest version that both speak, lets ``authorize`` decide who that is, and answers. A
stream whose peer has still to prove itself (it registers over this very stream) is open, but ends if that takes too
long, so that nobody can sit on the port's places without a name.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Final, TypeAlias

from hanse.cell.cell import Cell
from hanse.cell.frames import (
    MAX_PAYLOAD_BYTES,
    Frame,
    FrameKind,
    decode,
    decode_struct,
    encode,
    encode_struct,
    is_fqcn,
)
from hanse.cell.link import (
    FAREWELL_S,
    MAX_QUEUED_BYTES,
    MAX_QUEUED_FRAMES,
    Peer,
    PeerCertificate,
    Pipe,
    StreamLink,
    Transport,
    farewell,
    memory_pipe_pair,
)
from hanse.cell.refusals import error_from
from hanse.errors import (
    HanseError,
    InternalError,
    NotInService,
    ProtocolError,
    Unauthenticated,
    Unreachable,
    VersionMismatch,
)
from hanse.ids import SERVER, Ssid
from hanse.messages import PROTOCOL_VERSIONS, Hello, Welcome

HELLO_TIMEOUT_S: Final = 10.0
PROVE_TIMEOUT_S: Final = 60.0
MAX_STREAMS: Final = 20_000

Authorize: TypeAlias = Callable[[Hello, PeerCertificate | None, Transport], Peer]
"""Says who a caller is, or raises why it may not come in; quick, and free of I/O waits."""

_log = logging.getLogger(__name__)


async def say_hello(pipe: Pipe, hello: Hello) -> Welcome:
    """Open a stream from the side that dialled, and return the other side's welcome.

    Raises:
        ProtocolError: the answer is no welcome.
        VersionMismatch: it names a version that *hello* did not offer.
        HanseError: the pipe broke, or the other side refused; the sentence says why.
    """
    await pipe.write(encode(Frame(FrameKind.HELLO, origin=hello.fqcn, payload=encode_struct(hello))))
    frame = await _first_frame(pipe)
    if frame.kind is FrameKind.BYE:
        raise error_from(frame.headers)
    if frame.kind is not FrameKind.WELCOME:
        raise ProtocolError("first frame", got=frame.kind.name, expected="WELCOME or BYE")
    welcome = decode_struct(Welcome, frame.payload)
    if welcome.version not in hello.versions:
        raise VersionMismatch(
            "the server",
            release=welcome.release,
            versions=(welcome.version,),
            our_release=hello.release,
            our_versions=hello.versions,
        )
    return welcome


async def hear_hello(pipe: Pipe) -> Hello:
    """Return what the side that dialled says first.

    Raises:
        ProtocolError: it says something else, or names a cell that cannot be.
        HanseError: the pipe broke.
    """
    frame = await _first_frame(pipe)
    if frame.kind is not FrameKind.HELLO:
        raise ProtocolError("first frame", got=frame.kind.name, expected="HELLO")
    hello = decode_struct(Hello, frame.payload)
    if not is_fqcn(hello.fqcn):
        raise ProtocolError("Hello.fqcn", got=hello.fqcn, expected="a participant's name, or name.job")
    return hello


def choose_version(hello: Hello, ours: Sequence[int] = PROTOCOL_VERSIONS, *, release: str = "") -> int:
    """Return the highest protocol version that both sides speak; this one's *release* is for the sentence.

    Raises:
        VersionMismatch: there is none.
    """
    shared = set(hello.versions) & set(ours)
    if not shared:
        raise VersionMismatch(
            hello.fqcn, release=hello.release, versions=hello.versions, our_release=release, our_versions=ours
        )
    return max(shared)


class Reception:
    """Opens the streams that others dial to *cell*, over any transport, and serves each until it ends.

    A welcome names *server*, *release*, the SSID that *session* tells, and the time of *wall*. *wait_turn* is awaited
    before a caller is judged; *on_refused* hears who was not let in, by its own word, and why. ``dial`` is the way in
    for cells of the same process. After ``close`` nobody is let in any more.
    """

    def __init__(
        self,
        cell: Cell,
        *,
        authorize: Authorize,
        session: Callable[[], Ssid] = lambda: Ssid(""),
        wait_turn: Callable[[], Awaitable[None]] | None = None,
        server: str = SERVER,
        release: str = "",
        on_refused: Callable[[Hello, HanseError], None] = lambda *_: None,
        versions: Sequence[int] = PROTOCOL_VERSIONS,
        hello_timeout_s: float = HELLO_TIMEOUT_S,
        prove_timeout_s: float = PROVE_TIMEOUT_S,
        max_streams: int = MAX_STREAMS,
        max_queued_frames: int = MAX_QUEUED_FRAMES,
        max_queued_bytes: int = MAX_QUEUED_BYTES,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._cell, self._authorize, self._session = cell, authorize, session
        self._wait_turn = wait_turn
        self._server, self._release, self._versions = server, release, tuple(versions)
        self._wall = wall
        self._on_refused = on_refused
        self._hello_timeout_s, self._prove_timeout_s = hello_timeout_s, prove_timeout_s
        self._max_streams, self._max_frames, self._max_bytes = max_streams, max_queued_frames, max_queued_bytes
        self._opening: set[asyncio.Timeout] = set()
        self._links: set[StreamLink] = set()
        self._tasks: set[asyncio.Task[HanseError]] = set()
        self._closed_for: HanseError | None = None

    @property
    def authorize(self) -> Authorize:
        """What decides who a caller is, for streams and calls alike."""
        return self._authorize

    async def serve(self, pipe: Pipe, certificate: PeerCertificate | None, transport: Transport) -> HanseError:
        """Open the stream on *pipe* and serve it until it ends; return why it ended. The pipe is closed then."""
        try:
            link = await self._open(pipe, certificate, transport)
        except HanseError as error:
            _log.info("stream refused", extra={"reason": error.reason})
            await _say_bye(pipe, error)
            return error
        limit = asyncio.get_running_loop().call_later(self._prove_timeout_s, self._expect_proof, link)
        self._links.add(link)
        try:
            return await link.run(self._cell.receive)
        finally:
            limit.cancel()
            self._links.discard(link)

    async def dial(self, target: str) -> Pipe:
        """Return a pipe in memory to this reception: what a ``Connector`` in the same process dials."""
        if self._closed_for is not None:
            raise Unreachable(target, self._closed_for.reason)
        near, far = memory_pipe_pair()
        task = asyncio.create_task(self.serve(far, None, "memory"), name="stream in memory")  # awaited by close()
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return near

    async def close(self, error: HanseError) -> None:
        """End all streams, telling their peers of *error*, and return when they have ended."""
        self._closed_for = error
        for opening in self._opening:
            with suppress(RuntimeError):  # its time is over at this very moment
                opening.reschedule(asyncio.get_running_loop().time())
        await asyncio.gather(*(link.close(error) for link in self._links))
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _open(self, pipe: Pipe, certificate: PeerCertificate | None, transport: Transport) -> StreamLink:
        if self._closed_for is not None:
            raise self._closed_for
        if len(self._links) + len(self._opening) >= self._max_streams:
            raise NotInService(f"{self._cell.fqcn} has all of its {self._max_streams} streams in use")
        hello = await self._hear_hello(pipe)
        if self._wait_turn is not None:
            await self._wait_turn()
        if self._closed_for is not None:
            raise self._closed_for
        try:
            version = choose_version(hello, self._versions, release=self._release)
            peer = self._authorize(hello, certificate, transport)
        except HanseError as error:
            self._on_refused(hello, error)
            raise
        except Exception as error:
            _log.exception("authorization failed", extra={"peer": hello.fqcn})
            raise InternalError(f"authorizing {hello.fqcn}") from error
        link = StreamLink(peer, pipe, max_frames=self._max_frames, max_bytes=self._max_bytes)
        welcome = Welcome(version, self._server, self._session(), self._release, MAX_PAYLOAD_BYTES, self._wall())
        link.send_nowait(Frame(FrameKind.WELCOME, origin=self._cell.fqcn, payload=encode_struct(welcome)))
        self._cell.attach(link)
        return link

    async def _hear_hello(self, pipe: Pipe) -> Hello:
        opening = asyncio.timeout(self._hello_timeout_s)
        self._opening.add(opening)
        try:
            async with opening:
                return await hear_hello(pipe)
        except TimeoutError:
            late = Unauthenticated(f"the stream said no HELLO within {self._hello_timeout_s:g} s")
            raise self._closed_for or late from None
        finally:
            self._opening.discard(opening)

    def _expect_proof(self, link: StreamLink) -> None:
        if not link.peer.proven:
            link.close_nowait(Unauthenticated(f"{link.peer.fqcn} did not register within {self._prove_timeout_s:g} s"))


async def _first_frame(pipe: Pipe) -> Frame:
    data = await pipe.read()
    if data is None:
        raise Unreachable("the peer", "it closed the stream without a word")
    return decode(data)


async def _say_bye(pipe: Pipe, error: HanseError) -> None:
    """Tell the peer of *error* and close the pipe; a peer that does not read is not waited for."""
    try:
        async with asyncio.timeout(FAREWELL_S):
            await pipe.write(encode(farewell(error)))
            await pipe.finish()
    except (TimeoutError, HanseError):
        _log.debug("farewell not taken", extra={"reason": error.reason})
    finally:
        await pipe.close()
