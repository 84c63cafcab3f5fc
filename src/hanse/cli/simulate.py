"""``hanse simulate``."""

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NoReturn

from cyclopts import Parameter

from hanse.cli.job_text import job_lines, job_status
from hanse.cli.logs import show_logs
from hanse.cli.output import TEXT, Output
from hanse.cli.progress import JobProgress
from hanse.errors import ConfigError
from hanse.ids import JobId
from hanse.job import JobSpec
from hanse.messages import JobView
from hanse.run.authoring import spec_of_folder
from hanse.simulator import SimulationFailed
from hanse.simulator import simulate as run_simulation
from hanse.storage.models import write_safetensors


def simulate(
    folder: Annotated[Path, Parameter(help="The job's folder, with [tool.hanse] in its pyproject.toml.")],
    /,
    *,
    clients: Annotated[int, Parameter(help="How many clients take part: site-1, site-2, ...")] = 10,
    seed: Annotated[int | None, Parameter(help="In place of the job's own seed.")] = None,
    workers: Annotated[int | None, Parameter(help="How many clients train at once; by default one a core.")] = None,
    out: Annotated[Path | None, Parameter(help="Write the model to this .safetensors file.")] = None,
    output: Output = TEXT,
) -> int:
    """Run a job here, with simulated clients; the exit status is as for 'hanse job wait'."""
    show_logs(logging.ERROR, as_json=output.is_json, verbose=output.verbose)
    if out is not None and (out.is_dir() or not out.absolute().parent.is_dir()):
        # Now, for the model of a long simulation would be lost.
        raise ConfigError("--out", got=str(out), expected="a file in a folder that is there")
    with _ended_in_order(), JobProgress(is_quiet=output.is_json) as progress:
        progress.add(_not_begun(spec_of_folder(folder)))
        try:
            result = run_simulation(folder, clients, seed=seed, workers=workers, on_event=progress.add)
        except SimulationFailed as failed:
            view = failed.view
        else:
            view = result.view
            if out is not None:
                write_safetensors(result.model, out)
    if output.is_json:
        output.document({"job": view, "model": str(out.absolute()) if out is not None and view.result else None})
    else:
        output.say(*job_lines(view, where=str(out) if out is not None else "--out FILE writes it"))
    return job_status(view.state)


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """Have SIGTERM end the block as Ctrl-C does: no worker is left, and no file of the simulation's own."""
    before = signal.signal(signal.SIGTERM, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(number: int, _: object) -> NoReturn:
    raise SystemExit(128 + number)


def _not_begun(spec: JobSpec) -> JobView:
    rounds = spec.workflow.settings.get("rounds", 0)
    total = rounds if isinstance(rounds, int) else 0
    return JobView(JobId(spec.name), spec.name, state="starting", submitter="", submitted_at=0.0, rounds=total)
