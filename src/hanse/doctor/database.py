"""Whether a store's PostgreSQL database answers, asked without changing anything in it: no tables are made.

The driver is an extra for servers, and what the storage imports is for servers alone, so this is imported when it is
called.
"""

from collections.abc import Callable

from hanse.doctor.service import ClockReading
from hanse.errors import StoreFailed
from hanse.storage.database import Database
from hanse.storage.store import database_at


def ask_database(url: str, wall: Callable[[], float]) -> tuple[str, ClockReading]:
    """Return what the database at *url* is called, without a password, and what time it has.

    Raises:
        ConfigError: PostgreSQL's driver is not installed, or *url* is none.
        StoreFailed: it does not answer.
    """
    database = database_at(url)
    try:
        return database.name, _read_clock(database, wall)
    except database.error as error:
        raise StoreFailed(f"opening {database.name}", " ".join(str(error).split())) from error


def _read_clock(database: Database, wall: Callable[[], float]) -> ClockReading:
    connection = database.connect()
    try:
        before = wall()
        cursor = connection.cursor()
        cursor.execute("SELECT extract(epoch FROM clock_timestamp())", {})
        (told,) = cursor.fetchone()
        return ClockReading(before, float(told), wall())
    finally:
        connection.close()
