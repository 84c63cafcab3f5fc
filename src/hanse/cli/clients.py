"""``hanse client list``, ``disable``, ``enable``: what administrators ask about clients, each one request or two."""

from typing import Annotated, TypeAlias

from cyclopts import Parameter

from hanse.cli.asking import KitFolder, ask
from hanse.cli.output import TEXT, Output, duration_text
from hanse.messages import RegisteredClient

ClientArgument: TypeAlias = Annotated[str, Parameter(help="The client's name; it need not be registered.")]


def list_clients(*, kit: KitFolder = None, output: Output = TEXT) -> None:
    """List the clients that are registered, and those that cannot be: disabled, refused lately, or out of date."""
    found = ask(kit, lambda session: session.client_list(), output)
    if output.is_json:
        output.document(found)
        return
    rows = [
        (client.name, client.state, f"{duration_text(client.last_heard_s)} ago", _jobs_and_remark(client))
        for client in found.clients
    ]
    rows += [(name, "disabled", "-", reason) for name, reason in sorted(found.disabled.items())]
    rows += [(name, "expired", "-", remark) for name, remark in sorted(found.expired.items())]
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


def _jobs_and_remark(client: RegisteredClient) -> str:
    return "; ".join(part for part in (", ".join(client.jobs), client.remark) if part)


def _tell(client: str, output: Output, *, is_disabled: bool) -> None:
    if output.is_json:
        output.document({"client": client, "disabled": is_disabled})
    else:
        output.say(f"client {client} is {'refused from now on' if is_disabled else 'refused no longer'}")
