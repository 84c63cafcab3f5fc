"""Hearing of a simulated job's events as an administrator's session would: over a link, from the server."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Final, Protocol

from hanse.cell.cell import Cell
from hanse.cell.connector import Connector
from hanse.cell.link import Link
from hanse.errors import ProtocolError
from hanse.events import EventType
from hanse.ids import SERVER, Fqcn, JobId
from hanse.messages import PROTOCOL_VERSIONS, Channel, Header, Hello, JobEvent, Message, Register, Welcome
from hanse.server.federated_server import FederatedServer

WATCHER: Final = Fqcn("watcher")
CONNECT_TIMEOUT_S: Final = 30.0
LAST_EVENT_S: Final = 5.0
"""How long the last event may take to get here once the job has ended."""
ENDS: Final = frozenset({EventType.JOB_COMPLETED, EventType.JOB_FAILED, EventType.JOB_ABORTED})


class Watcher(Protocol):
    """Hears of one job's events, or does not care."""

    def watch(self, job_id: JobId) -> None:
        """Hear of *job_id*'s events from now on."""

    async def wait_end(self) -> None:
        """Return when the job's last event has been heard."""


class _Nobody:
    def watch(self, job_id: JobId) -> None:
        del job_id

    async def wait_end(self) -> None:
        pass


class _Listener:
    def __init__(self, server: FederatedServer, put: Callable[[JobEvent], None]) -> None:
        self._server, self._put = server, put
        self._has_ended = asyncio.Event()

    def hear(self, message: Message) -> None:
        event = message.payload
        if not isinstance(event, JobEvent):
            raise ProtocolError("payload", got=event, expected="JobEvent")
        self._put(event)
        if event.kind in ENDS:
            self._has_ended.set()

    def watch(self, job_id: JobId) -> None:
        self._server.jobs.board.watch(job_id, WATCHER)

    async def wait_end(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(LAST_EVENT_S):
                await self._has_ended.wait()


@asynccontextmanager
async def watching(
    server: FederatedServer, project: str, put: Callable[[JobEvent], None] | None
) -> AsyncIterator[Watcher]:
    """Give a watcher, within the block, that calls *put* with each event; ``None``: nobody wants to know."""
    if put is None:
        yield _Nobody()
        return
    listener, cell = _Listener(server, put), Cell(WATCHER)
    cell.on(Channel.ADMIN, "job.event", listener.hear)

    async def register(link: Link, welcome: Welcome) -> None:
        cell.headers[Header.SSID] = welcome.ssid
        request = Register(WATCHER, project, role="admin:member")
        await cell.ask(SERVER, Channel.SERVER, "register", request, timeout_s=CONNECT_TIMEOUT_S, link=link)

    connector = Connector(
        cell,
        targets=["memory"],
        hello=lambda: Hello(PROTOCOL_VERSIONS, cell.fqcn, project),
        tls=None,
        rng=random.Random(),  # noqa: S311 - spreads retries, hides nothing
        on_welcome=register,
        dial=server.reception.dial,
    )
    async with asyncio.TaskGroup() as group:
        connection = group.create_task(connector.run(), name="connection of the watcher")
        try:
            await connector.wait_ready(CONNECT_TIMEOUT_S)
            yield listener
            await connector.close()
        finally:
            connection.cancel()
            await cell.close()
