"""``BaseServer``: manages the clients and the listening endpoint, and knows nothing yet of identities and jobs."""

import argparse
import asyncio
import logging
import math
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from hanse.cell.cell import Cell
from hanse.cell.handshake import Reception
from hanse.cell.link import Peer, PeerCertificate, Transport
from hanse.cell.listener import Listener
from hanse.cell.loop import run
from hanse.coordination.policy import PeerKind
from hanse.coordination.registry import Registry
from hanse.errors import Conflict, HanseError, Unauthorized
from hanse.events import FLComponent, Handlers
from hanse.ids import SERVER, Fqcn, Token
from hanse.messages import Channel, Client, Goodbye, Hello
from hanse.server.lifetime import Life
from hanse.server.listening import Place, is_loopback, place, server_tls
from hanse.storage.tensors import TensorFiles

_log = logging.getLogger(__name__)


class AdminServer:
    """What a server tells its admin server; the default takes no notice."""

    def client_heartbeat(self, client: Client) -> None:
        """Hear that *client* is alive."""
        del client

    def client_dead(self, client: Client) -> None:
        """Hear that *client* was removed."""
        del client


class BaseServer(ABC):
    """Manages the clients and the listening endpoint.

    ``min_num_clients`` and ``max_num_clients`` bound how many may be registered, ``heart_beat_timeout`` is in seconds,
    and ``shutdown_period`` is how long an orderly shutdown waits for clients.

    Raises:
        ValueError: not ``1 <= min_num_clients <= max_num_clients``.
    """

    clock: Callable[[], float] = staticmethod(time.monotonic)
    """The monotonic clock, in seconds; a test may set its own before anything registers."""
    wall: Callable[[], float] = staticmethod(time.time)
    """The time of day in POSIX seconds, by which tokens and certificates end; a test may set its own."""

    def __init__(
        self,
        project_name: str | None = None,
        min_num_clients: int = 2,
        max_num_clients: int = 10,
        heart_beat_timeout: float = 600,
        handlers: list[FLComponent] | None = None,
        shutdown_period: float = 30.0,
    ) -> None:
        if not 1 <= min_num_clients <= max_num_clients:
            raise ValueError(
                f"min_num_clients is {min_num_clients} and max_num_clients {max_num_clients}; "
                "expected 1 <= min_num_clients <= max_num_clients"
            )
        self.project_name = project_name or ""
        self.min_num_clients = min_num_clients
        self.max_num_clients = max_num_clients
        self.heart_beat_timeout = heart_beat_timeout
        self.shutdown_period = shutdown_period
        self._handlers = Handlers(handlers or ())
        self._registry = Registry(max_num_clients)
        self._lock = threading.RLock()
        self._woken = threading.Condition(self._lock)
        self._admin_server: AdminServer | None = None
        self._closing = False
        self._life: Life | None = None
        self._cleanup_thread: threading.Thread | None = None

    # clients

    def get_all_clients(self) -> dict[str, Client]:
        """Return the registered clients by token: a snapshot, so changing it changes nothing."""
        with self._lock:
            return {str(token): client for token, client in self._registry.snapshot().items()}

    def set_admin_server(self, admin_server: AdminServer | None) -> None:
        """Tell *admin_server* of heartbeats and dead clients from now on; ``None``: nobody."""
        self._admin_server = admin_server

    def logout_client(self, token: str) -> Client | None:
        """Remove the client everywhere and return it; ``None`` when the token is unknown."""
        with self._lock:
            client = self._registry.remove(Token(token))
            if client is None:
                return None
            self._forget(client)
        return client

    @abstractmethod
    def remove_client_data(self, token: str) -> None:
        """Forget what is kept for *token*; unknown: nothing."""

    def notify_dead_client(self, client: Client) -> None:
        """Do what else is to be done about a dead client: nothing, here."""
        del client

    def remove_dead_clients(self) -> None:
        """Log out every client not heard from for ``heart_beat_timeout`` seconds of the monotonic clock."""
        with self._lock:
            dead = self._registry.dead(self.clock(), self.heart_beat_timeout)
        for client in dead:
            try:
                if self.logout_client(client.token) is not None:
                    _log.info("client removed: not heard of", extra={"client": client.name})
            except Exception:  # noqa: BLE001 - one client's removal must not keep the others from theirs
                _log.exception("dead client not removed", extra={"client": client.name})

    def client_cleanup(self) -> None:
        """Remove dead clients until shutdown: the liveness loop. It wakes when the next client would be dead."""
        while True:
            with self._woken:
                if self._closing:
                    return
                # Only who is dead matters here; a client that beats without a stream would have the loop spin.
                deadline = self._registry.next_deadline(timeout_s=self.heart_beat_timeout, lost_after_s=math.inf)
                wait_s = None if deadline is None else max(deadline - self.clock(), 0.001)
                self._woken.wait(None if wait_s is None else min(wait_s, threading.TIMEOUT_MAX))
                if self._closing:
                    return
            try:
                self.remove_dead_clients()
            except Exception:  # noqa: BLE001 - detection must not end for good because it failed once
                _log.exception("looking for dead clients failed")

    # lifetime

    def deploy(
        self, args: argparse.Namespace, grpc_args: Mapping[str, Any] | None = None, secure_train: bool = False
    ) -> None:
        """Start a gRPC server on the designated host and port, and return when it answers.

        *args* has at least ``workspace``. *grpc_args* is ``{"service": {"target": "host:port", "scheme": "grpc"},
        "ssl_root_cert": path, "ssl_cert": path, "ssl_private_key": path}``; the target is by default ``0.0.0.0:6007``;
        port 0 picks a free one, which ``get_cell().target`` then tells. With *secure_train*, TLS with these files.
        ``"servers_secret"`` may be the path of the secret that the project's servers share.

        Raises:
            ConfigError: something is missing or unreadable; the error names it.
            Conflict: the server is deployed already, or closed.
        """
        where = place(args, grpc_args, secure=secure_train)
        if self._life is not None or self._closing:
            raise Conflict("the server", state="closed" if self._closing else "deployed", wanted="deployed")
        if not secure_train:
            tell = _log.info if is_loopback(where.target) else _log.warning
            tell(
                "INSECURE: this port has no TLS; anybody on the way can read and change everything",
                extra={"target": where.target},
            )
        life = Life(lambda: self._services(where, args))
        life.start()
        self._life = life
        self._cleanup_thread = threading.Thread(target=self.client_cleanup, name="client cleanup", daemon=True)
        self._cleanup_thread.start()

    def get_cell(self) -> Cell | None:
        """Return the server's cell; ``None`` before ``deploy``."""
        return self._life.cell if self._life is not None else None

    def fl_shutdown(self) -> None:
        """Shut down in order: tell the clients, wait for them at most ``shutdown_period`` seconds, then close."""
        if self._life is not None and self._life.cell is not None and not self._closing:
            run(self._say_goodbye(self._life.cell))
        self.close()

    def close(self) -> int:
        """Stop listening, end what ``deploy`` started, release everything; twice is once. Return 0."""
        with self._woken:
            self._closing = True
            self._woken.notify_all()
        if self._cleanup_thread is not None and self._cleanup_thread is not threading.current_thread():
            self._cleanup_thread.join()
        if self._life is not None:
            self._life.stop()
        return 0

    # for subclasses

    @asynccontextmanager
    async def _services(self, where: Place, args: argparse.Namespace) -> AsyncIterator[Cell]:
        """Run what the deployed server consists of; the base has its port alone, which nobody may use."""
        del args
        cell = Cell(Fqcn(SERVER))
        reception = Reception(cell, authorize=_nobody)
        listener = Listener(reception, scopes=_nothing, tls=server_tls(where), target=where.target)
        cell.target = await listener.start()
        try:
            yield cell
        finally:
            await listener.stop(1.0)
            await cell.close()

    async def _say_goodbye(self, cell: Cell) -> None:
        gone = asyncio.Event()
        cell.on_link_down(lambda peer, reason: None if _clients_of(cell) else gone.set())
        for peer in _clients_of(cell):
            try:
                cell.tell(peer.fqcn, Channel.JOB, "goodbye", Goodbye("the server shuts down"))
            except HanseError as error:
                _log.debug("goodbye not told", extra={"peer": peer.fqcn, "reason": error.reason})
        if not _clients_of(cell):
            return
        try:
            async with asyncio.timeout(self.shutdown_period):
                await gone.wait()
        except TimeoutError:
            _log.warning("clients did not leave in time", extra={"clients": len(_clients_of(cell))})

    def _forget(self, client: Client) -> None:
        """Take *client*, which has left the registry, out of everything else."""
        self.remove_client_data(client.token)
        self._tell_admin_server(lambda admin_server: admin_server.client_dead(client))
        self.notify_dead_client(client)

    def _tell_admin_server(self, tell: Callable[[AdminServer], None]) -> None:
        """Tell the admin server, if there is one; that it fails must keep no run and no client from their news."""
        if self._admin_server is None:
            return
        try:
            tell(self._admin_server)
        except Exception:  # noqa: BLE001 - whatever it raises is its own trouble; the log has it
            _log.exception("the admin server failed")

    def _wake_cleanup(self) -> None:
        with self._woken:
            self._woken.notify_all()


def _nobody(hello: Hello, certificate: PeerCertificate | None, transport: Transport) -> Peer:
    del certificate, transport
    raise Unauthorized(hello.fqcn, "connect", needs="a server that registers clients")


def _nothing(peer: Peer, scope: str, write: bool) -> TensorFiles:
    del write
    raise Unauthorized(peer.fqcn, f"use {scope}", needs="a server that runs jobs")


def _clients_of(cell: Cell) -> list[Peer]:
    return [peer for peer in cell.peers() if peer.kind == PeerKind.CLIENT]
