"""The one event loop of a process, for programs that have none: it turns in a thread of its own.

``grpc.aio`` has one poller a process and serves one event loop well; a second loop makes the two steal each other's
wake-ups. So every server and client that a plain program starts shares this loop. It is the one global of the system,
because what it stands for, the process, is one too. A program that has a loop of its own uses that one instead.
"""

import asyncio
import atexit
import threading
import weakref
from collections.abc import Coroutine
from typing import Any, TypeVar

from hanse.errors import TimedOut

T = TypeVar("T")

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None
_thread: threading.Thread | None = None
_first: weakref.WeakSet[asyncio.Task[None]] = weakref.WeakSet()


def background_loop() -> asyncio.AbstractEventLoop:
    """Return the process's event loop, started in a daemon thread on first use and stopped when the process exits."""
    global _loop, _thread
    with _lock:
        if _loop is None:
            _loop = asyncio.new_event_loop()
            _thread = threading.Thread(target=_turn, args=(_loop,), name="hanse event loop", daemon=True)
            _thread.start()
            atexit.register(_stop, _loop, _thread)
        return _loop


def run(coroutine: Coroutine[Any, Any, T], timeout_s: float | None = None) -> T:
    """Return what *coroutine* returns, run on the background loop while the calling thread waits.

    When *timeout_s* passes, or the caller is interrupted, the coroutine is cancelled.

    Raises:
        TimedOut: it did not end within *timeout_s*.
        RuntimeError: called on the background loop, which would then wait for itself.
    """
    loop = background_loop()
    if threading.current_thread() is _thread:
        coroutine.close()
        raise RuntimeError("run() waits for the background loop and was called on it; await the coroutine instead")
    what = getattr(coroutine, "__qualname__", "a coroutine")
    future = asyncio.run_coroutine_threadsafe(coroutine, loop)
    try:
        return future.result(timeout_s)
    except TimeoutError:
        if future.done():
            raise  # the coroutine's own
        raise TimedOut("the background loop", what, timeout_s or 0.0) from None
    finally:
        future.cancel()


def end_first(task: asyncio.Task[None]) -> None:
    """At the process's exit cancel *task*, and wait for it, before any other task: it ends those in order."""
    _first.add(task)


def _turn(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    finally:
        loop.run_until_complete(_wind_up())
        loop.close()


async def _wind_up() -> None:
    await _cancel(set(_first))
    await _cancel(asyncio.all_tasks())
    await asyncio.get_running_loop().shutdown_asyncgens()


async def _cancel(tasks: set[asyncio.Task[Any]]) -> None:
    others = tasks - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


def _stop(loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    """Let the loop's tasks end before the interpreter takes their modules away; a stuck one is left to the daemon."""
    loop.call_soon_threadsafe(loop.stop)
    thread.join(timeout=5.0)
