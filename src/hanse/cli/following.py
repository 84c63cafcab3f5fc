"""What commands on jobs share: a job shown, and followed to its end."""

from hanse.admin.session import AdminSession
from hanse.cli.job_text import job_lines, job_status
from hanse.cli.output import Output
from hanse.cli.progress import JobProgress
from hanse.messages import JobView


async def followed(session: AdminSession, job: str, progress: JobProgress, output: Output) -> int:
    """Show how the job fares until its end, then the job; return the exit status that says how it ended."""
    with progress:
        async for seen in session.follow(job):
            progress.add(seen)
    view = await session.wait(job)  # it has ended; asked in a way that a break of the connection does not hurt
    show_job(view, output)
    return job_status(view.state)


def show_job(view: JobView, output: Output) -> None:
    """Print all that is known of a job."""
    if output.is_json:
        output.document(view)
    else:
        output.say(*job_lines(view))
