"""Kits before a server that runs, and before what is wrong: over real sockets, with real certificates."""

import asyncio
import socket
import ssl
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import trustme

from hanse.cell.link import Peer
from hanse.cell.loop import run
from hanse.cell.rpc import ServerTls
from hanse.cli.failures import failure_of
from hanse.doctor import probes
from hanse.doctor.checkup import Surroundings, examine
from hanse.doctor.findings import Check, Finding, Verdict, first_failure
from hanse.storage.objects import objects_at
from tests.certificates import certify_anew
from tests.postgres import Postgres
from tests.s3 import S3

from ..admin.world import Deployment, deployed, wait
from ..cell.world import serving
from .conftest import Copy

Streams: TypeAlias = tuple[asyncio.StreamReader, asyncio.StreamWriter]

DAY_S = 86400.0
SOON_S = 0.3
"""When what never answers is given up; nothing waits for this but what would wait for ever."""

GIVEN_UP_S = 3.0
"""The same, where a handshake comes first."""

LOCAL = [Check.SETTINGS, Check.KEY, Check.CERTIFICATE, Check.DATES, Check.WORKSPACE, Check.DISK]
WAY = [Check.PROXY, Check.NAME, Check.PORT, Check.TLS, Check.ANSWER, Check.IDENTITY, Check.CLOCK, Check.VERSIONS]


async def examined(kit: Path, **around: Any) -> list[Finding]:
    options: dict[str, Any] = {"process_in": lambda _: None, "environ": {}, "low_free_bytes": 0, "least_free_bytes": 0}
    return [finding async for finding in examine(kit, Surroundings(**options | around))]


def findings(kit: Path, **around: Any) -> list[Finding]:
    """What is found, asked for on the background loop, which the server is on too."""
    return wait(examined(kit, **around))


def exit_status(found: list[Finding]) -> int:
    failed = first_failure(found)
    return 0 if failed is None else failure_of(failed).status


def of(check: Check, found: list[Finding]) -> Finding:
    (finding,) = (finding for finding in found if finding.check is check)
    return finding


def assert_fails_at(check: Check, found: list[Finding], status: int) -> str:
    """*check* alone fails, with that exit status, and what comes after it on the way to the server is skipped."""
    failed = [finding for finding in found if finding.verdict is Verdict.FAIL]
    assert [finding.check for finding in failed] == [check]
    assert exit_status(found) == status
    later = WAY[WAY.index(check) + 1 :]
    assert [finding.check for finding in found if finding.verdict is Verdict.SKIP] == later
    assert {of(skipped, found).text for skipped in later} <= {f"not checked: '{check}' failed"}
    return failed[0].text


@pytest.fixture(scope="module")
def server(kits: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with deployed(kits, tmp_path_factory.mktemp("workspace") / "ws") as running:
        yield running


@contextmanager
def silent() -> Iterator[str]:
    """A port at which connections are taken, and nothing is ever said."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def closed_target() -> str:
    with silent() as target:
        return target


@asynccontextmanager
async def served(tls: ServerTls, **options: Any) -> AsyncIterator[str]:
    async with serving(tls, **options) as server:
        yield server.target


def tls_of(kit: Path) -> ServerTls:
    """What a server with *kit* listens with."""
    certificate, key, roots = ((kit / name).read_bytes() for name in ("cert.pem", "key.pem", "ca.pem"))
    return ServerTls(certificate, key, roots)


async def against(kit: Path, tls: ServerTls, copy_of: Copy, **options: Any) -> list[Finding]:
    """What the *kit* finds before a port that listens with *tls*."""
    async with served(tls, **options) as target:
        return await examined(copy_of(kit, target=target))


# All is well ----------------------------------------------------------------------------------------------------------


def test_a_clients_kit_is_good_and_nothing_is_made_or_registered(server: Deployment, kits: Path, copy_of: Copy) -> None:
    kit = copy_of(kits / "site-1", target=server.target)
    before = sorted(kit.rglob("*"))
    found = findings(kit)

    assert [finding.check for finding in found] == LOCAL + WAY
    assert {finding.verdict for finding in found} == {Verdict.OK}
    assert exit_status(found) == 0
    assert {finding.about for finding in found[len(LOCAL) :]} == {server.target}
    assert of(Check.TLS, found).text.startswith("TLSv1.3, the certificate of 'server' by 'demo CA'")
    assert sorted(kit.rglob("*")) == before
    with server.session() as session:
        assert session.clients() == ()


def test_an_administrators_kit_has_no_workspace(server: Deployment, kits: Path, copy_of: Copy) -> None:
    found = findings(copy_of(kits / "ada@demo", target=server.target))

    assert [finding.check for finding in found] == LOCAL[:4] + WAY
    assert {finding.verdict for finding in found} == {Verdict.OK}


def test_each_address_is_asked_and_one_that_is_not_there_is_a_warning(
    server: Deployment, kits: Path, copy_of: Copy
) -> None:
    gone = closed_target()
    found = findings(copy_of(kits / "site-1", target=f'{gone}", "{server.target}'))

    assert [finding.about for finding in found if finding.check is Check.PORT] == [gone, server.target]
    missing, there = (finding for finding in found if finding.check is Check.PORT)
    assert (missing.verdict, there.verdict) == (Verdict.WARN, Verdict.OK)
    assert "another address answers" in missing.text
    assert exit_status(found) == 0


def test_without_tls_nothing_is_proven(kits: Path, tmp_path: Path) -> None:
    (tmp_path / "kit").mkdir()
    with deployed(kits, tmp_path / "ws", tls=False) as plain:
        settings = f'project = "demo"\nname = "site-1"\nservers = ["{plain.target}"]\ntls = false\n'
        (tmp_path / "kit" / "settings.toml").write_text(settings)
        found = findings(tmp_path / "kit")

    skipped = [Check.KEY, Check.CERTIFICATE, Check.DATES, Check.TLS]
    assert [finding.check for finding in found if finding.verdict is Verdict.SKIP] == skipped
    assert of(Check.IDENTITY, found).verdict is Verdict.WARN
    assert exit_status(found) == 0


# What is wrong here ---------------------------------------------------------------------------------------------------


def test_settings_that_do_not_hold_leave_nothing_to_check(kits: Path, copy_of: Copy) -> None:
    found = findings(copy_of(kits / "site-1", more="patience = 3"))

    assert [finding.check for finding in found] == LOCAL[:5]
    assert exit_status(found) == 2


def test_a_kit_that_cannot_be_looked_into_is_told_of_as_any_other_finding(tmp_path: Path) -> None:
    found = findings(tmp_path / ("k" * 300))

    assert [each.check for each in found if each.verdict is Verdict.FAIL] == [Check.SETTINGS, Check.KEY]
    assert "File name too long" in of(Check.SETTINGS, found).text
    assert exit_status(found) == 2


def test_a_key_that_others_can_read_keeps_from_using_it(server: Deployment, kits: Path, copy_of: Copy) -> None:
    kit = copy_of(kits / "site-1", target=server.target)
    (kit / "key.pem").chmod(0o644)
    found = findings(kit)

    assert exit_status(found) == 2
    assert of(Check.KEY, found).verdict is Verdict.FAIL
    assert of(Check.PORT, found).verdict is Verdict.OK
    assert of(Check.TLS, found).text == "not checked: the kit does not hold together"
    assert of(Check.VERSIONS, found).text == "not checked: 'tls' was not looked at"


def test_an_expired_certificate_is_found_here_and_refused_there(server: Deployment, kits: Path, copy_of: Copy) -> None:
    kit = copy_of(kits / "site-1", target=server.target)
    certify_anew(kit, kits / "authority", made=datetime.now(UTC) - timedelta(days=400))
    found = findings(kit)

    assert exit_status(found) == 5
    assert of(Check.DATES, found).text.startswith("the certificate of 'site-1' expired on")
    assert "does not take this kit's certificate" in of(Check.TLS, found).text


def test_a_file_in_the_workspaces_place_is_found(server: Deployment, kits: Path, copy_of: Copy) -> None:
    kit = copy_of(kits / "site-1", target=server.target)
    (kit / "workspace").write_text("")
    found = findings(kit)

    assert [finding.check for finding in found if finding.verdict is not Verdict.OK] == [Check.WORKSPACE]
    assert exit_status(found) == 2


@pytest.mark.parametrize("name", ["w" * 300, "dangling"])
def test_a_workspace_that_can_never_be_made_is_found_and_the_rest_is_checked_all_the_same(
    name: str, server: Deployment, kits: Path, copy_of: Copy
) -> None:
    kit = copy_of(kits / "site-1", target=server.target, more=f'workspace = "{name}"')
    (kit / "dangling").symlink_to("/no/such/folder")
    found = findings(kit)

    assert [finding.check for finding in found if finding.verdict is not Verdict.OK] == [Check.WORKSPACE]
    assert f"{kit / name} is none" in of(Check.WORKSPACE, found).text
    assert exit_status(found) == 2


def test_a_disk_that_is_full_is_found_and_the_rest_is_checked_all_the_same(
    server: Deployment, kits: Path, copy_of: Copy
) -> None:
    kit = copy_of(kits / "site-1", target=server.target)
    found = findings(kit, least_free_bytes=2**62)

    assert [finding.check for finding in found if finding.verdict is not Verdict.OK] == [Check.DISK]
    assert exit_status(found) == 12
    assert of(Check.DISK, findings(kit, low_free_bytes=2**62)).verdict is Verdict.WARN


def test_a_workspace_in_use_says_by_what(server: Deployment, kits: Path, copy_of: Copy) -> None:
    kit = copy_of(kits / "site-1", target=server.target)
    (kit / "workspace").mkdir(mode=0o700)
    asked: list[Path] = []
    found = findings(kit, process_in=lambda workspace: asked.append(workspace) or 42)

    assert of(Check.WORKSPACE, found).text == f"{kit / 'workspace'}, used by what runs as process 42"
    assert asked == [kit / "workspace"]


@pytest.mark.parametrize(
    ("name", "look", "about", "left"),
    [
        ("site-1", "read_kit", Check.SETTINGS, []),
        ("site-1", "look_at_folder", Check.WORKSPACE, WAY),
        ("server", "look_at_folder", Check.WORKSPACE, [Check.DISK]),
        ("server", "first_bytes_of", Check.STORE, [Check.LISTEN, Check.ANSWER, Check.IDENTITY, Check.VERSIONS]),
    ],
)
def test_a_disk_that_never_answers_is_given_up(
    name: str,
    look: str,
    about: Check,
    left: list[Check],
    kits: Path,
    copy_of: Copy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As that of a machine which is away, over NFS: whoever looks there is not even killed by a signal."""
    kit = copy_of(kits / name, target=closed_target())
    may_end = threading.Event()
    monkeypatch.setattr(f"hanse.doctor.checkup.{look}", lambda *_: may_end.wait(60))
    try:
        found = findings(kit, patience_s=SOON_S)
    finally:
        may_end.set()

    assert [finding.check for finding in found][-len(left) - 1 :] == [about, *left]
    assert of(about, found).verdict is Verdict.FAIL
    assert "could not be looked at within" in of(about, found).text
    assert exit_status(found) == 12


# What is wrong on the way ---------------------------------------------------------------------------------------------


def test_a_server_that_is_no_target_is_named(kits: Path, copy_of: Copy) -> None:
    found = findings(copy_of(kits / "site-1", target="fl.example.org"))

    assert assert_fails_at(Check.NAME, found, 2).startswith("target is 'fl.example.org'; expected host:port")


def test_a_name_that_does_not_resolve_is_found(kits: Path, copy_of: Copy) -> None:
    found = findings(copy_of(kits / "site-1", target="no-such-host.invalid:6007"))

    assert "the name 'no-such-host.invalid' was not resolved" in assert_fails_at(Check.NAME, found, 12)


def test_a_port_at_which_nobody_listens_is_found(kits: Path, copy_of: Copy) -> None:
    found = findings(copy_of(kits / "site-1", target=closed_target()))

    assert "127.0.0.1: connection refused; check that the server runs" in assert_fails_at(Check.PORT, found, 12)


def test_a_port_that_never_says_a_word_is_given_up(kits: Path, copy_of: Copy) -> None:
    with silent() as target:
        found = findings(copy_of(kits / "site-1", target=target), patience_s=SOON_S)

    assert "the TLS handshake failed (no answer in time)" in assert_fails_at(Check.TLS, found, 12)


def test_a_silent_port_does_not_hold_up_another(server: Deployment, kits: Path, copy_of: Copy) -> None:
    with silent() as target:
        found = findings(copy_of(kits / "site-1", target=f'{target}", "{server.target}'), patience_s=GIVEN_UP_S)

    at_silent, at_server = (finding for finding in found if finding.check is Check.TLS)
    assert (at_silent.verdict, at_server.verdict) == (Verdict.WARN, Verdict.OK)


def test_an_address_that_never_answers_leaves_time_for_another_of_the_same_name(
    server: Deployment, kits: Path, copy_of: Copy, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def two(host: str, port: int, deadline: float) -> tuple[tuple[probes.Address, ...], str]:
        return ((socket.AF_INET, full.getsockname()), (socket.AF_INET, ("127.0.0.1", port))), ""

    monkeypatch.setattr(probes, "addresses_of", two)
    with socket.socket() as full, ExitStack() as waiting:
        full.bind(("127.0.0.2", 0))
        full.listen(0)
        for _ in range(4):
            one = waiting.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex(full.getsockname())
        found = findings(copy_of(kits / "site-1", target=server.target), patience_s=GIVEN_UP_S)

    assert of(Check.PORT, found).text == "open at 127.0.0.1 (not 127.0.0.2: no answer in time)"
    assert {finding.verdict for finding in found if finding.check in WAY} == {Verdict.OK}


def test_roots_that_are_none_are_told_of_and_no_handshake_is_tried_with_them(
    server: Deployment, kits: Path, copy_of: Copy
) -> None:
    kit = copy_of(kits / "site-1", target=server.target, more='tls_roots = "roots.pem"')
    (kit / "roots.pem").write_text("no certificate")
    found = findings(kit)

    assert [finding.check for finding in found if finding.verdict is Verdict.FAIL] == [Check.CERTIFICATE]
    assert of(Check.PORT, found).verdict is Verdict.OK
    assert of(Check.TLS, found).verdict is Verdict.SKIP
    assert exit_status(found) == 2


def test_a_kit_of_another_project_of_the_same_name_is_found(
    server: Deployment, others_kits: Path, copy_of: Copy
) -> None:
    found = findings(copy_of(others_kits / "site-1", target=server.target))

    assert "has a certificate of an earlier authority of project 'demo'" in assert_fails_at(Check.TLS, found, 5)


async def test_a_tls_server_with_a_strange_certificate_is_found(kits: Path, copy_of: Copy) -> None:
    leaf = trustme.CA(organization_name="Hospital Proxy").issue_cert("127.0.0.1")
    strange = ServerTls(
        leaf.cert_chain_pems[0].bytes(),
        leaf.private_key_pem.bytes(),
        (kits / "site-1" / "ca.pem").read_bytes(),
        require_client_certificate=False,
    )
    found = await against(kits / "site-1", strange, copy_of)

    assert "a proxy ends TLS on the way" in assert_fails_at(Check.TLS, found, 5)


async def test_a_servers_certificate_that_has_expired_is_found(kits: Path, copy_of: Copy) -> None:
    server = copy_of(kits / "server")
    certify_anew(server, kits / "authority", made=datetime.now(UTC) - timedelta(days=400), hosts=("127.0.0.1",))
    found = await against(kits / "site-1", tls_of(server), copy_of)

    assert "if that is right, the server needs a new one" in assert_fails_at(Check.TLS, found, 5)


async def test_a_servers_certificate_for_other_hosts_is_found(kits: Path, copy_of: Copy) -> None:
    server = copy_of(kits / "server")
    certify_anew(server, kits / "authority", made=datetime.now(UTC), hosts=("fl.example.org",))
    found = await against(kits / "site-1", tls_of(server), copy_of)

    assert "is good for fl.example.org, server; dial it by one" in assert_fails_at(Check.TLS, found, 5)


async def test_a_server_that_speaks_other_versions_is_found(kits: Path, copy_of: Copy) -> None:
    found = await against(kits / "site-1", tls_of(kits / "server"), copy_of, versions=(8, 9))

    assert "update Hanse where it is older" in assert_fails_at(Check.ANSWER, found, 12)


async def test_a_server_that_does_not_prove_itself_is_found(kits: Path, copy_of: Copy) -> None:
    def anybody(hello: Any, *_: Any) -> Any:
        return Peer(hello.fqcn, "anonymous", "mtls", proven=False)

    found = await against(kits / "site-1", tls_of(kits / "server"), copy_of, authorize=anybody)

    assert "challenge" in assert_fails_at(Check.IDENTITY, found, 12)


def test_a_server_that_does_not_answer_a_hello_is_given_up(kits: Path, copy_of: Copy) -> None:
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(kits / "server" / "cert.pem", kits / "server" / "key.pem")
    tls.set_alpn_protocols(["h2"])
    with on_the_loop(Mute(tls)) as port:
        found = findings(copy_of(kits / "site-1", target=f"127.0.0.1:{port}"), patience_s=GIVEN_UP_S)

    assert f"127.0.0.1:{port} did not answer 'hello' within" in assert_fails_at(Check.ANSWER, found, 12)


def test_a_running_server_whose_settings_have_no_target_any_more_is_not_asked(kits: Path, copy_of: Copy) -> None:
    found = findings(copy_of(kits / "server", target="nowhere"), process_in=lambda _: 42)

    assert of(Check.LISTEN, found).text.startswith("target is 'nowhere'; expected host:port")


def test_a_clock_that_is_off_by_a_day_is_found(server: Deployment, kits: Path, copy_of: Copy) -> None:
    kit = copy_of(kits / "site-1", target=server.target)
    text = assert_fails_at(Check.CLOCK, findings(kit, wall=lambda: time.time() + DAY_S), 12)

    assert text.startswith("this machine's clock is 86")
    assert "ahead of the server's: set both by NTP" in text


def test_another_release_is_a_warning(server: Deployment, kits: Path, copy_of: Copy) -> None:
    found = findings(copy_of(kits / "site-1", target=server.target), release="9.9")

    assert of(Check.VERSIONS, found).verdict is Verdict.WARN
    assert exit_status(found) == 0


# Through a proxy ------------------------------------------------------------------------------------------------------


class Relay:
    """Passes on what it hears to somebody else, and back; how it begins is its subclass's."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self._tls = tls
        self._talks: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[int]:
        server = await asyncio.start_server(self._meet, "127.0.0.1", 0, ssl=self._tls)
        try:
            yield server.sockets[0].getsockname()[1]
        finally:
            server.close()
            for talk in self._talks:
                talk.cancel()
            await asyncio.gather(*self._talks, return_exceptions=True)

    def _meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._talks.add(asyncio.create_task(self._pass_on(reader, writer)))

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        back_reader, back_writer = await self.opened(reader, writer)
        try:
            await asyncio.gather(pump(reader, back_writer), pump(back_reader, writer))
        finally:
            back_writer.transport.abort()
            writer.transport.abort()

    async def opened(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Streams:
        raise NotImplementedError


class ConnectProxy(Relay):
    """A proxy that passes on to whom it is asked for; ``asked`` holds whom."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    async def opened(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Streams:
        target = (await reader.readuntil(b"\r\n\r\n")).split(b" ")[1].decode()
        self.asked.append(target)
        host, _, port = target.rpartition(":")
        streams = await asyncio.open_connection(host, int(port))
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        return streams


class TlsEndingProxy(Relay):
    """A proxy that ends TLS with a certificate of its own, and opens TLS to *target*, whose certificate it ignores."""

    def __init__(self, tls: ssl.SSLContext, target: str) -> None:
        super().__init__(tls)
        self._target = target
        self._inner = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._inner.check_hostname, self._inner.verify_mode = False, ssl.CERT_NONE
        self._inner.set_alpn_protocols(["h2"])

    async def opened(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Streams:
        host, _, port = self._target.rpartition(":")
        return await asyncio.open_connection(host, int(port), ssl=self._inner)


class Mute(Relay):
    """Opens HTTP/2 and says no more."""

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))  # empty settings
        try:
            while await reader.read(1024):
                pass
        finally:
            writer.transport.abort()


async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    while data := await source.read(65536):
        sink.write(data)
        await sink.drain()
    if sink.can_write_eof():
        sink.write_eof()


@contextmanager
def on_the_loop(relay: Relay) -> Iterator[int]:
    """Have *relay* serve on the background loop while the block lasts; gives its port."""
    life = relay.serving()
    port = run(life.__aenter__())
    try:
        yield port
    finally:
        run(life.__aexit__(None, None, None))


def test_the_way_through_a_proxy_is_the_one_that_is_checked(
    server: Deployment, kits: Path, copy_of: Copy, monkeypatch: pytest.MonkeyPatch
) -> None:
    kit = copy_of(kits / "site-1", target=server.target)
    proxy = ConnectProxy()
    with on_the_loop(proxy) as port:
        monkeypatch.delenv("no_grpc_proxy", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.setenv("grpc_proxy", f"http://127.0.0.1:{port}")  # for gRPC itself
        found = findings(kit, environ={"grpc_proxy": f"http://127.0.0.1:{port}"})

    assert [finding.check for finding in found if finding.verdict is not Verdict.OK] == [Check.PROXY]
    assert of(Check.PROXY, found).verdict is Verdict.WARN
    assert f"through http://127.0.0.1:{port}" in of(Check.PORT, found).text
    assert proxy.asked == [server.target] * 3, "to see the port, for TLS, and for gRPC's own stream"


def test_a_proxy_that_ends_tls_is_taken_where_the_settings_name_its_authority(
    kits: Path, copy_of: Copy, tmp_path: Path
) -> None:
    authority = trustme.CA()
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(tls)
    tls.set_alpn_protocols(["h2"])
    with (
        deployed(kits, tmp_path / "ws", client_certificates=False) as behind,
        on_the_loop(TlsEndingProxy(tls, behind.target)) as port,
    ):
        kit = copy_of(kits / "site-1", target=f"127.0.0.1:{port}")
        assert "a proxy ends TLS on the way" in assert_fails_at(Check.TLS, findings(kit), 5)

        authority.cert_pem.write_to_path(str(kit / "proxy.pem"))
        with (kit / "settings.toml").open("a") as settings:
            settings.write('tls_roots = "proxy.pem"\n')
        found = findings(kit)

    assert {finding.verdict for finding in found} == {Verdict.OK}
    assert of(Check.TLS, found).text.endswith("a proxy ends TLS here, as tls_roots says")
    assert of(Check.IDENTITY, found).text == "the server has proven who it is; nothing was registered"


# A server's own kit ---------------------------------------------------------------------------------------------------


def test_a_server_that_does_not_run_could_listen(kits: Path, copy_of: Copy) -> None:
    found = findings(copy_of(kits / "server", target=closed_target()))

    checks = [*LOCAL, Check.DESCRIPTORS, Check.STORE, Check.LISTEN, Check.ANSWER, Check.IDENTITY, Check.VERSIONS]
    assert [finding.check for finding in found] == checks
    assert of(Check.LISTEN, found).text.endswith("is free")
    assert of(Check.ANSWER, found).text == "not checked: the server does not run"
    assert exit_status(found) == 0


def test_a_port_that_another_program_has_is_found(kits: Path, copy_of: Copy) -> None:
    with silent() as target:
        found = findings(copy_of(kits / "server", target=target))

    assert "another program listens there" in of(Check.LISTEN, found).text
    assert of(Check.ANSWER, found).text == "not checked: 'listen' failed"
    assert exit_status(found) == 2


def test_a_store_that_is_none_is_found(kits: Path, copy_of: Copy) -> None:
    kit = copy_of(kits / "server", target=closed_target())
    (kit / "workspace").mkdir(mode=0o700)
    (kit / "workspace" / "store.db").write_text("something else")
    found = findings(kit)

    assert "is no SQLite database" in of(Check.STORE, found).text
    assert exit_status(found) == 12


def test_a_store_of_its_own_choice_is_looked_at_where_it_is(kits: Path, copy_of: Copy, tmp_path: Path) -> None:
    file = tmp_path / "elsewhere.db"
    kit = copy_of(kits / "server", target=closed_target(), more=f'store = "sqlite:///{file}"\nruns = "{tmp_path}/runs"')
    found = findings(kit)

    assert of(Check.STORE, found).text == f"{file} will be made"
    assert of(Check.RUNS, found).text == f"{tmp_path / 'runs'} will be made"
    assert [finding.check for finding in found].count(Check.DISK) == 2, "where the workspace is, and where the runs are"
    assert not file.exists()
    file.write_text("something else")
    assert of(Check.STORE, findings(kit)).verdict is Verdict.FAIL


def test_a_store_that_the_server_would_not_take_is_found(kits: Path, copy_of: Copy, tmp_path: Path) -> None:
    more = f'store = "sqlite:///{tmp_path}/store.db?mode=ro"\nruns = "{tmp_path}/runs"'
    found = findings(copy_of(kits / "server", target=closed_target(), more=more))

    assert of(Check.STORE, found).text.startswith(f"store is 'sqlite:///{tmp_path}/store.db'; expected sqlite:////")
    assert exit_status(found) == 2


def test_a_bucket_that_answers_is_good_and_nothing_is_put_there(
    kits: Path, copy_of: Copy, bucket_url: str, s3: S3
) -> None:
    kit = copy_of(kits / "server", target=closed_target(), more=f'runs = "{bucket_url}"')
    found = findings(kit)

    assert of(Check.RUNS, found).text == f"{bucket_url} answers; whether it may be written to shows with the first job"
    assert [finding.check for finding in found].count(Check.DISK) == 1, "where the workspace is"
    assert exit_status(found) == 0
    assert wait(objects_at(bucket_url).sizes()) == {}

    s3.stop()
    try:
        found = findings(kit)
    finally:
        s3.start()
    away = f"the store failed while looking into {bucket_url}: it cannot be reached (Connection refused)"
    assert of(Check.RUNS, found).text.startswith(away)
    assert exit_status(found) == 12


def test_a_bucket_that_never_answers_is_given_up(
    kits: Path, copy_of: Copy, bucket_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with silent() as target:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{target}")
        kit = copy_of(kits / "server", target=closed_target(), more=f'runs = "{bucket_url}"')
        found = findings(kit, patience_s=0.2)

    assert of(Check.RUNS, found).text == f"{bucket_url} did not answer 'list' within 0.2 s"


def test_a_database_that_answers_is_good_and_nothing_is_made_in_it(
    kits: Path, copy_of: Copy, postgres: Postgres
) -> None:
    database = postgres.new_database()
    kit = copy_of(kits / "server", target=closed_target(), more=f'store = "{postgres.url(database)}"')
    found = findings(kit)

    assert of(Check.STORE, found).text == f"postgresql://hanse@127.0.0.1:{postgres.port}/{database} answers"
    assert of(Check.CLOCK, found).verdict is Verdict.OK
    assert of(Check.CLOCK, found).text.endswith("of the database's")
    assert exit_status(found) == 0
    tables = "SELECT count(*) FROM information_schema.tables WHERE table_schema = 'public'"
    assert postgres.execute(tables, database=database) == [(0,)]

    off = of(Check.CLOCK, findings(kit, wall=lambda: time.time() - DAY_S))
    assert off.verdict is Verdict.FAIL
    assert "behind the database's" in off.text


def test_a_database_that_is_not_there_or_lets_nobody_in_is_found_and_no_password_is_told(
    kits: Path, copy_of: Copy, postgres: Postgres
) -> None:
    refused = f"postgresql://hanse:hunter2@127.0.0.1:{postgres.port}/postgres"
    kit = copy_of(kits / "server", target=closed_target(), more=f'store = "{refused}"')
    (kit / "settings.toml").chmod(0o600)
    found = findings(kit)

    assert of(Check.STORE, found).text.startswith(
        f"the store failed while opening postgresql://hanse@127.0.0.1:{postgres.port}/postgres"
    )
    assert "password authentication failed" in of(Check.STORE, found).text
    assert "hunter2" not in "".join(finding.text for finding in found)
    assert exit_status(found) == 12


def test_a_database_that_never_answers_is_given_up(kits: Path, copy_of: Copy) -> None:
    pytest.importorskip("psycopg", reason="PostgreSQL's driver is an extra")
    with silent() as target:
        kit = copy_of(kits / "server", target=closed_target(), more=f'store = "postgresql://hanse@{target}/hanse"')
        found = findings(kit, patience_s=SOON_S)

    assert of(Check.STORE, found).text == "the store's database did not answer 'SELECT' within 0.3 s"
    assert exit_status(found) == 12


def test_a_server_that_runs_answers_for_itself(kits: Path, copy_of: Copy) -> None:
    kit = copy_of(kits / "server", target=(target := closed_target()))
    with deployed(kits, kit / "workspace", target=target):
        found = findings(kit, process_in=lambda _: 42)
        assert of(Check.LISTEN, found).text == f"the server runs as process 42 and answers at {target}"
        assert of(Check.IDENTITY, found).verdict is Verdict.OK
        assert exit_status(found) == 0

        certify_anew(kit, kits / "authority", made=datetime.now(UTC), hosts=("127.0.0.1",))
        assert (
            "shows another certificate than the kit has now"
            in of(Check.LISTEN, findings(kit, process_in=lambda _: 42)).text
        )


def test_a_server_that_runs_and_is_not_heard_of_is_found(kits: Path, copy_of: Copy) -> None:
    found = findings(copy_of(kits / "server", target=closed_target()), process_in=lambda _: 42)

    assert "the server runs as process 42 and does not answer there" in of(Check.LISTEN, found).text
    assert exit_status(found) == 12


def test_a_server_on_any_port_is_asked_by_its_socket_alone(kits: Path, copy_of: Copy) -> None:
    kit = copy_of(kits / "server", target="127.0.0.1:0")
    with deployed(kits, kit / "workspace"):
        found = findings(kit, process_in=lambda _: 42)

    assert of(Check.LISTEN, found).text == "not checked: port 0 in the settings means any"
    assert of(Check.IDENTITY, found).verdict is Verdict.OK
    gone = findings(kit, process_in=lambda _: 42)
    assert of(Check.ANSWER, gone).text.startswith("not checked: there is no ")


def test_a_running_server_whose_kit_does_not_hold_together_is_not_asked(kits: Path, copy_of: Copy) -> None:
    kit = copy_of(kits / "server")
    (kit / "key.pem").chmod(0o644)
    found = findings(kit, process_in=lambda _: 42)

    assert of(Check.LISTEN, found).text == "not checked: the kit does not hold together"
    assert exit_status(found) == 2
