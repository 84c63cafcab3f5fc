"""Print what the installed release writes: each message of the catalogue and each record of the store, as JSON.

With ``read`` as argument it does the reverse: it reads bytes as JSON (``{type: [hex, ...]}``) and prints what the
installed release makes of them. So it must run with every release that it is used with, and imports of theirs only what
all of them have.
"""

import json
import re
import sys
from enum import Enum
from importlib.metadata import version
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import msgspec

from hanse.cell import wire_pb2
from hanse.cell.frames import Frame, FrameKind, encode
from hanse.events import EventType
from hanse.ids import Fqcn
from hanse.job import JobRecord, JobSpec, JobState
from hanse.messages import (
    CATALOGUE,
    Channel,
    Header,
    Hello,
    ModelRef,
    ReturnCode,
    RoundView,
    StateRef,
    TaskAssignment,
    TaskResult,
    TensorRef,
    Welcome,
)

STREAM = (Hello, Welcome)
"""What opens a stream."""

STORED = (JobRecord, ModelRef, RoundView, StateRef, TaskAssignment, TaskResult)
"""What the database holds as bytes."""

DIGEST = "ab" * 32
MEANT: dict[tuple[type, str], object] = {
    (JobSpec, "name"): "digits",
    (JobSpec, "client"): "digits:app",
    (JobSpec, "model"): "digits:initial",
    (JobSpec, "min_clients"): 1,
    (JobSpec, "clients"): ("clients-1", "required_clients-1"),
    (TensorRef, "dtype"): "float32",
    (TensorRef, "shape"): (2, 3),
    (TensorRef, "digest"): DIGEST,
    (TensorRef, "inline"): bytes(range(24)),
}
"""Values of fields in which not anything will do."""


def types() -> dict[str, type[msgspec.Struct]]:
    """Return every type that has vectors, by name, with those that are parts of others."""
    found: dict[str, type[msgspec.Struct]] = {}
    waiting = [*STREAM, *STORED, *(kind for pair in CATALOGUE.values() for kind in pair if kind is not None)]
    while waiting:
        kind = waiting.pop()
        if kind.__name__ not in found:
            found[kind.__name__] = kind
            waiting += [part for field in msgspec.structs.fields(kind) for part in parts_of(field.type)]
    return dict(sorted(found.items()))


def parts_of(kind: Any) -> list[type[msgspec.Struct]]:
    """Return the messages that a field of type *kind* may hold."""
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return [kind]
    return [part for argument in get_args(kind) for part in parts_of(argument)]


def shape(kind: type[msgspec.Struct]) -> dict[str, str]:
    """Return the type of each field of *kind*, as text; one that has a default ends in `` = …``."""
    hints = get_type_hints(kind)
    fields = msgspec.structs.fields(kind)
    return {field.name: named(hints[field.name]) + ("" if field.required else " = …") for field in fields}


def named(kind: Any) -> str:
    """Return what travels for *kind*: names that stand for plain text are plain text."""
    if hasattr(kind, "__supertype__"):
        return named(kind.__supertype__)
    if kind is ...:
        return "..."
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " | ".join(sorted(named(each) for each in arguments))
    if origin is not None:
        return f"{origin.__name__}[{', '.join(named(each) for each in arguments)}]"
    if kind is NoneType:
        return "None"
    return str(kind.__name__)


def sample(kind: type[msgspec.Struct], *, only: frozenset[str] | None = None) -> Any:
    """Return a *kind* with something that is no default in each field, or in those that *only* names."""
    hints = get_type_hints(kind)
    values = {
        field.name: MEANT.get((kind, field.name), value_of(hints[field.name], field.name))
        for field in msgspec.structs.fields(kind)
        if only is None or field.name in only
    }
    return kind(**values)


def value_of(kind: Any, name: str) -> Any:
    """Return a value for a field *name* of type *kind*, the same each time."""
    if hasattr(kind, "__supertype__"):
        return value_of(kind.__supertype__, name)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return value_of(next(each for each in arguments if each is not NoneType), name)
    if origin is tuple:
        return (value_of(arguments[0], name),)
    if origin is dict:
        alternatives = get_args(arguments[1]) or arguments[1:]
        return {value_of(arguments[0], named(each)): value_of(each, name) for each in alternatives}
    if kind is object:
        return [name, {"nested": 1.5}]
    if issubclass(kind, msgspec.Struct):
        return sample(kind)
    if issubclass(kind, Enum):
        return list(kind)[-1]
    plain = {bool: True, int: len(name), float: len(name) + 0.5, str: f"{name}-1", bytes: name.encode()}
    return plain[kind]


def opposite(kind: type[msgspec.Struct]) -> Any:
    """Return a *kind* whose truths are untrue, whose options are none and whose lists and tables are empty."""
    hints = get_type_hints(kind)
    values = {field.name: getattr(sample(kind), field.name) for field in msgspec.structs.fields(kind)}
    for field in msgspec.structs.fields(kind):
        hint = hints[field.name]
        if hint is bool:
            values[field.name] = False
        elif NoneType in get_args(hint):
            values[field.name] = None
        elif get_origin(hint) in (tuple, dict):
            values[field.name] = get_origin(hint)()
    return kind(**values)


def plain(value: object) -> Any:
    """Return *value* as JSON has it: bytes in base 64, and no type of ours."""
    return json.loads(msgspec.json.encode(value))


def frames() -> dict[str, bytes]:
    """Return the bytes of a frame of each kind."""
    return {kind.name.lower(): encode(frame(kind)) for kind in FrameKind}


def frame(kind: FrameKind) -> Frame:
    """Return a frame of *kind* with something in each field; of headers one, because they have no order."""
    return Frame(kind, 7, Fqcn("site-1"), Fqcn("server"), "task", "result", {"ssid": "1"}, b"payload")


def words() -> dict[str, list[str]]:
    """Return the words that mean something in a message, and in the store."""
    enums = {kind.__name__: [each.value for each in kind] for kind in (Channel, EventType, JobState, ReturnCode)}
    return enums | {"Header": [value for name, value in vars(Header).items() if name.isupper()]}


def wire() -> dict[str, dict[str, str]]:
    """Return the wire's own messages: each field's number, with its name, kind and whether it repeats."""
    described = wire_pb2.DESCRIPTOR.message_types_by_name
    return {
        name: {
            str(field.number): f"{field.name} {field.type}{' repeated' * field.is_repeated}" for field in message.fields
        }
        for name, message in sorted(described.items())
    }


def calls() -> dict[str, list[str]]:
    """Return the wire's calls: what each takes and gives."""
    (service,) = wire_pb2.DESCRIPTOR.services_by_name.values()
    return {method.name: [method.input_type.name, method.output_type.name] for method in service.methods}


def vectors() -> dict[str, object]:
    """Return all that this release writes."""
    found = {}
    for name, kind in types().items():
        samples = [sample(kind), opposite(kind)]
        found[name] = {
            "fields": shape(kind),
            "vectors": [{"hex": msgspec.msgpack.encode(each).hex(), "value": plain(each)} for each in samples],
        }
    topics = {topic_name(topic): [name_of(part) for part in pair] for topic, pair in CATALOGUE.items()}
    return {
        "release": version("hanse"),
        "topics": topics,
        "types": found,
        "words": {name: sorted(each) for name, each in words().items()},
        "frames": {name: data.hex() for name, data in frames().items()},
        "wire": wire(),
        "calls": calls(),
    }


def topic_name(topic: tuple[Channel, str]) -> str:
    """Return how vectors call *topic*."""
    return f"{topic[0].value}/{topic[1]}"


def name_of(kind: type | None) -> str | None:
    """Return how vectors call *kind*."""
    return None if kind is None else kind.__name__


def read(given: dict[str, list[str]]) -> dict[str, list[Any]]:
    """Return what this release makes of the bytes *given* for each type: the value, or why it is none."""
    kinds = types()
    return {name: [outcome(kinds[name], bytes.fromhex(data)) for data in each] for name, each in given.items()}


def outcome(kind: type[msgspec.Struct], data: bytes) -> Any:
    """Return the *kind* that *data* holds, or the sentence that says why it holds none."""
    try:
        return plain(msgspec.msgpack.decode(data, type=kind))
    except msgspec.DecodeError as error:
        return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    answer = read(json.load(sys.stdin)) if sys.argv[1:] == ["read"] else vectors()
    text = json.dumps(answer, indent=1, sort_keys=True, ensure_ascii=False)
    sys.stdout.write(re.sub(r"\n\s{5,}", " ", text) + "\n")  # a vector is a line, so that a change shows as one
