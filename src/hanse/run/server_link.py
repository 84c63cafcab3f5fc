"""A run's link to its server: what the run decides goes up and is durable when the call returns; answers come down.

The run holds no database. ``ServerLink`` is the run's side of the ``run`` channel: ``attach`` tells where the run
stands, ``issue``, ``cancel``, ``commit`` and ``ended`` return when the server has journalled them, and the server's
events (an answer was accepted, a client was lost or came back, abort) are handed to whoever ``listen`` was called with.
"""

import asyncio
import logging
import random
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from hanse.cell.backoff import Backoff
from hanse.cell.cell import Cell
from hanse.cell.link import Peer
from hanse.cell.refusals import RemoteError
from hanse.errors import HanseError, InternalError
from hanse.ids import SERVER, ClientName
from hanse.learning.workflow import LONGEST_WAIT_S
from hanse.messages import (
    AbortRun,
    Attach,
    CancelTasks,
    Channel,
    ClientChanged,
    CommitRound,
    IssueTasks,
    Message,
    RunEnded,
    RunHeartbeat,
    RunSnapshot,
    StateRef,
    TaskKey,
    TaskResult,
)

JOURNAL_TIMEOUT_S: Final = 60.0
"""How long the server may take to make something durable before it is asked again."""

_log = logging.getLogger(__name__)


class RunListener(Protocol):
    """Who hears what the server tells a run."""

    def answered(self, result: TaskResult) -> None:
        """Take an accepted answer."""

    def client_changed(self, change: ClientChanged) -> None:
        """Take note that a client was lost, came back, or failed for good."""

    def attached(self, snapshot: RunSnapshot) -> None:
        """Take note of who is lost by now, when the link has been down and nothing could be heard."""


class ServerLink:
    """The run's side of the ``run`` channel, over its cell.

    What the server tells while the link is down is lost; ``keep_attached`` makes up for it.
    """

    def __init__(self, cell: Cell, *, on_abort: Callable[[str], None], rng: random.Random | None = None) -> None:
        self._cell = cell
        self._rng = rng or random.Random()  # noqa: S311 - jitter between tries, not a secret
        self._on_abort = on_abort
        self._listener: RunListener | None = None
        self._is_cut_off = False
        self._early: list[TaskResult | ClientChanged] = []
        self._came_up = asyncio.Event()
        cell.on_link_up(self._has_come_up)
        cell.on(Channel.RUN, "answer", self._event)
        cell.on(Channel.RUN, "client", self._event)
        cell.on(Channel.RUN, "abort", self._abort)

    def listen(self, listener: RunListener) -> None:
        """Hand the server's events to *listener*: those that came before this call, and all that follow."""
        self._listener = listener
        early, self._early = self._early, []
        for event in early:
            self._hand_over(event)

    def cut_off(self) -> None:
        """Want nothing cancelled any more: this process ends, and the run goes on in another."""
        self._is_cut_off = True

    async def attach(self) -> RunSnapshot:
        """Return where the run stands. Events that come before ``listen`` are kept for it.

        Among them are the answers that were accepted since the last commit, or that it has carried on.
        """
        self._came_up.clear()
        reply = await self._ask("attach", Attach())
        if not isinstance(reply.payload, RunSnapshot):
            raise InternalError("reading the run's snapshot from its server")
        return reply.payload

    async def keep_attached(self) -> None:
        """Attach anew whenever the link was down, so that the listener hears what it missed; until cancelled.

        ``listen`` comes before it. A run's process that was stopped for a while lost its link, and goes on.
        """
        while True:
            await self._came_up.wait()
            try:
                snapshot = await self.attach()
            except HanseError as error:
                _log.warning("not attached again", extra={"reason": error.reason})
            else:
                if self._listener is not None:
                    self._listener.attached(snapshot)

    async def issue(self, tasks: IssueTasks) -> None:
        """Journal *tasks* and have them handed to their clients; keys answered before bring their answers as events.

        With no keys it only tells how long the run waits for what is out already.
        """
        await self._ask("issue", tasks)

    async def cancel(self, keys: Sequence[TaskKey]) -> None:
        """Have later answers to *keys* refused; nothing once the link is cut off, for another process wants them.

        If the server does not hear of it, they end with the round that the next commit ends.
        """
        if self._is_cut_off:
            return
        try:
            await self._ask_once("cancel", CancelTasks(tuple(keys)))
        except HanseError as error:
            if not error.retryable:
                raise
            _log.warning("the server did not hear what is cancelled", extra={"reason": error.reason})

    async def commit(
        self, state: StateRef, *, took_s: float, answered: Sequence[ClientName], carried: Sequence[TaskKey] = ()
    ) -> None:
        """Commit *state* as the run's newest; of the tasks so far, those *carried* live on."""
        await self._ask("commit", CommitRound(state, took_s, tuple(answered), tuple(carried)))

    async def ended(self, end: RunEnded) -> None:
        """Tell that the run's process has nothing more to do."""
        await self._ask("ended", end)

    async def given_up(self, end: RunEnded) -> None:
        """Tell, once, that the run's process ends without having reached its end: whoever wanted that may be away."""
        await self._ask_once("ended", end)

    def heartbeat(self) -> None:
        """Tell that the run's process is alive."""
        self._cell.tell(SERVER, Channel.RUN, "heartbeat", RunHeartbeat())

    async def _ask(self, topic: str, payload: Attach | IssueTasks | CommitRound | RunEnded) -> Message:
        """Return the server's reply; ask again while trying again may help: whatever is asked may be asked twice.

        A full disk is for a person to mend. For how long that may take the server knows, and ends the run then; only
        one that does not answer is given up here.
        """
        loop, backoff = asyncio.get_running_loop(), Backoff(self._rng)
        give_up_at = loop.time() + LONGEST_WAIT_S
        while True:
            try:
                return await self._ask_once(topic, payload)
            except HanseError as error:
                if isinstance(error, RemoteError):
                    give_up_at = loop.time() + LONGEST_WAIT_S
                pause_s = backoff.next_s()
                if not error.retryable or loop.time() + pause_s > give_up_at:
                    raise
                _log.warning("the server did not take it", extra={"topic": topic, "reason": error.reason})
            await asyncio.sleep(pause_s)  # before the server is asked again what it could not do

    async def _ask_once(
        self, topic: str, payload: Attach | IssueTasks | CancelTasks | CommitRound | RunEnded
    ) -> Message:
        return await self._cell.ask(SERVER, Channel.RUN, topic, payload, timeout_s=JOURNAL_TIMEOUT_S)

    def _has_come_up(self, peer: Peer) -> None:
        del peer
        # What is to be attached to now knows better of the clients; that they are back may have been told to nobody.
        self._early = [event for event in self._early if isinstance(event, TaskResult)]
        self._came_up.set()

    def _event(self, message: Message) -> None:
        if isinstance(message.payload, TaskResult | ClientChanged):
            self._hand_over(message.payload)

    def _hand_over(self, event: TaskResult | ClientChanged) -> None:
        if self._listener is None:
            self._early.append(event)
        elif isinstance(event, TaskResult):
            self._listener.answered(event)
        else:
            self._listener.client_changed(event)

    def _abort(self, message: Message) -> None:
        if isinstance(message.payload, AbortRun):
            self._on_abort(message.payload.reason)
