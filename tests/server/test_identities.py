"""What servers that share a secret accept of each other, over real TLS; and what others do not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hanse.errors import ConfigError, Unauthenticated, Unreachable
from hanse.identity.servers_secret import ServersSecret
from hanse.ids import Fqcn, JobId
from hanse.messages import Channel, Heartbeat, HeartbeatReply, Registered, Renew
from hanse.server import FederatedServer

from .conftest import MakeServer
from .world import Dialler, Project, Wire, args, names

Sharing = Callable[..., FederatedServer]


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    ServersSecret.new().save(tmp_path / "servers.secret")
    return tmp_path / "servers.secret"


@pytest.fixture
def sharing(make_server: MakeServer, project: Project, secret: Path, tmp_path: Path) -> Sharing:
    """``sharing("one")``: a deployed server with a workspace of its own, and the secret."""

    def make(workspace: str, *, tls: bool = True, **more: Any) -> FederatedServer:
        server = make_server()
        server.deploy(
            args(tmp_path / workspace), project.grpc_args(**{"servers_secret": secret, **more}), secure_train=tls
        )
        return server

    return make


@pytest.mark.parametrize("tls", [True, False])
def test_a_token_of_one_server_is_good_at_the_other(sharing: Sharing, tls: bool) -> None:
    one, other = sharing("one", tls=tls), sharing("other", tls=tls)

    signature = one.sign_auth_token("site-1", "token")

    assert other.verify_auth_token("site-1", "token", signature)
    assert not other.verify_auth_token("site-2", "token", signature)


def test_a_client_goes_on_at_the_other_server_without_registering_anew(sharing: Sharing, dialler: Dialler) -> None:
    one, other = sharing("one"), sharing("other")
    registered = dialler.site(one)
    here = dialler.site_wire(other, registrant=None, credentials=registered.credentials)

    dialler.dial(here)
    reply = here.ask(Channel.SERVER, "heartbeat", Heartbeat())

    assert isinstance(reply.payload, HeartbeatReply)
    assert names(other) == ["site-1"]


def test_a_jobs_process_of_one_server_is_known_to_the_other(sharing: Sharing, dialler: Dialler) -> None:
    one, other = sharing("one"), sharing("other")
    fqcn = Fqcn("site-1.job")

    given = one.clients.job_credentials(fqcn, JobId("job"))

    assert other.clients.job_cell_of(given.certificate) == fqcn
    # Certificate and token are accepted; only the job is not there.
    assert dialler.refused(dialler.job_wire(other, fqcn, given)).reason == "there is no running job 'job'"


def test_a_client_hears_whose_certificates_are_good_for_its_jobs_processes(
    sharing: Sharing, deployed: MakeServer, dialler: Dialler
) -> None:
    stranger, one, other = deployed(), sharing("one"), sharing("other")
    fqcn = Fqcn("site-1.job")

    told = {server: _told_of(dialler.site(server)) for server in (stranger, one, other)}

    assert told[one] == told[other] != told[stranger]
    assert "" not in told.values()
    for server, authority in told.items():
        assert server.clients.job_credentials(fqcn, JobId("job")).authority == authority


def _told_of(site: Wire) -> str:
    renewed = site.ask(Channel.SERVER, "renew", Renew()).payload
    assert isinstance(renewed, Registered)
    return renewed.job_authority


def test_a_jobs_process_of_a_server_that_shares_nothing_is_kept_out(
    sharing: Sharing, deployed: MakeServer, dialler: Dialler
) -> None:
    stranger, server = deployed(), sharing("one")
    fqcn = Fqcn("site-1.job")

    given = stranger.clients.job_credentials(fqcn, JobId("job"))

    assert isinstance(dialler.refused(dialler.job_wire(server, fqcn, given)), Unreachable)
    with pytest.raises(Unauthenticated, match="another authority"):
        server.clients.job_cell_of(given.certificate)


def test_servers_that_share_make_no_secrets_of_their_own(sharing: Sharing, tmp_path: Path) -> None:
    sharing("one")
    sharing("plain", tls=False)

    for workspace in ("one", "plain"):
        assert not {"job-authority.pem", "token.secret"} & {path.name for path in (tmp_path / workspace).iterdir()}


@pytest.mark.parametrize("value", [3, "", b"path"])
def test_a_secret_that_is_no_path_is_named(sharing: Sharing, value: object) -> None:
    with pytest.raises(ConfigError, match=r"grpc_args\['servers_secret'\]"):
        sharing("one", servers_secret=value)


def test_a_secret_that_others_can_read_is_refused(sharing: Sharing, secret: Path) -> None:
    secret.chmod(0o644)

    with pytest.raises(ConfigError, match=r"servers.secret with mode 0644"):
        sharing("one")
