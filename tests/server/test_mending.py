"""How long what a server cannot do may take to be mended, over a clock that a test sets."""

import asyncio
from collections.abc import Callable

import pytest

from hanse.errors import StoreFailed
from hanse.server.mending import FORGOTTEN_AFTER_S, Mending

FIRST, LATER = StoreFailed("writing", "no route"), StoreFailed("writing", "it is full")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def given_up() -> list[StoreFailed]:
    return []


@pytest.fixture
def mending(clock: Clock, given_up: list[StoreFailed]) -> Callable[[], Mending]:
    return lambda: Mending(within_s=0.01, now=clock, give_up=given_up.append)


async def past_its_time() -> None:
    """Return when what was to be mended by now is due: timers of one loop are due in their order."""
    await asyncio.sleep(0.05)


async def test_what_fails_is_told_since_the_first_time_and_given_up_for_the_last_reason(
    mending: Callable[[], Mending], clock: Clock, given_up: list[StoreFailed]
) -> None:
    tried = mending()
    tried.failed(FIRST)
    clock.now = 130.0
    tried.failed(LATER)

    assert tried.trouble is not None
    assert (tried.trouble.since, tried.trouble.until, tried.trouble.reason) == (100.0, 100.01, FIRST.reason)
    await past_its_time()
    assert given_up == [LATER]


async def test_what_is_mended_in_time_is_not_given_up(
    mending: Callable[[], Mending], given_up: list[StoreFailed]
) -> None:
    tried = mending()
    tried.failed(FIRST)
    await asyncio.sleep(0)  # the loop has set the timer
    tried.mended()

    assert tried.trouble is None
    await past_its_time()
    assert given_up == []


async def test_what_fails_again_after_it_was_mended_has_its_whole_time(
    mending: Callable[[], Mending], clock: Clock, given_up: list[StoreFailed]
) -> None:
    tried = mending()
    tried.failed(FIRST)
    tried.mended()
    clock.now = 200.0
    tried.failed(LATER)

    assert tried.trouble is not None
    assert tried.trouble.since == 200.0
    await past_its_time()
    assert given_up == [LATER]


async def test_a_store_that_can_be_read_has_not_written_what_it_could_not(mending: Callable[[], Mending]) -> None:
    tried = mending()
    tried.failed(FIRST)
    tried.can_be_read()
    assert tried.trouble is not None

    tried.failed_to_read(LATER)
    tried.can_be_read()
    assert tried.trouble is not None
    assert (tried.trouble.since, tried.trouble.reason) == (100.0, FIRST.reason)


async def test_a_store_that_could_not_be_read_is_mended_when_it_can(
    mending: Callable[[], Mending], clock: Clock, given_up: list[StoreFailed]
) -> None:
    tried = mending()
    tried.failed(FIRST)
    clock.now += FORGOTTEN_AFTER_S
    tried.failed_to_read(LATER)
    assert tried.trouble is not None
    tried.can_be_read()

    assert tried.trouble is None
    await past_its_time()
    assert given_up == []


async def test_what_nobody_tries_again_holds_nobody_up(
    mending: Callable[[], Mending], clock: Clock, given_up: list[StoreFailed]
) -> None:
    tried = mending()
    tried.failed(FIRST)
    clock.now += FORGOTTEN_AFTER_S

    assert tried.trouble is None
    await past_its_time()
    assert given_up == []
    tried.failed(LATER)
    assert tried.trouble is not None
    assert tried.trouble.since == clock.now
    await past_its_time()
    assert given_up == [LATER]


async def test_a_failure_is_taken_note_of_from_any_thread(
    mending: Callable[[], Mending], given_up: list[StoreFailed]
) -> None:
    await asyncio.to_thread(mending().failed, FIRST)

    await past_its_time()
    assert given_up == [FIRST]
