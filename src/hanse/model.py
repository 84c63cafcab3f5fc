"""A model: an ordered set of named arrays plus small metadata.

Arrays are NumPy's, in any dtype of ``hanse.messages.ITEM_BYTES`` (``bfloat16`` through ``ml_dtypes``), C-contiguous and
little-endian; they may be mapped files. A model is a value: nothing that takes one changes its arrays. What a model
looks like without its numbers is its ``ModelSpec``, and ``check`` says which tensor of another differs and how.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt

from hanse.errors import OperatorError
from hanse.messages import ITEM_BYTES, Metrics

Array: TypeAlias = npt.NDArray[Any]

MAX_METADATA_BYTES = 64 * 1024
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def dtype_name(dtype: np.dtype[Any]) -> str:
    """Return the name that messages and files use for *dtype*: NumPy's own, and ``bfloat16``."""
    return "bfloat16" if dtype == _BFLOAT16 else dtype.name


def dtype_named(name: str) -> np.dtype[Any]:
    """Return the dtype called *name*, one of ``ITEM_BYTES``."""
    return _BFLOAT16 if name == "bfloat16" else np.dtype(name)


class ModelInvalid(OperatorError):
    """A model is not one: a name, dtype or piece of metadata that cannot be."""

    code = "model-invalid"


class TensorMismatch(OperatorError):
    """A tensor differs from what is expected; the sentence names tensor, dtype and shape of both."""

    code = "tensor-mismatch"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor without its numbers."""

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


ModelSpec: TypeAlias = Mapping[str, TensorSpec]


class Model(Mapping[str, Array]):
    """Named arrays in order, read-only as a mapping; ``metadata`` maps text to text, at most 64 KiB in all.

    Arrays are taken as they are when contiguous (no copy), and keep their order. Two models are equal when names,
    order, dtypes, shapes, bytes and metadata are.

    Raises:
        ModelInvalid: a name is empty or not text, an array has a dtype that cannot travel, metadata is too large.
    """

    __slots__ = ("_arrays", "metadata")

    def __init__(self, arrays: Mapping[str, npt.ArrayLike], metadata: Mapping[str, str] | None = None) -> None:
        self._arrays: dict[str, Array] = {name: _checked(name, value) for name, value in arrays.items()}
        self.metadata: dict[str, str] = dict(metadata or {})
        size = sum(len(key.encode()) + len(value.encode()) for key, value in self.metadata.items())
        if size > MAX_METADATA_BYTES:
            raise ModelInvalid(f"the model's metadata has {size} bytes; at most {MAX_METADATA_BYTES} are allowed")

    def __getitem__(self, name: str) -> Array:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def __repr__(self) -> str:
        return f"Model({', '.join(f'{name}: {spec}' for name, spec in self.spec.items())})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Model):
            return NotImplemented
        return (
            list(self) == list(other)
            and self.spec == other.spec
            and self.metadata == other.metadata
            and all(np.array_equal(_bits(a), _bits(b)) for a, b in zip(self.values(), other.values(), strict=True))
        )

    __hash__ = None  # type: ignore[assignment]  # equal by content, and content may be gigabytes

    @property
    def spec(self) -> dict[str, TensorSpec]:
        """The model without its numbers, in order."""
        return {name: TensorSpec(dtype_name(array.dtype), array.shape) for name, array in self._arrays.items()}

    @property
    def size_bytes(self) -> int:
        """The bytes of all arrays together."""
        return sum(array.nbytes for array in self._arrays.values())


@dataclass(frozen=True, slots=True)
class Update:
    """What a client answers: a model (``None`` for an evaluation), its weight, and what it measured.

    ``num_examples`` is the number of examples behind the update, at least 0: the weight in a mean. ``discount`` is the
    workflow's: the share of that weight for which it takes an update that comes late.
    """

    model: Model | None
    num_examples: int
    metrics: Metrics = field(default_factory=dict)
    discount: float = 1.0

    def __post_init__(self) -> None:
        if self.num_examples < 0:
            raise ModelInvalid(f"num_examples is {self.num_examples}; expected 0 or more")
        if not 0 < self.discount <= 1:
            raise ModelInvalid(f"discount is {self.discount}; expected more than 0 and at most 1")

    @property
    def weight(self) -> float:
        """The weight in a mean: ``num_examples * discount``."""
        return self.num_examples * self.discount


def check(got: ModelSpec, expected: ModelSpec) -> None:
    """Raise unless *got* has the tensors of *expected*, in its order, each with its dtype and shape.

    Raises:
        TensorMismatch: the first difference, with tensor, dtype and shape.
    """
    for name, spec in expected.items():
        if name not in got:
            raise TensorMismatch(f"no tensor {name!r}; the job expects {spec}")
        if got[name] != spec:
            raise TensorMismatch(f"{name!r} as {got[name]}; the job expects {spec}")
    for name, spec in got.items():
        if name not in expected:
            raise TensorMismatch(f"{name!r} as {spec}; the job expects no such tensor")
    if list(got) != list(expected):
        raise TensorMismatch(f"the tensors in the order {list(got)}; the job expects {list(expected)}")


def _checked(name: str, value: npt.ArrayLike) -> Array:
    if not name:
        raise ModelInvalid("a tensor has an empty name; expected text")
    array = np.asarray(value)
    if dtype_name(array.dtype) not in ITEM_BYTES:
        raise ModelInvalid(f"tensor {name!r} has dtype {array.dtype}; expected one of {', '.join(ITEM_BYTES)}")
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("<"))
    return array if array.flags.c_contiguous else np.ascontiguousarray(array)


def _bits(array: Array) -> npt.NDArray[np.uint8]:
    return np.atleast_1d(array).reshape(-1).view(np.uint8)
