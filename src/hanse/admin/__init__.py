"""Administration: what a server answers administrators, and the Python face by which they ask.

``AdminCommands`` is given to a server, ``AdminSession`` is used from anywhere else. Both know only what is said between
them; rules (who may do what, when a job may start) are in ``hanse.coordination``, and presentation is in ``hanse.cli``.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hanse.admin.commands import AdminCommands
    from hanse.admin.session import AdminSession, BlockingAdminSession

_HOME = {
    "AdminCommands": "hanse.admin.commands",
    "AdminSession": "hanse.admin.session",
    "BlockingAdminSession": "hanse.admin.session",
}

__all__ = ["AdminCommands", "AdminSession", "BlockingAdminSession"]


def __getattr__(name: str) -> object:
    """Load *name* from where it is defined (PEP 562): who asks a server must not load one."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value
