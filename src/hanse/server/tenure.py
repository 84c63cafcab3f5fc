"""A server's tenure as primary: its lease on the store, whose epoch fences every write, and the jobs under it.

A tenure ends when the server turns cold, hands over or shuts down, when it learns from a write that its lease is
another's by now, and when its last beat is as old as the lease may stand still. Then the runs' processes end here and
their state stays committed, for the next tenure to resume.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from hanse.coordination.lease import BEATS
from hanse.errors import EnvironmentFault, HanseError, StaleEpoch, StoreFailed
from hanse.ids import Ssid
from hanse.server.jobs import Jobs
from hanse.storage.records import Lease, Store

_log = logging.getLogger(__name__)

_CLOCK: Final = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def boot_time() -> float:
    """Return seconds of a clock that nobody sets and that goes on while the machine sleeps, where there is one."""
    return time.clock_gettime(_CLOCK)


class TenureLost(EnvironmentFault):
    """The server in *workspace* could not go on serving, and has ended."""

    code = "tenure-lost"

    def __init__(self, workspace: str) -> None:
        super().__init__(
            f"the server of {workspace} lost its lease or could not go on serving its jobs (its log says why); "
            "start it again, and its running jobs resume"
        )


class LeaseRunOut(EnvironmentFault):
    """The lease could not be renewed in time, so another server may hold it."""

    code = "lease-run-out"

    def __init__(self, ttl_s: float, why: str) -> None:
        super().__init__(f"the lease could not be renewed for {ttl_s:g} s, so another server may serve: {why}")


class HeldLease:
    """A lease while this server holds it: ``keep`` renews it, ``is_good`` says whether it certainly still does.

    *is_contended* is whether other servers take it when it stands still; without, its epoch alone counts. *taken_at* is
    when it was asked for, by *clock*.
    """

    def __init__(
        self,
        store: Store,
        lease: Lease,
        *,
        is_contended: bool,
        taken_at: float,
        clock: Callable[[], float] = boot_time,
    ) -> None:
        self.lease = lease
        self._store = store
        self._is_contended = is_contended
        self._clock = clock
        self._good_until = taken_at + lease.ttl_s

    @property
    def is_good(self) -> bool:
        """Whether no other server can hold the lease: who was paused for longer than it lasts must ask first."""
        return not self._is_contended or self._clock() < self._good_until

    async def keep(self, *, on_beat: Callable[[], object]) -> None:
        """Renew the lease until cancelled; each time, *on_beat* is called first.

        Raises:
            StaleEpoch: it is another's.
            LeaseRunOut: it could not be renewed for so long that it may be.
        """
        ttl_s = self.lease.ttl_s
        while True:
            await asyncio.sleep(max(self._next_beat_s(), 0.0))  # a beat is due at a time, not on an event
            on_beat()
            began = self._clock()
            try:
                async with asyncio.timeout(max(self._good_until - began, ttl_s / BEATS)):
                    await self._store.renew_lease(self.lease.epoch)
            except (StoreFailed, TimeoutError) as failed:
                why = failed.reason if isinstance(failed, StoreFailed) else "the store does not answer"
                if not self.is_good:
                    raise LeaseRunOut(ttl_s, why) from failed
                # That a disk is full says nothing of whose the lease is; its epoch fences every write in any case.
                _log.warning("the lease was not renewed", extra={"reason": why})
                await asyncio.sleep(ttl_s / (2 * BEATS))  # a broken store tells nobody when it is whole again
            else:
                self._good_until = began + ttl_s

    async def release(self, *, successor: str = "") -> None:
        """Give the lease back, for anybody or for the server called *successor*; nothing if it is not ours any more."""
        with suppress(StaleEpoch, StoreFailed):
            await self._store.release_lease(self.lease.epoch, successor=successor)

    def _next_beat_s(self) -> float:
        ttl_s = self.lease.ttl_s
        return self._good_until - ttl_s + ttl_s / BEATS - self._clock()


class Tenure:
    """Jobs under one lease; *on_lost* is called when that turns out to be another's, or what serves the jobs breaks."""

    def __init__(self, lease: HeldLease, jobs: Jobs, *, on_lost: Callable[[], None]) -> None:
        self.jobs = jobs
        self.ssid: Ssid = lease.lease.ssid
        self._lease = lease
        self._on_lost = on_lost
        self._work: asyncio.Task[None] | None = None

    @property
    def is_good(self) -> bool:
        """Whether this server certainly still is primary."""
        return self._lease.is_good

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

    async def end(self, *, successor: str = "") -> None:
        """Park the runs, and give the lease back when their processes here are gone; twice is once."""
        if self._work is not None:
            self._work.cancel()
            await asyncio.gather(self._work, return_exceptions=True)
            self._work = None
            await self._lease.release(successor=successor)

    async def _serve(self, ready: asyncio.Event) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                # A run's own process may be past beating, in code that does nothing but print.
                keeping = self._lease.keep(
                    on_beat=lambda: group.create_task(self.jobs.shorten_logs(), name="shorten logs")
                )
                group.create_task(keeping, name="keep the lease")
                await self.jobs.serve(ready)
        except* Exception as errors:
            if not ready.is_set():
                raise
            # Whatever it was, the jobs are parked by now: who still called this server hot would wait for ever.
            for error in errors.exceptions:
                _tell_why(error)
            self._on_lost()
            await self._lease.release()


def _tell_why(error: Exception) -> None:
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, HanseError):
        _log.error("this server's tenure has ended", extra={"reason": error.reason})
    else:
        _log.error("this server's tenure has ended", exc_info=error)
