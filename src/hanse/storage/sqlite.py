"""SQLite, in a file: write-ahead log, every commit synced, and a write lock that one process at a time has."""

import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from sqlalchemy import Connection, Engine, create_engine, event

from hanse.storage.disk import disk_failure
from hanse.storage.writer import BEGIN

BUSY_TIMEOUT_S: Final = 5.0
"""How long a write waits for another process that writes to the same file."""


class SqliteDatabase:
    """The file at *path*, made (mode 0600, its folder 0700) by the first ``connect``."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def name(self) -> str:
        """See ``Database``."""
        return str(self._path)

    def connect(self) -> Engine:
        """See ``Database``."""
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        except OSError as error:
            raise disk_failure(f"opening {self._path}", error, self._path.parent) from error
        return sqlite_engine(self._path)

    @contextmanager
    def migrating(self, connection: Connection) -> Iterator[None]:
        """See ``Database``."""
        yield  # the transaction has the write lock

    def announce(self, connection: Connection) -> None:
        """Do nothing: a file tells nobody."""

    def listener(self, heard: Callable[[], None]) -> None:
        """See ``Database``."""
        return


def sqlite_engine(path: Path) -> Engine:
    """Return an engine for the SQLite file at *path*: write-ahead log, every commit synced, foreign keys held."""
    # The driver must not begin transactions by itself (isolation_level None): it would do so late, and without
    # taking the write lock, so that two servers could both read an epoch before either wrote.
    options = {"timeout": BUSY_TIMEOUT_S, "isolation_level": None}
    engine = create_engine(f"sqlite:///{path}", connect_args=options, pool_reset_on_return=None)

    @event.listens_for(engine, "connect")
    def configure(connection: sqlite3.Connection, _record: object) -> None:
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql(connection.get_execution_options()[BEGIN])

    return engine
