"""The one port: a gRPC server for streams and tensors, with the standard health service and reflection beside them.

Streams go to a ``Reception``, tensor calls to a ``TransferService``; here is only what is gRPC's: the port, TLS, what
the connection says of the caller, and the end. A Unix socket, for cells of the same machine and user, is served too.
"""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from hanse.cell.handshake import Reception
from hanse.cell.link import PeerCertificate, Transport
from hanse.cell.loop import end_first
from hanse.cell.rpc import SERVER_OPTIONS, SERVICE, ServerTls, status_of
from hanse.cell.transfer_service import Scopes, Stays, TransferService
from hanse.errors import ConfigError, NotInService, Unreachable


class Listener:
    """Serves *reception*'s cell on *target* (``host:port``; an IPv6 host in brackets; port 0 picks a free one).

    Without *tls* all can be read and changed on the way: loopback and tests only. ``start`` once, ``stop`` once.
    """

    def __init__(
        self,
        reception: Reception,
        *,
        scopes: Scopes,
        stays: Stays | None = None,
        tls: ServerTls | None,
        target: str,
        unix_path: Path | None = None,
    ) -> None:
        self._reception, self._scopes, self._stays, self._tls = reception, scopes, stays, tls
        self._target, self._unix_path = target, unix_path
        self._server: grpc.aio.Server | None = None
        self._serving: asyncio.Task[None] | None = None
        self._health = HealthServicer()

    async def start(self) -> str:
        """Listen, and return ``host:port`` as bound.

        Raises:
            ConfigError: the target cannot be listened on; it names it.
        """
        host, _ = split_target(self._target)
        server = grpc.aio.server(options=SERVER_OPTIONS)
        transfers = TransferService(
            authorize=self._reception.authorize, identify=_caller, scopes=self._scopes, stays=self._stays
        )
        server.add_generic_rpc_handlers((self._handlers(transfers),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection(
            (SERVICE, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name), server
        )
        port = _bind(self._target, lambda: self._add_port(server))
        if self._unix_path is not None:
            self._unix_path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            _bind(f"unix:{self._unix_path}", lambda: server.add_insecure_port(f"unix:{self._unix_path}"))
        await server.start()
        if self._unix_path is not None:
            self._unix_path.chmod(0o600)
        await self._health.set("", health_pb2.HealthCheckResponse.SERVING)
        self._server = server
        self._serving = asyncio.create_task(_serve(server), name=f"port {port}")  # awaited by stop()
        end_first(self._serving)
        return f"{host}:{port}"

    async def stop(self, grace_s: float = 1.0) -> None:
        """Let nobody in any more, tell every stream's peer, and let go of the port after at most *grace_s* seconds."""
        server, self._server = self._server, None
        if server is None or self._serving is None:
            return
        await self._health.enter_graceful_shutdown()
        await self._reception.close(NotInService("the server is stopping"))
        await server.stop(grace_s)
        await self._serving

    def _add_port(self, server: grpc.aio.Server) -> int:
        if self._tls is None:
            return int(server.add_insecure_port(self._target))
        return int(server.add_secure_port(self._target, self._tls.credentials()))

    def _handlers(self, transfers: TransferService) -> grpc.GenericRpcHandler:
        # Without serializers: messages are bytes here, so that bad ones get an answer with a reason.
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Connect": grpc.stream_stream_rpc_method_handler(self._connect),
                "Missing": grpc.unary_unary_rpc_method_handler(transfers.missing),
                "Download": grpc.unary_stream_rpc_method_handler(transfers.download),
                "Upload": grpc.stream_stream_rpc_method_handler(transfers.upload),
            },
        )

    async def _connect(self, _requests: object, context: grpc.aio.ServicerContext) -> None:
        error = await self._reception.serve(_ServerPipe(context), *_caller(context))
        code, reason, metadata = status_of(error)
        await context.abort(code, reason, metadata)


async def _serve(server: grpc.aio.Server) -> None:
    """Wait for the end of *server*; cancelled (the loop winds up and nobody stopped it), end it."""
    try:
        await server.wait_for_termination()
    except asyncio.CancelledError:
        await server.stop(None)
        raise


class _ServerPipe:
    """A stream as the port has it; it is closed by the handler's return."""

    def __init__(self, context: grpc.aio.ServicerContext) -> None:
        self._context = context

    async def read(self) -> bytes | None:
        with _translated():
            data = await self._context.read()
            return None if data is grpc.aio.EOF else data

    async def write(self, data: bytes) -> None:
        with _translated():
            await self._context.write(data)

    async def finish(self) -> bool:
        return False

    async def close(self) -> None:
        pass


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except (grpc.aio.BaseError, asyncio.InvalidStateError) as error:
        raise Unreachable("the peer", "the connection broke") from error


def split_target(target: str) -> tuple[str, int]:
    """Return host and port of ``host:port``; an IPv6 host keeps its brackets.

    Raises:
        ConfigError: *target* is something else.
    """
    host, colon, port = target.rpartition(":")
    is_bracketed = host.startswith("[") and host.endswith("]")
    if not colon or not host or (":" in host and not is_bracketed) or not port.isdecimal() or int(port) > 65535:
        raise ConfigError("target", got=target, expected="host:port, with an IPv6 host in brackets")
    return host, int(port)


def _bind(target: str, add: Callable[[], int]) -> int:
    try:
        port = add()
    except RuntimeError as error:
        raise ConfigError(
            "target", got=target, expected=f"an address that is free on this machine ({error})"
        ) from error
    if port == 0:
        raise ConfigError("target", got=target, expected="an address that is free on this machine")
    return port


def _caller(context: grpc.aio.ServicerContext) -> tuple[PeerCertificate | None, Transport]:
    """Return what the connection says of its caller: the certificate that TLS verified, and how it came."""
    if context.peer().startswith("unix:"):
        return None, "unix"
    told = context.auth_context()
    if "transport_security_type" not in told:
        return None, "plain"
    name, pem = (next(iter(told.get(key, ())), b"") for key in ("x509_common_name", "x509_pem_cert"))
    return (PeerCertificate(name.decode(errors="replace"), pem), "mtls") if pem else (None, "tls")
