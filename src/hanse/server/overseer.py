"""Who says which server is primary: a small interface, and an implementation whose answers are given to it.

An overseer agent knows who is primary and under which service session id (SSID). The server hands ``start`` a callback,
and the agent calls it, from any thread, whenever its answer may have changed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from hanse.ids import Ssid


@dataclass(frozen=True, slots=True)
class Primary:
    """The primary server: where it listens (``host:port``), and the session that its tenure is."""

    target: str
    ssid: Ssid


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
