"""What a store asks of its database beyond SQL, the same of SQLite (``sqlite``) and of PostgreSQL (``postgres``)."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from sqlalchemy import Connection, Dialect

from hanse.storage.transaction import DriverConnection, Transaction


class Listener(Protocol):
    """Hears what ``Database.announce`` says in any process."""

    async def listen(self) -> None:
        """Return when every announcement from now on is heard; calls may overlap.

        Raises:
            StoreFailed: the database cannot be reached.
        """
        ...

    async def close(self) -> None:
        """Hear nothing any more."""
        ...


class Database(Protocol):
    """One database, and how to reach it."""

    @property
    def name(self) -> str:
        """What errors call it; never with a password."""
        ...

    @property
    def dialect(self) -> Dialect:
        """For what statements are compiled; parameters are named."""
        ...

    @property
    def error(self) -> type[Exception]:
        """What its driver raises."""
        ...

    def connect(self) -> DriverConnection:
        """Return a new connection, for the thread that calls this.

        Raises:
            StoreFailed: there can be no such database. The driver's errors pass, too.
        """
        ...

    def begin(self, connection: DriverConnection, *, is_write: bool) -> None:
        """Begin a transaction."""
        ...

    def is_lost(self, connection: DriverConnection) -> bool:
        """Return whether nothing more can come over *connection*."""
        ...

    def looking(self) -> AbstractContextManager[Connection]:
        """Return a connection in a transaction that only reads, and waits for nobody who writes or migrates."""
        ...

    def migrating(self) -> AbstractContextManager[Connection]:
        """Return a connection in a transaction, which may take its time; one process at a time gets there."""
        ...

    def announce(self, transaction: Transaction) -> None:
        """Tell all listeners, in every process, that the lease has moved, as soon as *transaction* is committed."""
        ...

    def listener(self, heard: Callable[[], None]) -> Listener:
        """Return what calls *heard*, in its event loop, when the lease has moved or may have."""
        ...
