"""``hanse server stop`` and ``hanse client stop``; apart from ``start``, whose modules cost what a server costs."""

from pathlib import Path
from typing import Annotated, Final, TypeAlias

from cyclopts import Parameter

from hanse.admin.session import AdminSession
from hanse.cli.asking import KitFolder, ask
from hanse.cli.output import TEXT, Output
from hanse.cli.process_file import SERVER_FILE, stop, workspace_of
from hanse.client.workspace import CLIENT_FILE, end_orphans
from hanse.errors import ConfigError
from hanse.identity.kits import Kit
from hanse.settings import ClientSettings, ServerSettings

CLIENT_TIMEOUT_S: Final = 30.0
"""How long an agent may take to stop; it tells the server and ends its jobs' processes, each in a few seconds."""

ORPHAN_GRACE_S: Final = 5.0
"""How long a job's process that an agent has left behind may take to end once asked; it needs two seconds at most."""

BEYOND_SHUTDOWN_S: Final = 30.0
"""How much longer than it waits for its clients a server may take to stop."""

Force: TypeAlias = Annotated[bool, Parameter(negative=(), help="Kill the process if it does not end in time.")]


def server(
    kit: Annotated[Path | None, Parameter(help="The folder of the server's kit, on the server's machine.")] = None,
    /,
    *,
    admin_kit: KitFolder = None,
    force: Force = False,
    output: Output = TEXT,
) -> None:
    """Stop the server in order; running jobs stay resumable.

    On the server's machine, name the server's kit: this waits for its process to end. From elsewhere, name an
    administrator's with --kit: this returns when the server has agreed to stop.
    """
    if kit is not None:
        loaded = Kit.load(kit, ServerSettings)
        timeout_s = loaded.settings.shutdown_period_s + BEYOND_SHUTDOWN_S
        pid = stop(workspace_of(loaded) / SERVER_FILE, what="the server", timeout_s=timeout_s, force=force)
        _tell("server", pid, output)
    elif admin_kit is not None:
        ask(admin_kit, AdminSession.stop, output)
        if output.is_json:
            output.document({"server": "asked to stop", "process": None})
        else:
            output.say("the server has agreed to stop")
    else:
        raise ConfigError("KIT", got=None, expected="the server's kit, or an administrator's with --kit")


def client(
    kit: Annotated[Path, Parameter(help="The folder of the client's kit.")],
    /,
    *,
    force: Force = False,
    output: Output = TEXT,
) -> None:
    """Stop a site's agent; the processes of its jobs end with it, also those that a killed agent has left behind."""
    workspace = workspace_of(Kit.load(kit, ClientSettings))
    pid = stop(workspace / CLIENT_FILE, what="the client", timeout_s=CLIENT_TIMEOUT_S, force=force)
    orphans = end_orphans(workspace, grace_s=ORPHAN_GRACE_S) if workspace.is_dir() else []
    _tell("client", pid, output, left=orphans)
    if orphans and not output.is_json:
        output.say(f"the jobs' processes that it had left have ended: {', '.join(map(str, orphans))}")


def _tell(which: str, pid: int | None, output: Output, **more: object) -> None:
    what = "not running" if pid is None else "stopped"
    if output.is_json:
        output.document({which: what, "process": pid, **more})
    else:
        output.say(f"the {which} {'is' if pid is None else f'(process {pid}) has'} {what}")
