"""Models and files: a ``Model`` to a ``ModelRef`` and back, and safetensors, the layout that other tools open.

Tensors of at most ``INLINE_LIMIT_BYTES`` ride inside their reference; larger ones are tensor files. Large arrays are
never copied where that can be helped: loading maps them, and storing an array that already lies in these files (loaded
from them, or made by ``allocate``) names it without moving a byte.
"""

import json
import math
import mmap
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from hanse.errors import ProtocolError, StoreFailed
from hanse.ids import Digest
from hanse.messages import INLINE_LIMIT_BYTES, ITEM_BYTES, ModelRef, StateRef, TensorRef
from hanse.model import (
    MAX_METADATA_BYTES,
    Array,
    Model,
    ModelInvalid,
    ModelSpec,
    TensorSpec,
    check,
    dtype_name,
    dtype_named,
)
from hanse.storage.disk import disk_failure
from hanse.storage.records import check_model_ref, check_tensor_form
from hanse.storage.tensors import Scratch, TensorFiles, TensorMap, digest_of

MAX_HEADER_BYTES: Final = 100_000_000
"""The longest safetensors header that is read; the format's own limit."""

SAFETENSORS_DTYPES: Final[Mapping[str, str]] = {
    "bool": "BOOL", "int8": "I8", "uint8": "U8", "int16": "I16", "uint16": "U16", "int32": "I32", "uint32": "U32",
    "int64": "I64", "uint64": "U64", "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64",
}  # fmt: skip
_DTYPE_OF: Final = {code: dtype for dtype, code in SAFETENSORS_DTYPES.items()}
_METADATA: Final = "__metadata__"


# Models and tensor files ----------------------------------------------------------------------------------------------


def store_model(model: Model, files: TensorFiles) -> ModelRef:
    """Return *model* by name, its large tensors in *files*.

    An array that lies in a scratch of *files* and fills it is finished in place, and is read-only from then on.
    """
    return ModelRef(tuple(_store_tensor(name, array, files) for name, array in model.items()), dict(model.metadata))


def name_model(model: Model, files: TensorFiles) -> tuple[ModelRef, dict[Digest, memoryview]]:
    """Return *model* by name, and the bytes of its large tensors where they lie: nothing is written.

    For a model that is on its way elsewhere. A tensor that was loaded from *files* is not hashed again.
    """
    bytes_of: dict[Digest, memoryview] = {}
    tensors = []
    for name, array in model.items():
        dtype = dtype_name(array.dtype)
        if array.nbytes <= INLINE_LIMIT_BYTES:
            tensors.append(_store_tensor(name, array, files))
            continue
        digest = _known_digest(array, files) or digest_of(_buffer(array))
        bytes_of[digest] = _buffer(array)
        tensors.append(TensorRef(name, dtype, array.shape, digest))
    return ModelRef(tuple(tensors), dict(model.metadata)), bytes_of


def load_model(ref: ModelRef, files: TensorFiles) -> Model:
    """Return the model that *ref* names, its arrays read-only and the large ones mapped.

    Raises:
        NotFound: a tensor is not in *files*.
        ProtocolError: a tensor's bytes are not as many as its dtype and shape say.
    """
    return Model({tensor.name: _load_tensor(tensor, files) for tensor in ref.tensors}, ref.metadata)


def allocate(spec: ModelSpec, files: TensorFiles, metadata: Mapping[str, str] | None = None) -> Model:
    """Return a model of *spec* with writable arrays, the large ones in scratches of *files*; their values are not set.

    What is computed there is stored by ``store_model`` without copying, and takes no memory that the system could not
    write out.
    """
    return Model({name: _allocate_tensor(tensor, files) for name, tensor in spec.items()}, metadata)


def spec_of(ref: ModelRef) -> dict[str, TensorSpec]:
    """Return what the model that *ref* names looks like without its numbers."""
    return {tensor.name: TensorSpec(tensor.dtype, tensor.shape) for tensor in ref.tensors}


def digests_of(ref: ModelRef) -> set[Digest]:
    """Return the tensors of *ref* that are files: those that do not ride along."""
    return {tensor.digest for tensor in ref.tensors if tensor.inline is None}


def state_digests(state: StateRef) -> set[Digest]:
    """Return the tensors of a workflow's *state* that are files."""
    return digests_of(state.model).union(*(digests_of(model) for model in state.extra.values()))


def check_ref(ref: ModelRef, expected: ModelRef | ModelSpec) -> None:
    """Raise unless *ref* is well formed and has the tensors of *expected*, in its order, each with its dtype and shape.

    Bytes that ride along are hashed; the other tensors' were when they came.

    Raises:
        ProtocolError: a tensor's name, dtype, shape, digest or inline bytes cannot be.
        TensorMismatch: the first difference, with tensor, dtype and shape.
    """
    check_model_ref(ref, "the model's")
    check(spec_of(ref), spec_of(expected) if isinstance(expected, ModelRef) else expected)
    for tensor in ref.tensors:
        if tensor.inline is not None and (got := digest_of(tensor.inline)) != tensor.digest:
            raise ProtocolError(f"digest of tensor {tensor.name!r}", got=got, expected=tensor.digest)


def _store_tensor(name: str, array: Array, files: TensorFiles) -> TensorRef:
    dtype = dtype_name(array.dtype)
    if array.nbytes <= INLINE_LIMIT_BYTES:
        inline = array.tobytes()
        return TensorRef(name, dtype, array.shape, digest_of(inline), inline)
    return TensorRef(name, dtype, array.shape, _in_place(array, files) or files.put(_buffer(array)))


def _in_place(array: Array, files: TensorFiles) -> Digest | None:
    """Return the digest of *array* if it is all of a tensor file, or of a scratch, of *files*; ``None`` otherwise."""
    mapping = _mapping_behind(array)
    if mapping is None or mapping.files.root != files.root or len(mapping) != array.nbytes:
        return None
    if mapping.digest is None:
        array.flags.writeable = False
        return Scratch(mapping, array.nbytes).finish()
    return _known_digest(array, files)


def _known_digest(array: Array, files: TensorFiles) -> Digest | None:
    """Return the digest of *array* if it is all of a tensor file of *files*, as it is there; ``None`` otherwise."""
    mapping = _mapping_behind(array)
    if mapping is None or mapping.files.root != files.root or len(mapping) != array.nbytes:
        return None
    # One that is writable is a second view of a finished scratch, and may have changed it.
    return mapping.digest if not array.flags.writeable and mapping.digest and files.has(mapping.digest) else None


def _mapping_behind(array: Array) -> TensorMap | None:
    owner: object = array
    while isinstance(owner, np.ndarray):
        owner = owner.base
    if isinstance(owner, memoryview):
        owner = owner.obj
    return owner if isinstance(owner, TensorMap) else None


def _load_tensor(tensor: TensorRef, files: TensorFiles) -> Array:
    data = memoryview(tensor.inline) if tensor.inline is not None else files.map(tensor.digest)
    if len(data) != tensor.size_bytes:
        expected = f"{tensor.size_bytes}, as {TensorSpec(tensor.dtype, tensor.shape)} says"
        raise ProtocolError(f"number of bytes of tensor {tensor.name!r}", got=len(data), expected=expected)
    return _array(data, tensor.dtype, tensor.shape)


def _allocate_tensor(spec: TensorSpec, files: TensorFiles) -> Array:
    size = math.prod(spec.shape) * ITEM_BYTES[spec.dtype]
    if size <= INLINE_LIMIT_BYTES:
        return np.empty(spec.shape, dtype_named(spec.dtype))
    return _array(files.scratch(size).view, spec.dtype, spec.shape)


def _array(data: memoryview, dtype: str, shape: tuple[int, ...]) -> Array:
    array = np.frombuffer(data, dtype_named(dtype)) if len(data) else np.frombuffer(b"", dtype_named(dtype))
    return array.reshape(shape)


def _buffer(array: Array) -> memoryview:
    # By way of bytes, for bfloat16 has no buffer format of its own.
    return array.reshape(-1).view(np.uint8).data if array.size else memoryview(b"")


# safetensors ----------------------------------------------------------------------------------------------------------


def write_safetensors(model: Model, path: Path, *, metadata: Mapping[str, str] | None = None) -> None:
    """Write *model* to *path*, whole or not at all; *metadata* is added to the model's own.

    The file is on the disk when this returns. Equal models give equal bytes. The header lists the tensors in their
    order; their bytes lie by falling size of an element, so that each is aligned where it is mapped.

    Raises:
        ModelInvalid: the metadata is too large, or a tensor has the name that the format keeps for metadata.
        StoreFailed: the disk did not take it; what was at *path* still is.
    """
    whole = Model(model, {**model.metadata, **(metadata or {})})
    header, order = _header_of(whole)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        try:
            with draft.open("xb") as file:
                file.write(len(header).to_bytes(8, "little") + header)
                for name in order:
                    file.write(_buffer(whole[name]))
                file.flush()
                os.fsync(file.fileno())
            draft.replace(path)
            _sync_folder(path.parent)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise disk_failure(f"writing {path}", error, path.parent) from error


def read_safetensors(path: Path) -> Model:
    """Return the model in the safetensors file at *path*, its arrays mapped read-only, in the order of the header.

    Raises:
        ProtocolError: the file is not safetensors, or does not hold together; the error names the part.
        StoreFailed: it cannot be read.
    """
    data = _mapped(path)
    header = _header_bytes(data, path)
    entries, metadata = _entries_of(bytes(header), path)
    body = data[8 + len(header) :]
    _check_layout(entries, len(body), path)
    arrays = {
        name: _array(body[slice(*entry.data_offsets)], entry.dtype, entry.shape) for name, entry in entries.items()
    }
    return Model(arrays, metadata)


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a header says of one tensor; offsets count from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def _header_of(model: Model) -> tuple[bytes, list[str]]:
    if _METADATA in model:
        raise ModelInvalid(f"a tensor is called {_METADATA!r}, the name that safetensors files keep for metadata")
    order = sorted(model, key=lambda name: -model[name].itemsize)
    entries: dict[str, _Entry] = {}
    at = 0
    for name in order:
        array, end = model[name], at + model[name].nbytes
        entries[name] = _Entry(SAFETENSORS_DTYPES[dtype_name(array.dtype)], array.shape, (at, end))
        at = end
    metadata: dict[str, object] = {_METADATA: model.metadata} if model.metadata else {}
    text = msgspec.json.encode(metadata | {name: entries[name] for name in model})
    return text + b" " * (-len(text) % 8), order


def _mapped(path: Path) -> memoryview:
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                return memoryview(b"")
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise StoreFailed(f"reading {path}", error.strerror or str(error)) from error


def _header_bytes(data: memoryview, path: Path) -> memoryview:
    if len(data) < 8:
        raise ProtocolError(f"length of {path}", got=len(data), expected="at least the 8 bytes of a header's length")
    length = int.from_bytes(data[:8], "little")
    most = min(MAX_HEADER_BYTES, len(data) - 8)
    if length > most:
        raise ProtocolError(f"header length of {path}", got=length, expected=f"at most {most} bytes")
    return data[8 : 8 + length]


def _entries_of(header: bytes, path: Path) -> tuple[dict[str, _Entry], dict[str, str]]:
    try:
        if not header.startswith(b"{"):
            raise ValueError("it does not begin with '{'")
        table = json.loads(header, object_pairs_hook=_without_duplicates)
        metadata = msgspec.convert(table.pop(_METADATA, {}), dict[str, str])
        entries = msgspec.convert(table, dict[str, _Entry])
        size = sum(len(key.encode()) + len(value.encode()) for key, value in metadata.items())
        "".join(entries).encode()  # JSON can escape halves of characters, which are no text
    except (ValueError, RecursionError) as error:  # of which JSON's, Unicode's and msgspec's errors are kinds
        raise ProtocolError(
            f"header of {path}", got=header[:100], expected=f"a safetensors header ({error})"
        ) from error
    if size > MAX_METADATA_BYTES:
        raise ProtocolError(f"metadata of {path}", got=size, expected=f"at most {MAX_METADATA_BYTES} bytes")
    return {name: _checked_entry(name, entry, path) for name, entry in entries.items()}, metadata


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name occurs twice")
    return table


def _checked_entry(name: str, entry: _Entry, path: Path) -> _Entry:
    """Return *entry* with NumPy's name for its dtype, having made sure that it agrees with itself."""
    dtype = _DTYPE_OF.get(entry.dtype)
    if dtype is None:
        raise ProtocolError(f"dtype of {name!r} in {path}", got=entry.dtype, expected=f"one of {', '.join(_DTYPE_OF)}")
    start, end = entry.data_offsets
    check_tensor_form(name, dtype, entry.shape, field=f"{path}: tensor {name!r}")
    size = math.prod(entry.shape) * ITEM_BYTES[dtype]
    if start < 0 or end - start != size:
        expected = f"{size} bytes, as {TensorSpec(dtype, entry.shape)} says"
        raise ProtocolError(f"data_offsets of {name!r} in {path}", got=entry.data_offsets, expected=expected)
    return msgspec.structs.replace(entry, dtype=dtype)


def _check_layout(entries: Mapping[str, _Entry], body_bytes: int, path: Path) -> None:
    """Raise unless the tensors lie one after the other from the header to the file's end: no overlap, no hole."""
    at = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        if entry.data_offsets[0] != at:
            raise ProtocolError(
                f"data_offsets of {name!r} in {path}", got=entry.data_offsets, expected=f"a start at {at}"
            )
        at = entry.data_offsets[1]
    if at != body_bytes:
        raise ProtocolError(f"length of {path}", got=body_bytes, expected=f"{at} bytes after the header")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
