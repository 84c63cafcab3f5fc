"""A server's own certificate, which is warned of before it ends: from then on nobody can connect."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from hanse.coordination.certificates import ENDS_SOON_S, servers_remark

_log = logging.getLogger(__name__)


@asynccontextmanager
async def warning_of_the_end(ends_at: float, wall: Callable[[], float]) -> AsyncIterator[None]:
    """Within the block, log that this server's certificate ends at *ends_at* (POSIX seconds): a while before, and then.

    *wall* is the time of day.
    """
    async with asyncio.TaskGroup() as group:
        warning = group.create_task(_warn(ends_at, wall), name="warn of this server's certificate")
        try:
            yield
        finally:
            warning.cancel()


async def _warn(ends_at: float, wall: Callable[[], float]) -> None:
    said = ""
    for due_at in (ends_at - ENDS_SOON_S, ends_at):
        await asyncio.sleep(max(due_at - wall(), 0.0))  # it is a time that is waited for
        if (remark := servers_remark(ends_at, max(wall(), due_at))) != said:
            _log.warning("this server's certificate ends", extra={"reason": remark})
            said = remark
