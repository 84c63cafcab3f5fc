"""Work in a group that may be ending, and a workspace's one user."""

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from hanse.errors import ConfigError
from hanse.server.lifetime import only_user_of, start_in


class Work:
    def __init__(self) -> None:
        self.has_begun = False
        self.has_ended = False

    async def run(self) -> None:
        self.has_begun = True
        await asyncio.sleep(0)
        self.has_ended = True


async def guarded(work: Coroutine[Any, Any, None]) -> None:
    await work


async def test_work_runs_in_its_group() -> None:
    work = Work()
    async with asyncio.TaskGroup() as group:
        task = start_in(group, work.run(), guarded, name="work")
        assert task is not None
        assert task.get_name() == "work"

    assert work.has_ended


async def test_work_that_is_cancelled_before_its_first_step_is_closed() -> None:
    work = Work()
    coroutine = work.run()  # never awaited, which would be a warning, and that an error here
    async with asyncio.TaskGroup() as group:
        task = start_in(group, coroutine, guarded, name="work")
        assert task is not None
        task.cancel()

    assert not work.has_begun
    with pytest.raises(RuntimeError, match="cannot reuse"):
        await coroutine


async def test_a_group_that_has_ended_takes_no_work() -> None:
    async with asyncio.TaskGroup() as group:
        pass
    work = Work()

    assert start_in(group, work.run(), guarded, name="work") is None
    assert not work.has_begun


def test_a_workspace_has_one_user_at_a_time(tmp_path: Path) -> None:
    with only_user_of(tmp_path), pytest.raises(ConfigError, match="no other running server"), only_user_of(tmp_path):
        pass
    with only_user_of(tmp_path):
        pass
