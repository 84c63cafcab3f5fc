"""One thread that owns one database connection, and commits together what was asked for together.

A commit costs a write to the disk, whatever is in it. So the thread takes all operations that wait, runs them in one
transaction, each behind a savepoint, commits, and only then answers: an operation that fails is undone alone, one that
succeeds is durable when its caller hears of it, and the busier it gets, the larger the groups. Where the
transaction itself fails, all of its operations have.

A connection may be lost while nobody uses it, as when the database's server was started again. So a transaction that
loses its connection before it is committed is tried once more, on a new one. What became of a commit that was lost is
not known, and its callers hear that the store failed.
"""

import asyncio
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, Final, TypeVar

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError

from hanse.errors import StoreFailed
from hanse.storage.disk import database_failure

T = TypeVar("T")

MAX_GROUP: Final = 512
"""Operations in one transaction at most, so that the first of them does not wait for too many others."""

RETRY_WITHIN_S: Final = 1.0
"""A connection that takes longer to turn out lost is not replaced at once: the callers have waited enough."""

BEGIN: Final = "hanse_begin"
"""The execution option that tells the engine's ``begin`` event which kind of transaction this one is."""


@dataclass(frozen=True, slots=True)
class _Request:
    """An operation, and who waits for its outcome where."""

    operation: Callable[[Connection], Any]
    is_write: bool
    future: asyncio.Future[Any]
    loop: asyncio.AbstractEventLoop


@dataclass(frozen=True, slots=True)
class _Outcome:
    value: Any = None
    error: BaseException | None = None


class Writer:
    """Runs operations on a database, one at a time, in a thread of its own: ``start``, use, ``close``.

    *connect* is called in that thread; *name* is what errors call the database. The queue of operations has no bound of
    its own: each has a caller that waits for it.
    """

    def __init__(self, connect: Callable[[], Engine], *, name: str) -> None:
        self._connect, self._name = connect, name
        self._requests: SimpleQueue[_Request | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._is_closed = False

    def start(self) -> None:
        """Start the thread; the connection is made with the first operation."""
        # A daemon, so that a program that does not close its store can still end; what was answered is committed.
        self._thread = threading.Thread(target=self._work, name=f"store {self._name}", daemon=True)
        self._thread.start()

    async def write(self, operation: Callable[[Connection], T]) -> T:
        """Return what *operation* returns, once that is committed."""
        return await self._run(operation, is_write=True)

    async def read(self, operation: Callable[[Connection], T]) -> T:
        """Return what *operation*, which writes nothing, returns; it sees every write asked for before it."""
        return await self._run(operation, is_write=False)

    async def close(self) -> None:
        """Finish what was asked for before, then end the thread and the connection."""
        if self._thread is not None and not self._is_closed:
            self._is_closed = True
            self._requests.put(None)
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    async def _run(self, operation: Callable[[Connection], T], *, is_write: bool) -> T:
        if self._thread is None or self._is_closed:
            raise StoreFailed(f"using {self._name}", "it is not open")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._requests.put(_Request(operation, is_write, future, loop))
        return await future

    # In the thread ------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        engine: Engine | None = None
        while group := self._next_group():
            try:
                engine = engine or self._connect()
                outcomes = _run_group(engine, group)
            except Exception as error:  # noqa: BLE001 - every request gets its answer, whatever happened
                outcomes = [_Outcome(error=self._translated(error)) for _ in group]
            _answer(group, outcomes)
        if engine is not None:
            engine.dispose()

    def _next_group(self) -> list[_Request]:
        """Return the requests that wait, at least one; none when it is time to end."""
        first = self._requests.get()
        if first is None:
            return []
        group = [first]
        while len(group) < MAX_GROUP:
            try:
                request = self._requests.get_nowait()
            except Empty:
                break
            if request is None:
                self._requests.put(None)  # after this group; nothing comes behind it
                break
            group.append(request)
        return group

    def _translated(self, error: Exception) -> Exception:
        if isinstance(error, DBAPIError):
            return database_failure(error.orig or error, self._name)
        return error


def _run_group(engine: Engine, group: list[_Request], *, may_retry: bool = True) -> list[_Outcome]:
    """Return each request's outcome after committing all; raise if the transaction cannot be begun or committed."""
    began = time.monotonic()
    begin = "BEGIN IMMEDIATE" if any(request.is_write for request in group) else "BEGIN"
    outcomes: list[_Outcome] | None = None
    try:
        with engine.connect().execution_options(**{BEGIN: begin}) as connection, connection.begin() as transaction:
            if len(group) == 1:  # nobody else's work to keep: a savepoint would only cost time
                outcomes = [_attempt(connection, group[0], undo=transaction.rollback)]
            else:
                outcomes = [_attempt_behind_savepoint(connection, request) for request in group]
        return outcomes
    except DBAPIError as error:
        is_lost_before_commit = outcomes is None and error.connection_invalidated
        if not (may_retry and is_lost_before_commit and time.monotonic() - began <= RETRY_WITHIN_S):
            raise
    return _run_group(engine, group, may_retry=False)


def _attempt_behind_savepoint(connection: Connection, request: _Request) -> _Outcome:
    # As plain SQL, for begin_nested costs more than most operations.
    connection.exec_driver_sql("SAVEPOINT operation")
    outcome = _attempt(connection, request, undo=lambda: connection.exec_driver_sql("ROLLBACK TO SAVEPOINT operation"))
    connection.exec_driver_sql("RELEASE SAVEPOINT operation")
    return outcome


def _attempt(connection: Connection, request: _Request, *, undo: Callable[[], object]) -> _Outcome:
    try:
        return _Outcome(request.operation(connection))
    except DBAPIError:
        raise  # the database is not as it should be; what that did to the transaction is not known
    except Exception as error:  # noqa: BLE001 - one operation's failure must not stop the others; its caller gets it
        undo()
        return _Outcome(error=error)


def _answer(group: list[_Request], outcomes: list[_Outcome]) -> None:
    """Wake the callers, with one call into each of their event loops."""
    by_loop: defaultdict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[Any], _Outcome]]] = defaultdict(list)
    for request, outcome in zip(group, outcomes, strict=True):
        by_loop[request.loop].append((request.future, outcome))
    for loop, answers in by_loop.items():
        try:
            loop.call_soon_threadsafe(_settle, answers)
        except RuntimeError:  # the loop is closed: nobody waits there any more
            continue


def _settle(answers: list[tuple[asyncio.Future[Any], _Outcome]]) -> None:
    for future, outcome in answers:
        if future.done():  # its caller was cancelled
            continue
        if outcome.error is not None:
            future.set_exception(outcome.error)
        else:
            future.set_result(outcome.value)
