from collections.abc import Iterator
from datetime import UTC, datetime

import grpc
import grpc.aio
import pytest

from hanse import errors
from hanse.cell.refusals import MAX_REASON_CHARS, RETURN_CODES, RemoteError, RemoteFault, error_from, refuse
from hanse.cell.rpc import STATUS, error_of, status_of
from hanse.errors import HanseError
from hanse.messages import Header, ReturnCode
from hanse.model import TensorMismatch


def classes(kind: type[HanseError] = HanseError) -> Iterator[type[HanseError]]:
    yield kind
    for below in kind.__subclasses__():
        yield from classes(below)


def test_every_class_of_the_tree_has_a_return_code() -> None:
    assert set(RETURN_CODES) == {kind for kind in classes() if kind.__module__ == errors.__name__}


def test_every_return_code_has_a_grpc_status() -> None:
    assert set(STATUS) == set(ReturnCode)


def test_no_error_is_told_as_ok() -> None:
    assert ReturnCode.OK not in RETURN_CODES.values()


def test_a_class_of_another_module_has_the_code_of_the_nearest_above_it() -> None:
    assert refuse(TensorMismatch("no tensor 'w'")).return_code is ReturnCode.INVALID_REQUEST


@pytest.mark.parametrize(
    ("error", "kind", "retryable"),
    [
        (errors.Unauthenticated("who are you"), errors.Unauthenticated, False),
        (errors.CertificateExpired("site-1", since=datetime.now(UTC)), errors.CertificateExpired, False),
        (errors.NotInService(), errors.NotInService, True),
        (errors.NotFound("job", "j"), RemoteError, False),
        (errors.StoreFailed("committing", "disk full"), RemoteFault, True),
        (errors.Unreachable("site-1", "no link"), RemoteFault, True),
        (errors.ProtocolError("x", got=1, expected="2"), RemoteError, False),
    ],
)
def test_an_error_arrives_with_its_sentence_code_and_whether_to_try_again(
    error: HanseError, kind: type[HanseError], retryable: bool
) -> None:
    arrived = error_from(refuse(error).headers)
    assert type(arrived) is kind
    assert arrived.reason == error.reason
    assert arrived.retryable is retryable
    if isinstance(arrived, RemoteError):
        assert (arrived.return_code, arrived.error_code) == (refuse(error).return_code, error.code)


def test_a_remote_error_is_passed_on_as_what_it_was() -> None:
    first = error_from(refuse(errors.StoreFailed("committing", "disk full")).headers)
    again = error_from(refuse(first).headers)
    assert (again.reason, again.retryable) == (first.reason, True)
    assert refuse(first).return_code is ReturnCode.INTERNAL


def test_a_refusal_without_code_or_reason_still_is_an_error_with_a_sentence() -> None:
    assert error_from({}).reason
    assert isinstance(error_from({Header.RETURN_CODE: "from-the-future"}), RemoteError)
    ok = error_from({Header.RETURN_CODE: ReturnCode.OK})
    assert refuse(ok).return_code is ReturnCode.INTERNAL


@pytest.mark.parametrize("said", ["caf\u00e9", "a\nb", "\0", "x" * 65])
def test_what_cannot_be_a_code_is_none(said: str) -> None:
    told = error_from({Header.RETURN_CODE: ReturnCode.CONFLICT, Header.REASON: "no", Header.ERROR_CODE: said})
    assert isinstance(told, RemoteError)
    assert (told.reason, told.return_code, told.error_code) == ("no", ReturnCode.CONFLICT, "")


def test_a_very_long_sentence_is_cut() -> None:
    assert len(refuse(errors.Unauthenticated("x" * 10_000)).reason) == MAX_REASON_CHARS


def test_what_is_no_text_in_a_sentence_keeps_it_from_nobody() -> None:
    assert refuse(errors.Unauthenticated("no such file: caf\udce9")).reason == "no such file: caf?"


def failed_call(
    code: grpc.StatusCode, details: str, trailing: tuple[tuple[str, str], ...] = ()
) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailing), details)


@pytest.mark.parametrize("kind", sorted(RETURN_CODES, key=lambda kind: kind.__name__))
def test_a_calls_status_tells_the_same_as_a_reply(kind: type[HanseError]) -> None:
    error = kind.__new__(kind)
    Exception.__init__(error, "what happened – in words")
    code, details, trailing = status_of(error)
    arrived = error_of(failed_call(code, details, trailing), "host:1")
    expected = error_from(refuse(error).headers)
    assert type(arrived) is type(expected)
    assert arrived.reason == expected.reason == "what happened – in words"


@pytest.mark.parametrize(
    ("code", "details", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, "connection refused", errors.Unreachable),
        (grpc.StatusCode.UNAVAILABLE, "Ssl handshake failed: CERTIFICATE_VERIFY_FAILED", errors.Unauthenticated),
        (grpc.StatusCode.UNAVAILABLE, "Hostname Verification Check failed.", errors.Unauthenticated),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "Received message larger than max", errors.ProtocolError),
        (grpc.StatusCode.INTERNAL, "", errors.Unreachable),
    ],
)
def test_what_grpc_itself_reports_becomes_an_error_of_ours(
    code: grpc.StatusCode, details: str, kind: type[HanseError]
) -> None:
    assert type(error_of(failed_call(code, details), "host:1")) is kind
