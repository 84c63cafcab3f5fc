"""``hanse server promote``."""

import time
from typing import Annotated

from cyclopts import Parameter

from hanse.admin.session import AdminSession
from hanse.cli.asking import KitFolder, ask
from hanse.cli.output import TEXT, Output


def promote(
    name: Annotated[str, Parameter(help="The server that takes over; 'hanse server status' lists those standing by.")],
    /,
    *,
    kit: KitFolder = None,
    output: Output = TEXT,
) -> None:
    """Have a server that stands by take over; running jobs go on there.

    Returns when it serves. No accepted work is lost, and clients change over by themselves.
    """
    began = time.monotonic()
    status = ask(kit, lambda session: AdminSession.promote(session, name), output)
    took_s = time.monotonic() - began
    if output.is_json:
        output.document({"serving": status.name, "took_s": round(took_s, 3)})
    else:
        output.say(f"server {status.name} serves (after {took_s:.1f} s)")
