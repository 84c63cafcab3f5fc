import asyncio
from collections.abc import Callable

import pytest

from hanse.cell.cell import MAX_ASKED, MAX_IN_FLIGHT, Cell, RemoteError, RemoteFault, current_peer
from hanse.cell.frames import Frame, FrameKind, encode_payload
from hanse.cell.link import Peer
from hanse.errors import (
    Conflict,
    HanseError,
    NotFound,
    NotInService,
    ProtocolError,
    StoreFailed,
    TimedOut,
    Unauthenticated,
    Unauthorized,
    Unreachable,
)
from hanse.ids import SERVER, Fqcn, JobId, Ssid, Token
from hanse.messages import (
    AbortJob,
    Channel,
    Credentials,
    Goodbye,
    Header,
    Heartbeat,
    HeartbeatReply,
    Message,
    Quit,
    Renew,
    ReturnCode,
    Topic,
    ok,
    refusal,
)

from .world import SITE, joined

pytestmark = pytest.mark.usefixtures("no_task_is_left_behind")

CREDENTIALS = Credentials("site-1", Token("token"), "signature", Ssid("1"))


async def beat(cell: Cell, *, timeout_s: float = 5.0, headers: dict[str, str] | None = None) -> Message:
    return await cell.ask(SERVER, Channel.SERVER, "heartbeat", Heartbeat(), timeout_s=timeout_s, headers=headers)


def answer_beat(_message: Message) -> Message:
    return ok(HeartbeatReply((JobId("j"),)))


async def test_a_question_is_answered() -> None:
    client, server = Cell(SITE), Cell(SERVER)
    seen: list[Message] = []

    def handler(message: Message) -> Message:
        seen.append(message)
        return answer_beat(message)

    server.on(Channel.SERVER, "heartbeat", handler)
    async with joined(client, server):
        reply = await beat(client)
    assert reply.payload == HeartbeatReply((JobId("j"),))
    assert reply.get_header(Header.ORIGIN) == SERVER
    assert seen[0].payload == Heartbeat()


async def test_a_handler_may_wait_and_others_are_answered_meanwhile() -> None:
    client, server = Cell(SITE), Cell(SERVER)
    release = asyncio.Event()

    async def slow(_message: Message) -> None:
        await release.wait()

    server.on(Channel.SERVER, "quit", slow)
    server.on(Channel.SERVER, "heartbeat", answer_beat)
    async with joined(client, server):
        waiting = asyncio.create_task(client.ask(SERVER, Channel.SERVER, "quit", Quit(), timeout_s=5))
        await beat(client)
        assert not waiting.done()
        release.set()
        assert (await waiting).return_code is ReturnCode.OK


async def test_no_more_than_a_bounded_number_of_one_peers_requests_are_worked_on() -> None:
    client, server = Cell(SITE), Cell(SERVER)
    release, all_done, running, most, done = asyncio.Event(), asyncio.Event(), 0, 0, 0

    async def slow(_message: Message) -> None:
        nonlocal running, most, done
        running += 1
        most = max(most, running)
        await release.wait()
        running, done = running - 1, done + 1
        if done == 2 * MAX_IN_FLIGHT:
            all_done.set()

    server.on(Channel.SERVER, "quit", slow)
    async with joined(client, server) as (link, _):
        payload = encode_payload((Channel.SERVER, "quit"), Quit())
        for number in range(2 * MAX_IN_FLIGHT):
            link.send_nowait(Frame(FrameKind.REQUEST, number + 1, SITE, SERVER, "server", "quit", {}, payload))
        for _ in range(1000):  # turns of the loop, many more than the frames need
            await asyncio.sleep(0)
        assert running == MAX_IN_FLIGHT
        release.set()
        await asyncio.wait_for(all_done.wait(), 5)
    assert most == MAX_IN_FLIGHT


async def test_who_asks_any_number_of_requests_at_once_still_answers_what_it_is_asked_in_their_course() -> None:
    client, server = Cell(SITE), Cell(SERVER)

    async def ask_back(_message: Message) -> None:
        await server.ask(SITE, Channel.JOB, "abort", AbortJob(JobId("j"), "no reason"), timeout_s=5)

    server.on(Channel.SERVER, "quit", ask_back)
    client.on(Channel.JOB, "abort", lambda _message: None)
    async with joined(client, server):
        asks = (client.ask(SERVER, Channel.SERVER, "quit", Quit(), timeout_s=5) for _ in range(2 * MAX_IN_FLIGHT))
        replies = await asyncio.gather(*asks)
    assert {reply.return_code for reply in replies} == {ReturnCode.OK}


async def test_a_request_that_waits_to_be_sent_waits_no_longer_than_asked_and_not_for_a_link_that_has_ended() -> None:
    client, server = Cell(SITE), Cell(SERVER)
    server.on(Channel.SERVER, "quit", lambda _message: asyncio.Event().wait())
    async with joined(client, server):
        asks = [
            asyncio.create_task(client.ask(SERVER, Channel.SERVER, "quit", Quit(), timeout_s=60))
            for _ in range(2 * MAX_ASKED)
        ]
        await asyncio.sleep(0)  # a turn of the loop, in which they ask
        with pytest.raises(TimedOut):
            await beat(client, timeout_s=0.05)
        client.drop(SERVER, Unreachable(SERVER, "it was dropped"))
        ended = await asyncio.wait_for(asyncio.gather(*asks, return_exceptions=True), 5)
        assert {type(error) for error in ended} == {Unreachable}
        await server.close()


@pytest.mark.parametrize(
    ("raised", "arrives"),
    [
        (Unauthenticated("who are you"), Unauthenticated),
        (NotInService(), NotInService),
        (NotFound("job", "j"), RemoteError),
        (Conflict("job j", state="running", wanted="started"), RemoteError),
        (StoreFailed("committing", "disk full"), RemoteFault),
    ],
)
@pytest.mark.parametrize("waits", [False, True])
async def test_an_error_that_a_handler_raises_is_raised_at_the_asker(
    raised: HanseError, arrives: type[HanseError], waits: bool
) -> None:
    client, server = Cell(SITE), Cell(SERVER)

    def now(_message: Message) -> Message:
        raise raised

    async def later(_message: Message) -> Message:
        await asyncio.sleep(0)
        raise raised

    server.on(Channel.SERVER, "heartbeat", later if waits else now)
    async with joined(client, server):
        with pytest.raises(arrives) as caught:
            await beat(client)
    assert type(caught.value) is arrives
    assert caught.value.reason == raised.reason


async def test_a_refusal_that_a_handler_returns_is_raised_at_the_asker() -> None:
    client, server = Cell(SITE), Cell(SERVER)
    server.on(Channel.SERVER, "heartbeat", lambda _: refusal(ReturnCode.ABORT_RUN, "Abort current run"))
    async with joined(client, server):
        with pytest.raises(RemoteError, match="Abort current run") as caught:
            await beat(client)
    assert caught.value.return_code is ReturnCode.ABORT_RUN


@pytest.mark.parametrize("waits", [False, True])
async def test_a_handler_that_crashes_is_an_internal_error_and_the_link_lives(
    waits: bool, caplog: pytest.LogCaptureFixture
) -> None:
    client, server = Cell(SITE), Cell(SERVER)

    def now(_message: Message) -> Message:
        raise KeyError("secret detail")

    async def later(_message: Message) -> Message:
        raise KeyError("secret detail")

    server.on(Channel.SERVER, "renew", later if waits else now)
    server.on(Channel.SERVER, "heartbeat", answer_beat)
    async with joined(client, server):
        with pytest.raises(RemoteError) as caught:
            await client.ask(SERVER, Channel.SERVER, "renew", Renew(), timeout_s=5)
        assert caught.value.return_code is ReturnCode.INTERNAL
        assert "secret detail" not in caught.value.reason
        await beat(client)
    assert "secret detail" in caplog.text


async def test_a_handler_that_answers_with_another_type_is_an_internal_error(caplog: pytest.LogCaptureFixture) -> None:
    client, server = Cell(SITE), Cell(SERVER)
    server.on(Channel.SERVER, "heartbeat", lambda _: ok(Quit()))
    async with joined(client, server):
        with pytest.raises(RemoteError) as caught:
            await beat(client)
    assert caught.value.return_code is ReturnCode.INTERNAL
    assert "expected HeartbeatReply" in caplog.text


async def test_who_is_not_linked_cannot_be_asked_or_told() -> None:
    client = Cell(SITE)
    with pytest.raises(Unreachable, match="cannot reach server: site-1 has no link to it"):
        await beat(client)
    with pytest.raises(Unreachable):
        client.tell(SERVER, Channel.SERVER, "heartbeat", Heartbeat())


async def test_an_answer_that_does_not_come_is_waited_for_no_longer_than_asked() -> None:
    client, server = Cell(SITE), Cell(SERVER)
    release = asyncio.Event()

    async def slow(_message: Message) -> Message:
        await release.wait()
        return ok(HeartbeatReply())

    server.on(Channel.SERVER, "heartbeat", slow)
    async with joined(client, server):
        with pytest.raises(TimedOut, match=r"server did not answer 'server/heartbeat' within 0\.01 s"):
            await beat(client, timeout_s=0.01)
        release.set()  # the late answer finds nobody, and does no harm
        await beat(client)


async def test_a_link_that_breaks_fails_who_waits_at_once() -> None:
    client, server = Cell(SITE), Cell(SERVER)
    asked = asyncio.Event()

    async def never(_message: Message) -> None:
        asked.set()
        await asyncio.get_running_loop().create_future()

    server.on(Channel.SERVER, "heartbeat", never)
    async with joined(client, server) as (to_server, _):
        waiting = asyncio.create_task(beat(client, timeout_s=60))
        await asked.wait()
        to_server.close_nowait(Unreachable("server", "cable pulled"))
        with pytest.raises(Unreachable, match="cable pulled"):
            await waiting
        await server.close()


async def test_a_topic_that_nobody_answers_is_an_invalid_request() -> None:
    client, server = Cell(SITE), Cell(SERVER)
    async with joined(client, server):
        with pytest.raises(RemoteError, match="expected one that server answers") as caught:
            await beat(client)
    assert caught.value.return_code is ReturnCode.INVALID_REQUEST


async def ask_raw(client: Cell, server: Cell, frame: Frame) -> Frame:
    """Send *frame* as it is, and return the first frame that comes back."""
    answer: asyncio.Future[Frame] = asyncio.get_running_loop().create_future()

    async def take(_link: object, arrived: Frame) -> None:
        answer.set_result(arrived)

    client.receive = take  # type: ignore[method-assign]
    async with joined(client, server) as (to_server, _):
        to_server.send_nowait(frame)
        async with asyncio.timeout(5):
            return await answer


@pytest.mark.parametrize(
    ("channel", "topic", "payload", "reason"),
    [
        ("server", "heartbeat", b"\xff", "Heartbeat"),
        ("server", "heartbeat", b"\x81\xa4jobs\x07", r"Heartbeat.jobs"),
        ("server", "nothing", b"", "server/nothing"),
        ("nowhere", "heartbeat", b"", "nowhere/heartbeat"),
    ],
)
async def test_a_bad_request_is_answered_with_the_field_that_is_wrong(
    channel: str, topic: str, payload: bytes, reason: str
) -> None:
    server = Cell(SERVER)
    server.on(Channel.SERVER, "heartbeat", answer_beat)
    frame = Frame(FrameKind.REQUEST, 9, SITE, SERVER, channel, topic, {}, payload)
    reply = await ask_raw(Cell(SITE), server, frame)
    assert (reply.kind, reply.id) == (FrameKind.REPLY, 9)
    assert reply.headers[Header.RETURN_CODE] == ReturnCode.INVALID_REQUEST
    assert reason in reply.headers[Header.REASON]


async def test_a_frame_that_opens_streams_has_no_place_on_an_open_one() -> None:
    client, server = Cell(SITE), Cell(SERVER)
    async with joined(client, server) as (to_server, to_client):
        to_server.send_nowait(Frame(FrameKind.HELLO, destination=SERVER))
        assert isinstance(await to_client.closed, ProtocolError)


async def test_who_sent_a_message_is_what_the_link_knows() -> None:
    client, server = Cell(SITE), Cell(SERVER)
    seen: list[Message] = []
    server.on(Channel.SERVER, "heartbeat", lambda message: seen.append(message) or answer_beat(message))
    known = Peer(SITE, "client", "memory", credentials=CREDENTIALS, role="lead")
    lies = dict.fromkeys((Header.ORIGIN, Header.CLIENT, Header.TOKEN, Header.TOKEN_SIGNATURE, Header.ROLE), "lie")
    async with joined(client, server, a_seen_as=known):
        await beat(client, headers={**lies, Header.SSID: "mine", "extra": "kept"})
    assert seen[0].headers == {
        Header.ORIGIN: "site-1",
        Header.CLIENT: "site-1",
        Header.TOKEN: "token",
        Header.TOKEN_SIGNATURE: "signature",
        Header.ROLE: "lead",
        Header.SSID: "mine",
        "extra": "kept",
    }


async def test_an_anonymous_peer_has_no_credentials_whatever_it_says() -> None:
    client, server = Cell(SITE), Cell(SERVER)
    seen: list[Message] = []
    server.on(Channel.SERVER, "heartbeat", lambda message: seen.append(message) or answer_beat(message))
    async with joined(client, server, a_seen_as=Peer(SITE, "anonymous", "memory", proven=False)) as (to_server, _):
        lies = {Header.TOKEN: "lie", Header.ROLE: "admin"}
        await client.ask(SERVER, Channel.SERVER, "heartbeat", Heartbeat(), timeout_s=5, headers=lies, link=to_server)
    assert seen[0].headers == {Header.ORIGIN: "site-1"}


async def test_headers_of_the_cell_go_out_with_each_request_and_event() -> None:
    client, server = Cell(SITE), Cell(SERVER)
    client.headers[Header.SSID] = "7"
    seen: list[str | None] = []
    server.on(Channel.SERVER, "heartbeat", lambda m: seen.append(m.get_header(Header.SSID)) or answer_beat(m))
    async with joined(client, server):
        client.tell(SERVER, Channel.SERVER, "heartbeat", Heartbeat())
        await beat(client)
    assert seen == ["7", "7"]


async def test_the_gate_decides_before_the_payload_is_looked_at() -> None:
    passed: list[tuple[Fqcn, Topic, object]] = []

    def gate(peer: Peer, topic: Topic, message: Message) -> None:
        passed.append((peer.fqcn, topic, message.payload))
        raise Unauthorized(peer.fqcn, "beat", needs="to be registered")

    server = Cell(SERVER, gate=gate)
    server.on(Channel.SERVER, "heartbeat", answer_beat)
    frame = Frame(FrameKind.REQUEST, 1, SITE, SERVER, "server", "heartbeat", {}, b"\xff\xff")
    reply = await ask_raw(Cell(SITE), server, frame)
    assert reply.headers[Header.RETURN_CODE] == ReturnCode.UNAUTHORIZED
    assert passed == [(SITE, (Channel.SERVER, "heartbeat"), None)]


async def test_a_gate_that_crashes_lets_nobody_through() -> None:
    def gate(_peer: Peer, _topic: Topic, _message: Message) -> None:
        raise ZeroDivisionError

    client, server = Cell(SITE), Cell(SERVER, gate=gate)
    server.on(Channel.SERVER, "heartbeat", answer_beat)
    async with joined(client, server):
        with pytest.raises(RemoteError) as caught:
            await beat(client)
    assert caught.value.return_code is ReturnCode.INTERNAL


async def test_a_handler_knows_which_peer_it_answers() -> None:
    client, server = Cell(SITE), Cell(SERVER)
    seen: list[Peer | None] = []

    async def later(_message: Message) -> None:
        await asyncio.sleep(0)
        seen.append(current_peer())

    server.on(Channel.SERVER, "heartbeat", lambda message: seen.append(current_peer()) or answer_beat(message))
    server.on(Channel.SERVER, "quit", later)
    async with joined(client, server) as (_, to_client):
        await beat(client)
        await client.ask(SERVER, Channel.SERVER, "quit", Quit(), timeout_s=5)
        assert seen == [to_client.peer, to_client.peer]
    assert current_peer() is None


async def test_events_of_one_peer_are_handled_one_after_the_other_in_their_order() -> None:
    client, server = Cell(SITE), Cell(SERVER)
    seen: list[str] = []
    done = asyncio.Event()

    async def goodbye(message: Message) -> None:
        assert isinstance(message.payload, Goodbye)
        seen.append(f"{message.payload.reason} begins")
        for _ in range(3):
            await asyncio.sleep(0)
        seen.append(f"{message.payload.reason} ends")

    def quit_(_message: Message) -> None:
        seen.append("quit")
        done.set()

    server.on(Channel.JOB, "goodbye", goodbye)
    server.on(Channel.SERVER, "quit", quit_)
    async with joined(client, server):
        client.tell(SERVER, Channel.JOB, "goodbye", Goodbye("one"))
        client.tell(SERVER, Channel.JOB, "goodbye", Goodbye("two"))
        client.tell(SERVER, Channel.SERVER, "quit", Quit())
        await done.wait()
    assert seen == ["one begins", "one ends", "two begins", "two ends", "quit"]


async def test_an_event_that_fails_is_logged_and_the_next_is_handled(caplog: pytest.LogCaptureFixture) -> None:
    client, server = Cell(SITE), Cell(SERVER)
    done = asyncio.Event()

    async def crashing(_message: Message) -> None:
        raise KeyError("bug")

    server.on(Channel.JOB, "goodbye", crashing)
    server.on(Channel.SERVER, "quit", lambda _: done.set())
    async with joined(client, server):
        client.tell(SERVER, Channel.SERVER, "renew", Renew())  # nobody answers that one
        client.tell(SERVER, Channel.JOB, "goodbye", Goodbye("one"))
        client.tell(SERVER, Channel.SERVER, "quit", Quit())
        await done.wait()
    assert "event refused" in caplog.text
    assert "KeyError" in caplog.text


async def test_only_the_cell_that_was_asked_can_answer() -> None:
    client, server, other = Cell(SITE), Cell(SERVER), Cell(Fqcn("site-2"))
    asked: asyncio.Future[Frame] = asyncio.get_running_loop().create_future()

    async def keep(_link: object, frame: Frame) -> None:
        asked.set_result(frame)

    server.receive = keep  # type: ignore[method-assign]
    async with joined(client, server) as (_, server_side), joined(other, client) as (forger, _client_side):
        waiting = asyncio.create_task(beat(client))
        request = await asked
        payload = encode_payload((Channel.SERVER, "heartbeat"), HeartbeatReply((JobId("forged"),)), reply=True)
        forged = Frame(FrameKind.REPLY, request.id, SERVER, SITE, "server", "heartbeat", {}, payload)
        forger.send_nowait(forged)
        honest = encode_payload((Channel.SERVER, "heartbeat"), HeartbeatReply((JobId("honest"),)), reply=True)
        other.on(Channel.SERVER, "heartbeat", answer_beat)
        await client.ask(Fqcn("site-2"), Channel.SERVER, "heartbeat", Heartbeat(), timeout_s=5)  # it has been read
        assert not waiting.done()
        server_side.send_nowait(Frame(FrameKind.REPLY, request.id, SERVER, SITE, "server", "heartbeat", {}, honest))
        assert (await waiting).payload == HeartbeatReply((JobId("honest"),))


async def test_an_answer_of_the_wrong_type_is_a_protocol_error_at_the_asker() -> None:
    client, server = Cell(SITE), Cell(SERVER)

    async def garble(link: object, frame: Frame) -> None:
        server_side.send_nowait(Frame(FrameKind.REPLY, frame.id, SERVER, SITE, "server", "heartbeat", {}, b"\x07"))

    server.receive = garble  # type: ignore[method-assign]
    async with joined(client, server) as (_, server_side):
        with pytest.raises(ProtocolError, match="HeartbeatReply"):
            await beat(client)


# Passing on


def hub(route: Callable[[Peer, Frame], None] | None) -> tuple[Cell, Cell, Cell]:
    one, server, two = Cell(SITE), Cell(SERVER, route=route), Cell(Fqcn("site-2"))
    two.on(Channel.SERVER, "heartbeat", answer_beat)
    return one, server, two


def the_server() -> Peer:
    return Peer(SERVER, "server", "memory", routes=True)


async def test_a_cell_passes_on_what_its_route_permits_and_brings_the_answer_back() -> None:
    one, server, two = hub(lambda _peer, _frame: None)
    seen: list[Message] = []
    two.on(Channel.SERVER, "heartbeat", lambda message: seen.append(message) or answer_beat(message))
    known = Peer(SITE, "client", "memory", credentials=CREDENTIALS, role="lead")
    async with (
        joined(one, server, a_seen_as=known, b_seen_as=the_server()),
        joined(two, server, b_seen_as=the_server()),
    ):
        reply = await one.ask(
            Fqcn("site-2"),
            Channel.SERVER,
            "heartbeat",
            Heartbeat(),
            timeout_s=5,
            headers={Header.ORIGIN: "lie", Header.ROLE: "lie", Header.TOKEN: "lie"},
        )
    assert reply.payload == HeartbeatReply((JobId("j"),))
    assert reply.get_header(Header.ORIGIN) == "site-2"
    assert seen[0].headers == {Header.ORIGIN: "site-1", Header.CLIENT: "site-1", Header.ROLE: "lead"}


@pytest.mark.parametrize("route", [None, "denies"])
async def test_a_cell_passes_on_nothing_else(route: str | None) -> None:
    def deny(peer: Peer, frame: Frame) -> None:
        raise Unauthorized(peer.fqcn, f"reach {frame.destination}", needs="a friend")

    one, server, two = hub(deny if route else None)
    async with joined(one, server, b_seen_as=the_server()), joined(two, server, b_seen_as=the_server()):
        with pytest.raises(RemoteError) as caught:
            await one.ask(Fqcn("site-2"), Channel.SERVER, "heartbeat", Heartbeat(), timeout_s=5)
    assert caught.value.return_code is ReturnCode.UNAUTHORIZED


async def test_who_cannot_be_reached_through_a_cell_is_a_comm_error() -> None:
    one, server, _ = hub(lambda _peer, _frame: None)
    async with joined(one, server, b_seen_as=the_server()):
        with pytest.raises(RemoteFault, match="cannot reach site-2: server has no link to it") as caught:
            await one.ask(Fqcn("site-2"), Channel.SERVER, "heartbeat", Heartbeat(), timeout_s=5)
    assert caught.value.return_code is ReturnCode.COMM_ERROR


async def test_replies_that_nobody_asked_for_are_not_passed_on() -> None:
    one, server, two = hub(lambda _peer, _frame: None)
    arrived: list[Frame] = []
    receive = two.receive

    async def watch(link: object, frame: Frame) -> None:
        arrived.append(frame)
        await receive(link, frame)  # type: ignore[arg-type]

    two.receive = watch  # type: ignore[method-assign]
    server.on(Channel.SERVER, "heartbeat", answer_beat)
    async with (
        joined(one, server, b_seen_as=the_server()) as (to_server, _),
        joined(two, server, b_seen_as=the_server()),
    ):
        to_server.send_nowait(Frame(FrameKind.REPLY, 1, SITE, Fqcn("site-2"), "server", "heartbeat"))
        await beat(one)
        await beat(two)
    assert [frame.origin for frame in arrived] == [SERVER]


# Links coming and going


async def test_a_newer_link_replaces_the_older_one_of_the_same_address() -> None:
    client, again, server = Cell(SITE), Cell(SITE), Cell(SERVER)
    history: list[str] = []
    server.on_link_up(lambda peer: history.append(f"up {peer.fqcn}"))
    server.on_link_down(lambda peer, reason: history.append(f"down {peer.fqcn}: {reason}"))
    async with joined(client, server) as (old, _), joined(again, server):
        ended = await old.closed
        assert "replaced by a newer one" in ended.reason
        assert not ended.retryable
        again.on(Channel.SERVER, "heartbeat", answer_beat)
        await server.ask(SITE, Channel.SERVER, "heartbeat", Heartbeat(), timeout_s=5)
        down = "down site-1: the stream of site-1 is replaced by a newer one, so it cannot be kept"
        assert history == ["up site-1", down, "up site-1"]


async def test_a_peer_that_has_not_proven_itself_cannot_take_anothers_place() -> None:
    client, impostor, server = Cell(SITE), Cell(SITE), Cell(SERVER)
    client.on(Channel.SERVER, "heartbeat", answer_beat)
    server.on(Channel.SERVER, "heartbeat", answer_beat)
    unproven = Peer(SITE, "anonymous", "memory", proven=False)
    async with joined(client, server) as (link, _), joined(impostor, server, a_seen_as=unproven):
        await beat(impostor)  # it can ask, and is answered
        await server.ask(SITE, Channel.SERVER, "heartbeat", Heartbeat(), timeout_s=5)  # the client's handler answers
        assert not link.closed.done()
        server.prove(unproven, kind="client", credentials=CREDENTIALS)
        assert "replaced" in (await link.closed).reason
        assert server.peer(SITE) is unproven
        assert server.peers() == [unproven]


async def test_a_peer_can_be_dropped_with_a_reason() -> None:
    client, server = Cell(SITE), Cell(SERVER)
    async with joined(client, server) as (to_server, _):
        server.drop(SITE, Unauthenticated("site-1 is disabled"))
        server.drop(Fqcn("nobody"), Unauthenticated("never mind"))
        assert isinstance(await to_server.closed, Unauthenticated)
        assert to_server.closed.result().reason == "site-1 is disabled"


async def test_a_hook_that_fails_hurts_nobody(caplog: pytest.LogCaptureFixture) -> None:
    client, server = Cell(SITE), Cell(SERVER)
    ups: list[str] = []

    def crashing(_peer: Peer) -> None:
        raise KeyError("hook")

    server.on_link_up(crashing)
    server.on_link_up(lambda peer: ups.append(peer.fqcn))
    server.on(Channel.SERVER, "heartbeat", answer_beat)
    async with joined(client, server):
        await beat(client)
    assert ups == ["site-1"]
    assert "hook of a link failed" in caplog.text


async def test_a_closed_cell_has_ended_its_handlers_and_links() -> None:
    client, server = Cell(SITE), Cell(SERVER)
    began, ended = asyncio.Event(), asyncio.Event()

    async def endless(_message: Message) -> None:
        began.set()
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            ended.set()

    server.on(Channel.SERVER, "heartbeat", endless)
    async with joined(client, server) as (to_server, to_client):
        waiting = asyncio.create_task(beat(client))
        await began.wait()
        await server.close()
        assert ended.is_set()
        assert to_client.closed.done()
        with pytest.raises(Unreachable):
            await waiting
        assert "it has closed" in (await to_server.closed).reason
        assert server.peers() == []
