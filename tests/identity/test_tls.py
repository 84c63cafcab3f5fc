"""The certificates in the TLS of gRPC itself: who gets through, and as whom."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest

from hanse.cell.loop import run
from hanse.identity.authorities import Authority, JobAuthority
from hanse.identity.certificates import Identity, key_pem, new_key
from hanse.identity.servers_secret import ServersSecret
from hanse.ids import Fqcn

from .conftest import load_identity

NOW = datetime.now(UTC)  # TLS looks at the machine's clock
METHOD = "/hanse.test/whoami"
TIMEOUT_S = 10.0


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority.create("demo", now=NOW)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> JobAuthority:
    return JobAuthority.load_or_create(tmp_path_factory.mktemp("jobs"), now=NOW)


@pytest.fixture
def make(tmp_path: Path, authority: Authority):
    def issue(name: str, role: str, *, by: Authority = authority, now: datetime = NOW, **more) -> Identity:
        key = new_key()
        pem = by.issue(name=name, organisation="X", role=role, public_key=key.public_key(), now=now, **more)
        return load_identity(tmp_path, pem, key_pem(key))

    return issue


@pytest.fixture
def server(make) -> Identity:
    return make("server", "server", hosts=["localhost", "127.0.0.1", "::1"])


async def whoami(
    server: Identity,
    roots: bytes,
    *,
    certificate: bytes | None,
    key: bytes | None,
    client_roots: bytes,
    dial: str = "127.0.0.1",
    listen: str = "127.0.0.1",
    ask_for: str | None = None,
) -> bytes:
    """Serve as *server*, call it from *dial*, and return the certificate (PEM) that the server saw."""

    async def answer(_: bytes, context: grpc.aio.ServicerContext) -> bytes:
        return context.auth_context()["x509_pem_cert"][0]

    method = grpc.unary_unary_rpc_method_handler(answer)
    service, name = METHOD.strip("/").split("/")
    listener = grpc.aio.server()
    listener.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, {name: method})])
    credentials = grpc.ssl_server_credentials(
        [(server.key_pem, server.certificate)], root_certificates=roots, require_client_auth=True
    )
    port = listener.add_secure_port(f"{listen}:0", credentials)
    await listener.start()
    try:
        options = [("grpc.ssl_target_name_override", ask_for)] if ask_for else []
        own = grpc.ssl_channel_credentials(client_roots, private_key=key, certificate_chain=certificate)
        async with grpc.aio.secure_channel(f"{dial}:{port}", own, options=options) as channel:
            return await channel.unary_unary(METHOD)(b"", timeout=TIMEOUT_S)
    finally:
        await listener.stop(grace=None)


def call(server: Identity, authority: Authority, client: Identity | None, **more) -> bytes:
    roots = more.pop("roots", authority.certificate)
    client_roots = more.pop("client_roots", authority.certificate)
    certificate, key = (client.certificate, client.key_pem) if client else (None, None)
    return run(whoami(server, roots, certificate=certificate, key=key, client_roots=client_roots, **more), timeout_s=30)


def unavailable(*arguments, **more) -> bool:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        call(*arguments, **more)
    return caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_a_client_and_a_server_of_one_project_meet(authority: Authority, server: Identity, make):
    client = make("site-1", "client")

    assert call(server, authority, client) == client.certificate


@pytest.mark.parametrize("dial", ["127.0.0.1", "localhost"])
def test_a_server_is_reached_under_each_of_its_hosts(authority: Authority, server: Identity, make, dial: str):
    assert call(server, authority, make("site-1", "client"), dial=dial)


def test_a_server_is_reached_over_ipv6(authority: Authority, server: Identity, make):
    try:
        assert call(server, authority, make("site-1", "client"), dial="[::1]", listen="[::1]")
    except RuntimeError as error:
        pytest.skip(f"this machine has no IPv6 loopback: {error}")


def test_a_server_is_reached_under_its_name_where_the_client_asks_for_that(authority: Authority, make):
    elsewhere = make("server", "server", hosts=["fl.example.org"])
    client = make("site-1", "client")

    assert call(elsewhere, authority, client, ask_for="server")
    assert call(elsewhere, authority, client, ask_for="fl.example.org")


def test_a_server_whose_certificate_lacks_the_host_is_refused(authority: Authority, make):
    assert unavailable(make("server", "server", hosts=["fl.example.org"]), authority, make("site-1", "client"))


def test_a_job_process_gets_through_with_its_servers_certificate(
    authority: Authority, jobs: JobAuthority, server: Identity, tmp_path: Path
):
    process = load_identity(tmp_path, *jobs.issue(Fqcn("site-1.j-1"), now=NOW))

    seen = call(server, authority, process, roots=authority.certificate + jobs.certificate)

    assert jobs.verify(seen, now=NOW) == "site-1.j-1"


def test_a_job_process_with_the_longest_name_gets_through(
    authority: Authority, jobs: JobAuthority, server: Identity, tmp_path: Path
):
    fqcn = Fqcn(f"{'s' * 63}.{'j' * 63}")
    process = load_identity(tmp_path, *jobs.issue(fqcn, now=NOW))

    seen = call(server, authority, process, roots=authority.certificate + jobs.certificate)

    assert jobs.verify(seen, now=NOW) == fqcn


def test_a_job_process_is_refused_by_a_server_that_does_not_know_its_authority(
    authority: Authority, jobs: JobAuthority, server: Identity, tmp_path: Path
):
    process = load_identity(tmp_path, *jobs.issue(Fqcn("site-1.j-1"), now=NOW))

    assert unavailable(server, authority, process)


def test_a_job_process_gets_through_at_every_server_that_shares_the_secret(
    authority: Authority, make, server: Identity, tmp_path: Path
):
    secret = ServersSecret(bytes(range(32))).for_job_authority()
    issuing = JobAuthority.from_secret(secret, now=NOW - timedelta(days=3))
    taking_over = JobAuthority.from_secret(secret, now=NOW)
    process = load_identity(tmp_path, *issuing.issue(Fqcn("site-1.j-1"), now=NOW))
    standby = make("standby", "server", hosts=["127.0.0.1"])

    for one, roots in [(server, issuing.certificate), (standby, taking_over.certificate)]:
        assert call(one, authority, process, roots=authority.certificate + roots) == process.certificate
    stranger = JobAuthority.from_secret(bytes(48), now=NOW)
    assert unavailable(standby, authority, process, roots=authority.certificate + stranger.certificate)


def test_a_job_process_gets_through_once_a_clock_that_was_ahead_is_set_right(
    authority: Authority, server: Identity, tmp_path: Path
):
    ahead = NOW + timedelta(days=2)
    before = JobAuthority.load_or_create(tmp_path, now=ahead)
    issued_before = load_identity(tmp_path, *before.issue(Fqcn("site-1.j-1"), now=ahead))
    jobs = JobAuthority.load_or_create(tmp_path, now=NOW)
    issued_since = load_identity(tmp_path, *jobs.issue(Fqcn("site-1.j-1"), now=NOW))

    for process in (issued_since, issued_before):
        seen = call(server, authority, process, roots=authority.certificate + jobs.certificate)
        assert jobs.verify(seen, now=NOW) == "site-1.j-1"


def test_a_job_process_cannot_pose_as_the_server(authority: Authority, jobs: JobAuthority, make, tmp_path: Path):
    pose = load_identity(tmp_path, *jobs.issue(Fqcn("server.j-1"), now=NOW))

    assert unavailable(pose, authority, make("site-1", "client"), ask_for="server.j-1")


def test_a_client_cannot_pose_as_the_server(authority: Authority, make):
    pose = make("server", "client", hosts=["127.0.0.1"])  # even had it the right names, its usage is wrong

    assert unavailable(pose, authority, make("site-1", "client"))


def test_a_client_of_another_project_is_refused(authority: Authority, server: Identity, make):
    stranger = make("site-1", "client", by=Authority.create("demo", now=NOW))

    assert unavailable(server, authority, stranger)


def test_a_client_refuses_the_server_of_another_project(authority: Authority, server: Identity, make):
    other = Authority.create("demo", now=NOW)

    assert unavailable(server, authority, make("site-1", "client"), client_roots=other.certificate)


def test_an_expired_client_is_refused(authority: Authority, server: Identity, make):
    expired = make("site-1", "client", now=NOW - timedelta(days=10), lifetime=timedelta(days=9))

    assert unavailable(server, authority, expired)


def test_nobody_gets_through_without_a_certificate(authority: Authority, server: Identity):
    assert unavailable(server, authority, None)
