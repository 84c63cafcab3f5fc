"""What PostgreSQL adds to the contract: servers that hear of each other, and a database that goes away."""

import asyncio
import itertools
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, contextmanager
from urllib.parse import quote

import psutil
import psycopg
import pytest
from sqlalchemy import text

from hanse.errors import ConfigError, StoreFailed
from hanse.ids import JobId
from hanse.storage import postgres as adapter
from hanse.storage import statements as sql
from hanse.storage import writer as writer_module
from hanse.storage.records import AuditEntry, Store
from hanse.storage.store import SqlStore, database_at
from hanse.storage.transaction import Statement, Transaction
from hanse.storage.writer import Writer
from tests.postgres import PASSWORD, Postgres

from .samples import answer, changed, commit, record, standby, take, task


@pytest.fixture
def where(postgres_url: str) -> str:
    return postgres_url


@contextmanager
def away(postgres: Postgres) -> Iterator[None]:
    """Let the database crash, and come back when the block ends."""
    postgres.stop(immediate=True)
    try:
        yield
    finally:
        postgres.start()


def backends(postgres: Postgres) -> list[int]:
    """Return the numbers of the processes that serve the connections which the stores have open.

    What served one that was closed may still be ending, and is not among them.
    """
    ports = [each.laddr.port for each in psutil.Process().net_connections("tcp4") if each.raddr]
    found = f"datname = 'emptied' AND client_port = ANY('{{{', '.join(map(str, ports))}}}')"
    return [pid for (pid,) in postgres.execute(f"SELECT pid FROM pg_stat_activity WHERE {found}")]


def cut_off(postgres: Postgres) -> int:
    """End the connections of all stores and return how many there were."""
    found = backends(postgres)
    for pid in found:
        postgres.execute(f"SELECT pg_terminate_backend({pid})")
    return len(found)


@contextmanager
def stopped(backend: int) -> Iterator[None]:
    """Have a process of the database's server do nothing until the block ends."""
    os.kill(backend, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(backend, signal.SIGCONT)


# Hearing of the lease -------------------------------------------------------------------------------------------------


async def test_a_standby_hears_of_a_beat_a_release_and_a_takeover(store: SqlStore, other: SqlStore, epoch: int) -> None:
    for move in (store.renew_lease(epoch), store.release_lease(epoch), take(store, "server-1")):
        waiting = await standby(other)

        await move

        assert await waiting == await store.lease()


async def test_a_standby_that_was_cut_off_hears_again(
    store: SqlStore, other: SqlStore, epoch: int, postgres: Postgres
) -> None:
    waiting = await standby(other)
    assert cut_off(postgres) == 3  # two for transactions and the standby's, to listen

    beat = await store.renew_lease(epoch)

    assert await waiting == beat


async def test_a_move_while_a_standby_was_cut_off_is_seen_when_it_is_back(
    store: SqlStore, other: SqlStore, epoch: int, postgres: Postgres
) -> None:
    seen = await other.lease_moved(await store.lease(), within_s=0.0)
    cut_off(postgres)
    beat = await store.renew_lease(epoch)

    assert await other.lease_moved(seen, within_s=3600.0) == beat


async def test_a_standby_learns_that_the_database_is_away(
    store: SqlStore, other: SqlStore, epoch: int, postgres: Postgres
) -> None:
    seen = await store.lease()
    waiting = await standby(other)
    with away(postgres):
        with pytest.raises(StoreFailed, match="Connection refused"):
            await waiting
        with pytest.raises(StoreFailed, match="listening to postgresql://hanse@"):
            await other.lease_moved(seen, within_s=3600.0)

    assert await other.lease_moved(changed(seen, beat=-1), within_s=3600.0) == seen


async def test_closing_ends_the_wait_of_a_standby(store: SqlStore, other: SqlStore, epoch: int) -> None:
    waiting = await standby(other)

    await other.close()

    with pytest.raises(StoreFailed, match="not open"):
        await waiting


async def test_several_may_wait_over_one_connection_and_give_up(
    store: SqlStore, other: SqlStore, epoch: int, postgres: Postgres
) -> None:
    seen = await store.lease()
    waiting = [asyncio.ensure_future(other.lease_moved(seen, within_s=3600.0)) for _ in range(5)]
    waiting.append(await standby(other))
    waiting[0].cancel()

    beat = await store.renew_lease(epoch)

    assert await asyncio.gather(*waiting[1:]) == [beat] * 5
    assert cut_off(postgres) == 3


# The fence ------------------------------------------------------------------------------------------------------------


class Writing:
    """A transaction that has looked at the epoch, as every write does first."""

    def __init__(self, url: str) -> None:
        database = database_at(url)
        self.connection = database.connect()
        self.transaction = Transaction(self.connection.cursor(), database.dialect)
        self.transaction.run(sql.EPOCH)


async def test_nobody_takes_the_lease_between_a_writers_look_and_its_commit(
    epoch: int, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(adapter.TIMEOUTS_S, "statement_timeout", 0.2)
    writing = Writing(postgres_url)  # as every write begins
    async with SqlStore(postgres_url) as other:
        with pytest.raises(StoreFailed, match="statement timeout"):
            await take(other, "server-2", force=True)
        writing.connection.commit()

        assert (await take(other, "server-2", force=True)).epoch == epoch + 1
    writing.connection.close()


async def test_a_writer_that_falls_silent_in_a_transaction_loses_it_and_cannot_keep_others_from_the_lease(
    store: SqlStore, epoch: int, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(adapter.TIMEOUTS_S, "idle_in_transaction_session_timeout", 0.2)
    writing = Writing(postgres_url)
    writing.transaction.run(sql.DISABLE, {"client": "site-1", "reason": "never to be committed"})

    await take(store, "server-2", force=True)

    with pytest.raises(psycopg.Error):
        writing.connection.commit()
    writing.connection.close()
    assert await store.disabled_clients() == {}


# A database that goes away --------------------------------------------------------------------------------------------


async def test_while_the_database_is_away_every_call_fails_and_the_first_one_after_that_works(
    store: SqlStore, epoch: int, postgres: Postgres
) -> None:
    with away(postgres):
        for _ in range(2):
            with pytest.raises(StoreFailed, match=r"using postgresql://hanse@127\.0\.0\.1.*Connection refused"):
                await store.lease()
            with pytest.raises(StoreFailed, match="Connection refused"):
                await store.add_job(epoch, record())

    await store.add_job(epoch, record())
    assert await store.jobs() == [record()]


async def test_a_connection_lost_while_nobody_used_it_is_nobodys_failure(
    store: SqlStore, epoch: int, postgres: Postgres
) -> None:
    assert cut_off(postgres) == 1
    await store.add_job(epoch, record())
    with away(postgres):
        pass
    await store.renew_lease(epoch)


async def test_a_database_that_is_away_when_a_store_is_opened_is_named(postgres: Postgres, postgres_url: str) -> None:
    store = SqlStore(postgres_url)
    with away(postgres), pytest.raises(StoreFailed, match=r"opening postgresql://hanse@127\.0\.0\.1"):
        await store.open()

    async with store:
        assert await store.jobs() == []


async def write_round(store: Store, epoch: int, job: JobId, number: int) -> None:
    await store.issue_tasks(epoch, job, [task(round_number=number), task("site-2", round_number=number)])
    await store.accept_answer(epoch, job, answer(round_number=number))
    await store.commit_round(epoch, job, commit(number), now_s=float(number))


async def test_a_crash_in_the_middle_of_writes_leaves_each_of_them_whole_or_absent(
    store: SqlStore, epoch: int, postgres: Postgres
) -> None:
    jobs = [JobId(f"job-{number}") for number in range(6)]
    are_busy = [asyncio.Event() for _ in jobs]

    async def write_until_it_fails(job: JobId, is_busy: asyncio.Event) -> int:
        for number in itertools.count(1):
            try:
                await write_round(store, epoch, job, number)
            except StoreFailed:
                return number
            if number == 3:
                is_busy.set()
        raise AssertionError

    for job in jobs:
        await store.add_job(epoch, record(job))
        await store.commit_round(epoch, job, commit(0), now_s=0.0)
    writing = [asyncio.ensure_future(write_until_it_fails(*each)) for each in zip(jobs, are_busy, strict=True)]
    for is_busy in are_busy:
        await is_busy.wait()
    await asyncio.to_thread(postgres.stop, immediate=True)
    try:
        failed = await asyncio.gather(*writing)
    finally:
        await asyncio.to_thread(postgres.start)

    for job, number in zip(jobs, failed, strict=True):
        run = await store.snapshot(job)
        assert run.state is not None
        assert run.state.round in (number - 1, number)  # the commit that failed may have happened
        assert [view.round for view in await store.rounds(job)] == list(range(run.state.round + 1))
        keys = [each.key for each in run.tasks] + [each.key for each in run.answers]
        assert len(keys) in (0, 2)
        assert {key.round for key in keys} <= {run.state.round + 1}
        if run.state.round < number:
            await write_round(store, epoch, job, number)
        await store.commit_round(epoch, job, commit(number), now_s=9999.0)  # asked for again: nothing more
        assert [view.round for view in await store.rounds(job)] == list(range(number + 1))


async def test_a_server_that_does_not_answer_is_given_up_and_the_next_call_finds_another_connection(
    store: SqlStore, epoch: int, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.add_job(epoch, record())
    (backend,) = backends(postgres)
    with stopped(backend):
        monkeypatch.setattr(adapter._Connection, "answer_within_s", 0.2)
        monkeypatch.setattr(writer_module, "RETRY_WITHIN_S", 0.1)
        with pytest.raises(StoreFailed, match=r"it has not answered for 0\.2 s"):
            await store.jobs()
        monkeypatch.undo()

        await store.add_job(epoch, record("other"))
    assert len(await store.jobs()) == 2


async def test_a_server_that_takes_the_connection_and_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(adapter._DEFAULTS, "connect_timeout", 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        store = SqlStore(f"postgresql://hanse@127.0.0.1:{silent.getsockname()[1]}/hanse")
        with pytest.raises(StoreFailed, match="timeout"):
            await store.open()


class _Noting(logging.Filter):
    """Keeps every line, having called *seen*."""

    def __init__(self, seen: Callable[[], object]) -> None:
        super().__init__()
        self._seen = seen

    def filter(self, record: logging.LogRecord) -> bool:
        del record
        self._seen()
        return True


async def test_a_server_that_waits_for_another_which_migrates_the_store_says_so(
    postgres_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "hanse")
    waits, loop = asyncio.Event(), asyncio.get_running_loop()
    store = SqlStore(postgres_url)

    with caplog.filtering(_Noting(lambda: loop.call_soon_threadsafe(waits.set))), database_at(postgres_url).migrating():
        opening = asyncio.create_task(store.open())
        await waits.wait()

    await opening
    await store.close()
    assert [line.message for line in caplog.records] == ["waiting for another server that migrates the store"]


# One transaction ------------------------------------------------------------------------------------------------------


@pytest.fixture
async def writer(postgres_url: str) -> AsyncIterator[Writer]:
    """A writer on a database with an empty table ``numbers``."""
    writer = Writer(database_at(postgres_url))
    writer.start()
    await writer.write(lambda transaction: transaction.run(CREATE))
    yield writer
    await writer.close()


CREATE = Statement(text("CREATE TABLE numbers (number INTEGER)"))
ADD = Statement(text("INSERT INTO numbers VALUES (1)"))
COUNT = Statement(text("SELECT count(*) FROM numbers"))
LOCK = Statement(text("LOCK TABLE numbers IN ACCESS EXCLUSIVE MODE"))
BACKEND = Statement(text("SELECT pg_backend_pid()"))
LOSE_CONNECTION = Statement(text("SELECT pg_terminate_backend(pg_backend_pid())"))


def count(transaction: Transaction) -> int:
    return int(transaction.value(COUNT))


class Adding:
    """An operation that adds a number, and loses its connection the first *failures* times."""

    def __init__(self, *, failures: int) -> None:
        self.failures = failures
        self.times = 0

    def __call__(self, transaction: Transaction) -> int:
        self.times += 1
        transaction.run(ADD)
        if self.times <= self.failures:
            transaction.run(LOSE_CONNECTION)
        return count(transaction)


async def test_a_transaction_that_loses_its_connection_is_tried_once_more(writer: Writer) -> None:
    adding = Adding(failures=1)

    assert await writer.write(adding) == 1
    assert adding.times == 2
    assert await writer.read(count) == 1


async def test_a_transaction_that_loses_its_connection_twice_has_failed(writer: Writer) -> None:
    adding = Adding(failures=2)

    with pytest.raises(StoreFailed, match=r"using postgresql://.*: terminating connection"):
        await writer.write(adding)
    assert adding.times == 2
    assert await writer.read(count) == 0


async def test_a_group_that_loses_its_connection_is_tried_again_as_a_whole(writer: Writer) -> None:
    operations = [Adding(failures=0), Adding(failures=1), Adding(failures=0)]

    await asyncio.gather(*(writer.write(operation) for operation in operations))

    assert await writer.read(count) == 3


async def test_a_transaction_that_loses_its_connection_in_the_commit_is_not_tried_again(
    writer: Writer, postgres: Postgres
) -> None:
    postgres.execute(
        """CREATE FUNCTION die() RETURNS trigger LANGUAGE plpgsql AS
        $$BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NULL; END$$""",
        database="emptied",
    )
    postgres.execute(
        "CREATE CONSTRAINT TRIGGER at_commit AFTER INSERT ON numbers "
        "DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION die()",
        database="emptied",
    )
    adding = Adding(failures=0)

    with pytest.raises(StoreFailed, match=r"using postgresql://.*: terminating connection"):
        await writer.write(adding)
    assert adding.times == 1


async def test_a_commit_whose_answer_was_lost_is_a_failure_that_may_have_happened(
    writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = 0

    def add_and_stop_the_server(transaction: Transaction) -> None:
        nonlocal times
        times += 1
        transaction.run(ADD)
        until_told.enter_context(stopped(transaction.value(BACKEND)))
        monkeypatch.setattr(adapter._Connection, "answer_within_s", 0.2)

    def count_when_others_are_done(transaction: Transaction) -> int:
        transaction.run(LOCK)
        return count(transaction)

    with ExitStack() as until_told:
        with pytest.raises(StoreFailed, match="it has not answered"):
            await writer.write(add_and_stop_the_server)
        monkeypatch.undo()

    assert times == 1
    assert await writer.read(count_when_others_are_done) == 1


# How it is reached ----------------------------------------------------------------------------------------------------


async def test_a_password_in_the_url_opens_the_store_and_is_told_nobody(
    postgres: Postgres, postgres_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    where = f"127.0.0.1:{postgres.port}/emptied"
    async with SqlStore(f"postgresql://hanse:{quote(PASSWORD, safe='')}@{where}") as store:
        await store.lease_moved(await store.lease(), within_s=0.0)
    wrong = "un%40seen"
    for url in (f"postgresql://hanse:{wrong}@{where}", f"postgresql://hanse@{where}?password={wrong}"):
        store = SqlStore(url)
        with pytest.raises(StoreFailed, match="password authentication failed") as caught:
            await store.open()
        for secret in (wrong, "un@seen"):
            assert secret not in str(caught.value)
    for secret in (PASSWORD, quote(PASSWORD, safe=""), wrong, "un@seen"):
        assert secret not in caplog.text


def test_a_missing_driver_is_named_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    monkeypatch.delitem(sys.modules, "hanse.storage.postgres")

    with pytest.raises(ConfigError, match=r"pip install 'psycopg\[binary\]'") as caught:
        SqlStore("postgresql://hanse:s3cret@db.example/hanse")
    assert "s3cret" not in str(caught.value)


async def test_a_database_that_cannot_hold_every_name_is_refused(postgres: Postgres) -> None:
    narrow = postgres.new_database(encoding="SQL_ASCII")

    with pytest.raises(StoreFailed, match="its encoding is SQL_ASCII; make it with ENCODING 'UTF8'"):
        await SqlStore(postgres.url(narrow)).open()


async def test_a_commit_is_on_the_disk_when_it_is_answered_whatever_the_database_is_set_to(
    postgres: Postgres, postgres_url: str
) -> None:
    for set_to, used in (("off", "on"), ("local", "local")):
        postgres.execute(f"ALTER DATABASE emptied SET synchronous_commit = {set_to}")
        async with SqlStore(postgres_url) as store:
            shown = await store._read(lambda transaction: transaction.value(Statement(text("SHOW synchronous_commit"))))
        postgres.execute("ALTER DATABASE emptied RESET synchronous_commit")
        assert shown == used


async def test_stores_in_different_schemas_of_one_database_do_not_see_each_other(
    postgres: Postgres, postgres_url: str
) -> None:
    postgres.execute("CREATE SCHEMA another", database="emptied")
    async with SqlStore(postgres_url) as one, SqlStore(f"{postgres_url}&options=-csearch_path%3Danother") as other:
        epoch = (await take(one, "server-1")).epoch
        await one.audit(epoch, AuditEntry(1.0, "a", "b", "c", "ok"))

        assert (await other.lease()).epoch == 0
        assert await other.audit_log() == []
