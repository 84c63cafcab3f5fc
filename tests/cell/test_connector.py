import asyncio
import socket
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest

from hanse.cell.cell import Cell
from hanse.cell.link import Link, Peer, Pipe
from hanse.cell.rpc import CONTROL_OPTIONS, ClientTls, ServerTls
from hanse.errors import HanseError, NotInService, TimedOut, Unauthenticated, Unreachable
from hanse.identity.authorities import Authority as ProjectAuthority
from hanse.identity.certificates import key_pem, new_key
from hanse.ids import SERVER, Ssid, Token
from hanse.messages import Channel, Heartbeat, HeartbeatReply, Message, Register, Registered, Welcome, ok
from tests.faults.proxy import FaultyNetwork

from .world import SITE, Authority, Connected, connected, connecting, hello, serving

pytestmark = pytest.mark.usefixtures("no_task_is_left_behind")


def answering() -> Cell:
    cell = Cell(SERVER)
    cell.on(Channel.SERVER, "heartbeat", lambda _: ok(HeartbeatReply()))
    return cell


async def beat(client: Connected) -> Message:
    return await client.cell.ask(SERVER, Channel.SERVER, "heartbeat", Heartbeat(), timeout_s=10)


async def free_target() -> str:
    async with serving() as server:
        return server.target


async def test_a_client_comes_back_by_itself_when_its_server_does(authority: Authority) -> None:
    server_tls, tls = authority.server_tls(), authority.client_tls()
    lost = asyncio.Event()
    async with serving(server_tls, cell=answering()) as first:
        target = first.target
        client_context = connected(target, tls)
        client = await client_context.__aenter__()
        client.cell.on_link_down(lambda _peer, _reason: lost.set())
        await beat(client)
    try:
        await lost.wait()
        with pytest.raises(Unreachable):
            await beat(client)
        async with serving(server_tls, target=target, cell=answering()) as second:
            await client.connector.wait_ready(10)
            await beat(client)
            assert second.ups == ["site-1"]
        assert client.waited_for
        assert "trying again in" in client.waited_for[0]
    finally:
        await client_context.__aexit__(None, None, None)


async def test_a_client_started_before_its_server_waits_and_says_for_what() -> None:
    target = await free_target()
    async with connecting([target]) as client:
        with pytest.raises(Unreachable, match=target):
            await client.connector.wait_ready(0.1)
        async with serving(target=target, cell=answering()):
            await client.connector.wait_ready(10)
            await beat(client)
    assert target in client.waited_for[0]


async def test_a_connection_that_died_without_a_word_is_given_up_and_dialled_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sooner = [(name, 200 if name.endswith(("_time_ms", "_timeout_ms")) else value) for name, value in CONTROL_OPTIONS]
    monkeypatch.setattr("hanse.cell.connector.CONTROL_OPTIONS", sooner)
    up = asyncio.Event()
    async with serving(cell=answering()) as server:
        network = FaultyNetwork(int(server.target.rpartition(":")[2]))
        async with network.serving() as port, connected(f"127.0.0.1:{port}") as client:
            monkeypatch.undo()
            client.cell.on_link_up(lambda _peer: up.set())
            await network.forget()
            await up.wait()
            await client.connector.wait_ready(10)
            await beat(client)
            assert network.connections == 2


async def test_targets_are_tried_in_turn_without_a_pause_between_them() -> None:
    dead = await free_target()
    async with serving(cell=answering()) as server, connecting([dead, server.target]) as client:
        await client.connector.wait_ready(10)
        assert client.connector.target == server.target
        assert client.waited_for == []


async def test_a_server_of_another_ca_ends_it_for_good(authority: Authority, stranger: Authority) -> None:
    tls = authority.client_tls(roots=stranger.pem)
    async with serving(authority.server_tls()) as server, connecting([server.target], tls) as client:
        with pytest.raises(Unauthenticated, match="not one that the project's CA issued"):
            await client.connector.wait_ready(10)
        with pytest.raises(Unauthenticated):
            await client.running
        with pytest.raises(Unauthenticated):
            await client.connector.wait_ready(10)  # later as well


@pytest.mark.parametrize(("made", "sentence"), [(-400, "has expired; its operator"), (40, "is not valid yet; compare")])
async def test_a_servers_certificate_that_is_not_valid_now_is_told_apart_from_anothers(
    made: int, sentence: str
) -> None:
    now = datetime.now(UTC)
    authority = ProjectAuthority.create("demo", now=now)
    key = new_key()
    certificate = authority.issue(
        name="server",
        organisation="Org",
        role="server",
        public_key=key.public_key(),
        now=now + timedelta(days=made),
        hosts=["127.0.0.1"],
    )
    tls = ServerTls(certificate, key_pem(key), authority.certificate, require_client_certificate=False)
    async with serving(tls) as server, connecting([server.target], ClientTls(authority.certificate)) as client:
        with pytest.raises(Unauthenticated, match=f"the certificate of the server at .* {sentence}"):
            await client.connector.wait_ready(10)


async def test_a_server_certificate_for_another_host_ends_it_for_good(authority: Authority) -> None:
    tls = authority.server_tls()
    certificate, key = authority.issue("server", "elsewhere.example")
    tls = type(tls)(certificate, key, authority.pem)
    async with serving(tls) as server, connecting([server.target], authority.client_tls()) as client:
        with pytest.raises(Unauthenticated, match="does not hold that host's name"):
            await client.connector.wait_ready(10)


async def test_the_name_in_the_servers_certificate_can_be_given(authority: Authority) -> None:
    certificate, key = authority.issue("server", "elsewhere.example")
    server_tls = type(authority.server_tls())(certificate, key, authority.pem)
    given = authority.client_tls()
    tls = type(given)(given.roots_pem, given.cert_pem, given.key_pem, "elsewhere.example")
    async with serving(server_tls, cell=answering()) as server, connected(server.target, tls) as client:
        await beat(client)


async def test_a_refusal_ends_it_with_the_servers_reason() -> None:
    async with serving() as server, connecting([server.target], hello=lambda: hello(project="other")) as client:
        with pytest.raises(Unauthenticated, match="this server serves demo, not other"):
            await client.connector.wait_ready(10)
        with pytest.raises(Unauthenticated):
            await client.running


async def test_whoever_knows_better_can_go_on_after_a_refusal() -> None:
    projects = iter(["other", "another"])
    refused: list[HanseError] = []

    def knows_better(error: HanseError) -> bool:
        refused.append(error)
        return True

    async with (
        serving(cell=answering()) as server,
        connecting(
            [server.target], hello=lambda: hello(project=next(projects, "demo")), on_refused=knows_better
        ) as client,
    ):
        await client.connector.wait_ready(10)
        await beat(client)
    assert [error.reason for error in refused] == [
        "this server serves demo, not other",
        "this server serves demo, not another",
    ]


async def test_a_link_is_up_only_when_the_client_has_introduced_itself() -> None:
    server_cell = answering()
    server_cell.on(Channel.SERVER, "register", lambda _: ok(Registered(Token("t"), "s", Ssid("7"), expires_in_s=60.0)))
    order: list[str] = []

    async def register(link: Link, welcome: Welcome) -> None:
        assert welcome.ssid == "7"
        with pytest.raises(Unreachable):
            await beat_through(client_cell)  # not up: others do not reach the server yet
        reply = await client_cell.ask(
            SERVER, Channel.SERVER, "register", Register("site-1", "demo"), timeout_s=10, link=link
        )
        assert isinstance(reply.payload, Registered)
        order.append("registered")

    async def beat_through(cell: Cell) -> None:
        await cell.ask(SERVER, Channel.SERVER, "heartbeat", Heartbeat(), timeout_s=10)

    client_cell = Cell(SITE)
    client_cell.on_link_up(lambda _peer: order.append("up"))
    async with (
        serving(cell=server_cell) as server,
        connected(server.target, cell=client_cell, on_welcome=register, hello=lambda: hello(token=None)) as client,
    ):
        order.append("ready")
        await beat(client)
        assert server.ups == []  # the server's side has yet to take it for proven
    assert order == ["registered", "up", "ready"]


async def test_an_introduction_that_is_refused_ends_it() -> None:
    async def register(_link: Link, _welcome: Welcome) -> None:
        raise Unauthenticated("site-1 is disabled")

    async with serving() as server, connecting([server.target], on_welcome=register) as client:
        with pytest.raises(Unauthenticated, match="disabled"):
            await client.connector.wait_ready(10)


async def test_an_introduction_that_may_work_later_is_tried_again() -> None:
    tries = 0

    async def register(_link: Link, _welcome: Welcome) -> None:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise NotInService

    async with serving(cell=answering()) as server, connecting([server.target], on_welcome=register) as client:
        await client.connector.wait_ready(10)
        await beat(client)
    assert tries == 3
    assert [said.partition(";")[0] for said in client.waited_for] == ["Server not in service"] * 2


async def test_an_introduction_that_crashes_ends_it_as_a_bug(caplog: pytest.LogCaptureFixture) -> None:
    async def register(_link: Link, _welcome: Welcome) -> None:
        raise KeyError("bug")

    async with serving() as server, connecting([server.target], on_welcome=register) as client:
        with pytest.raises(HanseError, match="this is a bug"):
            await client.connector.wait_ready(10)
    assert "introduction failed" in caplog.text


async def test_an_introduction_whose_link_breaks_does_not_wait_for_its_answer() -> None:
    server_cell = Cell(SERVER)

    async def vanish(_message: Message) -> None:
        server_cell.drop(seen[0].fqcn, NotInService("going down"))
        await asyncio.get_running_loop().create_future()

    seen: list[Peer] = []
    server_cell.on_link_up(seen.append)
    server_cell.on(Channel.SERVER, "register", vanish)
    failed: list[HanseError] = []

    async def register(link: Link, _welcome: Welcome) -> None:
        try:
            await client_cell.ask(
                SERVER, Channel.SERVER, "register", Register("site-1", "demo"), timeout_s=60, link=link
            )
        except HanseError as error:
            failed.append(error)
            raise

    client_cell = Cell(SITE)
    async with (
        serving(cell=server_cell) as server,
        connecting([server.target], cell=client_cell, on_welcome=register) as client,
    ):
        with pytest.raises(HanseError):
            await client.connector.wait_ready(0.5)
        assert failed
        assert "going down" in failed[0].reason


@pytest.fixture
def silent_target() -> Iterator[str]:
    """Where connections are accepted, by the kernel, and nobody ever says anything."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        yield f"127.0.0.1:{silent.getsockname()[1]}"


async def test_a_target_that_accepts_and_says_nothing_is_given_up(silent_target: str) -> None:
    async with connecting([silent_target], connect_timeout_s=0.1) as client:
        with pytest.raises(Unreachable, match=r"no answer within 0\.1 s"):
            await client.connector.wait_ready(0.5)


async def test_closing_does_not_wait_for_a_dial_that_hangs(silent_target: str) -> None:
    loop = asyncio.get_running_loop()
    async with connecting([silent_target]) as client:
        with pytest.raises(TimedOut):
            await client.connector.wait_ready(0.1)
        began = loop.time()
        await client.connector.close()
        assert loop.time() - began < 5


async def test_a_connector_that_is_closed_as_soon_as_it_runs_dials_nobody() -> None:
    dialled: list[str] = []

    async def dial(target: str) -> Pipe:
        dialled.append(target)
        raise Unreachable(target, "nobody is there")

    async with connecting(["memory"], dial=dial) as client:
        await client.connector.close()
        await client.running
    assert dialled == []


async def test_closing_at_the_moment_of_the_welcome_does_not_wait_for_an_introduction() -> None:
    async def introduce(link: Link, welcome: Welcome) -> None:
        await asyncio.Event().wait()

    closing: list[asyncio.Task[None]] = []

    class Closing:
        """A pipe that, with the welcome, has the connector closed: before who waits for the welcome goes on."""

        def __init__(self, pipe: Pipe) -> None:
            self._pipe = pipe
            self.write, self.finish, self.close = pipe.write, pipe.finish, pipe.close

        async def read(self) -> bytes | None:
            data = await self._pipe.read()
            if not closing:
                closing.append(asyncio.create_task(client.connector.close()))
                await asyncio.sleep(0)
            return data

    async with serving() as server:

        async def dial(target: str) -> Pipe:
            return Closing(await server.reception.dial(target))

        async with connecting(["memory"], on_welcome=introduce, dial=dial) as client, asyncio.timeout(10):
            await client.running
            await closing[0]


async def test_a_client_that_leaves_tells_its_server() -> None:
    async with serving() as server:
        async with connected(server.target):
            pass
        await server.until(lambda: bool(server.downs))
        assert server.downs == [("site-1", "cannot reach site-1: it has left")]


async def test_a_connector_reaches_a_cell_of_the_same_process_without_a_network() -> None:
    async with (
        serving(cell=answering()) as server,
        connected("memory", dial=server.reception.dial) as client,
    ):
        await beat(client)
        peer = server.cell.peer(SITE)
        assert peer is not None
        assert peer.transport == "memory"


def _refuse(*_: object) -> Peer:
    raise Unauthenticated("this server does not know you")


@pytest.mark.parametrize("first", ["refuses", "serves"])
async def test_a_server_that_refuses_for_good_does_not_keep_one_from_another(first: str) -> None:
    async with serving(authorize=_refuse) as stranger, serving() as friend:
        targets = [stranger.target, friend.target] if first == "refuses" else [friend.target, stranger.target]
        async with connecting(targets) as client:
            down = asyncio.Event()
            client.cell.on_link_down(lambda *_: down.set())
            await client.connector.wait_ready(10)
            friend.cell.drop(SITE, Unreachable("server", "it takes a break"))
            await down.wait()
            await client.connector.wait_ready(10)
            assert client.connector.target == friend.target


async def test_where_no_server_takes_one_and_one_refused_for_good_that_is_the_reason() -> None:
    async with serving(authorize=_refuse) as stranger, connecting([stranger.target, "127.0.0.1:1"]) as client:
        with pytest.raises(Unauthenticated, match="does not know you"):
            await client.running
