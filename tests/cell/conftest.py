import asyncio
from collections.abc import AsyncIterator

import pytest

from .world import Authority


@pytest.fixture(scope="session")
def authority() -> Authority:
    return Authority()


@pytest.fixture(scope="session")
def stranger() -> Authority:
    """Another project's authority."""
    return Authority()


@pytest.fixture
async def no_task_is_left_behind() -> AsyncIterator[None]:
    before = asyncio.all_tasks()
    yield
    left = asyncio.all_tasks() - before - {asyncio.current_task()}
    if left:
        # gRPC's own task for a cancelled call's status ends a moment after the call.
        _, left = await asyncio.wait(left, timeout=2)
    assert not left
