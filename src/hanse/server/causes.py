"""Why a job ended, of the error that ended it."""

import re

from hanse.cell.cell import RemoteError
from hanse.errors import HanseError, InternalError
from hanse.ids import ClientName


def code_of(error: HanseError) -> str:
    """Return the stable code of *error*: of one that a peer answered with, the code of what was raised there."""
    return (error.error_code if isinstance(error, RemoteError) else "") or error.code


def cause_of(error: Exception, *, doing: str) -> HanseError:
    """Return the error to end a job with whose task failed with *error* while *doing* something."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error if isinstance(error, HanseError) else InternalError(doing)


def said_of(client: ClientName, reason: str) -> str:
    """Return *reason* with *client*, the one that it is about, named in it."""
    is_named = re.search(rf"(?<![\w-]){re.escape(client)}(?![\w-])", reason) is not None
    return reason if is_named else f"{reason} (at {client})"
