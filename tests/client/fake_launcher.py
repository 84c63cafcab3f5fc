"""A launcher that starts nothing: tests end its processes when they want to."""

import asyncio
from collections.abc import Mapping
from pathlib import Path

import msgspec

from hanse.client.process_spec import JobProcessSpec


class FakeHandle:
    """A process that runs until ``end``, or until it is stopped."""

    def __init__(self, module: str, spec: bytes, log_path: Path) -> None:
        self.module, self.log_path = module, log_path
        self.spec = msgspec.msgpack.decode(spec, type=JobProcessSpec)
        self.pid = 1
        self.may_stop = asyncio.Event()
        self.may_stop.set()
        self.is_stopped = False
        self.tail = ""
        self._status: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def end(self, status: int, tail: str = "") -> None:
        self.tail = tail
        self._status.set_result(status)

    async def wait(self) -> int:
        return await asyncio.shield(self._status)

    async def stop(self, grace_s: float = 5.0) -> int:
        await self.may_stop.wait()
        self.is_stopped = True
        if not self._status.done():
            self._status.set_result(0)
        return self._status.result()

    def log_tail(self, lines: int = 20) -> str:
        return "\n".join(self.tail.splitlines()[-lines:]) if lines else ""


class FakeLauncher:
    """Notes what is launched."""

    def __init__(self) -> None:
        self.launched: list[FakeHandle] = []
        self.error: OSError | None = None

    async def launch(
        self, module: str, *, spec: bytes, log_path: Path, env: Mapping[str, str], name: str
    ) -> FakeHandle:
        if self.error is not None:
            raise self.error
        _write(log_path)
        self.launched.append(FakeHandle(module, spec, log_path))
        return self.launched[-1]


def _write(log_path: Path) -> None:
    log_path.parent.mkdir(parents=True, exist_ok=True)
    log_path.write_text("a line")
