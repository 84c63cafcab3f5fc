"""``hanse client start``: kit, then agent, then take part."""

import asyncio
import logging
import random
import signal
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from hanse.cli.logs import show_logs
from hanse.cli.output import TEXT, Output
from hanse.cli.process_file import announced, workspace_of
from hanse.client.agent import ClientAgent
from hanse.client.workspace import CLIENT_FILE
from hanse.identity.kits import Kit
from hanse.identity.private_files import make_private_folder
from hanse.launch.surviving import SurvivingLauncher
from hanse.settings import ClientSettings

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def start(kit: Annotated[Path, Parameter(help="The folder of the client's kit.")], /, *, output: Output = TEXT) -> None:
    """Run a site's agent until it is stopped: by Ctrl-C, SIGTERM, or 'hanse client stop'.

    Prints one line when the client is registered. It connects again by itself, however long the server is away.
    """
    show_logs(logging.INFO, as_json=output.is_json, verbose=output.verbose)
    loaded = Kit.load(kit, ClientSettings)
    workspace = make_private_folder(workspace_of(loaded))
    with announced(workspace / CLIENT_FILE, what=f"the client of {workspace}"):
        asyncio.run(_take_part(loaded, workspace, output))


async def _take_part(kit: Kit[ClientSettings], workspace: Path, output: Output) -> None:
    agent = ClientAgent(
        kit.settings,
        workspace=workspace,
        launcher=SurvivingLauncher(),
        rng=random.Random(),  # noqa: S311 - the jitter of pauses, nothing secret
        identity=kit.identity,
        roots=kit.ca_pem,
        tls_roots=kit.tls_roots,
        release=version("hanse"),
    )
    loop = asyncio.get_running_loop()

    def stop() -> None:
        for number in _STOP_SIGNALS:  # who asks once more does not want to wait
            loop.remove_signal_handler(number)
        agent.stop()

    for number in _STOP_SIGNALS:
        loop.add_signal_handler(number, stop)
    telling = asyncio.create_task(_tell_when_registered(agent, kit.settings, output), name="tell")  # awaited below
    try:
        await agent.run()
    finally:
        telling.cancel()
        await asyncio.gather(telling, return_exceptions=True)


async def _tell_when_registered(agent: ClientAgent, settings: ClientSettings, output: Output) -> None:
    await agent.wait_registered()
    if output.is_json:
        output.line({"client": settings.name, "project": settings.project, "registered": True})
    else:
        output.say(f"client {settings.name} of project {settings.project} is registered")
