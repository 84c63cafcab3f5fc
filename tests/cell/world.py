"""What the tests of this package share: certificates, a serving cell, a connected cell, and two cells in memory."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trustme

from hanse.cell.cell import Cell
from hanse.cell.connector import Connector
from hanse.cell.handshake import Reception
from hanse.cell.link import Peer, PeerCertificate, StreamLink, Transport, memory_link_pair
from hanse.cell.listener import Listener
from hanse.cell.rpc import ClientTls, ServerTls
from hanse.cell.transfer import Files, Transfers
from hanse.errors import HanseError, NotFound, Unauthenticated
from hanse.ids import SERVER, Fqcn, Ssid, Token
from hanse.messages import Credentials, Hello

SITE = Fqcn("site-1")
PROJECT = "demo"


class Authority:
    """A certificate authority, and what it issues."""

    def __init__(self) -> None:
        self._ca = trustme.CA(key_type=trustme.KeyType.ECDSA)
        self.pem = self._ca.cert_pem.bytes()

    def issue(self, name: str, *hosts: str) -> tuple[bytes, bytes]:
        leaf = self._ca.issue_cert(*(hosts or (name,)), common_name=name, key_type=trustme.KeyType.ECDSA)
        return leaf.cert_chain_pems[0].bytes(), leaf.private_key_pem.bytes()

    def server_tls(self, *, require_client_certificate: bool = True) -> ServerTls:
        certificate, key = self.issue("server", "localhost", "127.0.0.1", "::1")
        return ServerTls(certificate, key, self.pem, require_client_certificate)

    def client_tls(self, name: str = SITE, *, roots: bytes | None = None, anonymous: bool = False) -> ClientTls:
        certificate, key = (None, None) if anonymous else self.issue(name)
        return ClientTls(roots or self.pem, certificate, key)


def hello(
    fqcn: str = SITE, *, versions: tuple[int, ...] = (1,), token: str | None = "t", project: str = PROJECT
) -> Hello:
    credentials = Credentials(fqcn.partition(".")[0], Token(token), "s", Ssid("1")) if token else None
    return Hello(versions, Fqcn(fqcn), project, credentials=credentials)


def authorize(said: Hello, certificate: PeerCertificate | None, transport: Transport) -> Peer:
    """A server's decision in small: the project must be right, the certificate's name too, and a token proves."""
    if said.project != PROJECT:
        raise Unauthenticated(f"this server serves {PROJECT}, not {said.project}")
    if certificate is not None and certificate.common_name != said.fqcn:
        raise Unauthenticated(f"the certificate of {certificate.common_name} is not for {said.fqcn}")
    proven = said.credentials is not None
    return Peer(
        said.fqcn,
        "client" if proven else "anonymous",
        transport,
        certificate.common_name if certificate else None,
        said.credentials,
        proven=proven,
    )


def no_scope(peer: Peer, scope: str, *, write: bool) -> Files:
    raise NotFound("scope", scope)


@dataclass
class Serving:
    cell: Cell
    reception: Reception
    listener: Listener
    target: str
    ups: list[str] = field(default_factory=list)
    downs: list[tuple[str, str]] = field(default_factory=list)
    _waiting: list[asyncio.Future[None]] = field(default_factory=list)

    def changed(self) -> None:
        for waiting in self._waiting:
            if not waiting.done():
                waiting.set_result(None)

    async def until(self, holds: Callable[[], bool], *, within_s: float = 10.0) -> None:
        async with asyncio.timeout(within_s):
            while not holds():
                waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                self._waiting.append(waiting)
                await waiting


@asynccontextmanager
async def serving(
    tls: ServerTls | None = None,
    *,
    target: str = "127.0.0.1:0",
    scopes: Any = no_scope,
    stays: Any = None,
    unix_path: Path | None = None,
    cell: Cell | None = None,
    **reception_options: Any,
) -> AsyncIterator[Serving]:
    cell = cell or Cell(SERVER)
    reception = Reception(cell, **{"authorize": authorize, "session": lambda: Ssid("7"), **reception_options})
    listener = Listener(reception, scopes=scopes, stays=stays, tls=tls, target=target, unix_path=unix_path)
    served = Serving(cell, reception, listener, await listener.start())

    def up(peer: Peer) -> None:
        served.ups.append(peer.fqcn)
        served.changed()

    def down(peer: Peer, reason: str) -> None:
        served.downs.append((peer.fqcn, reason))
        served.changed()

    cell.on_link_up(up)
    cell.on_link_down(down)
    try:
        yield served
    finally:
        await listener.stop(1.0)
        await cell.close()


@dataclass
class Connected:
    cell: Cell
    connector: Connector
    running: "asyncio.Task[None]"
    waited_for: list[str]


@asynccontextmanager
async def connecting(
    targets: Sequence[str],
    tls: ClientTls | None = None,
    *,
    fqcn: str = SITE,
    cell: Cell | None = None,
    **options: Any,
) -> AsyncIterator[Connected]:
    """A cell whose connector runs; its first link need not be up yet."""
    cell = cell or Cell(Fqcn(fqcn))
    waited_for: list[str] = []
    connector = Connector(
        cell,
        **{
            "targets": targets,
            "hello": lambda: hello(fqcn),
            "tls": tls,
            "rng": random.Random(1),
            "on_waiting": waited_for.append,
            **options,
        },
    )
    running = asyncio.create_task(connector.run(), name="connector under test")
    try:
        yield Connected(cell, connector, running, waited_for)
    finally:
        await connector.close()
        with suppress(HanseError):
            await running
        await cell.close()


@asynccontextmanager
async def connected(target: str, tls: ClientTls | None = None, **options: Any) -> AsyncIterator[Connected]:
    async with connecting([target], tls, **options) as client:
        await client.connector.wait_ready(10.0)
        yield client


@asynccontextmanager
async def transferring(
    target: str | Callable[[], str], tls: ClientTls | None = None, *, fqcn: str = SITE, **options: Any
) -> AsyncIterator[Transfers]:
    transfers = Transfers(
        **{
            "target": target if callable(target) else lambda: target,
            "hello": lambda: hello(fqcn),
            "tls": tls,
            "rng": random.Random(1),
            **options,
        }
    )
    try:
        yield transfers
    finally:
        await transfers.close()


@asynccontextmanager
async def joined(
    a: Cell, b: Cell, *, a_seen_as: Peer | None = None, b_seen_as: Peer | None = None, room: int = 64
) -> AsyncIterator[tuple[StreamLink, StreamLink]]:
    """Cells *a* and *b*, linked in memory: *b* knows *a* as *a_seen_as* and the other way round."""
    to_b, to_a = memory_link_pair(
        b_seen_as or Peer(b.fqcn, "server", "memory"), a_seen_as or Peer(a.fqcn, "client", "memory"), room=room
    )
    a.attach(to_b)
    b.attach(to_a)
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(to_b.run(a.receive)), group.create_task(to_a.run(b.receive))]
        try:
            yield to_b, to_a
        finally:
            for task in tasks:
                task.cancel()
