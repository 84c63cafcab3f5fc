import sqlite3
import stat
from pathlib import Path

from hanse.storage.sqlite import sqlite_engine
from hanse.storage.store import SqlStore
from hanse.storage.writer import BEGIN


def test_connections_sync_every_commit_and_hold_foreign_keys(tmp_path: Path) -> None:
    engine = sqlite_engine(tmp_path / "store.db").execution_options(**{BEGIN: "BEGIN IMMEDIATE"})
    with engine.begin() as connection:
        pragmas = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }
    engine.dispose()

    assert pragmas == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 5000}
    assert sqlite3.threadsafety >= 1


async def test_the_file_is_nobody_elses_to_read(tmp_path: Path) -> None:
    path = tmp_path / "workspace" / "store.db"
    async with SqlStore(path) as store:
        await store.jobs()
        modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}

    assert modes["store.db"] == 0o600
    assert set(modes.values()) == {0o600}
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
