"""Answers to tasks: what a client may send, and what becomes of what it may not."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hanse.events import EventType
from hanse.job import JobState, WorkflowSpec
from hanse.messages import (
    Attach,
    Channel,
    LogMetrics,
    ModelRef,
    TaskFault,
    TaskResult,
    TensorRef,
    UpdateRef,
)
from hanse.model import Model
from hanse.storage.models import read_safetensors

from .job_world import (
    Site,
    StartServer,
    answer,
    faulty,
    outcome,
    small,
    submit,
    tensor_file,
    w,
)
from .world import (
    Dialler,
    Recorder,
    on_loop,
    wait,
)

WRONG: list[tuple[str, Callable[[], Model | None], str]] = [
    (
        "dtype",
        lambda: Model({"w": np.zeros(3, np.float16), "b": np.float32(0)}),
        "site-1 sent 'w' as float16 (3,); the job expects float32 (3,)",
    ),
    (
        "shape",
        lambda: Model({"w": np.zeros((3, 1), np.float32), "b": np.float32(0)}),
        "site-1 sent 'w' as float32 (3, 1); the job expects float32 (3,)",
    ),
    (
        "name",
        lambda: Model({"v": np.zeros(3, np.float32), "b": np.float32(0)}),
        "site-1 sent no tensor 'w'; the job expects float32 (3,)",
    ),
    (
        "one more",
        lambda: Model({"w": np.zeros(3, np.float32), "b": np.float32(0), "x": np.zeros(1, np.int8)}),
        "site-1 sent 'x' as int8 (1,); the job expects no such tensor",
    ),
    (
        "order",
        lambda: Model({"b": np.float32(0), "w": np.zeros(3, np.float32)}),
        "site-1 sent the tensors in the order ['b', 'w']; the job expects ['w', 'b']",
    ),
    ("none", lambda: None, "site-1 sent no model; the task expects one"),
]


@pytest.mark.parametrize(("make", "sentence"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
def test_an_update_that_is_not_what_the_job_expects_is_refused_with_a_sentence(
    start: StartServer, dialler: Dialler, tmp_path: Path, make: Callable[[], Model | None], sentence: str
) -> None:
    server = start()
    site = Site(dialler, server, "site-1")
    job_id = submit(server, tmp_path, min_clients=1)

    refused = site.refused(answer(site.task(), make()))

    assert refused.reason == sentence
    record = outcome(server, job_id)
    assert record.state is JobState.FAILED
    assert sentence in record.reason


def corrupted(reference: ModelRef) -> ModelRef:
    first, *others = reference.tensors
    assert first.inline is not None
    return ModelRef(
        (TensorRef(first.name, first.dtype, first.shape, first.digest, b"\xff" * len(first.inline)), *others)
    )


def test_bytes_that_are_not_what_their_digest_says_are_refused(
    start: StartServer, dialler: Dialler, tmp_path: Path
) -> None:
    server = start()
    site = Site(dialler, server, "site-1")
    submit(server, tmp_path, min_clients=1)
    key = site.task().key

    refused = site.refused(TaskResult(key, UpdateRef(corrupted(small(w(1))), 1)))

    assert "digest of tensor 'w'" in refused.reason


def test_a_negative_number_of_examples_is_refused(start: StartServer, dialler: Dialler, tmp_path: Path) -> None:
    server = start()
    site = Site(dialler, server, "site-1")
    submit(server, tmp_path, min_clients=1)

    assert "num_examples -1" in site.refused(answer(site.task(), w(1), num_examples=-1)).reason


@pytest.mark.parametrize("both", [True, False])
def test_an_answer_is_an_update_or_a_fault(start: StartServer, dialler: Dialler, tmp_path: Path, both: bool) -> None:
    server = start()
    site = Site(dialler, server, "site-1")
    submit(server, tmp_path, min_clients=1)
    task = site.task()
    odd = TaskResult(task.key, UpdateRef(small(w(1)), 1), TaskFault("x", "y")) if both else TaskResult(task.key)

    assert "an answer is one of them" in site.refused(odd).reason
    site.send(answer(task, w(1)))


def test_a_duplicate_answer_is_accepted_once(
    start: StartServer, dialler: Dialler, recorder: Recorder, tmp_path: Path
) -> None:
    server = start()
    site, other = Site(dialler, server, "site-1"), Site(dialler, server, "site-2")
    job_id = submit(server, tmp_path, workflow=WorkflowSpec("fedavg", {"rounds": 1}))
    task = site.task()

    site.send(answer(task, w(2)))
    site.send(answer(task, w(2)))
    site.send(answer(task, w(100)))
    other.send(answer(other.task(), w(4)))

    record = outcome(server, job_id)
    assert read_safetensors(wait(tensor_file(server, job_id, record.result))) == w(3)
    assert sorted(context.peer for context in recorder.of(EventType.RESULT_ACCEPTED)) == ["site-1", "site-2"]


def test_a_stale_answer_is_refused(start: StartServer, dialler: Dialler, tmp_path: Path) -> None:
    server = start()
    site, other = Site(dialler, server, "site-1"), Site(dialler, server, "site-2")
    workflow = WorkflowSpec("fedavg", {"rounds": 2, "fraction": 0.5, "over_selection": 1.0})
    submit(server, tmp_path, workflow=workflow)
    late = site.task()
    other.send(answer(other.task(), w(1)))  # enough for the round, which ends without the other
    assert site.job is not None
    site.job.told(Channel.TASK, "cancelled")
    following = site.task()
    assert (late.key.round, following.key.round) == (1, 2)
    assert server.task_meta_info("site-1").round == 2

    refused = site.refused(answer(late, w(5)))

    assert "site-1 sent a stale answer: task 'train' of round 1" in refused.reason
    site.send(answer(following, w(7)))


def test_an_answer_to_a_task_that_nobody_asked_is_stale(start: StartServer, dialler: Dialler, tmp_path: Path) -> None:
    server = start()
    site = Site(dialler, server, "site-1")
    submit(server, tmp_path, min_clients=1)
    key = site.task().key

    from_nowhere = TaskResult(type(key)(1, "train", 9, key.client), UpdateRef(small(w(1)), 1))
    assert "was not issued to site-1" in site.refused(from_nowhere).reason


def test_nobody_answers_for_another(start: StartServer, dialler: Dialler, tmp_path: Path) -> None:
    server = start()
    site, other = Site(dialler, server, "site-1"), Site(dialler, server, "site-2")
    submit(server, tmp_path)
    theirs = other.task()
    site.task()

    refused = site.refused(answer(theirs, w(1)))

    assert "site-1 may not answer for site-2" in refused.reason
    other.send(answer(theirs, w(1)))


def test_a_clients_agent_and_a_strangers_stream_answer_no_task(
    start: StartServer, dialler: Dialler, tmp_path: Path
) -> None:
    server = start()
    site = Site(dialler, server, "site-1")
    submit(server, tmp_path, min_clients=1)
    task = site.task()

    for wire in (site.wire, dialler.stranger(server, "site-3")):
        refused = wire.refused(Channel.TASK, "result", answer(task, w(1)))
        assert "may not send task/result" in refused.reason
    assert site.job is not None
    assert "may not send run/attach" in site.job.refused(Channel.RUN, "attach", Attach()).reason


def test_a_fault_is_an_answer_and_its_reason_is_the_jobs(start: StartServer, dialler: Dialler, tmp_path: Path) -> None:
    server = start()
    site = Site(dialler, server, "site-1", train=faulty("ValueError: no such column (train.py:3)"))
    job_id = submit(server, tmp_path, min_clients=1)

    record = outcome(server, job_id)

    assert (record.state, record.code) == (JobState.FAILED, "too-few-clients")
    assert "ValueError: no such column (train.py:3)" in record.reason
    assert (record.client, record.cause, record.log_tail) == ("site-1", "training-failed", "Traceback ...")
    assert site.outcome() is None


def test_what_training_logs_is_passed_on_and_belongs_to_its_sender(
    start: StartServer, dialler: Dialler, tmp_path: Path
) -> None:
    server = start()
    site = Site(dialler, server, "site-1")
    job_id = submit(server, tmp_path, min_clients=1)
    task = site.task()
    ada = dialler.site(server, "ada@demo")
    on_loop(lambda: server.jobs.board.watch(job_id, ada.fqcn))
    assert site.job is not None

    site.job.tell(Channel.TASK, "metrics", LogMetrics(task.key, 3, {"loss": 0.5}))

    event = ada.told(Channel.ADMIN, "job.event")
    assert (event.kind, event.client, event.round, event.metrics) == ("metrics", "site-1", 1, {"loss": 0.5})
