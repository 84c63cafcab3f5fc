import sqlite3
from pathlib import Path

import pytest
from sqlalchemy import Engine, inspect

from hanse.errors import StoreFailed
from hanse.storage import tables
from hanse.storage.store import sqlite_engine
from hanse.storage.writer import BEGIN


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    return sqlite_engine(tmp_path / "store.db").execution_options(**{BEGIN: "BEGIN IMMEDIATE"})


def test_a_new_store_has_all_tables_a_version_and_a_name(engine: Engine) -> None:
    with engine.begin() as connection:
        tables.create(connection, store_id="abc")
        names = set(inspect(connection).get_table_names())
        meta = {row.key: row.value for row in connection.execute(tables.meta.select())}
        lease = connection.execute(tables.lease.select()).one()
    engine.dispose()

    assert names == set(tables.metadata.tables)
    assert meta == {"schema_version": str(tables.SCHEMA_VERSION), "store_id": "abc"}
    assert tuple(lease) == (1, 0, "", 0, 0.0, "", "", "")


def test_a_store_that_is_there_keeps_its_name(engine: Engine) -> None:
    for name in ("first", "second"):
        with engine.begin() as connection:
            tables.create(connection, store_id=name)
    with engine.begin() as connection:
        meta = {row.key: row.value for row in connection.execute(tables.meta.select())}
    engine.dispose()

    assert meta["store_id"] == "first"


def test_a_creation_that_fails_leaves_no_half_of_a_store(engine: Engine) -> None:
    with pytest.raises(ZeroDivisionError), engine.begin() as connection:  # noqa: PT012 - the block is what rolls back
        tables.create(connection, store_id="abc")
        raise ZeroDivisionError
    with engine.begin() as connection:
        assert inspect(connection).get_table_names() == []
    engine.dispose()


def test_another_version_is_refused(engine: Engine) -> None:
    with engine.begin() as connection:
        tables.create(connection, store_id="abc")
        connection.execute(tables.meta.update().where(tables.meta.c.key == "schema_version").values(value="999"))
    with pytest.raises(StoreFailed, match="version 999"), engine.begin() as connection:
        tables.create(connection, store_id="abc")
    engine.dispose()


def test_connections_sync_every_commit_and_hold_foreign_keys(engine: Engine) -> None:
    with engine.begin() as connection:
        pragmas = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }
    engine.dispose()

    assert pragmas == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 5000}
    assert sqlite3.threadsafety >= 1
