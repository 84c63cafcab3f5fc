"""``hanse``, but whose server meets with something at one of its writes to the store, whichever the environment says.

``HANSE_TEST_AT`` is a write, the how-manieth of its kind since the server's start, ``before`` or ``after``, and what
happens then: ``kill-server``, ``kill-run`` (its jobs' processes), or ``stop-server``, of which it is told later what
became of the write. Before a write nothing of it is in the store; after it all is, and nobody has been told.
"""

import asyncio
import itertools
import os
import signal
import sys
import threading
from collections.abc import Awaitable, Callable
from typing import Any, Final

import psutil

from hanse.cli import main
from hanse.errors import HanseError
from hanse.storage.store import SqlStore
from hanse.storage.writer import Writer

VARIABLE: Final = "HANSE_TEST_AT"
WRITES: Final = ("replace_job", "issue_tasks", "accept_answer", "commit_round", "end_run")
MET: Final = "the tests' fault has happened at"
REFUSED: Final = "the write that the tests' fault has held up was refused:"
TAKEN: Final = "the write that the tests' fault has held up was taken"

_begin = Writer._begin
_is_to_stop = False


def _begin_or_stop(self: Writer, *arguments: Any) -> Any:
    """Stop where no transaction is under way: one of SQLite keeps everybody else from the file."""
    global _is_to_stop
    if _is_to_stop:
        _is_to_stop = False
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)  # at once: another thread would notice it too late
    return _begin(self, *arguments)


def _meet(what: str) -> None:
    global _is_to_stop
    print(f"{MET} {os.environ[VARIABLE]}", file=sys.stderr, flush=True)  # noqa: T201 - it goes to the server's log
    match what:
        case "kill-server":
            os.kill(os.getpid(), signal.SIGKILL)
        case "kill-run":
            for process in psutil.Process().children():
                process.kill()
        case "stop-server":
            _is_to_stop = True


def _tell(write: "asyncio.Task[Any]") -> None:
    error = write.exception()
    outcome = f"{REFUSED} {error.code}" if isinstance(error, HanseError) else f"{TAKEN} ({error})"
    print(outcome, file=sys.stderr, flush=True)  # noqa: T201 - it goes to the server's log


def _disturb(write: str, nth: int, moment: str, what: str) -> None:
    """Have *what* happen at the *nth* *write* of a store."""
    method: Callable[..., Awaitable[Any]] = getattr(SqlStore, write)
    numbers = itertools.count(1)

    async def disturbed(self: SqlStore, *arguments: Any, **more: Any) -> Any:
        is_due = next(numbers) == nth
        if is_due and moment == "before":
            _meet(what)
        writing = asyncio.ensure_future(method(self, *arguments, **more))
        if is_due and what == "stop-server":
            writing.add_done_callback(_tell)
        done = await asyncio.shield(writing)  # whoever waits for it may give up, but not the write
        if is_due and moment == "after":
            _meet(what)
        return done

    setattr(SqlStore, write, disturbed)


if __name__ == "__main__":
    _write, _nth, _moment, _what = os.environ[VARIABLE].split()
    Writer._begin = _begin_or_stop  # type: ignore[method-assign]
    _disturb(_write, int(_nth), _moment, _what)
    sys.exit(main())
