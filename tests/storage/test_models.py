import json
from pathlib import Path
from typing import Any

import ml_dtypes
import msgspec
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from hanse.errors import NoSpace, NotFound, ProtocolError, StoreFailed
from hanse.ids import Digest
from hanse.messages import INLINE_LIMIT_BYTES, ITEM_BYTES, ModelRef
from hanse.model import Array, Model, ModelInvalid, TensorMismatch, TensorSpec, dtype_named
from hanse.storage.models import (
    allocate,
    check_ref,
    digests_of,
    load_model,
    read_safetensors,
    spec_of,
    store_model,
    write_safetensors,
)
from hanse.storage.tensors import TensorFiles, digest_of

from .samples import changed, tensor

LARGE = INLINE_LIMIT_BYTES // 4 + 1  # elements of float32, just too many to ride along


@pytest.fixture
def files(tmp_path: Path) -> TensorFiles:
    return TensorFiles(tmp_path / "tensors")


def names(files: TensorFiles) -> set[str]:
    return {path.name for path in files.root.iterdir()}


def of_every_dtype() -> Model:
    """Return a model with a large, a small, an empty and a 0-d tensor of each dtype, in no order of sizes."""
    generator = np.random.default_rng(7)
    arrays: dict[str, Array] = {}
    for dtype, item_bytes in ITEM_BYTES.items():
        count = INLINE_LIMIT_BYTES // item_bytes + 3
        many = generator.integers(0, 2, size=(count,)).astype(dtype_named(dtype))
        arrays |= {
            f"{dtype}.large": many,
            f"{dtype}.small": many[:6].reshape(2, 3),
            f"{dtype}.scalar": many[0].reshape(()),
        }
        arrays[f"{dtype}.empty"] = many[:0].reshape(3, 0, 2)
    return Model(arrays, {"made by": "a test", "ünï": "cödé"})


# Models and tensor files ----------------------------------------------------------------------------------------------


def test_a_model_of_every_dtype_loads_as_it_was_stored(files: TensorFiles) -> None:
    model = of_every_dtype()

    ref = msgspec.msgpack.decode(msgspec.msgpack.encode(store_model(model, files)), type=ModelRef)

    assert load_model(ref, files) == model
    assert spec_of(ref) == model.spec
    check_ref(ref, model.spec)


def test_small_tensors_ride_along_and_large_ones_are_files(files: TensorFiles) -> None:
    model = Model({"small": np.ones(LARGE - 1, np.float32), "large": np.ones(LARGE, np.float32)})

    ref = store_model(model, files)

    small, large = ref.tensors
    assert small.inline == model["small"].tobytes()
    assert small.digest == digest_of(model["small"].tobytes())
    assert large.inline is None
    assert large.digest == digest_of(model["large"].tobytes())
    assert digests_of(ref) == names(files) == {large.digest}


def test_loaded_arrays_are_read_only(files: TensorFiles) -> None:
    loaded = load_model(store_model(of_every_dtype(), files), files)

    assert not any(array.flags.writeable for array in loaded.values())


def test_a_loaded_model_is_stored_again_without_reading_it(files: TensorFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    ref = store_model(Model({"w": np.arange(LARGE, dtype=np.float32)}), files)
    loaded = load_model(ref, files)
    monkeypatch.setattr(files, "put", _never)

    assert store_model(loaded, files) == ref
    assert store_model(Model({"w": loaded["w"].reshape(1, -1)}), files).tensors[0].digest == ref.tensors[0].digest


def test_a_loaded_tensor_whose_file_is_gone_is_written_again(files: TensorFiles) -> None:
    ref = store_model(Model({"w": np.arange(LARGE, dtype=np.float32)}), files)
    loaded = load_model(ref, files)
    files.keep_only([])

    assert store_model(loaded, files) == ref
    assert files.has(ref.tensors[0].digest)


def test_a_part_of_a_loaded_tensor_is_a_tensor_of_its_own(files: TensorFiles) -> None:
    loaded = load_model(store_model(Model({"w": np.arange(2 * LARGE, dtype=np.float32)}), files), files)

    half = Model({"w": loaded["w"][LARGE:]})

    assert load_model(store_model(half, files), files) == half


def test_a_loaded_model_is_copied_to_other_files(files: TensorFiles, tmp_path: Path) -> None:
    loaded = load_model(store_model(of_every_dtype(), files), files)
    others = TensorFiles(tmp_path / "others")

    assert load_model(store_model(loaded, others), others) == loaded
    assert names(others) == names(files)


def test_what_is_computed_in_allocated_arrays_is_stored_in_place(
    files: TensorFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = of_every_dtype().spec
    model = allocate(spec, files, {"round": "1"})
    assert model.spec == spec
    for name, array in of_every_dtype().items():
        model[name][...] = array
    inodes = {path.stat().st_ino for path in files.root.iterdir()}
    monkeypatch.setattr(files, "put", _never)

    ref = store_model(model, files)

    assert names(files) == digests_of(ref)
    # Fewer files than scratches: some of them hold the same bytes.
    assert {path.stat().st_ino for path in files.root.iterdir()} <= inodes
    assert ref.metadata == {"round": "1"}
    assert load_model(ref, files) == Model(of_every_dtype(), {"round": "1"})


def test_an_array_that_was_stored_in_place_is_read_only_from_then_on(files: TensorFiles) -> None:
    model = allocate({"w": TensorSpec("float32", (LARGE,))}, files)
    model["w"][:] = 1

    ref = store_model(model, files)

    with pytest.raises(ValueError, match="read-only"):
        model["w"][0] = 2
    assert store_model(model, files) == ref
    assert load_model(ref, files) == model


def test_a_writable_view_of_a_stored_scratch_is_not_trusted(files: TensorFiles) -> None:
    model = allocate({"w": TensorSpec("float32", (LARGE,))}, files)
    model["w"][:] = 1
    view = model["w"].view()
    first = store_model(model, files)
    files.keep_only([])
    view[0] = 2

    second = store_model(Model({"w": view}), files)

    assert second != first
    assert digest_of(bytes(files.map(second.tensors[0].digest))) == second.tensors[0].digest


def test_a_part_of_an_allocated_array_is_copied(files: TensorFiles) -> None:
    whole = allocate({"w": TensorSpec("float32", (2, LARGE))}, files)
    whole["w"][:] = np.arange(2)[:, None]

    rows = Model({"first": whole["w"][0], "second": whole["w"][1]})

    assert load_model(store_model(rows, files), files) == rows
    whole["w"][:] = 3  # still writable: it was not taken


def test_a_missing_tensor_is_not_found(files: TensorFiles) -> None:
    with pytest.raises(NotFound):
        load_model(ModelRef((tensor(),)), files)


def test_a_file_of_another_size_is_refused_by_the_tensors_name(files: TensorFiles) -> None:
    digest = files.put(bytes(4 * LARGE))

    with pytest.raises(ProtocolError, match=r"'conv\.w'"):
        load_model(ModelRef((tensor("conv.w", shape=(LARGE + 1,), digest=digest),)), files)
    with pytest.raises(ProtocolError, match="'b'"):
        load_model(ModelRef((tensor("b", shape=(2,), inline=bytes(7)),)), files)


def test_a_reference_is_checked_against_what_is_expected(files: TensorFiles) -> None:
    ref = store_model(Model({"w": np.ones((2, 3), np.float32)}), files)

    check_ref(ref, ref)
    with pytest.raises(TensorMismatch, match=r"'w' as float32 \(2, 3\); the job expects float64 \(2, 3\)"):
        check_ref(ref, {"w": TensorSpec("float64", (2, 3))})


def test_a_reference_with_forged_inline_bytes_is_refused(files: TensorFiles) -> None:
    ref = store_model(Model({"w": np.ones((2, 3), np.float32)}), files)
    forged = ModelRef((changed(ref.tensors[0], inline=bytes(24)),))

    with pytest.raises(ProtocolError, match="digest of tensor 'w'"):
        check_ref(forged, ref)


def test_a_reference_that_cannot_be_is_refused_even_if_it_is_expected() -> None:
    ref = ModelRef((tensor(digest=Digest("../../etc")),))

    with pytest.raises(ProtocolError, match="digest"):
        check_ref(ref, ref)


def _never(*_: object) -> Digest:
    raise AssertionError("bytes were copied")


# safetensors ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def test_a_model_reads_back_as_it_was_written(path: Path) -> None:
    write_safetensors(of_every_dtype(), path)

    assert read_safetensors(path) == of_every_dtype()


def test_another_implementation_reads_what_was_written(path: Path) -> None:
    model = Model(of_every_dtype(), {"made by": "a test"})
    write_safetensors(model, path)

    with safetensors.safe_open(path, framework="numpy") as file:
        assert file.metadata() == model.metadata
        theirs = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    assert Model({name: theirs[name] for name in model}, model.metadata) == model


def test_what_another_implementation_wrote_is_read(path: Path) -> None:
    model = of_every_dtype()
    safetensors.numpy.save_file(dict(model), path, {"by": "them"})

    ours = read_safetensors(path)

    assert ours.metadata == {"by": "them"}
    assert Model({name: ours[name] for name in model}, model.metadata) == model


@given(st.data())
def test_any_model_survives_both_ways(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("any") / "model.safetensors"
    tensors = st.tuples(st.sampled_from(sorted(ITEM_BYTES)), st.lists(st.integers(0, 4), max_size=3))
    drawn = data.draw(
        st.dictionaries(st.text(min_size=1, max_size=5).filter(lambda name: name != "__metadata__"), tensors)
    )
    metadata = data.draw(st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=3))
    model = Model({name: np.ones(shape, dtype_named(dtype)) for name, (dtype, shape) in drawn.items()}, metadata)

    write_safetensors(model, path)

    assert read_safetensors(path) == model


def test_equal_models_give_equal_bytes_and_every_array_is_aligned(path: Path, tmp_path: Path) -> None:
    write_safetensors(of_every_dtype(), path)
    write_safetensors(of_every_dtype(), tmp_path / "again.safetensors")

    assert path.read_bytes() == (tmp_path / "again.safetensors").read_bytes()
    assert all(array.flags.aligned for array in read_safetensors(path).values())


def test_metadata_can_be_added(path: Path) -> None:
    write_safetensors(Model({"w": np.ones(3)}, {"a": "1", "b": "2"}), path, metadata={"b": "3", "c": "4"})

    assert read_safetensors(path).metadata == {"a": "1", "b": "3", "c": "4"}


def test_read_arrays_are_mapped_and_read_only(path: Path) -> None:
    write_safetensors(Model({"w": np.ones(3)}), path)

    array = read_safetensors(path)["w"]

    assert not array.flags.writeable
    assert not array.flags.owndata


def test_a_failed_write_leaves_the_old_file_and_nothing_else(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_safetensors(Model({"w": np.ones(3)}), path)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(NoSpace, match=r"writing .*model\.safetensors failed: .* is full \(No space left"):
        write_safetensors(Model({"w": np.zeros(3)}), path)

    assert read_safetensors(path) == Model({"w": np.ones(3)})
    assert list(path.parent.iterdir()) == [path]


def test_a_model_whose_tensor_has_the_name_for_metadata_is_refused(path: Path) -> None:
    with pytest.raises(ModelInvalid, match="__metadata__"):
        write_safetensors(Model({"__metadata__": np.ones(3)}), path)
    with pytest.raises(ModelInvalid, match="metadata has"):
        write_safetensors(Model({}), path, metadata={"large": "x" * 70_000})
    assert not path.exists()


def test_a_file_that_cannot_be_read_is_a_sentence(tmp_path: Path) -> None:
    for unreadable in (tmp_path / "missing.safetensors", tmp_path):
        with pytest.raises(StoreFailed, match=f"reading {unreadable}"):
            read_safetensors(unreadable)


def whole(header: object, body: bytes = bytes(8)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def entry(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


BAD_FILES: dict[str, bytes] = {
    "empty": b"",
    "shorter than the length": b"1234567",
    "header beyond the end": (100).to_bytes(8, "little") + b"{}",
    "header of 2**63 bytes": (2**63).to_bytes(8, "little") + b"{}",
    "no header": whole(b"", b""),
    "not JSON": whole(b"{nonsense}"),
    "not an object": whole(b"[1, 2]"),
    "leading space": whole(b" {}", b""),
    "not UTF-8": whole(b'{"\xff": 1}'),
    "half a character": whole(b'{"\\ud800": {"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'),
    "half a character in metadata": whole(b'{"__metadata__": {"a": "\\ud800"}}', b""),
    "nested too deep": whole(b'{"a":' * 100_000),
    "a tensor twice": whole(
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    ),
    "unknown dtype": whole({"a": entry("F7")}),
    "a dtype of ours": whole({"a": entry("float32")}),
    "missing field": whole({"a": {"dtype": "F32", "shape": [2]}}),
    "unknown field": whole({"a": entry() | {"more": 1}}),
    "no name": whole({"": entry()}),
    "shape of text": whole({"a": entry(shape="2")}),
    "fractional shape": whole({"a": entry(shape=[2.5])}),
    "negative shape": whole({"a": entry(shape=[-1, -2])}),
    "a size that overflows": whole({"a": entry(shape=[2**62, 4])}),
    "an empty tensor that overflows": whole({"a": entry(shape=[0, 2**70], offsets=[0, 0])}, b""),
    "too many dimensions": whole({"a": entry(shape=[1] * 65 + [2])}),
    "three offsets": whole({"a": entry(offsets=[0, 4, 8])}),
    "offsets reversed": whole({"a": entry(offsets=[8, 0])}),
    "negative offsets": whole({"a": entry(offsets=[-8, 0])}),
    "beyond the end": whole({"a": entry(offsets=[8, 16])}),
    "shorter than shape says": whole({"a": entry(offsets=[0, 4])}),
    "overlap": whole({"a": entry(), "b": entry()}),
    "partial overlap": whole({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)),
    "hole": whole({"a": entry(shape=[1], offsets=[0, 4]), "b": entry(shape=[1], offsets=[8, 12])}, bytes(12)),
    "bytes at the end": whole({"a": entry()}, bytes(9)),
    "bytes missing": whole({"a": entry()}, bytes(7)),
    "metadata of numbers": whole({"__metadata__": {"a": 1}}, b""),
    "metadata as a list": whole({"__metadata__": [1]}, b""),
    "too much metadata": whole({"__metadata__": {"a": "x" * 70_000}}, b""),
}


@pytest.mark.parametrize("content", BAD_FILES.values(), ids=BAD_FILES)
def test_a_file_that_does_not_hold_together_is_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)

    with pytest.raises(ProtocolError, match=r"model\.safetensors"):
        read_safetensors(path)


@given(st.data())
def test_a_damaged_file_is_read_as_some_model_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("any") / "model.safetensors"
    write_safetensors(Model({"a": np.ones((2, 2)), "b": np.ones(3, ml_dtypes.bfloat16)}, {"k": "v"}), path)
    content = bytearray(path.read_bytes())
    for at in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=3)):
        content[at] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])

    try:
        model = read_safetensors(path)
    except ProtocolError:
        return
    assert model.size_bytes < len(content)
