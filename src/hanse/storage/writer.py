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

from sqlalchemy import text

from hanse.errors import StoreFailed
from hanse.storage.database import Database
from hanse.storage.disk import database_failure
from hanse.storage.transaction import DriverConnection, Statement, Transaction

T = TypeVar("T")

MAX_GROUP: Final = 512
"""Operations in one transaction at most, so that the first of them does not wait for too many others."""

RETRY_WITHIN_S: Final = 1.0
"""A connection that takes longer to turn out lost is not replaced at once: the callers have waited enough."""

_SAVEPOINT: Final = Statement(text("SAVEPOINT operation"))
_RELEASE: Final = Statement(text("RELEASE SAVEPOINT operation"))
_UNDO: Final = Statement(text("ROLLBACK TO SAVEPOINT operation"))


@dataclass(frozen=True, slots=True)
class _Request:
    """An operation, and who waits for its outcome where."""

    operation: Callable[[Transaction], Any]
    is_write: bool
    future: asyncio.Future[Any]
    loop: asyncio.AbstractEventLoop


@dataclass(frozen=True, slots=True)
class _Outcome:
    value: Any = None
    error: BaseException | None = None


class Writer:
    """Runs operations on *database*, one at a time, in a thread of its own: ``start``, use, ``close``.

    The thread connects with its first operation, and anew whenever its connection was lost. The queue of operations has
    no bound of its own: each has a caller that waits for it.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._requests: SimpleQueue[_Request | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._connection: DriverConnection | None = None
        self._is_closed = False

    def start(self) -> None:
        """Start the thread."""
        # A daemon, so that a program that does not close its store can still end; what was answered is committed.
        self._thread = threading.Thread(target=self._work, name=f"store {self._database.name}", daemon=True)
        self._thread.start()

    async def write(self, operation: Callable[[Transaction], T]) -> T:
        """Return what *operation* returns, once that is committed."""
        return await self._run(operation, is_write=True)

    async def read(self, operation: Callable[[Transaction], T]) -> T:
        """Return what *operation*, which writes nothing, returns; it sees every write asked for before it."""
        return await self._run(operation, is_write=False)

    async def close(self) -> None:
        """Finish what was asked for before, then end the thread and the connection."""
        if self._thread is not None and not self._is_closed:
            self._is_closed = True
            self._requests.put(None)
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    async def _run(self, operation: Callable[[Transaction], T], *, is_write: bool) -> T:
        if self._thread is None or self._is_closed:
            raise StoreFailed(f"using {self._database.name}", "it is not open")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._requests.put(_Request(operation, is_write, future, loop))
        return await future

    # In the thread ------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while group := self._next_group():
            try:
                outcomes = self._commit_together(group, may_retry=True)
            except Exception as error:  # noqa: BLE001 - every request gets its answer, whatever happened
                outcomes = [_Outcome(error=self._translated(error)) for _ in group]
            _answer(group, outcomes)
        self._disconnect()

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

    def _commit_together(self, group: list[_Request], *, may_retry: bool) -> list[_Outcome]:
        """Return each request's outcome after committing all; raise if the transaction cannot be begun or committed."""
        began = time.monotonic()
        connection = self._connection = self._connection or self._database.connect()
        outcomes: list[_Outcome] | None = None
        try:
            transaction = self._begin(connection, group)
            outcomes = self._run_all(transaction, group, undo_all=connection.rollback)
            connection.commit()
        except Exception:
            self._roll_back(connection)
            is_lost_before_commit = outcomes is None and self._connection is None
            if not (may_retry and is_lost_before_commit and time.monotonic() - began <= RETRY_WITHIN_S):
                raise
        else:
            transaction.make_calls()
            return outcomes
        return self._commit_together(group, may_retry=False)

    def _begin(self, connection: DriverConnection, group: list[_Request]) -> Transaction:
        self._database.begin(connection, is_write=any(request.is_write for request in group))
        return Transaction(connection.cursor(), self._database.dialect)

    def _run_all(
        self, transaction: Transaction, group: list[_Request], *, undo_all: Callable[[], object]
    ) -> list[_Outcome]:
        if len(group) == 1:  # nobody else's work to keep: a savepoint would only cost time
            return [self._attempt(transaction, group[0], undo=undo_all)]
        outcomes = []
        for request in group:
            transaction.run(_SAVEPOINT)
            outcomes.append(self._attempt(transaction, request, undo=lambda: transaction.run(_UNDO)))
            transaction.run(_RELEASE)
        return outcomes

    def _attempt(self, transaction: Transaction, request: _Request, *, undo: Callable[[], object]) -> _Outcome:
        try:
            return _Outcome(request.operation(transaction))
        except self._database.error:
            raise  # the database is not as it should be; what that did to the transaction is not known
        except Exception as error:  # noqa: BLE001 - one operation's failure must not stop the others; its caller gets it
            undo()
            return _Outcome(error=error)

    def _roll_back(self, connection: DriverConnection) -> None:
        """Make *connection* good for another transaction, or forget it if nothing can."""
        try:
            connection.rollback()
        except self._database.error:
            self._disconnect()
        else:
            if self._database.is_lost(connection):
                self._disconnect()

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _translated(self, error: Exception) -> Exception:
        if isinstance(error, self._database.error):
            return database_failure(error, self._database.name)
        return error


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
