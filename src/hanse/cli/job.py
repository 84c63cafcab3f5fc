"""``hanse job …``: what administrators ask about jobs, each one request or a few. ``submit`` has its own module."""

import asyncio
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from cyclopts import Parameter

from hanse.admin.session import AdminSession
from hanse.cli.asking import KitFolder, ask
from hanse.cli.following import followed, show_job
from hanse.cli.job_text import job_line
from hanse.cli.output import TEXT, Output
from hanse.cli.progress import JobProgress
from hanse.errors import Conflict, EnvironmentFault, ProtocolError
from hanse.ids import JobId, is_job_id
from hanse.messages import JobView

JobName: TypeAlias = Annotated[str, Parameter(help="A job's id, or a beginning of it that only one job has.")]
StateName: TypeAlias = Literal["submitted", "scheduled", "running", "completed", "failed", "aborted"]


def list_jobs(
    *,
    state: Annotated[StateName | None, Parameter(help="Only jobs in this state.")] = None,
    limit: Annotated[int, Parameter(help="At most so many, the newest.")] = 100,
    kit: KitFolder = None,
    output: Output = TEXT,
) -> None:
    """List jobs, newest first."""
    jobs = ask(kit, lambda session: session.list(state=state or "", limit=limit), output)
    if output.is_json:
        output.document({"jobs": jobs})
    else:
        output.table(("job", "state", "round", "submitted", "by", "remark"), map(job_line, jobs), nothing="no jobs")


def show(job: JobName, /, *, kit: KitFolder = None, output: Output = TEXT) -> None:
    """Show one job: its state, what it waits for or how it ended, its clients, its rounds."""
    show_job(ask(kit, lambda session: session.show(job), output), output)


def wait(
    job: JobName,
    /,
    *,
    timeout_s: Annotated[float | None, Parameter(name="--timeout", help="Give up after so many seconds.")] = None,
    kit: KitFolder = None,
    output: Output = TEXT,
) -> int:
    """Follow a job to its end; the exit status says how it ended.

    0: completed; 20: failed; 21: aborted. Of a bad end it prints the reason with its code, what to do, and the last
    lines of the log. The server may be restarted meanwhile.
    """

    async def work(session: AdminSession) -> int:
        try:
            async with asyncio.timeout(timeout_s):
                return await followed(session, job, progress, output)
        except TimeoutError:
            raise EnvironmentFault(f"job {job} has not ended within {timeout_s:g} s; it goes on") from None

    progress = JobProgress(is_quiet=output.is_json)
    return ask(kit, work, output, on_waiting=progress.say_waiting)


def log(
    job: JobName,
    /,
    *,
    client: Annotated[str, Parameter(help="The log as this client last reported it, not the server's.")] = "",
    lines: Annotated[int, Parameter(help="So many lines, the last ones.")] = 200,
    kit: KitFolder = None,
    output: Output = TEXT,
) -> None:
    """Show the last lines of a job's log, at the server or as a client reported it."""
    text = ask(kit, lambda session: session.log(job, client=client, lines=lines), output)
    if output.is_json:
        output.document({"job": job, "client": client, "lines": text.splitlines()})
    elif text:
        output.say(*text.splitlines())


def abort(job: JobName, /, *, kit: KitFolder = None, output: Output = TEXT) -> None:
    """End a job; what is committed stays."""
    view = ask(kit, lambda session: session.abort(job), output)
    if output.is_json:
        output.document(view)
    else:
        output.say(f"job {view.job_id} is {view.state}")


def download(
    job: JobName,
    path: Annotated[Path | None, Parameter(help="The file; by default JOB.safetensors, here.")] = None,
    /,
    *,
    force: Annotated[bool, Parameter(negative=(), help="Write over a file that is there.")] = False,
    kit: KitFolder = None,
    output: Output = TEXT,
) -> None:
    """Fetch the model that a job resulted in, as a .safetensors file."""

    async def work(session: AdminSession) -> tuple[JobView, Path]:
        target = path or Path(f"{_checked((await session.show(job)).job_id)}.safetensors")
        if target.exists() and not force:
            raise Conflict(f"the file {target}", state="there already", wanted="written (--force writes over it)")
        return await session.download(job, target), target

    view, target = ask(kit, work, output)
    if output.is_json:
        output.document({"job_id": view.job_id, "path": str(target.absolute()), "size_bytes": view.result_bytes})
    else:
        output.say(f"{target} ({view.result_bytes:,} bytes)")


def _checked(job_id: JobId) -> JobId:
    """Return *job_id*, which is to be a file's name, here.

    Raises:
        ProtocolError: it is none: a server could choose the folder by it.
    """
    if not is_job_id(job_id):
        raise ProtocolError("JobView.job_id", got=job_id, expected="lower-case letters, digits and dashes")
    return job_id
