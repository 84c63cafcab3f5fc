"""A run's link to its server, over two cells in memory."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from hanse.cell.cell import Cell, RemoteError
from hanse.cell.link import Peer, memory_link_pair
from hanse.errors import Conflict, StoreFailed, Unreachable
from hanse.ids import SERVER, ClientName, Fqcn, JobId
from hanse.job import JobSpec, WorkflowSpec
from hanse.learning.workflow import THEN
from hanse.messages import (
    AbortRun,
    Channel,
    ClientChanged,
    IssueTasks,
    Message,
    ModelRef,
    RunEnded,
    RunSnapshot,
    StateRef,
    TaskFault,
    TaskKey,
    TaskResult,
    ok,
)
from hanse.run.server_link import ServerLink

RUN = Fqcn("server.tiny-1")
KEY = TaskKey(1, "train", 0, ClientName("site-1"))
SNAPSHOT = RunSnapshot(
    JobId("tiny-1"), JobSpec("tiny", WorkflowSpec("fedavg"), "app:app", "m:f"), (ClientName("site-1"),)
)


class Heard:
    def __init__(self) -> None:
        self.answers: list[TaskResult] = []
        self.changes: list[ClientChanged] = []
        self.aborts: list[str] = []
        self.snapshots: list[RunSnapshot] = []
        self.came = asyncio.Event()

    def answered(self, result: TaskResult) -> None:
        self.answers.append(result)
        self.came.set()

    def client_changed(self, change: ClientChanged) -> None:
        self.changes.append(change)
        self.came.set()

    def attached(self, snapshot: RunSnapshot) -> None:
        self.snapshots.append(snapshot)
        self.came.set()

    def abort(self, reason: str) -> None:
        self.aborts.append(reason)
        self.came.set()

    async def next(self) -> None:
        async with asyncio.timeout(10):
            await self.came.wait()
        self.came.clear()


@asynccontextmanager
async def linked(heard: Heard) -> AsyncIterator[tuple[Cell, ServerLink]]:
    """A server's cell, and the link of a run to it."""
    server, run = Cell(SERVER), Cell(RUN)
    link = ServerLink(run, on_abort=heard.abort)
    async with connected(server, run):
        yield server, link


@asynccontextmanager
async def connected(server: Cell, run: Cell) -> AsyncIterator[None]:
    to_server, to_run = memory_link_pair(Peer(SERVER, "server", "memory"), Peer(RUN, "server_job", "memory"))
    run.attach(to_server)
    server.attach(to_run)
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(to_server.run(run.receive)), group.create_task(to_run.run(server.receive))]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()


async def test_what_a_run_decides_goes_up_as_it_is() -> None:
    asked: list[tuple[str, Any]] = []
    async with linked(Heard()) as (server, link):
        for topic in ("issue", "cancel", "commit", "ended"):
            server.on(Channel.RUN, topic, lambda message, topic=topic: asked.append((topic, message.payload)))
        server.on(Channel.RUN, "attach", lambda _: ok(SNAPSHOT))

        assert await link.attach() == SNAPSHOT
        await link.issue(IssueTasks((KEY,), None, 60.0, THEN))
        await link.cancel([KEY])
        await link.commit(StateRef(0, ModelRef()), took_s=0.5, answered=[ClientName("site-1")], carried=[KEY])
        await link.ended(RunEnded(completed=True))

    assert [topic for topic, _ in asked] == ["issue", "cancel", "commit", "ended"]
    assert asked[1][1].keys == (KEY,)
    assert (asked[2][1].took_s, asked[2][1].answered, asked[2][1].carried) == (0.5, ("site-1",), (KEY,))


async def test_the_servers_refusal_is_raised() -> None:
    async with linked(Heard()) as (server, link):
        server.on(Channel.RUN, "issue", _refusing)
        with pytest.raises(RemoteError, match="run tiny-1 is over"):
            await link.issue(IssueTasks((KEY,), None, 60.0, THEN))


async def test_events_that_come_before_the_listener_are_kept_in_order() -> None:
    heard = Heard()
    first, second = TaskResult(KEY, fault=TaskFault("x", "first")), ClientChanged(ClientName("site-1"), "lost")
    async with linked(heard) as (server, link):
        server.on(Channel.RUN, "attach", lambda _: ok(SNAPSHOT))
        server.tell(RUN, Channel.RUN, "answer", first)
        server.tell(RUN, Channel.RUN, "client", second)
        await link.attach()  # what was sent before its reply has come before it
        assert heard.answers == []

        link.listen(heard)
        assert (heard.answers, heard.changes) == ([first], [second])
        server.tell(RUN, Channel.RUN, "answer", first)
        heard.came.clear()
        await heard.next()

    assert heard.answers == [first, first]


async def test_what_was_told_while_the_link_was_down_is_heard_when_it_is_up_again() -> None:
    heard, server, run = Heard(), Cell(SERVER), Cell(RUN)
    link = ServerLink(run, on_abort=heard.abort)
    lost = msgspec.structs.replace(SNAPSHOT, lost_clients=(ClientName("site-1"),))
    answer = TaskResult(KEY, fault=TaskFault("x", "meanwhile"))
    attached: list[RunSnapshot] = []

    async def attach(message: Message) -> Message:
        del message
        attached.append(SNAPSHOT if not attached else lost)
        if len(attached) == 2:
            raise StoreFailed("reading", "a locked database")
        if len(attached) == 3:
            await server.ask(RUN, Channel.RUN, "answer", answer, timeout_s=10)
        return ok(attached[-1])

    server.on(Channel.RUN, "attach", attach)
    async with connected(server, run):
        await link.attach()
        link.listen(heard)
        keeping = asyncio.create_task(link.keep_attached())
    assert heard.snapshots == []
    with pytest.raises(Unreachable):
        server.tell(RUN, Channel.RUN, "answer", answer)
    async with connected(server, run):
        async with asyncio.timeout(10):
            while not heard.snapshots:
                await heard.next()
        keeping.cancel()

    assert (heard.answers, heard.snapshots) == ([answer], [lost])
    assert len(attached) == 3


async def test_what_was_told_of_a_client_before_the_link_broke_is_older_than_the_snapshot() -> None:
    heard, server, run = Heard(), Cell(SERVER), Cell(RUN)
    link = ServerLink(run, on_abort=heard.abort)
    answer, asked = TaskResult(KEY, fault=TaskFault("x", "first")), asyncio.Event()

    async def attach(message: Message) -> Message:
        del message
        if not asked.is_set():
            server.tell(RUN, Channel.RUN, "client", ClientChanged(ClientName("site-1"), "lost"))
            await server.ask(RUN, Channel.RUN, "answer", answer, timeout_s=10)
            asked.set()
            await asyncio.Event().wait()
        return ok(SNAPSHOT)

    server.on(Channel.RUN, "attach", attach)
    async with connected(server, run):
        attaching = asyncio.create_task(link.attach())
        await asked.wait()
    async with connected(server, run):
        assert await attaching == SNAPSHOT
        link.listen(heard)
    await server.close()

    assert (heard.answers, heard.changes) == ([answer], [])


async def test_what_the_server_does_not_hear_is_cancelled_with_the_round() -> None:
    async with linked(Heard()) as (server, link):
        server.on(Channel.RUN, "cancel", _away)
        await link.cancel([KEY])
        server.on(Channel.RUN, "cancel", _refusing)
        with pytest.raises(RemoteError, match="run tiny-1 is over"):
            await link.cancel([KEY])


def _away(message: Message) -> None:
    del message
    raise StoreFailed("writing", "no space left on device")


def _refusing(message: Message) -> None:
    del message
    raise Conflict("run tiny-1", state="over", wanted="given tasks")


async def test_an_abort_is_heard_with_or_without_a_listener() -> None:
    heard = Heard()
    async with linked(heard) as (server, _):
        server.tell(RUN, Channel.RUN, "abort", AbortRun("ada wants another"))
        await heard.next()

    assert heard.aborts == ["ada wants another"]


async def test_a_heartbeat_asks_for_no_answer() -> None:
    beats = asyncio.Event()
    async with linked(Heard()) as (server, link):
        server.on(Channel.RUN, "heartbeat", lambda _: beats.set())
        link.heartbeat()
        async with asyncio.timeout(10):
            await beats.wait()


async def test_a_server_that_cannot_do_it_yet_is_asked_for_as_long_as_it_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hanse.run.server_link.LONGEST_WAIT_S", 0.5)
    monkeypatch.setattr("hanse.run.server_link.Backoff.next_s", lambda _: 0.1)
    asked: list[float] = []

    def commit(message: Message) -> Message:
        del message
        asked.append(asyncio.get_running_loop().time())
        if asked[-1] - asked[0] <= 1.0:
            raise StoreFailed("writing", "no space left on device")
        return ok()

    async with linked(Heard()) as (server, link):
        server.on(Channel.RUN, "commit", commit)
        await link.commit(StateRef(0, ModelRef()), took_s=0.5, answered=[ClientName("site-1")])

    assert asked[-1] - asked[0] > 1.0


async def test_a_run_without_a_server_says_so_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hanse.run.server_link.LONGEST_WAIT_S", 0.3)
    link = ServerLink(Cell(RUN), on_abort=print)

    with pytest.raises(Unreachable):
        await link.attach()
