"""Who was refused lately, and why, so that a person at the server sees what a site is told.

A peer that is refused has proven nothing: its name is its own claim, and anybody may come. So this remembers one
refusal a name, of names that participants can have, and so many names at most; the oldest makes room. A peer that is
let in is forgotten.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from hanse.ids import is_name
from hanse.messages import RefusedClient
from hanse.server.bounds import MAX_CODE_CHARS, shortened

MAX_NAMES: Final = 64


@dataclass(frozen=True, slots=True)
class _Refusal:
    code: str
    reason: str
    at: float


class RefusedPeers:
    """The last refusals, by name; from any thread. *clock* tells monotonic seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._refusals: dict[str, _Refusal] = {}
        self._lock = threading.Lock()

    def note(self, name: str, *, code: str, reason: str) -> None:
        """Remember that whoever calls itself *name* was refused; a name that cannot be is not."""
        if not is_name(name):
            return
        with self._lock:
            self._refusals.pop(name, None)  # so that it is the newest
            self._refusals[name] = _Refusal(shortened(code, MAX_CODE_CHARS), shortened(reason), self._clock())
            if len(self._refusals) > MAX_NAMES:
                del self._refusals[next(iter(self._refusals))]

    def forget(self, name: str) -> None:
        """Remember nothing of *name* any more: it was let in."""
        with self._lock:
            self._refusals.pop(name, None)

    def views(self) -> tuple[RefusedClient, ...]:
        """Return the refusals, by name, for people."""
        with self._lock:
            refusals, now = sorted(self._refusals.items()), self._clock()
        return tuple(RefusedClient(name, each.code, each.reason, now - each.at) for name, each in refusals)
