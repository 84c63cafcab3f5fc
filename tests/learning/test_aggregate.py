import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hanse.learning.aggregate import BLOCK, NoUpdates, in_memory, mean_metrics, weighted_mean, with_metadata
from hanse.messages import ITEM_BYTES
from hanse.model import Array, Model, ModelSpec, TensorMismatch, Update, dtype_name, dtype_named

FLOATS = [name for name in ITEM_BYTES if "float" in name]
INTEGERS = [name for name in ITEM_BYTES if "int" in name]


def updates_of(*weighted: tuple[Array, int]) -> list[Update]:
    return [Update(Model({"w": array}), n) for array, n in weighted]


def exact_mean(column: list[float], weights: list[int]) -> Fraction:
    return sum((Fraction(value) * n for value, n in zip(column, weights, strict=True)), Fraction()) / sum(weights)


def test_mean_of_two_is_weighted_by_their_examples() -> None:
    mean = weighted_mean(updates_of((np.array([0.0, 4.0]), 1), (np.array([4.0, 0.0]), 3)))
    assert mean["w"].tolist() == [3.0, 1.0]


@given(
    st.lists(
        st.tuples(
            hnp.arrays(np.float64, 5, elements=st.floats(-1e6, 1e6, allow_subnormal=False)), st.integers(0, 10**9)
        ),
        min_size=1,
        max_size=6,
    ).filter(lambda weighted: any(n for _, n in weighted))
)
def test_float64_mean_is_the_exact_rational_mean_to_rounding(weighted: list[tuple[Array, int]]) -> None:
    mean = weighted_mean(updates_of(*weighted))["w"]
    weights = [n for _, n in weighted]
    for position in range(5):
        column = [float(array[position]) for array, _ in weighted]
        exact = exact_mean(column, weights)
        # one rounding per product, sum and division, each relative to what has been summed up so far
        magnitude = exact_mean([abs(value) for value in column], weights)
        assert abs(Fraction(float(mean[position])) - exact) <= magnitude * (2 * len(weighted) + 1) * Fraction(2) ** -53


@given(
    st.lists(
        st.tuples(hnp.arrays(np.float32, (2, 3), elements=st.floats(-1e3, 1e3, width=32)), st.integers(1, 1000)),
        min_size=1,
        max_size=5,
    )
)
def test_float32_mean_is_the_law_computed_number_by_number_in_python(weighted: list[tuple[Array, int]]) -> None:
    mean = weighted_mean(updates_of(*weighted))["w"]
    total = float(sum(n for _, n in weighted))
    for position in np.ndindex(2, 3):
        acc = float(weighted[0][0][position]) * weighted[0][1]
        for array, n in weighted[1:]:
            acc += float(array[position]) * n
        assert mean[position] == np.float32(acc / total)


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_floating_dtype_is_summed_in_float64_and_keeps_its_dtype_and_shape(dtype: str) -> None:
    kind = dtype_named(dtype)
    first, second = np.array([[1.0, 1.5]]).astype(kind), np.array([[2.0, 3.0]]).astype(kind)
    mean = weighted_mean(updates_of((first, 1), (second, 2)))["w"]
    assert (dtype_name(mean.dtype), mean.shape) == (dtype, (1, 2))
    assert np.array_equal(mean, np.array([[5 / 3, 2.5]]).astype(kind))


def test_half_precision_does_not_overflow_on_the_way() -> None:
    largest = np.full(3, np.finfo(np.float16).max)
    assert np.array_equal(weighted_mean(updates_of((largest, 10**6), (largest, 10**6)))["w"], largest)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_integers_are_rounded_half_to_even(dtype: str) -> None:
    first, second = np.array([0, 1, 2, 3], dtype), np.array([1, 2, 3, 4], dtype)
    mean = weighted_mean(updates_of((first, 1), (second, 1)))["w"]
    assert (mean.dtype.name, mean.tolist()) == (dtype, [0, 2, 2, 4])


@pytest.mark.parametrize("dtype", INTEGERS)
def test_extreme_integers_stay_within_their_dtype(dtype: str) -> None:
    limits = np.iinfo(dtype)
    extremes = np.array([limits.min, limits.max], dtype)
    mean = weighted_mean(updates_of((extremes, 3), (extremes, 4)))["w"]
    assert int(mean[0]) == limits.min
    assert int(mean[1]) == (limits.max if limits.bits < 64 else int(math.nextafter(2.0 ** math.log2(limits.max), 0)))


def test_equal_masks_are_kept_and_differing_ones_refused() -> None:
    mask, other = np.array([True, False]), np.array([True, True])
    kept = weighted_mean(updates_of((mask, 1), (mask.copy(), 2)))
    assert kept["w"].tolist() == [True, False]
    with pytest.raises(TensorMismatch, match="'w' as bool"):
        weighted_mean(updates_of((mask, 1), (other, 2)))


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 7])
def test_blocks_leave_no_number_out_and_count_none_twice(size: int) -> None:
    first = np.arange(size, dtype=np.float64)
    mean = weighted_mean(updates_of((first, 1), (first + 4, 3)))["w"]
    assert np.array_equal(mean, first + 3)


def test_scalars_and_empty_tensors_have_means_too() -> None:
    def one(value: float) -> Update:
        return Update(Model({"scalar": np.float32(value), "empty": np.zeros((0, 3))}), 1)

    mean = weighted_mean([one(1), one(2)])
    assert (mean["scalar"].shape, float(mean["scalar"]), mean["empty"].shape) == ((), 1.5, (0, 3))


def test_clients_without_examples_are_not_read_but_their_shapes_are_checked() -> None:
    broken = np.array([np.inf, np.nan])
    assert weighted_mean(updates_of((broken, 0), (np.ones(2), 5)))["w"].tolist() == [1.0, 1.0]
    with pytest.raises(TensorMismatch, match="float64 \\(3,\\)"):
        weighted_mean(updates_of((np.ones(2), 5), (np.ones(3), 0)))


@pytest.mark.parametrize(
    ("updates", "sentence"),
    [([], "there are no updates"), (updates_of((np.ones(1), 0), (np.ones(1), 0)), "all 2 updates say")],
)
def test_nothing_to_average_is_said(updates: list[Update], sentence: str) -> None:
    with pytest.raises(NoUpdates, match=sentence):
        weighted_mean(updates)


def test_update_without_a_model_is_refused() -> None:
    with pytest.raises(TensorMismatch, match="without a model"):
        weighted_mean([Update(None, 3)])


def test_refusal_names_tensor_dtype_and_shape() -> None:
    with pytest.raises(TensorMismatch, match=r"'w' as float32 \(2,\); the job expects float64 \(2,\)"):
        weighted_mean(updates_of((np.ones(2), 1), (np.ones(2, np.float32), 1)))


def test_result_lies_in_the_arrays_that_out_gave_and_updates_are_unchanged() -> None:
    given_arrays: list[Model] = []

    def out(spec: ModelSpec) -> Model:
        given_arrays.append(in_memory(spec))
        return given_arrays[0]

    first, second = np.array([1.0, 2.0]), np.array([3.0, 4.0])
    first.flags.writeable = second.flags.writeable = False
    mean = weighted_mean(updates_of((first, 1), (second, 1)), out)
    assert mean["w"] is given_arrays[0]["w"]
    assert (first.tolist(), second.tolist()) == ([1.0, 2.0], [3.0, 4.0])


def test_memory_beyond_the_result_does_not_grow_with_the_model_or_the_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    empty = np.empty

    def counting(*args: object, **kwargs: object) -> Array:
        array: Array = empty(*args, **kwargs)  # type: ignore[call-overload]  # passed on as they came
        sizes.append(array.nbytes)
        return array

    target = in_memory(Model({"w": np.zeros(5 * BLOCK, np.float32)}).spec)
    monkeypatch.setattr(np, "empty", counting)
    weighted_mean(updates_of(*[(np.ones(5 * BLOCK, np.float32), 1)] * 20), lambda spec: target)
    assert sizes == [8 * BLOCK, 8 * BLOCK]


def test_model_takes_the_jobs_metadata_and_the_same_arrays() -> None:
    arrays = Model({"w": np.ones(2)}, {"from": "site-1"})
    dressed = with_metadata(arrays, Model({}, {"from": "the job"}))
    assert dressed.metadata == {"from": "the job"}
    assert dressed["w"] is arrays["w"]


def test_metrics_are_weighted_means_over_those_who_measured_them() -> None:
    metrics = mean_metrics(
        [Update(None, 1, {"loss": 4.0, "f1": 0.5}), Update(None, 3, {"loss": 0.0}), Update(None, 0, {"auc": 1.0})]
    )
    assert metrics == {"f1": 0.5, "loss": 1.0}
    assert list(metrics) == ["f1", "loss"]


@pytest.mark.parametrize(
    ("one", "other", "mean"), [(math.inf, -math.inf, math.nan), (math.inf, 1.0, math.inf), (1.7e308, 1.7e308, math.inf)]
)
def test_metrics_of_a_client_that_diverged_have_a_mean_that_says_so(one: float, other: float, mean: float) -> None:
    metrics = mean_metrics([Update(None, 1, {"loss": one}), Update(None, 1, {"loss": other})])
    assert metrics == pytest.approx({"loss": mean}, nan_ok=True)


@given(st.lists(st.tuples(st.floats(-1e9, 1e9), st.integers(1, 10**6)), min_size=1, max_size=8), st.randoms())
def test_metrics_do_not_depend_on_order(pairs: list[tuple[float, int]], random: object) -> None:
    updates = [Update(None, n, {"loss": value}) for value, n in pairs]
    shuffled = sorted(updates, key=lambda _: random.random())  # type: ignore[attr-defined]  # Hypothesis' random.Random
    assert mean_metrics(shuffled) == mean_metrics(updates)


def test_bfloat16_is_summed_in_float64_and_rounded_at_the_end() -> None:
    # 1 + 2**-8 lies half-way between two bfloat16 numbers and goes to the even one; a little more goes up
    low, high = (np.array([value], ml_dtypes.bfloat16) for value in (1.0, 1.0078125))
    assert float(weighted_mean(updates_of((low, 1), (high, 1)))["w"][0]) == 1.0
    assert float(weighted_mean(updates_of((low, 499), (high, 501)))["w"][0]) == 1.0078125
