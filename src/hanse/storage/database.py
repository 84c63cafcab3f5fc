"""What a store asks of its database beyond SQL, the same of SQLite (``sqlite``) and of PostgreSQL (``postgres``)."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from sqlalchemy import Connection, Engine


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

    def connect(self) -> Engine:
        """Return an engine for the writer's thread, which calls this.

        Raises:
            StoreFailed: there can be no such database. The engine, too, may raise this when it connects.
        """
        ...

    def migrating(self, connection: Connection) -> AbstractContextManager[None]:
        """Let the block take the time it needs; others who come to migrate wait until its transaction ends."""
        ...

    def announce(self, connection: Connection) -> None:
        """Tell all listeners that the lease has moved, as soon as the transaction is committed."""
        ...

    def listener(self, heard: Callable[[], None]) -> Listener | None:
        """Return what calls *heard*, in its event loop, when the lease has moved or may have.

        ``None``: this database tells nobody.
        """
        ...
