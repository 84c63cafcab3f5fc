import asyncio
import logging
import socket
import stat
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from hanse.cell.cell import Cell, RemoteError
from hanse.cell.frames import MAX_FRAME_BYTES, Frame, FrameKind, decode, encode, encode_struct
from hanse.cell.link import Peer, PeerCertificate, Transport
from hanse.cell.listener import Listener, split_target
from hanse.cell.rpc import CLIENT_OPTIONS, CONNECT
from hanse.errors import ConfigError, ProtocolError, Unauthenticated, Unreachable
from hanse.ids import SERVER, Fqcn
from hanse.messages import Channel, Goodbye, Header, Heartbeat, HeartbeatReply, Hello, Message, ReturnCode, ok

from .world import SITE, Authority, Connected, Serving, authorize, connected, connecting, hello, serving

pytestmark = pytest.mark.usefixtures("no_task_is_left_behind")


def answering() -> Cell:
    cell = Cell(SERVER)
    cell.on(Channel.SERVER, "heartbeat", lambda _: ok(HeartbeatReply()))
    return cell


async def beat(client: Connected) -> Message:
    return await client.cell.ask(SERVER, Channel.SERVER, "heartbeat", Heartbeat(), timeout_s=10)


@asynccontextmanager
async def raw_stream(server: Serving) -> AsyncIterator[Any]:
    """A plain gRPC stream to *server*, for saying what no client of ours would."""
    async with grpc.aio.insecure_channel(server.target, options=CLIENT_OPTIONS) as channel:
        call = channel.stream_stream(CONNECT)()
        yield call
        call.cancel()


async def write_and_read_all(call: Any, data: bytes) -> None:
    await call.write(data)
    await read_all(call)


async def read_all(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


async def test_a_question_travels_over_mutual_tls_and_both_know_each_other(authority: Authority) -> None:
    seen: list[tuple[str | None, Transport]] = []

    def noting(said: Hello, certificate: PeerCertificate | None, transport: Transport) -> Peer:
        seen.append((certificate.common_name if certificate else None, transport))
        if certificate is not None:
            assert certificate.pem.startswith(b"-----BEGIN CERTIFICATE-----")
        return authorize(said, certificate, transport)

    async with (
        serving(authority.server_tls(), cell=answering(), authorize=noting) as server,
        connected(server.target, authority.client_tls()) as client,
    ):
        assert (await beat(client)).payload == HeartbeatReply()
        up = client.cell.peer(SERVER)
        assert up is not None
        assert up.transport == "mtls"
        assert server.ups == ["site-1"]
    assert seen == [("site-1", "mtls")]
    assert server.downs == [("site-1", server.downs[0][1])]


async def test_the_server_can_ask_the_client_over_the_same_stream(authority: Authority) -> None:
    async with (
        serving(authority.server_tls()) as server,
        connected(server.target, authority.client_tls()) as client,
    ):
        client.cell.on(Channel.JOB, "goodbye", lambda _: None)
        await server.cell.ask(SITE, Channel.JOB, "goodbye", Goodbye("test"), timeout_s=10)


async def test_a_client_of_another_ca_does_not_get_in(authority: Authority, stranger: Authority) -> None:
    tls = stranger.client_tls(roots=authority.pem)
    async with serving(authority.server_tls()) as server, connecting([server.target], tls) as client:
        with pytest.raises(Unreachable):
            await client.connector.wait_ready(0.5)
        assert server.ups == []


async def test_a_client_without_a_certificate_does_not_get_in(authority: Authority) -> None:
    tls = authority.client_tls(anonymous=True)
    async with serving(authority.server_tls()) as server, connecting([server.target], tls) as client:
        with pytest.raises(Unreachable):
            await client.connector.wait_ready(0.5)
        assert server.ups == []


async def test_behind_a_proxy_a_client_needs_no_certificate(authority: Authority) -> None:
    tls = authority.server_tls(require_client_certificate=False)
    async with (
        serving(tls, cell=answering()) as server,
        connected(server.target, authority.client_tls(anonymous=True)) as client,
    ):
        await beat(client)
        peer = server.cell.peer(SITE)
        assert peer is not None
        assert (peer.transport, peer.certificate) == ("tls", None)


async def test_a_certificate_for_another_name_is_refused_with_a_reason(authority: Authority) -> None:
    tls = authority.client_tls("site-2")
    async with serving(authority.server_tls()) as server, connecting([server.target], tls) as client:
        with pytest.raises(Unauthenticated, match="the certificate of site-2 is not for site-1"):
            await client.connector.wait_ready(10)


async def test_a_unix_socket_serves_its_owner_alone(tmp_path: Path, authority: Authority) -> None:
    path = tmp_path / "run" / "socket"
    async with (
        serving(authority.server_tls(), cell=answering(), unix_path=path) as server,
        connected(f"unix:{path}") as client,
    ):
        await beat(client)
        peer = server.cell.peer(SITE)
        assert peer is not None
        assert peer.transport == "unix"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


async def test_a_unix_socket_left_by_a_killed_server_is_no_obstacle(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    async with serving(cell=answering(), unix_path=path), connected(f"unix:{path}") as client:
        await beat(client)


async def test_bytes_that_are_no_frame_end_the_stream_with_a_reason() -> None:
    async with serving() as server, raw_stream(server) as call:
        await call.write(b"\xff" * 100)
        bye = decode(await call.read())
        assert bye.kind is FrameKind.BYE
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await call.read()
        assert ended.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert ended.value.details() == bye.headers["reason"]


async def test_bad_bytes_on_an_open_stream_end_that_stream_alone() -> None:
    async with serving(cell=answering()) as server, connected(server.target) as good, raw_stream(server) as call:
        await call.write(encode(Frame(FrameKind.HELLO, payload=encode_struct(hello("site-2")))))
        assert decode(await call.read()).kind is FrameKind.WELCOME
        await call.write(b"\xff" * 100)
        assert decode(await call.read()).kind is FrameKind.BYE
        await server.until(lambda: bool(server.downs))
        assert server.downs[0][0] == "site-2"
        await beat(good)


@pytest.mark.parametrize(
    "said",
    [
        {Header.ERROR_CODE: "caf\u00e9"},
        {Header.ERROR_CODE: "a\nb"},
        {Header.ERROR_CODE: "\0"},
        {Header.RETURN_CODE: ReturnCode.OK},
    ],
)
async def test_a_farewell_of_any_text_ends_the_stream_with_its_reason(
    said: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    async with serving() as server, raw_stream(server) as call:
        await call.write(encode(Frame(FrameKind.HELLO, payload=encode_struct(hello()))))
        assert decode(await call.read()).kind is FrameKind.WELCOME
        await call.write(encode(Frame(FrameKind.BYE, headers={Header.REASON: "f\u00fcr immer", **said})))
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await call.read()
        assert ended.value.details() == "f\u00fcr immer"
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_a_frame_beyond_the_size_limit_ends_the_stream_and_the_server_serves_on() -> None:
    async with serving(cell=answering()) as server, connected(server.target) as good, raw_stream(server) as call:
        await call.write(encode(Frame(FrameKind.HELLO, payload=encode_struct(hello("site-2")))))
        await call.read()
        with pytest.raises(grpc.aio.AioRpcError):  # at the write or at the read, whichever hears of it first
            await write_and_read_all(call, bytes(MAX_FRAME_BYTES + 1))
        await server.until(lambda: bool(server.downs))
        await beat(good)


async def test_a_stream_that_says_nothing_is_closed_with_a_status() -> None:
    async with serving(hello_timeout_s=0.05) as server, raw_stream(server) as call:
        assert decode(await call.read()).kind is FrameKind.BYE
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await call.read()
        assert ended.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_a_client_that_does_not_read_is_disconnected_and_no_other() -> None:
    limits = {"max_queued_frames": 50}
    async with (
        serving(cell=answering(), **limits) as server,
        connected(server.target) as good,
        raw_stream(server) as deaf,
    ):
        good.cell.on(Channel.JOB, "goodbye", lambda _: None)
        await deaf.write(encode(Frame(FrameKind.HELLO, payload=encode_struct(hello("site-2")))))
        await server.until(lambda: len(server.ups) == 2)
        flood = Goodbye("x" * 1_000_000)

        async def tell_without_end() -> None:
            while True:
                server.cell.tell(Fqcn("site-2"), Channel.JOB, "goodbye", flood)
                await asyncio.sleep(0)

        with pytest.raises(Unreachable, match="it does not read"):
            await tell_without_end()
        await server.until(lambda: bool(server.downs))
        assert server.downs[0][0] == "site-2"
        await beat(good)
        await server.cell.ask(SITE, Channel.JOB, "goodbye", Goodbye("still there"), timeout_s=10)
        with pytest.raises(grpc.aio.AioRpcError, match="it does not read"):
            await read_all(deaf)


async def test_a_client_that_vanishes_is_noticed() -> None:
    async with serving() as server:
        async with raw_stream(server) as call:
            await call.write(encode(Frame(FrameKind.HELLO, payload=encode_struct(hello("site-2")))))
            await call.read()
        await server.until(lambda: bool(server.downs))
        assert [name for name, _ in server.downs] == ["site-2"]


async def test_a_newer_stream_of_the_same_cell_replaces_the_older(authority: Authority) -> None:
    tls = authority.client_tls()
    async with (
        serving(authority.server_tls(), cell=answering()) as server,
        connected(server.target, tls) as old,
        connected(server.target, tls) as new,
    ):
        with pytest.raises(RemoteError, match="replaced by a newer one"):
            await old.running
        await beat(new)


async def test_the_health_service_answers() -> None:
    async with serving() as server, grpc.aio.insecure_channel(server.target) as channel:
        reply = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert reply.status == health_pb2.HealthCheckResponse.SERVING


async def test_reflection_lists_the_services() -> None:
    async with serving() as server, grpc.aio.insecure_channel(server.target) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        call = stub.ServerReflectionInfo()
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        reply = await call.read()
        await call.done_writing()
        names = {service.name for service in reply.list_services_response.service}
        assert {"hanse.v1.Wire", "grpc.health.v1.Health"} <= names


async def test_a_port_that_is_taken_is_a_config_error_that_names_it() -> None:
    async with serving() as server:
        with pytest.raises(ConfigError, match=server.target):
            await Listener(server.reception, scopes=None, tls=None, target=server.target).start()  # type: ignore[arg-type]


@pytest.mark.parametrize("target", ["", "localhost", "localhost:", ":6007", "::1:6007", "host:port", "host:70000"])
def test_a_target_that_is_none_is_a_config_error(target: str) -> None:
    with pytest.raises(ConfigError, match="host:port"):
        split_target(target)


@pytest.mark.parametrize(("target", "parts"), [("0.0.0.0:6007", ("0.0.0.0", 6007)), ("[::1]:0", ("[::1]", 0))])
def test_a_target_is_a_host_and_a_port(target: str, parts: tuple[str, int]) -> None:
    assert split_target(target) == parts


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 loopback")
async def test_ipv6_works(authority: Authority) -> None:
    async with (
        serving(authority.server_tls(), target="[::1]:0", cell=answering()) as server,
        connected(server.target, authority.client_tls()) as client,
    ):
        assert server.target.startswith("[::1]:")
        await beat(client)


async def test_stopping_twice_is_stopping_once_and_the_port_is_free_again() -> None:
    async with serving() as server:
        await server.listener.stop(0.1)
        await server.listener.stop(0.1)
        async with serving(target=server.target):
            pass


async def test_a_stopping_server_tells_its_clients_so() -> None:
    async with serving() as server, connected(server.target) as client:
        reasons: list[str] = []
        client.cell.on_link_down(lambda _peer, reason: reasons.append(reason))
        await server.listener.stop(1.0)
        for _ in range(1000):
            await asyncio.sleep(0)
            if reasons:
                break
        assert reasons == ["the server is stopping"]


async def test_what_is_too_large_to_send_is_refused_before_it_is_sent() -> None:
    async with serving(cell=answering()) as server, connected(server.target) as client:
        with pytest.raises(ProtocolError, match=r"frame\.payload"):
            client.cell.tell(SERVER, Channel.JOB, "goodbye", Goodbye("x" * 5_000_000))
        await beat(client)


@pytest.mark.parametrize("last", ["run(stop(), 10)", ""])
def test_a_program_leaves_no_noise_behind_whether_it_stops_its_server_or_just_ends(last: str) -> None:
    program = """
        import asyncio, random
        from hanse.cell.cell import Cell
        from hanse.cell.connector import Connector
        from hanse.cell.handshake import Reception
        from hanse.cell.link import Peer
        from hanse.cell.listener import Listener
        from hanse.cell.loop import run
        from hanse.cell.transfer import Transfers
        from hanse.errors import HanseError, NotFound
        from hanse.ids import SERVER
        from hanse.messages import Hello

        def scopes(peer, scope, *, write):
            raise NotFound("scope", scope)

        def hello():
            return Hello((1,), "site-1", "demo")

        async def start():
            global listener, connector, transfers, running
            reception = Reception(Cell(SERVER), authorize=lambda said, *_: Peer(said.fqcn, "client", "plain"))
            listener = Listener(reception, scopes=scopes, tls=None, target="127.0.0.1:0")
            target = await listener.start()
            connector = Connector(Cell("site-1"), targets=[target], hello=hello, tls=None, rng=random.Random(1))
            running = asyncio.create_task(connector.run())
            await connector.wait_ready(10)
            transfers = Transfers(target=lambda: target, hello=hello, tls=None, rng=random.Random(1), max_tries=1)
            try:
                await transfers.missing("nowhere", ["ab" * 32])
            except HanseError as error:
                assert "there is no scope 'nowhere'" in error.reason, error

        async def stop():
            await transfers.close()
            await connector.close()
            await listener.stop(1.0)

        run(start(), 10)
        """
    source = textwrap.dedent(program) + last
    command = [sys.executable, "-W", "error", "-c", source]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
