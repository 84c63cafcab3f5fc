"""The faulty network does to plain connections what it says."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.faults.proxy import FAIR, SPLIT, FaultyNetwork, Weather

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
SOON_S = 10.0


@asynccontextmanager
async def line() -> AsyncIterator[tuple[FaultyNetwork, Streams, Streams]]:
    """Give the network, and a client's and a server's end of one connection through it."""
    arrivals: asyncio.Queue[Streams] = asyncio.Queue()
    server = await asyncio.start_server(lambda *streams: arrivals.put_nowait(streams), "127.0.0.1", 0)
    network = FaultyNetwork(server.sockets[0].getsockname()[1])
    async with asyncio.timeout(SOON_S), network.serving() as port:
        client = await asyncio.open_connection("127.0.0.1", port)
        behind = await arrivals.get()
        try:
            assert await said(client, behind, b"?") == b"?"
            yield network, client, behind
        finally:
            client[1].transport.abort()
            behind[1].transport.abort()
            server.close()


async def said(speaker: Streams, listener: Streams, text: bytes) -> bytes:
    speaker[1].write(text)
    return await listener[0].readexactly(len(text))


async def test_fair_weather_carries_both_ways_and_ends_as_told() -> None:
    async with line() as (network, client, server):
        assert await said(client, server, b"up") == b"up"
        assert await said(server, client, b"down") == b"down"
        client[1].write_eof()
        assert await server[0].read() == b""
        assert await said(server, client, b"still") == b"still"
        assert network.connections == 1


async def hears_nothing(listener: Streams) -> bool:
    """Return whether *listener* gets nothing for a while: what did come would come at once."""
    try:
        async with asyncio.timeout(0.2):
            return not await listener[0].read(1)
    except TimeoutError:
        return True


async def test_split_network_holds_what_is_sent_until_it_is_mended() -> None:
    async with line() as (network, client, server):
        await network.become(SPLIT)
        client[1].write(b"up")
        server[1].write(b"down")
        assert await hears_nothing(server)
        assert await hears_nothing(client)
        await network.become(FAIR)
        assert await server[0].readexactly(2) == b"up"
        assert await client[0].readexactly(4) == b"down"


async def test_one_direction_alone_can_be_cut() -> None:
    async with line() as (network, client, server):
        await network.become(Weather(up=False))
        assert await said(server, client, b"down") == b"down"
        client[1].write(b"held")
        assert await hears_nothing(server)
        await network.become(Weather(down=False))
        assert await server[0].readexactly(4) == b"held"


async def test_reset_ends_both_sides_abruptly() -> None:
    async with line() as (network, client, server):
        await network.reset()
        with pytest.raises(ConnectionResetError):
            await client[0].read()
        with pytest.raises(ConnectionResetError):
            await server[0].read()


async def test_forgotten_connection_is_gone_at_the_server_and_silent_at_the_client() -> None:
    async with line() as (network, client, server):
        await network.forget()
        with pytest.raises(ConnectionResetError):
            await server[0].read()
        client[1].write(b"to nobody")
        assert await hears_nothing(client)
        await network.reset()
        with pytest.raises(ConnectionResetError):
            await client[0].read()


async def test_half_closed_connection_still_carries_the_other_way() -> None:
    async with line() as (network, client, server):
        await network.half_close()
        assert await server[0].read() == b""
        assert await said(server, client, b"down") == b"down"


async def test_slow_network_takes_as_long_as_its_delay_and_rate_say() -> None:
    async with line() as (network, client, server):
        loop = asyncio.get_running_loop()
        await network.become(Weather(delay_s=0.1, bytes_per_s=1000))
        began = loop.time()
        assert await said(client, server, bytes(100)) == bytes(100)
        assert loop.time() - began >= 0.2


async def test_refusing_network_resets_who_connects() -> None:
    async with line() as (network, _client, _server):
        await network.become(Weather(accepts=False))
        reader, writer = await asyncio.open_connection("127.0.0.1", network.port)
        with pytest.raises(ConnectionResetError):
            await reader.read()
        writer.transport.abort()
