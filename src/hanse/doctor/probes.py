"""What gathers facts from the network: names, sockets, TLS, and a stream that is opened and closed again.

Each takes a *deadline* by the event loop's clock and is over by then, whatever the other side does. What goes wrong is
part of the facts.
"""

import asyncio
import base64
import errno
import functools
import os
import socket
import ssl
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeAlias, TypeVar

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from hanse.cell.cell import Cell
from hanse.cell.connector import GrpcDial
from hanse.cell.handshake import say_hello
from hanse.cell.link import Peer, Pipe, StreamLink
from hanse.cell.listener import split_target
from hanse.cell.rpc import ClientTls
from hanse.client.registration import Registrant
from hanse.doctor.route import Handshake, PortFacts, Proxy
from hanse.doctor.service import Answer, ClockReading
from hanse.errors import ConfigError, HanseError, TimedOut
from hanse.identity.certificates import Identity
from hanse.ids import SERVER, Fqcn
from hanse.messages import Hello, Welcome

Address: TypeAlias = tuple[socket.AddressFamily, Any]
"""A family, and a socket's address of that."""

T = TypeVar("T")

MAX_PROXY_ANSWER_BYTES: Final = 8192

_HTTP2_OPENING: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""What a client of HTTP/2 says first: its preface, and a SETTINGS frame without settings (RFC 9113, section 3.4)."""


@dataclass(frozen=True, slots=True)
class Way:
    """How a server is dialled: at *addresses*, which are its own, or its *proxy*'s, which is asked for a tunnel."""

    host: str
    port: int
    addresses: tuple[Address, ...] = ()
    proxy: Proxy | None = None


async def answer_of(work: Callable[[], T], deadline: float, *, name: str) -> T:
    """Return what *work* returns, done in a thread called *name*.

    Not in an executor's: *work* may take as long as it likes after the deadline, and a process that ends waits for
    executors.

    Raises:
        TimeoutError: it has not returned in time.
        Exception: what *work* raises.
    """
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[T] = loop.create_future()

    def settle(give: Callable[[], None]) -> None:
        if not answer.done():
            give()

    def run() -> None:
        try:
            value = work()
            give = functools.partial(answer.set_result, value)
        except Exception as error:  # noqa: BLE001 - it is raised where it is waited for
            give = functools.partial(answer.set_exception, error)
        with suppress(RuntimeError):  # nobody waits any more, and the loop has gone
            loop.call_soon_threadsafe(settle, give)

    threading.Thread(target=run, name=name, daemon=True).start()
    async with asyncio.timeout_at(deadline):
        return await answer


async def addresses_of(host: str, port: int, deadline: float) -> tuple[tuple[Address, ...], str]:
    """Return the addresses of *host*, and in words why there are none."""
    try:
        found = await answer_of(
            lambda: socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM),
            deadline,
            name=f"addresses of {host}",
        )
    except (OSError, UnicodeError) as error:
        return (), _why(error)
    return tuple(dict.fromkeys((family, address) for family, _, _, _, address in found)), ""


def in_words(address: Address) -> str:
    """Return *address* without its port."""
    return str(address[1][0])


async def connections_to(way: Way, deadline: float) -> PortFacts:
    """Return at which of the addresses somebody accepts a connection."""

    async def attempt(address: Address) -> str:
        try:
            (await _connected(way, address, deadline)).close()
        except OSError as error:
            return _why(error)
        return ""

    outcomes = await asyncio.gather(*(attempt(address) for address in way.addresses))
    tried = dict(zip(map(in_words, way.addresses), outcomes, strict=True))
    return PortFacts(
        tuple(name for name, why in tried.items() if not why), {name: why for name, why in tried.items() if why}
    )


async def handshake_with(way: Way, *, roots: bytes, own: tuple[Path, Path] | None, deadline: float) -> Handshake:
    """Return what TLS shows, checked against *roots* (PEM), with the certificate and key in the files *own*."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=roots.decode("ascii", errors="replace"))
    if own is not None:
        context.load_cert_chain(*own)
    try:
        return await _handshake(way, context, deadline)
    except ssl.SSLCertVerificationError as error:
        seen = await certificate_at(way, deadline)
        return replace(seen, distrust=error.verify_code, words=error.verify_message)
    except OSError as error:
        return Handshake(failure=_why(error))


async def certificate_at(way: Way, deadline: float) -> Handshake:
    """Return what TLS shows to whoever comes, believing nothing of it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        return replace(await _handshake(way, context, deadline), refusal="")
    except OSError as error:
        return Handshake(failure=_why(error))


async def greeting_of(
    target: str,
    *,
    hello: Hello,
    tls: ClientTls | None,
    registrant: Registrant,
    wall: Callable[[], float],
    deadline: float,
) -> Answer:
    """Return what a server answers to *hello* and to a challenge; nobody is registered by that."""
    loop = asyncio.get_running_loop()
    began, answer = loop.time(), Answer()
    try:
        async with asyncio.timeout_at(deadline):
            pipe = await GrpcDial(tls)(target)
            try:
                before = wall()
                welcome = await say_hello(pipe, hello)
                answer = Answer(welcome, clock=_reading(before, welcome, wall()))
                if registrant.identity is not None:
                    await _challenge(pipe, target, hello.fqcn, registrant, registrant.identity)
                return replace(answer, is_proven=registrant.identity is not None)
            finally:
                await pipe.close()
    except HanseError as error:
        return replace(answer, doubt=error) if answer.welcome else replace(answer, refusal=error)
    except TimeoutError:
        late = TimedOut(target, "hello" if answer.welcome is None else "challenge", round(loop.time() - began, 1))
        return replace(answer, doubt=late) if answer.welcome else replace(answer, refusal=late)


async def shown_at(way: Way, *, tls: bool, deadline: float) -> bytes | None:
    """Return the certificate (DER) that the port shows, empty without *tls*; ``None`` where nobody answers."""
    if not tls:
        return b"" if (await connections_to(way, deadline)).opened else None
    certificate = (await certificate_at(way, deadline)).certificate
    return None if certificate is None else certificate.public_bytes(serialization.Encoding.DER)


async def listening_problem(target: str, deadline: float) -> OSError | HanseError | None:
    """Return why *target* could not be listened on; ``None``: it could. Nothing listens there by this."""
    try:
        host, port = split_target(target)
    except HanseError as error:
        return error
    places, problem = await addresses_of(host, port, deadline)
    if problem:
        return ConfigError("target", got=target, expected=f"an address of this machine ({problem})")
    problems = [_binding_problem(*place) for place in places]
    found = [problem for problem in problems if problem is not None]
    if len(found) < len(problems):  # gRPC takes those that are this machine's: a name may have one of no use here
        found = [problem for problem in found if problem.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)]
    return next(iter(found), None)


def _binding_problem(family: socket.AddressFamily, address: Any) -> OSError | None:
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as gRPC does
            probe.bind(address)
    except OSError as error:
        return error
    return None


def _reading(before: float, welcome: Welcome, after: float) -> ClockReading | None:
    return ClockReading(before, welcome.sent_at, after) if welcome.sent_at else None


async def _challenge(pipe: Pipe, target: str, fqcn: Fqcn, registrant: Registrant, identity: Identity) -> None:
    """Return when the server at the other end of *pipe* has proven itself.

    Raises:
        HanseError: it has not.
    """
    cell = Cell(fqcn)
    link = StreamLink(Peer(SERVER, "server", "mtls", proven=False, routes=True), pipe)
    cell.attach(link)
    reading = asyncio.create_task(link.run(cell.receive), name=f"link to {target}")  # awaited below
    try:
        await registrant.identify(identity, cell, link)
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        await cell.close()


async def _connected(way: Way, address: Address, deadline: float) -> socket.socket:
    """Return a connection to the server by *address*, through the proxy if there is one.

    Raises:
        OSError: there is none, in time.
    """
    family, place = address
    connection = socket.socket(family, socket.SOCK_STREAM)
    connection.setblocking(False)
    try:
        async with asyncio.timeout_at(deadline):
            await asyncio.get_running_loop().sock_connect(connection, place)
            if way.proxy is not None:
                await _tunnel(connection, way, way.proxy)
    except BaseException:
        connection.close()
        raise
    return connection


async def _tunnel(connection: socket.socket, way: Way, proxy: Proxy) -> None:
    """Have the *proxy* at the other end of *connection* pass on what follows to the server."""
    loop = asyncio.get_running_loop()
    lines = [f"CONNECT {way.host}:{way.port} HTTP/1.1", f"Host: {way.host}:{way.port}"]
    if proxy.credentials:
        lines.append(f"Proxy-Authorization: Basic {base64.b64encode(proxy.credentials.encode()).decode()}")
    await loop.sock_sendall(connection, "".join(f"{line}\r\n" for line in (*lines, "")).encode())
    answer = b""
    while b"\r\n\r\n" not in answer and len(answer) < MAX_PROXY_ANSWER_BYTES:
        more = await loop.sock_recv(connection, 1)  # not a byte of what comes after the answer
        if not more:
            raise ConnectionError("the proxy closed the connection")
        answer += more
    status = answer.partition(b"\r\n")[0].decode(errors="replace")
    if status.split(" ")[1:2] != ["200"]:
        raise ConnectionError(f"the proxy answered {status!r}")


async def _handshake(way: Way, context: ssl.SSLContext, deadline: float) -> Handshake:
    """Return what TLS and the first word of HTTP/2 show.

    Raises:
        OSError: there was no handshake, in time; ``SSLCertVerificationError`` because of the certificate.
    """
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["h2"])
    connection = await _first_connected(way, deadline)
    try:
        async with asyncio.timeout_at(deadline):
            reader, writer = await asyncio.open_connection(
                sock=connection, ssl=context, server_hostname=way.host.strip("[]")
            )
    except BaseException:
        connection.close()
        raise
    try:
        shown = _shown(writer.get_extra_info("ssl_object"))
        writer.write(_HTTP2_OPENING)
        return replace(shown, refusal=await _refusal(reader, deadline))
    finally:
        writer.transport.abort()
        with suppress(OSError):
            await writer.wait_closed()


async def _first_connected(way: Way, deadline: float) -> socket.socket:
    problem: OSError = ConnectionError("there is no address to connect to")
    for address in way.addresses:
        try:
            return await _connected(way, address, deadline)
        except OSError as error:
            problem = error
    raise problem


def _shown(tls: ssl.SSLObject) -> Handshake:
    der = tls.getpeercert(binary_form=True)
    certificate = x509.load_der_x509_certificate(der) if der else None
    return Handshake(certificate, tls.version() or "", tls.selected_alpn_protocol() == "h2")


async def _refusal(reader: asyncio.StreamReader, deadline: float) -> str:
    """Return how the server ends the connection, empty when it goes on: it then says its settings at once."""
    try:
        async with asyncio.timeout_at(deadline):
            return "" if await reader.read(1) else "it closed the connection"
    except OSError as error:
        return _why(error)


def _why(error: OSError | UnicodeError) -> str:
    """Return *error* in a few words, without what it is about."""
    if isinstance(error, UnicodeError):
        return "it cannot be a host's name"
    if isinstance(error, ssl.SSLError) and error.reason:
        return error.reason.replace("_", " ").lower()
    if isinstance(error, socket.gaierror) or error.errno is None:
        in_time = "no answer in time" if isinstance(error, TimeoutError) else ""
        return in_time or error.strerror or str(error) or type(error).__name__
    return os.strerror(error.errno).lower()  # asyncio puts other words, and the address, in the error's own
