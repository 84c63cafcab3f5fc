"""A scripted server: a cell that registers clients, keeps tensors, and notes what it is asked."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from hanse.cell.cell import Cell, current_peer
from hanse.cell.handshake import Reception
from hanse.cell.link import Peer, PeerCertificate, Transport
from hanse.cell.transfer import LocalTransfers
from hanse.errors import HanseError, NotFound, Unauthenticated
from hanse.identity.authorities import Authority
from hanse.identity.certificates import Identity, new_key, verify_certificate, verify_signature
from hanse.identity.transcript import client_half, server_half, transcript
from hanse.ids import SERVER, ClientName, Fqcn, JobId, Ssid, Token
from hanse.job import JobSpec, WorkflowSpec
from hanse.messages import (
    Challenge,
    ChallengeReply,
    Channel,
    Credentials,
    DeployJob,
    Goodbye,
    Heartbeat,
    HeartbeatReply,
    Hello,
    JobCredentials,
    JobEnded,
    JobFailure,
    LogMetrics,
    Message,
    Quit,
    Register,
    Registered,
    Renew,
    StartJob,
    TaskResult,
    ok,
)
from hanse.storage.packages import build_package
from hanse.storage.tensors import TensorFiles

PROJECT = "demo"
SITE = ClientName("site-1")
JOB = JobId("digits-1")
LONG = f"job:{JOB}~{'0' * 32}~{10**11}"
"""A job's token that does not expire in our time."""

M = TypeVar("M", bound=msgspec.Struct)


def certified(authority: Authority, name: str, role: str, *hosts: str, now: datetime | None = None) -> Identity:
    key = new_key()
    pem = authority.issue(
        name=name,
        organisation="Org",
        role=role,
        public_key=key.public_key(),
        now=now or datetime.now(UTC),
        hosts=hosts,
    )
    return Identity(pem, key, name, "Org", role, datetime.max.replace(tzinfo=UTC))


@dataclass
class FakeServer:
    """Answers what a site says. ``refuse`` maps topics to the error that the next request on them gets."""

    folder: Path
    identity: Identity | None = None
    roots: bytes = b""
    heartbeat_s: float = 30.0
    token_lifetime_s: float = 3600.0
    ssid: Ssid = field(default_factory=lambda: Ssid("1"))
    accept_tokens: bool = True
    job_authority: str = ""
    refuse: dict[str, HanseError] = field(default_factory=dict)
    abort: tuple[JobId, ...] = ()
    tamper: Callable[[ChallengeReply], ChallengeReply] = lambda reply: reply
    heard: dict[type, "asyncio.Queue[Any]"] = field(default_factory=dict)
    ups: "asyncio.Queue[Peer]" = field(default_factory=asyncio.Queue)
    downs: "asyncio.Queue[tuple[Peer, str]]" = field(default_factory=asyncio.Queue)
    hellos: list[Hello] = field(default_factory=list)
    tokens: int = 0

    def __post_init__(self) -> None:
        self.cell = Cell(SERVER)
        self.reception = self._new_reception()
        self.transfers = LocalTransfers(self.files)
        self._challenged: dict[str, tuple[Challenge, ChallengeReply]] = {}
        on = self.cell.on
        on(Channel.SERVER, "challenge", self._challenge)
        on(Channel.SERVER, "register", self._register)
        on(Channel.SERVER, "renew", lambda message: self._take(message, Renew, "renew", self._registered()))
        on(Channel.SERVER, "quit", lambda message: self._take(message, Quit, "quit"))
        on(Channel.SERVER, "heartbeat", self._heartbeat)
        on(Channel.SERVER, "job_ended", lambda message: self._take(message, JobEnded, "job_ended"))
        on(Channel.SERVER, "job_failure", lambda message: self._take(message, JobFailure, "job_failure"))
        on(Channel.TASK, "result", lambda message: self._take(message, TaskResult, "result"))
        on(Channel.TASK, "metrics", lambda message: self._take(message, LogMetrics, "metrics"))
        self.cell.on_link_up(self.ups.put_nowait)
        self.cell.on_link_down(lambda peer, reason: self.downs.put_nowait((peer, reason)))

    # What tests use

    async def next(self, kind: type[M]) -> M:
        """Return the next payload of *kind* that a site sent."""
        async with asyncio.timeout(20):
            payload: M = await self.queue(kind).get()
        return payload

    def queue(self, kind: type[M]) -> "asyncio.Queue[M]":
        return self.heard.setdefault(kind, asyncio.Queue())

    async def up(self, fqcn: str = SITE) -> Peer:
        """Return the next peer that comes up, which must be *fqcn*."""
        async with asyncio.timeout(20):
            peer = await self.ups.get()
        assert peer.fqcn == fqcn
        return peer

    async def dial(self, target: str) -> Any:
        return await self.reception.dial(target)

    async def go_away(self, error: HanseError) -> None:
        """Break all streams; new ones are let in again at once."""
        old, self.reception = self.reception, self._new_reception()
        await old.close(error)

    def files(self, scope: str) -> TensorFiles:
        return TensorFiles(self.folder / scope.replace("/", "-"))

    def announce(self, code: Path, spec: JobSpec, *, job_id: JobId = JOB, submitter: str = "lead") -> DeployJob:
        """Pack *code* as a job and return what the server would say to have it deployed."""
        package = build_package(code, spec)
        digest = self.files(f"job/{job_id}").put(package)
        return DeployJob(job_id, spec.name, submitter, spec, digest, len(package))

    async def ask(self, topic: str, payload: msgspec.Struct, *, fqcn: str = SITE) -> Message:
        return await self.cell.ask(Fqcn(fqcn), Channel.JOB, topic, payload, timeout_s=20)

    def start(self, attempt: int = 1, *, job_id: JobId = JOB) -> StartJob:
        return StartJob(job_id, job_identity(job_id, authority=self.job_authority), attempt)

    def goodbye(self, *, retry: bool) -> None:
        self.cell.tell(Fqcn(SITE), Channel.JOB, "goodbye", Goodbye("maintenance", retry))

    # What it answers

    def _new_reception(self) -> Reception:
        return Reception(self.cell, authorize=self.authorize, session=lambda: self.ssid)

    def authorize(self, hello: Hello, certificate: PeerCertificate | None, transport: Transport) -> Peer:
        self.hellos.append(hello)
        if hello.credentials is None:
            return Peer(hello.fqcn, "anonymous", transport, proven=False)
        if not self.accept_tokens:
            raise Unauthenticated("the token has expired")
        return Peer(hello.fqcn, "client", transport, credentials=hello.credentials)

    def scopes(self, peer: Peer, scope: str, *, write: bool) -> TensorFiles:
        if not (self.folder / scope.replace("/", "-")).exists():
            raise NotFound("scope", scope)
        return self.files(scope)

    def _challenge(self, message: Message) -> Message:
        self._check("challenge")
        asked = message.payload
        assert isinstance(asked, Challenge)
        assert self.identity is not None
        nonce = bytes(range(32))
        said = self._transcript(asked, nonce)
        reply = self.tamper(
            ChallengeReply(self.identity.name, nonce, self.identity.certificate, self.identity.sign(server_half(said)))
        )
        self._challenged[asked.client] = asked, reply
        return ok(reply)

    def _register(self, message: Message) -> Message:
        self._check("register")
        request = message.payload
        assert isinstance(request, Register)
        self.queue(Register).put_nowait(request)
        peer = current_peer()
        assert peer is not None
        if self.identity is not None:
            asked, reply = self._challenged.pop(request.client)
            now = datetime.now(UTC)
            who = verify_certificate(request.certificate, self.roots, now=now, role_prefix="client")
            half = client_half(self._transcript(asked, reply.nonce))
            if who.name != request.client or not verify_signature(who.public_key, request.signature, half):
                raise Unauthenticated("the signature does not prove the key")
        registered = self._registered()
        credentials = Credentials(request.client, registered.token, "signed", self.ssid)
        self.cell.prove(peer, kind="client", credentials=credentials)
        return ok(registered)

    def _registered(self) -> Registered:
        self.tokens += 1
        return Registered(
            Token(f"token-{self.tokens}"),
            "signed",
            self.ssid,
            self.token_lifetime_s,
            self.heartbeat_s,
            job_authority=self.job_authority,
        )

    def _heartbeat(self, message: Message) -> Message:
        self._check("heartbeat")
        assert isinstance(message.payload, Heartbeat)
        self.queue(Heartbeat).put_nowait(message.payload)
        return ok(HeartbeatReply(self.abort, self.ssid))

    def _take(
        self, message: Message, kind: type[msgspec.Struct], topic: str, reply: msgspec.Struct | None = None
    ) -> Message:
        self._check(topic)
        assert isinstance(message.payload, kind)
        self.queue(kind).put_nowait(message.payload)
        return ok(reply)

    def _check(self, topic: str) -> None:
        if (error := self.refuse.pop(topic, None)) is not None:
            raise error

    def _transcript(self, asked: Challenge, nonce: bytes) -> bytes:
        assert self.identity is not None
        return transcript(
            project=asked.project,
            client=asked.client,
            server=self.identity.name,
            client_nonce=asked.nonce,
            server_nonce=nonce,
            client_certificate=asked.certificate,
            server_certificate=self.identity.certificate,
        )


def job_identity(job_id: JobId = JOB, client: str = SITE, authority: str = "") -> JobCredentials:
    return JobCredentials(Credentials(client, Token(LONG), "signed", Ssid("1")), authority=authority)


def job_spec(client: str = "app:app", **changes: Any) -> JobSpec:
    values: dict[str, Any] = {"name": "digits", "workflow": WorkflowSpec("fedavg"), "model": "app:model", **changes}
    return JobSpec(client=client, **values)


@asynccontextmanager
async def fake_server(folder: Path, **options: Any) -> AsyncIterator[FakeServer]:
    server = FakeServer(folder, **options)
    try:
        yield server
    finally:
        await server.reception.close(Unauthenticated("the test is over"))
        await server.cell.close()
