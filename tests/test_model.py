"""Models: which arrays they take and how, when two are equal, and what is said about a tensor that differs."""

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hanse.messages import ITEM_BYTES
from hanse.model import (
    MAX_METADATA_BYTES,
    Array,
    Model,
    ModelInvalid,
    TensorMismatch,
    TensorSpec,
    Update,
    check,
    dtype_name,
    dtype_named,
)


@pytest.mark.parametrize(("name", "size"), ITEM_BYTES.items())
def test_every_dtype_that_may_travel_has_its_name_and_its_size(name: str, size: int) -> None:
    dtype = dtype_named(name)

    assert dtype_name(dtype) == name
    assert dtype.itemsize == size
    assert Model({"w": np.zeros(3, dtype)}).spec == {"w": TensorSpec(name, (3,))}


def test_a_contiguous_array_is_taken_without_a_copy() -> None:
    array = np.arange(6.0).reshape(2, 3)

    assert Model({"w": array})["w"] is array


@pytest.mark.parametrize(
    "array", [np.arange(12.0).reshape(3, 4)[:, ::2], np.arange(12.0).reshape(3, 4).T, np.arange(5)[::-1]]
)
def test_an_array_that_is_not_contiguous_is_made_so(array: Array) -> None:
    taken = Model({"w": array})["w"]

    assert taken.flags.c_contiguous
    assert np.array_equal(taken, array)


@pytest.mark.parametrize("code", [">f4", ">i8", ">u2"])
def test_an_array_of_another_byte_order_keeps_its_numbers(code: str) -> None:
    model = Model({"w": np.array([1, 2, 300], code)})

    assert model["w"].tolist() == [1, 2, 300]
    assert model["w"].dtype.byteorder != ">"
    assert model == Model({"w": np.array([1, 2, 300], code.replace(">", "<"))})


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1, 1)])
def test_scalars_and_empty_tensors_keep_their_shape(shape: tuple[int, ...]) -> None:
    model = Model({"w": np.zeros(shape, np.float32)})

    assert model.spec == {"w": TensorSpec("float32", shape)}
    assert model == Model({"w": np.zeros(shape, np.float32)})


@pytest.mark.parametrize(
    "value", [np.array([None]), np.array(["text"]), np.zeros(2, complex), np.zeros(2, "M8[s]"), np.zeros(2, "f4,i4")]
)
def test_a_dtype_that_cannot_travel_is_refused_with_the_tensors_name(value: Array) -> None:
    with pytest.raises(ModelInvalid, match=r"tensor 'w' has dtype .*; expected one of bool, int8"):
        Model({"w": value})


def test_a_tensor_has_a_name() -> None:
    with pytest.raises(ModelInvalid, match="empty name"):
        Model({"": np.zeros(1)})


def test_a_model_is_a_mapping_in_order() -> None:
    model = Model({"b": np.zeros(2, np.float32), "a": np.ones((2, 2), np.int8)})

    assert list(model) == ["b", "a"]
    assert len(model) == 2
    assert "a" in model
    assert model.size_bytes == 12
    assert repr(model) == "Model(b: float32 (2,), a: int8 (2, 2))"
    with pytest.raises(KeyError):
        model["c"]
    with pytest.raises(TypeError):
        model["c"] = np.zeros(1)  # type: ignore[index]  # the mistake that is tested


def test_a_models_metadata_is_its_own_and_bounded() -> None:
    given_metadata = {"format": "np"}
    model = Model({}, given_metadata)
    given_metadata["format"] = "pt"

    assert model.metadata == {"format": "np"}
    Model({}, {"k": "v" * (MAX_METADATA_BYTES - 1)})
    with pytest.raises(ModelInvalid, match="the model's metadata has 65537 bytes"):
        Model({}, {"k": "v" * MAX_METADATA_BYTES})
    with pytest.raises(ModelInvalid, match="65538 bytes"):
        Model({}, {"": "é" * (MAX_METADATA_BYTES // 2 + 1)})


WEIGHTS = {"a": np.array([1.0, np.nan]), "b": np.array([[1, 2]], np.int16)}


def test_models_of_the_same_bytes_are_equal_even_where_numbers_are_not() -> None:
    assert Model(WEIGHTS) == Model({name: array.copy() for name, array in WEIGHTS.items()})


@pytest.mark.parametrize(
    "other",
    [
        Model({"b": WEIGHTS["b"], "a": WEIGHTS["a"]}),
        Model({"a": WEIGHTS["a"]}),
        Model({**WEIGHTS, "b": np.array([[1, 3]], np.int16)}),
        Model({**WEIGHTS, "b": np.array([1, 2], np.int16)}),
        Model({**WEIGHTS, "b": np.array([[1, 2]], np.uint16)}),
        Model(WEIGHTS, {"k": "v"}),
    ],
)
def test_models_that_differ_in_order_names_shapes_dtypes_bytes_or_metadata_are_not_equal(other: Model) -> None:
    assert Model(WEIGHTS) != other


def test_minus_zero_is_not_zero_in_bytes() -> None:
    assert Model({"w": np.array([0.0])}) != Model({"w": np.array([-0.0])})


def test_a_model_equals_no_other_thing_and_has_no_hash() -> None:
    assert Model(WEIGHTS) != WEIGHTS
    with pytest.raises(TypeError):
        hash(Model(WEIGHTS))


def test_bfloat16_is_a_dtype_like_others() -> None:
    model = Model({"w": np.array([1.5, -2.0], ml_dtypes.bfloat16)})

    assert model.spec == {"w": TensorSpec("bfloat16", (2,))}
    assert model.size_bytes == 4
    assert model == Model({"w": np.array([1.5, -2.0], ml_dtypes.bfloat16)})


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=5),
        st.sampled_from(sorted(set(ITEM_BYTES) - {"bfloat16"})).flatmap(
            lambda name: hnp.arrays(np.dtype(name), hnp.array_shapes(min_dims=0, min_side=0, max_side=3))
        ),
        max_size=3,
    )
)
def test_any_model_equals_itself_taken_again_and_fits_its_own_spec(arrays: dict[str, Array]) -> None:
    model = Model(arrays)

    assert Model(model) == model
    assert model.size_bytes == sum(array.nbytes for array in arrays.values())
    check(model.spec, model.spec)


EXPECTED = {"a": TensorSpec("float32", (2, 3)), "b": TensorSpec("int8", ())}


@pytest.mark.parametrize(
    ("got", "sentence"),
    [
        ({"a": EXPECTED["a"]}, "no tensor 'b'; the job expects int8 ()"),
        (
            {**EXPECTED, "a": TensorSpec("float16", (2, 3))},
            "'a' as float16 (2, 3); the job expects float32 (2, 3)",
        ),
        ({**EXPECTED, "a": TensorSpec("float32", (3, 2))}, "'a' as float32 (3, 2); the job expects float32 (2, 3)"),
        ({**EXPECTED, "c": TensorSpec("bool", (1,))}, "'c' as bool (1,); the job expects no such tensor"),
        (
            {"b": EXPECTED["b"], "a": EXPECTED["a"]},
            "the tensors in the order ['b', 'a']; the job expects ['a', 'b']",
        ),
    ],
)
def test_the_first_difference_is_named_with_tensor_dtype_and_shape(got: dict[str, TensorSpec], sentence: str) -> None:
    with pytest.raises(TensorMismatch) as mismatch:
        check(got, EXPECTED)

    assert str(mismatch.value) == sentence


def test_an_update_weighs_nothing_or_more() -> None:
    assert Update(None, 0).metrics == {}
    with pytest.raises(ModelInvalid, match="num_examples is -1; expected 0 or more"):
        Update(Model({}), -1)


@pytest.mark.parametrize("discount", [0.0, -0.5, 1.1, math.nan])
def test_update_counts_for_no_more_than_it_is(discount: float) -> None:
    assert Update(None, 4, discount=0.5).weight == 2.0
    with pytest.raises(ModelInvalid, match="discount is"):
        Update(None, 4, discount=discount)
