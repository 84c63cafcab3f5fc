import subprocess
import sys
import threading
from contextvars import copy_context

import numpy as np
import pytest

import hanse.client
from hanse.client.api import OutOfTurn, OutsideJob, ReceivedTask, Site, session_of
from hanse.client.task import TaskContext
from hanse.ids import ClientName, JobId
from hanse.messages import Metrics
from hanse.model import Model, ModelInvalid, Update

CLIENT, JOB = ClientName("site-1"), JobId("job-1")


class FakeSession:
    """A session with the tasks that it is given."""

    def __init__(self, *tasks: ReceivedTask) -> None:
        self.site = Site(CLIENT, JOB, {"lr": 0.1}, {"data": "/data"}, seed=7)
        self.tasks = list(tasks)
        self.task: ReceivedTask | None = None
        self.sent: list[Update] = []

    def wait_task(self) -> bool:
        return bool(self.tasks)

    def receive(self) -> ReceivedTask:
        self.task = self.tasks.pop(0)
        return self.task

    def send(self, update: Update) -> None:
        self.task = None
        self.sent.append(update)


def task(round_number: int, logged: list[tuple[int, Metrics]] | None = None) -> ReceivedTask:
    log = logged if logged is not None else []
    ctx = TaskContext(CLIENT, JOB, round_number, "train", {"lr": 0.1}, {}, 7, lambda step, m: log.append((step, m)))
    return ReceivedTask(Model({"w": np.zeros(2, np.float32)}), ctx)


def test_the_four_lines_drive_a_loop_to_its_end() -> None:
    session = FakeSession(task(1), task(2))
    with session_of(session):
        while hanse.client.is_running():
            received = hanse.client.receive()
            hanse.client.send({"w": received.model["w"] + received.round}, num_examples=5, metrics={"loss": 0.5})

    assert [update.model for update in session.sent] == [Model({"w": np.full(2, n, np.float32)}) for n in (1, 2)]
    assert {(update.num_examples, update.metrics["loss"]) for update in session.sent} == {(5, 0.5)}


def test_received_task_tells_its_round_name_configuration_and_randomness() -> None:
    received = task(3)

    assert (received.round, received.name, received.config) == (3, "train", {"lr": 0.1})
    assert received.rng().random() == received.ctx.rng().random()


def test_site_is_what_init_returns() -> None:
    with session_of(FakeSession()):
        assert hanse.client.init() == Site(CLIENT, JOB, {"lr": 0.1}, {"data": "/data"}, seed=7)


def test_model_may_be_a_model_or_missing() -> None:
    session = FakeSession()
    model = Model({"w": [1.0]})
    with session_of(session):
        hanse.client.send(model, num_examples=1)
        hanse.client.send(num_examples=2, metrics={"accuracy": 1.0})

    assert session.sent == [Update(model, 1), Update(None, 2, {"accuracy": 1.0})]


def test_what_is_no_model_is_refused_before_it_is_sent() -> None:
    session = FakeSession()
    with session_of(session):
        with pytest.raises(ModelInvalid, match="num_examples"):
            hanse.client.send(num_examples=-1)
        with pytest.raises(ModelInvalid, match="dtype"):
            hanse.client.send({"w": ["text"]}, num_examples=1)

    assert session.sent == []


def test_metrics_are_logged_for_the_task_in_hand_only() -> None:
    logged: list[tuple[int, Metrics]] = []
    with session_of(FakeSession(task(1, logged))):
        with pytest.raises(OutOfTurn, match="between receive and send"):
            hanse.client.log({"loss": 1.0})
        hanse.client.receive()
        hanse.client.log({"loss": 0.5}, step=4)

    assert logged == [(4, {"loss": 0.5})]


@pytest.mark.parametrize("function", ["init", "is_running", "receive", "log", "send"])
def test_outside_a_job_each_function_says_so_in_one_sentence(function: str) -> None:
    arguments: dict[str, tuple[object, ...]] = {"log": ({"loss": 1.0},)}
    with pytest.raises(OutsideJob, match=rf"hanse\.client\.{function} was called outside a running job; submit"):
        getattr(hanse.client, function)(
            *arguments.get(function, ()), **({"num_examples": 1} if function == "send" else {})
        )


def test_each_thread_has_the_session_that_it_opened() -> None:
    outcomes: list[object] = []

    def other() -> None:
        try:
            outcomes.append(hanse.client.init())
        except OutsideJob as error:
            outcomes.append(error.function)

    with session_of(FakeSession()):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert copy_context().run(hanse.client.init).name == CLIENT
    assert outcomes == ["init"]


def test_names_for_authors_are_loaded_on_first_use_so_that_an_idle_agent_has_no_numpy() -> None:
    program = (
        "import sys, hanse.client\n"
        "assert 'numpy' not in sys.modules\n"
        "assert set(hanse.client.__all__) <= set(dir(hanse.client))\n"
        "assert all(getattr(hanse.client, name) for name in hanse.client.__all__)\n"
        "assert 'numpy' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'connect'"):
        hanse.client.connect  # noqa: B018 - the access raises
