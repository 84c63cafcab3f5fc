"""What pool and workers say to each other survives the way, and nothing else is taken for it."""

from contextlib import suppress
from socket import socketpair

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hanse.errors import ProtocolError
from hanse.ids import ClientName, Digest, JobId
from hanse.messages import ModelRef, TensorRef, UpdateRef
from hanse.simulator.exchange import (
    LENGTH,
    MAX_FRAME_BYTES,
    Broken,
    Channel,
    Done,
    Faulty,
    Invalid,
    Load,
    Loaded,
    Logged,
    Missing,
    Raised,
    Said,
    Unimportable,
    Work,
    check_length,
    decode_said,
    encode,
)

REFERENCE = ModelRef((TensorRef("w", "float32", (2,), Digest("0" * 64), b"12345678"),), {"made": "here"})
SAID: list[Said] = [
    Loaded(1),
    Done(2, UpdateRef(REFERENCE, 5, {"loss": 0.5})),
    Done(2, UpdateRef(None, 5)),
    Raised(3, "ValueError: no"),
    Invalid(4, "an app"),
    Unimportable(3, "SyntaxError: no (app.py:1)", "3.11.0"),
    Missing(3, "torch", "app.py:1"),
    Broken(Raised(0, "it ended")),
    Faulty(5, "disk full"),
    Logged(6, 7, {"loss": 1.5}),
]
WORK = Work(
    9, "/code", "client:app", "/tensors", REFERENCE, ClientName("site-1"), JobId("job"), 3, "train",
    {"rate": 0.5, "flag": True, "count": 3, "name": "x"}, {"partition": 0}, 2**63 - 1,
)  # fmt: skip


@pytest.mark.parametrize("said", SAID, ids=lambda said: type(said).__name__)
def test_answers_survive_the_way(said: Said) -> None:
    frame = encode(said)
    assert LENGTH.unpack(frame[: LENGTH.size])[0] == len(frame) - LENGTH.size
    assert decode_said(frame[LENGTH.size :]) == said


def test_channel_carries_requests_and_answers_until_the_pool_closes_it() -> None:
    ours, theirs = socketpair()
    channel = Channel(theirs)
    with ours, theirs:
        requests = [WORK, Load(10, "/code", "client:app", ClientName("site-2"))]
        ours.sendall(b"".join(map(encode, requests)))
        assert [channel.read(), channel.read()] == requests
        channel.write(Loaded(10))
        assert ours.recv(1000) == encode(Loaded(10))
        ours.sendall(encode(WORK)[:-1])
        ours.close()
        assert channel.read() is None
        with pytest.raises(OSError, match="Broken pipe"):
            channel.write(Loaded(10))


@given(st.binary(max_size=100))
def test_other_bytes_are_refused_if_they_are_no_answer(data: bytes) -> None:
    with suppress(ProtocolError):
        decode_said(data)


def test_answer_with_an_unknown_tag_is_refused() -> None:
    with pytest.raises(ProtocolError):
        decode_said(msgspec.msgpack.encode({"type": "Work", "number": 1}))


def test_frames_are_limited() -> None:
    check_length(MAX_FRAME_BYTES)
    with pytest.raises(ProtocolError):
        check_length(MAX_FRAME_BYTES + 1)
