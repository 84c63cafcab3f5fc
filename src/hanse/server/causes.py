"""Why a job ended, of the error that ended it."""

from hanse.cell.cell import RemoteError
from hanse.errors import HanseError, InternalError


def code_of(error: HanseError) -> str:
    """Return the stable code of *error*: of one that a peer answered with, the code of what was raised there."""
    return (error.error_code if isinstance(error, RemoteError) else "") or error.code


def cause_of(error: Exception, *, doing: str) -> HanseError:
    """Return the error to end a job with whose task failed with *error* while *doing* something."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error if isinstance(error, HanseError) else InternalError(doing)
