"""Jobs over the wire: submitted, deployed, started, answered, committed, ended, and what is refused on the way."""

import asyncio
import errno
import itertools
import os
import queue
import threading
from collections.abc import Callable, Collection, Iterable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hanse.codes import CODES
from hanse.coordination.waiting import (
    END_TRIED_AGAIN,
    GIVEN_UP,
    HINDERED,
    IF_NEEDED,
    NOT_TOLD_YET,
    SCHEDULED_AGAIN,
    TakingUp,
)
from hanse.errors import (
    Conflict,
    HanseError,
    JobInvalid,
    NoSpace,
    NotFound,
    NotInService,
    NotStarted,
    SiteRefused,
    StoreFailed,
    TensorDamaged,
    Unauthenticated,
)
from hanse.events import EventType, Refused
from hanse.ids import SERVER, ClientName, Digest, JobId, job_cell
from hanse.job import JobRecord, JobState, Resources, WorkflowSpec
from hanse.launch.long_logs import TAIL_BYTES
from hanse.launch.process import Handle
from hanse.messages import (
    AbortJob,
    Attach,
    Channel,
    CommitRound,
    DeployJob,
    Header,
    Heartbeat,
    HeartbeatReply,
    JobCredentials,
    JobEnded,
    JobFailure,
    JobSubmitted,
    LogMetrics,
    Message,
    ModelRef,
    Quit,
    ReturnCode,
    RunEnded,
    RunSnapshot,
    StartJob,
    SubmitJob,
    TaskAssignment,
    TaskFault,
    TaskKey,
    TaskResult,
    TensorRef,
    UpdateRef,
    Waiting,
)
from hanse.model import Model
from hanse.run.server_link import ServerLink
from hanse.server import FederatedServer
from hanse.server.active_run import ActiveRun
from hanse.server.client_processes import DEPLOY_TIMEOUT_S
from hanse.server.federated_server import TaskMetaInfo
from hanse.server.payloads import expect
from hanse.server.run_folder import RunFolder
from hanse.server.run_journal import RunJournal
from hanse.server.take_up import FETCH_WITHIN_S
from hanse.storage.memory import MemoryStore
from hanse.storage.models import allocate, read_safetensors, write_safetensors
from hanse.storage.tensors import TensorFiles, digest_of

from ..launch.much import MUCH, is_too_long, log_much
from .job_world import (
    Large,
    ScriptedLauncher,
    Site,
    Submissions,
    Threads,
    answer,
    faulty,
    opened,
    outcome,
    package,
    plus,
    silent,
    small,
    spec,
    submit,
)
from .world import (
    PROJECT,
    Dialler,
    Recorder,
    args,
    credentials_in,
    names,
    on_loop,
    register_secure,
    request,
    settings,
    target_of,
    transferring,
    wait,
)

MakeServer = Callable[..., FederatedServer]
StartServer = Callable[..., FederatedServer]


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


NO_SPACE = NoSpace("taking space", disk="/disk", folder="/disk/runs", why="No space left on device")


@pytest.fixture
def start(deployed: MakeServer, recorder: Recorder, tmp_path: Path) -> StartServer:
    """``start(**settings)``: a deployed server whose runs are threads."""

    def make(workspace: Path = tmp_path / "ws", launcher: Any = None, **more: Any) -> FederatedServer:
        arguments = args(workspace, launcher=launcher or Threads(), settings=settings(**more))
        return deployed(arguments=arguments, handlers=[recorder])

    return make


def w(value: float) -> Model:
    return Model({"w": np.full(3, value, np.float32), "b": np.asarray(value, np.float32)})


# a whole job ----------------------------------------------------------------------------------------------------------


def test_a_whole_job_over_the_wire(deployed: MakeServer, dialler: Dialler, recorder: Recorder, tmp_path: Path) -> None:
    launcher = Threads()
    server = deployed(
        arguments=args(tmp_path / "ws", launcher=launcher), handlers=[recorder], cmd_modules=[Submissions()]
    )
    sites = [
        Site(dialler, server, "site-1", train=plus(1)),
        Site(dialler, server, "site-2", train=plus(4, num_examples=2)),
    ]
    ada = dialler.site(server, "ada@demo")
    tls = dialler.tls(dialler.project.admin("ada@demo"))

    data = package(tmp_path, spec()).read_bytes()
    digest = digest_of(data)
    with transferring(ada, target_of(server), tls) as transfers:
        wait(transfers.upload("upload", digest, memoryview(data)))
        submitted = ada.ask(Channel.ADMIN, "job.submit", SubmitJob(digest, len(data))).payload
        assert isinstance(submitted, JobSubmitted)
        record = outcome(server, submitted.job_id)
        into = TensorFiles(tmp_path / "fetched")
        wait(
            transfers.download(
                f"result/{record.job_id}",
                record.result,
                record.result_bytes,
                into.begin(record.result, record.result_bytes),
            )
        )

    assert (record.state, record.code, record.reason) == (JobState.COMPLETED, "", "")
    assert (record.submitter, record.clients) == ("ada@demo", ("site-1", "site-2"))
    assert read_safetensors(into.path(record.result)) == w(6)  # twice the mean of 1 and twice 4
    for site in sites:
        deployed_job = site.wire.told(Channel.JOB, "deploy")
        assert isinstance(deployed_job, DeployJob)
        assert (deployed_job.job_id, deployed_job.submitter) == (record.job_id, "ada@demo")
        assert (deployed_job.package, deployed_job.package_bytes) == (digest, len(data))
        assert site.attempts == [1]
        assert site.outcome() is None
        assert site.outcome() is None
        assert site.wire.told(Channel.JOB, "abort") == AbortJob(record.job_id, "completed")
    assert [thread.spec.job_id for thread in launcher.started] == [record.job_id]
    view = wait(server.jobs.board.view(record.job_id))
    assert [(entry.round, entry.answered) for entry in view.history] == [
        (0, ()),
        (1, ("site-1", "site-2")),
        (2, ("site-1", "site-2")),
    ]
    (listed,) = wait(server.jobs.board.views())
    assert (listed.round, listed.metrics, listed.history) == (2, view.metrics, ())
    once = {
        EventType.JOB_SUBMITTED, EventType.BEFORE_JOB_LAUNCH, EventType.JOB_DEPLOYED, EventType.JOB_STARTED,
        EventType.JOB_COMPLETED,
    }  # fmt: skip
    assert [kind for kind in recorder.kinds if kind in once] == [
        EventType.JOB_SUBMITTED,
        EventType.BEFORE_JOB_LAUNCH,
        EventType.JOB_DEPLOYED,
        EventType.JOB_STARTED,
        EventType.JOB_COMPLETED,
    ]
    assert [context.round for context in recorder.of(EventType.ROUND_STARTED)] == [1, 2]
    assert [context.round for context in recorder.of(EventType.ROUND_DONE)] == [0, 1, 2]
    assert [context.metrics for context in recorder.of(EventType.ROUND_DONE)] == [
        entry.metrics for entry in view.history
    ]
    for kind in (
        EventType.BEFORE_TASK_DATA,
        EventType.TASK_SENT,
        EventType.BEFORE_TASK_RESULT,
        EventType.RESULT_ACCEPTED,
    ):
        assert sorted((context.round, context.peer) for context in recorder.of(kind)) == [
            (1, "site-1"),
            (1, "site-2"),
            (2, "site-1"),
            (2, "site-2"),
        ]


def test_the_package_is_fetched_by_those_who_take_part_and_nobody_else(
    start: StartServer, dialler: Dialler, tmp_path: Path
) -> None:
    server = start(launcher=on_loop(ScriptedLauncher))
    site = Site(dialler, server, "site-1", starts=False)
    outsider = Site(dialler, server, "site-2", starts=False)
    job_id = submit(server, tmp_path, min_clients=1, clients=("site-1",))
    job = site.wire.told(Channel.JOB, "deploy")

    def missing(by: Site, scope: str) -> list[Digest]:
        tls = dialler.tls(dialler.project.site(by.name))
        with transferring(by.wire, target_of(server), tls) as transfers:
            return wait(transfers.missing(scope, [job.package]))

    assert missing(site, f"job/{job_id}") == []
    for by, scope in ((outsider, f"job/{job_id}"), (site, "job/another"), (site, f"result/{job_id}"), (site, "upload")):
        with pytest.raises(HanseError, match="may not read tensors"):
            missing(by, scope)
    with pytest.raises(HanseError, match="may not write tensors"):
        upload(site.wire, server, dialler, f"job/{job_id}", b"code")


def upload(wire: Any, server: FederatedServer, dialler: Dialler, scope: str, data: bytes, tls: Any = None) -> Digest:
    tls = tls or dialler.tls(dialler.project.site(wire.fqcn.partition(".")[0]))
    digest = digest_of(data)
    with transferring(wire, target_of(server), tls) as transfers:
        wait(transfers.upload(scope, digest, memoryview(data)))
    return digest


def test_tensors_too_large_to_ride_along_move_by_digest(start: StartServer, dialler: Dialler, tmp_path: Path) -> None:
    server = start()
    site = Site(dialler, server, "site-1")
    job_id = submit(
        server, tmp_path, min_clients=1, model="tiny_model:large", workflow=WorkflowSpec("fedavg", {"rounds": 1})
    )
    task = site.task()
    assert site.job is not None
    assert task.model is not None
    (tensor,) = task.model.tensors
    assert tensor.inline is None
    tls = site.job._tls
    files = TensorFiles(tmp_path / "site")
    with transferring(site.job, target_of(server), tls) as transfers:
        wait(
            transfers.download(
                f"job/{job_id}", tensor.digest, tensor.size_bytes, files.begin(tensor.digest, tensor.size_bytes)
            )
        )
    assert not np.frombuffer(files.map(tensor.digest), np.float32).any()

    data = np.full(10_000, 2, np.float32).tobytes()
    update = UpdateRef(ModelRef((TensorRef("w", "float32", (10_000,), digest_of(data)),)), 1)
    missing = site.refused(TaskResult(task.key, update))
    assert missing.reason == f"update is 'digest {digest_of(data)} without a file'; expected uploaded tensors"
    upload(site.job, server, dialler, f"job/{job_id}", data, tls)
    site.send(TaskResult(task.key, update))

    record = outcome(server, job_id)
    assert record.state is JobState.COMPLETED, record.reason
    result = read_safetensors(wait(_path(server, job_id, record.result)))
    assert result == Model({"w": np.full(10_000, 2, np.float32)})
    assert not list((tmp_path / "ws" / "runs" / job_id / "tensors").glob("*"))


@pytest.mark.parametrize("is_whole", [False, True], ids=["without-its-bytes", "that-may-not-be-on-the-disk"])
def test_a_result_that_an_earlier_process_has_left_is_written_anew(
    start: StartServer, dialler: Dialler, tmp_path: Path, is_whole: bool
) -> None:
    server = start()
    site = Site(dialler, server, "site-1")
    write_safetensors(w(2), tmp_path / "expected")
    expected = (tmp_path / "expected").read_bytes()
    job_id = submit(server, tmp_path, min_clients=1, workflow=WorkflowSpec("fedavg", {"rounds": 1}))
    task = site.task()
    left = server.jobs.run_folder(job_id).result / digest_of(expected)
    left.parent.mkdir()
    left.write_bytes(expected if is_whole else bytes(len(expected)))  # by a process that could not sync it
    state = left.stat()

    site.send(answer(task, w(2)))

    record = outcome(server, job_id)
    assert (record.state, record.result) == (JobState.COMPLETED, digest_of(expected))
    result = wait(_path(server, job_id, record.result))
    assert result.read_bytes() == expected
    assert result.stat().st_mtime_ns != state.st_mtime_ns
    assert list(result.parent.iterdir()) == [result]


async def _path(server: FederatedServer, job_id: JobId, digest: Digest) -> Path:
    return (await server.jobs.files.result_files(job_id)).path(digest)


# answers --------------------------------------------------------------------------------------------------------------


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
    assert read_safetensors(wait(_path(server, job_id, record.result))) == w(3)
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


# gates ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [Refused("not today"), ZeroDivisionError("not today")])
def test_a_handler_may_refuse_a_submission(
    start: StartServer, recorder: Recorder, tmp_path: Path, error: Exception
) -> None:
    server = start()
    recorder.raising[EventType.JOB_SUBMITTED] = error

    with pytest.raises(JobInvalid, match="not today"):
        submit(server, tmp_path)
    assert wait(server.jobs.board.views()) == []
    assert not list((tmp_path / "ws" / "runs").iterdir())


@pytest.mark.parametrize("error", [Refused("not today"), ZeroDivisionError("not today")])
def test_a_handler_may_refuse_a_launch(
    start: StartServer, dialler: Dialler, recorder: Recorder, tmp_path: Path, error: Exception
) -> None:
    server = start()
    recorder.raising[EventType.BEFORE_JOB_LAUNCH] = error
    site = Site(dialler, server, "site-1")
    job_id = submit(server, tmp_path, min_clients=1)

    record = outcome(server, job_id)

    assert (record.state, record.code) == (JobState.FAILED, "launch-refused")
    assert "not today" in record.reason
    assert site.wire.told_nothing(Channel.JOB, "deploy")


@pytest.mark.parametrize("error", [Refused("not today"), ZeroDivisionError("not today")])
def test_a_handler_may_refuse_to_send_a_task(
    start: StartServer, dialler: Dialler, recorder: Recorder, tmp_path: Path, error: Exception
) -> None:
    server = start()
    recorder.raising[EventType.BEFORE_TASK_DATA] = error
    site = Site(dialler, server, "site-1", train=plus(1))
    job_id = submit(server, tmp_path, min_clients=1)

    record = outcome(server, job_id)

    assert record.state is JobState.FAILED
    assert "not today" in record.reason
    assert site.started().told_nothing(Channel.TASK, "task")
    assert recorder.of(EventType.TASK_SENT) == []


@pytest.mark.parametrize("error", [Refused("not today"), ZeroDivisionError("not today")])
def test_a_handler_may_refuse_an_answer(
    start: StartServer, dialler: Dialler, recorder: Recorder, tmp_path: Path, error: Exception
) -> None:
    server = start()
    recorder.raising[EventType.BEFORE_TASK_RESULT] = error
    site = Site(dialler, server, "site-1", train=plus(1))
    job_id = submit(server, tmp_path, min_clients=1)

    refused = site.outcome()

    assert refused is not None
    assert "not today" in refused.reason
    record = outcome(server, job_id)
    assert record.state is JobState.FAILED
    assert "not today" in record.reason


# how jobs do not begin ------------------------------------------------------------------------------------------------


def test_a_job_says_what_it_waits_for_and_until_when(start: StartServer, dialler: Dialler, tmp_path: Path) -> None:
    server = start()
    Site(dialler, server, "site-1")
    job_id = submit(server, tmp_path, start_within_s=1000.0)

    view = wait(server.jobs.board.view(job_id))
    assert view.state == "submitted"
    (waiting,) = view.waiting
    assert waiting.what == "1 of the 2 clients that the job needs can take it"
    assert (waiting.since, waiting.until) == (view.submitted_at, pytest.approx(view.submitted_at + 1000))
    assert waiting.then == "the job is given up (no-clients)"


def test_a_running_job_says_for_whom_it_waits_and_how_each_of_them_stands(
    start: StartServer, dialler: Dialler, tmp_path: Path
) -> None:
    server = start()
    site, other = Site(dialler, server, "site-1"), Site(dialler, server, "site-2")
    job_id = submit(server, tmp_path)
    began = wait(server.jobs.board.view(job_id)).started_at
    site.task()
    other.send(answer(other.task(), w(1)))

    (waiting,) = wait(server.jobs.board.view(job_id)).waiting
    assert waiting.what == "answers to 'train' of round 1 from 1 of 2 clients"
    (awaited,) = waiting.whom
    assert (awaited.name, awaited.state, awaited.attempt) == ("site-1", "running", 1)
    assert began <= awaited.since
    assert began <= waiting.since

    assert site.job is not None
    gone = threading.Event()
    on_loop(lambda: server.jobs.services.cell.on_link_down(lambda peer, reason: gone.set()))
    wait(site.job.close())
    assert gone.wait(20)
    (awaited,) = wait(server.jobs.board.view(job_id)).waiting[0].whom
    assert (awaited.name, awaited.state) == ("site-1", "suspect")


def test_a_job_that_is_being_deployed_waits_for_those_that_have_not_taken_it(
    start: StartServer, dialler: Dialler, tmp_path: Path
) -> None:
    server = start()
    fetching, fetched = threading.Event(), asyncio.Event()
    site = Site(dialler, server, "site-1")

    async def slowly(message: Message) -> None:
        fetching.set()
        await fetched.wait()

    site.wire.cell.on(Channel.JOB, "deploy", slowly)
    job_id = submit(server, tmp_path, min_clients=1)
    assert fetching.wait(20)

    view = wait(server.jobs.board.view(job_id))

    assert view.state == "scheduled"
    (waiting,) = view.waiting
    assert [client.name for client in waiting.whom] == ["site-1"]
    assert waiting.until == waiting.since + DEPLOY_TIMEOUT_S
    on_loop(fetched.set)
    site.started()


def test_a_job_that_runs_is_shown_while_the_store_is_away(
    start: StartServer, dialler: Dialler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start()
    site = Site(dialler, server, "site-1")
    job_id = submit(server, tmp_path, min_clients=1)
    task = site.task()
    store = server.jobs.services.store

    async def away(*_: object, **__: object) -> None:
        raise StoreFailed("using the database", "no route to host")

    with monkeypatch.context() as patched:
        for method in ("job", "jobs", "rounds", "last_round"):
            patched.setattr(store, method, away)
        view = wait(server.jobs.board.view(wait(server.jobs.board.find("tiny"))))
        with pytest.raises(StoreFailed):
            wait(server.jobs.board.view(JobId("another")))
        with pytest.raises(StoreFailed):
            wait(server.jobs.board.find("another"))

    assert (view.job_id, view.state, view.round) == (job_id, "running", 0)
    store_waiting, clients = view.waiting
    assert "no route to host" in store_waiting.what
    assert [client.name for client in clients.whom] == ["site-1"]
    site.send(answer(task, w(1)))
    site.task()
    assert [waiting.what[:10] for waiting in wait(server.jobs.board.view(job_id)).waiting] == ["answers to"]


def test_a_run_that_needs_nothing_of_the_store_outlives_it_that_people_could_not_look_it_up(
    start: StartServer, dialler: Dialler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start(mend_within_s=0.05)
    site, other = Site(dialler, server, "site-1"), Site(dialler, server, "site-2")
    job_id = submit(server, tmp_path, workflow=WorkflowSpec("fedavg", {"rounds": 1}))
    task = site.task()
    other.send(answer(other.task(), w(1)))  # when that is accepted, nothing is being written any more

    async def away(*_: object, **__: object) -> None:
        raise StoreFailed("using the database", "no route to host")

    with monkeypatch.context() as patched:
        patched.setattr(server.jobs.services.store, "job", away)
        store_waiting, _ = wait(server.jobs.board.view(job_id)).waiting
    assert store_waiting.then == IF_NEEDED
    assert [waiting.what[:10] for waiting in wait(server.jobs.board.view(job_id)).waiting] == ["answers to"]
    wait(asyncio.sleep(0.2))  # timers of one loop are due in their order
    site.send(answer(task, w(1)))

    assert outcome(server, job_id).state is JobState.COMPLETED


def test_a_run_whose_rounds_the_store_does_not_take_for_too_long_fails_for_that_reason(
    start: StartServer, dialler: Dialler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start(mend_within_s=0.2)
    site = Site(dialler, server, "site-1")
    job_id = submit(server, tmp_path, min_clients=1)
    task = site.task()

    async def away(*_: object, **__: object) -> None:
        raise StoreFailed("committing a round", "no route to host")

    monkeypatch.setattr(server.jobs.services.store, "commit_round", away)
    site.send(answer(task, w(1)))

    record = outcome(server, job_id)
    assert (record.state, record.code) == (JobState.FAILED, "store-failed")
    assert "no route to host" in record.reason


def test_a_run_whose_process_asks_anew_where_it_stands_has_no_more_time_for_what_is_not_written(
    start: StartServer, dialler: Dialler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hanse.run.server_link.Backoff.next_s", lambda _: 0.05)
    server = start(mend_within_s=1.0)
    site = Site(dialler, server, "site-1")
    job_id = submit(server, tmp_path, min_clients=1)
    task, services = site.task(), server.jobs.services

    async def away(*_: object, **__: object) -> None:
        services.cell.drop(job_cell(SERVER, job_id), NotInService())
        raise StoreFailed("committing a round", "no route to host")

    monkeypatch.setattr(services.store, "commit_round", away)
    site.send(answer(task, w(1)))

    assert outcome(server, job_id).code == "store-failed"


def test_a_run_whose_disk_lets_go_of_nothing_for_too_long_fails_for_that_reason(
    start: StartServer, dialler: Dialler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start(mend_within_s=0.2)
    site = Site(dialler, server, "site-1")
    job_id = submit(server, tmp_path, min_clients=1)
    task = site.task()

    def away(*_: object) -> None:
        raise StoreFailed("setting tensors aside", "Input/output error")

    monkeypatch.setattr(TensorFiles, "set_aside", away)
    site.send(answer(task, w(1)))

    record = outcome(server, job_id)
    assert (record.state, record.code) == (JobState.FAILED, "store-failed")
    assert "Input/output error" in record.reason


@pytest.mark.parametrize("what", ["a client's word", "what is done for the run"])
def test_an_end_that_the_store_does_not_take_is_told_of_and_when_it_is_asked_again(
    what: str, start: StartServer, dialler: Dialler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hanse.server.active_run.STORE_PAUSE_S", 0.1)
    server = start()
    site = Site(dialler, server, "site-1")
    job_id = submit(server, tmp_path, min_clients=1)
    site.task()
    store, refused = server.jobs.services.store, threading.Semaphore(0)
    end_run, is_away = store.end_run, threading.Event()

    async def broken(run: ActiveRun) -> None:
        raise StoreFailed("handing out a task", "boom")

    is_away.set()

    async def ended(*arguments: Any, **more: Any) -> None:
        if is_away.is_set():
            refused.release()
            raise StoreFailed("ending a run", "no route to host")
        await end_run(*arguments, **more)

    monkeypatch.setattr(store, "end_run", ended)
    if what == "a client's word":
        site.wire.ask(Channel.SERVER, "job_failure", JobFailure(job_id, "exception", "boom"))
    else:
        monkeypatch.setattr(ActiveRun, "hand_out_again", broken)
        server.reset_tokens()
    for _ in range(2):  # at its second refusal all is done that follows the first
        assert refused.acquire(timeout=20)

    waiting, *_ = wait(server.jobs.board.view(job_id)).waiting
    is_away.clear()

    assert "no route to host" in waiting.what
    assert waiting.since < waiting.until < waiting.since + 20
    assert waiting.then == END_TRIED_AGAIN
    assert "boom" in outcome(server, job_id).reason


def test_a_job_whose_end_the_store_does_not_take_does_not_keep_the_schedule_asking(
    start: StartServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start()
    refused: queue.Queue[JobId] = queue.Queue()

    async def full(epoch: int, record: JobRecord, **_: object) -> None:
        refused.put(record.job_id)
        raise NO_SPACE

    monkeypatch.setattr(server.jobs.services.store, "end_run", full)
    job_id = submit(server, tmp_path, start_within_s=0.01)
    assert refused.get(timeout=20) == job_id

    for _ in range(10):  # what the schedule does at once, it has done by then
        wait(server.jobs.board.view(job_id))

    assert refused.empty()
    view = wait(server.jobs.board.view(job_id))
    assert {waiting.until > server.jobs.services.wall() for waiting in view.waiting} == {True}


@pytest.mark.parametrize("state", [JobState.SCHEDULED, JobState.RUNNING])
def test_a_job_that_the_store_does_not_let_begin_says_so_and_begins_as_soon_as_it_does(
    state: JobState, start: StartServer, dialler: Dialler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hanse.server.jobs.POSTPONED_S", 0.01)
    server = start()
    store, refused = server.jobs.services.store, threading.Semaphore(0)
    replace_job, is_full = store.replace_job, threading.Event()
    is_full.set()

    async def replaced(epoch: int, record: JobRecord, **more: Any) -> None:
        if record.state is state and is_full.is_set():
            refused.release()
            raise NoSpace("using the database", disk="/", folder="/hanse", why="No space left on device")
        await replace_job(epoch, record, **more)

    monkeypatch.setattr(store, "replace_job", replaced)
    site = Site(dialler, server, "site-1")
    job_id = submit(server, tmp_path, min_clients=1, start_within_s=1000.0)
    for _ in range(2):  # at its second refusal all is done that follows the first
        assert refused.acquire(timeout=20)

    view = wait(server.jobs.board.view(job_id))

    assert view.state == ("submitted" if state is JobState.SCHEDULED else "scheduled")
    (waiting,) = view.waiting
    assert "No space left on device" in waiting.what
    assert view.submitted_at <= waiting.since <= server.jobs.services.wall()
    if state is JobState.SCHEDULED:
        assert waiting.until == view.submitted_at + 1000.0
        assert waiting.then == f"{GIVEN_UP}, as soon as the store takes note of that"
    else:
        assert (waiting.until, waiting.then) == (waiting.since + server.jobs.services.mend_within_s, HINDERED)
    is_full.clear()
    site.task()
    assert [each.what for each in wait(server.jobs.board.view(job_id)).waiting] == [
        "answers to 'train' of round 1 from 1 of 1 client"
    ]


def test_a_job_whose_package_cannot_be_had_is_given_up_in_time_and_says_so_before(
    start: StartServer, dialler: Dialler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hanse.server.jobs.POSTPONED_S", 0.01)
    asked, is_away = threading.Event(), asyncio.Event()

    async def away(folder: RunFolder, record: JobRecord) -> None:
        asked.set()
        await is_away.wait()
        raise StoreFailed("fetching a package from the bucket", "no route to host")

    monkeypatch.setattr(RunFolder, "have_package", away)
    server = start()
    Site(dialler, server, "site-1")
    job_id = submit(server, tmp_path, min_clients=1, start_within_s=0.000_001)
    assert asked.wait(20)

    view = wait(server.jobs.board.view(job_id))
    on_loop(is_away.set)

    assert view.state == "scheduled"
    (waiting,) = view.waiting
    assert waiting.what == "the server to have the job's package"
    assert (waiting.until - waiting.since, waiting.then) == (FETCH_WITHIN_S, SCHEDULED_AGAIN)
    assert waiting.since >= view.submitted_at
    record = outcome(server, job_id)
    assert (record.state, record.code) == (JobState.FAILED, "store-failed")
    assert "no route to host" in record.reason


def test_a_job_starts_when_its_clients_have_come(start: StartServer, dialler: Dialler, tmp_path: Path) -> None:
    server = start()
    Site(dialler, server, "site-1", train=plus(1))
    job_id = submit(server, tmp_path)

    Site(dialler, server, "site-2", train=plus(1))

    assert outcome(server, job_id).state is JobState.COMPLETED


def test_a_job_that_waits_in_vain_fails_with_what_it_waited_for(start: StartServer, tmp_path: Path) -> None:
    server = start()

    record = outcome(server, submit(server, tmp_path, start_within_s=0.05))

    assert (record.state, record.code) == (JobState.FAILED, "no-clients")
    assert "client" in record.reason


def test_a_sites_refusal_reaches_the_submitter(start: StartServer, dialler: Dialler, tmp_path: Path) -> None:
    server = start()
    Site(dialler, server, "site-1")
    Site(dialler, server, "site-2", refuses=SiteRefused("site-2", "code that comes with a job may not run here"))

    record = outcome(server, submit(server, tmp_path))

    assert (record.state, record.code, record.client) == (JobState.FAILED, "site-refused", "site-2")
    assert record.reason == "site-2 refused the job: code that comes with a job may not run here"


def test_a_disk_that_is_full_at_a_site_is_waited_for_and_then_what_the_job_failed_of(
    start: StartServer, dialler: Dialler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start()
    postponed, plan = threading.Event(), server.jobs._plan

    async def planned() -> float | None:
        delay = await plan()
        if server.jobs._postponed:
            postponed.set()
        return delay

    monkeypatch.setattr(server.jobs, "_plan", planned)
    full = NoSpace("receiving a package", disk="/", folder="/hanse", why="No space left on device")
    Site(dialler, server, "site-1", refuses=full)
    waiting_job = submit(server, tmp_path, min_clients=1)
    assert postponed.wait(20)
    view = wait(server.jobs.board.view(waiting_job))
    assert view.state == "submitted"
    assert view.waiting[0].what == f"{full.reason} (at site-1)"
    assert view.waiting[0].until == view.submitted_at + 60
    assert view.waiting[0].then == "the job is given up (no-space)"

    record = outcome(server, submit(server, tmp_path, min_clients=1, start_within_s=0.000_001))

    assert (record.code, record.client) == ("no-space", "site-1")
    assert record.reason == f"{full.reason} (at site-1)"


def test_a_job_runs_without_a_site_that_refuses_where_enough_are_left(
    start: StartServer, dialler: Dialler, tmp_path: Path
) -> None:
    server = start()
    Site(dialler, server, "site-1", train=plus(1))
    Site(dialler, server, "site-2", refuses=SiteRefused("site-2", "no"))

    record = outcome(server, submit(server, tmp_path, min_clients=1))

    assert (record.state, record.clients) == (JobState.COMPLETED, ("site-1",))


def test_what_the_jobs_code_raises_fails_the_job_with_its_reason(
    start: StartServer, dialler: Dialler, tmp_path: Path
) -> None:
    server = start()
    Site(dialler, server, "site-1")

    record = outcome(server, submit(server, tmp_path, min_clients=1, model="tiny_model:broken"))

    assert (record.state, record.code) == (JobState.FAILED, "workflow-failed")
    assert "RuntimeError: no such data" in record.reason


def test_an_exception_that_says_more_than_fits_into_a_message_ends_the_run_as_any_other(
    start: StartServer, dialler: Dialler, tmp_path: Path
) -> None:
    server = start()
    Site(dialler, server, "site-1", train=plus(1))

    record = outcome(server, submit(server, tmp_path, min_clients=1, process_tries=1, model="tiny_model:loud"))

    assert "RuntimeError: xxx" in record.reason
    assert record.code == "workflow-failed"


def test_a_model_that_cannot_be_imported_fails_the_job_and_is_named(
    start: StartServer, dialler: Dialler, tmp_path: Path
) -> None:
    server = start()
    Site(dialler, server, "site-1")

    record = outcome(server, submit(server, tmp_path, min_clients=1, model="no_such:model"))

    assert (record.state, record.code) == (JobState.FAILED, "job-invalid")
    assert "no_such:model" in record.reason


def test_a_job_wants_what_its_clients_offer(start: StartServer, dialler: Dialler, tmp_path: Path) -> None:
    server = start()
    Site(dialler, server, "site-1")

    record = outcome(server, submit(server, tmp_path, min_clients=1, resources=Resources(gpus=1), start_within_s=0.05))

    assert record.state is JobState.FAILED


def test_stop_training_starts_no_further_job(
    start: StartServer, dialler: Dialler, recorder: Recorder, tmp_path: Path
) -> None:
    server = start()
    site = Site(dialler, server, "site-1")
    first = submit(server, tmp_path, min_clients=1, workflow=WorkflowSpec("fedavg", {"rounds": 1}))
    task = site.task()

    server.stop_training()
    second = submit(server, tmp_path, min_clients=1)
    site.send(answer(task, w(1)))

    assert outcome(server, first).state is JobState.COMPLETED
    view = wait(server.jobs.board.view(second))
    assert view.state == "submitted"
    (waiting,) = view.waiting
    assert waiting.what == "the server starts no further jobs"
    assert (waiting.until, waiting.then) == (view.submitted_at + 60.0, "the job is given up (no-clients)")
    assert len(recorder.of(EventType.BEFORE_JOB_LAUNCH)) == 1


# how jobs end early ---------------------------------------------------------------------------------------------------


def test_an_aborted_job_tells_its_clients_and_takes_nothing_more(
    start: StartServer, dialler: Dialler, recorder: Recorder, tmp_path: Path
) -> None:
    server = start()
    site = Site(dialler, server, "site-1")
    job_id = submit(server, tmp_path, min_clients=1)
    task = site.task()

    record = wait(server.jobs.abort(job_id, reason="ada wants another"))

    assert (record.state, record.code, record.reason) == (JobState.ABORTED, "aborted", "ada wants another")
    assert site.wire.told(Channel.JOB, "abort") == AbortJob(job_id, "ada wants another")
    assert outcome(server, job_id) == record
    refused = site.refused(answer(task, w(1)))
    assert "stale" in refused.reason or "there is no running job" in refused.reason
    assert [context.job_id for context in recorder.of(EventType.JOB_ABORTED)] == [job_id]
    assert server.task_meta_info("site-1") == TaskMetaInfo(PROJECT, JobId(""), -1, ClientName("site-1"))
    with pytest.raises(Conflict, match="aborted"):
        wait(server.jobs.abort(job_id, reason="again"))
    with pytest.raises(NotFound):
        wait(server.jobs.abort(JobId("no-such"), reason="?"))


def test_a_job_that_waits_can_be_aborted(start: StartServer, tmp_path: Path) -> None:
    server = start()
    job_id = submit(server, tmp_path)

    assert wait(server.jobs.abort(job_id, reason="changed my mind")).state is JobState.ABORTED
    assert outcome(server, job_id).reason == "changed my mind"


@pytest.mark.parametrize("kind", ["config", "exception", "unsafe"])
@pytest.mark.parametrize("by", ["agent", "process"])
def test_a_job_failure_that_a_client_reports_ends_the_run_with_that_reason(
    start: StartServer, dialler: Dialler, recorder: Recorder, tmp_path: Path, kind: str, by: str
) -> None:
    server = start()
    site = Site(dialler, server, "site-1")
    job_id = submit(server, tmp_path, min_clients=1)
    site.task()
    assert site.job is not None
    reporter = site.wire if by == "agent" else site.job

    reporter.ask(
        Channel.SERVER, "job_failure", JobFailure(job_id, kind, "KeyError: 'label'", log_tail="Traceback\nKeyError")
    )

    record = outcome(server, job_id)
    assert (record.state, record.code, record.client) == (JobState.FAILED, f"client-{kind}", "site-1")
    assert record.reason == "KeyError: 'label' (at site-1)"
    assert record.log_tail == "Traceback\nKeyError"
    assert site.wire.told(Channel.JOB, "abort").reason == record.reason
    assert [context.reason for context in recorder.of(EventType.JOB_FAILED)] == [record.reason]


def test_a_job_failure_by_a_direct_call(start: StartServer, dialler: Dialler, tmp_path: Path) -> None:
    server = start()
    site = Site(dialler, server, "site-1")
    job_id = submit(server, tmp_path, min_clients=1)
    site.task()

    reply = server.process_job_failure(request(JobFailure(job_id, "exception", "boom"), client="site-1"))

    assert reply.return_code is ReturnCode.OK
    assert outcome(server, job_id).reason == "boom (at site-1)"


@pytest.mark.parametrize("kind", ["", "of-my-own"])
def test_a_job_failure_of_a_kind_that_there_is_not_ends_nothing(
    kind: str, start: StartServer, dialler: Dialler, tmp_path: Path
) -> None:
    server = start()
    site = Site(dialler, server, "site-1")
    job_id = submit(server, tmp_path, min_clients=1)
    site.task()

    refused = site.wire.refused(Channel.SERVER, "job_failure", JobFailure(job_id, kind, "boom"))

    assert "JobFailure.kind" in refused.reason
    assert wait(server.jobs.board.view(job_id)).state == "running"


def test_only_who_takes_part_may_report_a_failure(start: StartServer, dialler: Dialler, tmp_path: Path) -> None:
    server = start()
    site = Site(dialler, server, "site-1")
    outsider = Site(dialler, server, "site-2")
    job_id = submit(server, tmp_path, min_clients=1, clients=("site-1",))
    site.task()

    refused = outsider.wire.refused(Channel.SERVER, "job_failure", JobFailure(job_id, "exception", "boom"))

    assert "site-2 may not report on job" in refused.reason
    assert wait(server.jobs.board.view(job_id)).state == "running"


def test_a_jobs_process_reports_on_its_own_job_alone(start: StartServer, dialler: Dialler, tmp_path: Path) -> None:
    server = start()
    site = Site(dialler, server, "site-1")
    job_id = submit(server, tmp_path, min_clients=1)
    site.task()
    another = submit(server, tmp_path, min_clients=1)
    while (other := site.started()).fqcn != f"site-1.{another}":
        continue

    refused = other.refused(Channel.SERVER, "job_failure", JobFailure(job_id, "exception", "boom"))

    assert "may not report on job" in refused.reason
    assert wait(server.jobs.board.view(job_id)).state == "running"


# processes that die ---------------------------------------------------------------------------------------------------


def test_a_clients_process_that_died_is_started_again_and_then_given_up(
    start: StartServer, dialler: Dialler, tmp_path: Path
) -> None:
    server = start()
    site = Site(dialler, server, "site-1")
    job_id = submit(server, tmp_path, min_clients=1, process_tries=2)
    first = site.started()
    site.wire.ask(Channel.SERVER, "job_ended", JobEnded(job_id, 1, -9, "training\nkilled"))
    second = site.started()
    assert site.attempts == [1, 2]
    assert first is not second

    site.wire.ask(Channel.SERVER, "job_ended", JobEnded(job_id, 1, -9))  # late news of the first start
    site.wire.ask(Channel.SERVER, "job_ended", JobEnded(job_id, 2, 1, "training\nMemoryError"))

    record = outcome(server, job_id)
    assert record.state is JobState.FAILED
    assert "its log ends with: MemoryError" in record.reason
    assert (record.code, record.client, record.cause) == ("too-few-clients", "site-1", "process-died")
    assert record.log_tail == "training\nMemoryError"
    assert site.attempts == [1, 2]


def test_a_client_whose_process_is_started_again_is_shown_with_what_the_last_one_died_of(
    start: StartServer, dialler: Dialler, tmp_path: Path
) -> None:
    server = start()
    starting = threading.Semaphore(0)
    site = Site(dialler, server, "site-1")
    job_id = submit(server, tmp_path, min_clients=1, process_tries=2)
    site.started()

    async def slowly(message: Message) -> None:
        starting.release()
        await asyncio.Event().wait()

    site.wire.cell.on(Channel.JOB, "start", slowly)
    site.wire.ask(Channel.SERVER, "job_ended", JobEnded(job_id, 1, -9, "epoch 3", "out-of-memory"))
    assert starting.acquire(timeout=20)

    (client,) = wait(server.jobs.board.view(job_id)).clients
    assert (client.state, client.attempt) == ("starting", 2)
    assert "used up the memory" in client.reason
    assert "epoch 3" in client.reason


def test_a_client_that_was_too_late_is_told_as_such_whatever_befell_it_before(
    start: StartServer, dialler: Dialler, tmp_path: Path
) -> None:
    server = start()
    site = Site(dialler, server, "site-1")
    workflow = WorkflowSpec("fedavg", {"rounds": 2, "deadline_s": 3.0})
    job_id = submit(server, tmp_path, min_clients=1, process_tries=2, workflow=workflow)
    site.started()
    site.wire.ask(Channel.SERVER, "job_ended", JobEnded(job_id, 1, -9, "of the first start"))
    site.started()
    site.task()

    record = outcome(server, job_id)

    assert (record.code, record.client, record.cause) == ("too-few-clients", "site-1", "deadline")
    assert record.log_tail == ""
    assert wait(server.jobs.board.view(job_id)).advice == CODES["deadline"].advice


def test_a_client_whose_process_the_system_killed_for_its_memory_is_told_as_such(
    start: StartServer, dialler: Dialler, tmp_path: Path
) -> None:
    server = start()
    site = Site(dialler, server, "site-1")
    job_id = submit(server, tmp_path, min_clients=1, process_tries=1)
    site.started()

    site.wire.ask(Channel.SERVER, "job_ended", JobEnded(job_id, 1, -9, "epoch 3", "out-of-memory"))

    record = outcome(server, job_id)
    assert (record.code, record.client, record.cause) == ("too-few-clients", "site-1", "out-of-memory")
    assert "because it had used up the memory that it may use; its log ends with: epoch 3" in record.reason
    view = wait(server.jobs.board.view(job_id))
    assert view.advice == CODES["out-of-memory"].advice
    assert (view.client, view.cause, view.log_tail) == ("site-1", "out-of-memory", "epoch 3")
    assert wait(server.jobs.board.log_of(job_id, ClientName("site-1"), lines=5)) == "epoch 3"
    assert wait(server.jobs.board.views())[0].log_tail == ""


def test_a_task_is_sent_again_to_a_process_that_is_started_again(
    start: StartServer, dialler: Dialler, tmp_path: Path
) -> None:
    server = start()
    site = Site(dialler, server, "site-1")
    job_id = submit(server, tmp_path, min_clients=1, workflow=WorkflowSpec("fedavg", {"rounds": 1}))
    site.started()
    first = site.task()

    site.wire.ask(Channel.SERVER, "job_ended", JobEnded(job_id, 1, 1))
    site.started()
    again = site.task()
    site.send(answer(again, w(1)))

    assert again == first
    assert outcome(server, job_id).state is JobState.COMPLETED


def test_a_job_that_a_client_lists_no_longer_is_dead(start: StartServer, dialler: Dialler, tmp_path: Path) -> None:
    server = start()
    site = Site(dialler, server, "site-1")
    job_id = submit(server, tmp_path, min_clients=1)
    site.started()

    def beat(*jobs: JobId) -> HeartbeatReply:
        reply = site.wire.ask(Channel.SERVER, "heartbeat", Heartbeat(jobs)).payload
        assert isinstance(reply, HeartbeatReply)
        return reply

    assert beat().abort_jobs == ()  # it may not have started yet
    assert beat(job_id, JobId("another")).abort_jobs == ("another",)
    assert site.attempts == [1]
    beat()
    site.started()

    assert site.attempts == [1, 2]


class SlowToStartAgain(Site):
    """A site at which a process is started again only when ``may_start`` is set."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        self.asked, self.may_start = asyncio.Event(), asyncio.Event()
        super().__init__(*arguments, **more)

    async def _start(self, message: Message) -> None:  # type: ignore[override] - a handler may be either
        if expect(message, StartJob).attempt > 1:
            self.asked.set()
            await self.may_start.wait()
        super()._start(message)


def test_a_heartbeat_while_a_process_is_being_started_again_does_not_count_it_as_dead(
    start: StartServer, dialler: Dialler, tmp_path: Path
) -> None:
    server = start()
    site = SlowToStartAgain(dialler, server, "site-1")
    workflow = WorkflowSpec("fedavg", {"rounds": 1})
    job_id = submit(server, tmp_path, min_clients=1, process_tries=2, workflow=workflow)
    site.started()
    task = site.task()
    site.wire.ask(Channel.SERVER, "heartbeat", Heartbeat((job_id,)))

    site.wire.ask(Channel.SERVER, "job_ended", JobEnded(job_id, 1, -9))
    wait(site.asked.wait())
    site.wire.ask(Channel.SERVER, "heartbeat", Heartbeat(idle=(job_id,)))
    on_loop(site.may_start.set)
    site.started()
    assert site.task() == task
    site.send(answer(task, w(1)))

    assert outcome(server, job_id).state is JobState.COMPLETED
    assert site.attempts == [1, 2]


def test_a_process_that_could_not_be_started_again_just_then_is_not_taken_for_a_dead_one(
    start: StartServer, dialler: Dialler, tmp_path: Path
) -> None:
    refused = asyncio.Event()

    class OnceFull(Site):
        """A site at which a process can be started again only the second time."""

        def _start(self, message: Message) -> None:
            if expect(message, StartJob).attempt == 2:
                self.attempts.append(2)
                refused.set()
                raise NotStarted("the job's process", "No space left on device", folder="/w")
            super()._start(message)

    server = start()
    site = OnceFull(dialler, server, "site-1")
    workflow = WorkflowSpec("fedavg", {"rounds": 1})
    job_id = submit(server, tmp_path, min_clients=1, process_tries=2, workflow=workflow)
    site.started()
    task = site.task()
    site.wire.ask(Channel.SERVER, "heartbeat", Heartbeat((job_id,)))

    site.wire.ask(Channel.SERVER, "job_ended", JobEnded(job_id, 1, -9))
    wait(refused.wait())
    site.wire.ask(Channel.SERVER, "heartbeat", Heartbeat(idle=(job_id,)))
    site.started()
    assert site.task() == task
    site.send(answer(task, w(1)))

    assert outcome(server, job_id).state is JobState.COMPLETED
    assert site.attempts == [1, 2, 3]


def test_a_heartbeat_at_the_moment_at_which_a_run_is_taken_up_ends_nothing(
    start: StartServer, dialler: Dialler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start()
    site = Site(dialler, server, "site-1")
    job_id = submit(server, tmp_path, min_clients=1)
    site.started()
    live = server.jobs.live
    runs = live.runs

    class TakenUpMeanwhile(dict[JobId, Any]):
        """One of the two tables, of which the other thread moves the run to the other when it has been looked at."""

        def items(self) -> Any:
            found = list(super().items())
            live.runs = runs
            live.taking_up = {}
            return found

    monkeypatch.setattr(live, "taking_up", TakenUpMeanwhile({job_id: TakingUp(frozenset({site.name}), 0.0, 60.0)}))
    monkeypatch.setattr(live, "runs", TakenUpMeanwhile())

    assert server.jobs.client_watch.heartbeat(site.name, (job_id,)) == ()


def test_an_agent_that_comes_anew_without_its_job_is_given_it_again(
    start: StartServer, dialler: Dialler, tmp_path: Path
) -> None:
    server = start()
    site = Site(dialler, server, "site-1")
    job_id = submit(server, tmp_path, min_clients=1, workflow=WorkflowSpec("fedavg", {"rounds": 1}))
    site.started()
    first = site.task()
    assert site.job is not None

    again = Site(dialler, server, "site-1")  # before the server has noticed that the old process is gone
    wait(site.job.close())
    again.wire.ask(Channel.SERVER, "heartbeat", Heartbeat())
    again.started()

    assert again.attempts == [2]
    assert again.task() == first
    again.send(answer(first, w(1)))
    assert outcome(server, job_id).state is JobState.COMPLETED


def test_an_agent_that_comes_anew_with_its_job_keeps_it(start: StartServer, dialler: Dialler, tmp_path: Path) -> None:
    server = start()
    site = Site(dialler, server, "site-1")
    job_id = submit(server, tmp_path, min_clients=1, workflow=WorkflowSpec("fedavg", {"rounds": 1}))
    task = site.task()

    again = Site(dialler, server, "site-1")
    again.wire.ask(Channel.SERVER, "heartbeat", Heartbeat((job_id,)))
    again.wire.ask(Channel.SERVER, "heartbeat", Heartbeat((job_id,)))
    site.send(answer(task, w(1)))

    assert outcome(server, job_id).state is JobState.COMPLETED
    assert again.attempts == []


def test_a_runs_process_that_dies_is_started_again_and_then_given_up(
    start: StartServer, dialler: Dialler, tmp_path: Path
) -> None:
    launcher = on_loop(lambda: ScriptedLauncher("RuntimeError: out of memory"))
    server = start(launcher=launcher)
    site = Site(dialler, server, "site-1")
    job_id = submit(server, tmp_path, min_clients=1, process_tries=2)

    launcher.end(launcher.next(), -9)
    launcher.end(launcher.next(), 1)

    record = outcome(server, job_id)
    assert (record.state, record.code) == (JobState.FAILED, "process-died")
    assert "the job's process at server ended with status 1; its log ends with: RuntimeError: out of memory" in (
        record.reason
    )
    assert "start 2 of 2" in record.reason
    assert (record.client, record.log_tail) == ("", "RuntimeError: out of memory")
    assert site.wire.told(Channel.JOB, "abort").reason == record.reason
    assert len({run.credentials.token for run in launcher.specs}) == 2


class BeatingStore(MemoryStore):
    """A store that tells of each beat of its server's lease; *failures* of them find it away."""

    def __init__(self, failures: int) -> None:
        super().__init__()
        self.beats: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.failures = failures

    async def renew_lease(self, epoch: int, **more: Any) -> Any:
        self.beats.put(None)
        if self.failures:
            self.failures -= 1
            raise StoreFailed("renewing the lease", "the database is away")
        return await super().renew_lease(epoch, **more)


@pytest.mark.parametrize("failures", [0, 1_000_000])
def test_the_log_of_a_run_whose_process_does_nothing_but_print_is_shortened_at_each_beat_of_the_lease(
    deployed: MakeServer, dialler: Dialler, tmp_path: Path, failures: int
) -> None:
    launcher, store = on_loop(ScriptedLauncher), BeatingStore(failures)
    server = deployed(
        arguments=args(tmp_path / "ws", launcher=launcher, settings=settings(lease_s=0.3)), snapshot_persistor=store
    )
    Site(dialler, server, "site-1")
    job_id = submit(server, tmp_path, min_clients=1)
    launcher.next()

    log = server.jobs.run_folder(job_id).log
    for _ in range(2):
        log_much(log)
        while is_too_long(log):
            store.beats.get(timeout=20)
    assert log.read_bytes().endswith(MUCH[-TAIL_BYTES:])
    assert wait(store.job(job_id)).state is JobState.RUNNING


def test_a_run_whose_process_says_nothing_any_more_is_given_another_and_fails_of_the_last(
    start: StartServer, dialler: Dialler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hanse.server.run_process.RUN_SILENT_S", 0.2)
    launcher = on_loop(partial(ScriptedLauncher, "the last line"))
    server = start(launcher=launcher)
    Site(dialler, server, "site-1")
    job_id = submit(server, tmp_path, min_clients=1, process_tries=2)

    record = outcome(server, job_id)

    assert [spec.job_id for spec in launcher.specs] == [job_id, job_id]
    assert (record.state, record.code) == (JobState.FAILED, "process-hung")
    assert "killed because it had not said for long that it lives" in record.reason
    assert record.reason.endswith("; its log ends with: the last line; that was start 2 of 2")


def test_a_run_whose_process_says_that_it_lives_is_left_alone(
    deployed: MakeServer, dialler: Dialler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hanse.server.run_process.RUN_SILENT_S", silent_s := 2.0)
    launcher, beats = Threads(), threading.Semaphore(0)
    beat = ActiveRun.beats

    def beats_once(run: ActiveRun) -> None:
        beat(run)
        beats.release()

    monkeypatch.setattr(ActiveRun, "beats", beats_once)
    arguments = args(tmp_path / "ws", launcher=launcher, settings=settings())
    server = deployed(arguments=arguments, check_engine_frequency=(every_s := 0.05))
    site = Site(dialler, server, "site-1")
    job_id = submit(server, tmp_path, min_clients=1)
    task = site.task()
    for _ in range(int(1.5 * silent_s / every_s)):
        assert beats.acquire(timeout=20)
    site.train = plus(1)
    site.send(answer(task, w(1)))

    assert outcome(server, job_id).state is JobState.COMPLETED
    assert len(launcher.started) == 1


def test_a_run_whose_process_the_machine_does_not_start_goes_on_when_it_does_and_says_so_meanwhile(
    start: StartServer, dialler: Dialler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hanse.server.run_process.HINDERED_PAUSE_S", 0.05)
    limit, reasons = threading.Event(), []

    class Limited(Threads):
        async def launch(self, module: str, **more: Any) -> Handle:
            if limit.is_set():
                return await super().launch(module, **more)
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    server = start(launcher=Limited())
    Site(dialler, server, "site-1", train=plus(1))
    job_id = submit(server, tmp_path, min_clients=1, process_tries=1)
    while not reasons:
        waiting = wait(server.jobs.board.view(job_id)).waiting
        reasons = [each for each in waiting if "cannot go on" in each.what]
    limit.set()

    assert outcome(server, job_id).state is JobState.COMPLETED
    assert "the run's process could not be started: Too many open files" in reasons[0].what
    assert reasons[0].until > reasons[0].since


def test_a_deadline_that_a_dead_process_has_set_is_told_of_no_more(
    start: StartServer, dialler: Dialler, tmp_path: Path
) -> None:
    class Limited(Threads):
        async def launch(self, module: str, **more: Any) -> Handle:
            if self.started:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            return await super().launch(module, **more)

    launcher = Limited()
    server = start(launcher=launcher)
    site = Site(dialler, server, "site-1")
    job_id = submit(server, tmp_path, min_clients=1)
    site.task()
    (before,) = wait(server.jobs.board.view(job_id)).waiting
    launcher.started[0].kill()

    waits: tuple[Waiting, ...] = ()
    while not any("cannot go on" in each.what for each in waits):
        waits = wait(server.jobs.board.view(job_id)).waiting

    process, answers = waits
    assert (answers.what, answers.until) == (before.what, process.until)
    assert answers.then == f"{NOT_TOLD_YET}; otherwise {HINDERED}"


def test_a_run_whose_disk_is_full_goes_on_when_there_is_space_and_cancels_nothing_meanwhile(
    start: StartServer, dialler: Dialler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hanse.server.run_process.HINDERED_PAUSE_S", 0.05)
    full = [NO_SPACE] * 3

    def no_space_at_first(*arguments: Any) -> Model:
        if full:
            raise full.pop()
        return allocate(*arguments)

    monkeypatch.setattr("hanse.run.federation.allocate", no_space_at_first)
    launcher = Threads()
    server = start(launcher=launcher)
    trained: list[TaskAssignment] = []

    def train(task: TaskAssignment, model: Model) -> TaskResult:
        trained.append(task)
        return plus(1)(task, model)

    for name in ("site-1", "site-2"):
        Site(dialler, server, name, train=train)
    job_id = submit(server, tmp_path, process_tries=1)

    record = outcome(server, job_id)
    assert (record.state, record.reason) == (JobState.COMPLETED, "")
    assert not full
    assert len(launcher.started) == 4
    keys = sorted((task.key.round, task.key.client) for task in trained)
    assert keys == [(1, "site-1"), (1, "site-2"), (2, "site-1"), (2, "site-2")]


def test_a_run_that_stays_without_space_ends_with_that_reason(
    start: StartServer, dialler: Dialler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hanse.server.run_process.HINDERED_PAUSE_S", 0.05)

    def no_space(*arguments: Any) -> Model:
        raise NO_SPACE

    monkeypatch.setattr("hanse.run.federation.allocate", no_space)
    server = start(mend_within_s=0.1)
    Site(dialler, server, "site-1", train=plus(1))

    job_id = submit(server, tmp_path, min_clients=1)

    record = outcome(server, job_id)
    assert (record.state, record.code) == (JobState.FAILED, "no-space")
    assert "the disk mounted at /disk" in record.reason


def test_a_process_that_met_a_damaged_tensor_has_not_died(
    start: StartServer, dialler: Dialler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RunJournal, "mend", always_mended)
    launcher = on_loop(ScriptedLauncher)
    server = start(launcher=launcher)
    Site(dialler, server, starts=False)
    job_id = submit(server, tmp_path, min_clients=1, process_tries=2)
    first = launcher.next()

    wait(server.jobs.live.runs[job_id].ended(RunEnded(completed=False, code=TensorDamaged.code, again=True)))
    launcher.end(first, 0)
    launcher.end(launcher.next(), -9)
    launcher.next()

    assert wait(server.jobs.board.view(job_id)).state == "running"


def test_a_run_whose_disk_goes_on_losing_tensors_is_waited_for_and_ends_with_that_reason(
    start: StartServer, dialler: Dialler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RunJournal, "mend", always_mended)
    monkeypatch.setattr("hanse.server.run_process.HINDERED_PAUSE_S", 0.05)

    def damaged(*arguments: Any) -> Model:
        raise TensorDamaged("ab12", folder="/disk")

    monkeypatch.setattr("hanse.run.federation.allocate", damaged)
    server = start(mend_within_s=0.1)
    Site(dialler, server, "site-1", train=plus(1))

    job_id = submit(server, tmp_path, min_clients=1)

    record = outcome(server, job_id)
    assert (record.state, record.code) == (JobState.FAILED, TensorDamaged.code)
    assert "tensor ab12 in /disk is missing or damaged" in record.reason


async def always_mended(journal: RunJournal, answered: Collection[TaskKey]) -> list[TaskAssignment]:
    del journal, answered
    return []


def test_a_run_that_is_aborted_in_its_process_is_an_aborted_job(
    start: StartServer, dialler: Dialler, tmp_path: Path
) -> None:
    launcher = Threads()
    server = start(launcher=launcher)
    site = Site(dialler, server, "site-1")
    job_id = submit(server, tmp_path, min_clients=1)
    site.task()

    launcher.started[0].server.abort_run()

    record = outcome(server, job_id)
    assert (record.state, record.code) == (JobState.ABORTED, "aborted")
    assert site.wire.told(Channel.JOB, "abort").job_id == job_id
    assert [entry.round for entry in wait(server.jobs.board.view(job_id)).history] == [0]


def test_a_run_told_to_stop_training_ends_with_the_round_that_it_is_in(
    start: StartServer, dialler: Dialler, tmp_path: Path
) -> None:
    launcher = Threads()
    server = start(launcher=launcher)
    site = Site(dialler, server, "site-1")
    job_id = submit(server, tmp_path, min_clients=1)
    task = site.task()

    launcher.started[0].server.stop_training()
    site.send(answer(task, w(1)))

    record = outcome(server, job_id)
    assert record.state is not JobState.COMPLETED
    assert "stopped after round 1" in record.reason
    assert [entry.round for entry in wait(server.jobs.board.view(job_id)).history] == [0, 1]


# clients that go ------------------------------------------------------------------------------------------------------


def test_a_client_that_is_lost_is_a_fault_and_the_round_goes_on_without_it(
    start: StartServer, dialler: Dialler, tmp_path: Path
) -> None:
    server = start(lost_after_s=0.05)
    site, other = Site(dialler, server, "site-1"), Site(dialler, server, "site-2", train=plus(2))
    job_id = submit(server, tmp_path, workflow=WorkflowSpec("fedavg", {"rounds": 1}))
    site.task()
    assert site.job is not None

    wait(site.job.close())

    record = outcome(server, job_id)
    assert record.state is JobState.COMPLETED, record.reason
    assert other.outcome() is None
    (last,) = [entry for entry in wait(server.jobs.board.view(job_id)).history if entry.round == 1]
    assert last.answered == ("site-2",)


def test_a_client_that_was_lost_and_is_started_again_is_waited_for_again(
    start: StartServer, dialler: Dialler, tmp_path: Path
) -> None:
    server = start(lost_after_s=0.05)
    site, gone = Site(dialler, server, "site-1"), Site(dialler, server, "site-2")
    job_id = submit(server, tmp_path)
    task = site.task()
    gone.task()
    watcher = dialler.site(server, "ada@demo", fqcn="ada@demo.cli-1")
    on_loop(lambda: server.jobs.board.watch(job_id, watcher.fqcn))
    assert gone.job is not None
    wait(gone.job.close())
    wait(gone.wire.close())
    while watcher.told(Channel.ADMIN, "job.event").kind != "client_lost":
        continue

    back = Site(dialler, server, "site-2")
    back.wire.ask(Channel.SERVER, "heartbeat", Heartbeat())
    back.task()
    while watcher.told(Channel.ADMIN, "job.event").kind != "client_back":
        continue
    site.send(answer(task, w(1)))  # which decides the round: the other was lost in it
    site.send(answer(site.task(), w(2)))
    back.send(answer(back.task(), w(4)))

    assert outcome(server, job_id).state is JobState.COMPLETED
    assert [entry.answered for entry in wait(server.jobs.board.view(job_id)).history] == [
        (),
        ("site-1",),
        ("site-1", "site-2"),
    ]


def test_a_client_whose_task_was_cancelled_is_given_it_again_when_a_runs_next_process_waits_for_it(
    start: StartServer, dialler: Dialler, tmp_path: Path
) -> None:
    launcher = Threads()
    server = start(launcher=launcher, lost_after_s=0.05)
    gone, other = Site(dialler, server, "site-1"), Site(dialler, server, "site-2")
    job_id = submit(server, tmp_path, workflow=WorkflowSpec("cyclic", {"rounds": 1}))
    gone.task()
    watcher = dialler.site(server, "ada@demo", fqcn="ada@demo.cli-1")
    on_loop(lambda: server.jobs.board.watch(job_id, watcher.fqcn))
    assert gone.job is not None
    wait(gone.job.close())
    wait(gone.wire.close())
    following = other.task()  # the first was lost, and its task cancelled
    back = Site(dialler, server, "site-1")
    back.wire.ask(Channel.SERVER, "heartbeat", Heartbeat())
    while watcher.told(Channel.ADMIN, "job.event").kind != "client_back":
        continue

    launcher.started[0].kill()
    back.send(answer(back.task(), w(1)))
    other.send(answer(following, w(5)))  # which the lap has no use for any more: it is not what follows from w(1)
    following = other.task()
    assert opened(following.model or ModelRef()) == w(1)
    other.send(answer(following, w(6)))

    record = outcome(server, job_id)
    assert record.state is JobState.COMPLETED
    assert read_safetensors(wait(_path(server, job_id, record.result))) == w(6)
    assert wait(server.jobs.board.view(job_id)).history[1].answered == ("site-1", "site-2")


def test_a_client_that_cannot_start_its_process_just_now_is_lost_in_time(
    start: StartServer, dialler: Dialler, tmp_path: Path
) -> None:
    server = start(lost_after_s=0.05)
    Site(dialler, server, "site-1", train=plus(2))
    full = Site(dialler, server, "site-2")

    def no_space(message: Message) -> None:
        raise NO_SPACE

    full.wire.cell.on(Channel.JOB, "start", no_space)
    job_id = submit(server, tmp_path, workflow=WorkflowSpec("fedavg", {"rounds": 1}))

    assert outcome(server, job_id).state is JobState.COMPLETED
    assert wait(server.jobs.board.view(job_id)).history[1].answered == ("site-1",)


def test_a_client_that_quits_is_lost_to_its_run(start: StartServer, dialler: Dialler, tmp_path: Path) -> None:
    server = start(lost_after_s=0.05)
    site = Site(dialler, server, "site-1")
    job_id = submit(server, tmp_path, min_clients=1)
    task = site.task()
    assert site.job is not None

    site.wire.ask(Channel.SERVER, "quit", Quit())

    ended = wait(site.job.ended())
    assert isinstance(ended, Unauthenticated)
    record = outcome(server, job_id)
    assert record.state is JobState.FAILED
    assert "site-1" in record.reason
    assert names(server) == []
    assert task.key.client == "site-1"


def test_reset_tokens_hands_out_again_what_is_to_be_answered(
    start: StartServer, dialler: Dialler, tmp_path: Path
) -> None:
    server = start()
    site, other = Site(dialler, server, "site-1"), Site(dialler, server, "site-2")
    submit(server, tmp_path)
    first = site.task()
    other.send(answer(other.task(), w(1)))

    server.reset_tokens()

    assert site.task() == first
    site.send(answer(first, w(1)))
    assert other.task().key.round == 2


def test_task_meta_info_names_the_model_that_a_client_works_on(
    start: StartServer, dialler: Dialler, tmp_path: Path
) -> None:
    server = start()
    site = Site(dialler, server, "site-1")
    job_id = submit(server, tmp_path, min_clients=1)
    task = site.task()
    assert server.task_meta_info("site-1") == TaskMetaInfo(PROJECT, job_id, 1, ClientName("site-1"))

    site.send(answer(task, w(1)))
    site.task()

    assert server.task_meta_info("site-1").round == 2
    assert server.task_meta_info("site-9").job_id == ""


# restart --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["close", "fl_shutdown"])
def test_a_server_started_again_goes_on_from_the_last_committed_round(
    start: StartServer, dialler: Dialler, recorder: Recorder, tmp_path: Path, how: str
) -> None:
    first = start()
    sites = [Site(dialler, first, name) for name in ("site-1", "site-2")]
    job_id = submit(first, tmp_path, workflow=WorkflowSpec("fedavg", {"rounds": 3}))
    for site in sites:
        site.send(answer(site.task(), w(1)))
    tasks = [site.task() for site in sites]
    assert [task.key.round for task in tasks] == [2, 2]
    sites[0].send(answer(tasks[0], w(2)))
    credentials = [site.wire.credentials for site in sites]
    given = [site.job.credentials for site in sites if site.job is not None and site.job.credentials is not None]
    job_tls = [site.job._tls for site in sites if site.job is not None]
    if how == "close":
        first.close()
        dialler.close()
    else:
        leaving = threading.Thread(target=first.fl_shutdown)
        leaving.start()
        assert [site.wire.told(Channel.JOB, "goodbye").retry for site in sites] == [True, True]
        dialler.close()
        leaving.join(20)
        assert not leaving.is_alive()

    second = start()
    assert wait(second.jobs.board.view(job_id)).state == "running"
    assert [entry.round for entry in wait(second.jobs.board.view(job_id)).history] == [0, 1]
    jobs = []
    for site, known, job_known, tls in zip(sites, credentials, given, job_tls, strict=True):
        agent = dialler.site(second, site.name, credentials=known)
        agent.ask(Channel.SERVER, "heartbeat", Heartbeat((job_id,)))
        wire = dialler.job_wire(second, f"{site.name}.{job_id}", JobCredentials(job_known), tls=tls)
        jobs.append(dialler.dial(wire))
        site.job = wire
    assert names(second) == ["site-1", "site-2"]

    again = sites[1].task()
    assert (again.key, opened(again.model or ModelRef())) == (tasks[1].key, w(1))
    sites[1].send(answer(again, w(4)))
    third = [site.task() for site in sites]
    assert [task.key.round for task in third] == [3, 3]  # so nobody was asked twice for what was answered
    assert opened(third[0].model or ModelRef()) == w(3)
    for site, task in zip(sites, third, strict=True):
        site.send(answer(task, w(5)))

    record = outcome(second, job_id)
    assert record.state is JobState.COMPLETED, record.reason
    assert read_safetensors(wait(_path(second, job_id, record.result))) == w(5)


def test_a_client_that_failed_stays_out_of_its_run_when_the_server_is_started_again(
    start: StartServer, dialler: Dialler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hanse.server.active_run.STORE_PAUSE_S", 0.0)
    first = start()
    sites = [Site(dialler, first, name) for name in ("site-1", "site-2")]
    workflow = WorkflowSpec("fedavg", {"rounds": 2, "quorum": 1})
    job_id = submit(first, tmp_path, workflow=workflow, process_tries=1)
    task = sites[0].task()
    sites[1].started()
    store, noted = first.jobs.services.store, threading.Event()
    honest, tries = store.replace_job, iter([StoreFailed("writing", "the disk is away")])

    async def replace_job(epoch: int, record: JobRecord, *, was: JobState) -> None:
        for failed in tries:
            raise failed
        await honest(epoch, record, was=was)
        noted.set()

    monkeypatch.setattr(store, "replace_job", replace_job)
    sites[1].wire.ask(Channel.SERVER, "job_ended", JobEnded(job_id, 1, -9, "epoch 3"))
    assert noted.wait(20)
    sites[0].send(answer(task, w(1)))
    assert sites[0].task().key.round == 2
    credentials, job_wire = [site.wire.credentials for site in sites], sites[0].job
    assert job_wire is not None
    assert job_wire.credentials is not None
    (before,) = [view for view in wait(first.jobs.board.view(job_id)).clients if view.name == "site-2"]
    first.close()
    dialler.close()

    second = start()
    started: list[Message] = []
    for site, known, reported in zip(sites, credentials, ((job_id,), ()), strict=True):
        answers = {(Channel.JOB, "deploy"): started.append, (Channel.JOB, "start"): started.append}
        agent = dialler.site(second, site.name, credentials=known, answers=answers)
        agent.ask(Channel.SERVER, "heartbeat", Heartbeat(reported))
    wire = dialler.job_wire(second, f"site-1.{job_id}", JobCredentials(job_wire.credentials), tls=job_wire._tls)
    sites[0].job = dialler.dial(wire)
    (after,) = [view for view in wait(second.jobs.board.view(job_id)).clients if view.name == "site-2"]
    assert (after.state, after.reason) == (before.state, before.reason)
    sites[0].send(answer(sites[0].task(), w(2)))

    record = outcome(second, job_id)
    assert record.state is JobState.COMPLETED, record.reason
    assert [entry.answered for entry in wait(second.jobs.board.view(job_id)).history] == [(), ("site-1",), ("site-1",)]
    assert started == []


def test_a_round_that_went_on_without_a_failed_client_counts_when_it_is_noted_that_it_failed(
    start: StartServer, dialler: Dialler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start()
    sites = [Site(dialler, server, name) for name in ("site-1", "site-2")]
    workflow = WorkflowSpec("fedavg", {"rounds": 1, "quorum": 1})
    job_id = submit(server, tmp_path, workflow=workflow, process_tries=1)
    task = sites[0].task()
    sites[1].started()
    store, refused, noted = server.jobs.services.store, threading.Event(), []
    replace_job, commit_round = store.replace_job, store.commit_round

    async def replaced(*arguments: Any, **more: Any) -> None:
        if not refused.is_set():
            refused.set()
            raise StoreFailed("writing", "the disk is away")
        await replace_job(*arguments, **more)

    async def committed(*arguments: Any, **more: Any) -> None:
        noted.extend((await store.job(job_id)).failed_clients)
        await commit_round(*arguments, **more)

    monkeypatch.setattr(store, "replace_job", replaced)
    monkeypatch.setattr(store, "commit_round", committed)
    sites[1].wire.ask(Channel.SERVER, "job_ended", JobEnded(job_id, 1, -9, "epoch 3"))
    assert refused.wait(20)
    sites[0].send(answer(task, w(1)))

    assert outcome(server, job_id).state is JobState.COMPLETED
    assert [failed.client for failed in noted] == ["site-2"]


def test_what_befell_a_client_is_known_to_the_server_started_again(
    start: StartServer, dialler: Dialler, tmp_path: Path
) -> None:
    first = start()
    sites = [Site(dialler, first, name) for name in ("site-1", "site-2")]
    workflow = WorkflowSpec("fedavg", {"rounds": 1, "quorum": 1})
    job_id = submit(first, tmp_path, workflow=workflow)
    task, other_task = sites[0].task(), sites[1].task()
    sites[0].send(TaskResult(task.key, fault=TaskFault("no-space", "a full disk", log_tail="the end of the log")))
    credentials = [site.wire.credentials for site in sites]
    job_wire = sites[1].job
    assert job_wire is not None
    assert job_wire.credentials is not None
    first.close()
    dialler.close()

    second = start()
    for site, known in zip(sites, credentials, strict=True):
        agent = dialler.site(second, site.name, credentials=known)
        agent.ask(Channel.SERVER, "heartbeat", Heartbeat((job_id,)))
    wire = dialler.job_wire(second, f"site-2.{job_id}", JobCredentials(job_wire.credentials), tls=job_wire._tls)
    sites[1].job = dialler.dial(wire)
    assert sites[1].task().key == other_task.key
    sites[1].send(TaskResult(other_task.key, fault=TaskFault("training-failed", "ValueError")))

    record = outcome(second, job_id)
    assert (record.code, record.client, record.cause) == ("too-few-clients", "site-1", "no-space")
    assert record.log_tail == "the end of the log"


def test_answers_come_to_a_runs_next_process_in_the_order_in_which_they_were_accepted(
    start: StartServer, dialler: Dialler, recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = Threads()
    server = start(launcher=launcher)
    sites = [Site(dialler, server, name) for name in ("site-1", "site-2")]
    job_id = submit(server, tmp_path, workflow=WorkflowSpec("fedavg", {"rounds": 1, "quorum": 1}))
    tasks = [site.task() for site in sites]
    sites[0].send(TaskResult(tasks[0].key, fault=TaskFault("no-space", "a full disk")))
    store, may_go_on = server.jobs.services.store, on_loop(asyncio.Event)
    snapshot = store.snapshot

    async def slowly(job_id: JobId) -> Any:
        await may_go_on.wait()
        return await snapshot(job_id)

    monkeypatch.setattr(store, "snapshot", slowly)
    launcher.started[0].kill()
    recorder.wait_for(EventType.START_RUN, count=2)  # its next process asks where it stands
    sites[1].send(TaskResult(tasks[1].key, fault=TaskFault("training-failed", "ValueError")))
    on_loop(may_go_on.set)

    record = outcome(server, job_id)
    assert (record.code, record.client, record.cause) == ("too-few-clients", "site-1", "no-space")


def test_an_answer_that_comes_before_a_runs_next_process_has_begun_comes_to_it_after_those_before(
    start: StartServer, dialler: Dialler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = Threads()
    server = start(launcher=launcher)
    sites = [Site(dialler, server, name) for name in ("site-1", "site-2")]
    job_id = submit(server, tmp_path, workflow=WorkflowSpec("fedavg", {"rounds": 1, "quorum": 1}))
    tasks = [site.task() for site in sites]
    sites[0].send(TaskResult(tasks[0].key, fault=TaskFault("no-space", "a full disk")))
    is_linked, may_go_on, attach = threading.Event(), on_loop(asyncio.Event), ServerLink.attach

    async def slowly(link: ServerLink) -> RunSnapshot:
        is_linked.set()
        await may_go_on.wait()
        return await attach(link)

    monkeypatch.setattr(ServerLink, "attach", slowly)
    launcher.started[0].kill()
    assert is_linked.wait(10)
    sites[1].send(TaskResult(tasks[1].key, fault=TaskFault("training-failed", "ValueError")))
    on_loop(may_go_on.set)

    record = outcome(server, job_id)
    assert (record.code, record.client, record.cause) == ("too-few-clients", "site-1", "no-space")


def test_a_run_whose_process_has_not_begun_again_waits_for_it_though_answers_come(
    start: StartServer, dialler: Dialler, tmp_path: Path
) -> None:
    first = start()
    site = Site(dialler, first, "site-1")
    job_id = submit(first, tmp_path, min_clients=1)
    task = site.task()
    credentials, job_wire = site.wire.credentials, site.job
    assert job_wire is not None
    assert job_wire.credentials is not None
    first.close()
    dialler.close()

    launcher = on_loop(ScriptedLauncher)
    second = start(launcher=launcher)
    dialler.site(second, "site-1", credentials=credentials)
    wire = dialler.job_wire(second, f"site-1.{job_id}", JobCredentials(job_wire.credentials), tls=job_wire._tls)
    site.job = dialler.dial(wire)
    launcher.next()
    assert [waiting.what for waiting in wait(second.jobs.board.view(job_id)).waiting] == [
        "the run's process at the server to begin (start 1)",
        "answers to 'train' of round 1 from 1 of 1 client",
    ]

    site.send(answer(task, w(1)))

    assert [waiting.what for waiting in wait(second.jobs.board.view(job_id)).waiting] == [
        "the run's process at the server to begin (start 1)"
    ]


@pytest.mark.parametrize("is_listed_first", [False, True])
def test_a_client_without_its_process_is_given_one_by_the_server_started_again(
    start: StartServer, dialler: Dialler, tmp_path: Path, is_listed_first: bool
) -> None:
    first = start()
    site = Site(dialler, first, "site-1")
    job_id = submit(first, tmp_path, min_clients=1, workflow=WorkflowSpec("fedavg", {"rounds": 1}))
    site.task()
    credentials = site.wire.credentials
    first.close()
    dialler.close()

    second = start()
    back = Site(dialler, second, "site-1", credentials=credentials)
    if is_listed_first:
        back.wire.ask(Channel.SERVER, "heartbeat", Heartbeat((job_id,)))
    back.wire.ask(Channel.SERVER, "heartbeat", Heartbeat())
    back.send(answer(back.task(), w(2)))

    assert outcome(second, job_id).state is JobState.COMPLETED


def test_the_end_of_a_clients_process_is_not_missed_while_its_run_is_taken_up(
    start: StartServer, dialler: Dialler, recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = start()
    site = Site(dialler, first, "site-1")
    job_id = submit(first, tmp_path, min_clients=1, process_tries=1)
    site.task()
    credentials = site.wire.credentials
    first.close()
    dialler.close()
    may_go_on, take_over = on_loop(asyncio.Event), RunFolder.take_over

    async def slowly(folder: RunFolder, needed: Collection[Digest]) -> list[Digest]:
        await may_go_on.wait()
        return await take_over(folder, needed)

    monkeypatch.setattr(RunFolder, "take_over", slowly)
    second = start()
    back = Site(dialler, second, "site-1", credentials=credentials)
    back.wire.ask(Channel.SERVER, "heartbeat", Heartbeat((job_id,)))
    end = JobEnded(job_id, attempt=1, status=-9, cause="out-of-memory")

    assert isinstance(back.wire.refused(Channel.SERVER, "job_ended", end), NotInService)
    on_loop(may_go_on.set)
    recorder.wait_for(EventType.START_RUN, count=2)
    back.wire.ask(Channel.SERVER, "job_ended", end)
    assert outcome(second, job_id).cause == "out-of-memory"


@pytest.mark.parametrize("failing", ["end_run", "job"])
def test_a_run_that_could_not_be_aborted_while_it_was_taken_up_is_taken_up_all_the_same(
    failing: str, start: StartServer, dialler: Dialler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hanse.server.jobs.POSTPONED_S", 0.01)
    first = start()
    site = Site(dialler, first, "site-1")
    job_id = submit(first, tmp_path, min_clients=1)
    task, credentials = site.task(), site.wire.credentials
    first.close()
    dialler.close()
    may_go_on, begun, take_over = on_loop(asyncio.Event), threading.Event(), RunFolder.take_over

    async def slowly(folder: RunFolder, needed: Collection[Digest]) -> list[Digest]:
        begun.set()
        await may_go_on.wait()
        return await take_over(folder, needed)

    monkeypatch.setattr(RunFolder, "take_over", slowly)
    second = start()
    assert begun.wait(20)
    store, asked = second.jobs.services.store, itertools.count(1)
    honest = getattr(store, failing)

    async def away(*arguments: Any, **more: Any) -> Any:
        if failing == "end_run" or next(asked) == 2:  # what is asked of the store first is how far the job is
            raise StoreFailed("using the database", "no route to host")
        return await honest(*arguments, **more)

    with monkeypatch.context() as patched:
        patched.setattr(store, failing, away)
        with pytest.raises(StoreFailed):
            wait(second.jobs.abort(job_id, reason="not needed any more"))
    on_loop(may_go_on.set)

    back = Site(dialler, second, "site-1", credentials=credentials)
    back.wire.ask(Channel.SERVER, "heartbeat", Heartbeat())
    assert back.task() == task


def test_a_run_that_is_taken_up_does_not_wait_for_ever_for_a_client_that_does_not_come_back(
    start: StartServer, dialler: Dialler, tmp_path: Path
) -> None:
    first = start()
    site = Site(dialler, first, "site-1")
    job_id = submit(first, tmp_path, min_clients=1)
    site.task()
    dialler.close()
    first.close()

    record = outcome(start(lost_after_s=0.05), job_id)

    assert (record.state, record.code) == (JobState.FAILED, "too-few-clients")
    assert (record.client, record.cause) == ("site-1", "client-lost")


def test_a_job_that_waited_waits_again_after_a_restart(start: StartServer, dialler: Dialler, tmp_path: Path) -> None:
    first = start()
    job_id = submit(first, tmp_path, min_clients=1)
    first.close()
    second = start()

    Site(dialler, second, "site-1", train=plus(1))

    assert outcome(second, job_id).state is JobState.COMPLETED


def test_a_job_is_on_the_disk_before_the_store_has_it(
    start: StartServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start()
    synced: set[str] = set()
    fsync, store = os.fsync, server.jobs.services.store
    add_job = store.add_job
    by_then: list[set[str]] = []

    def noting(descriptor: int) -> None:
        synced.add(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    async def adding(epoch: int, record: JobRecord) -> None:
        by_then.append(set(synced))
        await add_job(epoch, record)

    monkeypatch.setattr(os, "fsync", noting)
    monkeypatch.setattr(store, "add_job", adding)
    job_id = submit(server, tmp_path)

    folder = tmp_path / "ws" / "runs" / job_id
    made = [folder.parent, folder, *folder.rglob("*")]
    assert {"code", "package", "tiny_model.py"} <= {path.name for path in made}
    assert {str(path) for path in made} <= by_then[0]


def test_tensors_and_result_are_on_the_disk_before_the_store_names_them(
    start: StartServer, dialler: Dialler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start()
    site = Site(dialler, server, "site-1")
    synced: set[str] = set()
    fsync, store = os.fsync, server.jobs.services.store
    accept_answer, commit_round, end_run = store.accept_answer, store.commit_round, store.end_run
    unsynced: dict[str, set[str]] = {}

    def noting(descriptor: int) -> None:
        fsync(descriptor)
        synced.add(Path(f"/proc/self/fd/{descriptor}").readlink().name)

    def note(write: str, digests: Iterable[str]) -> None:
        unsynced[write] = {"one at least"} if not (named := set(digests)) else named - synced

    async def accepting(epoch: int, job_id: JobId, result: TaskResult) -> TaskResult:
        assert result.update is not None
        assert result.update.model is not None
        note("answer", [tensor.digest for tensor in result.update.model.tensors])
        return await accept_answer(epoch, job_id, result)

    async def committing(epoch: int, job_id: JobId, commit: CommitRound, *, now_s: float) -> None:
        note(f"round {commit.state.round}", [tensor.digest for tensor in commit.state.model.tensors])
        await commit_round(epoch, job_id, commit, now_s=now_s)

    async def ending(epoch: int, record: JobRecord, *, was: JobState) -> None:
        note("result", [record.result])
        await end_run(epoch, record, was=was)

    monkeypatch.setattr(os, "fsync", noting)
    monkeypatch.setattr(store, "accept_answer", accepting)
    monkeypatch.setattr(store, "commit_round", committing)
    monkeypatch.setattr(store, "end_run", ending)
    one_round = WorkflowSpec("fedavg", {"rounds": 1})
    job_id = submit(server, tmp_path, min_clients=1, model="tiny_model:large", workflow=one_round)
    task = site.task()
    site.send(TaskResult(task.key, Large(site, server, job_id).upload(2)))

    assert outcome(server, job_id).state is JobState.COMPLETED
    assert unsynced == {"answer": set(), "round 0": set(), "round 1": set(), "result": set()}


def test_two_servers_do_not_share_a_workspace(start: StartServer, tmp_path: Path) -> None:
    start()

    with pytest.raises(HanseError, match="no other running server"):
        start()


# a few more people ----------------------------------------------------------------------------------------------------


def test_jobs_are_found_by_the_beginning_of_their_id(start: StartServer, tmp_path: Path) -> None:
    server = start()
    job_id = submit(server, tmp_path)
    other = submit(server, tmp_path, name="other")

    assert wait(server.jobs.board.find("tiny")) == job_id
    assert wait(server.jobs.board.find(other)) == other
    for prefix in ("", "no-such"):
        with pytest.raises(NotFound):
            wait(server.jobs.board.find(prefix))
    another = submit(server, tmp_path)
    assert another != job_id
    with pytest.raises(NotFound, match="there are 2"):
        wait(server.jobs.board.find("tiny"))


@pytest.mark.parametrize(
    ("who", "scope", "write", "passes"),
    [
        ("ada@demo", "upload", True, True),
        ("lee@demo", "upload", True, True),
        ("mel@demo", "upload", True, False),
        ("mel@demo", "result/{job}", False, True),
        ("ada@demo", "result/{job}", True, False),
        ("ada@demo", "job/{job}", False, False),
        ("ada@demo", "../upload", True, False),
        ("ada@demo", "result/../../x", False, False),
        ("ada@demo", "result/no-such-job", False, False),
        ("site-1", "result/{job}", False, False),
        ("site-1", "upload", True, False),
    ],
)
def test_who_may_move_which_tensors(
    start: StartServer, dialler: Dialler, tmp_path: Path, who: str, scope: str, write: bool, passes: bool
) -> None:
    server = start()
    job_id = submit(server, tmp_path)
    wire = dialler.site(server, who)
    tls = wire._tls
    scope = scope.format(job=job_id)

    expected = nullcontext() if passes else pytest.raises(HanseError)
    with transferring(wire, target_of(server), tls) as transfers, expected:
        if write:
            wait(transfers.upload(scope, digest_of(b"data"), memoryview(b"data")))
        else:
            wait(transfers.missing(scope, [digest_of(b"data")]))
    assert not (tmp_path / "x").exists()
    assert not (tmp_path / "ws" / "runs" / "no-such-job").exists()


def test_a_registration_by_direct_call_is_no_connected_client(
    start: StartServer, dialler: Dialler, tmp_path: Path
) -> None:
    server = start()
    headers = credentials_in(register_secure(server, dialler.project.site("site-2")), "site-2")
    assert headers[Header.CLIENT] == "site-2"
    Site(dialler, server, "site-1", train=silent)

    record = outcome(server, submit(server, tmp_path, start_within_s=0.05))

    assert record.state is JobState.FAILED
