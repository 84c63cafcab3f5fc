"""Tasks that stand for processes end like processes."""

import asyncio

import pytest

from hanse.errors import InternalError, NotFound
from hanse.ids import JobId
from hanse.server.run_folder import RunFolder
from hanse.simulator.launcher import TaskHandle, TaskLauncher
from hanse.simulator.pool import FunctionCrew


async def nothing() -> None:
    pass


async def for_ever() -> None:
    await asyncio.get_running_loop().create_future()


async def test_task_that_returns_has_status_0() -> None:
    handle = TaskHandle(nothing(), ask_to_end=nothing, name="test")
    assert await handle.wait() == 0
    assert await handle.stop() == 0
    assert handle.log_tail() == ""
    assert handle.pid == 0


@pytest.mark.parametrize("error", [NotFound("job", "a"), ZeroDivisionError("oh")])
async def test_task_that_raises_has_status_1_and_its_sentence_for_a_log(error: Exception) -> None:
    async def fail() -> None:
        raise error

    handle = TaskHandle(fail(), ask_to_end=nothing, name="test")
    assert await handle.wait() == 1
    assert str(error) in handle.log_tail(1)


async def test_stop_asks_first() -> None:
    asked = asyncio.Event()

    async def ask() -> None:
        asked.set()

    async def live() -> None:
        await asked.wait()

    assert await TaskHandle(live(), ask_to_end=ask, name="test").stop() == 0


@pytest.mark.parametrize("ask", [nothing, for_ever])
async def test_task_that_does_not_end_when_asked_is_cancelled(ask: object) -> None:
    handle = TaskHandle(for_ever(), ask_to_end=ask, name="test")  # type: ignore[arg-type]  # one of the two above
    assert await handle.stop(grace_s=0.01) == 1


async def test_waiting_can_be_given_up_without_ending_the_task() -> None:
    handle = TaskHandle(for_ever(), ask_to_end=nothing, name="test")
    waiting = asyncio.create_task(handle.wait())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert await handle.stop(grace_s=0.0) == 1


async def test_other_modules_are_not_launched(tmp_path: "pytest.TempPathFactory") -> None:
    async def dial(target: str) -> None:
        raise AssertionError(target)

    def folder(job_id: JobId) -> RunFolder:
        raise AssertionError(job_id)

    launcher = TaskLauncher(dial, folder, FunctionCrew(1, logs=tmp_path))  # type: ignore[arg-type]  # never used
    with pytest.raises(InternalError, match="starting another in a simulation"):
        await launcher.launch("another", spec=b"", log_path=tmp_path, env={}, name="test")  # type: ignore[arg-type]
