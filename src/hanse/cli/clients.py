"""``hanse client list``, ``disable``, ``enable``: what administrators ask about clients, each one request or two."""

from typing import Annotated, TypeAlias

from cyclopts import Parameter

from hanse.admin.session import AdminSession
from hanse.cli.asking import KitFolder, ask
from hanse.cli.output import TEXT, Output, duration_text
from hanse.messages import ClientList

ClientArgument: TypeAlias = Annotated[str, Parameter(help="The client's name; it need not be registered.")]


def list_clients(*, kit: KitFolder = None, output: Output = TEXT) -> None:
    """List the clients that are registered, those that are disabled, and who was refused lately, and why."""

    async def work(session: AdminSession) -> ClientList:
        return ClientList(await session.clients(), await session.disabled_clients(), await session.refused_clients())

    found = ask(kit, work, output)
    if output.is_json:
        output.document(found)
        return
    rows = [
        (client.name, client.state, f"{duration_text(client.last_heard_s)} ago", ", ".join(client.jobs))
        for client in found.clients
    ]
    rows += [(name, "disabled", "-", reason) for name, reason in sorted(found.disabled.items())]
    rows += [
        (each.name, "refused", f"{duration_text(each.ago_s)} ago", f"{each.reason} [{each.code}]")
        for each in found.refused
    ]
    output.table(("client", "state", "heard of", "jobs, or why"), rows, nothing="no clients")


def disable(client: ClientArgument, /, *, kit: KitFolder = None, output: Output = TEXT) -> None:
    """Refuse a client from now on, whatever certificate or token it holds; its part in running jobs ends."""
    ask(kit, lambda session: session.disable(client), output)
    _tell(client, output, is_disabled=True)


def enable(client: ClientArgument, /, *, kit: KitFolder = None, output: Output = TEXT) -> None:
    """Refuse a client no longer."""
    ask(kit, lambda session: session.enable(client), output)
    _tell(client, output, is_disabled=False)


def _tell(client: str, output: Output, *, is_disabled: bool) -> None:
    if output.is_json:
        output.document({"client": client, "disabled": is_disabled})
    else:
        output.say(f"client {client} is {'refused from now on' if is_disabled else 'refused no longer'}")
