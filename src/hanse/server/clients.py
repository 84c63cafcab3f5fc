"""The clients of one server: who they prove to be, which tokens they hold, and who of them is there.

What ``FederatedServer``'s handlers do about clients, as methods that raise. One lock guards the registry and the open
registrations, because the contract's handlers may be called from any thread; it is never held over anything that waits.
"""

import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from hanse.cell.link import Peer
from hanse.coordination.certificates import CertificateEnds, remark_on
from hanse.coordination.policy import ROLE_RIGHTS, PeerKind
from hanse.coordination.registry import Presence, Registry
from hanse.coordination.schedule import Candidate, free_resources
from hanse.errors import Unauthenticated
from hanse.identity.authorities import JobAuthority
from hanse.identity.certificates import one_certificate
from hanse.identity.tokens import CLIENT_SCOPE, TokenInfo, TokenSigner, admin_scope, job_scope, new_token, parse_token
from hanse.ids import NAME_RULE, SERVER, ClientName, Fqcn, JobId, Ssid, Token, is_name, split_cell
from hanse.job import JobRecord, Resources
from hanse.messages import (
    Challenge,
    ChallengeReply,
    Client,
    Credentials,
    Header,
    Heartbeat,
    JobCredentials,
    Message,
    Register,
    Registered,
)
from hanse.server.admittance import refuse_disabled, verified_token
from hanse.server.bounds import MAX_RELEASE_CHARS, shortened
from hanse.server.identification import Identification, wrong_project

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Identities:
    """What a server signs and verifies with. Without ``identification`` it has no certificate, and believes names."""

    signer: TokenSigner
    identification: Identification | None = None
    job_authority: JobAuthority | None = None


@dataclass(frozen=True, slots=True)
class Lifetimes:
    """How long tokens last and how often clients are to be heard, in seconds."""

    token_s: float = 3600.0
    heartbeat_s: float = 5.0


class Clients:
    """The clients of one server; see the module. *session* tells the present SSID, *clock* monotonic seconds."""

    def __init__(
        self,
        registry: Registry,
        lock: threading.RLock,
        *,
        project: str,
        session: Callable[[], Ssid],
        clock: Callable[[], float],
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._registry = registry
        self._lock = lock
        self._project = project
        self._session = session
        self._clock = clock
        self._wall = wall
        self.identities = Identities(TokenSigner.from_secret(secrets.token_bytes(32)))
        self.lifetimes = Lifetimes()
        self._left: set[ClientName] = set()
        # A name may be a client's and an administrator's.
        self._certificates, self._admins_certificates = CertificateEnds(), CertificateEnds()

    # identification

    def challenge(self, origin: str, challenge: Challenge) -> ChallengeReply:
        """Open a registration session for *origin* and return the server's half.

        Raises:
            Unauthenticated: the server has no certificate, or see ``Identification.challenge``.
        """
        identification = self.identities.identification
        if identification is None:
            raise Unauthenticated("server is not in secure mode")
        with self._lock:
            return identification.challenge(origin, challenge, now=self._clock())

    def identify(self, origin: str, register: Register) -> str:
        """Return the role that *register* proves: ``client`` or ``admin:<role>``.

        Raises:
            Unauthenticated: another project, or the identity is not proven.
        """
        if register.project != self._project:
            raise Unauthenticated(wrong_project(register.project, self._project))
        identification = self.identities.identification
        if identification is None:
            return _claimed_role(register)
        wall = datetime.fromtimestamp(self._wall(), UTC)
        with self._lock:
            certified = identification.identify(origin, register, now=self._clock(), wall=wall)
            self._note_end(self._ends_of(certified.role), certified.name, certified.expires)
        return certified.role

    # who comes and goes

    def register(self, register: Register) -> tuple[Registered, Client | None]:
        """Register an identified client; return its token, and the client whose place it took, if any.

        Raises:
            Unauthenticated: full, disabled, or no client's name.
        """
        name = ClientName(register.client)
        props = _props_of(register)
        with self._lock:
            lifetime_s = self._lifetime_s(self._certificates, name)
            token = self._new_token(CLIENT_SCOPE, lifetime_s)
            registration = self._registry.register(name, token, fqcn=Fqcn(name), now=self._clock(), props=props)
            self._left.discard(name)
        _log.info("client registered", extra={"client": name})
        return self._given(token, name, "client", lifetime_s), registration.replaced

    def log_in(self, register: Register, role: str) -> Registered:
        """Return an identified administrator's token; *role* is ``admin:<role>``."""
        _log.info("administrator logged in", extra={"admin": register.client, "role": role})
        with self._lock:
            lifetime_s = self._lifetime_s(self._admins_certificates, register.client)
        token = self._new_token(admin_scope(role.partition(":")[2] or "member"), lifetime_s)
        return self._given(token, register.client, role, lifetime_s)

    def fresh_token(self, peer: Peer) -> Token:
        """Return a fresh token for *peer*, of the scope of its own; it counts once ``renew`` has taken it.

        Raises:
            Unauthenticated: it has no token, none that still counts, or a certificate that has ended.
        """
        old = peer.credentials
        if old is None:
            raise Unauthenticated("only who has a token can renew it")
        info = self._verified(old)
        with self._lock:
            token = self._new_token(info.scope, self._renewed_s(peer, old.name))
            if info.scope == CLIENT_SCOPE:
                self._registry.demand_renewable(old.token, token, now=self._clock())
        return token

    def renew(self, peer: Peer, token: Token) -> Registered:
        """Give *peer* the fresh *token* in place of its own, and bind it to its stream.

        Raises:
            Unauthenticated: its own counts no more, or its certificate has ended.
        """
        old = peer.credentials
        if old is None:
            raise Unauthenticated("only who has a token can renew it")
        with self._lock:
            lifetime_s = self._renewed_s(peer, old.name)
            if parse_token(token).scope == CLIENT_SCOPE:
                self._registry.renew(old.token, token, now=self._clock())
        given = self._given(token, old.name, peer.role, lifetime_s)
        peer.credentials = Credentials(old.name, token, given.token_signature, given.ssid)
        return given

    def hear(self, request: Message) -> tuple[Client, bool]:
        """Return the client that *request* comes from, refreshed, and whether it had to be re-activated.

        Raises:
            Unauthenticated: it names nobody, its token is not its own or no longer counts, it is disabled, its name is
            another token's, or there is no place left.
        """
        name, token = sender_of(request)
        with self._lock:
            refuse_disabled(name, self._registry.disabled().get(name))
            registered = self._registry.by_token(token)
            if registered is not None and registered.name != name:
                raise Unauthenticated(f"the token is not {name}'s")
            client = self._registry.heard(token, now=self._clock())
            if client is not None:
                return client, False
            signature = request.get_header(Header.TOKEN_SIGNATURE) or ""
            if self._verified(Credentials(name, token, signature, self._session())).scope != CLIENT_SCOPE:
                raise Unauthenticated("the token is not a client's")
            props = _props_of(request.payload) if isinstance(request.payload, Heartbeat) else None
            client = self._registry.reactivate(name, token, fqcn=Fqcn(name), now=self._clock(), props=props)
            self._left.discard(name)
        _log.info("client re-activated", extra={"client": name})
        return client, True

    def known(self, request: Message) -> Client:
        """Return the registered client that *request* comes from.

        Raises:
            Unauthenticated: it names nobody, or nobody registered.
        """
        name, token = sender_of(request)
        with self._lock:
            client = self._registry.by_token(token)
        if client is None or client.name != name:
            raise Unauthenticated(f"Unknown client identity: {name!r} is not registered under this token")
        return client

    def named(self, name: str) -> Client:
        """Return the client registered as *name*.

        Raises:
            Unauthenticated: there is none.
        """
        with self._lock:
            client = self._registry.by_name(ClientName(name))
        if client is None:
            raise Unauthenticated(f"Unknown client identity: {name!r} is not registered")
        return client

    def quit(self, token: Token) -> Client | None:
        """Remove the client registered under *token*, which leaves, and return it; unknown: ``None``.

        Neither the token nor what its jobs' processes still send counts any more, until it registers again.
        """
        with self._lock:
            client = self._registry.revoke(token, now=self._clock())
            if client is not None:
                self._left.add(client.name)
            return client

    def has_left(self, name: ClientName) -> bool:
        """Return whether *name* has quit and not registered since."""
        with self._lock:
            return name in self._left

    def set_disabled(self, name: ClientName, reason: str | None) -> Client | None:
        """Refuse *name* from now on because of *reason* (``None``: no longer); return its client, now logged out."""
        with self._lock:
            if reason is None:
                self._registry.enable(name)
                return None
            registered = self._registry.disable(name, reason, now=self._clock())
            return None if registered is None else self._registry.revoke(registered.token, now=self._clock())

    def disable_only(self, disabled: Mapping[str, str]) -> None:
        """Refuse those of *disabled*, each for its reason, and nobody else."""
        with self._lock:
            for name in self._registry.disabled().keys() - disabled.keys():
                self._registry.enable(ClientName(name))
        for client, reason in disabled.items():
            self.set_disabled(ClientName(client), reason)

    def disabled(self) -> dict[ClientName, str]:
        """Return the names that are refused, each with the reason."""
        with self._lock:
            return self._registry.disabled()

    def disabled_because(self, name: ClientName) -> str | None:
        """Return why *name* is disabled, or ``None`` when it is not."""
        with self._lock:
            return self._registry.disabled().get(name)

    def is_revoked(self, credentials: Credentials) -> bool:
        """Return whether the token of *credentials* was revoked, here or at another server of this store."""
        name, token = ClientName(credentials.name), credentials.token
        with self._lock:
            if self._registry.is_revoked(token):
                return True
            return parse_token(token).scope == CLIENT_SCOPE and self._registry.is_superseded(name, token)

    def counting(self, name: ClientName) -> str:
        """Return the fingerprint of *name*'s one token that counts; empty: none does."""
        with self._lock:
            return self._registry.counting(name)

    def count_only(self, counting: Mapping[str, str]) -> list[Client]:
        """Have only those tokens count whose fingerprints are *counting*, by client; return who is logged out by it."""
        names = {ClientName(client): of_token for client, of_token in counting.items()}
        with self._lock:
            self._left = {name for name, of_token in names.items() if not of_token}
            return self._registry.count_only(names, now=self._clock())

    # who is there

    def shown(self, peer: Peer) -> None:
        """Note when the certificate ends that a client's or administrator's stream was opened with, if it was."""
        if peer.certificate is None:
            return
        expires = one_certificate(peer.certificate.pem).not_valid_after_utc
        with self._lock:
            self._note_end(self._ends_of(peer.kind), split_cell(peer.fqcn)[0], expires)

    def demand_certified(self, peer: Peer) -> None:
        """Let a client or an administrator pass whose certificate has not ended.

        Raises:
            CertificateExpired: it has.
        """
        with self._lock:
            self._ends_of(peer.kind).demand_valid(split_cell(peer.fqcn)[0], self._wall())

    def expired(self) -> dict[ClientName, float]:
        """Return the clients, registered or not, whose certificate has ended, each with when (POSIX seconds).

        Not those that are disabled, which could not come with a new one either.
        """
        with self._lock:
            ended, disabled = self._certificates.ended(self._wall()), self._registry.disabled()
        return {name: ended_at for name, ended_at in ended.items() if name not in disabled}

    def take_ends(self) -> dict[str, float]:
        """Return when clients' certificates end, as far as the store is to be told; see ``CertificateEnds``."""
        with self._lock:
            return self._certificates.take_news()

    def put_back_ends(self, ends: Mapping[str, float]) -> None:
        """Have ``take_ends`` return *ends* again, for the store did not keep them."""
        with self._lock:
            self._certificates.put_back(ends)

    def restore_ends(self, kept: Mapping[str, float]) -> None:
        """Know when clients' certificates end from what the store has *kept*.

        Not where clients prove nothing: what they do not show here must not keep them out.
        """
        if self.identities.identification is not None:
            with self._lock:
                self._certificates.restore(kept)

    def certificate_of(self, name: ClientName) -> tuple[float, str]:
        """Return when *name*'s certificate ends (POSIX seconds, 0: not known), and what people should know of that."""
        with self._lock:
            ends_at = self._certificates.of(name)
        return ends_at or 0.0, remark_on(ends_at, self._wall())

    def stream_up(self, peer: Peer) -> bool:
        """Note that the client's stream is up; return whether it had been away."""
        with self._lock:
            before = self._registry.stream_up(ClientName(peer.fqcn), now=self._clock(), stream=peer)
        return before in (Presence.SUSPECT, Presence.LOST)

    def stream_down(self, peer: Peer) -> None:
        """Note that the client's stream broke."""
        with self._lock:
            self._registry.stream_down(ClientName(peer.fqcn), now=self._clock(), stream=peer)

    def candidates(self, taken: Callable[[ClientName], Sequence[JobRecord]]) -> list[Candidate]:
        """Return the clients as the schedule sees them; *taken* tells the jobs that run at one."""
        with self._lock:
            clients = list(self._registry.snapshot().values())
            now_s = self._wall()
            connected = {
                client.name
                for client in clients
                if self._registry.presence(client.name) is Presence.CONNECTED
                and not self._certificates.has_ended(client.name, now_s)
            }
        found = []
        for client in clients:
            jobs = taken(client.name)
            offered = client.props.get("resources")
            resources = offered if isinstance(offered, Resources) else Resources()
            free = free_resources(resources, [job.spec.resources for job in jobs])
            found.append(Candidate(client.name, free, connected=client.name in connected, running=len(jobs)))
        return found

    def presence(self, name: ClientName) -> str:
        """Return whether the client is connected, suspect or lost; empty when it is not registered."""
        with self._lock:
            presence = self._registry.presence(name)
        return presence.value if presence is not None else ""

    # tokens

    def job_credentials(self, fqcn: Fqcn, job_id: JobId) -> JobCredentials:
        """Return what a job's process needs to be the cell *fqcn*; with TLS, a client's has its own certificate."""
        token = self._new_token(job_scope(job_id), self.lifetimes.token_s)
        credentials = Credentials(fqcn, token, self.identities.signer.sign(fqcn, token), self._session())
        authority = self.identities.job_authority
        if authority is None or split_cell(fqcn)[0] == SERVER:
            return JobCredentials(credentials)
        certificate, key = authority.issue(fqcn, now=datetime.fromtimestamp(self._wall(), UTC))
        return JobCredentials(credentials, certificate, key, authority.key_id)

    def job_cell_of(self, certificate: bytes) -> Fqcn:
        """Return the job's cell that *certificate*, one of this server's own authority, names.

        Raises:
            Unauthenticated: it is not one.
        """
        authority = self.identities.job_authority
        if authority is None:
            raise Unauthenticated("this server has issued no certificates for jobs")
        return authority.verify(certificate, now=datetime.fromtimestamp(self._wall(), UTC))

    def _ends_of(self, role: str) -> CertificateEnds:
        return self._admins_certificates if role.partition(":")[0] == PeerKind.ADMIN else self._certificates

    def _note_end(self, ends: CertificateEnds, name: str, expires: datetime) -> None:
        ends.note(name, expires.timestamp())
        if remark := ends.warning(name, self._wall()):
            _log.warning("a participant needs a new certificate", extra={"participant": name, "reason": remark})

    def _renewed_s(self, peer: Peer, name: str) -> float:
        """Return how long a token may live that *peer* gets in place of its own."""
        if peer.kind not in (PeerKind.CLIENT, PeerKind.ADMIN):  # a job's process has a certificate of the server's
            return self.lifetimes.token_s
        return self._lifetime_s(self._ends_of(peer.kind), name)

    def _lifetime_s(self, ends: CertificateEnds, name: str) -> float:
        return ends.token_lifetime_s(name, longest_s=self.lifetimes.token_s, now_s=self._wall())

    def _given(self, token: Token, name: str, role: str, lifetime_s: float) -> Registered:
        authority = self.identities.job_authority
        return Registered(
            token=token,
            token_signature=self.identities.signer.sign(name, token),
            ssid=self._session(),
            expires_in_s=lifetime_s,
            heartbeat_s=self.lifetimes.heartbeat_s,
            role=role,
            job_authority=authority.key_id if authority is not None else "",
        )

    def _verified(self, credentials: Credentials) -> TokenInfo:
        return verified_token(
            self.identities.signer,
            credentials,
            now_s=self._wall(),
            is_revoked=lambda shown: self._registry.is_revoked(shown.token),
        )

    def _new_token(self, scope: str, lifetime_s: float) -> Token:
        return new_token(now_s=self._wall(), lifetime_s=lifetime_s, scope=scope)


def _props_of(told: Register | Heartbeat) -> dict[str, object]:
    """Return what a client has *told* of itself."""
    return {"resources": told.resources, "release": shortened(told.release, MAX_RELEASE_CHARS)}


def _claimed_role(register: Register) -> str:
    """Return the role that *register* claims where nobody proves anything.

    Raises:
        Unauthenticated: there is no such role, or no administrator can have that name.
    """
    kind, _, role = register.role.partition(":")
    if register.role == CLIENT_SCOPE:
        return register.role
    if kind != "admin" or role not in ROLE_RIGHTS:
        raise Unauthenticated(f"there is no role {register.role!r:.80}; expected 'client' or 'admin:<role>'")
    if not is_name(register.client) or register.client == SERVER:
        raise Unauthenticated(f"{register.client!r:.80} cannot be an administrator's name: {NAME_RULE}")
    return register.role


def sender_of(request: Message) -> tuple[ClientName, Token]:
    """Return the name and token that *request* carries.

    Raises:
        Unauthenticated: one is missing.
    """
    name, token = request.get_header(Header.CLIENT), request.get_header(Header.TOKEN)
    if not name or not token:
        raise Unauthenticated("Could not read client uid from the request: it names no client or no token")
    return ClientName(name), Token(token)
