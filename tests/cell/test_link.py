import asyncio
from collections.abc import Callable

import pytest

from hanse.cell.frames import MAX_PAYLOAD_BYTES, Frame, FrameKind, decode, encode
from hanse.cell.link import FAREWELL_S, Link, MemoryPipe, Peer, StreamLink, memory_link_pair, memory_pipe_pair
from hanse.errors import HanseError, InternalError, NotInService, ProtocolError, Unreachable
from hanse.ids import Fqcn

pytestmark = pytest.mark.usefixtures("no_task_is_left_behind")


def peer(name: str = "site-1") -> Peer:
    return Peer(Fqcn(name), "client", "memory")


def event(topic: str = "x", payload: bytes = b"") -> Frame:
    return Frame(FrameKind.EVENT, topic=topic, payload=payload)


class Inbox:
    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self._wanted: tuple[int, asyncio.Future[None]] | None = None

    async def receive(self, _link: Link, frame: Frame) -> None:
        self.frames.append(frame)
        if self._wanted is not None and len(self.frames) >= self._wanted[0] and not self._wanted[1].done():
            self._wanted[1].set_result(None)

    async def until(self, count: int) -> list[Frame]:
        if len(self.frames) < count:
            self._wanted = count, asyncio.get_running_loop().create_future()
            async with asyncio.timeout(5):
                await self._wanted[1]
        return self.frames


async def test_frames_arrive_in_order() -> None:
    a, b = memory_link_pair(peer("b"), peer("a"), room=2)
    inbox = Inbox()
    async with asyncio.TaskGroup() as group:
        group.create_task(a.run(Inbox().receive))
        group.create_task(b.run(inbox.receive))
        for number in range(100):
            a.send_nowait(event(str(number)))
        assert [frame.topic for frame in await inbox.until(100)] == [str(number) for number in range(100)]
        await a.close(Unreachable("a", "done"))


async def test_both_ends_learn_why_a_link_was_closed() -> None:
    a, b = memory_link_pair(peer("b"), peer("a"))
    async with asyncio.TaskGroup() as group:
        a_end = group.create_task(a.run(Inbox().receive))
        b_end = group.create_task(b.run(Inbox().receive))
        await a.close(NotInService("the server is stopping"))
    assert a_end.result().reason == b_end.result().reason == "the server is stopping"
    assert isinstance(b_end.result(), NotInService)


async def test_what_was_queued_before_the_close_still_arrives() -> None:
    a, b = memory_link_pair(peer("b"), peer("a"), room=1)
    inbox = Inbox()
    async with asyncio.TaskGroup() as group:
        group.create_task(a.run(Inbox().receive))
        group.create_task(b.run(inbox.receive))
        for number in range(10):
            a.send_nowait(event(str(number)))
        a.close_nowait(NotInService())
        with pytest.raises(Unreachable, match="not in service"):
            a.send_nowait(event())
    assert len(inbox.frames) == 10


async def test_a_peer_that_does_not_read_ends_its_link_when_the_queue_is_full() -> None:
    near, _far = memory_pipe_pair(room=1)
    link = StreamLink(peer(), near, max_frames=5)
    running = asyncio.create_task(link.run(Inbox().receive))
    for _ in range(5):
        link.send_nowait(event())
    with pytest.raises(Unreachable, match="it does not read"):
        link.send_nowait(event())
    assert "it does not read" in (await running).reason
    with pytest.raises(Unreachable, match="it does not read"):
        link.send_nowait(event())


async def test_a_queue_is_full_by_bytes_too() -> None:
    near, _far = memory_pipe_pair(room=1)
    link = StreamLink(peer(), near, max_bytes=1000)
    running = asyncio.create_task(link.run(Inbox().receive))
    link.send_nowait(event(payload=bytes(600)))
    with pytest.raises(Unreachable, match="it does not read"):
        link.send_nowait(event(payload=bytes(600)))
    await running


async def test_a_frame_beyond_a_limit_is_not_queued_and_harms_nothing() -> None:
    a, b = memory_link_pair(peer("b"), peer("a"))
    inbox = Inbox()
    async with asyncio.TaskGroup() as group:
        group.create_task(a.run(Inbox().receive))
        group.create_task(b.run(inbox.receive))
        with pytest.raises(ProtocolError):
            a.send_nowait(event(payload=bytes(MAX_PAYLOAD_BYTES + 1)))
        a.send_nowait(event("small"))
        assert (await inbox.until(1))[0].topic == "small"
        await a.close(Unreachable("a", "done"))


async def test_bytes_that_are_no_frame_end_the_link_and_the_peer_is_told() -> None:
    near, far = memory_pipe_pair()
    link = StreamLink(peer(), near)
    running = asyncio.create_task(link.run(Inbox().receive))
    await far.write(b"\xff\xff\xff")
    told = await far.read()
    assert told is not None
    bye = decode(told)
    assert bye.kind is FrameKind.BYE
    assert "frame is" in bye.headers["reason"]
    assert isinstance(await running, ProtocolError)


async def test_a_failure_in_the_receiver_ends_this_link_as_ours(caplog: pytest.LogCaptureFixture) -> None:
    async def failing(_link: Link, _frame: Frame) -> None:
        raise KeyError("bug")

    near, far = memory_pipe_pair()
    running = asyncio.create_task(StreamLink(peer(), near).run(failing))
    await far.write(encode(event()))
    assert isinstance(await running, InternalError)
    assert "KeyError" in caplog.text


async def test_a_cancelled_link_has_ended_and_its_peer_sees_the_end() -> None:
    a, b = memory_link_pair(peer("b"), peer("a"))
    running = asyncio.create_task(a.run(Inbox().receive))
    other = asyncio.create_task(b.run(Inbox().receive))
    a.send_nowait(event())
    await asyncio.sleep(0)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert a.closed.done()
    assert "closed the connection" in (await other).reason


async def test_the_first_reason_is_the_one_that_counts() -> None:
    a, b = memory_link_pair(peer("b"), peer("a"))
    async with asyncio.TaskGroup() as group:
        group.create_task(a.run(Inbox().receive))
        group.create_task(b.run(Inbox().receive))
        a.close_nowait(NotInService("first"))
        a.close_nowait(NotInService("second"))
        await a.close(NotInService("third"))
    assert a.closed.result().reason == "first"


async def test_closing_does_not_wait_for_a_peer_that_does_not_read() -> None:
    loop = asyncio.get_running_loop()
    near, far = memory_pipe_pair(room=1)
    await near.write(b"full")
    link = StreamLink(peer(), near)
    running = asyncio.create_task(link.run(Inbox().receive))
    began = loop.time()
    await link.close(NotInService("over"))
    assert loop.time() - began < FAREWELL_S + 1
    assert (await running).reason == "over"
    assert far is not None


class BrokenPipe(MemoryPipe):
    """Takes nothing, and has a last word to read."""

    def __init__(self, last_word: Callable[[], bytes | None]) -> None:
        self._last_word = last_word
        self._write_failed = asyncio.Event()

    async def read(self) -> bytes | None:
        await self._write_failed.wait()
        return self._last_word()

    async def write(self, data: bytes) -> None:
        self._write_failed.set()
        raise Unreachable("peer", "the connection was closed")

    async def finish(self) -> bool:
        return False

    async def close(self) -> None:
        pass


async def test_where_writing_fails_the_peers_last_word_is_the_reason() -> None:
    bye = Frame(FrameKind.BYE, headers={"return_code": "unauthenticated", "reason": "you are disabled"})
    link = StreamLink(peer(), BrokenPipe(lambda: encode(bye)))
    link.send_nowait(event())
    error: HanseError = await link.run(Inbox().receive)
    assert error.reason == "you are disabled"
