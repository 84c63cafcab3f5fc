import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hanse.errors import ConfigError
from hanse.learning.aggregate import BLOCK
from hanse.learning.filters import NormClip, Withhold, apply, distance
from hanse.model import Array, Model, ModelInvalid, TensorMismatch, Update

from .clients import model, update

VECTORS = hnp.arrays(np.float64, 7, elements=st.floats(-1e3, 1e3, allow_subnormal=False))


def test_update_is_scaled_down_to_the_bound() -> None:
    received = Model({"a": np.zeros(1), "b": np.ones((1, 1))})
    trained = Update(Model({"a": np.array([3.0]), "b": np.array([[5.0]])}, {"k": "v"}), 4, {"loss": 1.0})
    clipped = NormClip(1.0)(trained, received)
    assert clipped.model is not None
    assert clipped.model["a"] == pytest.approx([0.6], rel=1e-15)
    assert clipped.model["b"] == pytest.approx(np.array([[1.8]]), rel=1e-15)
    assert (clipped.model.metadata, clipped.num_examples, clipped.metrics) == ({"k": "v"}, 4, {"loss": 1.0})
    assert trained.model is not None
    assert trained.model["a"].tolist() == [3.0]


@given(VECTORS, VECTORS, st.floats(1e-3, 1e4))
def test_clipped_update_is_within_the_bound_and_in_the_same_direction(w: Array, x: Array, bound: float) -> None:
    clipped = NormClip(bound)(update(*w), model(*x)).model
    assert clipped is not None
    slack = 8 * np.finfo(float).eps * (np.abs(w).max() + np.abs(x).max() + bound)
    assert np.linalg.norm(clipped["w"] - x) <= bound + slack
    change = w - x
    norm = float(np.linalg.norm(change))
    if norm > 0:
        np.testing.assert_allclose(clipped["w"] - x, change * min(1.0, bound / norm), rtol=1e-9, atol=slack)


def test_update_within_the_bound_passes_to_the_bit() -> None:
    trained = update(0.1, 0.2)
    assert NormClip(0.25)(trained, model(0.0, 0.0)) is trained


def test_norm_is_over_all_floating_tensors_together_and_over_no_others() -> None:
    received = Model({"w": np.zeros(BLOCK + 1, np.float32), "h": np.zeros(1, np.float16), "n": np.array(0)})
    moved = Model({"w": np.ones(BLOCK + 1, np.float32), "h": np.full(1, 2, np.float16), "n": np.array(1000)})
    assert distance(moved, received) == pytest.approx(math.sqrt(BLOCK + 1 + 4), rel=1e-15)
    clipped = NormClip(1.0)(Update(moved, 1), received).model
    assert clipped is not None
    assert int(clipped["n"]) == 1000
    assert distance(clipped, received) == pytest.approx(1.0, rel=1e-3)
    assert clipped.spec == moved.spec


def test_what_cannot_be_clipped_does_not_leave() -> None:
    clip = NormClip(1.0)
    for bad in (math.nan, math.inf):
        with pytest.raises(ModelInvalid, match="cannot be clipped"):
            clip(update(bad), model(0.0))
    with pytest.raises(ModelInvalid, match="trained from no model"):
        clip(update(1.0), None)
    with pytest.raises(TensorMismatch):
        clip(update(1.0, 2.0), model(0.0))


def test_evaluations_pass() -> None:
    evaluation = Update(None, 3, {"loss": 1.0})
    assert apply([NormClip(1.0), Withhold(".*")], evaluation, None) is evaluation


@pytest.mark.parametrize("bound", [0.0, -1.0, math.inf, math.nan])
def test_bound_that_is_none_is_refused(bound: float) -> None:
    with pytest.raises(ConfigError, match="max_norm"):
        NormClip(bound)


def test_withheld_tensors_leave_as_they_were_received() -> None:
    received = Model({"head.w": np.zeros(2), "body.w": np.zeros(2)})
    trained = Update(Model({"head.w": np.ones(2), "body.w": np.ones(2)}, {"k": "v"}), 1)
    sent = Withhold(r"head\..*")(trained, received).model
    assert sent is not None
    assert list(sent) == ["head.w", "body.w"]
    assert (sent["head.w"] is received["head.w"], sent["body.w"].tolist()) == (True, [1.0, 1.0])
    assert sent.metadata == {"k": "v"}


@pytest.mark.parametrize("received", [None, model(1.0)])
def test_withheld_tensor_without_a_stand_in_does_not_leave(received: Model | None) -> None:
    trained = Update(Model({"head": np.ones(2)}), 1)
    with pytest.raises(ModelInvalid, match="'head' may not leave"):
        Withhold("head")(trained, received)


def test_withholding_nothing_needs_no_received_model() -> None:
    trained = update(1.0)
    assert Withhold("head")(trained, None) == trained


def test_pattern_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="pattern is '\\('; expected a regular expression"):
        Withhold("(")


def test_filters_apply_in_their_order() -> None:
    received = Model({"a": np.zeros(1), "b": np.zeros(1)})
    trained = Update(Model({"a": np.array([3.0]), "b": np.array([4.0])}), 1)
    clip, withhold = NormClip(1.0), Withhold("b")
    first = apply([withhold, clip], trained, received).model
    second = apply([clip, withhold], trained, received).model
    assert first is not None
    assert second is not None
    assert first["a"] == pytest.approx([1.0])
    assert second["a"] == pytest.approx([0.6])
    assert first["b"].tolist() == second["b"].tolist() == [0.0]
