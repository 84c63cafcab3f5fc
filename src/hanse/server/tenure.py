"""A server's tenure as primary: its lease on the store, whose epoch fences every write, and the jobs under it.

A tenure ends when the server turns cold, shuts down, or learns from a write that its lease is another's by now. Then
the runs' processes end here and their state stays committed, for the next tenure to resume.
"""

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable
from typing import Final

from hanse.errors import EnvironmentFault, StoreFailed
from hanse.ids import Ssid
from hanse.server.jobs import Jobs
from hanse.storage.records import Lease, Store

LEASE_TTL_S: Final = 10.0
"""How long a tenure lasts beyond its last renewal; it is renewed every third of this."""

_log = logging.getLogger(__name__)


class TenureLost(EnvironmentFault):
    """The server in *workspace* could not go on serving, and has ended."""

    code = "tenure-lost"

    def __init__(self, workspace: str) -> None:
        super().__init__(
            f"the server of {workspace} lost its lease or could not go on serving its jobs (its log says why); "
            "start it again, and its running jobs resume"
        )


async def take_lease(store: Store) -> Lease:
    """Take the store's lease for this process."""
    holder = f"{socket.gethostname()}:{os.getpid()}"
    return await store.take_lease(holder, ttl_s=LEASE_TTL_S, now_s=time.time(), force=True)


class Tenure:
    """Jobs under one lease; *on_lost* is called when that turns out to be another's, or what serves the jobs breaks."""

    def __init__(self, store: Store, lease: Lease, jobs: Jobs, *, on_lost: Callable[[], None]) -> None:
        self.jobs = jobs
        self.ssid: Ssid = lease.ssid
        self._store = store
        self._lease = lease
        self._on_lost = on_lost
        self._work: asyncio.Task[None] | None = None

    async def begin(self) -> None:
        """Return when the committed runs are resumed and jobs are being served."""
        ready = asyncio.Event()
        self._work = asyncio.create_task(self._serve(ready), name="tenure")  # awaited by end
        waiting = asyncio.create_task(ready.wait(), name="tenure begins")  # ended below
        try:
            await asyncio.wait({waiting, self._work}, return_when=asyncio.FIRST_COMPLETED)
            if self._work.done():
                self._work.result()
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from errors
        finally:
            waiting.cancel()

    async def end(self) -> None:
        """Park the runs, and return when their processes here are gone; twice is once."""
        if self._work is not None:
            self._work.cancel()
            await asyncio.gather(self._work, return_exceptions=True)
            self._work = None

    async def _serve(self, ready: asyncio.Event) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._keep_lease(), name="keep the lease")
                await self.jobs.serve(ready)
        except* Exception as errors:
            if not ready.is_set():
                raise
            # Whatever it was, the jobs are parked by now: who still called this server hot would wait for ever.
            for error in errors.exceptions:
                _log.error("this server's tenure has ended", exc_info=error)
            self._on_lost()

    async def _keep_lease(self) -> None:
        while True:
            await asyncio.sleep(LEASE_TTL_S / 3)  # a renewal is due at a time, not on an event
            try:
                await self._store.renew_lease(self._lease.epoch, ttl_s=LEASE_TTL_S, now_s=time.time())
            except StoreFailed as failed:
                # That a disk is full says nothing of whose the lease is; its epoch fences every write in any case.
                _log.warning("the lease was not renewed", extra={"reason": failed.reason})
