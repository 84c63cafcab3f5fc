"""``hanse server start``: kit, then services, then serve; and ``hanse server stop``."""

import argparse
import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Annotated, Any, Final

from cyclopts import Parameter

from hanse.admin.commands import AdminCommands
from hanse.admin.session import AdminSession
from hanse.cli.asking import KitFolder, ask
from hanse.cli.logs import show_logs
from hanse.cli.output import TEXT, Output
from hanse.cli.process_file import announced
from hanse.cli.process_file import stop as stop_process
from hanse.errors import ConfigError
from hanse.identity.kits import CA_FILE, CERTIFICATE_FILE, KEY_FILE, Kit
from hanse.identity.private_files import make_private_folder
from hanse.server.federated_server import FederatedServer
from hanse.settings import ServerSettings

PROCESS_FILE: Final = "server.pid"
BEYOND_SHUTDOWN_S: Final = 30.0
"""How much longer than it waits for its clients a server may take to stop."""

_log = logging.getLogger(__name__)


def start(kit: Annotated[Path, Parameter(help="The folder of the server's kit.")], /, *, output: Output = TEXT) -> None:
    """Run the server until it is stopped: by Ctrl-C, SIGTERM, 'hanse server stop', or an administrator.

    Prints one line when it serves. Running jobs stay resumable: the next start takes them up.
    """
    show_logs(logging.INFO, as_json=output.is_json, verbose=output.verbose)
    loaded = Kit.load(kit, ServerSettings)
    settings = loaded.settings
    workspace = make_private_folder(_workspace(loaded))
    stops: SimpleQueue[str] = SimpleQueue()  # whose put may be called where a signal has interrupted anything
    server = FederatedServer(
        project_name=settings.project,
        min_num_clients=settings.min_num_clients,
        max_num_clients=settings.max_num_clients,
        heart_beat_timeout=settings.heart_beat_timeout_s,
        shutdown_period=settings.shutdown_period_s,
        cmd_modules=[AdminCommands(on_stop=lambda: stops.put("an administrator"))],
    )
    with announced(workspace / PROCESS_FILE, what=f"the server of {workspace}"):
        try:
            with _stop_signals_to(stops):
                server.deploy(
                    argparse.Namespace(workspace=workspace, settings=settings), _grpc_args(loaded), settings.tls
                )
                _say_that_it_serves(server, settings, output)
                _log.info("stopping", extra={"asked_by": stops.get()})
        finally:
            server.fl_shutdown()


def stop(
    kit: Annotated[Path | None, Parameter(help="The folder of the server's kit, on the server's machine.")] = None,
    /,
    *,
    admin_kit: KitFolder = None,
    force: Annotated[
        bool, Parameter(negative=(), help="Kill the server's process if it does not end in time.")
    ] = False,
    output: Output = TEXT,
) -> None:
    """Stop the server in order; running jobs stay resumable.

    On the server's machine, name the server's kit: this waits for its process to end. From elsewhere, name an
    administrator's with --kit: this returns when the server has agreed to stop.
    """
    if kit is None:
        if admin_kit is None:
            raise ConfigError("KIT", got=None, expected="the server's kit, or an administrator's with --kit")
        ask(admin_kit, AdminSession.stop, output)
        _say_stopped(output, "asked to stop", None)
        return
    loaded = Kit.load(kit, ServerSettings)
    path = _workspace(loaded) / PROCESS_FILE
    timeout_s = loaded.settings.shutdown_period_s + BEYOND_SHUTDOWN_S
    pid = stop_process(path, what="the server", timeout_s=timeout_s, force=force)
    _say_stopped(output, "not running" if pid is None else "stopped", pid)


@contextmanager
def _stop_signals_to(stops: SimpleQueue[str]) -> Iterator[None]:
    """Have SIGINT and SIGTERM put their names into *stops*; afterwards they end the process as ever.

    Whoever asks once more, after the first time, does not want to wait for clients.
    """
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda got, _: stops.put(signal.Signals(got).name)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _workspace(kit: Kit[ServerSettings]) -> Path:
    return kit.resolve(kit.settings.workspace).absolute()


def _grpc_args(kit: Kit[ServerSettings]) -> dict[str, Any]:
    return {
        "service": {"target": kit.settings.target, "scheme": "grpc"},
        "ssl_root_cert": kit.folder / CA_FILE,
        "ssl_cert": kit.folder / CERTIFICATE_FILE,
        "ssl_private_key": kit.folder / KEY_FILE,
        "require_client_certificate": kit.settings.client_certificates,
    }


def _say_that_it_serves(server: FederatedServer, settings: ServerSettings, output: Output) -> None:
    cell = server.get_cell()
    target = settings.target if cell is None or cell.target is None else cell.target
    if output.is_json:
        output.line({"serving": target, "project": settings.project, "tls": settings.tls})
    else:
        output.say(f"serving project {settings.project} at {target}{'' if settings.tls else ' WITHOUT TLS'}")


def _say_stopped(output: Output, what: str, pid: int | None) -> None:
    if output.is_json:
        output.document({"server": what, "process": pid})
    else:
        output.say(f"the server {'is' if pid is None else f'(process {pid}) has'} {what}")
