"""Links: one live connection to one peer, over whatever carries bytes.

A ``Pipe`` carries whole encoded frames (a gRPC stream, or two queues in memory); a ``StreamLink`` makes a link of it:
one bounded queue of outgoing frames with one task that writes them, and one that reads. So the memory link runs the
same code, encoding included, as the network's. A link ends once, for one reason: it is closed here, the peer says
``BYE``, the pipe breaks, or the queue is full because the peer does not read. ``closed`` then holds that reason.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, Literal, Protocol, TypeAlias

from hanse.cell.frames import Frame, FrameKind, decode, encode
from hanse.cell.refusals import error_from, refuse
from hanse.errors import HanseError, InternalError, ProtocolError, Unreachable
from hanse.ids import Fqcn
from hanse.messages import Credentials

_log = logging.getLogger(__name__)

MAX_QUEUED_FRAMES: Final = 4096
MAX_QUEUED_BYTES: Final = 32 * 1024 * 1024
FAREWELL_S: Final = 1.0
"""How long a closing link waits for the peer to take what is queued."""

Transport: TypeAlias = Literal["mtls", "tls", "plain", "unix", "memory"]


@dataclass(frozen=True, slots=True)
class PeerCertificate:
    """The certificate that a peer showed and TLS verified."""

    common_name: str
    pem: bytes


@dataclass(slots=True, eq=False)
class Peer:
    """Who is at the other end of a link, as far as it is known.

    ``kind`` and ``role`` are what whoever authorized the peer says it is (``hanse.coordination.policy``);
    ``certificate`` is the one that TLS verified. ``proven`` says whether it has shown that it is ``fqcn``: until then
    it can be answered, but what is addressed to ``fqcn`` does not go to it. ``routes`` marks the one peer that may pass
    on others' frames: the server, as its clients see it.
    """

    fqcn: Fqcn
    kind: str
    transport: Transport
    certificate: PeerCertificate | None = None
    credentials: Credentials | None = None
    role: str = ""
    proven: bool = True
    routes: bool = False


class Pipe(Protocol):
    """Carries whole encoded frames, in order, both ways."""

    async def read(self) -> bytes | None:
        """Return the next frame's bytes; ``None`` when the other end has said that there are no more.

        Raises:
            HanseError: the pipe broke; the sentence says how.
        """

    async def write(self, data: bytes) -> None:
        """Hand *data* on; return when there is room for more.

        Raises:
            HanseError: the pipe broke.
        """

    async def finish(self) -> bool:
        """Say that no more will be written; return whether the other end will say so too, and is worth waiting for."""

    async def close(self) -> None:
        """Let go of the pipe, whatever is under way; harmless when it has ended."""


class Link(Protocol):
    """One live connection to one peer."""

    peer: Peer
    closed: asyncio.Future[HanseError]
    """Done when the link has ended; the error says why."""

    def send_nowait(self, frame: Frame) -> None:
        """Queue *frame*. A full queue ends the link: its peer does not read, and must not make others wait.

        Raises:
            ProtocolError: the frame is beyond a limit; nothing was queued.
            Unreachable: the link has ended, or ends by this.
        """

    def close_nowait(self, error: HanseError) -> None:
        """End the link: what is queued still goes out, then a ``BYE`` that tells the peer of *error*."""

    async def close(self, error: HanseError) -> None:
        """End the link like ``close_nowait``, and return when it has ended, after at most ``FAREWELL_S``."""


Receive: TypeAlias = Callable[[Link, Frame], Awaitable[None]]
"""Takes each arriving frame; while it waits, the link does not read on."""


class StreamLink:
    """A link over a pipe. ``run`` is its life: the link works while it runs, and has ended when it returns."""

    def __init__(
        self, peer: Peer, pipe: Pipe, *, max_frames: int = MAX_QUEUED_FRAMES, max_bytes: int = MAX_QUEUED_BYTES
    ) -> None:
        self.peer = peer
        self.closed: asyncio.Future[HanseError] = asyncio.get_running_loop().create_future()
        self._pipe = pipe
        self._max_frames, self._max_bytes = max_frames, max_bytes
        self._queue: deque[bytes] = deque()
        self._queued_bytes = 0
        self._wake: asyncio.Future[None] | None = None
        self._farewell: HanseError | None = None
        self._deadline: asyncio.TimerHandle | None = None

    def send_nowait(self, frame: Frame) -> None:
        """Queue *frame*; see ``Link``."""
        if self.closed.done() or self._farewell is not None:
            raise Unreachable(self.peer.fqcn, self._ended_because)
        data = encode(frame)
        if len(self._queue) >= self._max_frames or self._queued_bytes + len(data) > self._max_bytes:
            full = f"it does not read; {len(self._queue)} frames of {self._queued_bytes} bytes wait for it"
            self._end(Unreachable(self.peer.fqcn, full))
            raise Unreachable(self.peer.fqcn, full)
        self._push(data)

    def close_nowait(self, error: HanseError) -> None:
        """End the link; see ``Link``."""
        if self.closed.done() or self._farewell is not None:
            return
        self._farewell = error
        self._push(encode(farewell(error)))
        self._end_soon(error)

    async def close(self, error: HanseError) -> None:
        """End the link and wait for it; see ``Link``."""
        self.close_nowait(error)
        await asyncio.shield(self.closed)

    async def run(self, receive: Receive) -> HanseError:
        """Read and write until the link ends; return why it did. Cancelled, it ends at once."""
        tasks = [
            asyncio.create_task(self._guarded(self._write), name=f"write to {self.peer.fqcn}"),
            asyncio.create_task(self._guarded(lambda: self._read(receive)), name=f"read from {self.peer.fqcn}"),
        ]
        try:
            return await asyncio.shield(self.closed)
        finally:
            self._end(Unreachable(self.peer.fqcn, "the connection was lost"))
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._pipe.close()

    @property
    def _ended_because(self) -> str:
        error = self.closed.result() if self.closed.done() else self._farewell
        return error.reason if error else "the link has ended"

    def _end(self, error: HanseError) -> None:
        if not self.closed.done():
            self.closed.set_result(error)
            self._queue.clear()
            if self._deadline is not None:
                self._deadline.cancel()

    def _end_soon(self, error: HanseError) -> None:
        if self._deadline is None:
            self._deadline = asyncio.get_running_loop().call_later(FAREWELL_S, self._end, error)

    def _push(self, data: bytes) -> None:
        self._queue.append(data)
        self._queued_bytes += len(data)
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    async def _guarded(self, work: Callable[[], Awaitable[None]]) -> None:
        """Run *work*; whatever it fails with ends this link and no other."""
        try:
            await work()
        except HanseError as error:
            # Where writing fails the other end has often said why, and the reader is about to see it.
            self._end_soon(self._farewell or error)
        except Exception:  # noqa: BLE001 - one link's failure hurts no other
            _log.exception("link failed", extra={"peer": self.peer.fqcn})
            self._end(InternalError(f"serving the link to {self.peer.fqcn}"))

    async def _write(self) -> None:
        loop = asyncio.get_running_loop()
        while self._farewell is None or self._queue:
            if not self._queue:
                self._wake = loop.create_future()
                await self._wake
                continue
            data = self._queue.popleft()
            await self._pipe.write(data)
            self._queued_bytes -= len(data)
        if not await self._pipe.finish():
            self._end(self._farewell)
        # else the reader sees the other end's last word, and ends the link

    async def _read(self, receive: Receive) -> None:
        try:
            while (data := await self._pipe.read()) is not None:
                frame = decode(data)
                if frame.kind is FrameKind.BYE:
                    self._end(self._farewell or error_from(frame.headers))
                    return
                await receive(self, frame)
        except ProtocolError as error:
            self.close_nowait(error)  # the peer is told; writing goes on until it is
        except HanseError as error:
            self._end(self._farewell or error)
        else:
            self._end(self._farewell or Unreachable(self.peer.fqcn, "it closed the connection"))


def farewell(error: HanseError) -> Frame:
    """Return the last frame of a link that ends for *error*."""
    return Frame(FrameKind.BYE, headers=refuse(error).headers)


class _Lane:
    """One direction of a pipe in memory: bounded, for one writer and one reader."""

    def __init__(self, room: int) -> None:
        self._items: deque[bytes] = deque()
        self._room = room
        self._is_finished = False
        self._is_broken = False
        self._changed: asyncio.Future[None] | None = None

    async def put(self, data: bytes) -> None:
        while len(self._items) >= self._room and not self._is_broken:
            await self._wait()
        if self._is_broken:
            raise Unreachable("the other end", "it closed the connection")
        self._items.append(data)
        self._wake()

    async def get(self) -> bytes | None:
        while not self._items and not self._is_finished and not self._is_broken:
            await self._wait()
        if not self._items:
            return None
        data = self._items.popleft()
        self._wake()
        return data

    def finish(self) -> None:
        self._is_finished = True
        self._wake()

    def break_off(self) -> None:
        self._is_broken = True
        self._wake()

    async def _wait(self) -> None:
        # The lane is full or empty, never both, so of writer and reader only one can be waiting.
        self._changed = asyncio.get_running_loop().create_future()
        await self._changed

    def _wake(self) -> None:
        if self._changed is not None and not self._changed.done():
            self._changed.set_result(None)


class MemoryPipe:
    """One end of a pipe in memory, bounded each way, so that a peer that does not read is felt as on a wire."""

    def __init__(self, incoming: _Lane, outgoing: _Lane) -> None:
        self._incoming, self._outgoing = incoming, outgoing

    async def read(self) -> bytes | None:
        """Return the next frame's bytes, or ``None`` at the end."""
        return await self._incoming.get()

    async def write(self, data: bytes) -> None:
        """Hand *data* to the other end; wait while it is full."""
        await self._outgoing.put(data)

    async def finish(self) -> bool:
        """Say that no more will come; there is nothing to wait for."""
        self._outgoing.finish()
        return False

    async def close(self) -> None:
        """Let go of the pipe: the other end reads what is under way, then the end, and can write no more."""
        self._outgoing.finish()
        self._incoming.break_off()


def memory_pipe_pair(*, room: int = 64) -> tuple[MemoryPipe, MemoryPipe]:
    """Return the two ends of a pipe in memory, with room for *room* frames each way."""
    one, other = _Lane(room), _Lane(room)
    return MemoryPipe(one, other), MemoryPipe(other, one)


def memory_link_pair(a_peer: Peer, b_peer: Peer, *, room: int = 64) -> tuple[StreamLink, StreamLink]:
    """Return two joined links: the first's peer is *a_peer*, the second's *b_peer*. Both must be ``run``."""
    a_pipe, b_pipe = memory_pipe_pair(room=room)
    return StreamLink(a_peer, a_pipe), StreamLink(b_peer, b_pipe)
