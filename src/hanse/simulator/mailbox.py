"""What other threads put, for one thread that waits for it, and that Ctrl-C reaches for certain.

A thread that waits for a lock (a queue, a future) misses a signal that comes while it is on its way into that wait: the
handler would have to run in Python, and the lock's wait begins as if nothing had happened. So this waits by reading
from a socket, to which whoever puts something writes a byte, and so does the interpreter when a signal comes.
"""

import signal
import socket
import threading
from collections import deque
from contextlib import suppress
from types import TracebackType
from typing import Generic, Self, TypeVar

T = TypeVar("T")


class Mailbox(Generic[T]):
    """Entered by the thread that takes; ``put`` is for any thread, until the block's end."""

    def __init__(self) -> None:
        self._items: deque[T] = deque()
        self._hearing, self._bell = socket.socketpair()
        self._bell.setblocking(False)
        self._handles_signals = False
        self._before = -1

    def __enter__(self) -> Self:
        self._handles_signals = threading.current_thread() is threading.main_thread()
        if self._handles_signals:
            self._before = signal.set_wakeup_fd(self._bell.fileno(), warn_on_full_buffer=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handles_signals:
            signal.set_wakeup_fd(self._before, warn_on_full_buffer=False)
        self._hearing.close()
        self._bell.close()

    def put(self, item: T) -> None:
        """Put *item* last."""
        self._items.append(item)
        with suppress(BlockingIOError):  # it rings already
            self._bell.send(b"\0")

    def take(self) -> T:
        """Wait for the first item, and return it."""
        while not self._items:
            self._hearing.recv(4096)
        return self._items.popleft()
