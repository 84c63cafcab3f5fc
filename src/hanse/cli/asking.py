"""What the commands that ask a server have in common: an administrator's kit, and one session."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Final, TypeAlias, TypeVar

from cyclopts import Parameter

from hanse.admin.session import AdminSession
from hanse.cli.logs import show_logs
from hanse.cli.output import Output
from hanse.errors import ConfigError
from hanse.identity.kits import Kit
from hanse.settings import AdminSettings

PATIENCE_S: Final = 5.0
"""How long a command waits for a server that does not answer; somebody sits before it. Of several, one may hang."""

T = TypeVar("T")

KitFolder: TypeAlias = Annotated[
    Path | None,
    Parameter(name="--kit", env_var="HANSE_KIT", help="The folder of an administrator's kit."),
]


def ask(
    kit: Path | None,
    work: Callable[[AdminSession], Awaitable[T]],
    output: Output,
    *,
    on_waiting: Callable[[str], None] | None = None,
) -> T:
    """Return what *work* returns, given a session of the administrator whose kit is in the folder *kit*.

    *on_waiting* hears what is waited for while the server is away.

    Raises:
        ConfigError: no kit is named, or it does not hold together.
        HanseError: the server cannot be reached, or refuses.
    """
    show_logs(logging.WARNING, as_json=output.is_json, verbose=output.verbose)
    if kit is None:
        raise ConfigError("--kit", got=None, expected="the folder of an administrator's kit (or set HANSE_KIT)")
    loaded = Kit.load(kit, AdminSettings)

    servers = len(loaded.settings.servers)
    patience_s = PATIENCE_S if servers == 1 else PATIENCE_S * (servers + 1)

    async def session() -> T:
        async with AdminSession(loaded, patience_s=patience_s, on_waiting=on_waiting) as asked:
            return await work(asked)

    return asyncio.run(session())
