import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hanse.cell.cell import Cell
from hanse.cell.frames import Frame, FrameKind, decode, decode_struct, encode, encode_struct
from hanse.cell.handshake import Reception, choose_version, say_hello
from hanse.cell.link import Peer, Pipe, memory_pipe_pair
from hanse.cell.refusals import RemoteError, error_from
from hanse.errors import HanseError, NotInService, ProtocolError, Unauthenticated, Unreachable, VersionMismatch
from hanse.ids import SERVER, Fqcn, Ssid
from hanse.messages import Hello, Welcome

from .world import PROJECT, SITE, authorize, hello

pytestmark = pytest.mark.usefixtures("no_task_is_left_behind")


@asynccontextmanager
async def reception(cell: Cell | None = None, **options: Any) -> AsyncIterator[Reception]:
    cell = cell or Cell(SERVER)
    opened = Reception(cell, **{"authorize": authorize, "session": lambda: Ssid("7"), "release": "0.1.0", **options})
    try:
        yield opened
    finally:
        await opened.close(NotInService("the server is stopping"))
        await cell.close()


async def first_answer(pipe: Pipe) -> Frame:
    async with asyncio.timeout(5):
        data = await pipe.read()
    assert data is not None
    return decode(data)


async def refused_with(pipe: Pipe) -> HanseError:
    bye = await first_answer(pipe)
    assert bye.kind is FrameKind.BYE
    assert await pipe.read() is None
    return error_from(bye.headers)


async def test_a_hello_is_answered_with_a_welcome_that_names_version_server_and_session() -> None:
    async with reception() as desk:
        welcome = await say_hello(await desk.dial("memory"), hello())
    assert (welcome.version, welcome.server, welcome.ssid, welcome.release) == (1, "server", "7", "0.1.0")
    assert welcome.max_payload_bytes > 0


async def test_a_welcome_tells_the_servers_time_of_day() -> None:
    async with reception(wall=lambda: 1893456000.5) as desk:
        assert (await say_hello(await desk.dial("memory"), hello())).sent_at == 1893456000.5


def test_a_welcome_without_a_time_is_one_of_a_server_that_does_not_tell() -> None:
    older = msgspec.msgpack.encode({"version": 1, "server": "server", "ssid": "7"})
    assert decode_struct(Welcome, older).sent_at == 0.0


async def test_both_take_the_highest_version_that_they_share() -> None:
    async with reception(versions=(1, 2, 3)) as desk:
        assert (await say_hello(await desk.dial("memory"), hello(versions=(1, 2, 9)))).version == 2


@given(st.lists(st.integers(0, 9)), st.lists(st.integers(0, 9)))
def test_a_version_is_chosen_exactly_when_one_is_shared(theirs: list[int], ours: list[int]) -> None:
    shared = set(theirs) & set(ours)
    said = hello(versions=tuple(theirs))
    if shared:
        assert choose_version(said, ours) == max(shared)
    else:
        with pytest.raises(VersionMismatch):
            choose_version(said, ours)


async def test_who_shares_no_version_is_told_both_releases_and_what_they_speak() -> None:
    heard: list[tuple[Hello, HanseError]] = []
    async with reception(on_refused=lambda *refusal: heard.append(refusal)) as desk:
        with pytest.raises(RemoteError) as refused:
            await say_hello(await desk.dial("memory"), Hello((9, 8), SITE, PROJECT, "9.0.0"))
    assert refused.value.reason == (
        "site-1 runs Hanse 9.0.0 (protocol 8, 9), and this side runs Hanse 0.1.0 (protocol 1); "
        "they need a protocol in common"
    )
    assert (refused.value.error_code, refused.value.retryable) == ("version-mismatch", False)
    assert [(said.fqcn, error.reason) for said, error in heard] == [("site-1", refused.value.reason)]


async def test_a_welcome_in_a_version_that_was_not_offered_is_a_mismatch() -> None:
    near, far = memory_pipe_pair()
    welcome = Welcome(3, "server", Ssid("7"), "0.3.0")
    await far.write(encode(Frame(FrameKind.WELCOME, payload=encode_struct(welcome))))
    with pytest.raises(VersionMismatch, match=r"the server runs Hanse 0\.3\.0 \(protocol 3\)"):
        await say_hello(near, hello())


async def test_a_reception_that_is_closed_while_a_silent_streams_time_ends_is_closed() -> None:
    stopping = NotInService("the server is stopping")
    async with reception() as desk:
        pipe = await desk.dial("memory")
        await asyncio.sleep(0)
        closing = asyncio.create_task(desk.close(stopping))
        await asyncio.sleep(0)
        again = asyncio.create_task(desk.close(stopping))
        await asyncio.gather(closing, again)
        assert str(await refused_with(pipe)) == str(stopping)


async def test_who_waits_for_its_turn_when_the_reception_is_closed_is_not_let_in() -> None:
    waits, may_go_on = asyncio.Event(), asyncio.Event()

    async def wait_turn() -> None:
        waits.set()
        await may_go_on.wait()

    cell = Cell(SERVER)
    async with reception(cell, wait_turn=wait_turn) as desk, asyncio.timeout(10):
        pipe = await desk.dial("memory")
        await pipe.write(encode(Frame(FrameKind.HELLO, origin=SITE, payload=encode_struct(hello()))))
        await waits.wait()
        closing = asyncio.create_task(desk.close(NotInService("the server is stopping")))
        await asyncio.sleep(0)
        may_go_on.set()
        assert str(await refused_with(pipe)) == "the server is stopping"
        await closing
        assert cell.peers() == []


async def test_a_stream_that_says_nothing_is_closed() -> None:
    async with reception(hello_timeout_s=0.02) as desk:
        pipe = await desk.dial("memory")
        error = await refused_with(pipe)
    assert isinstance(error, Unauthenticated)
    assert "said no HELLO within 0.02 s" in error.reason


@pytest.mark.parametrize(
    ("first", "reason"),
    [
        (b"", "frame.kind"),
        (b"GET / HTTP/1.1\r\n\r\n", "frame"),
        (encode(Frame(FrameKind.REQUEST, 1, SITE, SERVER, "server", "heartbeat")), "first frame is 'REQUEST'"),
        (encode(Frame(FrameKind.HELLO)), "Hello"),
        (encode(Frame(FrameKind.HELLO, payload=b"\x81\xa8versions\xc3")), "Hello.versions"),
        (encode(Frame(FrameKind.HELLO, payload=encode_struct(hello("../etc")))), "Hello.fqcn"),
    ],
)
async def test_a_stream_that_opens_with_something_else_is_told_what_is_wrong(first: bytes, reason: str) -> None:
    async with reception() as desk:
        pipe = await desk.dial("memory")
        await pipe.write(first)
        error = await refused_with(pipe)
    assert reason in error.reason


async def test_who_is_not_authorized_is_told_why() -> None:
    async with reception() as desk:
        with pytest.raises(Unauthenticated, match="this server serves demo, not other"):
            await say_hello(await desk.dial("memory"), hello(project="other"))


async def test_an_authorization_that_crashes_lets_nobody_in(caplog: pytest.LogCaptureFixture) -> None:
    def crashing(*_: object) -> Peer:
        raise KeyError("bug")

    server = Cell(SERVER)
    async with reception(server, authorize=crashing) as desk:
        with pytest.raises(HanseError, match="authorizing site-1"):
            await say_hello(await desk.dial("memory"), hello())
        assert server.peers() == []
    assert "authorization failed" in caplog.text


async def test_who_does_not_prove_itself_in_time_is_let_go() -> None:
    async with reception(prove_timeout_s=0.02) as desk:
        pipe = await desk.dial("memory")
        await say_hello(pipe, hello(token=None))
        error = await refused_with(pipe)
    assert "site-1 did not register within 0.02 s" in error.reason


async def test_who_has_proven_itself_may_stay() -> None:
    server = Cell(SERVER)
    async with reception(server, prove_timeout_s=0.02) as desk:
        pipe = await desk.dial("memory")
        await say_hello(pipe, hello())
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await pipe.read()
        assert server.peer(SITE) is not None


async def test_beyond_the_last_place_nobody_is_let_in() -> None:
    async with reception(max_streams=1) as desk:
        pipe = await desk.dial("memory")
        await say_hello(pipe, hello())
        with pytest.raises(NotInService, match="all of its 1 streams"):
            await say_hello(await desk.dial("memory"), hello("site-2"))
        assert pipe is not None


async def test_a_place_is_free_again_when_its_stream_has_ended() -> None:
    server = Cell(SERVER)
    gone = asyncio.Event()
    server.on_link_down(lambda _peer, _reason: gone.set())
    async with reception(server, max_streams=1) as desk:
        pipe = await desk.dial("memory")
        await say_hello(pipe, hello())
        await pipe.close()
        await gone.wait()
        for _ in range(5):
            await asyncio.sleep(0)
        await say_hello(await desk.dial("memory"), hello("site-2"))


async def test_a_closing_reception_ends_all_streams_also_those_that_have_said_nothing() -> None:
    async with reception() as desk:
        silent, talking = await desk.dial("memory"), await desk.dial("memory")
        await say_hello(talking, hello())
        await desk.close(NotInService("the server is stopping"))
        for pipe in (silent, talking):
            error = await refused_with(pipe)
            assert isinstance(error, NotInService)
            assert error.reason == "the server is stopping"
        with pytest.raises(Unreachable, match="stopping"):
            await desk.dial("memory")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (Frame(FrameKind.WELCOME, payload=b"?"), "Welcome"),
        (Frame(FrameKind.EVENT), "first frame is 'EVENT'"),
    ],
)
async def test_a_welcome_that_is_none_is_a_protocol_error(answer: Frame, reason: str) -> None:
    near, far = memory_pipe_pair()
    await far.write(encode(answer))
    with pytest.raises(ProtocolError, match=reason):
        await say_hello(near, hello())


async def test_a_server_that_hangs_up_is_unreachable() -> None:
    near, far = memory_pipe_pair()
    await far.close()
    with pytest.raises(Unreachable):
        await say_hello(near, Hello((1,), Fqcn("a"), "p"))


def test_a_reception_has_an_authorize_for_calls_too() -> None:
    decide: Callable[..., Peer] = authorize
    assert Reception(Cell(SERVER), authorize=decide).authorize is decide
