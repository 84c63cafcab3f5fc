"""A site with real processes and a real port: what runs here runs at a hospital."""

import asyncio
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil

from hanse.cell.listener import Listener
from hanse.client.agent import ClientAgent
from hanse.ids import Fqcn
from hanse.launch.surviving import SurvivingLauncher
from hanse.messages import Channel, Heartbeat, JobEnded, Quit, TaskAssignment, TaskKey, TaskResult
from hanse.model import Model
from hanse.storage.models import load_model, store_model

from .fake_server import JOB, SITE, fake_server, job_spec
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


def test_agent_at_rest_carries_no_arrays_and_no_database() -> None:
    program = (
        "import sys, hanse.client.agent, hanse.client.jobs, hanse.launch.process\n"
        "heavy = {'numpy', 'ml_dtypes', 'sqlalchemy', 'hanse.model'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
