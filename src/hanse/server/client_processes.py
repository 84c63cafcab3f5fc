"""The clients' processes of one run, as their server sees them: started, heard of, started again, given up.

One is started when the run begins, when it died and may be tried again, and when its client's agent comes back without
it. ``coordination.runs.Run`` decides what becomes of a client; what its process asks and is told is ``ActiveRun``'s
matter.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, Final

from hanse.cell.cell import Cell
from hanse.coordination.absence import with_absence
from hanse.coordination.runs import ClientState, GiveUp, Restart, Run
from hanse.errors import HanseError, OutOfMemory, ProcessDied, SiteRefused
from hanse.ids import ClientName, Fqcn, job_cell
from hanse.job import JobRecord
from hanse.launch.log_lines import FieldLogger
from hanse.learning.workflow import CLIENT_LOST, DEADLINE
from hanse.messages import Channel, DeployJob, JobEnded, StartJob, TaskFault
from hanse.server.bounds import ending, shortened
from hanse.server.causes import code_of
from hanse.server.run_process import is_set_within
from hanse.server.run_services import RunServices

_log = logging.getLogger(__name__)

DEPLOY_TIMEOUT_S: Final = 120.0
"""How long a client may take to fetch and unpack a job's package: 64 MiB over a slow line."""
START_TIMEOUT_S: Final = 30.0
CONNECT_WITHIN_S: Final = 120.0
"""How long a client's process that was started may take to connect before the run counts its client as suspect."""


@dataclass(frozen=True, slots=True)
class Trouble:
    """What befell a client last, and the last lines of the log there; without a code it has got over it."""

    code: str = ""
    log_tail: str = ""


class ClientProcesses:
    """The processes of a run's clients; no method waits, for *spawn* takes the work that takes longer.

    *over* is set when the job has ended. *changed* is told of a client that is back, lost or failed, and why.
    *suspect* is called when one has become suspect by itself, and may in time be lost.
    """

    def __init__(
        self,
        record: JobRecord,
        run: Run,
        services: RunServices,
        *,
        over: asyncio.Event,
        spawn: Callable[[Coroutine[Any, Any, None], str], None],
        changed: Callable[[ClientName, str, str], None],
        suspect: Callable[[], None],
    ) -> None:
        self._record, self._run = record, run
        self._services = services
        self._over = over
        self._spawn = spawn
        self._changed = changed
        self._suspect = suspect
        self._log = FieldLogger(_log, {"job": record.job_id})
        self._unstarted: set[ClientName] = set()
        self._being_started: Counter[ClientName] = Counter()
        self._troubles = {
            answer.key.client: Trouble(answer.fault.code, answer.fault.log_tail)
            for answer in run.answers
            if answer.fault is not None
        } | {failed.client: Trouble(failed.code) for failed in record.failed_clients}

    # their life

    def begin(self) -> None:
        """Have them started, for a run that begins."""
        for client in self._run.clients:
            self._begin(client)

    def take_up(self, heard: Mapping[ClientName, bool]) -> None:
        """Have those started that do not run any more, of a run that is taken up: as their next heartbeats tell.

        *heard* is what those have told that came already: whether the client runs the job.
        """
        self._unstarted.update(self._run.clients)
        for client, reported in heard.items():
            self.heard(client, reported=reported, dead=False)

    def _begin(self, client: ClientName, *, noted: bool = False) -> None:
        self._being_started[client] += 1
        self._spawn(self._start(client, noted=noted), f"start {client} of {self._record.job_id}")

    async def _start(self, client: ClientName, *, noted: bool) -> None:
        try:
            attempt = await self._started(client, noted=noted)
        finally:
            self._being_started[client] -= 1
        if attempt is not None:
            await self._expect(client, attempt)

    async def _started(self, client: ClientName, *, noted: bool) -> int | None:
        """Have *client* start its process; return which start that was, ``None`` when it did not come to it."""
        services, record, run = self._services, self._record, self._run
        if not noted and run.starting(client, now=services.now()) is None:
            return None
        attempt = run.participant(client).attempt
        try:
            await deploy(services.cell, record, client)
            identity = services.credentials(job_cell(client, record.job_id), record.job_id)
            start = StartJob(record.job_id, identity, attempt)
            await services.cell.ask(Fqcn(client), Channel.JOB, "start", start, timeout_s=START_TIMEOUT_S)
        except HanseError as error:
            if error.retryable:
                self._log.info("client not started", extra={"client": client, "reason": error.reason})
                self._unstarted.add(client)
                run.not_started(client, error.reason, now=services.now())
                self._suspect()
            elif run.failed(client, error.reason, now=services.now()):
                self._troubles[client] = Trouble(code_of(error))
                self._changed(client, "failed", SiteRefused(client, error.reason).reason)
        else:
            self._log.info("client started", extra={"client": client, "package": record.package})
            return attempt
        return None

    async def _expect(self, client: ClientName, attempt: int) -> None:
        """Take *client* for suspect if the process that it has started does not connect in time."""
        if await is_set_within(self._over, CONNECT_WITHIN_S):
            return
        part = self._run.participant(client)
        if (part.state, part.attempt) == (ClientState.STARTING, attempt):
            self._log.warning("a client's process has not connected", extra={"client": client})
            self._run.stream_down(client, now=self._services.now(), stream=None)
            self._suspect()

    # what is heard of them

    def stream_up(self, client: ClientName, stream: object) -> bool:
        """Take note that *client*'s process is connected; return whether it was not."""
        self._unstarted.discard(client)
        was_lost = client in self._run.lost_clients
        before = self._run.stream_up(client, now=self._services.now(), stream=stream)
        if before is not None and (was_lost or before is ClientState.SUSPECT):
            self._changed(client, "back", "")
        return before is not None

    def stream_down(self, client: ClientName, stream: object) -> None:
        """Take note that a stream of *client* broke: its process's or its agent's."""
        self._run.stream_down(client, now=self._services.now(), stream=stream)

    def lose(self, lost_after_s: float) -> None:
        """Have the run hear of the clients that are lost by now."""
        absent = self._services.absent()
        for client in self._run.lost(self._services.now(), lost_after_s):
            reason = with_absence(f"{client} was {self._run.participant(client).reason}", client, absent)
            self._log.warning("client lost", extra={"client": client, "reason": reason})
            code = absent[client].code if client in absent else CLIENT_LOST
            self._troubles[client] = Trouble(code, self.trouble(client).log_tail)
            self._changed(client, "lost", reason)

    def heard(self, client: ClientName, *, reported: bool, dead: bool) -> None:
        """Take note of *client*'s heartbeat: whether it *reported* this job, or has lost it since (*dead*).

        Where it is being started, or could not be, no heartbeat tells of that start: the one before is known to have
        ended.
        """
        if reported:
            self._unstarted.discard(client)
        elif client in self._unstarted:
            if not self._over.is_set():
                self._unstarted.discard(client)
                self._begin(client)
        elif dead and not self._being_started[client]:
            attempt = max(self._run.participant(client).attempt, 1)  # at least, where another server had it started
            end = JobEnded(self._record.job_id, attempt, status=1, log_tail="the client no longer runs it")
            self.ended(client, end)

    def agent_is_new(self, client: ClientName) -> None:
        """Take note that *client*'s agent has registered anew, and may have lost the job's process.

        Its next heartbeat tells; that the process is connected does not, as its end may be noticed only later.
        """
        if not self._over.is_set():
            self._unstarted.add(client)

    def ended(self, client: ClientName, end: JobEnded) -> None:
        """Take note that *client*'s process ended unasked: it is started again, or given up."""
        log_tail = ending(end.log_tail)
        code = OutOfMemory.code if end.cause == OutOfMemory.code else ProcessDied.code
        self._troubles[client] = Trouble(code, log_tail)
        verdict = self._run.process_ended(
            client,
            attempt=end.attempt,
            status=end.status,
            now=self._services.now(),
            last_line=shortened(log_tail.strip().rpartition("\n")[2]),
            cause=end.cause,
        )
        match verdict:
            case Restart():
                self._log.warning("a client's process died and is started again", extra={"client": client})
                self._begin(client, noted=True)
            case GiveUp(reason=reason):
                self._changed(client, "failed", reason)
            case None:
                pass

    def answered(self, client: ClientName, fault: TaskFault | None) -> None:
        """Take note that an answer of *client* counts, a *fault* or none."""
        if fault is not None:
            self._troubles[client] = Trouble(fault.code, fault.log_tail)
        elif client in self._troubles:
            self._troubles[client] = Trouble(log_tail=self.trouble(client).log_tail)

    def trouble(self, client: ClientName) -> Trouble:
        """Return what befell *client* last."""
        return self._troubles.get(client, Trouble())

    def cause_of(self, client: ClientName, fault: str) -> Trouble:
        """Return why there is a *fault* of that code in the place of *client*'s answer.

        That one whose process is at work was too late is no matter of what befell it earlier.
        """
        trouble = self.trouble(client)
        is_late = fault == DEADLINE and self._run.participant(client).state is ClientState.RUNNING
        return Trouble(fault) if is_late or not trouble.code else trouble


async def deploy(cell: Cell, record: JobRecord, client: ClientName) -> None:
    """Have *client* fetch the job and check it against its policy; there already is fine.

    Raises:
        HanseError: it refuses, with its reason, or cannot be reached.
    """
    request = DeployJob(
        job_id=record.job_id,
        name=record.spec.name,
        submitter=record.submitter,
        spec=record.spec,
        package=record.package,
        package_bytes=record.package_bytes,
    )
    await cell.ask(Fqcn(client), Channel.JOB, "deploy", request, timeout_s=DEPLOY_TIMEOUT_S)
