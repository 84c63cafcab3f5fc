"""How a store of an earlier release becomes one of this release: Alembic's steps, one file each in ``versions``.

``migrate`` takes the steps in the caller's transaction, so that a store is of one release or of the next and never in
between. The tenure of whoever holds the lease is over then: a server of an earlier release, which may still be running,
writes nothing more. A step is written once and never changed: it says in its own words what the tables became, and does
not import ``tables``, which says what they are now. Alembic is imported with this package, and this package only when
there is a step to take.
"""

import logging
import threading
from typing import Final

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text

from hanse.errors import StoreFailed
from hanse.storage.tables import FIRST_RELEASE

_log = logging.getLogger(__name__)

_END_TENURE: Final = text("""
    UPDATE lease SET epoch = epoch + 1, holder = '', beat = 0, name = '', target = '', successor = '' WHERE holder <> ''
""")

_one_at_a_time = threading.Lock()
"""Alembic tells a step its connection through module variables."""


def migrate(connection: Connection, *, version: str, name: str) -> None:
    """Bring a store of *version* (nothing: a new one), which errors call *name*, to this release's.

    Raises:
        StoreFailed: a later release of Hanse has written to it.
    """
    # Named by the package, for a folder's name could hold what a configuration file's text must not.
    config = Config()
    config.set_main_option("script_location", "hanse.storage:migrations")
    config.attributes["connection"] = connection
    known = [step.revision for step in ScriptDirectory.from_config(config).walk_revisions()]
    if version and version not in known:
        why = (
            f"a later release of Hanse made its schema {version}, and this one knows schemas up to {known[0]}; "
            "use that release, or put back the copy of the store from before it was upgraded"
        )
        raise StoreFailed(f"opening {name}", why)
    with _one_at_a_time:
        if version == FIRST_RELEASE:
            command.stamp(config, FIRST_RELEASE)  # that release did without Alembic
        command.upgrade(config, "head")
    if version:
        connection.execute(_END_TENURE)
        _log.info("the store was migrated", extra={"store": name, "was": version, "is": known[0]})
