"""A client behind a proxy that ends TLS: identity is proven by challenge and registration, end to end."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import pytest
import trustme
from benchmarks.deployment import Deployment, deployment

from tests.e2e.loop import on_the_loop

JOB = Path(__file__).parent / "job"


class TlsEndingProxy:
    """Ends the TLS of whoever connects, and opens TLS of its own, without a certificate, to the server behind it."""

    def __init__(self, backend_port: int, backend_roots: Path, certificate: trustme.LeafCert) -> None:
        self._port = backend_port
        self._outer = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        certificate.configure_cert(self._outer)
        self._outer.set_alpn_protocols(["h2"])
        self._inner = ssl.create_default_context(cafile=str(backend_roots))
        self._inner.set_alpn_protocols(["h2"])
        self._pipes: set[asyncio.Task[None]] = set()
        self.connections = 0

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[int]:
        """Listen while the block lasts; gives the port."""
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0, ssl=self._outer)
        try:
            yield server.sockets[0].getsockname()[1]
        finally:
            server.close()
            for pipe in list(self._pipes):
                pipe.cancel()
            await asyncio.gather(*self._pipes, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            back_reader, back_writer = await asyncio.open_connection(
                "127.0.0.1", self._port, ssl=self._inner, server_hostname="localhost"
            )
        except OSError:  # the server is not up yet
            writer.transport.abort()
            return
        for source, sink in ((reader, back_writer), (back_reader, writer)):
            pipe = asyncio.create_task(_pump(source, sink), name="pump")
            self._pipes.add(pipe)
            pipe.add_done_callback(self._pipes.discard)


async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        try:
            while data := await source.read(65536):
                sink.write(data)
                await sink.drain()
        finally:
            sink.close()


@pytest.fixture
def behind_proxy() -> Iterator[tuple[Deployment, TlsEndingProxy]]:
    """A deployment whose clients know only the proxy and its authority; the server asks TLS for no certificate."""
    authority = trustme.CA()
    with ExitStack() as stack:
        running = stack.enter_context(deployment(settings="settings = { client_certificates = false }"))
        proxy = TlsEndingProxy(running.port, running.kit("site-1") / "ca.pem", authority.issue_cert("localhost"))
        proxy_port = stack.enter_context(on_the_loop(proxy.serving()))
        for name in running.names:
            running.configure(name, tls_roots="proxy.pem", servers=[f"localhost:{proxy_port}"])
            authority.cert_pem.write_to_path(str(running.kit(name) / "proxy.pem"))
        running.start("server", *running.names)
        yield running, proxy


def test_clients_behind_a_proxy_that_ends_tls_register_and_run_a_job(
    behind_proxy: tuple[Deployment, TlsEndingProxy],
) -> None:
    running, proxy = behind_proxy
    ended = running.run(JOB)
    assert ended["round"] == 4
    assert proxy.connections >= 4, "agents, jobs' processes and their tensors all went through the proxy"
