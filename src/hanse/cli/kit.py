"""``hanse kit request``, ``approve``, ``install``: certificates for keys that never leave their site."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from hanse.cli.output import TEXT, Output
from hanse.cli.provision import show
from hanse.identity import provision


def request(
    name: Annotated[str, Parameter(help="The participant, as project.toml calls it.")],
    /,
    *,
    organisation: Annotated[str, Parameter(help="Whose the participant is, as project.toml says.")],
    role: Annotated[str, Parameter(help="client, server, or admin:ROLE, as project.toml says.")] = "client",
    out: Annotated[Path | None, Parameter(help="The kit's folder; by default one called like the participant.")] = None,
    output: Output = TEXT,
) -> None:
    """Make a key here, which stays here, and request.pem beside it, which goes to the project's operator."""
    show([provision.request(name, organisation, role, out or Path(name))], output)


def approve(
    request: Annotated[Path, Parameter(help="The request.pem that came from the site.")],
    /,
    *,
    project: Annotated[Path, Parameter(help="The project.toml that lists the participant.")] = Path("project.toml"),
    authority: Annotated[Path, Parameter(help="The folder of the project's authority.")] = Path("kits/authority"),
    out: Annotated[Path, Parameter(help="Where the answer goes: a new .zip file, or a folder.")],
    output: Output = TEXT,
) -> None:
    """Answer a request, as the holder of the project's authority: everything of a kit but the key."""
    show([provision.approve(request, authority, project, out, now=datetime.now(UTC))], output)


def install(
    approved: Annotated[Path, Parameter(help="What came back from the project's operator.")],
    /,
    *,
    into: Annotated[Path, Parameter(help="The kit's folder, where the key is.")],
    output: Output = TEXT,
) -> None:
    """Put what was approved beside the key, and check the whole kit."""
    show([provision.install(approved, into)], output)
