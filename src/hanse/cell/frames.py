"""Frames: what travels on a link, and the only place where bytes become messages and messages bytes.

A frame is an envelope (who to whom, about what) and a payload that stays bytes until the cell that it is for decodes it
by ``hanse.messages.CATALOGUE``; so a frame can be passed on by one that does not know its type. Both halves are checked
here, on the way out as on the way in, and whatever is not as agreed is a ``ProtocolError`` that names the field.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final, TypeVar

import msgspec
from google.protobuf.message import DecodeError

from hanse.cell import wire_pb2
from hanse.errors import HanseError, ProtocolError
from hanse.ids import Fqcn, is_job_id, is_name
from hanse.messages import CATALOGUE, Hello, Payload, Topic, Welcome

MAX_PAYLOAD_BYTES: Final = 4 * 1024 * 1024
MAX_HEADERS: Final = 32
MAX_HEADERS_BYTES: Final = 16 * 1024
MAX_NAME_CHARS: Final = 128
MAX_FRAME_BYTES: Final = MAX_PAYLOAD_BYTES + MAX_HEADERS_BYTES + 16 * 1024
"""No frame is larger: payload, headers, and what the envelope and protobuf's own framing can add."""

S = TypeVar("S", bound=msgspec.Struct)


class FrameKind(IntEnum):
    """What a frame is for; the numbers are the wire's."""

    HELLO = 1
    WELCOME = 2
    REQUEST = 3
    REPLY = 4
    EVENT = 5
    BYE = 6


_NOBODY: Final = Fqcn("")
_TEXT: Final = "text in Unicode"
_KINDS: Final[Mapping[int, FrameKind]] = {kind.value: kind for kind in FrameKind}


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame; a reply has the id of its request, and only requests' ids mean anything."""

    kind: FrameKind
    id: int = 0
    origin: Fqcn = _NOBODY
    destination: Fqcn = _NOBODY
    channel: str = ""
    topic: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    payload: bytes = b""


def is_fqcn(text: str) -> bool:
    """Return whether *text* is a cell's address: a participant's name, or that, a dot and a job's id."""
    name, dot, job_id = text.partition(".")
    return is_name(name) and (not dot or is_job_id(job_id))


def encode(frame: Frame) -> bytes:
    """Return the bytes of *frame*.

    Raises:
        ProtocolError: a field is beyond its limit, or no text in Unicode.
    """
    try:
        _check(frame)
        return wire_pb2.Frame(
            id=frame.id,
            kind=frame.kind.value,  # type: ignore[arg-type]  # the enum's members are plain numbers at run time
            origin=frame.origin,
            destination=frame.destination,
            channel=frame.channel,
            topic=frame.topic,
            headers=frame.headers,
            payload=frame.payload,
        ).SerializeToString()
    except UnicodeEncodeError as error:
        raise ProtocolError("frame", got=error.object, expected=_TEXT) from error


def decode(data: bytes) -> Frame:
    """Return the frame that *data* holds.

    Raises:
        ProtocolError: *data* is not a frame, or a field is beyond its limit.
    """
    try:
        wire = wire_pb2.Frame.FromString(data)
    except DecodeError as error:
        raise ProtocolError("frame", got=data[:32], expected="a hanse.v1.Frame in protobuf") from error
    kind = _KINDS.get(wire.kind)
    if kind is None:
        raise ProtocolError("frame.kind", got=int(wire.kind), expected=f"one of {', '.join(k.name for k in FrameKind)}")
    frame = Frame(
        kind,
        wire.id,
        Fqcn(wire.origin),
        Fqcn(wire.destination),
        wire.channel,
        wire.topic,
        dict(wire.headers),
        wire.payload,
    )
    _check(frame)
    return frame


def topic_of(channel: str, name: str) -> Topic | None:
    """Return the topic *name* on *channel*; ``None`` when the catalogue has none such."""
    return _TOPICS.get((channel, name))


def encode_payload(topic: Topic, payload: Payload, *, reply: bool = False) -> bytes:
    """Return *payload* as the bytes of a request on *topic*, or of the reply to one.

    Raises:
        ProtocolError: *topic* is unknown, or *payload* is not of the type that the catalogue names for it, or has text
            that is not Unicode.
    """
    kind = _payload_type(topic, reply=reply)
    if type(payload) is not (kind or type(None)):
        raise ProtocolError(
            _shown(topic, reply=reply), got=type(payload).__name__, expected=kind.__name__ if kind else "no payload"
        )
    return b"" if payload is None else encode_struct(payload)


def decode_payload(topic: Topic, data: bytes, *, reply: bool = False) -> Payload:
    """Return the payload of a request on *topic*, or of the reply to one; ``None`` where the catalogue names none.

    Raises:
        ProtocolError: *topic* is unknown, or *data* is not what the catalogue names for it; the error names the field.
    """
    kind = _payload_type(topic, reply=reply)
    if kind is None:
        if data:
            raise ProtocolError(_shown(topic, reply=reply), got=data[:32], expected="no payload")
        return None
    return decode_struct(kind, data)


def encode_struct(value: msgspec.Struct) -> bytes:
    """Return *value* as msgpack.

    Raises:
        ProtocolError: it has text that is not Unicode, as a name of a file may be.
    """
    try:
        return _ENCODER.encode(value)
    except UnicodeEncodeError as error:
        raise ProtocolError(type(value).__name__, got=error.object, expected=_TEXT) from error


def decode_struct(kind: type[S], data: bytes) -> S:
    """Return the *kind* that *data* holds as msgpack.

    Raises:
        ProtocolError: it holds something else; the error names the field.
    """
    decoder = _DECODERS.get(kind)
    if decoder is None:
        raise TypeError(f"{kind.__name__} is no type of the catalogue")
    try:
        value = decoder.decode(data)
    except msgspec.ValidationError as error:
        what, _, path = str(error).partition(" - at `$")
        where = path.rstrip("`").lstrip(".")
        raise ProtocolError(f"{kind.__name__}.{where}" if where else kind.__name__, got="...", expected=what) from error
    except (msgspec.DecodeError, ValueError, OverflowError, RecursionError) as error:
        raise ProtocolError(kind.__name__, got=data[:32], expected=f"msgpack ({error})") from error
    except HanseError as error:
        # A type of the vocabulary checks its own invariants, and its sentence names the field.
        raise ProtocolError(kind.__name__, got="...", expected=error.reason) from error
    if not isinstance(value, kind):
        raise ProtocolError(kind.__name__, got=type(value).__name__, expected=kind.__name__)
    return value


_ENCODER: Final = msgspec.msgpack.Encoder()
_DECODERS: Final[Mapping[type[msgspec.Struct], msgspec.msgpack.Decoder[msgspec.Struct]]] = {
    kind: msgspec.msgpack.Decoder(kind)
    for kind in (Hello, Welcome, *(each for pair in CATALOGUE.values() for each in pair))
    if kind is not None
}


def _payload_type(topic: Topic, *, reply: bool) -> type[msgspec.Struct] | None:
    try:
        return CATALOGUE[topic][1 if reply else 0]
    except KeyError:
        raise ProtocolError("topic", got="/".join(topic), expected="a topic of the catalogue") from None


def _shown(topic: Topic, *, reply: bool) -> str:
    return f"payload of {'the reply to ' if reply else ''}{topic[0]}/{topic[1]}"


def _check(frame: Frame) -> None:
    """Refuse what is beyond a limit; the sentence shows sizes, not contents."""
    if not 0 <= frame.id < 2**64:
        raise ProtocolError("frame.id", got=frame.id, expected="0 to 2**64 - 1")
    for name in ("origin", "destination", "channel", "topic"):
        size = len(getattr(frame, name))
        if size > MAX_NAME_CHARS:
            raise ProtocolError(f"frame.{name}", got=f"{size} characters", expected=f"at most {MAX_NAME_CHARS}")
    if len(frame.headers) > MAX_HEADERS:
        raise ProtocolError("frame.headers", got=f"{len(frame.headers)} headers", expected=f"at most {MAX_HEADERS}")
    size = sum(len(key.encode()) + len(value.encode()) for key, value in frame.headers.items())
    if size > MAX_HEADERS_BYTES:
        raise ProtocolError("frame.headers", got=f"{size} bytes", expected=f"at most {MAX_HEADERS_BYTES}")
    if len(frame.payload) > MAX_PAYLOAD_BYTES:
        raise ProtocolError("frame.payload", got=f"{len(frame.payload)} bytes", expected=f"at most {MAX_PAYLOAD_BYTES}")


_TOPICS: Final[Mapping[tuple[str, str], Topic]] = {
    (channel.value, name): (channel, name) for channel, name in CATALOGUE
}
