"""Who says which server is primary: a small interface, and two implementations.

An overseer agent knows who is primary and under which service session id (SSID). The server hands ``start`` a callback,
and the agent calls it, from any thread but the event loop's, whenever its answer may have changed. ``LeaseOverseer`` is
the lease in the store that a project's servers share; ``ScriptedOverseer`` says what it is told to. A server alone has
no agent.
"""

import asyncio
import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from hanse.cell.loop import run
from hanse.coordination.lease import Sign, Watch
from hanse.errors import Conflict, StoreFailed
from hanse.ids import Ssid
from hanse.server.tenure import boot_time
from hanse.storage.records import Lease, Standby, Store

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HeldFor:
    """A lease that an overseer agent has taken for its server; it was asked for at *taken_at*, by ``boot_time``."""

    lease: Lease
    taken_at: float


@dataclass(frozen=True, slots=True)
class Primary:
    """The primary server: where it listens (``host:port``), and the session that its tenure is.

    ``held`` is the lease that the agent has taken for this very server; without, the server takes one by itself.
    """

    target: str
    ssid: Ssid
    name: str = ""
    held: HeldFor | None = None


class OverseerAgent(Protocol):
    """Who is primary."""

    def start(self, callback: "Callable[[OverseerAgent], None]") -> None:
        """Begin to watch, and call *callback* with this agent now and whenever the answer changes."""

    def end(self) -> None:
        """Stop watching; the callback is not called again once this returns. Twice is once."""

    def primary(self) -> Primary | None:
        """Return who is primary now; ``None`` while nobody is known to be."""


class ScriptedOverseer:
    """An overseer agent whose answers are given to it: for tests, and for moving a server by hand."""

    def __init__(self, primary: Primary | None = None) -> None:
        self._primary = primary
        self._callback: Callable[[OverseerAgent], None] | None = None

    def start(self, callback: Callable[[OverseerAgent], None]) -> None:
        """Remember *callback* and call it once."""
        self._callback = callback
        callback(self)

    def end(self) -> None:
        """Forget the callback."""
        self._callback = None

    def primary(self) -> Primary | None:
        """Return what was last appointed."""
        return self._primary

    def appoint(self, primary: Primary | None) -> None:
        """Make *primary* the answer, and tell the server."""
        self._primary = primary
        if self._callback is not None:
            self._callback(self)


class LeaseOverseer:
    """The lease of a store that several servers share: who holds it is primary.

    It takes the lease for its server, called *name* and reached at *target*, when that is free, was that server's own
    before it was started again, or has stood still for as long as it may (``coordination.lease``). *holder* is a name
    that no other server has, and the same after a restart. The server renews what was taken for it; when it does not,
    the lease stands still, and is anybody's.
    """

    def __init__(
        self,
        store: Store,
        *,
        holder: str,
        name: str,
        target: str,
        ttl_s: float,
        clock: Callable[[], float] = boot_time,
    ) -> None:
        self._store = store
        self._holder, self._name, self._target, self._ttl_s = holder, name, target, ttl_s
        self._clock = clock
        self._watch = Watch((-1, 0, ""), 0.0, 0.0)
        self._seen: Lease | None = None
        self._held: HeldFor | None = None
        self._primary: Primary | None = None
        self._callback: Callable[[OverseerAgent], None] | None = None
        self._calling = threading.Lock()
        self._watching: asyncio.Task[None] | None = None
        self._noted_at: float | None = None

    def start(self, callback: Callable[[OverseerAgent], None]) -> None:
        """Look at the lease, take it if it is to be had, call *callback*, and go on watching."""
        self._callback = callback
        run(self._first_look())
        self._call()
        run(self._begin_watching())

    def end(self) -> None:
        """Stop watching; a callback that is under way is waited for."""
        with self._calling:
            self._callback = None
        run(self._end_watching())

    def primary(self) -> Primary | None:
        """Return who holds the lease, while that can be believed to serve."""
        return self._primary

    async def _first_look(self) -> None:
        try:
            self._note(await self._store.lease())
            lease = self._seen
            if lease is not None and lease.holder in ("", self._holder):
                await self._take()
            await self._note_standing_by()
        except StoreFailed as failed:
            _log.error("the lease cannot be looked at", extra={"reason": failed.reason})
        self._primary = self._judged()

    async def _begin_watching(self) -> None:
        self._watching = asyncio.create_task(self._watch_lease(), name="watch the lease")  # ended by end

    async def _end_watching(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
            self._watching = None

    async def _watch_lease(self) -> None:
        while True:
            try:
                await self._follow()
            except StoreFailed as failed:
                _log.warning("the lease cannot be looked at", extra={"reason": failed.reason})
                await asyncio.sleep(self._ttl_s / 4)  # a database tells nobody when it is back
            except Exception:  # noqa: BLE001 - who no longer watches would stand by for ever
                _log.exception("watching the lease failed")
                await asyncio.sleep(self._ttl_s)  # what is broken here tells nobody when it is whole again
            before, after = self._primary, self._judged()
            if after == before:
                continue
            if after is not None and after.held is not None and before is not None and before.held is not None:
                # From one tenure of its own to the next leads through the cold, with a word for each move.
                self._primary = None
                await asyncio.to_thread(self._call)
            self._primary = after
            await asyncio.to_thread(self._call)

    async def _follow(self) -> None:
        """Wait until the lease moves or something is due, and take it if it may be taken."""
        seen = self._seen
        if seen is None:
            self._note(await self._store.lease())
        else:
            self._note(await self._store.lease_moved(seen, within_s=self._watch.wait_s(self._clock())))
        if self._watch.may_take(self._clock()):
            await self._take()
        await self._note_standing_by()

    async def _take(self) -> None:
        taken_at = self._clock()
        with suppress(Conflict):  # another was faster, or it beat just now: the next look tells
            lease = await self._store.take_lease(
                self._holder, name=self._name, target=self._target, ttl_s=self._ttl_s, seen=self._seen
            )
            self._held = HeldFor(lease, taken_at)
            self._noted_at = None  # the store has forgotten that it stood by
            self._note(lease)
            _log.info("the lease is taken", extra={"epoch": lease.epoch, "server": self._name})

    async def _note_standing_by(self) -> None:
        """Tell the store, every so often, that this server stands by, for people to see."""
        now = self._clock()
        if self._is_held() or (self._noted_at is not None and now < self._noted_at + self._ttl_s):
            return
        await self._store.note_standby(Standby(self._holder, self._name, self._target))
        self._noted_at = now

    def _note(self, lease: Lease) -> None:
        is_anybodys = lease.holder == "" and lease.successor in ("", self._name)
        ttl_s = 0.0 if is_anybodys else lease.ttl_s
        if lease.holder == self._holder and (self._held is None or lease.epoch != self._held.lease.epoch):
            ttl_s = 0.0  # from before this server was started again, or given to it by a store that could not say so
        elif lease.holder == self._holder:  # this server could not keep it, so let another one come first
            ttl_s *= 2
        elif is_anybodys and self._held is not None and lease.epoch == self._held.lease.epoch + 1:
            ttl_s = lease.ttl_s / 4  # nor serve under it, which it need not try again and again
        self._seen = lease
        self._watch = self._watch.observe(_sign(lease), ttl_s=ttl_s, now=self._clock())

    def _is_held(self) -> bool:
        return self._held is not None and self._seen is not None and self._held.lease.epoch == self._seen.epoch

    def _judged(self) -> Primary | None:
        lease = self._seen
        if lease is None:
            return None
        if self._held is not None and self._is_held():
            return Primary(self._target, lease.ssid, self._name, self._held)
        if not self._watch.is_alive(self._clock()):
            return None
        return Primary(lease.target, lease.ssid, lease.name)

    def _call(self) -> None:
        with self._calling:
            if self._callback is not None:
                self._callback(self)


def _sign(lease: Lease) -> Sign:
    return lease.epoch, lease.beat, lease.holder
