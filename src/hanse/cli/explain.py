"""``hanse explain``: what a stable code means and what to do, without asking anybody."""

from typing import Annotated

from cyclopts import Parameter

from hanse.cli.output import TEXT, Output
from hanse.codes import CODES
from hanse.errors import NotFound


def explain(
    code: Annotated[
        str | None, Parameter(help="The code, as an error or a job's record has it; none lists all.")
    ] = None,
    /,
    *,
    output: Output = TEXT,
) -> None:
    """Say what a code means and what to do about it."""
    if code is None:
        if output.is_json:
            output.document({"codes": {name: known.means for name, known in CODES.items()}})
        else:
            output.table(
                ("code", "meaning"), ((name, known.means) for name, known in sorted(CODES.items())), nothing=""
            )
        return
    if code not in CODES:
        raise NotFound("code", code)
    known = CODES[code]
    if output.is_json:
        output.document({"code": known.name, "means": known.means, "advice": known.advice})
    else:
        output.say(f"{known.name}: {known.means}", known.advice)
