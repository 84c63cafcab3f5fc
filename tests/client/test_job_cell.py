import asyncio
import errno
import os
import random
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hanse.cell.cell import RemoteError
from hanse.cell.frames import MAX_PAYLOAD_BYTES
from hanse.client.job_cell import MAX_LOGS_PER_S, filters_of
from hanse.client.job_process import JobConnection
from hanse.client.process_spec import JobProcessSpec
from hanse.client.task import TaskContext
from hanse.errors import (
    HanseError,
    InternalError,
    NotFound,
    ProtocolError,
    TrainingFailed,
    Unauthenticated,
    Unreachable,
    UpdateRejected,
)
from hanse.ids import ClientName, Digest, Fqcn
from hanse.learning.filters import NormClip
from hanse.messages import (
    Channel,
    Goodbye,
    JobFailure,
    LogMetrics,
    Renew,
    ReturnCode,
    TaskAssignment,
    TaskCancelled,
    TaskFault,
    TaskKey,
    TaskResult,
)
from hanse.model import Model, Update
from hanse.settings import SitePolicy
from hanse.storage.models import digests_of, load_model, store_model
from hanse.storage.tensors import TensorFiles

from .fake_server import JOB, PROJECT, SITE, FakeServer, fake_server, job_identity, job_spec

CELL = f"{SITE}.{JOB}"
SCOPE = f"job/{JOB}"
SMALL = Model({"w": np.arange(3, dtype=np.float32)}, {"kind": "small"})
LARGE = Model({"w": np.arange(10_000, dtype=np.float32), "frozen": np.ones(10_000, np.float32)})
AWAY = Unreachable("server", "it has gone")


@dataclass
class FakeTrainer:
    """Trains by whatever ``work`` does; notes the contexts that it was given."""

    work: Callable[[Model, TaskContext], Awaitable[Update]]
    contexts: list[TaskContext] = field(default_factory=list)

    async def run(self, model: Model, ctx: TaskContext) -> Update:
        self.contexts.append(ctx)
        return await self.work(model, ctx)


async def add_one(model: Model, ctx: TaskContext) -> Update:
    return Update(Model({**model, "w": model["w"] + np.float32(1)}, model.metadata), 5, {"loss": np.float32(0.5)})


def key(round_number: int = 1, name: str = "train", client: str = SITE) -> TaskKey:
    return TaskKey(round_number, name, 0, ClientName(client))


def assignment(server: FakeServer, model: Model | None = SMALL, **changes: Any) -> TaskAssignment:
    reference = None if model is None else store_model(model, server.files(SCOPE))
    return TaskAssignment(**{"key": key(), "model": reference, **changes})


def give(server: FakeServer, task: TaskAssignment) -> None:
    server.cell.tell(Fqcn(CELL), Channel.TASK, "task", task)


def answered(server: FakeServer, result: TaskResult) -> Model:
    assert result.update is not None
    assert result.update.model is not None
    return load_model(result.update.model, server.files(SCOPE))


@asynccontextmanager
async def job(
    server: FakeServer, folder: Path, trainer: FakeTrainer, **changes: Any
) -> AsyncIterator["asyncio.Task[None]"]:
    spec = JobProcessSpec(
        **{
            "job_id": JOB,
            "client": SITE,
            "project": PROJECT,
            "spec": job_spec(seed=7, config={"lr": 0.1, "epochs": 1}),
            "identity": job_identity(),
            "servers": ("memory",),
            "roots": b"",
            "code": "",
            "tensors": str(folder),
            "site": {"data": "/d"},
            **changes,
        }
    )
    connection = JobConnection(
        spec, trainer, rng=random.Random(1), dial=server.dial, transfers=server.transfers, wall=lambda: 0.0
    )
    running = asyncio.create_task(connection.run(), name="job under test")
    try:
        yield running
        await connection.close()
        await asyncio.gather(running, return_exceptions=running.done())  # an end that the test did not see is told
    finally:
        running.cancel()


async def test_task_is_trained_on_and_answered(tmp_path: Path) -> None:
    trainer = FakeTrainer(add_one)
    async with fake_server(tmp_path / "s") as server, job(server, tmp_path / "t", trainer):
        await server.up(CELL)
        give(server, assignment(server, config={"lr": 0.5}))
        result = await server.next(TaskResult)

        assert result.key == key()
        assert result.update is not None
        assert (result.update.num_examples, result.update.metrics) == (5, {"loss": 0.5})
        assert answered(server, result) == Model({"w": SMALL["w"] + 1}, SMALL.metadata)
        (ctx,) = trainer.contexts
        assert (ctx.client, ctx.job, ctx.round, ctx.name, ctx.seed) == (SITE, JOB, 1, "train", 7)
        assert (ctx.config, ctx.site) == ({"lr": 0.5, "epochs": 1}, {"data": "/d"})


async def test_large_tensors_move_by_digest_and_what_is_the_same_moves_once(tmp_path: Path) -> None:
    async with fake_server(tmp_path / "s") as server, job(server, tmp_path / "t", FakeTrainer(add_one)):
        await server.up(CELL)
        task = assignment(server, LARGE)
        give(server, task)
        result = await server.next(TaskResult)

        assert answered(server, result)["w"][0] == 1
        assert result.update is not None
        assert result.update.model is not None
        assert task.model is not None
        shared = digests_of(task.model) & digests_of(result.update.model)
        assert len(shared) == 1, "the frozen tensor has one name"

        following = assignment(server, answered(server, result), key=key(2))
        give(server, following)
        await server.next(TaskResult)
        give(server, TaskAssignment(key(3, "evaluate"), None, expects_model=False))
        await server.next(TaskResult)
        assert following.model is not None
        kept = {path.name for path in (tmp_path / "t").iterdir()}
        assert kept == digests_of(following.model), "what the next task may share is kept, and nothing else"


async def test_tasks_are_worked_on_one_at_a_time_in_order(tmp_path: Path) -> None:
    at_once: list[int] = []
    running = 0

    async def work(model: Model, ctx: TaskContext) -> Update:
        nonlocal running
        running += 1
        at_once.append(running)
        await asyncio.sleep(0)
        running -= 1
        return Update(None, ctx.round)

    trainer = FakeTrainer(work)
    async with fake_server(tmp_path / "s") as server, job(server, tmp_path / "t", trainer):
        await server.up(CELL)
        for number in (1, 2, 3):
            give(server, TaskAssignment(key(number, "evaluate"), None, expects_model=False))
        results = [await server.next(TaskResult) for _ in range(3)]

        assert [result.key.round for result in results] == [1, 2, 3]
        assert at_once == [1, 1, 1]


async def test_task_without_a_model_is_given_an_empty_one(tmp_path: Path) -> None:
    async def work(model: Model, ctx: TaskContext) -> Update:
        return Update(None, len(model), {"tensors": len(model)})

    async with fake_server(tmp_path / "s") as server, job(server, tmp_path / "t", FakeTrainer(work)):
        await server.up(CELL)
        give(server, assignment(server, None, expects_model=False))
        result = await server.next(TaskResult)

        assert result.update is not None
        assert (result.update.model, result.update.metrics) == (None, {"tensors": 0.0})


async def test_model_that_nobody_asked_for_stays_at_the_site(tmp_path: Path) -> None:
    async with fake_server(tmp_path / "s") as server, job(server, tmp_path / "t", FakeTrainer(add_one)):
        await server.up(CELL)
        give(server, assignment(server, expects_model=False))
        result = await server.next(TaskResult)

        assert result.update is not None
        assert result.update.model is None


@pytest.mark.parametrize(
    ("update", "code", "reason"),
    [
        (Update(None, 1), UpdateRejected.code, "site-1 sent no model; task 'train' expects one"),
        (
            Update(Model({"w": np.zeros(3, np.float64)}), 1),
            UpdateRejected.code,
            "site-1 sent 'w' as float64 (3,); the job expects float32 (3,)",
        ),
        (Update(Model({}), 1), UpdateRejected.code, "site-1 sent no tensor 'w'; the job expects float32 (3,)"),
        (Update(SMALL, 1.5), TrainingFailed.code, "an update needs a whole number for num_examples"),  # type: ignore[arg-type]  # what user code may return
        (Update(SMALL, 1, {"loss": "low"}), TrainingFailed.code, "numbers for metrics (could not convert"),  # type: ignore[dict-item]  # as above
    ],
)
async def test_update_that_is_not_what_was_asked_for_is_a_fault_and_never_sent(
    tmp_path: Path, update: Update, code: str, reason: str
) -> None:
    async def work(model: Model, ctx: TaskContext) -> Update:
        return update

    async with fake_server(tmp_path / "s") as server, job(server, tmp_path / "t", FakeTrainer(work)):
        await server.up(CELL)
        give(server, assignment(server))
        result = await server.next(TaskResult)

        assert result.update is None
        assert result.fault is not None
        assert (result.fault.code, result.fault.retryable) == (code, False)
        assert reason in result.fault.reason


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (
            TrainingFailed(SITE, "train", "ValueError: bad (app.py:3)"),
            ("training-failed", "ValueError: bad (app.py:3)"),
        ),
        (KeyError("a bug"), ("internal", "Hanse failed while working on task 'train' at site-1")),
    ],
)
async def test_code_that_raises_faults_its_task_and_the_next_one_is_worked_on(
    tmp_path: Path, error: Exception, fault: tuple[str, str]
) -> None:
    async def work(model: Model, ctx: TaskContext) -> Update:
        if ctx.round == 1:
            raise error
        return await add_one(model, ctx)

    async with fake_server(tmp_path / "s") as server, job(server, tmp_path / "t", FakeTrainer(work)):
        await server.up(CELL)
        give(server, assignment(server))
        give(server, assignment(server, key=key(2)))
        first, second = await server.next(TaskResult), await server.next(TaskResult)

        assert first.fault is not None
        assert first.fault.code == fault[0]
        assert first.fault.reason.startswith(fault[1])
        assert second.update is not None


async def test_what_fits_into_no_message_is_a_fault_that_does(tmp_path: Path) -> None:
    async def work(model: Model, ctx: TaskContext) -> Update:
        if ctx.round == 1:
            raise TrainingFailed(SITE, ctx.name, "x" * (MAX_PAYLOAD_BYTES + 1))
        return Update(model, 1, {f"a metric called {number:100}": 1.0 for number in range(50_000)})

    async with fake_server(tmp_path / "s") as server, job(server, tmp_path / "t", FakeTrainer(work)):
        await server.up(CELL)
        give(server, assignment(server))
        give(server, assignment(server, key=key(2)))
        first, second = await server.next(TaskResult), await server.next(TaskResult)

        assert first.fault is not None
        assert first.fault.code == "training-failed"
        assert first.fault.reason.startswith("xxx")
        assert first.fault.reason.endswith("...")
        assert second.fault is not None
        assert second.fault.code == "protocol"
        assert "bytes" in second.fault.reason


async def test_what_is_no_text_is_a_fault_that_is(tmp_path: Path) -> None:
    async def work(model: Model, ctx: TaskContext) -> Update:
        if ctx.round == 1:
            raise TrainingFailed(SITE, ctx.name, "no rows in caf\udce9.csv")
        return Update(model, 1, {"caf\udce9": 1.0})

    async with fake_server(tmp_path / "s") as server, job(server, tmp_path / "t", FakeTrainer(work)):
        await server.up(CELL)
        give(server, assignment(server))
        give(server, assignment(server, key=key(2)))
        first, second = await server.next(TaskResult), await server.next(TaskResult)

        assert first.fault is not None
        assert (first.fault.code, first.fault.reason) == ("training-failed", "no rows in caf?.csv")
        assert second.fault is not None
        assert second.fault.code == "protocol"
        assert "TaskResult" in second.fault.reason


async def test_sites_filter_has_the_last_word(tmp_path: Path) -> None:
    async def far(model: Model, ctx: TaskContext) -> Update:
        return Update(Model({"w": model["w"] + np.float32(100)}), 1)

    policy = SitePolicy(max_update_norm=1.0)
    async with fake_server(tmp_path / "s") as server, job(server, tmp_path / "t", FakeTrainer(far), policy=policy):
        await server.up(CELL)
        give(server, assignment(server))
        sent = answered(server, await server.next(TaskResult))

        assert np.linalg.norm(sent["w"] - SMALL["w"]) == pytest.approx(1.0, abs=1e-5)


def test_filters_are_what_the_policy_says() -> None:
    assert filters_of(SitePolicy()) == ()
    assert filters_of(SitePolicy(max_update_norm=2.0)) == (NormClip(2.0),)


async def test_update_that_the_filter_cannot_make_safe_does_not_leave(tmp_path: Path) -> None:
    async def nan(model: Model, ctx: TaskContext) -> Update:
        return Update(Model({"w": np.full(3, np.nan, np.float32)}), 1)

    policy = SitePolicy(max_update_norm=1.0)
    async with fake_server(tmp_path / "s") as server, job(server, tmp_path / "t", FakeTrainer(nan), policy=policy):
        await server.up(CELL)
        give(server, assignment(server))
        result = await server.next(TaskResult)

        assert result.fault is not None
        assert "cannot be clipped" in result.fault.reason


async def test_answer_is_offered_again_when_the_stream_breaks(tmp_path: Path) -> None:
    go_on = asyncio.Event()

    async def work(model: Model, ctx: TaskContext) -> Update:
        await go_on.wait()
        return await add_one(model, ctx)

    trainer = FakeTrainer(work)
    async with fake_server(tmp_path / "s") as server, job(server, tmp_path / "t", trainer):
        await server.up(CELL)
        task = assignment(server)
        give(server, task)
        await server.go_away(AWAY)
        await server.up(CELL)
        give(server, task)
        go_on.set()
        server.refuse["result"] = AWAY
        result = await server.next(TaskResult)

        assert result.update is not None
        assert len(trainer.contexts) == 1, "a task that is sent again while it is worked on is worked on once"


async def test_tensor_that_the_server_lost_meanwhile_is_sent_again(tmp_path: Path) -> None:
    async with fake_server(tmp_path / "s") as server, job(server, tmp_path / "t", FakeTrainer(add_one)):
        await server.up(CELL)
        task = assignment(server, LARGE)

        class LosesTensors(ProtocolError):
            def __init__(self) -> None:
                assert task.model is not None
                server.files(SCOPE).keep_only(digests_of(task.model))
                super().__init__("update", got="a digest without a file", expected="uploaded tensors")

        class OnFirstResult(dict[str, HanseError]):
            def pop(self, topic: str, default: Any = None) -> Any:
                if topic == "result" and "done" not in self:
                    self["done"] = AWAY
                    return LosesTensors()
                return default

        server.refuse = OnFirstResult()
        give(server, task)

        assert answered(server, await server.next(TaskResult))["w"][0] == 1


async def test_tensors_that_the_disk_does_not_let_go_keep_nobody_from_the_next_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlink = Path.unlink

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if path.parent == tmp_path / "t":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)
    async with fake_server(tmp_path / "s") as server, job(server, tmp_path / "t", FakeTrainer(add_one)):
        await server.up(CELL)
        for number in (1, 2, 3):
            model = Model({"w": LARGE["w"] * np.float32(number)})
            give(server, assignment(server, model, key=key(number)))
            assert answered(server, await server.next(TaskResult))["w"][1] == number + 1


async def test_answer_that_is_refused_is_dropped_and_the_next_task_worked_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    refuse: dict[str, HanseError] = {"result": UpdateRejected(SITE, "a stale answer: round 1 is over")}
    async with (
        fake_server(tmp_path / "s", refuse=refuse) as server,
        job(server, tmp_path / "t", FakeTrainer(add_one)),
    ):
        await server.up(CELL)
        give(server, assignment(server))
        give(server, assignment(server, key=key(2)))

        assert (await server.next(TaskResult)).key.round == 2
        assert "answer refused" in caplog.text


async def test_an_answer_whose_tensors_the_server_does_not_take_is_a_fault_with_its_reason(tmp_path: Path) -> None:
    async with fake_server(tmp_path / "s") as server:
        local = server.transfers

        class Full:
            missing = staticmethod(local.missing)
            download = staticmethod(local.download)

            async def upload(self, scope: str, digest: Any, buffer: Any) -> None:
                why = "site-1 sent more than the 8 tensors that its answers may need"
                raise RemoteError(why, return_code=ReturnCode.REFUSED, error_code=UpdateRejected.code)

        server.transfers = Full()  # type: ignore[assignment]  # for this test
        async with job(server, tmp_path / "t", FakeTrainer(add_one)):
            await server.up(CELL)
            give(server, assignment(server, LARGE))

            fault = (await server.next(TaskResult)).fault
            assert fault is not None
            assert (fault.code, fault.reason) == (
                "update-rejected",
                "site-1 sent more than the 8 tensors that its answers may need",
            )


async def test_an_answer_that_the_server_cannot_judge_is_a_fault(tmp_path: Path) -> None:
    refuse: dict[str, HanseError] = {"result": InternalError("answering task/result")}
    async with (
        fake_server(tmp_path / "s", refuse=refuse) as server,
        job(server, tmp_path / "t", FakeTrainer(add_one)),
    ):
        await server.up(CELL)
        give(server, assignment(server))

        fault = (await server.next(TaskResult)).fault
        assert fault is not None
        assert fault.code == "internal"


async def test_cancelled_task_is_dropped_whether_it_waits_or_is_worked_on(tmp_path: Path) -> None:
    begun = asyncio.Event()

    async def work(model: Model, ctx: TaskContext) -> Update:
        begun.set()
        if ctx.round == 1:
            await asyncio.Event().wait()
        return await add_one(model, ctx)

    trainer = FakeTrainer(work)
    async with fake_server(tmp_path / "s") as server, job(server, tmp_path / "t", trainer):
        await server.up(CELL)
        for number in (1, 2, 3):
            give(server, assignment(server, key=key(number)))
        await begun.wait()
        for cancelled in (2, 1, 9):
            server.cell.tell(Fqcn(CELL), Channel.TASK, "cancelled", TaskCancelled(key(cancelled)))

        assert (await server.next(TaskResult)).key.round == 3
        assert [ctx.round for ctx in trainer.contexts] == [1, 3]


async def test_a_task_that_comes_again_while_its_cancelled_work_is_ending_is_worked_on_anew(tmp_path: Path) -> None:
    begun, may_end = asyncio.Event(), asyncio.Event()

    async def work(model: Model, ctx: TaskContext) -> Update:
        if begun.is_set():
            return await add_one(model, ctx)
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            await may_end.wait()
        raise AssertionError("it was cancelled")

    async with fake_server(tmp_path / "s") as server, job(server, tmp_path / "t", FakeTrainer(work)):
        await server.up(CELL)
        give(server, assignment(server))
        await begun.wait()
        server.cell.tell(Fqcn(CELL), Channel.TASK, "cancelled", TaskCancelled(key()))
        give(server, assignment(server))  # a next process of the run waits for it
        await server.cell.ask(Fqcn(CELL), Channel.TASK, "task", assignment(server), timeout_s=10)  # and once is enough
        may_end.set()

        assert (await server.next(TaskResult)).update is not None


async def test_a_task_whose_answer_the_server_has_lost_since_is_worked_on_again_while_the_first_is_cleared_up_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_only, deleting, may_delete = TensorFiles.keep_only, threading.Event(), threading.Event()

    def wait(files: TensorFiles, digests: Collection[Digest]) -> int:
        deleting.set()
        assert may_delete.wait(20)
        return keep_only(files, digests)

    monkeypatch.setattr(TensorFiles, "keep_only", wait)
    async with fake_server(tmp_path / "s") as server, job(server, tmp_path / "t", FakeTrainer(add_one)):
        await server.up(CELL)
        give(server, assignment(server, LARGE))
        await server.next(TaskResult)
        assert await asyncio.to_thread(deleting.wait, 20)
        await server.cell.ask(Fqcn(CELL), Channel.TASK, "task", assignment(server, LARGE), timeout_s=10)
        may_delete.set()

        assert answered(server, await server.next(TaskResult))["w"][0] == 1


async def test_task_for_somebody_else_is_refused(tmp_path: Path) -> None:
    async with fake_server(tmp_path / "s") as server, job(server, tmp_path / "t", FakeTrainer(add_one)):
        await server.up(CELL)
        with pytest.raises(RemoteError, match="expected a task for site-1"):
            await server.cell.ask(
                Fqcn(CELL), Channel.TASK, "task", assignment(server, key=key(client="site-2")), timeout_s=10
            )


async def test_more_tasks_than_can_wait_are_answered_with_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hanse.client.job_cell.MAX_QUEUED_TASKS", 2)
    begun, may_go_on = asyncio.Event(), asyncio.Event()

    async def slowly(model: Model, ctx: TaskContext) -> Update:
        begun.set()
        await may_go_on.wait()
        return Update(None, 1)

    async with fake_server(tmp_path / "s") as server, job(server, tmp_path / "t", FakeTrainer(slowly)) as running:
        await server.up(CELL)
        for number in range(4):
            task = TaskAssignment(key(number), None, expects_model=False)
            await server.cell.ask(Fqcn(CELL), Channel.TASK, "task", task, timeout_s=10)
            await asyncio.wait_for(begun.wait(), 20)
        may_go_on.set()
        results = [await server.next(TaskResult) for _ in range(4)]

        assert [result.key for result in results] == [key(number) for number in range(4)]
        assert [result.fault for result in results[:3]] == [None] * 3
        fault = results[3].fault
        assert fault is not None
        assert (fault.code, fault.retryable) == ("conflict", True)
        assert fault.reason == "site-1 is busy with 2 tasks, so it cannot be given another"
        assert not running.done()


async def test_full_disk_at_the_site_is_told_at_once_and_the_next_task_is_worked_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with fake_server(tmp_path / "s") as server, job(server, tmp_path / "f", FakeTrainer(add_one)):
        await server.up(CELL)
        task = assignment(server, LARGE)

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as disk:
            disk.setattr(os, "posix_fallocate", full)
            disk.setattr(os, "pwrite", full)
            give(server, task)
            fault = (await server.next(TaskResult)).fault
        assert fault is not None
        assert (fault.code, fault.retryable) == ("no-space", True)
        assert str(tmp_path / "f") in fault.reason

        give(server, TaskAssignment(key(2), task.model))
        assert (await server.next(TaskResult)).update is not None


async def test_model_that_cannot_be_is_a_fault(tmp_path: Path) -> None:
    async with fake_server(tmp_path / "s") as server, job(server, tmp_path / "t", FakeTrainer(add_one)):
        await server.up(CELL)
        task = assignment(server)
        assert task.model is not None
        twice = TaskAssignment(key(), type(task.model)((*task.model.tensors, *task.model.tensors)))
        give(server, twice)
        result = await server.next(TaskResult)

        assert result.fault == TaskFault(
            "protocol", "the task's model tensor is 'w'; expected a name that only one tensor has"
        )


async def test_metrics_are_told_as_they_come_and_a_flood_is_cut(tmp_path: Path) -> None:
    async def work(model: Model, ctx: TaskContext) -> Update:
        await asyncio.to_thread(ctx.log, {"loss": 1.0}, step=1)
        for step in range(2, 10 * MAX_LOGS_PER_S):
            ctx.log({"loss": 1.0}, step=step)
        return Update(None, 1)

    async with fake_server(tmp_path / "s") as server, job(server, tmp_path / "t", FakeTrainer(work)):
        await server.up(CELL)
        give(server, assignment(server, None, expects_model=False))
        await server.next(TaskResult)

        assert await server.next(LogMetrics) == LogMetrics(key(), 1, {"loss": 1.0})
        assert server.queue(LogMetrics).qsize() < 3 * MAX_LOGS_PER_S


async def test_failure_of_the_job_is_reported_by_its_kind(tmp_path: Path) -> None:
    trainer = FakeTrainer(add_one)
    async with fake_server(tmp_path / "s") as server:
        spec = JobProcessSpec(JOB, SITE, PROJECT, job_spec(), job_identity(), ("memory",), b"", "", str(tmp_path / "t"))
        connection = JobConnection(spec, trainer, rng=random.Random(1), dial=server.dial, transfers=server.transfers)
        running = asyncio.create_task(connection.run())
        await connection.report_failure(TrainingFailed(SITE, "start", "RuntimeError: no GPU (train.py:1)"))
        await connection.report_failure(ProtocolError("x", got=1, expected="2"))
        await connection.close()
        await running

        first = await server.next(JobFailure)
        assert (first.job_id, first.kind, first.code) == (JOB, "exception", "training-failed")
        assert first.reason == "RuntimeError: no GPU (train.py:1)"
        assert (await server.next(JobFailure)).kind == "exception"


async def test_job_whose_token_is_refused_ends_with_the_reason(tmp_path: Path) -> None:
    async with (
        fake_server(tmp_path / "s", accept_tokens=False) as server,
        job(server, tmp_path / "t", FakeTrainer(add_one)) as running,
    ):
        with pytest.raises(Unauthenticated, match="the token has expired"):
            await running


async def test_job_whose_answer_is_refused_for_its_token_ends_and_does_not_go_on_in_vain(tmp_path: Path) -> None:
    refuse: dict[str, HanseError] = {"result": Unauthenticated("the token has expired; register again")}
    async with (
        fake_server(tmp_path / "s", refuse=refuse) as server,
        job(server, tmp_path / "t", FakeTrainer(add_one)) as running,
    ):
        await server.up(CELL)
        give(server, assignment(server))
        with pytest.raises(Unauthenticated, match="the token has expired"):
            await running


async def test_job_whose_token_is_not_renewed_ends(tmp_path: Path) -> None:
    soon = job_identity()
    soon = type(soon)(type(soon.credentials)(SITE, f"job:{JOB}~{'0' * 32}~2", "signed", "1"))  # type: ignore[arg-type]  # ids are text
    refuse: dict[str, HanseError] = {"renew": NotFound("running job", JOB)}
    async with (
        fake_server(tmp_path / "s", refuse=refuse) as server,
        job(server, tmp_path / "t", FakeTrainer(add_one), identity=soon) as running,
    ):
        await server.up(CELL)
        with pytest.raises(RemoteError, match="there is no running job"):
            await running


async def test_token_is_renewed_and_used_from_then_on(tmp_path: Path) -> None:
    soon = job_identity()
    soon = type(soon)(type(soon.credentials)(SITE, f"job:{JOB}~{'0' * 32}~2", "signed", "1"))  # type: ignore[arg-type]  # ids are text
    async with (
        fake_server(tmp_path / "s") as server,
        job(server, tmp_path / "t", FakeTrainer(add_one), identity=soon),
    ):
        await server.up(CELL)
        await server.next(Renew)
        server.cell.tell(Fqcn(CELL), Channel.JOB, "goodbye", Goodbye("maintenance"))
        await server.go_away(AWAY)
        await server.up(CELL)

        credentials = server.hellos[-1].credentials
        assert credentials is not None
        assert credentials.token == "token-1"


async def test_a_model_that_the_disk_has_damaged_is_fetched_again(tmp_path: Path) -> None:
    async with fake_server(tmp_path / "s") as server:
        task = assignment(server, LARGE)
        assert task.model is not None
        digests = digests_of(task.model)
        files = TensorFiles(tmp_path / "t")
        for digest in digests:
            files.put(server.files(SCOPE).map(digest))
            files.path(digest).write_bytes(b"?" * files.size(digest))
        async with job(server, tmp_path / "t", FakeTrainer(add_one)):
            await server.up(CELL)
            give(server, task)

            update = (await server.next(TaskResult)).update
            assert update is not None
            assert update.model is not None
            assert load_model(update.model, server.files(SCOPE))["w"][0] == np.float32(1)


async def test_what_the_server_says_of_a_model_that_it_has_not_is_the_faults_code(tmp_path: Path) -> None:
    class Without:
        async def download(self, scope: str, digest: Any, size: int, into: Any) -> None:
            into.close()
            raise RemoteError("there is no tensor", return_code=ReturnCode.NOT_FOUND, error_code=NotFound.code)

    async with fake_server(tmp_path / "s") as server:
        server.transfers = Without()  # type: ignore[assignment]  # for this test
        async with job(server, tmp_path / "t", FakeTrainer(add_one)):
            await server.up(CELL)
            give(server, assignment(server, LARGE))

            fault = (await server.next(TaskResult)).fault
            assert fault is not None
            assert (fault.code, fault.reason) == ("not-found", "there is no tensor")


async def test_download_goes_on_after_a_broken_connection(tmp_path: Path) -> None:
    async with fake_server(tmp_path / "s") as server:
        downloads = 0
        local = server.transfers

        class Flaky:
            missing = staticmethod(local.missing)
            upload = staticmethod(local.upload)

            async def download(self, scope: str, digest: Any, size: int, into: Any) -> None:
                nonlocal downloads
                downloads += 1
                if downloads == 1:
                    into.close()
                    raise AWAY
                await local.download(scope, digest, size, into)

        server.transfers = Flaky()  # type: ignore[assignment]  # for this test
        async with job(server, tmp_path / "t", FakeTrainer(add_one)):
            await server.up(CELL)
            give(server, assignment(server, LARGE))

            assert (await server.next(TaskResult)).update is not None
            assert downloads == 3
            assert TensorFiles(tmp_path / "t").missing([]) == []
