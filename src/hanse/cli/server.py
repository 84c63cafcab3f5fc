"""``hanse server start``: kit, then services, then serve; and ``hanse server stop``."""

import argparse
import asyncio
import logging
import signal
from pathlib import Path
from queue import SimpleQueue
from typing import Annotated, Final

from cyclopts import Parameter

from hanse.cli.asking import AdminKit, ask
from hanse.cli.logs import show_logs
from hanse.cli.output import Output
from hanse.cli.process_file import announced
from hanse.cli.process_file import stop as stop_process
from hanse.errors import ConfigError
from hanse.identity.kits import CA_FILE, CERTIFICATE_FILE, KEY_FILE, Kit
from hanse.identity.private_files import make_private_folder
from hanse.settings import ServerSettings

PROCESS_FILE: Final = "server.pid"
BEYOND_SHUTDOWN_S: Final = 30.0
"""How much longer than it waits for its clients a server may take to stop."""


def start(kit: Path, *, output: Output = Output()) -> None:
    """Run the server until it is stopped: by Ctrl-C, SIGTERM, 'hanse server stop', or an administrator.

    Prints one line when it serves. Running jobs stay resumable: the next start takes them up.

    Parameters
    ----------
    kit
        The folder of the server's kit.
    """
    from hanse.admin.commands import AdminCommands  # noqa: PLC0415 - 'stop' needs none of it
    from hanse.server.federated_server import FederatedServer  # noqa: PLC0415 - as above

    show_logs(logging.INFO, as_json=output.is_json, verbose=output.verbose)
    loaded = Kit.load(kit, ServerSettings)
    settings = loaded.settings
    workspace = make_private_folder(loaded.resolve(settings.workspace).absolute())
    stops: SimpleQueue[str] = SimpleQueue()  # whose put may be called in a signal's handler
    server = FederatedServer(
        project_name=settings.project,
        min_num_clients=settings.min_num_clients,
        max_num_clients=settings.max_num_clients,
        heart_beat_timeout=settings.heart_beat_timeout_s,
        shutdown_period=settings.shutdown_period_s,
        cmd_modules=[AdminCommands(on_stop=lambda: stops.put("an administrator"))],
    )
    with announced(workspace / PROCESS_FILE, what=f"the server of {workspace}"):
        before = {number: signal.signal(number, lambda got, _: stops.put(signal.Signals(got).name)) for number in _STOP}
        try:
            server.deploy(
                argparse.Namespace(workspace=workspace, settings=settings), _grpc_args(loaded), settings.tls
            )
            _say_that_it_serves(server, settings, output)
            _log.info("stopping", extra={"asked_by": stops.get()})
        finally:
            for number, handler in before.items():  # who asks once more does not want to wait for clients
                signal.signal(number, handler)
            server.fl_shutdown()
