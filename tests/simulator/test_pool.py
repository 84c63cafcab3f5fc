"""Workers and their places: what is given up, what dies, what is bounded, what is left."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest

from hanse.client.api import Site
from hanse.errors import ProcessDied, Unreachable
from hanse.ids import ClientName, JobId
from hanse.model import Model
from hanse.simulator.exchange import Answer, Broken, Done, Faulty, Invalid, Load, Loaded, Raised, Request, Work
from hanse.simulator.pool import FunctionCrew, ScriptCrew
from hanse.storage.models import load_model, store_model
from hanse.storage.tensors import TensorFiles

APP = """
import os, signal
from pathlib import Path
import hanse

app = hanse.ClientApp()

@app.train
def train(model, ctx):
    return hanse.Update(hanse.Model({name: array + 1 for name, array in model.items()}), 1, {"pid": os.getpid()})

@app.task("wait")
def wait(model, ctx):
    ctx.log({"begun": 1})
    Path(ctx.config["go"]).read_bytes()  # a named pipe: this waits until somebody has opened and closed it
    return hanse.Update(None, 1, {"pid": os.getpid()})

@app.task("log")
def log(model, ctx):
    ctx.log({"loss": 2.5}, step=7)
    return hanse.Update(None, 1)

@app.task("die")
def die(model, ctx):
    print("last words", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

@app.task("numbers")
def numbers(model, ctx):
    return hanse.Update(None, 2.5)
"""


def ignore(step: int, metrics: dict[str, float]) -> None:
    del step, metrics


def client(number: int = 1) -> ClientName:
    return ClientName(f"site-{number}")


def write(folder: Path, source: str = APP, name: str = "client.py") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(source)
    return folder


def work(
    folder: Path, task: str = "train", *, model: Model | None = None, number: int = 1, **config: str
) -> Callable[[int], Request]:
    tensors = folder.parent / "tensors"
    reference = store_model(model or Model({}), TensorFiles(tensors))
    return lambda key: Work(
        number=key,
        code=str(folder),
        reference="client:app",
        tensors=str(tensors),
        model=reference,
        client=client(number),
        job=JobId("job"),
        round=1,
        name=task,
        config=dict(config),
        site={},
        seed=0,
    )


async def test_models_go_to_workers_and_come_back_as_files(tmp_path: Path) -> None:
    code = write(tmp_path / "code")
    model = Model({"large": np.ones((100, 100), np.float32), "small": np.ones(3)})
    async with FunctionCrew(1, logs=tmp_path).open() as crew:
        answer = await crew.ask(client(), work(code, model=model), ignore)
    assert isinstance(answer, Done)
    assert answer.update.model is not None
    assert [tensor.inline is None for tensor in answer.update.model.tensors] == [True, False]
    back = load_model(answer.update.model, TensorFiles(tmp_path / "tensors"))
    assert (back["large"] == 2).all()
    assert (back["small"] == 2).all()


async def test_what_code_logs_arrives_before_its_answer(tmp_path: Path) -> None:
    logged: list[tuple[int, dict[str, float]]] = []
    async with FunctionCrew(1, logs=tmp_path).open() as crew:
        answer = await crew.ask(client(), work(write(tmp_path / "code"), "log"), lambda *args: logged.append(args))
    assert isinstance(answer, Done)
    assert logged == [(7, {"loss": 2.5})]


async def test_failures_are_answers(tmp_path: Path) -> None:
    code = write(tmp_path / "code")
    async with FunctionCrew(1, logs=tmp_path).open() as crew:
        unknown = await crew.ask(client(), work(code, "predict"), ignore)
        numbers = await crew.ask(client(), work(code, "numbers"), ignore)
        loaded = await crew.ask(client(), lambda key: Load(key, str(code), "client:app", client()), ignore)
        missing = await crew.ask(client(), lambda key: Load(key, str(code), "client:other", client()), ignore)
        gone = work(code, model=Model({"large": np.ones((100, 100))}))
        TensorFiles(tmp_path / "tensors").delete_all()
        faulty = await crew.ask(client(), gone, ignore)
    assert isinstance(unknown, Raised)
    assert "die, log, numbers, train, wait" in unknown.why
    assert isinstance(numbers, Raised)
    assert "a whole number for num_examples" in numbers.why
    assert isinstance(loaded, Loaded)
    assert isinstance(missing, Invalid)
    assert "no attribute 'other'" in missing.expected
    assert isinstance(faulty, Faulty)
    assert "there is no tensor" in faulty.why


async def test_worker_forgets_one_jobs_code_for_anothers(tmp_path: Path) -> None:
    source = "import hanse\nfrom helper import N\napp = hanse.ClientApp()\n"
    source += "@app.train\ndef f(m, c): return hanse.Update(None, N)\n"
    answers: list[Answer] = []
    async with FunctionCrew(1, logs=tmp_path).open() as crew:
        for number in (1, 2):
            code = write(tmp_path / f"code-{number}", source)
            write(code, f"N = {number}\n", "helper.py")
        for number in (1, 2, 1):
            answers.append(await crew.ask(client(), work(tmp_path / f"code-{number}"), ignore))
    assert [answer.update.num_examples for answer in answers if isinstance(answer, Done)] == [1, 2, 1]


async def test_worker_that_is_killed_fails_its_request_alone_and_is_replaced(tmp_path: Path) -> None:
    code = write(tmp_path / "code")
    async with FunctionCrew(1, logs=tmp_path).open() as crew:
        before = await crew.ask(client(), work(code), ignore)
        with pytest.raises(ProcessDied, match="at site-3 was killed by signal 9; its log ends with: last words"):
            await crew.ask(client(3), work(code, "die", number=3), ignore)
        after = await crew.ask(client(), work(code), ignore)
    assert isinstance(before, Done)
    assert isinstance(after, Done)
    assert before.update.metrics["pid"] != after.update.metrics["pid"]


async def test_request_that_is_given_up_keeps_its_place_until_it_is_answered(tmp_path: Path) -> None:
    code, go, begun = write(tmp_path / "code"), tmp_path / "go", asyncio.Event()
    os.mkfifo(go)
    async with FunctionCrew(1, logs=tmp_path).open() as crew:
        first = asyncio.create_task(crew.ask(client(), work(code, "wait", go=str(go)), lambda *_: begun.set()))
        await begun.wait()
        queued = asyncio.create_task(crew.ask(client(2), work(code), ignore))
        dropped = asyncio.create_task(crew.ask(client(3), work(code, "die"), ignore))
        await asyncio.sleep(0)
        first.cancel()
        dropped.cancel()
        await asyncio.gather(first, dropped, return_exceptions=True)
        assert first.cancelled()
        assert not queued.done()
        await asyncio.to_thread(go.write_bytes, b"")
        answer = await queued
    assert isinstance(answer, Done)


async def test_closing_kills_workers_whatever_they_do_and_nothing_is_asked_any_more(tmp_path: Path) -> None:
    code, go, begun = write(tmp_path / "code"), tmp_path / "go", asyncio.Event()
    os.mkfifo(go)
    async with FunctionCrew(2, logs=tmp_path).open() as crew:
        waiting = asyncio.create_task(crew.ask(client(), work(code, "wait", go=str(go)), lambda *_: begun.set()))
        await begun.wait()
        workers = psutil.Process().children()
        assert len(workers) == 2
    await asyncio.gather(waiting, return_exceptions=True)
    assert not [worker for worker in workers if worker.is_running()]
    with pytest.raises(Unreachable):
        await crew.ask(client(), work(code), ignore)


SCRIPT = """
import os, time
from pathlib import Path
import hanse.client as hanse
while hanse.is_running():
    task = hanse.receive()
    busy = Path(task.config["busy"]) / str(os.getpid())
    busy.touch()
    most = len(list(busy.parent.iterdir()))
    time.sleep(0.05)
    busy.unlink()
    hanse.send(num_examples=1, metrics={"most": most, "pid": os.getpid()})
print("the end", flush=True)
"""


def site(number: int) -> Site:
    return Site(client(number), JobId("job"), {}, {}, seed=0)


async def test_scripts_have_a_process_each_and_no_more_are_busy_than_may_be(tmp_path: Path) -> None:
    code, busy = write(tmp_path / "code", SCRIPT, "train.py"), tmp_path / "busy"
    busy.mkdir()
    async with ScriptCrew(2, logs=tmp_path, script="train.py").open() as crew:
        for number in range(1, 5):
            crew.enter(site(number), code)
        answers = await asyncio.gather(
            *(crew.ask(client(n % 4 + 1), work(code, number=n % 4 + 1, busy=str(busy)), ignore) for n in range(8))
        )
        await asyncio.gather(*(crew.leave(client(number)) for number in range(1, 5)))
    metrics = [answer.update.metrics for answer in answers if isinstance(answer, Done)]
    assert len(metrics) == 8
    assert max(each["most"] for each in metrics) <= 2
    assert len({each["pid"] for each in metrics}) == 4
    assert "the end" in (tmp_path / "site-1.log").read_text()


async def test_script_that_ends_before_its_first_task_is_broken(tmp_path: Path) -> None:
    code = write(tmp_path / "code", "1 / 0\n", "train.py")
    async with ScriptCrew(1, logs=tmp_path, script="train.py").open() as crew:
        crew.enter(site(1), code)
        answer = await crew.ask(client(), work(code), ignore)
        await crew.leave(client())
        with pytest.raises(Unreachable):
            await crew.ask(client(), work(code), ignore)
    assert answer == Broken(Raised(0, "ZeroDivisionError: division by zero (train.py:1)"))


def test_worker_loads_no_network_and_no_database() -> None:
    unwanted = ("grpc", "sqlalchemy", "cryptography")
    program = f"import sys, hanse.simulator.worker\nprint([name for name in {unwanted} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "[]\n"
