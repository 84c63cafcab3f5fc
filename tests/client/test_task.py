import numpy as np

from hanse.client.task import TaskContext
from hanse.ids import ClientName, JobId


def context(**changes: object) -> TaskContext:
    values: dict[str, object] = {
        "client": ClientName("site-1"),
        "job": JobId("job-1"),
        "round": 3,
        "name": "train",
        "config": {},
        "site": {},
        "seed": 7,
        **changes,
    }
    return TaskContext(**values)  # type: ignore[arg-type]  # the changes are of the fields' types


def test_generator_is_the_same_whenever_and_wherever_it_is_asked_for() -> None:
    ctx = context()
    same = context(job=JobId("job-2"), config={"a": 1}, site={"data": "elsewhere"})

    assert np.array_equal(ctx.rng().random(4), ctx.rng().random(4))
    assert np.array_equal(ctx.rng().random(4), same.rng().random(4)), "only seed, client, round and task name count"


def test_generator_differs_with_seed_client_round_and_task() -> None:
    others = [context(seed=8), context(client=ClientName("site-2")), context(round=4), context(name="evaluate")]

    draws = {tuple(ctx.rng().random(4)) for ctx in [context(), *others]}
    assert len(draws) == 5


def test_logged_metrics_arrive_as_plain_floats() -> None:
    seen: list[tuple[int, dict[str, float]]] = []
    ctx = context(log_metrics=lambda step, metrics: seen.append((step, metrics)))
    ctx.log({"loss": np.float32(0.5), "n": 3}, step=2)

    assert seen == [(2, {"loss": 0.5, "n": 3.0})]
    assert {type(value) for value in seen[0][1].values()} == {float}


def test_logging_where_nobody_listens_is_fine() -> None:
    context().log({"loss": 1.0})


def test_context_shown_and_compared_does_not_depend_on_who_listens() -> None:
    assert context() == context(log_metrics=lambda step, metrics: None)
    assert "log_metrics" not in repr(context())
