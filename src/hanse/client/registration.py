"""Registration, the client's side: the server proves itself first, then the client does, over one transcript.

The client's challenge holds a fresh nonce; the server answers with its own, its certificate and a signature over all
that both have said. Only when that holds does the client sign its half. A registrant without an identity (a project
without TLS) is not challenged and proves nothing: loopback and tests only. Administrators register the same way.
"""

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

from hanse.cell.cell import Cell
from hanse.cell.link import Link
from hanse.errors import ProtocolError, Unauthenticated
from hanse.identity.certificates import Identity, verify_certificate, verify_signature
from hanse.identity.transcript import client_half, server_half, transcript
from hanse.ids import SERVER
from hanse.job import Resources
from hanse.messages import Challenge, ChallengeReply, Channel, Message, Register, Registered

NONCE_BYTES: Final = 32
REGISTER_TIMEOUT_S: Final = 30.0

MIN_PERIOD_S: Final = 1e-3
MAX_PERIOD_S: Final = 1e9
"""Between these lie the times that a server may give. They become timers, and one of no length, or none, would have the
client ask without a pause; one without an end would have it never ask again."""


def utc_now() -> datetime:
    """Return the time of day, aware."""
    return datetime.now(UTC)


def registered_by(reply: Message, *, to: str) -> Registered:
    """Return what *reply*, the server's answer to a request on the topic *to*, gives.

    Raises:
        ProtocolError: it is no ``Registered``, or one with a time that cannot be.
    """
    given = reply.payload
    if not isinstance(given, Registered):
        raise ProtocolError(f"reply to {to}", got=given, expected="Registered")
    for field_name in ("expires_in_s", "heartbeat_s"):
        value = getattr(given, field_name)
        if not MIN_PERIOD_S <= value <= MAX_PERIOD_S:  # NaN is not either
            expected = f"{MIN_PERIOD_S:g} to {MAX_PERIOD_S:g} seconds"
            raise ProtocolError(f"{field_name} in the reply to {to}", got=value, expected=expected)
    return given


@dataclass(frozen=True, slots=True)
class Registrant:
    """Who registers, and whom it expects.

    That is a server called by one of *server_names*, in a certificate that one of *roots* (PEM) issued.
    """

    project: str
    name: str
    server_names: tuple[str, ...]
    identity: Identity | None = None
    roots: bytes = field(default=b"", repr=False)
    resources: Resources = field(default_factory=Resources)
    release: str = ""
    random_bytes: Callable[[int], bytes] = secrets.token_bytes
    wall: Callable[[], datetime] = utc_now

    def require_valid(self) -> None:
        """Return if the certificate, where there is one, is valid now.

        Raises:
            Unauthenticated: it has expired, or is not valid yet; the sentence says whose it is and since when.
        """
        if self.identity is not None:
            self.identity.require_valid_at(self.wall())

    async def register(self, cell: Cell, link: Link, *, on_server_proven: Callable[[], None]) -> Registered:
        """Register over *link*, which is not up yet, and return what the server gives.

        *on_server_proven* is called as soon as the server has shown who it is, before it can know who the client is.

        Raises:
            Unauthenticated: the server does not prove itself, or does not accept the client; the sentence says which.
            ProtocolError: what it gives cannot be.
            HanseError: the link broke, the server did not answer in time, or does not serve now.
        """
        if self.identity is None:
            on_server_proven()
            request = Register(self.name, self.project, resources=self.resources, release=self.release)
        else:
            proof = await self.identify(self.identity, cell, link)
            on_server_proven()
            request = Register(self.name, self.project, self.identity.certificate, proof, self.resources, self.release)
        reply = await cell.ask(SERVER, Channel.SERVER, "register", request, timeout_s=REGISTER_TIMEOUT_S, link=link)
        return registered_by(reply, to="register")

    async def identify(self, identity: Identity, cell: Cell, link: Link) -> bytes:
        """Challenge the server; return the client's signature, once the server's has been found good.

        Nothing is registered by this.

        Raises:
            Unauthenticated: the server does not prove itself; the sentence says how.
            ProtocolError: its answer cannot be.
            HanseError: the link broke, the server did not answer in time, or does not serve now.
        """
        nonce = self.random_bytes(NONCE_BYTES)
        challenge = Challenge(self.name, self.project, nonce, identity.certificate)
        reply = await cell.ask(SERVER, Channel.SERVER, "challenge", challenge, timeout_s=REGISTER_TIMEOUT_S, link=link)
        half = reply.payload
        if not isinstance(half, ChallengeReply) or len(half.nonce) != NONCE_BYTES:
            raise ProtocolError("reply to challenge", got=type(half).__name__, expected="ChallengeReply with a nonce")
        said = transcript(
            project=self.project,
            client=self.name,
            server=half.server,
            client_nonce=nonce,
            server_nonce=half.nonce,
            client_certificate=identity.certificate,
            server_certificate=half.certificate,
        )
        if half.server not in self.server_names:
            expected = " or ".join(map(repr, self.server_names))
            raise Unauthenticated(f"the server calls itself {half.server!r:.80}; this kit expects {expected}")
        server = verify_certificate(
            half.certificate, self.roots, now=self.wall(), role_prefix="server", name=half.server
        )
        if not verify_signature(server.public_key, half.signature, server_half(said)):
            raise Unauthenticated(f"the server's signature does not prove that it is {half.server!r}")
        return identity.sign(client_half(said))
