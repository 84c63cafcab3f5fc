"""Whether a store's PostgreSQL database answers, asked without changing anything in it: no tables are made.

SQLAlchemy and the driver are for servers alone and take longer to import than all else here, so this is imported when
it is called.
"""

from collections.abc import Callable

from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

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
    except SQLAlchemyError as error:
        why = " ".join(str(getattr(error, "orig", None) or error).split())
        raise StoreFailed(f"opening {database.name}", why) from error


def _read_clock(database: Database, wall: Callable[[], float]) -> ClockReading:
    engine = database.connect()
    try:
        with engine.connect() as connection:
            before = wall()
            told = connection.scalar(text("SELECT extract(epoch FROM clock_timestamp())"))
            return ClockReading(before, float(told or 0), wall())
    finally:
        engine.dispose()
