import asyncio
import threading

import pytest

from hanse.cell.loop import background_loop, run
from hanse.errors import TimedOut


async def where() -> tuple[asyncio.AbstractEventLoop, str]:
    return asyncio.get_running_loop(), threading.current_thread().name


def test_all_threads_of_a_process_share_one_loop() -> None:
    loops: list[asyncio.AbstractEventLoop] = []
    threads = [threading.Thread(target=lambda: loops.append(background_loop())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(map(id, loops))) == 1
    assert run(where()) == (loops[0], "hanse event loop")


def test_what_the_coroutine_raises_is_raised_to_the_caller() -> None:
    async def failing() -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        run(failing())


def test_its_own_time_out_is_not_taken_for_ours() -> None:
    async def failing() -> None:
        raise TimeoutError("mine")

    with pytest.raises(TimeoutError, match="mine"):
        run(failing(), 5.0)


def test_a_coroutine_that_takes_too_long_is_cancelled() -> None:
    cancelled = threading.Event()

    async def endless() -> None:
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    with pytest.raises(TimedOut, match="endless"):
        run(endless(), 0.01)
    assert cancelled.wait(5)


def test_waiting_for_the_loop_on_the_loop_is_refused() -> None:
    async def waits_for_itself() -> None:
        run(where())

    with pytest.raises(RuntimeError, match="await the coroutine instead"):
        run(waits_for_itself())
