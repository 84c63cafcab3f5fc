"""What a task is called: after what it asks."""

from hypothesis import given
from hypothesis import strategies as st

from hanse.coordination.task_keys import FIRST_SEQUENCE, content_of, is_counted, sequence_of
from hanse.ids import ClientName, Digest
from hanse.job import Config
from hanse.messages import ModelRef, TaskKey, TensorRef
from hanse.storage.records import check_key

MODEL = ModelRef((TensorRef("w", "float32", (2, 3), Digest("ab" * 32)),), {"made": "here", "by": "us"})

scalars = st.one_of(st.booleans(), st.integers(-(2**63), 2**63), st.floats(), st.text())


def test_whatever_differs_in_a_task_makes_it_another() -> None:
    contents = [
        content_of(MODEL, {"rate": 1}, expects_model=True),
        content_of(MODEL, {"rate": 1}, expects_model=False),
        content_of(MODEL, {"rate": 1.0}, expects_model=True),
        content_of(MODEL, {"rate": True}, expects_model=True),
        content_of(MODEL, {}, expects_model=True),
        content_of(None, {"rate": 1}, expects_model=True),
        content_of(ModelRef(MODEL.tensors), {"rate": 1}, expects_model=True),
        content_of(ModelRef(), {"rate": 1}, expects_model=True),
    ]
    assert len(set(contents)) == len(contents)
    assert len({sequence_of(content, number) for content in contents for number in range(3)}) == 3 * len(contents)


@given(st.dictionaries(st.text(), scalars))
def test_the_order_of_a_config_makes_no_other_task(config: Config) -> None:
    other_way = dict(reversed(config.items()))
    assert content_of(MODEL, config, expects_model=True) == content_of(MODEL, other_way, expects_model=True)


@given(st.binary(), st.integers(0, 10**6))
def test_a_sequence_is_one_that_a_store_holds_and_no_count(content: bytes, number: int) -> None:
    key = TaskKey(1, "train", sequence_of(content, number), ClientName("site-1"))
    check_key(key)
    assert not is_counted(key)


def test_a_release_that_counted_began_at_0() -> None:
    assert [is_counted(TaskKey(1, "train", number, ClientName("a"))) for number in (0, FIRST_SEQUENCE - 1)] == [
        True,
        True,
    ]


def test_sequences_stay_what_they_are_from_release_to_release() -> None:
    content = content_of(MODEL, {"rate": 0.1}, expects_model=True)
    assert [sequence_of(content, number) for number in range(2)] == [1999155786, 1731004597]
