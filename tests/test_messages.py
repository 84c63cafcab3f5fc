"""The catalogue of messages: every type survives the wire, and neighbouring releases understand each other."""

from types import NoneType, UnionType
from typing import Union, get_args, get_origin

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hanse.ids import ClientName, Digest
from hanse.job import JobSpec, Resources, WorkflowSpec
from hanse.messages import (
    CATALOGUE,
    ITEM_BYTES,
    Channel,
    Header,
    Message,
    ModelRef,
    Quit,
    ReturnCode,
    TaskKey,
    TensorRef,
    ok,
    refusal,
)
from hanse.model import dtype_named

TYPES = sorted({each for pair in CATALOGUE.values() for each in pair if each is not None}, key=lambda t: t.__name__)

SCALARS: dict[object, st.SearchStrategy[object]] = {
    NoneType: st.none(),
    bool: st.booleans(),
    int: st.integers(-(2**63), 2**63 - 1),
    float: st.floats(allow_nan=False),
    str: st.text(max_size=8),
    bytes: st.binary(max_size=8),
    object: st.one_of(st.booleans(), st.integers(0, 9), st.text(max_size=3), st.lists(st.integers(0, 9), max_size=2)),
}
TENSORS = st.builds(
    TensorRef,
    name=st.text(max_size=8),
    dtype=st.sampled_from(sorted(ITEM_BYTES)),
    shape=st.lists(st.integers(0, 2**40), max_size=3).map(tuple),
    digest=st.text(max_size=8).map(Digest),
    inline=st.none() | st.binary(max_size=8),
)
SPECS = st.builds(
    JobSpec,
    name=st.sampled_from(["digits", "j-1"]),
    workflow=st.builds(WorkflowSpec, st.text(max_size=3), st.dictionaries(st.text(max_size=3), SCALARS[object])),
    client=st.sampled_from(["job:app", "train.py"]),
    model=st.just("job:model"),
    min_clients=st.integers(1, 9),
    seed=st.integers(0, 9),
)


def values_of(kind: object) -> st.SearchStrategy[object]:
    """Return a strategy for values of *kind* as they come out of msgpack, so that equality means equality."""
    if kind is Resources:
        return st.builds(Resources, cpus=st.floats(0, 1e6), memory_mb=st.integers(0, 2**40), gpus=st.integers(0, 99))
    if kind is TensorRef:
        return TENSORS
    if kind is JobSpec:
        return SPECS
    if kind in SCALARS:
        return SCALARS[kind]
    if hasattr(kind, "__supertype__"):
        return values_of(kind.__supertype__)
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return st.builds(kind, **{f.name: values_of(f.type) for f in msgspec.structs.fields(kind)})
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return st.one_of([values_of(each) for each in arguments])
    if origin is tuple:
        return st.lists(values_of(arguments[0]), max_size=2).map(tuple)
    if origin is dict:
        return st.dictionaries(values_of(arguments[0]), values_of(arguments[1]), max_size=2)
    raise AssertionError(f"a message has a field of type {kind}, which this test does not know")


def through_the_wire(message: msgspec.Struct) -> msgspec.Struct:
    return msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=type(message))


@pytest.mark.parametrize("kind", TYPES)
def test_every_message_comes_out_of_the_wire_as_it_went_in(kind: type[msgspec.Struct]) -> None:
    @given(values_of(kind))
    @settings(max_examples=25)
    def round_trip(message: object) -> None:
        assert isinstance(message, msgspec.Struct)
        assert through_the_wire(message) == message

    round_trip()


@pytest.mark.parametrize("kind", TYPES)
def test_a_field_that_a_newer_release_added_is_ignored(kind: type[msgspec.Struct]) -> None:
    @given(values_of(kind))
    @settings(max_examples=10)
    def with_news(message: object) -> None:
        table = msgspec.msgpack.decode(msgspec.msgpack.encode(message))
        table["added_in_a_later_release"] = {"what": [1, 2, 3]}
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(table), type=kind) == message

    with_news()


@pytest.mark.parametrize("kind", TYPES)
def test_a_field_with_a_default_may_be_missing(kind: type[msgspec.Struct]) -> None:
    optional = {field.name for field in msgspec.structs.fields(kind) if not field.required}

    @given(values_of(kind))
    @settings(max_examples=10)
    def from_an_older_release(message: object) -> None:
        table = msgspec.msgpack.decode(msgspec.msgpack.encode(message))
        older = {name: value for name, value in table.items() if name not in optional}
        decoded = msgspec.msgpack.decode(msgspec.msgpack.encode(older), type=kind)
        for field in msgspec.structs.fields(kind):
            if field.required:
                assert getattr(decoded, field.name) == getattr(message, field.name)

    from_an_older_release()


@pytest.mark.parametrize("kind", [kind for kind in TYPES if any(f.required for f in msgspec.structs.fields(kind))])
def test_a_required_field_may_not_be_missing(kind: type[msgspec.Struct]) -> None:
    with pytest.raises(msgspec.ValidationError, match="missing required field"):
        msgspec.msgpack.decode(msgspec.msgpack.encode({}), type=kind)


@pytest.mark.parametrize("kind", TYPES)
def test_a_message_cannot_be_changed(kind: type[msgspec.Struct]) -> None:
    assert kind.__struct_config__.frozen
    assert kind.__doc__


@pytest.mark.parametrize("kind", TYPES)
@given(
    junk=st.one_of(
        st.binary(max_size=40), st.recursive(st.none() | st.integers(0, 9), st.lists).map(msgspec.msgpack.encode)
    )
)
@settings(max_examples=20)
def test_bytes_that_are_not_the_message_are_refused(kind: type[msgspec.Struct], junk: bytes) -> None:
    try:
        decoded = msgspec.msgpack.decode(junk, type=kind)
    except msgspec.DecodeError:
        return
    assert isinstance(decoded, kind)


def test_requests_are_grouped_by_channel_and_each_has_a_payload() -> None:
    assert {channel for channel, _ in CATALOGUE} == set(Channel)
    assert all(request is not None for request, _ in CATALOGUE.values())


def test_a_message_has_headers_and_a_payload() -> None:
    message = Message(payload=Quit("done"))
    message.set_header(Header.PROJECT, "demo")
    message.set_header(Header.PROJECT, "other")

    assert message.get_header(Header.PROJECT) == "other"
    assert message.get_header("nothing") is None
    assert message.get_header("nothing", "default") == "default"
    assert message.payload == Quit("done")


def test_two_messages_share_no_headers() -> None:
    Message().set_header("a", "b")

    assert Message().headers == {}


def test_a_reply_says_how_the_request_went() -> None:
    assert (ok().return_code, ok().reason, ok().payload) == (ReturnCode.OK, "", None)
    assert ok(Quit()).payload == Quit()
    assert Message().return_code is ReturnCode.OK


@pytest.mark.parametrize("code", [code for code in ReturnCode if code is not ReturnCode.OK])
def test_a_refusal_carries_code_and_reason(code: ReturnCode) -> None:
    reply = refusal(code, "because", error_code="conflict")

    assert (reply.return_code, reply.reason) == (code, "because")
    assert reply.get_header(Header.ERROR_CODE) == "conflict"
    assert refusal(code, "because").get_header(Header.ERROR_CODE) is None


def test_a_return_code_that_there_is_not_is_an_error() -> None:
    with pytest.raises(ValueError, match="great"):
        _ = Message({Header.RETURN_CODE: "great"}).return_code


@pytest.mark.parametrize("dtype", ITEM_BYTES)
@pytest.mark.parametrize("shape", [(), (0,), (7,), (2, 3, 4)])
def test_a_tensor_weighs_what_its_array_does(dtype: str, shape: tuple[int, ...]) -> None:
    reference = TensorRef("w", dtype, shape, Digest("0" * 64))

    assert reference.size_bytes == np.zeros(shape, dtype_named(dtype)).nbytes


def test_small_tensors_ride_along_as_bytes() -> None:
    model = ModelRef((TensorRef("w", "float32", (1,), Digest("0" * 64), b"\0\0\x80?"),), {"k": "v"})

    assert through_the_wire(model) == model


def test_a_tasks_key_can_be_looked_up() -> None:
    table = {TaskKey(1, "train", 0, ClientName("site-1")): "here"}

    assert table[TaskKey(1, "train", 0, ClientName("site-1"))] == "here"
    assert TaskKey(1, "train", 1, ClientName("site-1")) not in table
