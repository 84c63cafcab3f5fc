"""What the tests of the server share: a project's kits, servers, and clients that do what a test says.

Servers and clients live on the process's one background loop, as they do in a plain program; tests are plain functions.
"""

import argparse
import asyncio
import random
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from hanse.cell.cell import Cell
from hanse.cell.connector import Connector
from hanse.cell.link import Link
from hanse.cell.loop import run
from hanse.cell.rpc import ClientTls
from hanse.cell.transfer import Transfers
from hanse.client.registration import Registrant
from hanse.coordination.policy import PeerKind
from hanse.errors import HanseError, Unreachable
from hanse.events import EventType, FLComponent, FLContext
from hanse.identity.authorities import Authority
from hanse.identity.certificates import Identity, key_pem, new_key
from hanse.identity.kits import Kit
from hanse.identity.provision import provision
from hanse.identity.transcript import client_half, transcript
from hanse.ids import SERVER, ClientName, Fqcn, JobId, Ssid
from hanse.messages import (
    PROTOCOL_VERSIONS,
    Challenge,
    ChallengeReply,
    Channel,
    Client,
    Credentials,
    Header,
    Hello,
    JobCredentials,
    Message,
    Payload,
    Register,
    Registered,
    ReturnCode,
    Welcome,
)
from hanse.server import FederatedServer
from hanse.server.overseer import Primary, ScriptedOverseer
from hanse.settings import AdminSettings, ClientSettings, ServerSettings

WITHIN_S = 20.0
"""How long anything may take before the test has failed; nothing waits for this to pass."""

PROJECT = "demo"
SITES = ("site-1", "site-2", "site-3", "site-4")
ADMINS = {"ada@demo": "admin", "lee@demo": "lead", "mel@demo": "member"}
T = TypeVar("T")


def wait(coroutine: Coroutine[Any, Any, T]) -> T:
    """Return what *coroutine* returns, run on the background loop, within the time that a test has."""
    return run(coroutine, WITHIN_S)


def on_loop(call: Callable[[], T]) -> T:
    """Return what *call* returns, called on the background loop."""

    async def calling() -> T:
        return call()

    return wait(calling())


# A project ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Project:
    """A provisioned project: the folder with its kits."""

    folder: Path

    @classmethod
    def make(cls, folder: Path, name: str = PROJECT) -> "Project":
        clients = "".join(f'[[clients]]\nname = "{site}"\n' for site in SITES)
        admins = "".join(f'[[admins]]\nname = "{name}"\nrole = "{role}"\n' for name, role in ADMINS.items())
        hosts = '["localhost", "127.0.0.1", "::1"]'
        (folder / "project.toml").write_text(
            f'name = "{name}"\norganisation = "Test"\n[server]\nhosts = {hosts}\n{clients}{admins}'
        )
        provision(folder / "project.toml", folder / "kits", now=datetime.now(UTC))
        return cls(folder / "kits")

    @property
    def roots(self) -> bytes:
        return (self.folder / "authority" / "ca.pem").read_bytes()

    def site(self, name: str) -> Identity:
        return _identity(Kit.load(self.folder / name, ClientSettings).identity)

    def admin(self, name: str) -> Identity:
        return _identity(Kit.load(self.folder / name, AdminSettings).identity)

    def server(self) -> Identity:
        return _identity(Kit.load(self.folder / "server", ServerSettings).identity)

    def issued(self, folder: Path, name: str, *, role: str = "client", now: datetime, **more: Any) -> Identity:
        """An identity that the project's authority issues on the spot."""
        key = new_key()
        pem = Authority.load(self.folder / "authority").issue(
            name=name, organisation="Test", role=role, public_key=key.public_key(), now=now, **more
        )
        (folder / "cert.pem").write_bytes(pem)
        (folder / "key.pem").write_bytes(key_pem(key))
        return Identity.load(folder / "cert.pem", folder / "key.pem")

    def grpc_args(self, target: str = "127.0.0.1:0", **more: Any) -> dict[str, Any]:
        kit = self.folder / "server"
        return {
            "service": {"target": target, "scheme": "grpc"},
            "ssl_root_cert": kit / "ca.pem",
            "ssl_cert": kit / "cert.pem",
            "ssl_private_key": kit / "key.pem",
            **more,
        }


def _identity(identity: Identity | None) -> Identity:
    assert identity is not None
    return identity


# Servers --------------------------------------------------------------------------------------------------------------


class Clock:
    """A monotonic clock that stands until it is moved."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


class Recorder(FLComponent):
    """Hears every event; at those in *raising* it raises what is there."""

    def __init__(self, raising: Mapping[EventType, Exception] | None = None) -> None:
        self.heard: list[tuple[EventType, FLContext]] = []
        self.raising = dict(raising or {})
        self._changed = threading.Condition()

    def handle_event(self, event_type: EventType, fl_ctx: FLContext) -> None:
        with self._changed:
            self.heard.append((event_type, fl_ctx))
            self._changed.notify_all()
        if event_type in self.raising:
            raise self.raising[event_type]

    def of(self, *kinds: EventType) -> list[FLContext]:
        return [context for kind, context in self.heard if kind in kinds]

    @property
    def kinds(self) -> list[EventType]:
        return [kind for kind, _ in self.heard]

    def wait_for(
        self, kind: EventType, *, count: int = 1, where: Callable[[FLContext], bool] = lambda _: True
    ) -> FLContext:
        """Return the *count*-th event of *kind* for which *where* holds, once it has happened."""

        def found() -> list[FLContext]:
            return [context for context in self.of(kind) if where(context)]

        with self._changed:
            assert self._changed.wait_for(lambda: len(found()) >= count, WITHIN_S), f"no {kind}; heard {self.kinds}"
            return found()[count - 1]

    def has_come(self, kind: EventType, *, count: int, within_s: float) -> bool:
        """Return whether the *count*-th event of *kind* has happened or does so in time."""
        with self._changed:
            return self._changed.wait_for(lambda: self.kinds.count(kind) >= count, within_s)


class Admin:
    """An admin server that remembers what it was told."""

    def __init__(self, fails: bool = False) -> None:
        self.heard: list[str] = []
        self.dead: list[str] = []
        self._fails = fails

    def client_heartbeat(self, client: Client) -> None:
        self.heard.append(client.name)
        if self._fails:
            raise RuntimeError("the admin server is broken")

    def client_dead(self, client: Client) -> None:
        self.dead.append(client.name)
        if self._fails:
            raise RuntimeError("the admin server is broken")


def args(workspace: Path, **more: Any) -> argparse.Namespace:
    return argparse.Namespace(workspace=workspace, **more)


def settings(**fields: Any) -> ServerSettings:
    return ServerSettings(**{"project": PROJECT, "min_num_clients": 1, "shutdown_period_s": 5.0, **fields})


def target_of(server: Any) -> str:
    cell = server.get_cell()
    assert cell is not None
    assert cell.target is not None
    return str(cell.target)


def appoint(overseer: ScriptedOverseer, server: FederatedServer, ssid: str = "tenure-1") -> None:
    """Have the overseer say that *server* is primary, under *ssid*."""
    overseer.appoint(Primary(target_of(server), Ssid(ssid)))


def peer_of(server: FederatedServer, fqcn: str) -> Any:
    cell = server.get_cell()
    return on_loop(lambda: cell.peer(Fqcn(fqcn))) if cell is not None else None


# Messages, for direct calls -------------------------------------------------------------------------------------------


def request(payload: Payload, **headers: str) -> Message:
    """A request as a handler gets it; *headers* by their names."""
    return Message(dict(headers), payload)


def credentials_in(reply: Message, name: str) -> dict[str, str]:
    """The headers by which the client *name*, which got *reply* to its registration, speaks."""
    given = reply.payload
    assert isinstance(given, Registered), reply
    return {
        Header.CLIENT: name,
        Header.TOKEN: given.token,
        Header.TOKEN_SIGNATURE: given.token_signature,
        Header.SSID: given.ssid,
    }


def unauthenticated(reply: Message) -> str:
    """Return why *reply* refuses, which must be for who the sender is, and no empty success."""
    assert (reply.return_code, reply.payload) == (ReturnCode.UNAUTHENTICATED, None)
    assert reply.reason
    return reply.reason


def register_plain(server: FederatedServer, name: str = "site-1", **fields: Any) -> dict[str, str]:
    """Register *name* by a direct call at a server without certificates; return the headers that it then uses."""
    return credentials_in(server.register_client(request(Register(name, PROJECT, **fields))), name)


def nonce(byte: int = 7) -> bytes:
    return bytes([byte]) * 32


def signed(identity: Identity, challenge: Challenge, reply: ChallengeReply, **changes: Any) -> Register:
    """The honest second half to *challenge* and *reply*, but for *changes* to the transcript's fields."""
    fields: dict[str, Any] = {
        "project": challenge.project,
        "client": challenge.client,
        "server": reply.server,
        "client_nonce": challenge.nonce,
        "server_nonce": reply.nonce,
        "client_certificate": challenge.certificate,
        "server_certificate": reply.certificate,
    }
    proof = identity.sign(client_half(transcript(**(fields | changes))))
    return Register(challenge.client, challenge.project, challenge.certificate, proof)


def register_secure(
    server: FederatedServer, identity: Identity, name: str | None = None, *, origin: str = ""
) -> Message:
    """Challenge and register by direct calls, as *name* with *identity*; return the reply to the second half."""
    name = name or identity.name
    headers = {Header.ORIGIN: origin} if origin else {}
    challenge = Challenge(name, PROJECT, nonce(), identity.certificate)
    reply = server.client_challenge(request(challenge, **headers))
    if not isinstance(reply.payload, ChallengeReply):
        return reply
    return server.register_client(request(signed(identity, challenge, reply.payload), **headers))


# Clients over the wire ------------------------------------------------------------------------------------------------


class Wire:
    """One cell with one stream to the server, and what it is told over it. Of an agent it has nothing but this.

    With *registrant* it registers when the stream opens; with *credentials* it opens the stream with them; with neither
    it stays unknown. What arrives is answered by *answers*, and kept for ``told``.
    """

    def __init__(
        self,
        target: str,
        fqcn: str,
        *,
        tls: ClientTls | None = None,
        registrant: Registrant | None = None,
        credentials: Credentials | None = None,
        project: str = PROJECT,
        answers: Mapping[tuple[Channel, str], Callable[[Message], Any]] | None = None,
    ) -> None:
        self.fqcn = Fqcn(fqcn)
        self.credentials = credentials
        self.registered: Registered | None = None
        self.welcome: Welcome | None = None
        self.cell = Cell(self.fqcn)
        self._target, self._tls, self._project = target, tls, project
        self._registrant = registrant
        self._told: dict[tuple[Channel, str], asyncio.Queue[Message]] = {}
        self._answers = dict(answers or {})
        for topic in _TO_CLIENTS:
            self.cell.on(*topic, self._hearing(topic))

    def _hearing(self, topic: tuple[Channel, str]) -> Callable[[Message], Any]:
        queue = self._told[topic] = asyncio.Queue()

        def hear(message: Message) -> Any:
            queue.put_nowait(message)
            answer = self._answers.get(topic)
            return answer(message) if answer is not None else None

        return hear

    # its life

    async def open(self) -> "Wire":
        """Dial once, introduce itself, and return when the link is up; raise what stood in the way."""
        self._connector = Connector(
            self.cell,
            targets=[self._target],
            hello=self.hello,
            tls=self._tls,
            rng=random.Random(1),
            on_welcome=self._introduce,
            on_waiting=self._waits,
        )
        self._waiting: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._running = asyncio.create_task(self._connector.run(), name=f"stream of {self.fqcn}")
        ready = asyncio.create_task(self._connector.wait_ready(WITHIN_S), name="ready")
        try:
            await asyncio.wait({ready, self._running, self._waiting}, return_when=asyncio.FIRST_COMPLETED)
            if self._running.done():
                self._running.result()
            if self._waiting.done():
                raise Unreachable(self._target, self._waiting.result())
            await ready
        except BaseException:
            ready.cancel()
            await self.close()
            raise
        return self

    async def close(self) -> None:
        await self._connector.close()
        with suppress(HanseError):
            await self._running
        await self.cell.close()

    def _waits(self, reason: str) -> None:
        if not self._waiting.done():
            self._waiting.set_result(reason)

    async def ended(self) -> HanseError | None:
        """Return what the server refused to go on with, once the stream has ended for good."""
        try:
            await self._running
        except HanseError as error:
            return error
        return None

    def hello(self) -> Hello:
        return Hello(PROTOCOL_VERSIONS, self.fqcn, self._project, credentials=self.credentials)

    async def _introduce(self, link: Link, welcome: Welcome) -> None:
        self.welcome = welcome
        self.cell.headers[Header.SSID] = welcome.ssid
        if self._registrant is not None and self.credentials is None:
            self.take(await self._registrant.register(self.cell, link, on_server_proven=lambda: None))

    def take(self, given: Registered) -> None:
        self.registered = given
        name = self.fqcn.partition(".")[0]
        self.credentials = Credentials(name, given.token, given.token_signature, given.ssid)
        self.cell.headers[Header.SSID] = given.ssid

    # what a test does with it, from its own thread

    def ask(self, channel: Channel, topic: str, payload: Payload = None, **headers: str) -> Message:
        """Return the server's reply; what it refuses with is raised."""
        return wait(self.cell.ask(SERVER, channel, topic, payload, timeout_s=WITHIN_S, headers=headers))

    def refused(self, channel: Channel, topic: str, payload: Payload = None, **headers: str) -> HanseError:
        """Return what the server refuses the request with."""
        try:
            reply = self.ask(channel, topic, payload, **headers)
        except HanseError as error:
            return error
        raise AssertionError(f"{channel}/{topic} was answered with {reply}")

    def tell(self, channel: Channel, topic: str, payload: Payload = None) -> None:
        on_loop(lambda: self.cell.tell(SERVER, channel, topic, payload))

    def told(self, channel: Channel, topic: str) -> Any:
        """Return the payload of the next message on that topic that the server has sent, once it has."""
        return wait(self._told[channel, topic].get()).payload

    def told_nothing(self, channel: Channel, topic: str) -> bool:
        return on_loop(self._told[channel, topic].empty)


_TO_CLIENTS = (
    (Channel.JOB, "deploy"),
    (Channel.JOB, "start"),
    (Channel.JOB, "abort"),
    (Channel.JOB, "goodbye"),
    (Channel.TASK, "task"),
    (Channel.TASK, "cancelled"),
    (Channel.ADMIN, "job.event"),
)


@dataclass
class Dialler:
    """Opens streams to a server for a test, and closes them all at its end."""

    project: Project
    open: list[Wire] = field(default_factory=list)

    def dial(self, wire: Wire) -> Wire:
        wait(wire.open())
        self.open.append(wire)
        return wire

    def refused(self, wire: Wire) -> HanseError:
        """Return what the server refuses the stream with."""
        try:
            self.dial(wire)
        except HanseError as error:
            return error
        raise AssertionError(f"the stream of {wire.fqcn} was taken")

    def tls(self, identity: Identity | None, roots: bytes | None = None) -> ClientTls:
        roots = roots or self.project.roots
        return ClientTls(roots) if identity is None else ClientTls(roots, identity.certificate, identity.key_pem)

    def site(self, server: FederatedServer, name: str = "site-1", **more: Any) -> Wire:
        """A registered client."""
        return self.dial(self.site_wire(server, name, **more))

    def site_wire(
        self,
        server: FederatedServer,
        name: str = "site-1",
        *,
        identity: Identity | None = None,
        tls: ClientTls | None = None,
        fqcn: str = "",
        **more: Any,
    ) -> Wire:
        identity = identity or (self.project.admin(name) if name in ADMINS else self.project.site(name))
        registrant = Registrant(PROJECT, name, ("server",), identity, self.project.roots)
        more = {"registrant": registrant, **more}
        return Wire(target_of(server), fqcn or name, tls=tls or self.tls(identity), **more)

    def plain(self, server: FederatedServer, name: str = "site-1", **more: Any) -> Wire:
        """A registered client of a server without TLS."""
        more = {"registrant": Registrant(PROJECT, name, ("server",)), **more}
        return self.dial(Wire(target_of(server), name, **more))

    def stranger(self, server: FederatedServer, name: str = "site-1", **more: Any) -> Wire:
        """A stream that has proven nothing but what TLS proves."""
        return self.dial(Wire(target_of(server), name, tls=self.tls(self.project.site(name)), **more))

    def job_wire(
        self, server: FederatedServer, fqcn: str, given: JobCredentials, tls: ClientTls | None = None, **more: Any
    ) -> Wire:
        """The cell of a job's process, with the credentials that the server gave for it."""
        if tls is None and given.certificate:
            tls = ClientTls(self.project.roots, given.certificate, given.key)
        return Wire(target_of(server), fqcn, tls=tls, credentials=given.credentials, **more)

    def close(self) -> None:
        for wire in reversed(self.open):
            wait(wire.close())
        self.open.clear()


@contextmanager
def transferring(wire: Wire, target: str, tls: ClientTls | None) -> Iterator[Transfers]:
    """Tensor transfers that prove themselves as *wire*'s stream does."""

    async def opened() -> Transfers:
        return Transfers(target=lambda: target, hello=wire.hello, tls=tls, rng=random.Random(1), max_tries=1)

    transfers = wait(opened())
    try:
        yield transfers
    finally:
        wait(transfers.close())


def is_client(server: FederatedServer, name: str) -> bool:
    peer = peer_of(server, name)
    return peer is not None and peer.kind == PeerKind.CLIENT


def names(server: Any) -> list[str]:
    return sorted(client.name for client in server.get_all_clients().values())


def client_named(server: Any, name: str) -> Client:
    return next(client for client in server.get_all_clients().values() if client.name == name)


def job_id(text: str) -> JobId:
    return JobId(text)


def site_name(text: str) -> ClientName:
    return ClientName(text)
