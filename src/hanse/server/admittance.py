"""Who may open a stream to this server, and what an open stream may ask: one answer each, failing closed.

``authorize`` says who a caller is when a stream or a tensor call opens; a caller without credentials is let in as
anonymous and can do nothing but identify itself. ``gate`` looks at every message. A token is verified when a stream
opens and is bound to it; afterwards only its expiry is looked at.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from hanse.cell.link import Peer, PeerCertificate, Transport
from hanse.cell.transfer import Files
from hanse.coordination.policy import PeerKind, demand_topic, demand_use
from hanse.errors import NotFound, Unauthenticated, Unauthorized
from hanse.identity.tokens import CLIENT_SCOPE, TokenInfo, TokenSigner, parse_token
from hanse.ids import SERVER, ClientName, Fqcn, JobId, is_job_id, job_cell, split_cell
from hanse.messages import Channel, Credentials, Hello, Message, Topic
from hanse.server.identification import wrong_project
from hanse.storage.tensors import TensorFiles

UNEXPIRING: frozenset[Topic] = frozenset(
    {(Channel.SERVER, "challenge"), (Channel.SERVER, "register"), (Channel.SERVER, "renew")}
)
"""What may be asked with an expired token: the ways to a fresh one (``renew`` looks at the expiry itself)."""


class Scopes(Protocol):
    """Where tensors of a scope lie."""

    def run_files(self, job_id: JobId, participant: str, *, write: bool) -> Files | None:
        """Return the tensor files of a running job in which *participant* takes part, else ``None``.

        Raises:
            NotInService: the job is to go on here, and does not yet.
        """

    def package_files(self, job_id: JobId) -> TensorFiles:
        """Return the files that hold a job's package."""

    async def result_files(self, job_id: JobId) -> TensorFiles:
        """Return the files that hold a job's result, when it is here."""

    def upload_files(self, submitter: str) -> TensorFiles:
        """Return the files into which *submitter* uploads packages."""

    def takes_part(self, job_id: JobId, client: str) -> bool:
        """Return whether *client* takes part in a job, or is asked to."""


@dataclass(frozen=True, slots=True)
class Admittance:
    """Decides who comes in.

    ``serving`` raises ``NotInService`` while this server serves nobody, ``admitting`` while it lets nobody new in.
    """

    project: str
    signer: TokenSigner
    wall: Callable[[], float]
    serving: Callable[[], None]
    admitting: Callable[[], None]
    disabled: Callable[[ClientName], str | None]
    revoked: Callable[[Credentials], bool]
    left: Callable[[ClientName], bool]
    certified: Callable[[Peer], None]
    """Raises ``CertificateExpired`` for a client or an administrator whose certificate has ended since it came."""
    alive: Callable[[JobId], None]
    """Raises ``NotFound`` for a job that is known not to run."""
    job_cell_of: Callable[[bytes], Fqcn] | None = None
    """Which job's cell a certificate of the server's own authority names (a CN is too short for some)."""

    def authorize(self, hello: Hello, certificate: PeerCertificate | None, transport: Transport) -> Peer:
        """Return who *hello* comes from.

        Raises:
            NotInService: this server serves nobody now.
            NotFound: a job's process whose job does not run.
            Unauthenticated: another project, a name that the certificate or the credentials do not prove, credentials
            that are not ours or have expired, or a disabled client.
        """
        self.admitting()
        if hello.project != self.project:
            raise Unauthenticated(wrong_project(hello.project, self.project))
        participant, job_id = split_cell(hello.fqcn)
        if certificate is not None:
            self._demand_certified(certificate, hello.fqcn, participant)
        if hello.credentials is None:
            if participant == SERVER:
                raise Unauthenticated(f"{hello.fqcn!r} is the server's own name; a client needs another")
            return Peer(hello.fqcn, PeerKind.ANONYMOUS.value, transport, certificate=certificate, proven=False)
        info = self._verified(hello.credentials)
        peer = Peer(hello.fqcn, "", transport, certificate=certificate, credentials=hello.credentials)
        if info.job_id is not None:
            return self._job_peer(peer, info.job_id, participant, transport)
        if hello.credentials.name != participant:
            raise Unauthenticated(f"the token is {hello.credentials.name}'s, and the stream says {participant!r}")
        if info.role is not None:
            peer.kind, peer.role = PeerKind.ADMIN.value, info.role
            return peer
        if info.scope != CLIENT_SCOPE or job_id is not None:
            raise Unauthenticated(f"a client's token does not open {hello.fqcn!r}")
        refuse_disabled(ClientName(participant), self.disabled(ClientName(participant)))
        peer.kind = PeerKind.CLIENT.value
        return peer

    def gate(self, peer: Peer, topic: Topic, message: Message) -> None:
        """Let *peer*'s message on *topic* pass.

        Raises:
            NotInService: this server serves nobody now.
            Unauthorized: a peer of that kind, or an administrator of that role, may not ask this.
            Unauthenticated: its certificate or its token has expired, the token was revoked, or its client has quit.
        """
        del message
        self.serving()
        demand_use(peer.kind, topic[0], topic[1], who=peer.fqcn)
        if peer.kind == PeerKind.ADMIN and topic[0] is Channel.ADMIN:
            demand_topic(topic, who=split_cell(peer.fqcn)[0], role=peer.role)
        participant, job_id = split_cell(peer.fqcn)
        if peer.kind == PeerKind.CLIENT_JOB:
            self._refuse_absent(participant)
        is_process = peer.kind in (PeerKind.CLIENT_JOB, PeerKind.SERVER_JOB)
        if is_process and job_id is not None and topic == (Channel.SERVER, "renew"):
            self.alive(job_id)  # a token is for its job, and must not outlive it
        if peer.credentials is not None and peer.transport != "unix" and topic not in UNEXPIRING:
            if peer.kind in (PeerKind.CLIENT, PeerKind.ADMIN):
                self.certified(peer)  # before the token, which has ended with it, and would be the lesser reason
            refuse_expired(parse_token(peer.credentials.token), now_s=self.wall())
            refuse_revoked(peer.credentials, self.revoked)

    def stays(self, peer: Peer) -> None:
        """Let *peer*, which is in the middle of a transfer, go on.

        Its token is not looked at: it was when the transfer began, and has been renewed since if that takes long.

        Raises:
            NotInService: this server serves nobody any more.
            Unauthenticated: its client has been disabled or has quit.
        """
        self.serving()
        if peer.kind in (PeerKind.CLIENT, PeerKind.CLIENT_JOB):
            self._refuse_absent(split_cell(peer.fqcn)[0])

    async def scope(self, peer: Peer, scope: str, write: bool, scopes: Scopes) -> Files:
        """Return the files of *scope* for *peer*: ``job/<job>``, ``result/<job>`` or ``upload``.

        ``job/<job>`` is the run's tensors for a client's process in that job, and its package for the client's agent. A
        result may have to be fetched from where servers keep it.

        Raises:
            Unauthorized: *peer* may not read (or write) there.
            NotFound: there is no such place.
        """
        kind, _, name = scope.partition("/")
        if name and not is_job_id(name):  # it becomes part of a path
            raise NotFound("job", name)
        participant, job_id = split_cell(peer.fqcn)
        match kind, peer.kind:
            case "job", PeerKind.CLIENT_JOB.value if job_id == name:
                if (files := scopes.run_files(JobId(name), participant, write=write)) is not None:
                    return files
                raise NotFound("running job", name)
            case "job", PeerKind.CLIENT.value if not write and scopes.takes_part(JobId(name), participant):
                return scopes.package_files(JobId(name))
            case "result", PeerKind.ADMIN.value if not write:
                demand_topic((Channel.ADMIN, "job.show"), who=participant, role=peer.role)
                return await scopes.result_files(JobId(name))
            case "upload", PeerKind.ADMIN.value:
                demand_topic((Channel.ADMIN, "job.submit"), who=participant, role=peer.role)
                return scopes.upload_files(participant)
            case _:
                doing = f"{'write' if write else 'read'} tensors of {scope!r:.80}"
                raise Unauthorized(peer.fqcn, doing, needs="to take part in that job, or a role that may see it")

    def _demand_certified(self, certificate: PeerCertificate, fqcn: Fqcn, participant: str) -> None:
        """Let *fqcn* pass if TLS proved that name: the participant's, or that of its job's process."""
        name = certificate.common_name
        if name not in (participant, fqcn) and self.job_cell_of is not None:
            with suppress(Unauthenticated):  # then it is a participant's, and the refusal below says whose
                name = self.job_cell_of(certificate.pem)
        if name not in (participant, fqcn):
            raise Unauthenticated(f"the certificate is for {name!r}, not for {fqcn!r}")

    def _verified(self, credentials: Credentials) -> TokenInfo:
        return verified_token(self.signer, credentials, now_s=self.wall(), is_revoked=self.revoked)

    def _job_peer(self, peer: Peer, job_id: JobId, participant: str, transport: Transport) -> Peer:
        credentials = peer.credentials
        if credentials is None or credentials.name != peer.fqcn or peer.fqcn != job_cell(participant, job_id):
            raise Unauthenticated(f"the token is not for {peer.fqcn!r}")
        if participant == SERVER:
            if transport not in ("unix", "memory"):
                raise Unauthenticated("a run's process connects to its server on the same machine only")
            peer.kind = PeerKind.SERVER_JOB.value
            self.alive(job_id)
            return peer
        self._refuse_absent(participant)
        self.alive(job_id)
        peer.kind = PeerKind.CLIENT_JOB.value
        return peer

    def _refuse_absent(self, participant: str) -> None:
        name = ClientName(participant)
        refuse_disabled(name, self.disabled(name))
        if self.left(name):
            raise Unauthenticated(f"client {name} has quit; what it still sends does not count")


def verified_token(
    signer: TokenSigner, credentials: Credentials, *, now_s: float, is_revoked: Callable[[Credentials], bool]
) -> TokenInfo:
    """Return what the token says of itself, if *signer* gave it to the name it comes with and it still counts.

    Raises:
        Unauthenticated: it does not; the sentence says why.
    """
    info = parse_token(credentials.token)
    if not signer.verify(credentials.name, credentials.token, credentials.signature):
        raise Unauthenticated(f"the token is not one that this project's server gave to {credentials.name}")
    refuse_expired(info, now_s=now_s)
    refuse_revoked(credentials, is_revoked)
    return info


def refuse_expired(info: TokenInfo, *, now_s: float) -> None:
    """Let a token pass whose time is not over at POSIX time *now_s*.

    Raises:
        Unauthenticated: it is.
    """
    if info.is_expired(now_s):
        raise Unauthenticated("the token has expired; register again")


def refuse_revoked(credentials: Credentials, is_revoked: Callable[[Credentials], bool]) -> None:
    """Let *credentials* pass unless their token was revoked.

    Raises:
        Unauthenticated: it was.
    """
    if is_revoked(credentials):
        raise Unauthenticated("the token was revoked; register again")


def refuse_disabled(name: ClientName, reason: str | None) -> None:
    """Let *name* pass unless it is disabled, because of *reason* (``None``: it is not).

    Raises:
        Unauthenticated: it is; the sentence says why.
    """
    if reason is not None:
        raise Unauthenticated(f"client {name} is disabled{f': {reason}' if reason else ''}")
