"""Jobs as text for people, and how a command ends that saw one to its end."""

from collections.abc import Iterator
from typing import Final

from hanse.cli.output import duration_text, metrics_text, time_text
from hanse.codes import CODES
from hanse.job import JobState
from hanse.messages import ClientView, JobView, Waiting

JOB_FAILED: Final = 20
"""The command went well, and the job that it waited for failed."""

JOB_ABORTED: Final = 21
"""The command went well, and the job that it waited for was aborted."""

LAST_ROUNDS: Final = 20
"""How many rounds of a job are shown; ``--format json`` has them all."""

SHOWN_CLIENTS: Final = 20
"""How many of the clients that a job waits for are shown; ``--format json`` has them all."""

STANDINGS: Final = {
    "absent": "cannot come",
    "deploying": "has not taken the job yet",
    "deployed": "has the job, and is not started yet",
    "starting": "its process is being started",
    "running": "connected and working",
    "suspect": "suspect, for it is not connected",
    "lost": "lost, for it has been away too long",
    "failed": "failed, and out of the run",
}
"""What a client's state means for whoever waits for it."""


def job_status(state: str) -> int:
    """Return what a command ends with that saw a job to its end in *state*."""
    return {JobState.FAILED.value: JOB_FAILED, JobState.ABORTED.value: JOB_ABORTED}.get(state, 0)


def job_line(view: JobView) -> tuple[str, ...]:
    """Return a job as the cells of one row: job, state, round, when and by whom submitted, remark."""
    return (
        view.job_id,
        view.state,
        rounds_text(view),
        time_text(view.submitted_at),
        view.submitter,
        view.reason or metrics_text(view.metrics) or waiting_text(view),
    )


def job_lines(view: JobView, *, where: str = "") -> Iterator[str]:
    """Yield all that is known of a job, a line at a time; *where* its result is, or how to get it."""
    yield f"job        {view.job_id}"
    yield f"state      {view.state}"
    yield from _failure_lines(view)
    for waiting in view.waiting:
        yield from _waiting_lines(waiting)
    yield f"submitted  {time_text(view.submitted_at)} by {view.submitter}"
    if view.started_at:
        until = f", took {duration_text(view.ended_at - view.started_at)}" if view.ended_at else ""
        yield f"started    {time_text(view.started_at)}{until}"
    if view.round or view.rounds:
        yield f"round      {rounds_text(view)}"
    for client in view.clients:
        state = f"  {client.state}" if client.state else ""
        yield f"client     {client.name}{state}{f': {client.reason}' if client.reason else ''}"
    rounds = [each for each in view.history if each.round]  # round 0 is the initial model
    if len(rounds) > LAST_ROUNDS:
        yield f"rounds     (the last {LAST_ROUNDS})"
    for each in rounds[-LAST_ROUNDS:]:
        yield f"round {each.round:<4} {metrics_text(each.metrics)}  [{duration_text(each.took_s)}]"
    if view.result:
        yield f"result     {view.result_bytes:,} bytes ({where or f'hanse job download {view.job_id}'})"
    if view.log_tail:
        yield f"log        its last lines at {view.client or 'the server'}:"
        yield from (f"           {line}" for line in view.log_tail.splitlines())


def rounds_text(view: JobView) -> str:
    """Return how far a job is."""
    return f"{view.round}/{view.rounds}" if view.rounds else str(view.round)


def waiting_text(view: JobView) -> str:
    """Return what a job waits for and until when, in one line; empty when it does not wait."""
    return "; ".join(f"{each.what}, until {time_text(each.until)}" for each in view.waiting)


def standing_text(client: ClientView) -> str:
    """Return how a client stands that is waited for, and since when."""
    state = STANDINGS.get(client.state, client.state)
    start = f", start {client.attempt}" if client.attempt > 1 else ""
    since = f", since {time_text(client.since)}" if client.since else ""
    return f"{state}{start}{since}{f': {client.reason}' if client.reason else ''}"


def _failure_lines(view: JobView) -> Iterator[str]:
    if view.reason:
        yield f"reason     {view.reason}{f' ({view.code})' if view.code else ''}"
    if view.client:
        yield f"at         {view.client}{f' ({view.cause})' if view.cause else ''}"
    if view.advice:
        known = next((code for code in (view.cause, view.code) if code in CODES), view.code)
        yield f"advice     {view.advice} (hanse explain {known})"


def _waiting_lines(waiting: Waiting) -> Iterator[str]:
    yield f"waits for  {waiting.what}"
    yield f"           since {time_text(waiting.since)}, until {time_text(waiting.until)}; then {waiting.then}"
    for client in waiting.whom[:SHOWN_CLIENTS]:
        yield f"           {client.name}: {standing_text(client)}"
    if len(waiting.whom) > SHOWN_CLIENTS:
        yield f"           and {len(waiting.whom) - SHOWN_CLIENTS} more"
