"""A deployed server's life: one task on the event loop that enters what the server consists of, and leaves it."""

import asyncio
import fcntl
import os
import secrets
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from pathlib import Path
from typing import Any

from hanse.cell.cell import Cell
from hanse.cell.loop import run
from hanse.errors import ConfigError
from hanse.identity.private_files import keep_or_create


class Life:
    """Enters *services* in a task of its own and leaves it there, because what is entered in a task must end in it.

    ``start`` and ``stop`` are called from plain threads; ``cell`` is the server's cell from start on.
    """

    def __init__(self, services: Callable[[], AbstractAsyncContextManager[Cell]]) -> None:
        self._services = services
        self._stopping: asyncio.Event | None = None
        self._task: asyncio.Task[None] | None = None
        self.cell: Cell | None = None

    def start(self) -> None:
        """Return when the services are ready; raise what kept them from it."""
        run(self._start())

    def stop(self) -> None:
        """Return when the services are gone; twice is once."""
        run(self._stop())

    async def _start(self) -> None:
        ready: asyncio.Future[Cell] = asyncio.get_running_loop().create_future()
        self._stopping = asyncio.Event()
        self._task = asyncio.create_task(self._live(ready, self._stopping), name="server")  # awaited by _stop
        self.cell = await ready

    async def _live(self, ready: asyncio.Future[Cell], stopping: asyncio.Event) -> None:
        try:
            async with self._services() as cell:
                ready.set_result(cell)
                await stopping.wait()
        except BaseException as error:
            if ready.done():
                raise
            ready.set_exception(error)

    async def _stop(self) -> None:
        if self._stopping is not None and self._task is not None:
            self._stopping.set()
            await self._task


def holder_of(workspace: Path, name: str) -> str:
    """Return what the server called *name* signs leases with: no other workspace's server has the same."""
    number = keep_or_create(workspace / "server.id", secrets.token_hex(8).encode())
    return f"{name}:{number.decode()}"


@contextmanager
def only_user_of(workspace: Path) -> Iterator[None]:
    """Hold *workspace* for this server alone, until the end of the block or of the process, however that dies.

    Raises:
        ConfigError: another server uses it.
    """
    descriptor = os.open(workspace / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                "workspace", got=str(workspace), expected="a folder that no other running server uses"
            ) from error
        yield
    finally:
        os.close(descriptor)


def start_in(
    group: asyncio.TaskGroup,
    work: Coroutine[Any, Any, None],
    guarded: Callable[[Coroutine[Any, Any, None]], Coroutine[Any, Any, None]],
    *,
    name: str,
) -> asyncio.Task[None] | None:
    """Give *work*, within *guarded*, a task in *group*; ``None`` when the group is ending and takes no more.

    Work that never gets to run, because its task is cancelled before its first step, is closed.
    """
    wrapped = guarded(work)
    try:
        task = group.create_task(wrapped, name=name)
    except RuntimeError:  # what an ending group raises
        wrapped.close()
        work.close()
        return None
    task.add_done_callback(lambda _: work.close())
    return task
