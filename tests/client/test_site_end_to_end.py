"""A site with real processes and a real port: what runs here runs at a hospital."""

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import psutil
import pytest
from benchmarks import marked

from hanse.cell.listener import Listener
from hanse.client.agent import ClientAgent
from hanse.client.workspace import JobFolder, end_orphans, job_folders, only_agent_of
from hanse.errors import UNKNOWN_STATUS
from hanse.ids import Fqcn
from hanse.launch.held import HeldProcess
from hanse.launch.process import last_lines
from hanse.launch.surviving import SurvivingLauncher, pid_at
from hanse.messages import Channel, Heartbeat, JobEnded, Quit, TaskAssignment, TaskKey, TaskResult
from hanse.model import Model
from hanse.storage.models import load_model, store_model

from ..launch.much import is_too_long
from .fake_server import JOB, SITE, FakeServer, fake_server, job_spec
from .site import code_folder, settings, within

APP = """
from hanse.client import ClientApp
from hanse.model import Model, Update

app = ClientApp()

@app.train
def train(model, ctx):
    if ctx.round == 1:
        import os
        os._exit(7)
    if ctx.round == 4:
        import threading
        for _ in range(640):
            print("x" * 100_000)
        print("no more")
        threading.Event().wait()
    if ctx.round == 5:
        import subprocess, sys
        child = subprocess.Popen([sys.executable, "-c", "import threading; threading.Event().wait()"])
        return Update(model, 1, {"child": child.pid})
    return Update(Model({"w": model["w"] + float(ctx.site["add"])}), 1)
"""

CELL = Fqcn(f"{SITE}.{JOB}")
MODEL = Model({"w": np.arange(50_000, dtype=np.float32)})


async def test_agent_runs_a_job_in_a_process_reports_its_death_and_leaves_nothing_behind(tmp_path: Path) -> None:
    async with fake_server(tmp_path / "s") as server:
        listener = Listener(server.reception, scopes=server.scopes, tls=None, target="127.0.0.1:0")
        target = await listener.start()
        agent = ClientAgent(
            settings(servers=(target,), config={"add": 2}),
            workspace=tmp_path / "w",
            launcher=SurvivingLauncher(),
            rng=random.Random(1),
        )
        running = asyncio.create_task(agent.run())
        await server.up()
        reference = store_model(MODEL, server.files(f"job/{JOB}"))
        deploy = server.announce(code_folder(tmp_path / "code", APP), job_spec())
        for attempt in (1, 2):
            await server.ask("deploy", deploy)
            await server.ask("start", server.start(attempt))
            await server.up(CELL)
            task = TaskAssignment(TaskKey(attempt, "train", 0, SITE), reference)
            server.cell.tell(CELL, Channel.TASK, "task", task)
            if attempt == 1:
                ended = await server.next(JobEnded)
                assert (ended.attempt, ended.status) == (1, 7)
                assert "task received" in ended.log_tail

        result = await server.next(TaskResult)
        assert result.update is not None
        assert result.update.model is not None
        assert load_model(result.update.model, server.files(f"job/{JOB}")) == Model({"w": MODEL["w"] + 2})
        await server.next(Heartbeat)

        agent.stop()
        await within(20, running)
        await server.next(Quit)
        await listener.stop(0.1)
        assert psutil.Process().children() == []
        assert [path.name for path in (tmp_path / "w" / "jobs" / JOB).iterdir()] == ["job.log"]


AGENT = """
import asyncio, pathlib, random, sys
from hanse.client.agent import ClientAgent
from hanse.launch.held import HeldProcess
from hanse.launch.surviving import SurvivingLauncher, pid_at
from tests.client.site import settings

async def main(target, workspace):
    chosen = settings(servers=(target,), config={"add": 2})
    await ClientAgent(
        chosen, workspace=pathlib.Path(workspace), launcher=SurvivingLauncher(), rng=random.Random(1)
    ).run()

asyncio.run(main(*sys.argv[1:]))
"""
"""An agent in a process of its own, which can be killed."""


@dataclass
class Left:
    """A site whose agent was killed while its job's process lived."""

    server: FakeServer
    target: str
    workspace: Path
    process: HeldProcess

    @property
    def folder(self) -> JobFolder:
        return JobFolder(self.workspace / "jobs" / JOB)

    @asynccontextmanager
    async def next_agent(self, add: int = 2) -> AsyncIterator[ClientAgent]:
        """The next agent of the workspace, until the end of the block; the server has its first heartbeat to come."""
        agent = ClientAgent(
            settings(servers=(self.target,), config={"add": add}),
            workspace=self.workspace,
            launcher=SurvivingLauncher(),
            rng=random.Random(2),
        )
        while not self.server.queue(Heartbeat).empty():  # the killed agent's
            self.server.queue(Heartbeat).get_nowait()
        running = asyncio.create_task(agent.run(), name="next agent")
        try:
            yield agent
        finally:
            agent.stop()
            await within(20, running)

    def give(self, number: int) -> None:
        reference = store_model(MODEL, self.server.files(f"job/{JOB}"))
        task = TaskAssignment(TaskKey(number, "train", 0, SITE), reference)
        self.server.cell.tell(CELL, Channel.TASK, "task", task)


@pytest.fixture
async def left(tmp_path: Path) -> AsyncIterator[Left]:
    async with fake_server(tmp_path / "s") as server:
        listener = Listener(server.reception, scopes=server.scopes, tls=None, target="127.0.0.1:0")
        target = await listener.start()
        workspace = tmp_path / "w"
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), marked.VARIABLE: str(tmp_path)}
        try:
            agent = await asyncio.create_subprocess_exec(sys.executable, "-c", AGENT, target, str(workspace), env=env)
            try:
                await server.up()
                await server.ask("deploy", server.announce(code_folder(tmp_path / "code", APP), job_spec()))
                await server.ask("start", server.start(attempt=2))
                await server.up(CELL)
            finally:
                agent.kill()
                await agent.wait()
            pid = pid_at(workspace / "jobs" / JOB)
            assert pid is not None
            with closing(HeldProcess(pid)) as process:
                yield Left(server, target, workspace, process)
        finally:
            marked.kill(str(tmp_path))
            await listener.stop(0.1)


async def test_next_agent_takes_a_process_over_and_reports_it_with_its_first_heartbeat(left: Left) -> None:
    async with left.next_agent():
        await left.server.up()
        assert await left.server.next(Heartbeat) == Heartbeat((JOB,))
        await left.server.ask("start", left.server.start(attempt=2))  # asked again: the answer was lost with the agent
        left.give(3)
        result = await left.server.next(TaskResult)
        assert result.update is not None
        assert pid_at(left.folder.path) == left.process.pid
    assert left.process.wait(0), "an agent that stops in order ends what it took over"
    assert [path.name for path in left.folder.path.iterdir()] == ["job.log"]
    log = left.folder.log.read_text()
    assert log.count("task received") == 1
    assert log.index(" connected ") < log.index("task received"), "one log, of what came before and after"


async def test_log_of_a_process_that_was_taken_over_and_prints_on_and_on_is_bounded(left: Left) -> None:
    left.server.heartbeat_s = 0.05
    async with left.next_agent():
        await left.server.up()
        left.give(4)
        while last_lines(left.folder.log, 1, start=0) != "no more" or is_too_long(left.folder.log):
            await left.server.next(Heartbeat)
        assert left.folder.log.stat().st_size > 640 * 100_000
        assert pid_at(left.folder.path) == left.process.pid


async def test_end_of_a_process_that_was_taken_over_is_told_with_its_attempt_and_last_lines(left: Left) -> None:
    async with left.next_agent():
        await left.server.up()
        left.give(1)  # which makes it exit with status 7
        ended = await left.server.next(JobEnded)
        assert (ended.job_id, ended.attempt) == (JOB, 2)
        assert ended.status in (7, UNKNOWN_STATUS)
        assert "task received" in ended.log_tail
        await left.server.ask("start", left.server.start(attempt=3))
        await left.server.up(CELL)
        assert pid_at(left.folder.path) not in (None, left.process.pid)


async def test_process_is_not_taken_over_by_an_agent_that_would_start_it_otherwise(left: Left) -> None:
    async with left.next_agent(add=3):
        await left.server.up()
        assert await left.server.next(Heartbeat) == Heartbeat(())
        assert left.process.wait(0)
        assert [path.name for path in left.folder.path.iterdir()] == ["job.log"]


async def test_process_that_was_taken_over_is_ended_when_the_server_takes_its_certificate_no_more(left: Left) -> None:
    started = left.folder.started()
    assert started is not None
    left.folder.note(msgspec.structs.replace(started, authority="old"))
    left.server.job_authority = "new"
    async with left.next_agent():
        await left.server.up()
        assert await asyncio.to_thread(left.process.wait, 30)
    assert left.server.queue(JobEnded).empty(), "it was asked to end"


@pytest.mark.parametrize("lost", ["started", "life-line"])
async def test_process_that_cannot_be_taken_over_is_ended(left: Left, lost: str) -> None:
    (left.folder.path / lost).unlink()
    async with left.next_agent():
        await left.server.up()
        assert await left.server.next(Heartbeat) == Heartbeat(())
        # Without its life line it may have ended by itself, and lets go of its lock a moment before it is gone.
        assert await asyncio.to_thread(left.process.wait, 20)


async def test_process_that_has_died_with_its_agent_is_cleared_away(left: Left) -> None:
    left.process.send(signal.SIGKILL)
    await asyncio.to_thread(left.process.wait, 30)
    async with left.next_agent():
        await left.server.up()
        assert await left.server.next(Heartbeat) == Heartbeat(())
        assert [path.name for path in left.folder.path.iterdir()] == ["job.log"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what a process has left behind")
@pytest.mark.parametrize("by", ["the next agent", "who stops the client"])
async def test_what_a_process_has_left_behind_that_was_killed_with_its_agent_is_ended(left: Left, by: str) -> None:
    left.give(5)
    result = await left.server.next(TaskResult)
    assert result.update is not None
    child = HeldProcess(int(result.update.metrics["child"]))
    try:
        left.process.send(signal.SIGKILL)
        assert await asyncio.to_thread(left.process.wait, 20)
        assert not child.wait(0)
        if by == "the next agent":
            async with left.next_agent():
                await left.server.up()
        else:
            assert await asyncio.to_thread(end_orphans, left.workspace, grace_s=30) == []

        assert await asyncio.to_thread(child.wait, 20)
        assert [path.name for path in left.folder.path.iterdir()] == ["job.log"]
    finally:
        with contextlib.suppress(ProcessLookupError):
            child.send(signal.SIGKILL)
        child.close()


async def test_orphans_are_left_to_the_agent_that_runs(left: Left) -> None:
    with only_agent_of(left.workspace):
        assert end_orphans(left.workspace, grace_s=30) == []
        assert not left.process.wait(0)
    assert await asyncio.to_thread(end_orphans, left.workspace, grace_s=30) == [left.process.pid]
    assert left.process.wait(0)
    (folder,) = await asyncio.to_thread(job_folders, left.workspace)
    assert [path.name for path in folder.path.iterdir()] == ["job.log"]


def test_agent_at_rest_carries_no_arrays_and_no_database() -> None:
    program = (
        "import sys, hanse.client.agent, hanse.client.jobs, hanse.launch.process\n"
        "heavy = {'numpy', 'ml_dtypes', 'sqlalchemy', 'hanse.model'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
