import asyncio
import itertools
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from hanse.cell.cell import Cell, RemoteError
from hanse.cell.link import Peer, StreamLink, memory_link_pair
from hanse.client.uplink import Uplink, first_error, may_help_later
from hanse.errors import NotFound, NotInService, TimedOut, Unauthorized, Unreachable
from hanse.ids import SERVER, Fqcn, JobId, Ssid
from hanse.messages import AbortJob, Channel, Header, Heartbeat, HeartbeatReply, Message, ReturnCode, ok

SITE = Fqcn("site-1")


@asynccontextmanager
async def linked(uplink: Uplink, server: Cell) -> AsyncIterator[StreamLink]:
    """Join the two in memory; the link counts as up, and whether it is trusted is the test's."""
    there, back = memory_link_pair(
        Peer(SERVER, "server", "memory", routes=True), Peer(uplink.cell.fqcn, "client", "memory")
    )
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(there.run(uplink.cell.receive)), group.create_task(back.run(server.receive))]
        uplink.cell.attach(there)
        server.attach(back)
        try:
            yield there
        finally:
            for task in tasks:
                task.cancel()


async def test_peer_is_listened_to_only_once_it_is_trusted() -> None:
    uplink, server = Uplink(SITE, random.Random(1)), Cell(SERVER)
    heard: list[object] = []
    uplink.cell.on(Channel.JOB, "abort", lambda message: heard.append(message.payload))
    abort = AbortJob(JobId("digits-1"), "why not")
    async with linked(uplink, server) as link:
        with pytest.raises(RemoteError, match="server may not send job/abort") as caught:
            await server.ask(SITE, Channel.JOB, "abort", abort, timeout_s=10)
        assert caught.value.error_code == Unauthorized.code
        assert heard == []

        uplink.trust(link.peer, ssid=Ssid("7"))
        await server.ask(SITE, Channel.JOB, "abort", abort, timeout_s=10)
        assert heard == [abort]


async def test_trusted_server_may_still_not_send_what_servers_do_not_send() -> None:
    uplink, server = Uplink(SITE, random.Random(1)), Cell(SERVER)
    uplink.cell.on(Channel.SERVER, "heartbeat", lambda message: None)
    async with linked(uplink, server) as link:
        uplink.trust(link.peer, ssid=Ssid("7"))
        with pytest.raises(RemoteError, match="may not send server/heartbeat"):
            await server.ask(SITE, Channel.SERVER, "heartbeat", Heartbeat(), timeout_s=10)


async def test_requests_state_the_session_that_was_entered_last() -> None:
    uplink, server = Uplink(SITE, random.Random(1)), Cell(SERVER)
    stated: list[str | None] = []

    def heartbeat(message: Message) -> Message:
        stated.append(message.get_header(Header.SSID))
        return ok(HeartbeatReply())

    server.on(Channel.SERVER, "heartbeat", heartbeat)
    async with linked(uplink, server) as link:
        uplink.trust(link.peer, ssid=Ssid("7"))
        await uplink.ask(Channel.SERVER, "heartbeat", Heartbeat(), timeout_s=10)
        uplink.enter_session(Ssid("8"))
        await uplink.ask(Channel.SERVER, "heartbeat", Heartbeat(), timeout_s=10)

    assert stated == ["7", "8"]


async def test_attempt_is_made_anew_with_growing_pauses_while_that_may_help() -> None:
    uplink, server = Uplink(SITE, random.Random(1)), Cell(SERVER)
    loop = asyncio.get_running_loop()
    times: list[float] = []

    async def attempt() -> str:
        times.append(loop.time())
        if len(times) < 4:
            raise NotInService()
        return "answered"

    async with linked(uplink, server):
        assert await uplink.persist(attempt, doing="test") == "answered"

    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
    # At least, for a busy machine may add to them; how long they are at most is tested where they are drawn.
    assert all(pause >= least for pause, least in zip(pauses, (0.05, 0.1, 0.2), strict=True))


async def test_no_attempt_is_made_while_there_is_no_link() -> None:
    uplink, server = Uplink(SITE, random.Random(1)), Cell(SERVER)
    tries: list[bool] = []

    async def attempt() -> None:
        tries.append(uplink.is_up)

    persisting = asyncio.create_task(uplink.persist(attempt, doing="test"))
    await asyncio.sleep(0)
    assert tries == []
    async with linked(uplink, server):
        await persisting
    assert tries == [True]
    assert not uplink.is_up


async def test_refusal_for_good_is_raised_at_once() -> None:
    uplink, server = Uplink(SITE, random.Random(1)), Cell(SERVER)
    tries: list[int] = []

    async def attempt() -> None:
        tries.append(1)
        raise NotFound("running job", "digits-1")

    async with linked(uplink, server):
        with pytest.raises(NotFound):
            await uplink.persist(attempt, doing="test")
    assert len(tries) == 1


@pytest.mark.parametrize(
    ("error", "helps"),
    [
        (Unreachable("server", "gone"), True),
        (TimedOut("server", "result", 1), True),
        (NotInService(), True),
        (RemoteError("Abort current run", return_code=ReturnCode.ABORT_RUN), True),
        (RemoteError("a stale answer", return_code=ReturnCode.REFUSED), False),
        (NotFound("running job", "digits-1"), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_may_be_asked_again(error: Exception, helps: bool) -> None:
    assert may_help_later(error) is helps  # type: ignore[arg-type]  # all of them are ours


def test_first_error_of_a_group_is_found_however_deep_it_lies() -> None:
    error = ValueError("the one")

    assert first_error(ExceptionGroup("a", [ExceptionGroup("b", [error]), KeyError()])) is error
