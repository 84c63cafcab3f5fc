"""A site under test: an agent with a fake launcher, connected in memory to a fake server."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hanse.client.agent import ClientAgent
from hanse.settings import ClientSettings

from .fake_launcher import FakeLauncher
from .fake_server import PROJECT, SITE, FakeServer

APP = "from hanse.client import ClientApp\napp = ClientApp()\n"


@dataclass
class Site:
    agent: ClientAgent
    launcher: FakeLauncher
    workspace: Path
    running: "asyncio.Task[None]"


def settings(**changes: Any) -> ClientSettings:
    return ClientSettings(**{"project": PROJECT, "name": SITE, "servers": ("memory",), "tls": False, **changes})


def code_folder(folder: Path, source: str = APP, name: str = "app.py") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(source)
    return folder


@asynccontextmanager
async def site(server: FakeServer, workspace: Path, **changes: Any) -> AsyncIterator[Site]:
    """An agent that runs within the block; whatever it ends with there is the test's to expect."""
    launcher = FakeLauncher()
    options = {key: changes.pop(key) for key in ("identity", "roots", "dial", "wall") if key in changes}
    agent = ClientAgent(
        settings(**changes),
        workspace=workspace,
        launcher=launcher,
        rng=random.Random(1),
        transfers=server.transfers,
        **{"dial": server.dial, **options},
    )
    running = asyncio.create_task(agent.run(), name="agent under test")
    try:
        yield Site(agent, launcher, workspace, running)
    finally:
        agent.stop()
        await asyncio.gather(running, return_exceptions=True)


async def within(seconds: float, awaitable: Any) -> Any:
    async with asyncio.timeout(seconds):
        return await awaitable
