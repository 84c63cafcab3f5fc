"""Who may do what: administrators by role, peers by kind, jobs by a site's word.

Three tables and nothing else. Whatever a table does not name, a role, a kind or a topic from a newer release or from
somebody's invention, may do nothing.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Final

from hanse.errors import Unauthorized
from hanse.job import JobSpec
from hanse.messages import Channel
from hanse.settings import SitePolicy


class Right(StrEnum):
    """What an administrator may do."""

    SEE = "see"
    SUBMIT = "submit"
    ABORT_OWN = "abort_own"
    ABORT_ANY = "abort_any"
    MANAGE_CLIENTS = "manage_clients"
    STOP_SERVER = "stop_server"


_DOING: Final[Mapping[Right, str]] = {
    Right.SEE: "see jobs and clients",
    Right.SUBMIT: "submit jobs",
    Right.ABORT_OWN: "abort their own jobs",
    Right.ABORT_ANY: "abort others' jobs",
    Right.MANAGE_CLIENTS: "disable or enable clients",
    Right.STOP_SERVER: "stop the server, or have another take over",
}

ROLE_RIGHTS: Final[Mapping[str, frozenset[Right]]] = {
    "admin": frozenset(Right),
    "lead": frozenset({Right.SEE, Right.SUBMIT, Right.ABORT_OWN}),
    "member": frozenset({Right.SEE}),
}
"""What each role may do."""

ADMIN_RIGHTS: Final[Mapping[tuple[str, str], Right]] = {
    (Channel.ADMIN, "job.submit"): Right.SUBMIT,
    (Channel.ADMIN, "job.list"): Right.SEE,
    (Channel.ADMIN, "job.show"): Right.SEE,
    (Channel.ADMIN, "job.watch"): Right.SEE,
    (Channel.ADMIN, "job.abort"): Right.ABORT_OWN,
    (Channel.ADMIN, "job.log"): Right.SEE,
    (Channel.ADMIN, "client.list"): Right.SEE,
    (Channel.ADMIN, "client.disable"): Right.MANAGE_CLIENTS,
    (Channel.ADMIN, "server.status"): Right.SEE,
    (Channel.ADMIN, "server.stop"): Right.STOP_SERVER,
    (Channel.ADMIN, "server.promote"): Right.STOP_SERVER,
}
"""The right that each administrative request needs at least; ``demand_abort`` decides about others' jobs."""


class PeerKind(StrEnum):
    """What the other end of a link has proven to be."""

    ANONYMOUS = "anonymous"
    CLIENT = "client"
    CLIENT_JOB = "client_job"
    SERVER_JOB = "server_job"
    ADMIN = "admin"
    SERVER = "server"


_IDENTIFY: Final[frozenset[tuple[str, str]]] = frozenset({(Channel.SERVER, "challenge"), (Channel.SERVER, "register")})
_RENEW: Final[frozenset[tuple[str, str]]] = frozenset({(Channel.SERVER, "renew")})

PEER: Final[Mapping[str, frozenset[tuple[str, str]]]] = {
    PeerKind.ANONYMOUS: _IDENTIFY,
    # A client whose token has run out identifies itself again over the stream that it has.
    PeerKind.CLIENT: _IDENTIFY
    | _RENEW
    | {
        (Channel.SERVER, "quit"),
        (Channel.SERVER, "heartbeat"),
        (Channel.SERVER, "job_failure"),
        (Channel.SERVER, "job_ended"),
    },
    PeerKind.CLIENT_JOB: _RENEW
    | {(Channel.SERVER, "job_failure"), (Channel.TASK, "result"), (Channel.TASK, "metrics")},
    PeerKind.SERVER_JOB: _RENEW
    | {
        (Channel.RUN, "attach"),
        (Channel.RUN, "issue"),
        (Channel.RUN, "cancel"),
        (Channel.RUN, "commit"),
        (Channel.RUN, "ended"),
        (Channel.RUN, "heartbeat"),
    },
    PeerKind.ADMIN: _IDENTIFY | _RENEW | frozenset(ADMIN_RIGHTS),
    PeerKind.SERVER: frozenset(
        {
            (Channel.JOB, "deploy"),
            (Channel.JOB, "start"),
            (Channel.JOB, "abort"),
            (Channel.JOB, "goodbye"),
            (Channel.RUN, "answer"),
            (Channel.RUN, "client"),
            (Channel.RUN, "abort"),
            (Channel.TASK, "task"),
            (Channel.TASK, "cancelled"),
            (Channel.ADMIN, "job.event"),
        }
    ),
}
"""Which kind of peer may send what; the receiving cell looks here before it calls a handler."""


def rights_of(role: str) -> frozenset[Right]:
    """Return what *role* may do: nothing, for a role that there is not."""
    return ROLE_RIGHTS.get(role, frozenset())


def demand(right: Right, *, who: str, role: str) -> None:
    """Let *who* pass if *role* has *right*.

    Raises:
        Unauthorized: it has not; the sentence names the roles that do.
    """
    if right not in rights_of(role):
        raise Unauthorized(who, _DOING[right], needs=_roles_with(right))


def demand_topic(topic: tuple[str, str], *, who: str, role: str) -> None:
    """Let *who* pass if *role* may make the administrative request *topic*.

    Raises:
        Unauthorized: it may not, or there is no such request.
    """
    right = ADMIN_RIGHTS.get(topic)
    if right is None:
        raise Unauthorized(who, f"ask for {'/'.join(topic)}", needs="a request that this server knows")
    demand(right, who=who, role=role)


def demand_abort(submitter: str, *, who: str, role: str) -> None:
    """Let *who* pass if *role* may abort a job that *submitter* submitted.

    Raises:
        Unauthorized: it may not; the sentence names the roles that may.
    """
    demand(Right.ABORT_OWN if who == submitter else Right.ABORT_ANY, who=who, role=role)


def may_use(kind: str, channel: str, topic: str) -> bool:
    """Return whether a peer of *kind* may send *topic* on *channel*; no, for anything unknown."""
    return (channel, topic) in PEER.get(kind, frozenset())


def demand_use(kind: str, channel: str, topic: str, *, who: str) -> None:
    """Let the peer *who*, of *kind*, send *topic* on *channel*.

    Raises:
        Unauthorized: it may not; the sentence names the kinds that may.
    """
    if not may_use(kind, channel, topic):
        kinds = [known for known in PEER if may_use(known, channel, topic)]
        needs = f"a peer of kind {' or '.join(kinds)}" if kinds else "a request that this server knows"
        raise Unauthorized(who, f"send {channel}/{topic}", needs=needs)


def may_run(policy: SitePolicy, *, submitter: str, spec: JobSpec, installed: bool) -> str | None:
    """Return why a site with *policy* does not run *submitter*'s job *spec*, or ``None`` when it does.

    *installed* says whether the job's client is a module of a package that is installed at the site, and not code that
    comes with the job.
    """
    if policy.submitters and submitter not in policy.submitters:
        return f"only jobs of {', '.join(policy.submitters)} may run here, and this one is {submitter}'s"
    if policy.job_code == "allow":
        return None
    if spec.is_script:
        return f"code that comes with a job may not run here, and {spec.client} does"
    return None if installed else f"code that comes with a job may not run here, and {spec.client} is not installed"


def _roles_with(right: Right) -> str:
    return "role " + " or ".join(role for role, rights in ROLE_RIGHTS.items() if right in rights)
