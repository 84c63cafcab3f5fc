"""Who asks a process to stop, and how its main thread waits for that."""

import signal
import socket
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Self

NUMBERS = (signal.SIGINT, signal.SIGTERM)


class Stops:
    """Requests to stop, from any thread or from a signal, for the main thread to ``get`` within the ``with`` block.

    The system gives a signal to whichever thread it likes, and Python handles it in the main thread, when that next
    runs. So what the main thread waits on is something that a signal wakes it by, whoever has received it.
    """

    def __init__(self) -> None:
        self._asked: deque[str] = deque()
        self._woken, self._wakes = socket.socketpair()
        self._wakes.setblocking(False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._woken.close()
        self._wakes.close()

    def put(self, who: str) -> None:
        """Say that *who* asks; from any thread, also where a signal has interrupted anything."""
        self._asked.append(who)
        with suppress(OSError):  # there is enough to wake it by, or nobody waits any more
            self._wakes.send(b"\0")

    def get(self) -> str:
        """Return who has asked, once anybody has."""
        while not self._asked:
            self._woken.recv(4096)
        return self._asked.popleft()

    @contextmanager
    def hearing_signals(self) -> Iterator[None]:
        """Have SIGINT and SIGTERM ask by their names; afterwards they end the process as ever.

        Whoever asks once more, after the first time, does not want to wait for clients.
        """
        before = {number: signal.signal(number, self._signalled) for number in NUMBERS}
        woke = signal.set_wakeup_fd(self._wakes.fileno(), warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(woke)
            for number, handler in before.items():
                signal.signal(number, handler)

    def _signalled(self, number: int, _: object) -> None:
        self.put(signal.Signals(number).name)
