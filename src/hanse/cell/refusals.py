"""How an error here becomes a return code there, and an error again: one table each way.

What travels is the return code, the public sentence and the error's stable code; never a traceback. The other side
raises the same class where the sentence alone makes it (``Unauthenticated``, ``NotInService``), else a ``RemoteError``
that tells what the class would have told: the code, and whether trying again may help.
"""

from collections.abc import Iterator, Mapping
from typing import Final

from hanse import errors
from hanse.errors import HanseError
from hanse.messages import Header, Message, ReturnCode, refusal

MAX_REASON_CHARS: Final = 2000
MAX_CODE_CHARS: Final = 64

RETURN_CODES: Final[Mapping[type[HanseError], ReturnCode]] = {
    errors.HanseError: ReturnCode.INTERNAL,
    errors.InternalError: ReturnCode.INTERNAL,
    errors.OperatorError: ReturnCode.INVALID_REQUEST,
    errors.ConfigError: ReturnCode.INVALID_REQUEST,
    errors.JobInvalid: ReturnCode.INVALID_REQUEST,
    errors.NotFound: ReturnCode.NOT_FOUND,
    errors.Conflict: ReturnCode.CONFLICT,
    errors.AccessError: ReturnCode.UNAUTHORIZED,
    errors.Unauthenticated: ReturnCode.UNAUTHENTICATED,
    errors.CertificateExpired: ReturnCode.UNAUTHENTICATED,
    errors.Unauthorized: ReturnCode.UNAUTHORIZED,
    errors.NotInService: ReturnCode.COMM_ERROR,
    errors.SiteError: ReturnCode.REFUSED,
    errors.SiteRefused: ReturnCode.REFUSED,
    errors.TrainingFailed: ReturnCode.REFUSED,
    errors.ImportFailed: ReturnCode.REFUSED,
    errors.MissingDependency: ReturnCode.REFUSED,
    errors.ProcessDied: ReturnCode.REFUSED,
    errors.OutOfMemory: ReturnCode.REFUSED,
    errors.ProcessHung: ReturnCode.REFUSED,
    errors.UpdateRejected: ReturnCode.REFUSED,
    errors.WorkflowError: ReturnCode.ABORT_RUN,
    errors.WorkflowFailed: ReturnCode.ABORT_RUN,
    errors.TooFewClients: ReturnCode.ABORT_RUN,
    errors.EnvironmentFault: ReturnCode.COMM_ERROR,
    errors.Unreachable: ReturnCode.COMM_ERROR,
    errors.TimedOut: ReturnCode.TIMED_OUT,
    errors.ProtocolError: ReturnCode.INVALID_REQUEST,
    errors.VersionMismatch: ReturnCode.INVALID_REQUEST,
    errors.StoreFailed: ReturnCode.INTERNAL,
    errors.NoSpace: ReturnCode.INTERNAL,
    errors.TensorDamaged: ReturnCode.INTERNAL,
    errors.NotStarted: ReturnCode.INTERNAL,
    errors.TensorsLost: ReturnCode.ABORT_RUN,
    errors.StaleEpoch: ReturnCode.COMM_ERROR,
}
"""Each class's return code; a class that is not here (one of another module) has that of the nearest above it."""


class RemoteError(HanseError):
    """A peer answered that it would not or could not; the sentence is the peer's.

    ``error_code`` is the ``code`` of the class that was raised there, empty when the peer did not say.
    """

    code = "remote"

    def __init__(self, why: str, *, return_code: ReturnCode, error_code: str = "") -> None:
        super().__init__(why)
        self.return_code, self.error_code = return_code, error_code


class RemoteFault(RemoteError):
    """A peer could not, this time: what was raised there says that trying again may help."""

    code = "remote-fault"
    retryable = True


def shortened(text: str, most: int = MAX_REASON_CHARS) -> str:
    """Return *text*, or its beginning and three dots where it has more than *most* characters.

    What is no Unicode, as a name of a file may be, does not travel, and is shown as ``?``.
    """
    text = text.encode(errors="replace").decode()
    return text if len(text) <= most else f"{text[: most - 3]}..."


def return_code(error: HanseError) -> ReturnCode:
    """Return the code that a reply about *error* carries."""
    if isinstance(error, RemoteError):
        return error.return_code
    return next(RETURN_CODES[kind] for kind in type(error).__mro__ if kind in RETURN_CODES)


def refuse(error: HanseError) -> Message:
    """Return the reply that tells a peer of *error*."""
    code = error.error_code if isinstance(error, RemoteError) else error.code
    return refusal(return_code(error), shortened(error.reason), error_code=code)


def error_from(headers: Mapping[str, str]) -> HanseError:
    """Return the error that a reply or farewell with these *headers* tells of."""
    try:
        code = ReturnCode(headers.get(Header.RETURN_CODE, ReturnCode.COMM_ERROR))
    except ValueError:  # a newer peer's code
        code = ReturnCode.INTERNAL
    if code is ReturnCode.OK:  # which is no error, and no call can end with one for it
        code = ReturnCode.INTERNAL
    # A peer may say what it likes, and its sentence becomes part of others.
    reason = headers.get(Header.REASON, "")[:MAX_REASON_CHARS] or f"the peer gave no reason ({code.value})"
    error_code = _code(headers.get(Header.ERROR_CODE, ""))
    if code is ReturnCode.UNAUTHENTICATED:
        is_expired = error_code == errors.CertificateExpired.code
        return errors.CertificateExpired.told(reason) if is_expired else errors.Unauthenticated(reason)
    if error_code == errors.NotInService.code:
        return errors.NotInService(reason)
    kind = RemoteFault if error_code in _RETRYABLE else RemoteError
    return kind(reason, return_code=code, error_code=error_code)


def _code(said: str) -> str:
    """Return *said*, or nothing where it cannot be a code: one that is told of by a call's status is plain ASCII."""
    return said if len(said) <= MAX_CODE_CHARS and said.isascii() and said.isprintable() else ""


def _tree(kind: type[HanseError]) -> Iterator[type[HanseError]]:
    yield kind
    for below in kind.__subclasses__():
        yield from _tree(below)


_RETRYABLE: Final = frozenset(kind.code for kind in _tree(HanseError) if kind.retryable)
