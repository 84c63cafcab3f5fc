"""A job's code in the caller's process: it is found, takes turns, and leaves no trace."""

import asyncio
import importlib
import json
import sys
from collections.abc import Coroutine, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from hanse.cell.loop import run
from hanse.errors import JobInvalid
from hanse.simulator.code import WORKER_MARK, refuse_simulation_within_job, set_aside, turn


def test_only_others_modules_by_the_jobs_names_are_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mine", "json", "numpy", "__main__"):
        (tmp_path / f"{name}.py").touch()
    (tmp_path / "package").mkdir()
    mine, inner, other = ModuleType("mine"), ModuleType("package.inner"), ModuleType("other")
    for module in (mine, inner, other):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    with set_aside(tmp_path):
        assert "mine" not in sys.modules
        assert "package.inner" not in sys.modules
        assert sys.modules["other"] is other
        assert sys.modules["json"] is json
        assert sys.modules["numpy"] is np
        assert "__main__" in sys.modules
    assert sys.modules["mine"] is mine
    assert sys.modules["package.inner"] is inner


def test_turns_do_not_overlap_and_each_sees_its_own_module(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    async def import_in(number: int) -> None:
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "of_this_job.py").write_text(f"NUMBER = {number}\n")
        async with turn(folder):
            first = importlib.import_module("of_this_job").NUMBER
            await asyncio.sleep(0)
            seen.append((first, importlib.import_module("of_this_job").NUMBER))

    path = list(sys.path)
    run(_all(map(import_in, range(3))))
    assert seen == [(0, 0), (1, 1), (2, 2)]
    assert sys.path == path
    assert "of_this_job" not in sys.modules


async def _all(works: Iterable[Coroutine[Any, Any, None]]) -> None:
    await asyncio.gather(*works)


async def test_jobs_code_may_not_simulate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_simulation_within_job()
    async with turn(tmp_path):
        with pytest.raises(JobInvalid, match="__main__"):
            await asyncio.to_thread(refuse_simulation_within_job)
    refuse_simulation_within_job()
    monkeypatch.setenv(WORKER_MARK, "1")
    with pytest.raises(JobInvalid):
        refuse_simulation_within_job()
