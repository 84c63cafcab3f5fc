"""What is gathered, from real sockets."""

import asyncio
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trustme

from hanse.doctor import probes
from hanse.doctor.probes import MAX_PROXY_ANSWER_BYTES, Way
from hanse.doctor.route import Proxy

VERIFY_UNKNOWN_ISSUER, VERIFY_OTHER_HOST = 20, 62
SOON_S = 0.2
"""When what never answers is given up; nothing waits for this but what would wait for ever."""

Conversation = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def at(seconds: float = 30.0) -> float:
    return asyncio.get_running_loop().time() + seconds


@asynccontextmanager
async def listening(conversation: Conversation, tls: ssl.SSLContext | None = None) -> AsyncIterator[Way]:
    """Somebody who has this *conversation* with whoever comes, on loopback; who still talks at the end is cut off."""
    talks: set[asyncio.Task[None]] = set()

    def meet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        talks.add(asyncio.create_task(_talk(conversation, reader, writer)))

    server = await asyncio.start_server(meet, "127.0.0.1", 0, ssl=tls)
    try:
        place = server.sockets[0].getsockname()
        yield Way("localhost", place[1], ((socket.AF_INET, place),))
    finally:
        server.close()
        for talk in talks:
            talk.cancel()
        await asyncio.gather(*talks, return_exceptions=True)


async def _talk(conversation: Conversation, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        await conversation(reader, writer)
    except OSError:  # the other side had enough
        return
    finally:
        writer.transport.abort()
        with suppress(OSError):
            await writer.wait_closed()


async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    del writer
    while await reader.read(1024):
        pass


async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    del reader, writer


async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))  # HTTP/2's empty settings
    await say_nothing(reader, writer)


# Names ----------------------------------------------------------------------------------------------------------------


async def test_a_name_has_its_addresses() -> None:
    addresses, problem = await probes.addresses_of("localhost", 6007, at())

    assert problem == ""
    assert {"127.0.0.1", "::1"} >= {probes.in_words(address) for address in addresses} != set()


async def test_an_address_in_brackets_is_one() -> None:
    assert await probes.addresses_of("[::1]", 6007, at()) == (((socket.AF_INET6, ("::1", 6007, 0, 0)),), "")


@pytest.mark.parametrize("name", ["no-such-host.invalid", "a..b", "x" * 70])
async def test_a_name_that_has_no_addresses_says_why(name: str) -> None:
    addresses, problem = await probes.addresses_of(name, 6007, at())

    assert addresses == ()
    assert problem


async def test_a_resolver_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    answer, answered = threading.Event(), threading.Event()

    def stuck(*_: object, **__: object) -> list[Any]:
        answer.wait(60)
        answered.set()
        return []

    monkeypatch.setattr(socket, "getaddrinfo", stuck)
    try:
        assert await probes.addresses_of("fl.example.org", 6007, at(SOON_S)) == ((), "no answer in time")
    finally:
        answer.set()
    assert answered.wait(60)


async def test_an_answer_that_comes_too_late_goes_nowhere() -> None:
    may_end, ended = threading.Event(), threading.Event()

    def work() -> None:
        may_end.wait(60)
        ended.set()
        raise ValueError("nobody hears of this")

    with pytest.raises(TimeoutError):
        await probes.answer_of(work, at(SOON_S), name="late")
    may_end.set()
    assert await asyncio.to_thread(ended.wait, 60)


async def test_what_the_work_raises_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        await probes.answer_of(lambda: 1 // 0, at(), name="work")


# Ports ----------------------------------------------------------------------------------------------------------------


def closed_port() -> tuple[socket.AddressFamily, tuple[str, int]]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return socket.AF_INET, taken.getsockname()


async def test_each_address_is_tried() -> None:
    closed = closed_port()
    other = (socket.AF_INET, ("127.0.0.2", closed[1][1]))
    async with listening(say_nothing) as way:
        facts = await probes.connections_to(Way("localhost", way.port, (*way.addresses, other)), at())

    assert facts.opened == ("127.0.0.1",)
    assert facts.failed == {"127.0.0.2": "connection refused"}


async def test_a_full_backlog_is_no_answer() -> None:
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        place = full.getsockname()
        waiting = [socket.socket() for _ in range(4)]
        try:
            for one in waiting:
                one.setblocking(False)
                one.connect_ex(place)
            facts = await probes.connections_to(Way("localhost", place[1], ((socket.AF_INET, place),)), at(SOON_S))
        finally:
            for one in waiting:
                one.close()

    assert facts.failed == {"127.0.0.1": "no answer in time"}


# TLS ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def tls_of(authority: trustme.CA, *hosts: str, protocols: tuple[str, ...] = ("h2",)) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert(*hosts).configure_cert(context)
    context.set_alpn_protocols(list(protocols))
    return context


async def shown(way: Way, authority: trustme.CA, *, own: tuple[Path, Path] | None = None, seconds: float = 30.0) -> Any:
    return await probes.handshake_with(way, roots=authority.cert_pem.bytes(), own=own, deadline=at(seconds))


async def test_a_handshake_shows_certificate_and_version(authority: trustme.CA) -> None:
    async with listening(greet, tls_of(authority, "localhost")) as way:
        handshake = await shown(way, authority)

    assert (handshake.version, handshake.is_http2) == ("TLSv1.3", True)
    assert handshake.certificate is not None
    assert (handshake.distrust, handshake.refusal, handshake.failure) == (0, "", "")


async def test_a_certificate_that_is_not_trusted_is_shown_all_the_same(authority: trustme.CA) -> None:
    async with listening(greet, tls_of(trustme.CA(), "localhost")) as way:
        handshake = await shown(way, authority)

    assert handshake.distrust == VERIFY_UNKNOWN_ISSUER
    assert handshake.words
    assert handshake.certificate is not None
    assert handshake.failure == ""


async def test_a_certificate_for_another_host_is_not_trusted(authority: trustme.CA) -> None:
    async with listening(greet, tls_of(authority, "elsewhere.example")) as way:
        assert (await shown(way, authority)).distrust == VERIFY_OTHER_HOST


async def test_a_server_that_takes_no_stranger_closes_after_the_handshake(authority: trustme.CA) -> None:
    demanding = tls_of(authority, "localhost")
    demanding.verify_mode = ssl.CERT_REQUIRED
    authority.configure_trust(demanding)
    async with listening(greet, demanding) as way:
        handshake = await shown(way, authority)

    assert handshake.certificate is not None
    assert handshake.refusal


async def test_a_server_that_hangs_up_has_refused(authority: trustme.CA) -> None:
    async with listening(hang_up, tls_of(authority, "localhost")) as way:
        assert (await shown(way, authority)).refusal in ("it closed the connection", "connection reset by peer")


async def test_a_server_without_http2_is_seen_to_be_that(authority: trustme.CA) -> None:
    async with listening(greet, tls_of(authority, "localhost", protocols=())) as way:
        assert not (await shown(way, authority)).is_http2


async def test_who_never_answers_a_handshake_is_not_waited_for(authority: trustme.CA) -> None:
    async with listening(say_nothing) as way:
        assert (await shown(way, authority, seconds=SOON_S)).failure == "no answer in time"


async def test_who_never_speaks_after_the_handshake_is_not_waited_for(authority: trustme.CA) -> None:
    async with listening(say_nothing, tls_of(authority, "localhost")) as way:
        assert (await shown(way, authority, seconds=1.0)).refusal == "no answer in time"


async def test_plain_http_is_no_tls(authority: trustme.CA) -> None:
    async def plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
        await say_nothing(reader, writer)

    async with listening(plain) as way:
        assert "wrong version number" in (await shown(way, authority)).failure


async def test_a_way_without_an_address_leads_nowhere(authority: trustme.CA) -> None:
    assert (await shown(Way("localhost", 1), authority)).failure == "there is no address to connect to"


async def test_what_a_port_shows_is_its_certificate_or_that_it_is_open(authority: trustme.CA) -> None:
    async with listening(greet, tls_of(authority, "localhost")) as way:
        certificate = (await shown(way, authority)).certificate
        assert certificate is not None
        assert await probes.shown_at(way, tls=True, deadline=at()) == certificate.public_bytes(
            probes.serialization.Encoding.DER
        )
        assert await probes.shown_at(way, tls=False, deadline=at()) == b""
    assert await probes.shown_at(way, tls=True, deadline=at()) is None
    assert await probes.shown_at(way, tls=False, deadline=at()) is None


# Through a proxy ------------------------------------------------------------------------------------------------------


def proxied(way: Way, at_proxy: Way, credentials: str = "") -> Way:
    proxy = Proxy("https_proxy", "127.0.0.1", at_proxy.port, credentials)
    return Way(way.host, way.port, at_proxy.addresses, proxy)


async def test_a_proxy_is_asked_for_a_tunnel_with_the_credentials_that_it_wants(authority: trustme.CA) -> None:
    requests: list[bytes] = []
    async with listening(greet, tls_of(authority, "localhost")) as way:

        async def tunnel(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            requests.append(await reader.readuntil(b"\r\n\r\n"))
            writer.write(b"HTTP/1.1 200 Connection established\r\nVia: a proxy\r\n\r\n")
            back_reader, back_writer = await asyncio.open_connection("127.0.0.1", way.port)
            try:
                await asyncio.gather(pump(reader, back_writer), pump(back_reader, writer))
            finally:
                back_writer.transport.abort()

        async with listening(tunnel) as at_proxy:
            handshake = await shown(proxied(way, at_proxy, "ada:secret"), authority)

    assert (handshake.failure, handshake.distrust, handshake.refusal) == ("", 0, "")
    assert requests == [
        f"CONNECT localhost:{way.port} HTTP/1.1\r\nHost: localhost:{way.port}\r\n"
        "Proxy-Authorization: Basic YWRhOnNlY3JldA==\r\n\r\n".encode()
    ]


async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    while data := await source.read(65536):
        sink.write(data)
        await sink.drain()


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (
            b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n",
            "answered 'HTTP/1.1 407 Proxy Authentication Required'",
        ),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "answered 'SSH-2.0-OpenSSH'"),
        (b"", "the proxy closed the connection"),
        (b"x" * (MAX_PROXY_ANSWER_BYTES + 1), "answered 'xxx"),
    ],
)
async def test_a_proxy_that_makes_no_tunnel_says_why(answer: bytes, why: str) -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.write_eof()
        await say_nothing(reader, writer)

    async with listening(refuse) as at_proxy:
        facts = await probes.connections_to(proxied(Way("localhost", 1), at_proxy), at())

    assert facts.opened == ()
    assert why in facts.failed["127.0.0.1"]


# Listening ------------------------------------------------------------------------------------------------------------


async def test_a_free_address_could_be_listened_on_and_still_can() -> None:
    _, (_, port) = closed_port()

    assert await probes.listening_problem(f"127.0.0.1:{port}", at()) is None
    with socket.create_server(("127.0.0.1", port)):
        assert isinstance(await probes.listening_problem(f"127.0.0.1:{port}", at()), OSError)
    assert await probes.listening_problem("127.0.0.1:0", at()) is None


async def test_a_name_of_which_one_address_is_no_use_here_can_be_listened_on(monkeypatch: pytest.MonkeyPatch) -> None:
    no_family = (socket.AddressFamily.AF_APPLETALK, ("::1", 0))
    places: list[probes.Address] = [(socket.AF_INET, ("192.0.2.1", 0)), no_family, (socket.AF_INET, ("127.0.0.1", 0))]

    async def found(*_: object) -> tuple[tuple[probes.Address, ...], str]:
        return tuple(places), ""

    monkeypatch.setattr(probes, "addresses_of", found)
    assert await probes.listening_problem("localhost:6007", at()) is None
    places.pop()
    assert isinstance(await probes.listening_problem("localhost:6007", at()), OSError)


async def test_an_address_of_another_machine_cannot_be_listened_on() -> None:
    assert isinstance(await probes.listening_problem("192.0.2.1:6007", at()), OSError)


@pytest.mark.parametrize("target", ["no-such-host.invalid:6007", "6007", "a..b:1"])
async def test_what_is_no_address_cannot_be_listened_on(target: str) -> None:
    assert f"target is '{target}'" in str(await probes.listening_problem(target, at()))
