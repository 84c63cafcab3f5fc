"""How long a run's own process is tried again that cannot go on, over a clock that a test sets."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from hanse.cell.cell import Cell
from hanse.coordination.waiting import Phase
from hanse.errors import TensorDamaged
from hanse.events import Handlers
from hanse.identity.tokens import Token
from hanse.ids import SERVER, Digest, Fqcn, JobId, Ssid
from hanse.job import JobRecord
from hanse.messages import Credentials, JobCredentials, RunEnded
from hanse.server.run_folder import RunFolder
from hanse.server.run_process import GivenUp, OwnProcess
from hanse.server.run_services import RunServices
from hanse.storage.memory import MemoryStore

from .job_world import ScriptedLauncher, ScriptedProcess, spec
from .world import PROJECT, WITHIN_S, Clock

JOB = JobId("tiny-1")
MEND_WITHIN_S = 100.0


class Lively:
    """A run's own process that is kept alive, and what a test does to it."""

    def __init__(self, folder: Path) -> None:
        self.clock = Clock()
        self.launcher = ScriptedLauncher()
        self.mending, self.is_mended = asyncio.Event(), asyncio.Event()
        credentials = JobCredentials(Credentials(Fqcn("server.tiny-1"), Token("t"), "s", Ssid("s")))
        services = RunServices(
            project=PROJECT,
            epoch=1,
            store=MemoryStore(),
            store_id="memory",
            cell=Cell(SERVER),
            launcher=self.launcher,
            credentials=lambda fqcn, job_id: credentials,
            handlers=Handlers(()),
            now=self.clock,
            wall=self.clock,
            run_url="unix:/run",
            mend_within_s=MEND_WITHIN_S,
        )
        record = JobRecord(JOB, spec(), "ada@demo", 5.0, Digest(""), 0)
        self.own = OwnProcess(
            record, RunFolder(folder), services, over=asyncio.Event(), gone=lambda: None, mend=self._mend
        )

    async def _mend(self) -> bool:
        self.mending.set()
        await self.is_mended.wait()
        return True

    async def next(self) -> ScriptedProcess:
        """Return the process that is started next."""
        async with asyncio.timeout(WITHIN_S):
            return await self.launcher.started.get()

    def hinder(self, process: ScriptedProcess, code: str = "no-space") -> None:
        """Have *process* say that it cannot go on, and end."""
        self.own.hindered(RunEnded(completed=False, code=code, reason="a full disk", again=True))
        process.end(0)


@asynccontextmanager
async def kept_alive(lively: Lively) -> AsyncIterator[asyncio.Task[GivenUp | None]]:
    """Keep it alive within the block; the task returns why it was given up."""
    keeping = asyncio.create_task(lively.own.keep_alive())
    try:
        yield keeping
    finally:
        keeping.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await keeping


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Lively]:
    monkeypatch.setattr("hanse.server.run_process.HINDERED_PAUSE_S", 0.0)
    return lambda: Lively(tmp_path)


async def test_a_process_that_cannot_go_on_is_given_up_when_that_has_taken_too_long(make: Callable[[], Lively]) -> None:
    lively = make()
    async with kept_alive(lively) as keeping:
        lively.hinder(await lively.next())
        second = await lively.next()
        lively.own.works()
        lively.clock.advance(MEND_WITHIN_S + 1)
        lively.hinder(second)

        async with asyncio.timeout(WITHIN_S):
            given_up = await keeping
    assert given_up is not None
    assert (given_up.code, given_up.reason) == ("no-space", "a full disk")


@pytest.mark.parametrize("gets_on", [OwnProcess.gets_answer, OwnProcess.progressed])
async def test_a_process_that_cannot_go_on_again_after_it_got_on_has_its_whole_time_again(
    make: Callable[[], Lively], gets_on: Callable[[OwnProcess], None]
) -> None:
    lively = make()
    async with kept_alive(lively):
        lively.hinder(await lively.next())
        second = await lively.next()
        lively.own.works()
        gets_on(lively.own)
        lively.clock.advance(MEND_WITHIN_S + 1)
        lively.hinder(second)

        await lively.next()


async def test_an_answer_that_no_process_has_got_is_no_sign_that_one_can_go_on(make: Callable[[], Lively]) -> None:
    lively = make()
    async with kept_alive(lively) as keeping:
        lively.hinder(await lively.next())
        second = await lively.next()
        lively.own.gets_answer()
        lively.clock.advance(MEND_WITHIN_S + 1)
        lively.hinder(second)

        async with asyncio.timeout(WITHIN_S):
            assert await keeping is not None


async def test_while_lost_tensors_are_asked_for_again_it_is_said_that_the_process_cannot_go_on(
    make: Callable[[], Lively],
) -> None:
    lively = make()
    async with kept_alive(lively):
        first = await lively.next()
        lively.own.works()
        lively.hinder(first, TensorDamaged.code)
        async with asyncio.timeout(WITHIN_S):
            await lively.mending.wait()
        began = lively.clock.now
        lively.clock.advance(MEND_WITHIN_S - 1)

        standing = lively.own.standing
        assert (standing.phase, standing.since, standing.until) == (Phase.HINDERED, began, began + MEND_WITHIN_S)
        lively.is_mended.set()
        await lively.next()
