"""Worker processes, and who of the clients has which of them.

A ``Crew`` for functions has as many workers as may be busy at once, each serving any client. One for scripts has a
worker for each client, started with the client's first task, of which so many are busy at once. Either way a request
takes its place (waiting for it can be given up), is handed over, and keeps the place until it is answered, also when
nobody wants the answer any more: training code cannot be interrupted without losing the process. A worker that dies
takes with it the one request that it was at, and the next one in its place finds a new worker.
"""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from socket import socketpair
from typing import Any, Final, Protocol

import msgspec

from hanse.client.api import Site
from hanse.errors import ProcessDied, ProtocolError, Unreachable
from hanse.ids import ClientName
from hanse.launch.process import ProcessLauncher, RunningProcess
from hanse.messages import Metrics
from hanse.simulator.code import WORKER_MARK
from hanse.simulator.exchange import (
    LENGTH,
    Answer,
    Broken,
    Logged,
    Request,
    Said,
    WorkerSpec,
    check_length,
    decode_said,
    encode,
)

WORKER_MODULE: Final = "hanse.simulator.worker"
DYING_S: Final = 1.0
"""How long a worker that has closed its channel may take to be gone: its status is wanted."""
SCRIPT_GRACE_S: Final = 2.0
"""How long a script may go on after its run has ended, as a deployed one may."""

OnLog = Callable[[int, Metrics], None]


class Worker:
    """A worker process and the way to it; one request at a time."""

    def __init__(self, process: RunningProcess, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._process, self._reader, self._writer = process, reader, writer

    @classmethod
    async def start(cls, spec: Callable[[int], WorkerSpec], *, log_path: Path, name: str) -> "Worker":
        """Start a worker with what *spec* makes of its channel's descriptor.

        Raises:
            OSError: the system does not let one be started.
        """
        ours, theirs = socketpair()
        try:
            with theirs:
                process = await ProcessLauncher(pass_fds=(theirs.fileno(),)).launch(
                    WORKER_MODULE,
                    spec=msgspec.msgpack.encode(spec(theirs.fileno())),
                    log_path=log_path,
                    env={WORKER_MARK: "1"},
                    name=name,
                )
        except BaseException:
            ours.close()
            raise
        try:
            reader, writer = await asyncio.open_connection(sock=ours)
        except BaseException:
            ours.close()
            await process.stop(grace_s=0.0)
            raise
        return cls(process, reader, writer)

    async def ask(self, request: Request, on_log: OnLog) -> Answer:
        """Return the answer to *request*; what the code logs meanwhile goes to *on_log*.

        Raises:
            ProcessDied: the worker did not live to answer, and has been reaped.
        """
        try:
            self._writer.write(encode(request))
            while True:
                said = await self._hear()
                if isinstance(said, Broken):
                    return said
                if said.number != request.number:
                    continue  # a thread that outlived its task
                if not isinstance(said, Logged):
                    return said
                on_log(said.step, said.metrics)
        except (OSError, asyncio.IncompleteReadError):
            # Who closes the channel is dead or dying; whatever still runs of it is of no use.
            status = await self.stop(grace_s=DYING_S)
            raise ProcessDied(request.client, status, self._process.log_tail(1).strip()) from None
        except ProtocolError as error:
            status = await self.stop(grace_s=0.0)
            raise ProcessDied(request.client, status, error.reason) from error

    async def stop(self, *, grace_s: float) -> int:
        """End the worker: close its channel and wait *grace_s* seconds, then kill it; return its exit status."""
        self._writer.close()
        if grace_s > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace_s):
                    await self._process.wait()
        return await self._process.stop(grace_s=0.0)

    async def _hear(self) -> Said:
        length = LENGTH.unpack(await self._reader.readexactly(LENGTH.size))[0]
        check_length(length)
        return decode_said(await self._reader.readexactly(length))


class Crew(Protocol):
    """Workers that answer requests on behalf of clients."""

    def enter(self, site: Site, code: Path) -> None:
        """Be ready to work for the client *site*, whose job's code is in the folder *code*."""
        ...

    async def ask(self, client: ClientName, request: Callable[[int], Request], on_log: OnLog) -> Answer:
        """Return the answer to the request that *request* makes of its number.

        Raises:
            ProcessDied: the worker died of it.
            Unreachable: the crew has gone home.
        """
        ...

    async def leave(self, client: ClientName) -> None:
        """End what is *client*'s alone."""
        ...


class _Place:
    """Where one worker at a time works; it is started when it is needed, or ahead by ``prepare``."""

    def __init__(self, name: str, log_path: Path, spec: Callable[[int], WorkerSpec]) -> None:
        self.name = name
        self._log_path, self._spec = log_path, spec
        self._worker: asyncio.Task[Worker] | None = None
        self._is_closed = False

    def prepare(self) -> "asyncio.Task[Worker]":
        if self._worker is None:
            start = Worker.start(self._spec, log_path=self._log_path, name=self.name)
            self._worker = asyncio.create_task(start, name=f"start of {self.name}")  # awaited by ask and stop
        return self._worker

    async def ask(self, request: Request, on_log: OnLog) -> Answer:
        if self._is_closed:
            raise Unreachable(self.name, "the simulation is ending")
        try:
            worker = await asyncio.shield(self.prepare())
        except OSError as error:
            self._worker = None
            raise Unreachable(self.name, f"it cannot be started: {error.strerror or error}") from error
        try:
            return await worker.ask(request, on_log)
        except ProcessDied:
            self._worker = None
            raise

    async def stop(self, grace_s: float) -> None:
        self._is_closed = True
        task, self._worker = self._worker, None
        if task is None:
            return
        task.cancel()  # a worker that is being started is killed by that; one that has been is not touched
        await asyncio.wait({task})
        if not task.cancelled() and task.exception() is None:
            await task.result().stop(grace_s=grace_s)


class _Errands:
    """Requests under way: each ends in its own time, whoever asked for it."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._under_way: set[asyncio.Task[Answer]] = set()
        self.is_closed = False

    def number(self) -> int:
        return next(self._numbers)

    async def run(self, errand: Coroutine[Any, Any, Answer], *, name: str) -> Answer:
        task = asyncio.create_task(errand, name=name)  # awaited here, and by close()
        self._under_way.add(task)
        task.add_done_callback(self._has_ended)
        return await asyncio.shield(task)

    async def close(self) -> None:
        self.is_closed = True
        tasks = list(self._under_way)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _has_ended(self, task: "asyncio.Task[Answer]") -> None:
        self._under_way.discard(task)
        if not task.cancelled():
            task.exception()  # nobody may want the answer any more, and that is no mistake


class FunctionCrew:
    """Workers for jobs whose client is an app: *size* of them, each for any client. ``open`` is its life."""

    def __init__(self, size: int, *, logs: Path) -> None:
        self._places = [_Place(f"worker-{n}", logs / f"worker-{n}.log", WorkerSpec) for n in range(1, size + 1)]
        self._idle: asyncio.Queue[_Place] = asyncio.Queue()
        self._errands = _Errands()

    @asynccontextmanager
    async def open(self) -> AsyncIterator["FunctionCrew"]:
        """Start the workers; at the end, kill them whatever they are doing."""
        for place in self._places:
            place.prepare()
            self._idle.put_nowait(place)
        try:
            yield self
        finally:
            await self.kill()

    async def ask(self, client: ClientName, request: Callable[[int], Request], on_log: OnLog) -> Answer:
        """See ``Crew``."""
        if self._errands.is_closed:
            raise Unreachable("the simulation's workers", "the simulation is ending")
        place = await self._idle.get()
        return await self._errands.run(
            self._do(place, request(self._errands.number()), on_log), name=f"{client} at {place.name}"
        )

    def enter(self, site: Site, code: Path) -> None:
        """See ``Crew``: nothing is one client's alone."""

    async def leave(self, client: ClientName) -> None:
        """See ``Crew``: nothing is one client's alone."""

    async def kill(self) -> None:
        """End all workers at once; nothing is asked of them any more."""
        self._errands.is_closed = True
        await asyncio.gather(*(place.stop(0.0) for place in self._places))
        await self._errands.close()

    async def _do(self, place: _Place, request: Request, on_log: OnLog) -> Answer:
        try:
            return await place.ask(request, on_log)
        finally:
            self._idle.put_nowait(place)


class ScriptCrew:
    """Workers for jobs whose client is a script: one a client, at most *size* of them busy. ``open`` is its life."""

    def __init__(self, size: int, *, logs: Path, script: str) -> None:
        self._logs, self._script = logs, script
        self._room = asyncio.Semaphore(size)
        self._places: dict[ClientName, tuple[asyncio.Lock, _Place]] = {}
        self._errands = _Errands()

    @asynccontextmanager
    async def open(self) -> AsyncIterator["ScriptCrew"]:
        """Let workers be started; at the end, kill them whatever they are doing."""
        try:
            yield self
        finally:
            await self.kill()

    def enter(self, site: Site, code: Path) -> None:
        """See ``Crew``: a place for the client's script, which starts with its first task."""
        spec = _script_spec(site, code, self._script)
        self._places[site.name] = asyncio.Lock(), _Place(site.name, self._logs / f"{site.name}.log", spec)

    async def ask(self, client: ClientName, request: Callable[[int], Request], on_log: OnLog) -> Answer:
        """See ``Crew``."""
        if self._errands.is_closed or client not in self._places:
            raise Unreachable(f"the worker of {client}", "the simulation is ending")
        is_free, place = self._places[client]
        await is_free.acquire()
        try:
            await self._room.acquire()
        except BaseException:
            is_free.release()
            raise
        return await self._errands.run(
            self._do(is_free, place, request(self._errands.number()), on_log), name=f"script of {client}"
        )

    async def leave(self, client: ClientName) -> None:
        """See ``Crew``: the client's script sees that its run has ended."""
        if client in self._places:
            _, place = self._places.pop(client)
            await place.stop(SCRIPT_GRACE_S)

    async def kill(self) -> None:
        """End all workers at once; nothing is asked of them any more."""
        self._errands.is_closed = True
        await asyncio.gather(*(place.stop(0.0) for _, place in self._places.values()))
        await self._errands.close()

    async def _do(self, is_free: asyncio.Lock, place: _Place, request: Request, on_log: OnLog) -> Answer:
        try:
            return await place.ask(request, on_log)
        finally:
            self._room.release()
            is_free.release()


def _script_spec(site: Site, code: Path, script: str) -> Callable[[int], WorkerSpec]:
    return lambda channel: WorkerSpec(channel, script, str(code), site)
