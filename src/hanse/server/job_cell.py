"""The cell of a run's process: ``server.<job>``, linked to its server on this machine while the process lives."""

import asyncio
import random
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Final

from hanse.cell.cell import Cell
from hanse.cell.connector import Connector, Dial
from hanse.cell.link import Link
from hanse.ids import SERVER, JobId, job_cell
from hanse.messages import PROTOCOL_VERSIONS, Credentials, Header, Hello, Welcome
from hanse.run.server_link import ServerLink

CONNECT_TIMEOUT_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class JobCell:
    """The cell, the run's side of the ``run`` channel on it, and what ends both."""

    cell: Cell
    link: ServerLink
    close: Callable[[], Coroutine[Any, Any, None]]


async def connect(
    job_id: JobId,
    parent_url: str,
    credentials: Credentials,
    *,
    project: str,
    on_abort: Callable[[str], None],
    dial: Dial | None = None,
) -> JobCell:
    """Return the cell of *job_id*'s run, linked to the server at *parent_url*; *on_abort* gets the reason of an abort.

    Raises:
        HanseError: the server does not answer, or does not take the credentials.
    """
    cell = Cell(job_cell(SERVER, job_id))

    async def take_session(link: Link, welcome: Welcome) -> None:
        del link
        cell.headers[Header.SSID] = welcome.ssid

    connector = Connector(
        cell,
        targets=[parent_url],
        hello=lambda: Hello(PROTOCOL_VERSIONS, cell.fqcn, project, credentials=credentials),
        tls=None,
        rng=random.Random(),  # noqa: S311 - jitter between tries, not a secret
        on_welcome=take_session,
        dial=dial,
    )
    link = ServerLink(cell, on_abort=on_abort)
    keeping = asyncio.create_task(connector.run(), name=f"link of {cell.fqcn}")  # awaited by close

    async def close() -> None:
        await connector.close()
        await asyncio.gather(keeping, return_exceptions=True)
        await cell.close()

    try:
        await connector.wait_ready(CONNECT_TIMEOUT_S)
    except BaseException:
        await close()
        raise
    return JobCell(cell, link, close)
