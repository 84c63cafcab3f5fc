import asyncio
import sqlite3
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy import text

from hanse.errors import Conflict, StoreFailed
from hanse.storage.sqlite import SqliteDatabase
from hanse.storage.transaction import DriverConnection, Statement, Transaction
from hanse.storage.writer import MAX_GROUP, Writer

CREATE = Statement(text("CREATE TABLE numbers (number INTEGER)"))
ADD = Statement(text("INSERT INTO numbers VALUES (:number)"))
ALL = Statement(text("SELECT number FROM numbers ORDER BY number"))


class Numbers(SqliteDatabase):
    """A database that counts its transactions."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.name = "numbers"
        self.begun = 0

    def begin(self, connection: DriverConnection, *, is_write: bool) -> None:
        self.begun += 1
        super().begin(connection, is_write=is_write)


class Database:
    """A writer over a table of numbers, which can be held up."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.numbers = Numbers(path)
        self.writer = Writer(self.numbers)
        self.go_on = threading.Event()

    async def add(self, number: int) -> int:
        def add(transaction: Transaction) -> int:
            transaction.run(ADD, {"number": number})
            return number

        return await self.writer.write(add)

    async def add_and_fail(self, number: int) -> int:
        def add(transaction: Transaction) -> int:
            transaction.run(ADD, {"number": number})
            raise Conflict("the number", state="odd", wanted="added")

        return await self.writer.write(add)

    async def all(self) -> list[int]:
        return await self.writer.read(lambda transaction: transaction.values(ALL))

    async def hold_up(self) -> "asyncio.Task[None]":
        """Occupy the thread until ``go_on`` is set, so that what is asked for meanwhile comes together."""
        is_held = threading.Event()

        def wait(_: Transaction) -> None:
            is_held.set()
            assert self.go_on.wait(30)

        held = asyncio.ensure_future(self.writer.read(wait))
        assert await asyncio.to_thread(is_held.wait, 30)
        return held


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    database = Database(tmp_path / "numbers.db")
    database.writer.start()
    await database.writer.write(lambda transaction: transaction.run(CREATE))
    database.numbers.begun = 0
    yield database
    database.go_on.set()
    await database.writer.close()


async def test_what_waits_together_shares_one_commit(database: Database) -> None:
    held = await database.hold_up()
    adding = [asyncio.ensure_future(database.add(number)) for number in range(20)]
    await asyncio.sleep(0)
    database.go_on.set()

    assert await asyncio.gather(*adding) == list(range(20))
    await held
    assert database.numbers.begun == 2  # the one that held up, and the twenty
    assert await database.all() == list(range(20))


async def test_in_a_group_the_one_that_fails_is_undone_alone(database: Database) -> None:
    held = await database.hold_up()
    adding = [asyncio.ensure_future(database.add(1)), asyncio.ensure_future(database.add_and_fail(2))]
    adding.append(asyncio.ensure_future(database.add(3)))
    await asyncio.sleep(0)
    database.go_on.set()

    outcomes = await asyncio.gather(*adding, return_exceptions=True)
    await held

    assert (outcomes[0], outcomes[2]) == (1, 3)
    assert isinstance(outcomes[1], Conflict)
    assert await database.all() == [1, 3]


async def test_one_that_fails_by_itself_is_undone(database: Database) -> None:
    with pytest.raises(Conflict):
        await database.add_and_fail(1)

    assert await database.all() == []
    await database.add(2)
    assert await database.all() == [2]


async def test_a_group_larger_than_the_limit_is_split(database: Database) -> None:
    held = await database.hold_up()
    adding = [asyncio.ensure_future(database.add(number)) for number in range(MAX_GROUP + 1)]
    await asyncio.sleep(0)
    database.go_on.set()
    await asyncio.gather(held, *adding)

    assert database.numbers.begun == 3
    assert len(await database.all()) == MAX_GROUP + 1


async def test_what_a_transaction_is_to_tell_is_told_when_others_can_see_what_it_did(database: Database) -> None:
    seen: list[list[tuple[int]]] = []

    def look() -> None:
        other = sqlite3.connect(database.path)
        seen.append(other.execute("SELECT number FROM numbers").fetchall())
        other.close()

    def add_and_tell(transaction: Transaction) -> None:
        transaction.call_when_committed(look)
        transaction.run(ADD, {"number": 1})

    await database.writer.write(add_and_tell)

    assert seen == [[(1,)]]
    assert await database.add(2) == 2
    assert len(seen) == 1


async def test_what_a_transaction_that_fails_was_to_tell_is_not_told(database: Database) -> None:
    told: list[str] = []

    def tell_and_fail(transaction: Transaction) -> None:
        transaction.call_when_committed(lambda: told.append("done"))
        transaction.run(Statement(text("INSERT INTO nowhere VALUES (1)")))

    with pytest.raises(StoreFailed):
        await database.writer.write(tell_and_fail)

    assert told == []


async def test_what_was_asked_for_before_the_close_is_done(database: Database) -> None:
    held = await database.hold_up()
    adding = asyncio.ensure_future(database.add(1))
    await asyncio.sleep(0)
    closing = asyncio.ensure_future(database.writer.close())
    await asyncio.sleep(0)
    with pytest.raises(StoreFailed, match="using numbers: it is not open"):
        await database.add(2)
    database.go_on.set()

    assert await adding == 1
    await asyncio.gather(held, closing, database.writer.close())


async def test_callers_in_several_event_loops_are_answered_in_their_own(database: Database) -> None:
    def from_another_loop(number: int) -> int:
        return asyncio.run(database.add(number))

    assert await asyncio.gather(*(asyncio.to_thread(from_another_loop, number) for number in range(4))) == [0, 1, 2, 3]
    assert await database.all() == [0, 1, 2, 3]


async def test_a_caller_whose_loop_is_gone_harms_nobody(database: Database) -> None:
    async def ask_and_leave() -> None:
        asking = asyncio.ensure_future(database.add(1))
        await asyncio.sleep(0)
        asking.cancel()

    held = await database.hold_up()
    await asyncio.to_thread(asyncio.run, ask_and_leave())
    database.go_on.set()
    await held

    assert await database.all() == [1]


async def test_a_database_error_fails_the_whole_group_with_a_sentence(database: Database) -> None:
    held = await database.hold_up()
    nowhere = Statement(text("INSERT INTO nowhere VALUES (1)"))
    bad = database.writer.write(lambda transaction: transaction.run(nowhere))
    asking = [asyncio.ensure_future(database.add(1)), asyncio.ensure_future(bad)]
    await asyncio.sleep(0)
    database.go_on.set()
    outcomes = await asyncio.gather(*asking, return_exceptions=True)
    await held

    for outcome in outcomes:
        assert isinstance(outcome, StoreFailed)
        assert str(outcome) == "the store failed while using numbers: no such table: nowhere"
    assert outcomes[0] is not outcomes[1]
    assert await database.all() == []


async def test_a_bug_in_an_operation_reaches_its_caller_only(database: Database) -> None:
    def broken(_: Transaction) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await database.writer.write(broken)
    assert await database.add(1) == 1


async def test_before_it_is_started_it_says_so(tmp_path: Path) -> None:
    writer = Database(tmp_path / "other.db").writer

    with pytest.raises(StoreFailed, match="not open"):
        await writer.read(lambda _: None)
    await writer.close()
