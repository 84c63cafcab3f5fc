import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from hanse.cell.listener import Listener
from hanse.cell.rpc import ServerTls
from hanse.client.job_process import TERMINATED
from hanse.client.process_spec import PROCESS_MODULE, JobProcessSpec
from hanse.errors import Unreachable
from hanse.identity.authorities import Authority, JobAuthority
from hanse.ids import Fqcn
from hanse.launch.process import RunningProcess
from hanse.launch.surviving import SurvivingLauncher
from hanse.messages import (
    Channel,
    JobCredentials,
    JobFailure,
    LogMetrics,
    TaskAssignment,
    TaskKey,
    TaskResult,
)
from hanse.model import Model
from hanse.settings import SitePolicy
from hanse.storage.models import load_model, store_model

from .fake_server import JOB, PROJECT, SITE, FakeServer, certified, fake_server, job_identity, job_spec
from .site import code_folder

CELL = Fqcn(f"{SITE}.{JOB}")
SCOPE = f"job/{JOB}"
MODEL = Model({"w": np.arange(50_000, dtype=np.float32)})

APP = """
import os, sys, threading
from hanse.client import ClientApp
from hanse.model import Model, Update

app = ClientApp()

@app.train
def train(model, ctx):
    assert threading.current_thread() is threading.main_thread()
    assert os.path.samefile(os.getcwd(), os.path.dirname(__file__))
    assert sys.stdin.read() == ""
    ctx.log({"loss": 0.5}, step=1)
    return Update(Model({"w": model["w"] + ctx.config["add"]}), 5, {"seen": 1})

@app.evaluate
def evaluate(model, ctx):
    with open(ctx.site["evaluating"], "w") as told:
        told.write("now")
    threading.Event().wait()
"""

SCRIPT = """
import hanse.client as hanse

while hanse.is_running():
    task = hanse.receive()
    hanse.log({"loss": 0.5}, step=1)
    hanse.send({"w": task.model["w"] + task.config["add"]}, num_examples=5, metrics={"seen": 1})
print("the script has ended")
"""


@dataclass
class Place:
    server: FakeServer
    target: str
    folder: Path
    listener: Listener
    roots: bytes = b""

    async def restart(self) -> None:
        """Stop listening, ending all streams, and listen at the same place again."""
        await self.listener.stop(0.1)
        await self.server.go_away(Unreachable("server", "it has gone"))
        self.listener = Listener(self.server.reception, scopes=self.server.scopes, tls=None, target=self.target)
        await self.listener.start()

    async def launch(self, client: str = "app:app", **changes: Any) -> RunningProcess:
        spec = JobProcessSpec(
            **{
                "job_id": JOB,
                "client": SITE,
                "project": PROJECT,
                "spec": job_spec(client, config={"add": 1.0}),
                "identity": job_identity(),
                "servers": (self.target,),
                "roots": self.roots,
                "code": str(self.folder / "code"),
                "tensors": str(self.folder / "tensors"),
                **changes,
            }
        )
        return await SurvivingLauncher().launch(
            PROCESS_MODULE, spec=msgspec.msgpack.encode(spec), log_path=self.folder / "log", env={}, name="job"
        )

    def give(self, name: str = "train") -> None:
        reference = store_model(MODEL, self.server.files(SCOPE))
        task = TaskAssignment(TaskKey(1, name, 0, SITE), reference, expects_model=name == "train")
        self.server.cell.tell(CELL, Channel.TASK, "task", task)


@asynccontextmanager
async def place(
    folder: Path, source: str = APP, name: str = "app.py", tls: ServerTls | None = None
) -> AsyncIterator[Place]:
    """A fake server that listens on a real port, and a job's code."""
    code_folder(folder / "code", source, name)
    async with fake_server(folder / "server") as server:
        listener = Listener(server.reception, scopes=server.scopes, tls=tls, target="127.0.0.1:0")
        target = await listener.start()
        here = Place(server, target, folder, listener)
        try:
            yield here
        finally:
            await here.listener.stop(0.5)


@pytest.mark.parametrize(("client", "name", "source"), [("app:app", "app.py", APP), ("train.py", "train.py", SCRIPT)])
async def test_functions_and_script_run_the_same_job_end_to_end(
    tmp_path: Path, client: str, name: str, source: str
) -> None:
    async with place(tmp_path, source, name) as here:
        process = await here.launch(client)
        await here.server.up(CELL)
        here.give()
        result = await here.server.next(TaskResult)
        assert result.update is not None, result.fault
        assert result.update.model is not None
        assert load_model(result.update.model, here.server.files(SCOPE)) == Model({"w": MODEL["w"] + 1})
        assert (result.update.num_examples, result.update.metrics) == (5, {"seen": 1.0})
        assert (await here.server.next(LogMetrics)).metrics == {"loss": 0.5}

        assert await process.stop() == TERMINATED
        if client == "train.py":
            assert "the script has ended" in process.log_tail(), "the run's end ends its loop"


async def test_job_proves_itself_by_a_certificate_of_its_own(tmp_path: Path) -> None:
    now = datetime.now(UTC)
    project = Authority.create(PROJECT, now=now)
    jobs = JobAuthority.load_or_create(tmp_path / "authority", now=now)
    server = certified(project, "server", "server", "localhost", "127.0.0.1")
    certificate, key = jobs.issue(CELL, now=now)
    tls = ServerTls(server.certificate, server.key_pem, project.certificate + jobs.certificate)
    async with place(tmp_path, tls=tls) as here:
        here.roots = project.certificate
        process = await here.launch(identity=JobCredentials(job_identity().credentials, certificate, key))
        peer = await here.server.up(CELL)
        assert peer.transport == "mtls"
        here.give()
        assert (await here.server.next(TaskResult)).update is not None
        assert await process.stop() == TERMINATED


@asynccontextmanager
async def evaluating(here: Place, **changes: Any) -> AsyncIterator[RunningProcess]:
    """A process whose code is in the middle of a task that does not end."""
    told = here.folder / "evaluating"
    os.mkfifo(told)
    process = await here.launch(site={"evaluating": str(told)}, **changes)
    try:
        await here.server.up(CELL)
        here.give("evaluate")
        await asyncio.to_thread(told.read_text)
        yield process
    finally:
        await process.stop()


def lose_agent(process: RunningProcess) -> None:
    """Close the life line as the kernel does when the agent dies."""
    assert process._life_line is not None
    os.close(process._life_line)
    process._life_line = os.open(os.devnull, os.O_RDONLY)


async def test_process_is_gone_soon_after_sigterm_though_user_code_does_not_end(tmp_path: Path) -> None:
    async with place(tmp_path) as here, evaluating(here) as process:
        os.kill(process.pid, signal.SIGTERM)

        assert await process.wait() == TERMINATED


async def test_process_without_an_agent_ends_by_itself_though_user_code_does_not_and_says_why(tmp_path: Path) -> None:
    async with place(tmp_path) as here, evaluating(here, agent_grace_s=0.1) as process:
        lose_agent(process)

        assert await process.wait() == -signal.SIGKILL, "what it has started ends with it"
        log = process.log_tail()
        assert "the agent is gone; the job goes on" in log
        assert "the job ends here: its agent has been gone for 0.1 s, and no other has come job=digits-1" in log


async def test_process_without_an_agent_goes_on_and_delivers(tmp_path: Path) -> None:
    async with place(tmp_path) as here:
        process = await here.launch()
        await here.server.up(CELL)
        lose_agent(process)
        here.give()

        assert (await here.server.next(TaskResult)).update is not None
        assert await process.stop() == TERMINATED


async def test_process_whose_folder_is_gone_ends_by_itself(tmp_path: Path) -> None:
    async with place(tmp_path) as here:
        process = await here.launch()
        await here.server.up(CELL)
        (tmp_path / "life-line").unlink()
        lose_agent(process)

        assert await process.wait() == -signal.SIGKILL
        assert "the job ends here: its life line to the agent is gone (No such file or directory)" in process.log_tail()


async def test_sigterm_ends_the_process_in_order(tmp_path: Path) -> None:
    async with place(tmp_path) as here:
        process = await here.launch()
        await here.server.up(CELL)
        here.give()
        await here.server.next(TaskResult)  # so the process, too, counts the connection as up
        os.kill(process.pid, signal.SIGTERM)

        assert await process.wait() == TERMINATED
        peer, reason = await here.server.downs.get()
        assert (peer.fqcn, reason) == (CELL, f"cannot reach {CELL}: it has left")


@pytest.mark.parametrize(
    ("client", "source", "kind", "code", "reason"),
    [
        ("app:app", "raise OSError('no GPU')\n", "exception", "import-failed", "OSError: no GPU (app.py:1)"),
        ("app:other", APP, "config", "job-invalid", "module 'app' has no attribute 'other'"),
        (
            "app:app",
            "import not_there_at_all\n",
            "exception",
            "missing-dependency",
            "module 'not_there_at_all', which app.py:1 imports, is not installed",
        ),
        ("train.py", APP, "config", "job-invalid", "a script among the job's files"),
    ],
)
async def test_code_that_cannot_run_is_reported_and_is_the_last_word_of_the_log(
    tmp_path: Path, client: str, source: str, kind: str, code: str, reason: str
) -> None:
    async with place(tmp_path, source) as here:
        process = await here.launch(client)
        failure = await here.server.next(JobFailure)
        assert await process.wait() == 1

        assert (failure.kind, failure.code) == (kind, code)
        assert reason in failure.reason
        assert reason.rpartition(" is not")[0] in process.log_tail(1)


@pytest.mark.parametrize(("lines", "told"), [(20, ["data of 12 patients", "    int('x')"]), (0, [])])
async def test_failure_comes_with_as_much_of_this_process_log_as_the_site_lets_go(
    tmp_path: Path, lines: int, told: list[str]
) -> None:
    source = (
        "import hanse\n"
        "app = hanse.ClientApp()\n"
        "@app.train\n"
        "def train(model, ctx):\n"
        "    print('data of 12 patients')\n"
        "    int('x')\n"
    )
    (tmp_path / "log").write_text("what an earlier process said\n")
    async with place(tmp_path, source) as here:
        process = await here.launch(log=str(tmp_path / "log"), policy=SitePolicy(log_lines=lines))
        await here.server.up(CELL)
        here.give()
        fault = (await here.server.next(TaskResult)).fault
        assert fault is not None
        assert fault.code == "training-failed"
        log = fault.log_tail.splitlines()
        assert [line for line in log if line in told] == told
        assert (log == []) is (told == [])
        assert "earlier" not in fault.log_tail
        assert await process.stop() == TERMINATED


async def test_process_that_the_server_refuses_for_good_ends_with_the_reason(tmp_path: Path) -> None:
    async with place(tmp_path) as here:
        here.server.accept_tokens = False
        process = await here.launch()

        assert await process.wait() == 1
        assert "the job cannot go on: the token has expired" in process.log_tail(1)


async def test_process_waits_for_a_server_that_is_away_and_says_so(tmp_path: Path) -> None:
    async with place(tmp_path) as here:
        process = await here.launch()
        await here.server.up(CELL)
        await here.restart()
        await here.server.up(CELL)
        assert await process.stop() == TERMINATED

        assert "waiting for the server job=digits-1 reason='" in process.log_tail()
