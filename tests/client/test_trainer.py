import asyncio
import platform
import sys
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hanse.client.api import Site
from hanse.client.app import ClientApp
from hanse.client.task import TaskContext
from hanse.client.trainer import MainThreadTrainer, described, load_app, run_function
from hanse.errors import ImportFailed, JobInvalid, MissingDependency, TrainingFailed
from hanse.ids import ClientName, JobId
from hanse.model import Model, Update

CLIENT, JOB = ClientName("site-1"), JobId("job-1")
SITE = Site(CLIENT, JOB, {}, {}, seed=7)
MODEL = Model({"w": np.arange(3, dtype=np.float32)})


def context(name: str = "train", round_number: int = 1) -> TaskContext:
    return TaskContext(CLIENT, JOB, round_number, name, {}, {}, 7)


def drive(trainer: MainThreadTrainer, serve: Callable[[], None], script: Coroutine[Any, Any, Any]) -> Any:
    """Run *script* on a loop in another thread, as a job's process does, while this thread serves."""
    outcome: list[Any] = []

    async def then_close() -> None:
        try:
            outcome.append(await script)
        except Exception as error:  # noqa: BLE001 - handed to the test's own thread
            outcome.append(error)
        finally:
            trainer.close()

    thread = threading.Thread(target=asyncio.run, args=(then_close(),))
    thread.start()
    try:
        serve()
    finally:
        trainer.close()
        thread.join()
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


async def answers(trainer: MainThreadTrainer, *rounds: int) -> list[Update | str]:
    """Ask for each round in turn; a fault is told by its reason."""
    result: list[Update | str] = []
    for number in rounds:
        try:
            result.append(await trainer.run(MODEL, context(round_number=number)))
        except TrainingFailed as error:
            result.append(error.why)
    return result


def run_script(tmp_path: Path, source: str, *rounds: int) -> Any:
    script = tmp_path / "train.py"
    script.write_text(source)
    trainer = MainThreadTrainer(tmp_path)
    return drive(trainer, lambda: trainer.serve_script(script, SITE), answers(trainer, *rounds))


def test_functions_run_in_the_serving_thread_one_after_the_other(tmp_path: Path) -> None:
    app = ClientApp()
    threads: list[threading.Thread] = []

    @app.train
    def train(model: Model, ctx: TaskContext) -> Update:
        threads.append(threading.current_thread())
        return Update(model, ctx.round)

    trainer = MainThreadTrainer(tmp_path)

    async def both() -> list[Update]:
        return await asyncio.gather(*(trainer.run(MODEL, context(round_number=n)) for n in (1, 2)))

    updates = drive(trainer, lambda: trainer.serve_app(app), both())

    assert [update.num_examples for update in updates] == [1, 2]
    assert set(threads) == {threading.current_thread()}


def test_function_that_raises_faults_its_task_with_the_users_line_and_the_next_task_works(tmp_path: Path) -> None:
    (tmp_path / "failing.py").write_text(
        "from hanse.client import ClientApp\n"
        "from hanse.model import Update\n"
        "app = ClientApp()\n"
        "@app.train\n"
        "def train(model, ctx):\n"
        "    if ctx.round == 1:\n"
        "        int('x')\n"
        "    return Update(None, 1)\n"
    )
    sys.path.insert(0, str(tmp_path))
    try:
        app = load_app("failing:app", client=CLIENT, code=tmp_path)
    finally:
        sys.path.remove(str(tmp_path))
    trainer = MainThreadTrainer(tmp_path)

    first, second = drive(trainer, lambda: trainer.serve_app(app), answers(trainer, 1, 2))

    assert first == "ValueError: invalid literal for int() with base 10: 'x' (failing.py:7)"
    assert second == Update(None, 1)


def test_cancelled_task_that_has_not_begun_is_skipped(tmp_path: Path) -> None:
    app = ClientApp()
    begun, go_on = threading.Event(), threading.Event()
    worked_on: list[int] = []

    @app.train
    def train(model: Model, ctx: TaskContext) -> Update:
        begun.set()
        go_on.wait()
        worked_on.append(ctx.round)
        return Update(None, ctx.round)

    trainer = MainThreadTrainer(tmp_path)

    async def cancel_both() -> Update:
        running = asyncio.ensure_future(trainer.run(MODEL, context(round_number=1)))
        await asyncio.to_thread(begun.wait)
        queued = asyncio.ensure_future(trainer.run(MODEL, context(round_number=2)))
        await asyncio.sleep(0)
        queued.cancel()
        running.cancel()
        await asyncio.gather(running, queued, return_exceptions=True)
        go_on.set()
        return await trainer.run(MODEL, context(round_number=3))

    assert drive(trainer, lambda: trainer.serve_app(app), cancel_both()) == Update(None, 3)
    assert worked_on == [1, 3], "what runs already runs to its end; what waits is dropped"


def test_close_ends_the_serving_and_stays_closed(tmp_path: Path) -> None:
    trainer = MainThreadTrainer(tmp_path)
    trainer.close()
    trainer.serve_app(ClientApp())
    trainer.serve_app(ClientApp())


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda model, ctx: {"w": 1}, "the function for 'train' returned dict; expected a hanse Update"),
        (lambda model, ctx: sys.exit(3), "SystemExit: 3 (test_trainer.py:"),
        (lambda model, ctx: Update(None, -1), "num_examples is -1; expected 0 or more"),
    ],
)
def test_answer_that_is_no_update_is_a_fault(function: Any, why: str) -> None:
    app = ClientApp()
    app.train(function)

    with pytest.raises(TrainingFailed) as caught:
        run_function(app, MODEL, context(), code=Path(__file__).parent)
    assert why in caught.value.why


def test_task_that_the_app_does_not_offer_is_a_fault_that_lists_what_it_does(tmp_path: Path) -> None:
    app = ClientApp()
    app.evaluate(lambda model, ctx: Update(None, 1))

    with pytest.raises(TrainingFailed, match=r"'train'; expected one that the app offers: evaluate$"):
        run_function(app, MODEL, context(), code=tmp_path)


def test_error_outside_the_jobs_code_names_the_line_where_it_arose(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="invalid literal") as caught:
        int("x")
    assert "(test_trainer.py:" in described(caught.value, tmp_path)
    assert described(ValueError("never raised"), tmp_path) == "ValueError: never raised"
    assert described(KeyError(), tmp_path) == "KeyError"


@pytest.mark.parametrize(
    ("source", "reference", "sentence"),
    [
        ("", "absent:app", "No module named 'absent'"),
        ("", "NAME:app", "has no attribute 'app'"),
        ("app = 1", "NAME:app", "a ClientApp; it is a int"),
    ],
)
def test_app_that_cannot_be_had_is_an_invalid_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, reference: str, sentence: str
) -> None:
    name = f"app_{abs(hash((source, reference)))}"
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)

    with pytest.raises(JobInvalid, match=sentence):
        load_app(reference.replace("NAME", name), client=CLIENT, code=tmp_path)


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("\nraise RuntimeError('no data')\n", "RuntimeError: no data (NAME.py:2)"),
        ("from json import dump_it\n", "ImportError: cannot import name 'dump_it' from 'json' ("),
        ("import beside.more\n", "ModuleNotFoundError: No module named 'beside.more' (NAME.py:1)"),
        ("import sys\nsys.exit('no GPU')\n", "SystemExit: no GPU (NAME.py:2)"),
        ("match = = 1\n", "SyntaxError: invalid syntax (NAME.py, line 1)"),
    ],
)
def test_module_that_raises_on_import_is_told_with_its_line_and_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, error: str
) -> None:
    name = f"raises_{abs(hash(source))}"
    (tmp_path / f"{name}.py").write_text(source)
    (tmp_path / "beside").mkdir()
    monkeypatch.syspath_prepend(tmp_path)

    with pytest.raises(ImportFailed) as caught:
        load_app(f"{name}:app", client=CLIENT, code=tmp_path)
    assert caught.value.error.startswith(error.replace("NAME", name))
    assert caught.value.python == platform.python_version()


def test_an_error_that_cannot_be_told_faults_its_task_and_the_next_task_works(tmp_path: Path) -> None:
    class Untold(Exception):
        def __str__(self) -> str:
            raise RuntimeError("not even this")

    app = ClientApp()

    @app.train
    def train(model: Model, ctx: TaskContext) -> Update:
        if ctx.round == 1:
            raise Untold
        return Update(None, 1)

    trainer = MainThreadTrainer(tmp_path)
    first, second = drive(trainer, lambda: trainer.serve_app(app), answers(trainer, 1, 2))

    assert str(first).startswith("Untold (test_trainer.py:")
    assert second == Update(None, 1)


def test_module_that_is_not_installed_is_named_with_the_line_that_imports_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "needs_much.py").write_text("import json\nimport no_such_package.part\n")
    monkeypatch.syspath_prepend(tmp_path)

    with pytest.raises(MissingDependency) as caught:
        load_app("needs_much:app", client=CLIENT, code=tmp_path)
    assert (caught.value.module, caught.value.place) == ("no_such_package", "needs_much.py:2")
    assert caught.value.why == "module 'no_such_package', which needs_much.py:2 imports, is not installed"


def test_module_that_a_function_imports_in_vain_is_a_missing_dependency_too(tmp_path: Path) -> None:
    app = ClientApp()

    @app.train
    def train(model: Model, ctx: TaskContext) -> Update:
        import no_such_package  # type: ignore[import-not-found]  # noqa: F401, PLC0415 - which is the point

        return Update(model, 1)

    with pytest.raises(
        MissingDependency, match=r"'no_such_package', which test_trainer.py:\d+ imports, is not install"
    ):
        run_function(app, MODEL, context(), code=tmp_path)


def test_script_that_needs_what_is_not_installed_fails_the_job_as_such(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("import no_such_package\n")
    with pytest.raises(MissingDependency, match=r"which train.py:1 imports"):
        MainThreadTrainer(tmp_path).serve_script(tmp_path / "train.py", SITE)

    in_a_task = LOOP.format(work="import no_such_package")
    (why,) = run_script(tmp_path, in_a_task, 1)
    assert why == "module 'no_such_package', which train.py:5 imports, is not installed"


LOOP = """
import hanse.client as hanse
while hanse.is_running():
    task = hanse.receive()
    {work}
    hanse.send({{"w": task.model["w"] + task.round}}, num_examples=task.round)
"""


def test_script_with_a_loop_answers_each_task_and_ends_with_the_run(tmp_path: Path) -> None:
    first, second = run_script(tmp_path, LOOP.format(work="pass") + "print('after the loop')", 1, 2)

    assert first == Update(Model({"w": MODEL["w"] + 1}), 1)
    assert second == Update(Model({"w": MODEL["w"] + 2}), 2)


def test_script_runs_as_a_program_and_keeps_what_it_knows_between_tasks(tmp_path: Path) -> None:
    source = (
        "import hanse.client as hanse\n"
        "assert __name__ == '__main__'\n"
        "count = 0\n"
        "while hanse.is_running():\n"
        "    hanse.receive()\n"
        "    count += 1\n"
        "    hanse.send(num_examples=count)\n"
    )
    assert run_script(tmp_path, source, 1, 2, 3) == [Update(None, 1), Update(None, 2), Update(None, 3)]


def test_script_without_a_loop_is_run_again_for_each_task(tmp_path: Path) -> None:
    source = "import hanse.client as hanse\ntask = hanse.receive()\nhanse.send(num_examples=task.round)\n"

    assert run_script(tmp_path, source, 1, 2) == [Update(None, 1), Update(None, 2)]


def test_script_that_raises_faults_its_task_and_is_run_again_for_the_next(tmp_path: Path) -> None:
    source = LOOP.format(work="assert task.round != 1, 'bad data'")
    first, second = run_script(tmp_path, source, 1, 2)

    assert first == "AssertionError: bad data (train.py:5)"
    assert second == Update(Model({"w": MODEL["w"] + 2}), 2)


def test_script_that_does_not_answer_is_told_so(tmp_path: Path) -> None:
    asks_again = "import hanse.client as hanse\nwhile hanse.is_running():\n    hanse.receive()\n"
    (why,) = run_script(tmp_path, asks_again, 1)
    assert why == "OutOfTurn: the script asked for a task before it sent its answer to 'train' (train.py:2)"

    ends = "import hanse.client as hanse\nhanse.receive()\n"
    assert run_script(tmp_path, ends, 1, 2) == ["the script train.py ended without sending its answer"] * 2

    ignores = "import hanse.client as hanse\nhanse.is_running()\n"
    assert run_script(tmp_path, ignores, 1, 2) == ["the script train.py ended without receiving its task"] * 2


def test_failure_between_two_tasks_is_logged_and_the_script_is_run_again_for_the_next(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = (
        "import hanse.client as hanse\n"
        "task = hanse.receive()\n"
        "hanse.send(num_examples=task.round)\n"
        "hanse.send(num_examples=9)\n"
    )
    assert run_script(tmp_path, source, 1, 2) == [Update(None, 1), Update(None, 2)]
    assert "there is no task to answer; call hanse.client.receive first" in caplog.text


async def test_task_that_comes_when_nobody_serves_any_more_is_a_fault(tmp_path: Path) -> None:
    trainer = MainThreadTrainer(tmp_path)
    waiting = asyncio.ensure_future(trainer.run(MODEL, context()))
    await asyncio.sleep(0)
    (tmp_path / "train.py").write_text("int('x')")
    with pytest.raises(TrainingFailed, match="ValueError"):
        await asyncio.to_thread(trainer.serve_script, tmp_path / "train.py", SITE)

    with pytest.raises(TrainingFailed, match="the process is ending"):
        await waiting
    with pytest.raises(TrainingFailed, match="the process is ending"):
        await trainer.run(MODEL, context())


def test_script_that_exits_is_judged_by_its_code(tmp_path: Path) -> None:
    source = "import sys, hanse.client as hanse\ntask = hanse.receive()\nhanse.send(num_examples=1)\nsys.exit(0)\n"
    assert run_script(tmp_path, source, 1, 2) == [Update(None, 1), Update(None, 1)]

    source = "import sys, hanse.client as hanse\ntask = hanse.receive()\nsys.exit('no data')\n"
    assert run_script(tmp_path, source, 1) == ["SystemExit: no data (train.py:3)"]


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("raise RuntimeError('no GPU')\n", "RuntimeError: no GPU (train.py:1)"),
        ("print('nothing federated here')\n", "the script train.py ended without receiving its task"),
        ("def broken(:\n", f"the job's code cannot be imported by Python {platform.python_version()}: SyntaxError: "),
    ],
)
def test_script_that_fails_before_any_task_fails_the_job(tmp_path: Path, source: str, why: str) -> None:
    script = tmp_path / "train.py"
    script.write_text(source)

    with pytest.raises(TrainingFailed) as caught:
        MainThreadTrainer(tmp_path).serve_script(script, SITE)
    assert caught.value.why.startswith(why)
    assert caught.value.client == CLIENT


def test_failure_after_the_run_has_ended_is_nobodys_concern(tmp_path: Path) -> None:
    assert run_script(tmp_path, LOOP.format(work="pass") + "int('x')\n", 1) == [Update(Model({"w": MODEL["w"] + 1}), 1)]
