"""Whether this server is primary: its service state, and the tenures that it begins and ends by the overseer's word.

The state is a value that ``coordination.service`` moves; here is what each move takes: becoming hot takes the store's
lease and resumes the committed runs, becoming cold sends everybody away, parks them and gives the lease back. A
takeover that fails, and a lease that turns out to be another's, both end cold, so that the overseer's next word is
heard. A server that is hot and cannot be sure of its lease, because it was paused or its store is away, serves nobody.
"""

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from secrets import token_hex
from typing import Final

from hanse.cell.cell import Cell
from hanse.cell.loop import run
from hanse.coordination.service import (
    RequestKind,
    Service,
    ServiceState,
    message,
    observe,
    parked,
    restored,
    shut_down,
)
from hanse.errors import Conflict, NotInService
from hanse.ids import Ssid
from hanse.server.overseer import HeldFor, OverseerAgent, Primary
from hanse.server.run_desk import answer_not_in_service
from hanse.server.tenure import Tenure

TURN_TIMEOUT_S: Final = 60.0
"""How long becoming primary, or ceasing to be, may take before the overseer's agent is told no more of it."""

TURN_COMES_WITHIN_S: Final = 2.0
"""How long who comes to a server that stands by is asked to wait, while it may be about to serve."""

_log = logging.getLogger(__name__)


class Primacy:
    """One server's service state, and its tenure while it is primary.

    *is_alone* is for a server without an overseer: it is hot from the start. *name* is the server's. *begin* makes a
    tenure of the lease that the overseer has taken, if it has, and is given what to call when that is lost; *cell* is
    the deployed server's, ``None`` before.
    """

    def __init__(
        self,
        *,
        is_alone: bool,
        name: Callable[[], str],
        begin: Callable[[HeldFor | None, Callable[[], None]], Awaitable[Tenure]],
        cell: Callable[[], Cell | None],
    ) -> None:
        self.service = Service(ServiceState.HOT, Ssid(token_hex(16))) if is_alone else Service()
        self.tenure: Tenure | None = None
        self._primary: Primary | None = None
        self._turn: asyncio.Event | None = None
        self._name = name
        self._begin = begin
        self._cell = cell
        self._observing = threading.Lock()
        self._when_lost: list[Callable[[], None]] = []

    def call_when_lost(self, callback: Callable[[], None]) -> None:
        """Call *callback*, on the event loop, when a tenure ends that nobody ended."""
        self._when_lost.append(callback)

    def demand(self, kind: RequestKind) -> None:
        """Let a request of *kind* pass.

        Raises:
            NotInService: the present state does not answer it.
        """
        if (reason := message(self.service.verdict(kind))) is not None:
            raise NotInService(reason)
        self._demand_good_lease()

    def demand_serving(self) -> None:
        """Let whoever comes pass while this server serves, or is about to.

        Raises:
            NotInService: it does not; the sentence says who does, where that is known.
        """
        if self.service.state not in (ServiceState.COLD2HOT, ServiceState.HOT):
            primary = self._primary
            if primary is None or not primary.name:
                raise NotInService
            raise NotInService(f"Server not in service: {primary.name} at {primary.target} serves")
        self._demand_good_lease()

    async def wait_turn(self) -> None:
        """Return when this server serves, or will not soon: at once while another one is known to, else in seconds.

        Clients of a server that has just died find its successor still standing by; kept waiting for a moment they are
        served the moment it serves, or told who else does, and need not come again and again.
        """
        if self.service.state is not ServiceState.COLD or self._primary is not None:
            return
        turn = self._turn = self._turn or asyncio.Event()
        with suppress(TimeoutError):
            async with asyncio.timeout(TURN_COMES_WITHIN_S):
                await turn.wait()

    def observe(self, agent: OverseerAgent) -> None:
        """Take *agent*'s word on who is primary, and return when the state has moved; calls do not overlap.

        An error is logged, never raised: the agent must hear no error of ours, and the state says what holds.
        """
        with self._observing:
            try:
                self._observe(agent)
            except Exception:  # noqa: BLE001 - see above
                _log.exception("taking the overseer's word failed")

    def hand_over(self, successor: str) -> None:
        """Leave the primacy to the server called *successor*: park the runs, and give the lease back for it to take.

        Raises:
            Conflict: this server is not hot.
        """
        with self._observing:
            if self.service.state is not ServiceState.HOT:
                raise Conflict("the server", state=self.service.state.value, wanted="succeeded by another")
            self.service = observe(self.service, primary_ssid=None, is_me=False)
            self._primary = None
            self._turn_cold(successor=successor)

    async def begin(self, ssid: Ssid | None, held: HeldFor | None = None) -> None:
        """Begin a tenure under the overseer's *ssid*, ``None`` for the lease's own."""
        self.tenure = tenure = await self._begin(held, self._lost)
        self.service = Service(self.service.state, ssid or tenure.ssid)
        await tenure.begin()

    async def park(self, *, successor: str = "") -> None:
        """End the runs' processes here; their state stays committed, and the next tenure resumes them."""
        tenure, self.tenure = self.tenure, None
        if (cell := self._cell()) is not None:
            answer_not_in_service(cell)
        if tenure is not None:
            await tenure.end(successor=successor)

    def shut_down(self) -> None:
        """Serve nobody any more, for good."""
        self.service = shut_down(self.service)

    def _observe(self, agent: OverseerAgent) -> None:
        primary, cell = agent.primary(), self._cell()
        self._primary = primary
        # Behind proxies, servers on several machines may listen at addresses that read the same.
        is_here = primary is not None and cell is not None and primary.target == cell.target
        is_me = primary is not None and (primary.held is not None or (is_here and primary.name in ("", self._name())))
        after = observe(self.service, primary_ssid=primary.ssid if primary else None, is_me=is_me)
        if primary is not None and not is_me:
            run(self._end_waiting())
        if after == self.service:
            return
        _log.info("service state", extra={"was": self.service.state.value, "is": after.state.value})
        self.service = after
        if after.state is not ServiceState.COLD2HOT:
            self._turn_cold()
            return
        try:
            run(self._turn_hot(after.ssid, primary.held if primary is not None else None), TURN_TIMEOUT_S)
        except BaseException:
            # Cold again, by the legal way, so that the overseer's next word is heard.
            if self.service.state is ServiceState.COLD2HOT:
                self.service = restored(self.service)
            self.service = observe(self.service, primary_ssid=None, is_me=False)
            self._turn_cold()
            raise
        run(self._end_waiting())

    async def _turn_hot(self, ssid: Ssid | None, held: HeldFor | None) -> None:
        await self.begin(ssid, held)
        if self.tenure is None:  # lost since, when there was nothing yet to turn cold
            raise NotInService("Server not in service: it has lost its lease at the moment at which it had taken over")
        self.service = restored(self.service)

    async def _end_waiting(self) -> None:
        """Have nobody wait any longer for this server's turn: it has come, or is another's."""
        if self._turn is not None:
            self._turn.set()
            self._turn = None

    def _demand_good_lease(self) -> None:
        if self.tenure is not None and not self.tenure.is_good:
            raise NotInService("Server not in service: it cannot be sure of its lease")

    def _turn_cold(self, *, successor: str = "") -> None:
        """Stop serving before anyone else may start: send everybody away and park the runs."""
        try:
            run(self._send_away_and_park(successor), TURN_TIMEOUT_S)
        finally:  # who did not stop in time may write nothing under another lease
            if self.service.state is ServiceState.HOT2COLD:  # and not cold already, having lost its lease meanwhile
                self.service = parked(self.service)

    async def _send_away_and_park(self, successor: str) -> None:
        self._send_everybody_away()
        await self.park(successor=successor)

    def _send_everybody_away(self) -> None:
        if (cell := self._cell()) is not None:
            for peer in cell.peers():
                cell.drop(peer.fqcn, NotInService())

    def _lost(self) -> None:
        """Serve nobody any more: the lease is another server's."""
        self.service = observe(self.service, primary_ssid=None, is_me=False)
        self.tenure = None
        if (cell := self._cell()) is not None:
            answer_not_in_service(cell)
        self._send_everybody_away()
        if self.service.state is ServiceState.HOT2COLD:
            self.service = parked(self.service)
        for callback in self._when_lost:
            callback()
