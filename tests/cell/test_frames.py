import json
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hanse.cell import wire_pb2
from hanse.cell.frames import (
    MAX_HEADERS,
    MAX_HEADERS_BYTES,
    MAX_NAME_CHARS,
    MAX_PAYLOAD_BYTES,
    Frame,
    FrameKind,
    decode,
    decode_payload,
    decode_struct,
    encode,
    encode_payload,
    encode_struct,
    is_fqcn,
    topic_of,
)
from hanse.errors import ProtocolError
from hanse.ids import ClientName, Digest, Fqcn, JobId, Ssid, Token
from hanse.messages import (
    CATALOGUE,
    Channel,
    Credentials,
    Heartbeat,
    HeartbeatReply,
    Hello,
    ModelRef,
    Quit,
    TaskAssignment,
    TaskKey,
    TensorRef,
    Welcome,
)

VECTORS = json.loads((Path(__file__).parent / "frames.json").read_text())

short_text = st.text(max_size=40)
frames = st.builds(
    Frame,
    kind=st.sampled_from(FrameKind),
    id=st.integers(0, 2**64 - 1),
    origin=short_text.map(Fqcn),
    destination=short_text.map(Fqcn),
    channel=short_text,
    topic=short_text,
    headers=st.dictionaries(short_text, short_text, max_size=8),
    payload=st.binary(max_size=200),
)


@given(frames)
def test_a_frame_survives_the_wire(frame: Frame) -> None:
    assert decode(encode(frame)) == frame


@given(st.binary(max_size=300))
def test_any_bytes_are_a_frame_or_a_protocol_error(data: bytes) -> None:
    with suppress(ProtocolError):
        decode(data)


@given(st.sampled_from(sorted(CATALOGUE)), st.booleans(), st.binary(max_size=300))
def test_any_bytes_are_a_payload_or_a_protocol_error(topic: tuple[Channel, str], reply: bool, data: bytes) -> None:
    with suppress(ProtocolError):
        decode_payload(topic, data, reply=reply)


def test_nesting_without_end_is_a_protocol_error() -> None:
    with pytest.raises(ProtocolError):
        decode_payload((Channel.RUN, "commit"), b"\x91" * 100_000)


def test_a_payload_survives_the_wire() -> None:
    tensor = TensorRef("w", "float32", (2, 3), Digest("ab" * 32), b"x" * 24)
    task = TaskAssignment(TaskKey(3, "train", 0, ClientName("site-1")), ModelRef((tensor,)), {"lr": 0.1, "n": 3})
    topic = (Channel.TASK, "task")
    assert decode_payload(topic, encode_payload(topic, task)) == task


@pytest.mark.parametrize("topic", sorted(CATALOGUE))
def test_what_the_catalogue_gives_no_payload_travels_as_no_bytes(topic: tuple[Channel, str]) -> None:
    for reply, kind in enumerate(CATALOGUE[topic]):
        if kind is None:
            assert encode_payload(topic, None, reply=bool(reply)) == b""
            assert decode_payload(topic, b"", reply=bool(reply)) is None
            with pytest.raises(ProtocolError, match="no payload"):
                decode_payload(topic, b"\xc0", reply=bool(reply))


def test_a_wrong_field_is_named() -> None:
    data = msgspec.msgpack.encode({"jobs": ["a", 7]})
    with pytest.raises(ProtocolError, match=r"Heartbeat\.jobs\[1\].*Expected `str`, got `int`"):
        decode_payload((Channel.SERVER, "heartbeat"), data)


def test_a_missing_field_is_named() -> None:
    with pytest.raises(ProtocolError, match="missing required field `reason`"):
        decode_payload((Channel.JOB, "goodbye"), msgspec.msgpack.encode({}))


def test_a_job_that_cannot_be_is_refused_with_its_own_sentence() -> None:
    spec = {"name": "../x", "workflow": {"name": "fedavg"}, "client": "a:b", "model": "a:b"}
    job = {"job_id": "j", "name": "n", "submitter": "s", "spec": spec, "package": "", "package_bytes": 0}
    with pytest.raises(ProtocolError, match="the job's name is"):
        decode_payload((Channel.JOB, "deploy"), msgspec.msgpack.encode(job))


def test_fields_of_a_newer_release_are_ignored() -> None:
    newer = msgspec.msgpack.encode({"jobs": ["j"], "mood": "good"})
    assert decode_payload((Channel.SERVER, "heartbeat"), newer) == Heartbeat((JobId("j"),))
    unknown_field = b"\xfa\x06\x03abc"  # field 111 of type bytes
    frame = Frame(FrameKind.EVENT, channel="server", topic="heartbeat")
    assert decode(encode(frame) + unknown_field) == frame


def test_a_payload_of_another_type_is_not_sent() -> None:
    with pytest.raises(ProtocolError, match="payload of server/heartbeat is 'Hello'; expected Heartbeat"):
        encode_payload((Channel.SERVER, "heartbeat"), Hello((1,), Fqcn("a"), "p"))
    with pytest.raises(ProtocolError, match="payload of the reply to server/heartbeat is 'NoneType'"):
        encode_payload((Channel.SERVER, "heartbeat"), None, reply=True)


def test_what_is_no_text_is_not_sent() -> None:
    with pytest.raises(ProtocolError, match="Quit"):
        encode_payload((Channel.SERVER, "quit"), Quit("caf\udce9"))
    for frame in (Frame(FrameKind.BYE, headers={"reason": "caf\udce9"}), Frame(FrameKind.EVENT, topic="caf\udce9")):
        with pytest.raises(ProtocolError, match="frame"):
            encode(frame)


def test_an_unknown_topic_has_no_payload() -> None:
    with pytest.raises(ProtocolError, match="server/nothing"):
        encode_payload((Channel.SERVER, "nothing"), None)
    assert topic_of("server", "nothing") is None
    assert topic_of("nowhere", "heartbeat") is None
    assert topic_of("server", "heartbeat") == (Channel.SERVER, "heartbeat")


def test_a_type_outside_the_catalogue_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(TypeError):
        decode_struct(TensorRef, b"")


@pytest.mark.parametrize(
    ("frame", "field"),
    [
        (Frame(FrameKind.EVENT, payload=bytes(MAX_PAYLOAD_BYTES + 1)), "frame.payload"),
        (Frame(FrameKind.EVENT, headers={str(n): "" for n in range(MAX_HEADERS + 1)}), "frame.headers"),
        (Frame(FrameKind.EVENT, headers={"x": "y" * MAX_HEADERS_BYTES}), "frame.headers"),
        (Frame(FrameKind.EVENT, topic="x" * (MAX_NAME_CHARS + 1)), "frame.topic"),
        (Frame(FrameKind.EVENT, origin=Fqcn("x" * (MAX_NAME_CHARS + 1))), "frame.origin"),
        (Frame(FrameKind.EVENT, id=2**64), "frame.id"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_beyond_a_limit_is_refused_by_name(frame: Frame, field: str) -> None:
    with pytest.raises(ProtocolError) as refused:
        encode(frame)
    assert refused.value.field == field
    assert len(str(refused.value)) < 500


def test_limits_hold_for_what_arrives_as_well() -> None:
    data = wire_pb2.Frame(kind=wire_pb2.EVENT, payload=bytes(MAX_PAYLOAD_BYTES + 1)).SerializeToString()
    with pytest.raises(ProtocolError, match=r"frame\.payload"):
        decode(data)


def test_a_payload_of_the_greatest_size_passes() -> None:
    frame = Frame(FrameKind.EVENT, payload=bytes(MAX_PAYLOAD_BYTES))
    assert decode(encode(frame)) == frame


@pytest.mark.parametrize("number", [0, 7, 99])
def test_a_kind_that_is_none_is_refused(number: int) -> None:
    data = wire_pb2.Frame(kind=number).SerializeToString()  # type: ignore[arg-type]  # the enum is open
    with pytest.raises(ProtocolError, match=r"frame\.kind"):
        decode(data)


def test_kinds_have_the_numbers_of_the_wire() -> None:
    assert {kind.name: kind.value for kind in FrameKind} == {
        name: number for name, number in wire_pb2.Kind.items() if number
    }


@pytest.mark.parametrize("name", sorted(VECTORS))
def test_bytes_of_earlier_releases_are_understood(name: str) -> None:
    frame, _ = golden()[name]
    assert decode(bytes.fromhex(VECTORS[name])) == frame


@pytest.mark.parametrize("name", sorted(VECTORS))
def test_payloads_of_earlier_releases_are_understood(name: str) -> None:
    frame, payload = golden()[name]
    match frame.kind:
        case FrameKind.HELLO | FrameKind.WELCOME:
            assert decode_struct(type(payload), frame.payload) == payload
        case FrameKind.REQUEST | FrameKind.REPLY | FrameKind.EVENT:
            topic = topic_of(frame.channel, frame.topic)
            assert topic is not None
            assert decode_payload(topic, frame.payload, reply=frame.kind is FrameKind.REPLY) == payload
        case _:
            assert frame.payload == b""


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("server", True),
        ("site-1", True),
        ("site-1.job-1", True),
        ("admin@demo.ab12", True),
        ("", False),
        (".", False),
        ("site-1.", False),
        (".job", False),
        ("site-1.a.b", False),
        ("../etc", False),
        ("site-1.JOB", False),
        ("site 1", False),
    ],
)
def test_an_address_is_a_name_or_a_name_and_a_job(text: str, holds: bool) -> None:
    assert is_fqcn(text) is holds


def golden() -> dict[str, tuple[Frame, msgspec.Struct | None]]:
    """What ``frames.json`` holds the bytes of; a new protocol version adds vectors and changes none."""
    hello = Hello((1,), Fqcn("site-1"), "demo", "0.1.0", Credentials("site-1", Token("t"), "s", Ssid("1")))
    welcome = Welcome(1, "server", Ssid("1"), "0.1.0", 4194304)
    heartbeat, reply = Heartbeat((JobId("j-1"),)), HeartbeatReply((JobId("j-2"),), Ssid("1"))
    tensor = TensorRef("w", "float32", (2, 3), Digest("ab" * 32), bytes(24))
    key = TaskKey(3, "train", 0, ClientName("site-1"))
    task = TaskAssignment(key, ModelRef((tensor,), {"step": "3"}), {"lr": 0.1})
    site, server, job = Fqcn("site-1"), Fqcn("server"), Fqcn("site-1.job-1")
    return {
        "hello": (Frame(FrameKind.HELLO, origin=site, payload=encode_struct(hello)), hello),
        "welcome": (Frame(FrameKind.WELCOME, origin=server, payload=encode_struct(welcome)), welcome),
        "request": (
            Frame(FrameKind.REQUEST, 5, site, server, "server", "heartbeat", {"ssid": "1"}, encode_struct(heartbeat)),
            heartbeat,
        ),
        "reply": (
            Frame(FrameKind.REPLY, 5, server, site, "server", "heartbeat", {"return_code": "ok"}, encode_struct(reply)),
            reply,
        ),
        "event": (
            Frame(FrameKind.EVENT, 0, server, job, "task", "task", {"ssid": "1"}, encode_struct(task)),
            task,
        ),
        "bye": (Frame(FrameKind.BYE, headers={"return_code": "comm_error", "reason": "gone"}), None),
    }
