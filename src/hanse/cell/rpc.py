"""What both ends of a gRPC call must agree on: paths, limits, TLS, who the caller says it is, and how errors travel.

A call's credentials are metadata, made from the caller's ``Hello`` and turned back into one, so that the same
``authorize`` decides about streams and calls. An error is a gRPC status plus the return code and error code in the
trailing metadata; one that gRPC itself reports (no connection, a failed handshake) becomes ``Unreachable``, or
``Unauthenticated`` where the handshake shows that trying again is useless.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import grpc
import grpc.aio

from hanse.cell.frames import MAX_FRAME_BYTES
from hanse.cell.refusals import error_from, refuse
from hanse.errors import HanseError, ProtocolError, Unauthenticated, Unreachable
from hanse.ids import Fqcn, Ssid, Token
from hanse.messages import PROTOCOL_VERSIONS, Credentials, Header, Hello, ReturnCode

SERVICE: Final = "hanse.v1.Wire"
CONNECT: Final = f"/{SERVICE}/Connect"
MISSING: Final = f"/{SERVICE}/Missing"
DOWNLOAD: Final = f"/{SERVICE}/Download"
UPLOAD: Final = f"/{SERVICE}/Upload"

CHUNK_BYTES: Final = 1024 * 1024
MAX_TENSOR_BYTES: Final = 2**38
MAX_SCOPE_CHARS: Final = 128
MAX_DIGESTS: Final = 20_000

KEEPALIVE_S: Final = 5.0
"""How long a connection may be silent before its other end is asked for a sign of life, and how long that may take."""

_OPTIONS: Final = (
    ("grpc.max_receive_message_length", MAX_FRAME_BYTES),
    ("grpc.max_send_message_length", MAX_FRAME_BYTES),
    ("grpc.keepalive_time_ms", int(KEEPALIVE_S * 1000)),
    ("grpc.keepalive_timeout_ms", int(KEEPALIVE_S * 1000)),
    ("grpc.http2.max_pings_without_data", 0),
)
CLIENT_OPTIONS: Final = (
    *_OPTIONS,
    # One connection a channel: nothing of its state, backoff included, is shared with another channel.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
    # Who calls waits by its own backoff; the channel's must not make that call fail without trying.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
)
CONTROL_OPTIONS: Final = (
    *CLIENT_OPTIONS,
    # gRPC waits a minute for the answer to a ping unless it is told otherwise. Not where tensors go: on a slow line an
    # answer comes behind the megabytes that are on their way, and there a stall is noticed by what no longer moves.
    ("grpc.http2.ping_timeout_ms", int(KEEPALIVE_S * 1000)),
)
"""The options of a connection for a stream: one that is dead without a word is given up after twice the keepalive."""
SERVER_OPTIONS: Final = (
    *_OPTIONS,
    # Two servers on one port would share the clients between them.
    ("grpc.so_reuseport", 0),
    ("grpc.max_concurrent_streams", 64),
    ("grpc.http2.min_ping_interval_without_data_ms", int(KEEPALIVE_S * 500)),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", int(KEEPALIVE_S * 500)),
)

STATUS: Final[Mapping[ReturnCode, grpc.StatusCode]] = {
    ReturnCode.OK: grpc.StatusCode.OK,
    ReturnCode.COMM_ERROR: grpc.StatusCode.UNAVAILABLE,
    ReturnCode.UNAUTHENTICATED: grpc.StatusCode.UNAUTHENTICATED,
    ReturnCode.UNAUTHORIZED: grpc.StatusCode.PERMISSION_DENIED,
    ReturnCode.INVALID_REQUEST: grpc.StatusCode.INVALID_ARGUMENT,
    ReturnCode.NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    ReturnCode.CONFLICT: grpc.StatusCode.FAILED_PRECONDITION,
    ReturnCode.REFUSED: grpc.StatusCode.FAILED_PRECONDITION,
    ReturnCode.ABORT_RUN: grpc.StatusCode.ABORTED,
    ReturnCode.TIMED_OUT: grpc.StatusCode.DEADLINE_EXCEEDED,
    ReturnCode.INTERNAL: grpc.StatusCode.INTERNAL,
}

_RETURN_CODE_KEY: Final = "hanse-return-code"
_ERROR_CODE_KEY: Final = "hanse-error-code"


@dataclass(frozen=True, slots=True)
class ServerTls:
    """The port's certificate and key, and whose client certificates it accepts, all PEM."""

    cert_pem: bytes
    key_pem: bytes
    roots_pem: bytes
    require_client_certificate: bool = True

    def credentials(self) -> grpc.ServerCredentials:
        """Return these as gRPC takes them."""
        return grpc.ssl_server_credentials(
            [(self.key_pem, self.cert_pem)],
            root_certificates=self.roots_pem,
            require_client_auth=self.require_client_certificate,
        )


@dataclass(frozen=True, slots=True)
class ClientTls:
    """Whose certificate the server must have, and this side's own (none behind a proxy), all PEM.

    ``server_name`` is the host name that the server's certificate must hold, where that is not the target's.
    """

    roots_pem: bytes
    cert_pem: bytes | None = None
    key_pem: bytes | None = None
    server_name: str | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """Return these as gRPC takes them."""
        return grpc.ssl_channel_credentials(self.roots_pem, self.key_pem, self.cert_pem)


def open_channel(
    target: str, tls: ClientTls | None, options: Sequence[tuple[str, int]] = CLIENT_OPTIONS
) -> grpc.aio.Channel:
    """Return a channel to *target* with a connection of its own; it connects when first used."""
    if tls is None or target.startswith("unix:"):
        return grpc.aio.insecure_channel(target, options=tuple(options))
    name = (("grpc.ssl_target_name_override", tls.server_name),) if tls.server_name else ()
    return grpc.aio.secure_channel(target, tls.credentials(), options=(*options, *name))


def metadata_of(hello: Hello) -> tuple[tuple[str, str], ...]:
    """Return the metadata by which a call proves what *hello* says."""
    said = [("hanse-project", hello.project), ("hanse-fqcn", hello.fqcn)]
    if hello.credentials is not None:
        said += [
            ("hanse-name", hello.credentials.name),
            ("hanse-token", hello.credentials.token),
            ("hanse-signature", hello.credentials.signature),
            ("hanse-ssid", hello.credentials.ssid),
        ]
    return tuple(said)


def hello_of(metadata: Iterable[tuple[str, str | bytes]]) -> Hello:
    """Return what a call's *metadata* says of the caller.

    Raises:
        Unauthenticated: it does not say who calls.
    """
    said = {key: value for key, value in metadata if isinstance(value, str)}
    if "hanse-fqcn" not in said:
        raise Unauthenticated("the call does not say which cell makes it")
    credentials = None
    if "hanse-token" in said:
        credentials = Credentials(
            said.get("hanse-name", ""),
            Token(said["hanse-token"]),
            said.get("hanse-signature", ""),
            Ssid(said.get("hanse-ssid", "")),
        )
    return Hello(PROTOCOL_VERSIONS, Fqcn(said["hanse-fqcn"]), said.get("hanse-project", ""), credentials=credentials)


def status_of(error: HanseError) -> tuple[grpc.StatusCode, str, tuple[tuple[str, str], ...]]:
    """Return the status, the sentence and the trailing metadata by which a call tells of *error*."""
    told = refuse(error)
    codes = (
        (_RETURN_CODE_KEY, told.return_code.value),
        (_ERROR_CODE_KEY, told.headers.get(Header.ERROR_CODE, "")),
    )
    return STATUS[told.return_code], told.reason, codes


def error_of(error: grpc.aio.AioRpcError, where: str) -> HanseError:
    """Return what a call to *where* that ended with *error* means."""
    details = error.details() or error.code().name
    told = {str(key): str(value) for key, value in error.trailing_metadata() or ()}
    if _RETURN_CODE_KEY in told:
        return error_from(
            {
                Header.RETURN_CODE: told[_RETURN_CODE_KEY],
                Header.ERROR_CODE: told.get(_ERROR_CODE_KEY, ""),
                Header.REASON: details,
            }
        )
    if "CERTIFICATE_VERIFY_FAILED" in details:
        return Unauthenticated(f"the certificate of the server at {where} {_distrust(details)}")
    if "Hostname Verification Check failed" in details:
        return Unauthenticated(
            f"the certificate of the server at {where} does not hold that host's name; dial it by one that it holds"
        )
    if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return ProtocolError("frame", got=details, expected=f"at most {MAX_FRAME_BYTES} bytes")
    if details.startswith("failed to connect"):
        # gRPC wraps the cause in two layers of its own words.
        details = details.rpartition(": ")[2]
    if details == "Socket closed":
        # What TLS 1.3 shows of a server that does not take the client's certificate; it may also just be going down.
        details = "it closed the connection, as one does that accepts no such certificate, or expects TLS and gets none"
    return Unreachable(where, details)


def _distrust(details: str) -> str:
    """Return what TLS found wrong with a server's certificate, and what to do; *details* are BoringSSL's words."""
    if "certificate has expired" in details:
        return "has expired; its operator has to ask the project for a new one, or this machine's clock is wrong"
    if "certificate is not yet valid" in details:
        return "is not valid yet; compare the clocks"
    return (
        "is not one that the project's CA issued; another project's server is there, or a proxy that ends TLS: "
        "'hanse doctor' with this kit tells which"
    )


def encode_chunk(data: bytes | memoryview) -> bytes:
    """Return *data* as ``Chunk`` (or as an ``UploadPart`` with nothing else): field 1, a length, the bytes.

    By hand, because the generated code copies the bytes twice more, and they are what a transfer spends its time on.
    """
    return b"".join((_FIELD_1, _varint(len(data)), data))


def decode_chunk(message: bytes) -> memoryview | None:
    """Return the bytes in *message*, uncopied; ``None`` when it holds anything but field 1 once."""
    if message[:1] != _FIELD_1:
        return None
    length, shift, at = 0, 0, 1
    while at < min(len(message), 6):
        length |= (message[at] & 0x7F) << shift
        shift += 7
        at += 1
        if message[at - 1] < 0x80:
            return memoryview(message)[at:] if len(message) == at + length else None
    return None


_FIELD_1: Final = b"\x0a"


def _varint(number: int) -> bytes:
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)
