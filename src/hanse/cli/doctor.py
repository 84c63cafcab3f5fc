"""``hanse doctor``: whether a kit would work here, a line a check."""

import asyncio
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Final

from cyclopts import Parameter

from hanse.cli.failures import failure_of
from hanse.cli.logs import show_logs
from hanse.cli.output import TEXT, Output
from hanse.cli.process_file import SERVER_FILE
from hanse.client.workspace import CLIENT_FILE
from hanse.doctor.checkup import Surroundings, examine
from hanse.doctor.findings import Check, Finding, Verdict, first_failure
from hanse.launch.held import held_by

_SHOWN: Final = {Verdict.OK: "ok", Verdict.WARN: "warn", Verdict.FAIL: "FAIL", Verdict.SKIP: "skip"}
_CHECK_COLUMNS: Final = max(map(len, Check))
_LOCKED: Final = (SERVER_FILE, CLIENT_FILE, "lock")
"""What a process that works in a workspace holds there; the first that tells its number comes first."""


def doctor(kit: Annotated[Path, Parameter(help="The folder of anybody's kit.")], /, *, output: Output = TEXT) -> int:
    """Check a kit before any job: files, certificates, disk, and the way to the server. Changes nothing.

    Prints a line a check. Ends with 0 when nothing failed, otherwise with the exit status of what failed first.
    """
    show_logs(logging.WARNING, as_json=output.is_json, verbose=output.verbose)
    return asyncio.run(_tell(examine(kit, Surroundings(process_in=_process_in)), output))


async def _tell(findings: AsyncIterator[Finding], output: Output) -> int:
    told = []
    async for finding in findings:
        if output.is_json:
            output.line(_as_json(finding))
        else:
            output.say(_as_text(finding))
        told.append(finding)
    failed = first_failure(told)
    return 0 if failed is None else failure_of(failed).status


def _as_text(finding: Finding) -> str:
    about = f"{finding.about}: " if finding.about not in finding.text else ""  # an error names it itself
    return f"{_SHOWN[finding.verdict]:<4}  {finding.check:<{_CHECK_COLUMNS}}  {about}{finding.text}"


def _as_json(finding: Finding) -> dict[str, str]:
    return {
        "check": finding.check.value,
        "about": finding.about,
        "verdict": finding.verdict.value,
        "text": finding.text,
        "code": failure_of(finding.error).code if finding.error is not None else "",
    }


def _process_in(workspace: Path) -> int | None:
    return next((number for name in _LOCKED if (number := held_by(workspace / name)) is not None), None)
