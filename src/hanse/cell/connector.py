"""Keeps one link up: dials a cell's server, introduces itself, and dials again whenever the link ends.

A round goes through the targets in order; after a round in which nobody answered comes a pause, longer each time and
jittered. Whoever watches is told by one sentence what is waited for. The link counts as up when ``on_welcome`` has
returned, which is where a client registers; until then it carries what is asked over it by name, and nothing else. An
error that trying again cannot mend (another project's CA, a disabled client) ends it, once no other target has let it
in either, unless ``on_refused`` knows better: it has, say, thrown away the token that has expired.
"""

import asyncio
import itertools
import logging
import random
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Final, TypeAlias

import grpc.aio

from hanse.cell.backoff import LONGEST_S, Backoff
from hanse.cell.cell import Cell
from hanse.cell.handshake import say_hello
from hanse.cell.link import Link, Peer, Pipe, StreamLink, Transport
from hanse.cell.rpc import CONNECT, CONTROL_OPTIONS, ClientTls, error_of, open_channel
from hanse.errors import HanseError, InternalError, TimedOut, Unreachable
from hanse.ids import SERVER
from hanse.messages import Hello, Welcome

CONNECT_TIMEOUT_S: Final = 10.0
CONNECT_BETWEEN_SERVERS_S: Final = 5.0
"""How long a server that says nothing is waited for where another may serve."""
LONGEST_BETWEEN_SERVERS_S: Final = 2.0
"""The longest pause where there are several servers: one of them takes over in seconds from one that dies."""
STEADY_S: Final = 5.0
"""A link that was up this long has proven that dialling works: the next pause is short again."""

Dial: TypeAlias = Callable[[str], Awaitable[Pipe]]
"""Opens a pipe to a target, or raises why it cannot."""

OnWelcome: TypeAlias = Callable[[Link, Welcome], Awaitable[None]]

_log = logging.getLogger(__name__)


class Connector:
    """Keeps *cell* linked to its server at one of *targets* (``host:port`` or ``unix:/path``) while ``run`` runs.

    *hello* is asked anew for each stream. *on_refused* says whether to go on after an error that is not retryable;
    without it nothing does. *dial* is for other ways to a server than gRPC (``Reception.dial``).
    """

    def __init__(
        self,
        cell: Cell,
        *,
        targets: Sequence[str],
        hello: Callable[[], Hello],
        tls: ClientTls | None,
        rng: random.Random,
        on_welcome: OnWelcome | None = None,
        on_waiting: Callable[[str], None] | None = None,
        on_refused: Callable[[HanseError], bool] | None = None,
        dial: Dial | None = None,
        connect_timeout_s: float | None = None,
    ) -> None:
        self._cell, self._targets, self._hello = cell, tuple(targets), hello
        self._on_welcome, self._on_waiting, self._on_refused = on_welcome, on_waiting, on_refused
        self._dial = dial or GrpcDial(tls)
        self._transport: Transport | None = "memory" if dial else None
        usual_s = CONNECT_TIMEOUT_S if len(self._targets) == 1 else CONNECT_BETWEEN_SERVERS_S
        self._tls, self._connect_timeout_s = tls, connect_timeout_s or usual_s
        self._backoff = Backoff(rng, longest_s=LONGEST_S if len(self._targets) == 1 else LONGEST_BETWEEN_SERVERS_S)
        self._link: StreamLink | None = None
        self._was_up = False
        self._dialling: asyncio.Timeout | None = None
        self._closing = asyncio.Event()
        self._ended = asyncio.Event()
        self._up: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._last: HanseError | None = None
        self.target = self._targets[0]
        """Where the present link goes to, or the last one did."""

    async def run(self) -> None:
        """Keep the link up until ``close``; return then.

        Raises:
            HanseError: what the server refused with, or what else trying again cannot mend.
        """
        try:
            await self._keep_up()
        except HanseError as error:
            self._end(error)
            raise
        finally:
            self._end(Unreachable(self.target, "the connector has been closed"))
            self._ended.set()

    async def wait_ready(self, timeout_s: float) -> None:
        """Return when the link is up.

        Raises:
            Unreachable, TimedOut: it is not within *timeout_s*; the sentence says what stood in the way last.
            HanseError: ``run`` has ended with this.
        """
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.shield(self._up)
        except TimeoutError:
            raise self._last or TimedOut(self.target, "hello", timeout_s) from None

    async def close(self) -> None:
        """End the link, telling the server, and ``run``; return when that has returned. ``run`` must have begun."""
        self._closing.set()
        if self._dialling is not None:
            with suppress(RuntimeError):  # its time is over at this very moment
                self._dialling.reschedule(asyncio.get_running_loop().time())
        if self._link is not None:
            self._link.close_nowait(Unreachable(self._cell.fqcn, "it has left"))
        await self._ended.wait()

    async def _keep_up(self) -> None:
        refused: tuple[HanseError, int] | None = None
        for number in itertools.count(1):
            if self._closing.is_set():
                return
            self._was_up = False
            error = await self._attempt(self._targets[(number - 1) % len(self._targets)])
            if self._closing.is_set():
                return
            if not error.retryable and not (self._on_refused and self._on_refused(error)):
                refused = refused or (error, number)
            elif self._was_up:
                refused = None
            if refused is not None and number - refused[1] >= len(self._targets) - 1:
                raise refused[0]
            self._last = error
            if number % len(self._targets) == 0:
                await self._pause(error)

    async def _pause(self, error: HanseError) -> None:
        delay_s = self._backoff.next_s()
        if self._on_waiting is not None:
            self._on_waiting(f"{error.reason}; trying again in {delay_s:.1f} s")
        with suppress(TimeoutError):
            async with asyncio.timeout(delay_s):
                await self._closing.wait()

    async def _attempt(self, target: str) -> HanseError:
        """Dial *target* and keep the link for as long as it lasts; return why it ended, or why there was none."""
        try:
            async with asyncio.timeout(self._connect_timeout_s) as self._dialling:
                pipe = await self._dial(target)
                welcome = await self._greet(pipe)
        except TimeoutError:
            return Unreachable(target, f"no answer within {self._connect_timeout_s:g} s")
        except HanseError as error:
            return error
        finally:
            self._dialling = None
        return await self._use(target, pipe, welcome)

    async def _greet(self, pipe: Pipe) -> Welcome:
        try:
            return await say_hello(pipe, self._hello())
        except BaseException:
            await pipe.close()
            raise

    async def _use(self, target: str, pipe: Pipe, welcome: Welcome) -> HanseError:
        self.target = target
        link = StreamLink(Peer(SERVER, "server", self._transport_to(target), proven=False, routes=True), pipe)
        self._link = link
        self._cell.attach(link)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(link.run(self._cell.receive), name=f"link to {target}")
                await self._introduce(link, welcome)
                up_at = asyncio.get_running_loop().time()
        finally:
            self._link = None
            if self._up.done():
                self._up = asyncio.get_running_loop().create_future()
        if asyncio.get_running_loop().time() - up_at >= STEADY_S:
            self._backoff.reset()
        return link.closed.result()

    async def _introduce(self, link: StreamLink, welcome: Welcome) -> None:
        try:
            if self._on_welcome is not None and not self._closing.is_set():
                await self._on_welcome(link, welcome)
        except HanseError as error:
            link.close_nowait(error)
            return
        except Exception:  # noqa: BLE001 - the callback's failure ends this link with a reason, not the connector
            _log.exception("introduction failed", extra={"target": self.target})
            link.close_nowait(InternalError(f"introducing {self._cell.fqcn} to {self.target}"))
            return
        if self._closing.is_set():
            link.close_nowait(Unreachable(self._cell.fqcn, "it has left"))
        elif not link.closed.done():
            self._cell.prove(link.peer, kind="server", credentials=None)
            self._was_up = True
            self._up.set_result(None)

    def _transport_to(self, target: str) -> Transport:
        if self._transport is not None:
            return self._transport
        if target.startswith("unix:"):
            return "unix"
        if self._tls is None:
            return "plain"
        return "mtls" if self._tls.cert_pem else "tls"

    def _end(self, error: HanseError) -> None:
        if self._up.done():
            return
        self._up.set_exception(error)
        self._up.exception()  # nobody may be waiting for it, and that is no mistake


class GrpcDial:
    """Dials a target by gRPC, over TLS unless it is a Unix socket or there is none."""

    def __init__(self, tls: ClientTls | None) -> None:
        self._tls = tls

    async def __call__(self, target: str) -> Pipe:
        """Return a pipe to *target*; whether anybody is there shows at the first read or write."""
        channel = open_channel(target, self._tls, CONTROL_OPTIONS)
        return _ClientPipe(target, channel, channel.stream_stream(CONNECT)())


class _ClientPipe:
    """A stream as the side that dialled has it, on a connection of its own."""

    def __init__(self, target: str, channel: grpc.aio.Channel, call: grpc.aio.StreamStreamCall) -> None:
        self._target, self._channel, self._call = target, channel, call

    async def read(self) -> bytes | None:
        with self._translated():
            data = await self._call.read()
            return None if data is grpc.aio.EOF else data

    async def write(self, data: bytes) -> None:
        with self._translated():
            await self._call.write(data)

    async def finish(self) -> bool:
        with self._translated():
            await self._call.done_writing()
        return True

    async def close(self) -> None:
        self._call.cancel()
        await self._channel.close(None)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except grpc.aio.AioRpcError as error:
            raise error_of(error, self._target) from error
        except (asyncio.InvalidStateError, grpc.aio.UsageError) as error:
            raise Unreachable(self._target, "the connection was closed") from error
