"""SQLite, in a file: write-ahead log, every commit synced, and a write lock that one process at a time has.

All who use the file are on one machine, so they tell each other by pipes beside it (``pipes``).
"""

import fcntl
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Final

from sqlalchemy import Connection, NullPool, create_engine, event
from sqlalchemy.dialects.sqlite import dialect

from hanse.errors import StoreFailed
from hanse.storage.disk import disk_failure, fsync
from hanse.storage.pipes import Listeners, PipeListener
from hanse.storage.transaction import DriverConnection, Transaction

BUSY_TIMEOUT_S: Final = 5.0
"""How long a write waits for another process that writes to the same file."""


class SqliteDatabase:
    """The file at *path*, made (mode 0600, its folder 0700) by the first ``connect``."""

    error = sqlite3.Error

    def __init__(self, path: Path) -> None:
        self._path = path
        self.name = str(path)
        self.dialect = dialect(paramstyle="named")
        # By whatever links somebody comes to the file, SQLite puts its own files, and we the pipes, beside it.
        self._folder = Path(f"{os.path.realpath(path)}-listeners")
        self._listeners = Listeners(self._folder)

    def connect(self) -> DriverConnection:
        """See ``Database``."""
        self._make()
        # The driver must not begin transactions by itself (isolation_level None): it would do so late, and without
        # taking the write lock, so that two servers could both read an epoch before either wrote.
        connection = sqlite3.connect(self._path, timeout=BUSY_TIMEOUT_S, isolation_level=None)
        try:
            with _one_at_a_time(self._path.parent):
                connection.execute("PRAGMA journal_mode=WAL")
            for pragma in ("synchronous=FULL", "foreign_keys=ON"):
                connection.execute(f"PRAGMA {pragma}")
        except BaseException:
            connection.close()
            raise
        return connection

    def begin(self, connection: DriverConnection, *, is_write: bool) -> None:
        """See ``Database``."""
        connection.cursor().execute("BEGIN IMMEDIATE" if is_write else "BEGIN", {})

    def is_lost(self, connection: DriverConnection) -> bool:
        """See ``Database``."""
        return False

    def looking(self) -> AbstractContextManager[Connection]:
        """See ``Database``."""
        return self._connected("BEGIN")

    def migrating(self) -> AbstractContextManager[Connection]:
        """See ``Database``."""
        return self._connected("BEGIN IMMEDIATE")

    def announce(self, transaction: Transaction) -> None:
        """See ``Database``."""
        transaction.call_when_committed(self._listeners.tell)

    def listener(self, heard: Callable[[], None]) -> PipeListener:
        """See ``Database``."""
        return PipeListener(self._folder, heard, name=self.name)

    @contextmanager
    def _connected(self, begin_by: str) -> Iterator[Connection]:
        engine = create_engine("sqlite://", creator=self.connect, poolclass=NullPool)

        @event.listens_for(engine, "begin")
        def begin(connection: Connection) -> None:
            connection.exec_driver_sql(begin_by)

        with engine.begin() as connection:
            yield connection

    def _make(self) -> None:
        """Make the file if there is none.

        One that is there is not opened, since to close it again would end the locks that this process's other
        connections have on it (https://sqlite.org/howtocorrupt.html, 2.2).
        """
        try:
            folder = self._path.parent
            new = [each for each in (folder, *folder.parents) if not each.exists()]
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with suppress(FileExistsError):
                os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            # SQLite syncs what it writes, and the names in its folder, but not the folder's own.
            for each in new:
                fsync(each.parent)
        except OSError as error:
            raise disk_failure(f"opening {self._path}", error, self._path.parent) from error


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Let one at a time into the block, of all who come with this *folder*: a change of mode waits for nobody."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise disk_failure(f"opening {folder}", error, folder) from error
    try:
        _lock(descriptor, folder)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    """Lock *descriptor*, which is open on *folder*, against all others.

    Raises:
        StoreFailed: another process had it locked for ``BUSY_TIMEOUT_S``.
    """
    with suppress(BlockingIOError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    own, taken = os.dup(descriptor), threading.Event()  # the lock is both's, and lasts until both are closed

    def take() -> None:
        try:
            fcntl.flock(own, fcntl.LOCK_EX)
            taken.set()
        finally:
            os.close(own)

    threading.Thread(target=take, name=f"lock {folder}", daemon=True).start()  # nothing else ends its wait in time
    if not taken.wait(BUSY_TIMEOUT_S):
        raise StoreFailed(
            f"opening {folder}", "a process that opens a database there is stopped; end it, or have it go on"
        )
