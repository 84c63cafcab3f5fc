"""``hanse client start``: kit, then agent, then take part; and ``hanse client stop``."""

import asyncio
import logging
import random
import signal
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Final

from cyclopts import Parameter

from hanse.cli.logs import show_logs
from hanse.cli.output import TEXT, Output
from hanse.cli.process_file import announced
from hanse.cli.process_file import stop as stop_process
from hanse.client.agent import ClientAgent
from hanse.identity.kits import Kit
from hanse.identity.private_files import make_private_folder
from hanse.launch.process import ProcessLauncher
from hanse.settings import ClientSettings

PROCESS_FILE: Final = "client.pid"
STOP_TIMEOUT_S: Final = 30.0


def start(kit: Annotated[Path, Parameter(help="The folder of the client's kit.")], /, *, output: Output = TEXT) -> None:
    """Run a site's agent until it is stopped: by Ctrl-C, SIGTERM, or 'hanse client stop'.

    Prints one line when the client is registered. It connects again by itself, however long the server is away.
    """
    show_logs(logging.INFO, as_json=output.is_json, verbose=output.verbose)
    loaded = Kit.load(kit, ClientSettings)
    workspace = make_private_folder(_workspace(loaded))
    with announced(workspace / PROCESS_FILE, what=f"the client of {workspace}"):
        asyncio.run(_take_part(loaded, workspace, output))


def stop(
    kit: Annotated[Path, Parameter(help="The folder of the client's kit.")],
    /,
    *,
    force: Annotated[bool, Parameter(negative=(), help="Kill the process if it does not end in time.")] = False,
    output: Output = TEXT,
) -> None:
    """Stop a site's agent; the processes of its jobs end with it."""
    loaded = Kit.load(kit, ClientSettings)
    path = _workspace(loaded) / PROCESS_FILE
    pid = stop_process(path, what="the client", timeout_s=STOP_TIMEOUT_S, force=force)
    what = "not running" if pid is None else "stopped"
    if output.is_json:
        output.document({"client": what, "process": pid})
    else:
        output.say(f"the client {'is' if pid is None else f'(process {pid}) has'} {what}")


async def _take_part(kit: Kit[ClientSettings], workspace: Path, output: Output) -> None:
    agent = ClientAgent(
        kit.settings,
        workspace=workspace,
        launcher=ProcessLauncher(),
        rng=random.Random(),  # noqa: S311 - the jitter of pauses, nothing secret
        identity=kit.identity,
        roots=kit.ca_pem,
        tls_roots=kit.tls_roots,
        release=version("hanse"),
    )
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, agent.stop)
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


def _workspace(kit: Kit[ClientSettings]) -> Path:
    return kit.resolve(kit.settings.workspace).absolute()
