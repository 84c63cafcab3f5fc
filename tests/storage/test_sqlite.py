"""What SQLite adds to the contract of ``test_store``: a file, its rights, and what can be wrong with it."""

import asyncio
import fcntl
import json
import os
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from hanse.errors import NoSpace, StoreFailed
from hanse.storage import sqlite
from hanse.storage.records import AuditEntry
from hanse.storage.sqlite import SqliteDatabase
from hanse.storage.store import SqlStore
from hanse.storage.transaction import Statement, Transaction

from .samples import record, take


def test_connections_sync_every_commit_and_hold_foreign_keys(path: Path) -> None:
    connection = SqliteDatabase(path).connect()
    cursor = connection.cursor()
    pragmas = {}
    for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout"):
        cursor.execute(f"PRAGMA {name}")
        pragmas[name] = cursor.fetchall()[0][0]
    connection.close()

    assert pragmas == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 5000}
    assert sqlite3.threadsafety >= 1


async def test_the_file_is_nobody_elses_to_read(path: Path) -> None:
    async with SqlStore(path) as store:
        await store.jobs()
        modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}

    assert modes["store.db"] == 0o600
    assert set(modes.values()) == {0o600}
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


async def test_the_names_of_new_folders_are_synced_once(tmp_path: Path, synced: list[Path]) -> None:
    for _ in range(2):
        async with SqlStore(tmp_path / "servers" / "one" / "hanse.db"):
            pass

    assert sorted(synced) == [tmp_path, tmp_path / "servers"]


async def test_a_store_opened_beside_another_in_one_process_leaves_it_its_locks(path: Path) -> None:
    """Without them, whoever else closes the file takes themselves for the last, and what is written after is lost."""
    async with SqlStore(path) as first:
        taken = await take(first, "server-1")
        async with SqlStore(path):
            await _seen_elsewhere(path)

        await first.renew_lease(taken.epoch)

        assert await _seen_elsewhere(path) == {"beat": 1}


async def _seen_elsewhere(path: Path) -> Any:
    """Return what another process, which closes the file again, sees of the lease."""
    program = (
        "import asyncio, json, sys; from pathlib import Path; from hanse.storage.store import SqlStore\n"
        "async def main():\n"
        "    async with SqlStore(Path(sys.argv[1])) as store: print(json.dumps({'beat': (await store.lease()).beat}))\n"
        "asyncio.run(main())"
    )
    command = [sys.executable, "-c", program, str(path)]
    return json.loads((await asyncio.to_thread(subprocess.run, command, capture_output=True, check=True)).stdout)


async def test_many_open_a_new_file_at_once(tmp_path: Path) -> None:
    for number in range(20):
        stores = [SqlStore(tmp_path / str(number) / "store.db") for _ in range(6)]
        await asyncio.gather(*(store.open() for store in stores))
        for store in stores:
            await store.close()


async def test_sessions_of_two_new_stores_differ(tmp_path: Path) -> None:
    sessions = set()
    for name in ("a.db", "b.db"):
        async with SqlStore(tmp_path / name) as store:
            sessions.add((await take(store, "server-1")).ssid)

    assert len(sessions) == 2


@pytest.mark.parametrize(
    "content", [b"this is no database, whatever its name says" * 100, b"SQLite format 3\0" + b"\xff" * 5000]
)
def test_a_file_that_is_no_database_is_named_and_left_alone(path: Path, content: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content)

    asyncio.run(_refuses(path))

    assert path.read_bytes() == content


async def _refuses(damaged: Path) -> None:
    with pytest.raises(StoreFailed, match="database") as caught:
        await SqlStore(damaged).open()

    assert str(damaged) in str(caught.value)


async def test_a_path_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file where a folder should be")
    for unusable in (tmp_path, tmp_path / "file" / "store.db"):
        with pytest.raises(StoreFailed) as caught:
            await SqlStore(unusable).open()
        assert str(unusable) in str(caught.value)


async def test_a_store_that_failed_to_open_can_be_opened_later(tmp_path: Path) -> None:
    blocker = tmp_path / "folder"
    blocker.write_text("in the way")
    store = SqlStore(blocker / "store.db")
    with pytest.raises(StoreFailed):
        await store.open()

    blocker.unlink()
    async with store:
        assert await store.jobs() == []


async def test_a_write_that_the_database_refuses_fails_with_a_sentence_and_the_next_one_works(path: Path) -> None:
    async with SqlStore(path) as store:
        epoch = (await take(store, "server-1")).epoch
        with sqlite3.connect(path) as connection:
            connection.execute(
                "CREATE TRIGGER full BEFORE INSERT ON audit BEGIN SELECT RAISE(ROLLBACK, 'disk is full'); END"
            )
        outcomes = await asyncio.gather(
            store.add_job(epoch, record("a")),
            store.audit(epoch, AuditEntry(1.0, "a", "b", "c", "ok")),
            return_exceptions=True,
        )
        assert isinstance(outcomes[1], StoreFailed)
        assert "disk is full" in str(outcomes[1])
        # The first may have had a transaction of its own; what it was told is what there is.
        assert len(await store.jobs()) == (1 if outcomes[0] is None else 0)
        connection.execute("DROP TRIGGER full")
        connection.close()

        await store.audit(epoch, AuditEntry(1.0, "a", "b", "c", "ok"))
        assert len(await store.audit_log()) == 1


async def test_a_file_that_another_process_writes_for_too_long_is_named_with_the_cause(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "BUSY_TIMEOUT_S", 0.05)
    async with SqlStore(path) as store:
        epoch = (await take(store, "server-1")).epoch
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")

        with pytest.raises(StoreFailed, match=f"using {path}: database is locked"):
            await store.add_job(epoch, record())
        assert await store.jobs() == []  # reading goes on
        other.execute("ROLLBACK")
        other.close()

        await store.add_job(epoch, record())


async def test_a_process_that_stopped_while_it_opened_the_file_is_waited_for_a_while_and_told(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "BUSY_TIMEOUT_S", 0.1)
    path.parent.mkdir(mode=0o700)
    store = SqlStore(path)
    other = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(other, fcntl.LOCK_EX)

    with pytest.raises(StoreFailed, match="a process that opens a database there is stopped; end it"):
        await store.open()
    os.close(other)

    async with store:
        assert await store.jobs() == []


async def test_a_full_disk_is_named_as_the_cause_and_nothing_is_half_written(path: Path) -> None:
    async with SqlStore(path) as store:
        epoch = (await take(store, "server-1")).epoch
        await store._read(_leave_no_room)
        entry = AuditEntry(1.0, "a", "b", "c", "ok", "x" * 100_000)

        outcomes = await asyncio.gather(*(store.audit(epoch, entry) for _ in range(5)), return_exceptions=True)

        for outcome in outcomes:
            assert isinstance(outcome, NoSpace)
            assert outcome.doing == f"using {path}"
            assert "database or disk is full" in str(outcome)
        assert await store.audit_log() == []
        await store._read(lambda transaction: transaction.value(pragma("max_page_count=1000000")))
        await store.audit(epoch, entry)


def pragma(what: str) -> Statement:
    return Statement(text(f"PRAGMA {what}"))


def _leave_no_room(transaction: Transaction) -> None:
    transaction.value(pragma(f"max_page_count={transaction.value(pragma('page_count')) + 1}"))


async def test_a_file_that_may_not_be_written_is_named_with_the_cause(path: Path) -> None:
    async with SqlStore(path) as store:
        epoch = (await take(store, "server-1")).epoch
        # What the system does with a file system that it has mounted anew to read only, no test can.
        await store._read(lambda transaction: transaction.run(pragma("query_only=ON")))

        with pytest.raises(StoreFailed, match=f"using {path}: attempt to write a readonly database"):
            await store.add_job(epoch, record())
