"""What runs' processes and clients' processes send, handed to the run that it is about."""

from typing import Final

from hanse.cell.cell import Cell
from hanse.errors import NotInService, ProtocolError, StaleEpoch
from hanse.ids import ClientName, Fqcn, JobId, split_cell
from hanse.messages import (
    CancelTasks,
    Channel,
    CommitRound,
    Header,
    IssueTasks,
    JobEnded,
    LogMetrics,
    Message,
    RunEnded,
    TaskResult,
    Topic,
    ok,
)
from hanse.server.active_run import ActiveRun
from hanse.server.bounds import MAX_STARTS
from hanse.server.live_jobs import LiveJobs
from hanse.server.payloads import expect

TOPICS: Final[tuple[Topic, ...]] = (
    (Channel.RUN, "attach"),
    (Channel.RUN, "issue"),
    (Channel.RUN, "cancel"),
    (Channel.RUN, "commit"),
    (Channel.RUN, "ended"),
    (Channel.RUN, "heartbeat"),
    (Channel.TASK, "result"),
    (Channel.TASK, "metrics"),
    (Channel.SERVER, "job_ended"),
)
"""What the jobs of a tenure answer, in the order of their handlers."""


class RunDesk:
    """Answers on *cell* what is about the run of one of the *live* jobs, which the sender's own address names."""

    def __init__(self, cell: Cell, live: LiveJobs) -> None:
        self._live = live
        handlers = (
            self._on_attach,
            self._on_issue,
            self._on_cancel,
            self._on_commit,
            self._on_ended,
            self._on_run_heartbeat,
            self._on_result,
            self._on_metrics,
            self._on_job_ended,
        )
        for (channel, topic), handler in zip(TOPICS, handlers, strict=True):
            cell.on(channel, topic, handler)

    async def _on_attach(self, message: Message) -> Message:
        return ok(await self._sender_run(message)[0].attach())

    async def _on_issue(self, message: Message) -> None:
        await self._sender_run(message)[0].issue(expect(message, IssueTasks))

    async def _on_cancel(self, message: Message) -> None:
        await self._sender_run(message)[0].cancel(expect(message, CancelTasks).keys)

    async def _on_commit(self, message: Message) -> None:
        await self._sender_run(message)[0].commit(expect(message, CommitRound))

    async def _on_ended(self, message: Message) -> None:
        await self._sender_run(message)[0].ended(expect(message, RunEnded))

    def _on_run_heartbeat(self, message: Message) -> None:
        self._sender_run(message)[0].beats()

    async def _on_result(self, message: Message) -> None:
        run, client = self._sender_run(message)
        try:
            await run.result(client, expect(message, TaskResult), message)
        except StaleEpoch as deposed:  # the answer is good, and for the server that holds the lease by now
            raise NotInService(f"Server not in service: {deposed.reason}") from deposed

    def _on_metrics(self, message: Message) -> None:
        run, client = self._sender_run(message)
        run.log_metrics(client, expect(message, LogMetrics))

    def _on_job_ended(self, message: Message) -> None:
        end = expect(message, JobEnded)
        if end.attempt > MAX_STARTS:
            expected = f"a number of a start, up to {MAX_STARTS}"
            raise ProtocolError("JobEnded.attempt", got=end.attempt, expected=expected)
        client = ClientName(message.headers.get(Header.ORIGIN, ""))
        if (run := self._live.runs.get(end.job_id)) is None:
            self._live.demand_taken_up(end.job_id)
        elif client in run.run.clients:
            run.processes.ended(client, end)

    def _sender_run(self, message: Message) -> tuple[ActiveRun, ClientName]:
        """Return the run that the sender's cell belongs to, and its participant's name."""
        participant, job_id = split_cell(Fqcn(message.headers.get(Header.ORIGIN, "")))
        return self._live.run_of(job_id or JobId("")), ClientName(participant)


def answer_not_in_service(cell: Cell) -> None:
    """Have *cell* answer what the jobs of a tenure answer, while there is no tenure: another time, or another server.

    Without this a client's answer would be refused for good, as one to a run that there is not.
    """
    for channel, topic in TOPICS:
        cell.on(channel, topic, _not_in_service)


def _not_in_service(message: Message) -> None:
    del message
    raise NotInService
