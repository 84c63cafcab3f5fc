"""What a run needs and its server cannot do just now, such as to write to a full disk: since when, and until when.

Whoever wants it done tries again by itself. Here is only how long that may go on.
"""

import asyncio
from collections.abc import Callable
from typing import Final

from hanse.coordination.waiting import StoreTrouble
from hanse.errors import StoreFailed

FORGOTTEN_AFTER_S: Final = 600.0
"""What failed and was not tried again for so long is wanted by nobody any more: whoever wants it asks every minute."""


class Mending:
    """Counts the time from the first failure until *mended*; where that takes *within_s*, *give_up* is told the last.

    *now* is monotonic time, in seconds.
    """

    def __init__(self, *, within_s: float, now: Callable[[], float], give_up: Callable[[StoreFailed], None]) -> None:
        self._within_s, self._now, self._give_up = within_s, now, give_up
        self._loop = asyncio.get_running_loop()
        self._trouble: StoreTrouble | None = None
        self._last: tuple[float, StoreFailed] | None = None
        self._is_unwritten = False
        self._deadline: asyncio.TimerHandle | None = None

    @property
    def trouble(self) -> StoreTrouble | None:
        """What fails now, and is wanted."""
        last = self._last
        return None if last is None or self._now() - last[0] >= FORGOTTEN_AFTER_S else self._trouble

    def failed(self, failed: StoreFailed) -> None:
        """Take note of a failure to write; from any thread."""
        self._note(failed)
        self._is_unwritten = True

    def failed_to_read(self, failed: StoreFailed) -> None:
        """Take note of a failure to read."""
        if self.trouble is None:
            self._is_unwritten = False
        self._note(failed)

    def can_be_read(self) -> None:
        """Take note that the store can be read: what could not be written may be written as little as before."""
        if not self._is_unwritten:
            self.mended()

    def _note(self, failed: StoreFailed) -> None:
        now, before = self._now(), self.trouble
        self._last = now, failed
        if before is None:
            self._trouble = StoreTrouble(failed.reason, now, now + self._within_s)
            self._loop.call_soon_threadsafe(self._set_deadline)

    def mended(self) -> None:
        """Take note that it does what it is asked, or that nobody asks any more."""
        self._trouble = self._last = None
        self._is_unwritten = False
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _set_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        if self._trouble is not None:
            self._deadline = self._loop.call_later(self._within_s, self._is_due)

    def _is_due(self) -> None:
        if self._last is not None and self.trouble is not None:
            self._give_up(self._last[1])
