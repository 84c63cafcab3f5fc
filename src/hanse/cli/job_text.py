"""Jobs as text for people, and how a command ends that saw one to its end."""

from collections.abc import Iterator
from typing import Final

from hanse.cli.output import duration_text, metrics_text, time_text
from hanse.job import JobState
from hanse.messages import JobView

JOB_FAILED: Final = 20
"""The command went well, and the job that it waited for failed."""

JOB_ABORTED: Final = 21
"""The command went well, and the job that it waited for was aborted."""

LAST_ROUNDS: Final = 20
"""How many rounds of a job are shown; ``--format json`` has them all."""


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
        view.reason or waiting_text(view) or metrics_text(view.metrics),
    )


def job_lines(view: JobView, *, where: str = "") -> Iterator[str]:
    """Yield all that is known of a job, a line at a time; *where* its result is, or how to get it."""
    yield f"job        {view.job_id}"
    yield f"state      {view.state}"
    if view.reason:
        yield f"reason     {view.reason}{f' ({view.code})' if view.code else ''}"
    if waiting := waiting_text(view):
        yield f"waits for  {waiting}"
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


def rounds_text(view: JobView) -> str:
    """Return how far a job is."""
    return f"{view.round}/{view.rounds}" if view.rounds else str(view.round)


def waiting_text(view: JobView) -> str:
    """Return what a job waits for and until when; empty when it does not wait."""
    if not view.waiting_for:
        return ""
    return f"{view.waiting_for}, until {time_text(view.waiting_until)}" if view.waiting_until else view.waiting_for
