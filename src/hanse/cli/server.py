"""``hanse server start``: kit, then services, then serve."""

import argparse
import logging
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
from cyclopts import Parameter

from hanse.admin.commands import AdminCommands
from hanse.cli.logs import show_logs
from hanse.cli.output import TEXT, Output
from hanse.cli.process_file import SERVER_FILE, announced, workspace_of
from hanse.cli.stops import Stops
from hanse.coordination.service import ServiceState
from hanse.identity.kits import CA_FILE, CERTIFICATE_FILE, KEY_FILE, Kit
from hanse.identity.private_files import make_private_folder
from hanse.server.federated_server import FederatedServer
from hanse.server.lifetime import holder_of
from hanse.server.overseer import LeaseOverseer, OverseerAgent
from hanse.server.tenure import TenureLost
from hanse.settings import ServerSettings
from hanse.storage.records import Store
from hanse.storage.store import SqlStore

LOST: Final = "the end of its tenure"

_log = logging.getLogger(__name__)


def start(kit: Annotated[Path, Parameter(help="The folder of the server's kit.")], /, *, output: Output = TEXT) -> None:
    """Run the server until it is stopped: by Ctrl-C, SIGTERM, 'hanse server stop', or an administrator.

    Prints one line when it serves or, where another server of the project does, stands by to take over. Running jobs
    stay resumable: the next start, or the next server, takes them up.
    """
    show_logs(logging.INFO, as_json=output.is_json, verbose=output.verbose)
    loaded = Kit.load(kit, ServerSettings)
    loaded.require_valid_at(datetime.now(UTC))
    settings = _with_absolute_runs(loaded)
    workspace = make_private_folder(workspace_of(loaded))
    with Stops() as stops:
        store = SqlStore(settings.store) if settings.store else None
        server = FederatedServer(
            project_name=settings.project,
            min_num_clients=settings.min_num_clients,
            max_num_clients=settings.max_num_clients,
            heart_beat_timeout=settings.heart_beat_timeout_s,
            shutdown_period=settings.shutdown_period_s,
            cmd_modules=[AdminCommands(on_stop=lambda: stops.put("an administrator"))],
            snapshot_persistor=store,
            overseer_agent=_overseer(settings, workspace, store) if store is not None else None,
        )
        if store is None:  # a server with an overseer stands by from then on
            server.call_when_lost(lambda: stops.put(LOST))
        with announced(workspace / SERVER_FILE, what=f"the server of {workspace}"):
            try:
                with stops.hearing_signals():
                    server.deploy(
                        argparse.Namespace(workspace=workspace, settings=settings), _grpc_args(loaded), settings.tls
                    )
                    _say_that_it_serves(server, settings, output)
                    asked_by = stops.get()
                    _log.info("stopping", extra={"asked_by": asked_by})
            finally:
                server.fl_shutdown()
    if asked_by == LOST:
        raise TenureLost(str(workspace))


def _with_absolute_runs(kit: Kit[ServerSettings]) -> ServerSettings:
    """Return the settings of *kit*, whose folder for runs is relative to it and not to wherever this process runs."""
    runs = kit.settings.runs_folder
    return msgspec.structs.replace(kit.settings, runs=str(kit.resolve(runs).absolute())) if runs else kit.settings


def _overseer(settings: ServerSettings, workspace: Path, store: Store) -> OverseerAgent:
    return LeaseOverseer(
        store,
        holder=holder_of(workspace, settings.name),
        name=settings.name,
        target=settings.reached_at(settings.target),
        ttl_s=settings.lease_s,
    )


def _grpc_args(kit: Kit[ServerSettings]) -> dict[str, Any]:
    return {
        "service": {"target": kit.settings.target, "scheme": "grpc"},
        "ssl_root_cert": kit.folder / CA_FILE,
        "ssl_cert": kit.folder / CERTIFICATE_FILE,
        "ssl_private_key": kit.folder / KEY_FILE,
        "require_client_certificate": kit.settings.client_certificates,
        "servers_secret": kit.servers_secret,
    }


def _say_that_it_serves(server: FederatedServer, settings: ServerSettings, output: Output) -> None:
    cell = server.get_cell()
    target = settings.target if cell is None or cell.target is None else cell.target
    is_hot = server.service.state is ServiceState.HOT
    if output.is_json:
        output.line({"serving" if is_hot else "standby": target, "project": settings.project, "tls": settings.tls})
    else:
        doing = "serving" if is_hot else "standing by for"
        output.say(f"{doing} project {settings.project} at {target}{'' if settings.tls else ' WITHOUT TLS'}")
