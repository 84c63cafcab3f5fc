"""``hanse server status``."""

from hanse.admin.session import AdminSession
from hanse.cli.asking import KitFolder, ask
from hanse.cli.output import TEXT, Output, time_text


def status(*, kit: KitFolder = None, output: Output = TEXT) -> None:
    """Show how the server is that serves: its state, clients and running jobs, and which servers stand by."""
    found = ask(kit, AdminSession.status, output)
    if output.is_json:
        output.document(found)
        return
    output.say(
        f"project       {found.project}",
        f"server        {found.name}",
        f"state         {found.state}",
        f"since         {time_text(found.since)}",
        f"clients       {found.clients} registered",
        f"running jobs  {found.jobs_running}",
        f"release       {found.release}",
        *(
            f"standing by   {each.name} at {each.target} (said so at {time_text(each.seen_at)})"
            for each in found.standbys
        ),
        *((f"certificate   {found.remark}",) if found.remark else ()),
    )
