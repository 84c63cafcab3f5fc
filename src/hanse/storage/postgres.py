"""PostgreSQL, for servers that stand by for each other: reached by URL, through psycopg 3.

Every wait has an end. The server ends a statement that takes too long, and a transaction whose client falls silent in
its middle, whose locks would else keep a successor from the lease for as long as that client is stopped. The client
gives up a connection on which no answer comes, whatever lies between the two.

Transactions read what is committed, and lock the rows on which they decide: the lease's, and a job's.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Final, TypeVar, cast

import psycopg
from sqlalchemy import URL, Connection, Engine, NullPool, create_engine, text

from hanse.errors import StoreFailed
from hanse.storage.transaction import DriverConnection, Statement, Transaction

T = TypeVar("T")

_log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S: Final = 3
"""For each address of the server."""
ANSWER_WITHIN_S: Final = 5.0
"""A connection on which an answer takes longer is given up: nobody who waits for the store waits for a dead one."""
STATEMENT_TIMEOUT_S: Final = 4.0
"""A statement of ours takes milliseconds; what takes so long waits for a lock, and the server can still say so."""
SILENCE_TIMEOUT_S: Final = 3.0
"""How long a server that is stopped in the middle of a transaction may keep others from the lease."""
MIGRATION_TIMEOUT_S: Final = 3600.0
TIMEOUTS_S: Final = {
    "statement_timeout": STATEMENT_TIMEOUT_S,
    "idle_in_transaction_session_timeout": SILENCE_TIMEOUT_S,
}

_DEFAULTS: Final[dict[str, Any]] = {
    "connect_timeout": CONNECT_TIMEOUT_S,
    "application_name": "hanse",
    # For the connection on which nothing but announcements is expected.
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
}
"""What the URL's query may say otherwise."""
_CHANNEL: Final = "hanse_lease"
_ANNOUNCE: Final = Statement(text(f"NOTIFY {_CHANNEL}"))
_LOCK: Final = int.from_bytes(b"hanse", "big")
_TRY_MIGRATION_LOCK: Final = text(f"SELECT pg_try_advisory_xact_lock({_LOCK})")
_MIGRATION_LOCK: Final = text(f"SELECT pg_advisory_xact_lock({_LOCK})")


class PostgresDatabase:
    """The database at *url*; what the URL leaves out comes from libpq: environment, service and password files."""

    error = psycopg.Error

    def __init__(self, url: URL, *, name: str) -> None:
        self.dialect = url.set(drivername="postgresql+psycopg").get_dialect()()
        self._args, self._options = self.dialect.create_connect_args(url)
        self.name = name

    def connect(self) -> DriverConnection:
        """See ``Database``."""
        return _as_any_drivers(self._connect(TIMEOUTS_S))

    def begin(self, connection: DriverConnection, *, is_write: bool) -> None:
        """Do nothing: the driver begins with the first statement."""

    def is_lost(self, connection: DriverConnection) -> bool:
        """See ``Database``."""
        assert isinstance(connection, _Connection)  # noqa: S101 - connect, above, made it
        return connection.closed or connection.broken

    def looking(self) -> AbstractContextManager[Connection]:
        """See ``Database``."""
        return _engine(self.connect).begin()

    @contextmanager
    def migrating(self) -> Iterator[Connection]:
        """See ``Database``."""

        def connect() -> DriverConnection:
            connection = self._connect(dict.fromkeys(TIMEOUTS_S, MIGRATION_TIMEOUT_S))
            connection.answer_within_s = MIGRATION_TIMEOUT_S
            return _as_any_drivers(connection)

        with _engine(connect).begin() as connection:
            if not connection.scalar(_TRY_MIGRATION_LOCK):
                _log.info("waiting for another server that migrates the store", extra={"store": self.name})
                connection.execute(_MIGRATION_LOCK)
            yield connection

    def announce(self, transaction: Transaction) -> None:
        """See ``Database``."""
        transaction.run(_ANNOUNCE)

    def _connect(self, timeouts_s: Mapping[str, float]) -> "_Connection":
        connection = _Connection.connect(*self._args, **{**_DEFAULTS, **self._options})
        try:
            encoding = connection.info.parameter_status("server_encoding")
            if encoding != "UTF8":
                raise StoreFailed(f"opening {self.name}", f"its encoding is {encoding}; make it with ENCODING 'UTF8'")
            connection.isolation_level = psycopg.IsolationLevel.READ_COMMITTED
            for name, timeout_s in timeouts_s.items():
                connection.execute("SELECT set_config(%s, %s, false)", (name, f"{timeout_s * 1000:.0f}"))
            # A commit that was answered is on the disk; more than that, such as on a replica's, may be set.
            connection.execute(
                "SELECT set_config('synchronous_commit', 'on', false) "
                "WHERE current_setting('synchronous_commit') = 'off'"
            )
            connection.commit()
        except BaseException:
            connection.close()
            raise
        return connection

    def listener(self, heard: Callable[[], None]) -> "PostgresListener":
        """See ``Database``."""
        return PostgresListener(self._connect_listener, heard, name=self.name)

    async def _connect_listener(self) -> psycopg.AsyncConnection[Any]:
        options: dict[str, Any] = {**_DEFAULTS, **self._options}
        connection = await psycopg.AsyncConnection.connect(*self._args, **options, autocommit=True)
        try:
            async with asyncio.timeout(ANSWER_WITHIN_S):
                await connection.execute(f"LISTEN {_CHANNEL}")
        except BaseException:
            await connection.close()
            raise
        return connection


def _engine(connect: Callable[[], DriverConnection]) -> Engine:
    return create_engine("postgresql+psycopg://", creator=connect, poolclass=NullPool, use_native_hstore=False)


def _as_any_drivers(connection: "_Connection") -> DriverConnection:
    return cast("DriverConnection", connection)  # psycopg's types want SQL written out in the code


class PostgresListener:
    """See ``Listener``: a connection of its own, made when it is first needed, and anew when it has broken."""

    def __init__(
        self,
        connect: Callable[[], Awaitable[psycopg.AsyncConnection[Any]]],
        heard: Callable[[], None],
        *,
        name: str,
    ) -> None:
        self._connect, self._heard, self._name = connect, heard, name
        self._connecting = asyncio.Lock()
        self._hearing: asyncio.Task[None] | None = None

    async def listen(self) -> None:
        """See ``Listener``."""
        async with self._connecting:
            if self._hearing is not None and not self._hearing.done():
                return
            try:
                connection = await self._connect()
            except TimeoutError as error:
                why = f"it has not answered for {ANSWER_WITHIN_S:g} s"
                raise StoreFailed(f"listening to {self._name}", why) from error
            except (psycopg.Error, OSError) as error:
                raise StoreFailed(f"listening to {self._name}", " ".join(str(error).split())) from error
            self._hearing = asyncio.create_task(self._hear(connection), name="hear of the lease")  # ended by close

    async def close(self) -> None:
        """See ``Listener``."""
        async with self._connecting:
            if self._hearing is not None:
                self._hearing.cancel()
                await asyncio.gather(self._hearing, return_exceptions=True)

    async def _hear(self, connection: psycopg.AsyncConnection[Any]) -> None:
        try:
            async for _ in connection.notifies():
                self._heard()
        except psycopg.Error as error:
            _log.info("the database's announcements broke off", extra={"reason": " ".join(str(error).split())})
        finally:
            self._heard()  # whoever waits for a move looks now, and listens anew
            await connection.close()


class _Connection(psycopg.Connection[Any]):
    """A connection that is closed, and raises, when its server leaves it without an answer for too long."""

    answer_within_s = ANSWER_WITHIN_S

    def wait(self, gen: Generator[Any, Any, T], *args: Any, **options: Any) -> T:
        """Return what *gen*, one exchange with the server, returns."""
        answer: T = super().wait(self._in_time(gen), *args, **options)
        return answer

    def _in_time(self, gen: Generator[Any, Any, T]) -> Generator[Any, Any, T]:
        deadline = time.monotonic() + self.answer_within_s
        try:
            wanted = next(gen)
            while True:
                ready = yield wanted
                if not ready and time.monotonic() > deadline:
                    self.pgconn.finish()
                    raise psycopg.OperationalError(f"it has not answered for {self.answer_within_s:g} s")
                wanted = gen.send(ready)
        except StopIteration as done:
            answer: T = done.value
            return answer
