"""What ``simulate`` promises: the same bytes each time, and as deployed; one sentence for a failure; nothing left."""

import argparse
import asyncio
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np
import psutil
import pytest

import hanse
from hanse.cell.loop import run
from hanse.client.agent import ClientAgent
from hanse.errors import ConfigError, Conflict, JobInvalid
from hanse.ids import Digest
from hanse.launch.surviving import SurvivingLauncher
from hanse.messages import JobEvent
from hanse.run.authoring import package_of
from hanse.server.federated_server import FederatedServer
from hanse.settings import ClientSettings
from hanse.simulator import SimulationFailed, SimulationResult, simulate

from .jobs import CLIENT, PACED, write_definition, write_job, write_script_job


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test of this module leaves no process and no temporary file behind."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    before = set(psutil.Process().children(recursive=True))
    modules = set(sys.modules)
    yield
    assert set(psutil.Process().children(recursive=True)) <= before
    assert list(temporary.iterdir()) == []
    assert {"client", "model"}.isdisjoint(set(sys.modules) - modules)


def test_same_seed_gives_the_same_bytes_whatever_the_number_of_workers(tmp_path: Path) -> None:
    job = write_job(tmp_path / "job")
    first, second = simulate(job, clients=5, workers=1), simulate(job, clients=5, workers=3)
    assert first.model == second.model
    assert first.digest == second.digest
    assert [each.metrics for each in first.history] == [each.metrics for each in second.history]


def test_another_seed_gives_another_model_and_stands_in_for_the_jobs_own(tmp_path: Path) -> None:
    job = write_job(tmp_path / "job")
    plain, same = simulate(job, 2, workers=1), simulate(str(job), 2, seed=3, workers=1)
    other = simulate(job, 2, seed=4, workers=1)
    assert plain.digest == same.digest != other.digest


def test_result_tells_of_every_round_and_its_model_outlives_the_workspace(tmp_path: Path) -> None:
    result = simulate(write_job(tmp_path / "job"), clients=3, workers=1)
    assert result.view.state == "completed"
    assert [each.round for each in result.history] == [0, 1, 2, 3]
    assert result.history[-1].answered == ("site-1", "site-2", "site-3")
    assert result.history[-1].metrics["num_examples"] == 1 + 2 + 3
    assert result.model["big"].shape == (100, 60)
    assert np.isfinite(result.model["big"]).all()
    assert not result.model["big"].flags.writeable


def test_clients_of_a_buffered_run_do_not_wait_for_each_other(tmp_path: Path) -> None:
    gates = {"first_gate": tmp_path / "first", "second_gate": tmp_path / "second"}
    for gate in gates.values():
        os.mkfifo(gate)
    job = write_job(tmp_path / "job", client=PACED)
    config = "\n".join(f'{name} = "{gate}"' for name, gate in gates.items())
    more = f"buffer_size = 1\n[tool.hanse.workflow.config]\n{config}\n"
    write_definition(job, rounds=4, workflow="fedbuff", more=more)

    result = simulate(job, clients=2, workers=2)

    assert [each.answered for each in result.history[:4]] == [(), ("site-1",), ("site-1",), ("site-2",)]
    assert [each.metrics.get("staleness") for each in result.history[:4]] == [None, 0.0, 0.0, 2.0]
    last = {("site-1",): 1 / math.sqrt(2), ("site-2",): 1.0}[result.history[4].answered]  # whichever was first
    step = result.model["small"] - initial_small(3)
    np.testing.assert_allclose(step, 1 + 1 + 1 / math.sqrt(3) + last, rtol=1e-12)


def initial_small(seed: int) -> np.ndarray:  # type: ignore[type-arg]
    """The job's own initial model's small tensor."""
    rng = np.random.default_rng(seed)
    rng.standard_normal((100, 60))
    return rng.standard_normal(5)


def deployed(job: Path, home: Path, clients: int) -> Digest:
    """Return the digest of what *job* results in, run by a server and agents over loopback, in real processes."""
    server = FederatedServer("real", min_num_clients=clients, max_num_clients=clients)
    server.deploy(argparse.Namespace(workspace=home / "server"), {"service": {"target": "127.0.0.1:0"}})
    try:
        return run(_deployed(server, job, home, clients), 60)
    finally:
        server.close()


async def _deployed(server: FederatedServer, job: Path, home: Path, clients: int) -> Digest:
    cell = server.get_cell()
    assert cell is not None
    assert cell.target is not None
    agents = [
        ClientAgent(
            ClientSettings(
                project="real",
                name=f"site-{number + 1}",
                servers=(cell.target,),
                config={"partition": number, "partitions": clients},
                tls=False,
            ),
            workspace=home / f"site-{number + 1}",
            launcher=SurvivingLauncher(),
            rng=random.Random(number),
        )
        for number in range(clients)
    ]
    async with asyncio.TaskGroup() as group:
        for agent in agents:
            group.create_task(agent.run())
        for agent in agents:
            await agent.wait_registered()
        package = home / "package.zip"
        await asyncio.to_thread(package.write_bytes, package_of(job)[1])
        record = await server.jobs.wait((await server.jobs.submit(package, submitter="test")).job_id)
        for agent in agents:
            agent.stop()
    assert record.reason == ""
    return record.result


@pytest.mark.parametrize("write", [write_job, write_script_job], ids=["functions", "script"])
def test_simulated_and_deployed_runs_give_the_same_bytes(tmp_path: Path, write: object) -> None:
    assert callable(write)
    job = write(tmp_path / "job")
    assert simulate(job, clients=2, workers=1).digest == deployed(job, tmp_path, 2)


def test_script_keeps_its_process_from_round_to_round(tmp_path: Path) -> None:
    events: list[JobEvent] = []
    job = write_script_job(tmp_path / "job")
    result = simulate(job, clients=4, workers=2, workspace=tmp_path / "kept", on_event=events.append)
    assert [each.metrics.get("seen") for each in result.history] == [None, 1.0, 2.0, 3.0]
    assert result.digest == simulate(job, clients=4, workers=1).digest
    logged = [(event.client, event.metrics["seen"]) for event in events if event.kind == "metrics"]
    assert sorted(logged) == [(f"site-{n}", seen) for n in range(1, 5) for seen in (1.0, 2.0, 3.0)]
    log = (tmp_path / "kept/workers/site-2.log").read_text()
    assert "hello from site-2" in log
    assert "goodbye from site-2" in log


def test_a_job_in_python_is_simulated_too(tmp_path: Path) -> None:
    folder = write_job(tmp_path / "job")
    model = hanse.Model({"big": np.zeros((100, 60), np.float32), "small": np.zeros(5)})
    job = hanse.Job("toy", hanse.FedAvg(rounds=2), "client:app", model, source=folder, min_clients=1)
    assert simulate(job, 1, seed=9).digest != simulate(job, 1).digest


def test_events_arrive_in_the_callers_thread_from_start_to_end(tmp_path: Path) -> None:
    heard: list[tuple[str, int, threading.Thread]] = []
    simulate(
        write_job(tmp_path / "job", rounds=2),
        clients=2,
        on_event=lambda event: heard.append((event.kind, event.round, threading.current_thread())),
    )
    kinds = [kind for kind, _, _ in heard]
    assert kinds.index("job_started") < kinds.index("round_started")
    assert [number for kind, number, _ in heard if kind == "round_done"] == [0, 1, 2]
    assert kinds.count("result_accepted") == 4
    assert kinds[-1] == "job_completed"
    assert {thread for _, _, thread in heard} == {threading.current_thread()}


def test_what_on_event_raises_ends_the_simulation(tmp_path: Path) -> None:
    def fail(event: JobEvent) -> None:
        if event.kind == "task_sent":
            raise ZeroDivisionError

    job = write_job(tmp_path / "job", client=CLIENT.replace("rng, part =", "import time; time.sleep(600); rng, part ="))
    with pytest.raises(ZeroDivisionError):
        simulate(job, clients=2, on_event=fail)


def test_exception_in_training_code_is_told_with_file_and_line(tmp_path: Path) -> None:
    broken = CLIENT.replace('rng, part = ctx.rng(), ctx.site["partition"]', 'raise KeyError("no data")')
    with pytest.raises(SimulationFailed, match=r"KeyError: 'no data' \(client\.py:9\)") as failed:
        simulate(write_job(tmp_path / "job", client=broken), clients=2, workers=1)
    assert failed.value.view.state == "failed"


@pytest.mark.parametrize(
    ("client", "reason"),
    [
        ("import no_such_module\n", r"module 'no_such_module', which client\.py:1 imports, is not inst"),
        ("1 / 0\n", r"by Python 3[.\d]+: ZeroDivisionError: division by zero \(client\.py:1\)"),
        ("app = 3\n", "expected a ClientApp; it is a int"),
    ],
)
def test_code_that_cannot_be_loaded_fails_the_job_before_any_task(tmp_path: Path, client: str, reason: str) -> None:
    events: list[JobEvent] = []
    with pytest.raises(SimulationFailed, match=reason):
        simulate(write_job(tmp_path / "job", client=client), clients=3, on_event=events.append)
    assert not [event for event in events if event.kind == "result_accepted"]


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("import hanse.client\nraise RuntimeError('no gpu')\n", r"RuntimeError: no gpu \(train\.py:2\)"),
        ("print('nothing to do')\n", r"the script train\.py ended without receiving its task"),
    ],
)
def test_script_that_never_takes_a_task_fails_the_job(tmp_path: Path, script: str, reason: str) -> None:
    with pytest.raises(SimulationFailed, match=reason):
        simulate(write_script_job(tmp_path / "job", script), clients=2, workers=1)


def test_task_whose_worker_dies_is_done_by_another_so_that_the_model_is_the_same(tmp_path: Path) -> None:
    died = tmp_path / "died"
    deadly = CLIENT.replace(
        "rng, part = ctx",
        "\n        from pathlib import Path\n"
        f"        if ctx.client == 'site-2' and ctx.round == 2 and not Path({str(died)!r}).exists():\n"
        f"            import os, signal\n            Path({str(died)!r}).touch()\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "        rng, part = ctx",
    )
    undisturbed = simulate(write_job(tmp_path / "safe"), clients=3, workers=1)
    result = simulate(write_job(tmp_path / "job", client=deadly), clients=3, workers=1)
    assert died.exists()
    assert result.digest == undisturbed.digest
    assert all(each.answered == ("site-1", "site-2", "site-3") for each in result.history[1:])


def test_worker_that_always_dies_costs_one_task_and_is_replaced(tmp_path: Path) -> None:
    deadly = CLIENT.replace(
        "rng, part = ctx",
        "\n        if ctx.client == 'site-2' and ctx.round == 1:\n"
        "            import os\n            print('out of luck', flush=True)\n            os._exit(7)\n"
        "        rng, part = ctx",
    )
    job = write_job(tmp_path / "job", client=deadly)
    write_definition(job, more="quorum = 1\n")
    events: list[JobEvent] = []
    result = simulate(job, clients=3, workers=1, on_event=events.append)
    assert [each.answered for each in result.history[1:]] == [
        ("site-1", "site-3"),
        ("site-1", "site-2", "site-3"),
        ("site-1", "site-2", "site-3"),
    ]
    (fault,) = [event.text for event in events if event.kind == "result_accepted" and event.text]
    assert fault == "the job's process at site-2 ended with status 7; its log ends with: out of luck"


def test_what_training_code_prints_and_reads_does_not_disturb_the_protocol(tmp_path: Path) -> None:
    noisy = CLIENT.replace(
        "rng, part = ctx",
        "import os, sys; os.write(1, b'raw noise\\n'); print('noise')\n"
        "        assert sys.stdin.read() == ''\n        rng, part = ctx",
    )
    simulate(write_job(tmp_path / "job", client=noisy), clients=2, workers=1, workspace=tmp_path / "kept")
    log = (tmp_path / "kept/workers/worker-1.log").read_text()
    assert log.count("raw noise") == 6
    assert "client=site-2 task=train round=3" in log


def test_workspace_that_is_given_keeps_logs_and_result(tmp_path: Path) -> None:
    result = simulate(write_job(tmp_path / "job"), clients=2, workspace=tmp_path / "kept")
    kept = tmp_path / "kept/server/runs" / result.view.job_id
    assert (kept / "result" / result.digest).is_file()
    assert not (kept / "tensors").exists()
    again = simulate(write_job(tmp_path / "job"), clients=2, workspace=tmp_path / "kept")
    assert again.digest == result.digest


def test_job_that_needs_other_clients_is_refused_before_anything_starts(tmp_path: Path) -> None:
    job = write_job(tmp_path / "job")
    with pytest.raises(JobInvalid, match="1 simulated client"):
        simulate(job, clients=1, workers=1)
    assert simulate(job, clients=2, workers=1).view.state == "completed"


@pytest.mark.parametrize("number", [{"clients": 0}, {"workers": 0}])
def test_impossible_numbers_are_refused(tmp_path: Path, number: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(number))} is 0; expected 1 or more"):
        simulate(write_job(tmp_path / "job"), **number)  # type: ignore[arg-type]  # one of the two


def test_simulations_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    def job(number: int) -> Path:
        model = """
            import numpy as np
            from hanse import Model
            from helper import NUMBER

            def initial():
                return Model({"big": np.full((100, 60), NUMBER, np.float32), "small": np.full(5, NUMBER)})
        """
        client = """
            import hanse
            from helper import NUMBER
            app = hanse.ClientApp()

            @app.train
            def train(model, ctx):
                return hanse.Update(hanse.Model({name: array + NUMBER for name, array in model.items()}), 1)
        """
        return write_job(tmp_path / f"job-{number}", client=client, model=model, helper=f"NUMBER = {number}\n")

    jobs = [job(number) for number in range(1, 5)]
    with ThreadPoolExecutor(4) as pool:
        results: list[SimulationResult] = list(pool.map(lambda job: simulate(job, clients=3, workers=1), jobs))
    assert [result.model["big"][0, 0] for result in results] == [4, 8, 12, 16]


WORKFLOW = """
    from dataclasses import dataclass
    import hanse
    from contextlib import aclosing

    @dataclass(frozen=True)
    class Mine:
        rounds: int = 2

        def start(self, model):
            return hanse.State(model)

        async def round(self, state, federation):
            from late import BONUS
            answers = []
            async with aclosing(federation.ask(hanse.Task("train", state.model), federation.clients)) as asking:
                async for answer in asking:
                    answers.append(answer)
            updates = [answer.update for answer in sorted(answers, key=lambda answer: answer.client)]
            model = hanse.weighted_mean(updates, federation.allocate)
            model = hanse.Model({name: array + BONUS for name, array in model.items()})
            return hanse.State(model, state.round + 1)
"""


def test_workflows_that_come_with_jobs_run_side_by_side_each_with_its_own_code(tmp_path: Path) -> None:
    jobs = []
    for bonus in (1, 100):
        job = write_job(tmp_path / f"job-{bonus}", mine=WORKFLOW, late=f"BONUS = {bonus}\n")
        write_definition(job, workflow="mine:Mine", rounds=2)
        jobs.append(job)
    with ThreadPoolExecutor(2) as pool:
        ones, hundreds = pool.map(lambda job: simulate(job, clients=2, workers=1), jobs)
    assert hundreds.model["small"].mean() - ones.model["small"].mean() == pytest.approx(99 * 1.9)


def test_modules_of_the_caller_are_not_taken_for_the_jobs_and_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = ModuleType("model")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "model", mine)
        simulate(write_job(tmp_path / "job"), clients=2, workers=1)
        assert sys.modules["model"] is mine
    assert not [entry for entry in sys.path if str(tmp_path) in entry]


def test_straggler_is_not_waited_for_and_ends_with_the_simulation(tmp_path: Path) -> None:
    slow = CLIENT.replace(
        "rng, part = ctx", "import time; time.sleep(600 if ctx.client == 'site-3' else 0)\n        rng, part = ctx"
    )
    job = write_job(tmp_path / "job", client=slow, rounds=1)
    write_definition(job, rounds=1, more="fraction = 0.6\nover_selection = 0.5\n")
    result = simulate(job, clients=3, workers=3)
    assert result.history[-1].answered == ("site-1", "site-2")


INTERRUPTED = """
import sys
from hanse.simulator import simulate
simulate(sys.argv[1], clients=3, workers=2, on_event=lambda event: print(event.kind, flush=True))
"""


BUSY = {
    "functions": CLIENT.replace(
        "rng, part = ctx", "ctx.log({'busy': 1})\n        while True: pass\n        rng, part = ctx"
    ),
    "script": "import hanse.client as h\nh.receive()\nh.log({'busy': 1})\nwhile True: pass\n",
    "script that starts a process": (
        "import hanse.client as h, subprocess\n"
        "h.receive()\nsubprocess.Popen(['sleep', '1000'])\nh.log({'busy': 1})\nwhile True: pass\n"
    ),
}


@contextmanager
def busy_simulation(folder: Path, style: str) -> "Iterator[tuple[subprocess.Popen[str], list[psutil.Process]]]":
    """Give a process that simulates in *folder*, and its workers, of which one at least trains for ever."""
    if style == "functions":
        job = write_job(folder / "job", client=BUSY[style])
    else:
        job = write_script_job(folder / "job", BUSY[style])
    (folder / "its").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(job)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(folder / "its")},
    )
    with process:
        try:
            assert process.stdout is not None
            assert "metrics\n" in iter(process.stdout.readline, "")
            yield process, psutil.Process(process.pid).children(recursive=True)
        finally:
            process.kill()


@pytest.mark.parametrize("style", ["functions", "script"])
def test_interrupt_ends_all_workers_at_once_and_leaves_nothing(tmp_path: Path, style: str) -> None:
    with busy_simulation(tmp_path, style) as (process, workers):
        assert workers
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in said
    assert not [worker for worker in workers if worker.is_running()]
    assert list((tmp_path / "its").iterdir()) == []


@pytest.mark.parametrize("style", ["functions", "script that starts a process"])
def test_workers_end_when_their_simulation_is_killed_with_all_that_they_have_started(
    tmp_path: Path, style: str
) -> None:
    with busy_simulation(tmp_path, style) as (process, workers):
        assert workers
        process.kill()
        process.communicate()
        assert psutil.wait_procs(workers, timeout=60)[1] == []


def test_file_that_simulates_itself_when_imported_is_told_how_not_to(tmp_path: Path) -> None:
    program = tmp_path / "itself.py"
    program.write_text(
        "import hanse\nimport numpy as np\n"
        "app = hanse.ClientApp()\n"
        "@app.train\ndef train(model, ctx): return hanse.Update(model, 1)\n"
        "def initial(): return hanse.Model({'w': np.zeros(3)})\n"
        "hanse.simulate(hanse.Job('itself', hanse.FedAvg(rounds=1), app, initial), clients=2)\n"
    )
    ended = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert "expected that call under \"if __name__ == '__main__':\"" in ended.stderr.splitlines()[-1]


def test_initial_model_whose_code_exits_fails_the_job_and_not_the_process(tmp_path: Path) -> None:
    job = write_job(tmp_path / "job", model="import sys\ndef initial(): sys.exit('no data')\n")
    with pytest.raises(SimulationFailed, match="workflow 'fedavg' failed in round 0: SystemExit: no data"):
        simulate(job, clients=2, workers=1)


async def test_simulate_may_be_called_where_a_loop_runs_but_not_on_the_one_that_it_needs(tmp_path: Path) -> None:
    job = write_job(tmp_path / "job", rounds=1)
    assert simulate(job, clients=2, workers=1).view.state == "completed"

    async def simulate_here() -> None:
        simulate(job, clients=2, workers=1)

    with pytest.raises(Conflict, match="so it cannot be waited for"):
        await asyncio.to_thread(run, simulate_here())


def test_many_clients_take_part(tmp_path: Path) -> None:
    result = simulate(write_job(tmp_path / "job", rounds=1), clients=40)
    assert len(result.history[-1].answered) == 40
