"""A server's identities: from the files of its place to what it signs and verifies with."""

from datetime import UTC, datetime

from hanse.coordination.admission import Admission
from hanse.errors import ConfigError, Unauthenticated
from hanse.identity.authorities import JobAuthority
from hanse.identity.certificates import Identity, one_certificate, require_issued_by
from hanse.identity.servers_secret import ServersSecret
from hanse.identity.tokens import TokenSigner
from hanse.server.clients import Identities
from hanse.server.identification import Identification
from hanse.server.listening import Place


def identities_of(where: Place, project: str, *, max_reg_duration_s: float) -> Identities:
    """Return what a server signs and verifies with: its certificate, or the workspace's secret where it has none.

    Where it shares a secret with the project's other servers, tokens and jobs' certificates come from that, so that
    what one has given is good at all of them.

    Raises:
        ConfigError: a file is not what it should be; the error names it.
    """
    shared = ServersSecret.load(where.servers_secret) if where.servers_secret is not None else None
    if where.tls is None:
        if shared is not None:
            return Identities(TokenSigner.from_secret(shared.for_tokens()))
        return Identities(TokenSigner.load_or_create(where.workspace / "token.secret"))
    identity, roots = Identity.load(where.tls.certificate, where.tls.key), where.tls.root.read_bytes()
    try:
        require_issued_by(one_certificate(identity.certificate), roots)
    except (ConfigError, Unauthenticated) as error:
        expected = f"the PEM certificate of who issued {where.tls.certificate}"
        raise ConfigError("grpc_args['ssl_root_cert']", got=str(where.tls.root), expected=expected) from error
    identification = Identification(
        project=project,
        server=identity.name,
        identity=identity,
        roots=roots,
        sessions=Admission(max_duration_s=max_reg_duration_s),
    )
    now = datetime.now(UTC)
    if shared is not None:
        authority = JobAuthority.from_secret(shared.for_job_authority(), now=now)
        return Identities(TokenSigner.from_secret(shared.for_tokens()), identification, authority)
    authority = JobAuthority.load_or_create(where.workspace, now=now)
    return Identities(TokenSigner.from_identity(identity), identification, authority)
