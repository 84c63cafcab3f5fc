"""A cell's way to its server: whether it is open, and how to ask over it until there is an answer.

A site's cells have one peer, the server, and a ``Connector`` that keeps the link to it up. An ``Uplink`` adds what is
the same for all that they have to say: wait until the link is up, ask, and when the link breaks or the server cannot
serve just now, wait and ask again, with growing, jittered pauses. What the server refuses for good is raised.
"""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from hanse.cell.backoff import Backoff
from hanse.cell.cell import Cell, RemoteError
from hanse.cell.link import Peer
from hanse.coordination.policy import PeerKind, demand_use
from hanse.errors import HanseError, StoreFailed
from hanse.ids import SERVER, Fqcn, Ssid
from hanse.messages import Channel, Header, Message, Payload, ReturnCode, Topic

_log = logging.getLogger(__name__)
T = TypeVar("T")

ANSWER_TIMEOUT_S: Final = 60.0
"""How long the server may take to answer before it is asked again: it makes things durable first."""


class Uplink:
    """The way of ``cell``, which has the address *fqcn*, to its server."""

    def __init__(self, fqcn: Fqcn, rng: random.Random) -> None:
        self.cell = Cell(fqcn, gate=self._gate)
        self._rng = rng
        self._trusted: Peer | None = None
        self._up = asyncio.Event()
        self.cell.on_link_up(self._came_up)
        self.cell.on_link_down(self._went_down)

    def trust(self, peer: Peer, *, ssid: Ssid) -> None:
        """Take *peer* for the server, in its service session *ssid*: it has proven itself, or TLS vouches for it.

        From now on it is listened to, and no other. This comes before the link counts as up, because the server may
        have something to say the moment it has accepted the client.
        """
        self._trusted = peer
        self.enter_session(ssid)

    def enter_session(self, ssid: Ssid) -> None:
        """State *ssid* as the session that requests belong to."""
        self.cell.headers[Header.SSID] = ssid

    @property
    def is_up(self) -> bool:
        """Whether the server can be asked now."""
        return self._up.is_set()

    async def wait_up(self) -> None:
        """Return when the server can be asked."""
        await self._up.wait()

    async def ask(self, channel: Channel, topic: str, payload: Payload, *, timeout_s: float) -> Message:
        """Ask the server once.

        Raises:
            HanseError: it cannot be reached or does not answer in time, or what it refuses with.
        """
        return await self.cell.ask(SERVER, channel, topic, payload, timeout_s=timeout_s)

    async def ask_until_answered(self, channel: Channel, topic: str, payload: Payload) -> Message:
        """Ask the server as often as it takes; the request must be one that may be asked twice.

        Raises:
            HanseError: what the server refuses with for good.
        """
        ask = self.ask
        return await self.persist(
            lambda: ask(channel, topic, payload, timeout_s=ANSWER_TIMEOUT_S), doing=f"{channel.value}/{topic}"
        )

    async def persist(self, attempt: Callable[[], Awaitable[T]], *, doing: str) -> T:
        """Return what *attempt* returns, made anew while the link is up and as long as trying again may help.

        There is no last try: who no longer wants the answer cancels this.

        Raises:
            HanseError: what *attempt* raises and trying again cannot mend.
        """
        backoff = Backoff(self._rng)
        while True:
            await self.wait_up()
            try:
                return await attempt()
            except HanseError as error:
                if not may_help_later(error):
                    raise
                pause_s = backoff.next_s()
                _log.info("waiting to try again", extra={"doing": doing, "reason": error.reason, "pause_s": pause_s})
            await asyncio.sleep(pause_s)  # before the server is asked again what it could not do

    def _gate(self, peer: Peer, topic: Topic, message: Message) -> None:
        del message
        kind = PeerKind.SERVER if peer is self._trusted else PeerKind.ANONYMOUS
        demand_use(kind, *topic, who=peer.fqcn)

    def _came_up(self, peer: Peer) -> None:
        if peer.fqcn == SERVER:
            self._up.set()

    def _went_down(self, peer: Peer, reason: str) -> None:
        del reason
        if peer.fqcn == SERVER:
            self._up.clear()


def may_help_later(error: HanseError) -> bool:
    """Return whether the same request may be answered later; what this machine's own disk did not do is no request.

    A server that has just taken over and restores its runs answers ``ABORT_RUN``: it will know the run in a moment, or
    tell the site's agent to end it.
    """
    if isinstance(error, StoreFailed):
        return False
    return error.retryable or (isinstance(error, RemoteError) and error.return_code is ReturnCode.ABORT_RUN)


def first_error(errors: ExceptionGroup[Exception]) -> Exception:
    """Return what ended a group of tasks: its first error that is not a group itself."""
    first = errors.exceptions[0]
    return first_error(first) if isinstance(first, ExceptionGroup) else first
