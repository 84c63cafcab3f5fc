"""The clients of a server's runs: what they tell, passed on to the runs, and those that tell nothing for too long."""

import asyncio
from collections.abc import Callable, Collection, Coroutine
from functools import partial
from typing import Any, Final

from hanse.cell.link import Peer
from hanse.codes import CODES
from hanse.coordination.runs import Sync, heartbeat_sync
from hanse.errors import ProtocolError, Unauthorized
from hanse.ids import ClientName, JobId, split_cell
from hanse.job import JobState
from hanse.messages import JobFailure
from hanse.server.active_run import ActiveRun
from hanse.server.bounds import shortened
from hanse.server.causes import said_of
from hanse.server.live_jobs import LiveJobs

MAX_ABORTS: Final = 1000
"""The most jobs that one heartbeat is answered with; a client that runs more hears of the rest at its next ones."""


class ClientWatch:
    """Watches the clients of the jobs that are *live*; ``watch`` finds those that are lost.

    What takes time for a run is done by *spawn*. *idle* is told of jobs that a client holds and that are not alive,
    *changed* of whatever the schedule may depend on, *now* is monotonic time. Methods are for the event loop, but where
    it says otherwise.
    """

    def __init__(
        self,
        live: LiveJobs,
        *,
        lost_after_s: float,
        now: Callable[[], float],
        spawn: Callable[[ActiveRun, Callable[[], Coroutine[Any, Any, None]]], None],
        idle: Callable[[ClientName, Collection[JobId]], None],
        changed: Callable[[], None],
    ) -> None:
        self._live = live
        self._lost_after_s = lost_after_s
        self._now = now
        self._spawn = spawn
        self._idle = idle
        self._changed = changed
        self._known: dict[ClientName, frozenset[JobId]] = {}
        self._suspects = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    async def watch(self) -> None:
        """Tell runs of clients that are lost: woken by the earliest deadline of a suspect client, or by ``look``."""
        while True:
            self._suspects.clear()
            runs = list(self._live.runs.values())
            for run in runs:
                run.processes.lose(self._lost_after_s)
            deadlines = [run.run.next_deadline(self._lost_after_s) for run in runs]
            deadline = min((at for at in deadlines if at is not None), default=None)
            delay = None if deadline is None else max(deadline - self._now(), 0.0)
            try:
                async with asyncio.timeout(delay):
                    await self._suspects.wait()
            except TimeoutError:
                continue

    def look(self) -> None:
        """Have it looked at again who may be lost."""
        self._suspects.set()

    # what agents tell

    def heartbeat(
        self, client: ClientName, reported: Collection[JobId], idle: Collection[JobId] = ()
    ) -> tuple[JobId, ...]:
        """Take note of the jobs that *client* reports, and return those that it should abort; from any thread.

        Of those that are *idle* there it is told which have ended: their end may have come while it was away.
        """
        expected = self._live.expected_at(client)
        sync = heartbeat_sync(reported, expected=expected, previously=self._known.get(client, frozenset()))
        self._known[client] = sync.known
        self._loop.call_soon_threadsafe(self._heard, client, sync, expected, tuple(idle))
        starting = self._live.starting()
        return tuple(job_id for job_id in sync.abort if job_id not in starting)[:MAX_ABORTS]

    def _heard(self, client: ClientName, sync: Sync, expected: Collection[JobId], idle: Collection[JobId]) -> None:
        for job_id in expected:
            if (run := self._live.runs.get(job_id)) is not None:
                run.processes.heard(client, reported=job_id in sync.known, dead=job_id in sync.dead)
        self._idle(client, [job_id for job_id in idle if job_id not in self._live])

    def heard_of(self, job_id: JobId, clients: Collection[ClientName]) -> dict[ClientName, bool]:
        """Return which of *clients* have told by a heartbeat what they run, and whether the job is among that."""
        return {client: job_id in self._known[client] for client in clients if client in self._known}

    def registered(self, client: ClientName) -> None:
        """Take note that *client*'s agent has registered (anew); from any thread."""
        self._known.pop(client, None)
        self._loop.call_soon_threadsafe(self._agent_is_new, client)

    def _agent_is_new(self, client: ClientName) -> None:
        for run in self._live.runs_of(client):
            run.processes.agent_is_new(client)
        self._changed()

    def gone(self, client: ClientName) -> None:
        """Take note that *client* was logged out; from any thread. Its runs see it suspect, and lost in time."""
        self._known.pop(client, None)
        self._loop.call_soon_threadsafe(self._agent_is_gone, client)

    def _agent_is_gone(self, client: ClientName) -> None:
        for run in self._live.runs_of(client):
            run.processes.stream_down(client, None)
        self.look()
        self._changed()

    def failed_at(self, client: ClientName, failure: JobFailure) -> None:
        """Take *client*'s word that a job failed there for good: the run ends with that reason; from any thread.

        Raises:
            NotFound: no such job runs.
            Unauthorized: the client takes no part in it.
            ProtocolError: it is of no kind that there is.
        """
        run = self._live.run_of(failure.job_id)
        if client not in run.run.clients:
            raise Unauthorized(client, f"report on job {failure.job_id}", needs="to take part in it")
        if not failure.code and f"client-{failure.kind}" not in CODES:
            raise ProtocolError("JobFailure.kind", got=failure.kind, expected="'config', 'exception' or 'unsafe'")
        self._loop.call_soon_threadsafe(self._end_failed, run, client, failure)

    def _end_failed(self, run: ActiveRun, client: ClientName, failure: JobFailure) -> None:
        code, reason = failure.code or f"client-{failure.kind}", said_of(client, shortened(failure.reason))
        tail = failure.log_tail
        end = partial(run.end_once_stored, JobState.FAILED, code=code, reason=reason, client=client, log_tail=tail)
        self._spawn(run, end)

    # streams

    def link_up(self, peer: Peer) -> None:
        """Take note that a peer can be reached."""
        participant, job_id = split_cell(peer.fqcn)
        if job_id is None:
            self._changed()
        elif (run := self._live.runs.get(job_id)) is not None and participant in run.run.clients:
            self._spawn(run, lambda: run.cell_up(ClientName(participant), peer))

    def link_down(self, peer: Peer) -> None:
        """Take note that a peer can no longer be reached."""
        participant, job_id = split_cell(peer.fqcn)
        if job_id is not None and (run := self._live.runs.get(job_id)) is not None and participant in run.run.clients:
            run.processes.stream_down(ClientName(participant), peer)
        elif job_id is None:
            for run in self._live.runs_of(ClientName(participant)):
                run.processes.stream_down(ClientName(participant), peer)
        self.look()
        self._changed()
