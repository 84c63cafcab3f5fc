"""Mutual identification, the server's side: challenge, then registration, over one transcript.

The challenge settles both names, both nonces and both certificates; the server signs its half at once, so that the
client knows whom it talks to before it says more, and the client signs its half to register. Nothing is believed before
that: the session that a challenge opens is only memory of what was said.
"""

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from hanse.coordination.admission import NONCE_BYTES, Admission, Session
from hanse.errors import Unauthenticated
from hanse.identity.certificates import CertifiedName, Identity, verify_certificate, verify_signature
from hanse.identity.transcript import client_half, server_half, transcript
from hanse.ids import NAME_RULE, ClientName, is_name
from hanse.messages import Challenge, ChallengeReply, Register


@dataclass(frozen=True, slots=True)
class Identification:
    """What the server proves itself with, and what it demands of others. ``roots`` is the project's CA, in PEM."""

    project: str
    server: str
    identity: Identity
    roots: bytes
    sessions: Admission
    random_bytes: Callable[[int], bytes] = secrets.token_bytes

    def challenge(self, origin: str, request: Challenge, *, now: float) -> ChallengeReply:
        """Open *origin*'s session at monotonic time *now* and return the server's half.

        Raises:
            Unauthenticated: another project, what cannot be a name, or a certificate that is not PEM.
            ProtocolError: the nonce has the wrong length.
            NotInService: too many registrations are under way.
        """
        if request.project != self.project:
            raise Unauthenticated(wrong_project(request.project, self.project))
        if not is_name(request.client):  # whoever asks has proven nothing, and the name is remembered
            raise Unauthenticated(f"{request.client!r:.80} cannot be a participant's name: {NAME_RULE}")
        session = Session(
            client=ClientName(request.client),
            project=request.project,
            client_nonce=request.nonce,
            server_nonce=self.random_bytes(NONCE_BYTES),
            client_certificate=request.certificate,
        )
        signature = self.identity.sign(server_half(self._transcript(session)))
        self.sessions.open(origin, session, now=now)
        return ChallengeReply(self.server, session.server_nonce, self.identity.certificate, signature)

    def identify(self, origin: str, request: Register, *, now: float, wall: datetime) -> CertifiedName:
        """Return who *origin* is, proven by *request*; its session is used up, whatever comes of it.

        Raises:
            Unauthenticated: no session, a name or certificate other than the challenge's, a certificate that the
            project's CA did not issue, that is not valid at *wall*, or is for another name or role, or a signature that
            does not prove the key.
        """
        session = self.sessions.take(origin, now=now)
        if (request.client, request.project) != (session.client, session.project):
            raise Unauthenticated(
                f"the registration is for {request.client!r:.80} of project {request.project!r:.80}; "
                f"the challenge was for {session.client!r} of {session.project!r}"
            )
        if request.certificate != session.client_certificate:
            raise Unauthenticated(f"{session.client} registers with another certificate than it was challenged with")
        certified = verify_certificate(
            request.certificate, self.roots, now=wall, role_prefix=("client", "admin"), name=request.client
        )
        if not verify_signature(certified.public_key, request.signature, client_half(self._transcript(session))):
            raise Unauthenticated(f"{request.client}'s signature does not prove the key of its certificate")
        return certified

    def _transcript(self, session: Session) -> bytes:
        return transcript(
            project=session.project,
            client=session.client,
            server=self.server,
            client_nonce=session.client_nonce,
            server_nonce=session.server_nonce,
            client_certificate=session.client_certificate,
            server_certificate=self.identity.certificate,
        )


def wrong_project(asked: str, served: str) -> str:
    """Return the sentence for a client of another project."""
    return f"this server serves project {served!r}, not {asked!r:.80}; check the kit"
