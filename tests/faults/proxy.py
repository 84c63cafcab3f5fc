"""A network that fails on demand: a TCP proxy between clients and their server, which does what lines do.

It forwards bytes of real connections, TLS and all. What it does wrong is one ``Weather`` for all of them, changed at
any time; ``reset`` and ``half_close`` happen to the connections that there are. Belongs to one event loop.
"""

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Final

CHUNK_BYTES: Final = 16 * 1024
_ABRUPTLY: Final = struct.pack("ii", 1, 0)
"""SO_LINGER on, for no time: closing sends RST in place of FIN."""


@dataclass(frozen=True)
class Weather:
    """What the network does to whatever goes through it: nothing, by default.

    ``delay_s`` is added to each piece, in each direction, and ``bytes_per_s`` is what a connection carries in one
    direction. ``up`` and ``down`` say whether what clients and what the server send arrives at all; what does not is
    held, not lost, as TCP would send it again. ``accepts`` says whether a new connection is answered, or reset.
    """

    delay_s: float = 0.0
    bytes_per_s: float = 0.0
    up: bool = True
    down: bool = True
    accepts: bool = True


FAIR: Final = Weather()
SPLIT: Final = Weather(up=False, down=False)


class FaultyNetwork:
    """The proxy to *port* of this machine, on ``port`` of its own; ``connections`` is how many there have been."""

    def __init__(self, port: int) -> None:
        self._behind = port
        self.port = 0
        self._lines: set[_Line] = set()
        self._weather = FAIR
        self._changed = asyncio.Condition()
        self.connections = 0

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[int]:
        """Listen while the block lasts; gives the port."""
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0, limit=CHUNK_BYTES)
        try:
            self.port = int(server.sockets[0].getsockname()[1])
            yield self.port
        finally:
            server.close()
            await self.reset()

    @property
    def weather(self) -> Weather:
        """What is done to whatever goes through now."""
        return self._weather

    async def become(self, weather: Weather) -> None:
        """Do this to what goes through from now on, and to what is held up."""
        self._weather = weather
        async with self._changed:
            self._changed.notify_all()

    async def reset(self) -> None:
        """End all connections as a router that has lost its memory does: with RST, to both sides."""
        lines = list(self._lines)
        for line in lines:
            line.abort()
        await asyncio.gather(*(line.ended.wait() for line in lines))

    async def forget(self) -> None:
        """Half-open all connections: the server's side is reset, and the client's hears nothing of it, ever."""
        for line in list(self._lines):
            line.forget()

    async def half_close(self) -> None:
        """End one direction of all connections: the server is told that the client sends nothing more."""
        for line in list(self._lines):
            line.half_close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        if not self._weather.accepts:
            _End(reader, writer).reset()
            return
        try:
            back_reader, back_writer = await asyncio.open_connection("127.0.0.1", self._behind, limit=CHUNK_BYTES)
        except OSError:  # the server is not up
            _End(reader, writer).reset()
            return
        line = _Line(_End(reader, writer), _End(back_reader, back_writer))
        self._lines.add(line)
        try:
            async with asyncio.TaskGroup() as group:
                line.pumps = (
                    group.create_task(self._pump(line, line.client, line.server, is_up=True), name="up"),
                    group.create_task(self._pump(line, line.server, line.client, is_up=False), name="down"),
                )
        finally:
            line.abort()
            self._lines.discard(line)
            line.ended.set()

    async def _pump(self, line: "_Line", source: "_End", sink: "_End", *, is_up: bool) -> None:
        try:
            while data := await source.reader.read(CHUNK_BYTES):
                await self._carried(len(data), is_up=is_up)
                await sink.take(data)
            await self._carried(0, is_up=is_up)  # an end is news too, and takes the same way
            sink.finish()
        except OSError:  # one side has reset its connection, and so the other's is
            line.abort()

    async def _carried(self, size: int, *, is_up: bool) -> None:
        """Return when *size* bytes have come through: their delay is the fault itself."""
        weather = self._weather
        pause_s = weather.delay_s + (size / weather.bytes_per_s if weather.bytes_per_s else 0.0)
        if pause_s:
            await asyncio.sleep(pause_s)
        async with self._changed:
            await self._changed.wait_for(lambda: self._weather.up if is_up else self._weather.down)


class _End:
    """One side's connection with the proxy."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self._writer = writer
        self._is_deaf = False

    async def take(self, data: bytes) -> None:
        """Send *data* to this side, if it is still to get any."""
        if not self._is_deaf:
            self._writer.write(data)
            await self._writer.drain()

    def finish(self) -> None:
        """Tell this side that nothing more comes, and send it nothing more."""
        if not self._is_deaf:
            self._is_deaf = True
            self._writer.write_eof()

    def reset(self) -> None:
        """End this side's connection with RST, and send it nothing more."""
        self._is_deaf = True
        connection = self._writer.get_extra_info("socket")
        if connection is not None and connection.fileno() >= 0:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABRUPTLY)
        self._writer.transport.abort()


class _Line:
    """A connection through the proxy, with both its ends."""

    def __init__(self, client: _End, server: _End) -> None:
        self.client, self.server = client, server
        self.pumps: tuple[asyncio.Task[None], ...] = ()
        self.ended = asyncio.Event()

    def abort(self) -> None:
        for pump in self.pumps:
            if pump is not asyncio.current_task():
                pump.cancel()
        self.client.reset()
        self.server.reset()

    def forget(self) -> None:
        for pump in self.pumps[1:]:  # what the server would say to the client, its end included
            pump.cancel()
        self.server.reset()

    def half_close(self) -> None:
        with suppress(OSError):
            self.server.finish()
