"""What release 0.1.0 wrote is understood by this one, and what this one writes by release 0.1.0.

Neighbours and stores differ in age, so a message or a stored record may gain fields that have a default, and nothing
else: who takes one away, renames it or gives it another type breaks a test here.
"""

import json
from typing import Any, get_origin

import msgspec
import pytest

from hanse.cell.frames import FrameKind, decode, encode
from hanse.messages import CATALOGUE
from tests.upgrade import make_vectors
from tests.upgrade.release import HERE, OLD, Release

VECTORS = json.loads((HERE / f"vectors-{OLD}.json").read_text(encoding="utf-8"))
THEN: dict[str, Any] = VECTORS["types"]
NOW = make_vectors.types()
RETIRED = {"JobView": frozenset({"waiting_for", "waiting_until"})}
"""Fields that are sent no more: they are for people, and the old release has a default for each, so it shows nothing
there. A field by which a release decides what it does cannot be retired while that release is a neighbour."""


def now(name: str) -> type[msgspec.Struct]:
    """Return this release's type called *name*."""
    assert name in NOW, f"{OLD} sends or stores {name}, which is no more"
    return NOW[name]


def old_fields(name: str) -> frozenset[str]:
    return frozenset(THEN[name]["fields"]) - RETIRED.get(name, frozenset())


def as_then(name: str, value: Any) -> Any:
    """Return *value*, plain, of the type that *name* names, without what was added since, or is retired."""
    kind = NOW[name]
    fields = {field.name: field for field in msgspec.structs.fields(kind)}
    # Some types leave out what has its default.
    full = {
        field: value[field] if field in value else make_vectors.plain(default_of(fields[field])) for field in fields
    }
    return {field: _as_then(fields[field].type, full[field]) for field in old_fields(name)}


def default_of(field: msgspec.structs.FieldInfo) -> Any:
    return field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()


def _as_then(kind: Any, value: Any) -> Any:
    parts = make_vectors.parts_of(kind)
    if not parts or value is None:
        return value
    (part,) = parts
    if get_origin(kind) is tuple:
        return [as_then(part.__name__, each) for each in value]
    if get_origin(kind) is dict:
        return {key: as_then(part.__name__, each) for key, each in value.items()}
    return as_then(part.__name__, value)


@pytest.mark.parametrize("name", THEN)
def test_what_the_old_release_wrote_is_read_as_it_was_meant(name: str) -> None:
    for vector in THEN[name]["vectors"]:
        decoded = msgspec.msgpack.decode(bytes.fromhex(vector["hex"]), type=now(name))
        assert as_then(name, make_vectors.plain(decoded)) == as_then(name, vector["value"])
        for field in msgspec.structs.fields(now(name)):
            if field.name not in old_fields(name):
                assert getattr(decoded, field.name) == default_of(field)


@pytest.mark.parametrize("name", THEN)
def test_fields_of_the_old_release_are_still_there_and_new_ones_have_a_default(name: str) -> None:
    then, is_now = THEN[name]["fields"], make_vectors.shape(now(name))
    assert {field: is_now.get(field, "gone") for field in old_fields(name)} == {f: then[f] for f in old_fields(name)}
    assert all(then[field].endswith(" = …") for field in then.keys() - old_fields(name))
    added = {field: kind for field, kind in is_now.items() if field not in then}
    assert [field for field, kind in added.items() if not kind.endswith(" = …")] == []


@pytest.mark.parametrize("with_news", [False, True], ids=["with_what_is_new_left_out", "with_what_is_new_filled_in"])
def test_what_this_release_writes_is_read_by_the_old_one(old: Release, with_news: bool) -> None:
    given, expected = {}, {}
    for name in THEN:
        message = make_vectors.sample(now(name), only=None if with_news else old_fields(name))
        given[name] = [msgspec.msgpack.encode(message).hex()]
        expected[name] = [as_then(name, make_vectors.plain(message))]
    read = json.loads(old.python(str(HERE / "make_vectors.py"), "read", given=json.dumps(given)))
    assert {name: [as_then(name, each) for each in read[name]] for name in read} == expected


def test_topics_of_the_old_release_still_carry_the_same() -> None:
    topics = {make_vectors.topic_name(topic): [*map(make_vectors.name_of, pair)] for topic, pair in CATALOGUE.items()}
    assert {topic: topics.get(topic) for topic in VECTORS["topics"]} == VECTORS["topics"]


def test_words_of_the_old_release_still_mean_something() -> None:
    words = make_vectors.words()
    assert {name: sorted(set(then) - set(words[name])) for name, then in VECTORS["words"].items()} == {
        name: [] for name in VECTORS["words"]
    }


@pytest.mark.parametrize("name", VECTORS["frames"])
def test_frames_of_the_old_release_are_read_and_ours_are_the_same_bytes(name: str) -> None:
    data = bytes.fromhex(VECTORS["frames"][name])
    frame = make_vectors.frame(FrameKind[name.upper()])
    assert decode(data) == frame
    assert encode(frame) == data


def test_the_wires_own_messages_and_calls_only_grow() -> None:
    is_now = make_vectors.wire()
    for message, fields in VECTORS["wire"].items():
        assert {number: is_now.get(message, {}).get(number) for number in fields} == fields
    calls = make_vectors.calls()
    assert {name: calls.get(name) for name in VECTORS["calls"]} == VECTORS["calls"]


def test_vectors_are_what_the_old_release_makes(old: Release) -> None:
    assert json.loads(old.python(str(HERE / "make_vectors.py"))) == VECTORS
