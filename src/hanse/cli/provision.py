"""``hanse provision``."""

from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from hanse.cli.output import TEXT, Output
from hanse.identity.provision import KitReport
from hanse.identity.provision import provision as provision_project


def provision(
    project_file: Annotated[Path, Parameter(help="The project.toml that says who takes part.")],
    /,
    *,
    out: Annotated[Path, Parameter(help="The folder for the authority and the kits.")] = Path("kits"),
    output: Output = TEXT,
) -> None:
    """Make the project's authority and a kit for each participant.

    Run again after adding participants, it makes theirs and leaves every existing kit as it is.
    """
    show(provision_project(project_file, out, now=datetime.now(UTC)), output)


def show(reports: Sequence[KitReport], output: Output) -> None:
    """Print what became of kits."""
    if output.is_json:
        output.document({"kits": [asdict(report) for report in reports]})
        return
    rows = [
        (report.name, report.role, report.state.value, str(report.path), _day(report.expires)) for report in reports
    ]
    output.table(("name", "role", "kit", "where", "valid until"), rows, nothing="nobody takes part")
    for authority in sorted({report.authority for report in reports if report.authority}):
        output.say(f"the authority's fingerprint (SHA-256): {authority}")
    for report in reports:
        if report.note:
            output.say(f"{report.name}: {report.note}")


def _day(when: datetime | None) -> str:
    return f"{when:%Y-%m-%d}" if when else "-"
