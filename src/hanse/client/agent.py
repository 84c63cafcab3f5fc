"""A site's agent: registers, stays connected, beats, and runs the jobs that the server gives it.

It dials out and nothing listens. Registration happens once; afterwards the token proves the client whenever the
stream is opened again, is renewed at half of its life, and is thrown away when the server does not take it, which
means to register anew. All else is waiting, and ``status`` says in one sentence for what. What the server refuses for
good (another project's CA, a disabled client) ends the agent with that reason.
"""

import asyncio
import logging
import random
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

from hanse.cell.cell import RemoteError
from hanse.cell.connector import Connector, Dial
from hanse.cell.link import Link, Peer
from hanse.cell.rpc import ClientTls
from hanse.cell.transfer import TensorTransfers, Transfers
from hanse.client.jobs import SiteJobs
from hanse.client.registration import Registrant, registered_by, utc_now
from hanse.client.uplink import Uplink, first_error
from hanse.errors import HanseError, ProtocolError, Unauthenticated, Unreachable
from hanse.identity.certificates import Identity
from hanse.ids import SERVER, Fqcn
from hanse.launch.process import Launcher
from hanse.messages import (
    PROTOCOL_VERSIONS,
    Channel,
    Credentials,
    Goodbye,
    Heartbeat,
    HeartbeatReply,
    Hello,
    Message,
    Quit,
    Registered,
    Renew,
    ReturnCode,
    Welcome,
)
from hanse.settings import ClientSettings

_log = logging.getLogger(__name__)

QUIT_TIMEOUT_S: Final = 5.0
"""How long an agent that stops waits for the server to take note."""

RENEW_TIMEOUT_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class _Session:
    """What registration gave, and when (monotonic seconds) half of the token's life is over."""

    credentials: Credentials
    heartbeat_s: float
    renew_at: float


class ClientAgent:
    """One client, for as long as ``run`` runs. Belongs to one event loop, which must be running when it is made.

    *workspace* is where *settings* say, made absolute, and this agent's alone: whoever makes it holds
    ``only_agent_of``. *launcher* is a ``SurvivingLauncher``, or one whose processes are no processes. *identity* and
    *roots* (PEM) are the kit's; ``None`` and empty without TLS. *tls_roots* is what the connection is checked against,
    where that is not *roots*. *dial* and *transfers* stand in for gRPC where the server is in the same process.
    *random_bytes* and *wall* are what registration uses.
    """

    def __init__(
        self,
        settings: ClientSettings,
        *,
        workspace: Path,
        launcher: Launcher,
        rng: random.Random,
        identity: Identity | None = None,
        roots: bytes = b"",
        tls_roots: bytes = b"",
        release: str = "",
        dial: Dial | None = None,
        transfers: TensorTransfers | None = None,
        random_bytes: Callable[[int], bytes] = secrets.token_bytes,
        wall: Callable[[], datetime] = utc_now,
    ) -> None:
        self._settings = settings
        self._release = release
        self._registrant = Registrant(
            settings.project,
            settings.name,
            settings.server_names,
            identity,
            roots,
            settings.resources,
            release,
            random_bytes,
            wall,
        )
        self._uplink = Uplink(Fqcn(settings.name), rng)
        tls = (
            ClientTls(tls_roots or roots, identity.certificate, identity.key_pem) if settings.tls and identity else None
        )
        self._connector = Connector(
            self._uplink.cell,
            targets=settings.servers,
            hello=self._hello,
            tls=tls,
            rng=rng,
            on_welcome=self._on_welcome,
            on_waiting=self._on_waiting,
            on_refused=self._on_refused,
            dial=dial,
        )
        self._own_transfers = None
        if transfers is None:
            transfers = self._own_transfers = Transfers(
                target=lambda: self._connector.target, hello=self._hello, tls=tls, rng=rng
            )
        self._jobs = SiteJobs(
            self._uplink,
            settings=settings,
            workspace=workspace,
            roots=tls.roots_pem if tls else b"",
            launcher=launcher,
            transfers=transfers,
            require_valid=self._registrant.require_valid,
        )
        self._session: _Session | None = None
        self._stopping = asyncio.Event()
        self._beat_now = asyncio.Event()
        self._waiting_for = f"an answer from {' or '.join(settings.servers)}"
        cell = self._uplink.cell
        cell.on(Channel.JOB, "goodbye", self._on_goodbye)
        cell.on_link_up(lambda _: self._beat_now.set())
        cell.on_link_down(self._on_link_down)

    @property
    def status(self) -> str:
        """What the agent is doing, or waits for, in one sentence."""
        if self._stopping.is_set():
            return "stopping"
        if not self._uplink.is_up:
            return f"waiting for {self._waiting_for}"
        running = self._jobs.running
        doing = f"running {', '.join(running)}" if running else "waiting for a job"
        return f"registered at {self._connector.target}; {doing}"

    @property
    def is_registered(self) -> bool:
        """Whether the server knows the client and can be asked."""
        return self._uplink.is_up and self._session is not None

    async def wait_registered(self) -> None:
        """Return when the client is registered and its link is up."""
        await self._uplink.wait_up()

    def stop(self) -> None:
        """Have ``run`` end in order: the server is told, jobs' processes are ended. From the loop's thread."""
        self._stopping.set()

    async def run(self) -> None:
        """Take part until ``stop``, or until the server says goodbye for good; nothing is left running then.

        Raises:
            HanseError: the server refuses this client for good.
        """
        if self._stopping.is_set():
            return
        try:
            async with self._jobs.serving():
                try:
                    await self._stay_connected()
                finally:
                    # What the server has asked for ends before what it is about: nobody starts what is being ended.
                    await self._uplink.cell.close()
        except ExceptionGroup as errors:
            raise first_error(errors) from None
        finally:
            if self._own_transfers is not None:
                await self._own_transfers.close()
            _log.info("stopped", extra={"client": self._settings.name})

    # The connection ---------------------------------------------------------------------------------------------------

    async def _stay_connected(self) -> None:
        async with asyncio.TaskGroup() as group:
            connection = group.create_task(self._connector.run(), name=f"connection of {self._settings.name}")
            beat = group.create_task(self._beat(), name=f"heartbeat of {self._settings.name}")
            await self._stopping.wait()
            beat.cancel()
            await self._quit()
            await self._connector.close()
            await connection

    def _hello(self) -> Hello:
        """Return what opens a stream; raise ``Unauthenticated`` once the certificate that goes with it is not valid."""
        try:
            self._registrant.require_valid()
        except Unauthenticated:
            self._session = None  # no token helps then, so there is no need to dial again without it
            raise
        credentials = self._session.credentials if self._session else None
        return Hello(PROTOCOL_VERSIONS, self._uplink.cell.fqcn, self._settings.project, self._release, credentials)

    async def _on_welcome(self, link: Link, welcome: Welcome) -> None:
        if self._own_transfers is not None:
            await self._own_transfers.renew()
        if self._session is not None:
            # The stream was opened with the token, so the server knows who this is; TLS has told who the server is.
            self._uplink.trust(link.peer, ssid=welcome.ssid)
            _log.info("connected again", extra={"target": self._connector.target})
            return
        registered = await self._registrant.register(
            self._uplink.cell, link, on_server_proven=lambda: self._uplink.trust(link.peer, ssid=welcome.ssid)
        )
        self._take(registered)
        _log.info("registered", extra={"target": self._connector.target, "client": self._settings.name})

    def _on_waiting(self, reason: str) -> None:
        self._jobs.shorten_logs()  # nothing beats without a server, and what runs here goes on
        self._waiting_for = f"the server: {reason}"
        _log.info("waiting for the server", extra={"reason": reason})

    def _on_link_down(self, peer: Peer, reason: str) -> None:
        if not self._stopping.is_set():
            self._waiting_for = f"the server to come back: {reason}"
            _log.warning("the connection to the server ended", extra={"reason": reason})

    def _on_refused(self, error: HanseError) -> bool:
        """Say whether to dial again after a refusal: with a token that is not taken any more, to register anew."""
        if isinstance(error, Unauthenticated) and self._session is not None:
            _log.info("the token is not taken any more; registering anew", extra={"reason": error.reason})
            self._session = None
            return True
        # A bug at the server's end need not be the end of the client; a refusal is.
        return isinstance(error, RemoteError) and error.return_code is ReturnCode.INTERNAL

    def _on_goodbye(self, message: Message) -> None:
        if not isinstance(message.payload, Goodbye):
            raise ProtocolError("payload", got=message.payload, expected="Goodbye")
        goodbye = message.payload
        if goodbye.retry:
            _log.info("the server is going and means to come back", extra={"reason": goodbye.reason})
            self._uplink.cell.drop(SERVER, Unreachable(SERVER, goodbye.reason))
        else:
            _log.warning("the server has ended for good; stopping", extra={"reason": goodbye.reason})
            self.stop()

    async def _quit(self) -> None:
        """Tell the server that the client leaves, if it can be told."""
        if not self._uplink.is_up:
            return
        try:
            await self._uplink.ask(Channel.SERVER, "quit", Quit("the client is stopping"), timeout_s=QUIT_TIMEOUT_S)
        except HanseError as error:
            _log.info("the server was not told of the stop", extra={"reason": error.reason})

    # The heartbeat ----------------------------------------------------------------------------------------------------

    async def _beat(self) -> None:
        """Beat when the link comes up and then every so often, and renew the token when half of its life is over."""
        while True:
            await self._uplink.wait_up()
            self._beat_now.clear()
            try:
                # Beating comes first: a renewal that is refused for now must not make a living client count as dead.
                await self._beat_once()
                await self._renew_if_due()
            except Unauthenticated as error:
                # The connector dials again, and the client registers anew or is told why it may not.
                self._session = None
                self._uplink.cell.drop(SERVER, Unreachable(SERVER, f"the token is not taken any more ({error.reason})"))
            except HanseError as error:
                _log.warning("heartbeat not answered", extra={"reason": error.reason})
            try:
                async with asyncio.timeout(self._heartbeat_s):
                    await self._beat_now.wait()
            except TimeoutError:
                continue

    async def _beat_once(self) -> None:
        self._jobs.shorten_logs()
        heartbeat = Heartbeat(self._jobs.running, self._settings.resources, self._release, self._jobs.idle)
        reply = await self._uplink.ask(Channel.SERVER, "heartbeat", heartbeat, timeout_s=3 * self._heartbeat_s)
        answer = reply.payload
        if not isinstance(answer, HeartbeatReply):
            raise ProtocolError("reply to heartbeat", got=answer, expected="HeartbeatReply")
        if answer.ssid:
            self._uplink.enter_session(answer.ssid)
        for job_id in answer.abort_jobs:
            self._jobs.abort(job_id, "the server does not run it any more")

    async def _renew_if_due(self) -> None:
        if self._session is None or asyncio.get_running_loop().time() < self._session.renew_at:
            return
        reply = await self._uplink.ask(Channel.SERVER, "renew", Renew(), timeout_s=RENEW_TIMEOUT_S)
        self._take(registered_by(reply, to="renew"))

    def _take(self, registered: Registered) -> None:
        credentials = Credentials(self._settings.name, registered.token, registered.token_signature, registered.ssid)
        renew_at = asyncio.get_running_loop().time() + registered.expires_in_s / 2
        self._session = _Session(credentials, registered.heartbeat_s, renew_at)
        self._uplink.enter_session(registered.ssid)
        self._jobs.end_strangers(registered.job_authority)

    @property
    def _heartbeat_s(self) -> float:
        return self._session.heartbeat_s if self._session else 5.0
