"""Jobs over the wire, from submission to result: what travels, what is kept, and who may see it."""

import os
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hanse.errors import (
    HanseError,
    NotFound,
)
from hanse.events import EventType
from hanse.ids import Digest, JobId
from hanse.job import JobRecord, JobState, WorkflowSpec
from hanse.messages import (
    AbortJob,
    Channel,
    CommitRound,
    DeployJob,
    Header,
    JobSubmitted,
    ModelRef,
    SubmitJob,
    TaskResult,
    TensorRef,
    UpdateRef,
)
from hanse.model import Model
from hanse.server import FederatedServer
from hanse.storage.models import read_safetensors, write_safetensors
from hanse.storage.tensors import TensorFiles, digest_of

from .job_world import (
    Large,
    MakeServer,
    ScriptedLauncher,
    Site,
    StartServer,
    Submissions,
    Threads,
    answer,
    outcome,
    package,
    plus,
    silent,
    spec,
    submit,
    tensor_file,
    w,
)
from .world import (
    Dialler,
    Recorder,
    args,
    credentials_in,
    on_loop,
    register_secure,
    target_of,
    transferring,
    wait,
)


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
    result = read_safetensors(wait(tensor_file(server, job_id, record.result)))
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
    result = wait(tensor_file(server, job_id, record.result))
    assert result.read_bytes() == expected
    assert result.stat().st_mtime_ns != state.st_mtime_ns
    assert list(result.parent.iterdir()) == [result]


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
