"""A client for a program that has no event loop: its agent runs on the process's own loop while a block lasts."""

import asyncio
import random
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Final

from hanse.cell.loop import run
from hanse.client.agent import ClientAgent
from hanse.client.workspace import only_agent_of
from hanse.identity.certificates import Identity
from hanse.launch.surviving import SurvivingLauncher
from hanse.settings import ClientSettings

REGISTER_TIMEOUT_S: Final = 30.0


@contextmanager
def running_client(
    settings: ClientSettings, *, workspace: Path, identity: Identity | None = None, roots: bytes = b""
) -> Iterator[ClientAgent]:
    """Run a client until the block ends; enter it when the client is registered.

    *identity* and *roots* (the project's CA, PEM) are the kit's; without TLS there are none.

    Raises:
        Conflict: another agent has the workspace.
        HanseError: the server refuses the client, or does not answer in time.
    """
    workspace = workspace.absolute()
    with only_agent_of(workspace):
        agent, work = run(_start(settings, workspace, identity, roots))
        try:
            run(_registered(agent, work), REGISTER_TIMEOUT_S)
            yield agent
        finally:
            run(_stop(agent, work))


async def _start(
    settings: ClientSettings, workspace: Path, identity: Identity | None, roots: bytes
) -> tuple[ClientAgent, asyncio.Task[None]]:
    agent = ClientAgent(
        settings,
        workspace=workspace,
        launcher=SurvivingLauncher(),
        rng=random.Random(),  # noqa: S311 - jitter between tries, not a secret
        identity=identity,
        roots=roots,
        release=version("hanse"),
    )
    return agent, asyncio.create_task(agent.run(), name=f"client {settings.name}")  # awaited by _stop


async def _registered(agent: ClientAgent, work: asyncio.Task[None]) -> None:
    waiting = asyncio.create_task(agent.wait_registered(), name="registration")  # ended below
    try:
        await asyncio.wait({waiting, work}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            work.result()
    finally:
        waiting.cancel()


async def _stop(agent: ClientAgent, work: asyncio.Task[None]) -> None:
    agent.stop()
    await asyncio.gather(work, return_exceptions=True)
