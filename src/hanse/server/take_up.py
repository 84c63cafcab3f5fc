"""Having here, before a run goes on, what it needs and another server may have: its package, its code, its tensors."""

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from hanse.errors import StoreFailed
from hanse.job import JobRecord
from hanse.server.run_folder import RunFolder
from hanse.server.run_services import RunServices
from hanse.server.run_tensors import needed_tensors, without_lost
from hanse.storage.records import RunState

_log = logging.getLogger(__name__)

FETCH_WITHIN_S: Final = 300.0
"""A job's package that a bucket has not given by then is asked for again later; what has come of it is kept."""
RETRY_PAUSE_S: Final = 5.0
"""After this it is tried again to take a run up: a bucket, or a full disk, tells nobody when it is well again."""


async def fetch(record: JobRecord, folder: RunFolder) -> None:
    """Have the job's package and code in its *folder*.

    Raises:
        StoreFailed: they cannot be had just now.
    """
    limit = asyncio.timeout(FETCH_WITHIN_S)
    try:
        async with limit:
            await folder.have_package(record)
    except TimeoutError as late:
        if not limit.expired():
            raise
        why = f"the job's package was not here after {FETCH_WITHIN_S:g} s"
        raise StoreFailed(f"fetching job {record.job_id}", why) from late


async def take_over(
    record: JobRecord, folder: RunFolder, services: RunServices, *, failed: Callable[[StoreFailed], None]
) -> RunState:
    """Return where the run stands, when its code and all tensors that this takes are in its *folder*.

    That is tried again until it is given up; *failed* is told each time why.

    Raises:
        TensorsLost: they are nowhere any more.
        StoreFailed: they could not be had for so long that the run is given up.
    """
    within_s = services.mend_within_s
    last = StoreFailed(f"taking up job {record.job_id}", f"it was not done within {within_s:g} s")
    limit = asyncio.timeout(within_s)
    try:
        async with limit:
            while True:
                try:
                    return await _taken_over(record, folder, services)
                except StoreFailed as failure:
                    last = failure
                    failed(failure)
                    _log.error("taking a run up waits", extra={"job": record.job_id, "reason": failure.reason})
                await asyncio.sleep(RETRY_PAUSE_S)  # nobody tells when it would succeed
    except TimeoutError as late:
        if not limit.expired():
            raise
        raise last from late


async def _taken_over(record: JobRecord, folder: RunFolder, services: RunServices) -> RunState:
    await folder.have_package(record)
    state = await services.store.snapshot(record.job_id)
    lost = await folder.take_over(needed_tensors(state))
    if not lost:
        return state
    return await without_lost(services.store, services.epoch, record.job_id, state, lost)
