"""``hanse job submit``: apart from the other commands on jobs because it alone needs the job's code, and so NumPy."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from hanse.admin.session import AdminSession
from hanse.cli.asking import KitFolder, ask
from hanse.cli.following import followed
from hanse.cli.output import TEXT, Output
from hanse.cli.progress import JobProgress
from hanse.run.authoring import package_of
from hanse.run.loading import importing_from, workflow_of


def submit(
    folder: Annotated[Path, Parameter(help="The job's folder, with [tool.hanse] in its pyproject.toml.")],
    /,
    *,
    wait: Annotated[bool, Parameter(negative=(), help="Follow the job to its end, as 'hanse job wait' does.")] = False,
    kit: KitFolder = None,
    output: Output = TEXT,
) -> int:
    """Submit a job, after checking its definition here; prints its id."""
    spec, package = package_of(folder)
    with importing_from(folder):
        workflow_of(spec)

    async def work(session: AdminSession) -> int:
        submitted = await session.submit(package)
        if not output.is_json:
            output.say(submitted.job_id)
        elif not wait:
            output.document(submitted)
        return await followed(session, submitted.job_id, progress, output) if wait else 0

    progress = JobProgress(is_quiet=output.is_json or not wait)
    return ask(kit, work, output, on_waiting=progress.say_waiting)
