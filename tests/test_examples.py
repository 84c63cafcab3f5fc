"""The examples show what they are there to show: a federation comes close to pooled data, and beats each site alone."""

import importlib
import runpy
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest

from hanse.client.api import ReceivedTask, Site, session_of
from hanse.client.task import TaskContext
from hanse.ids import ClientName, JobId
from hanse.job import JobSpec, parse
from hanse.learning.local import LocalFederation
from hanse.learning.workflow import Task, load_workflow
from hanse.model import Model, Update, check

EXAMPLES = Path(__file__).parent.parent / "examples"
JOBS = sorted(path.parent for path in EXAMPLES.glob("*/pyproject.toml"))
SITES = 3


class Digits(NamedTuple):
    """The modules of the job's folder."""

    data: ModuleType
    model: ModuleType
    client: ModuleType
    compare: ModuleType


@pytest.fixture(scope="module")
def import_from() -> Iterator[Callable[[Path, str], ModuleType]]:
    """Import modules of a job's folder as the job's process would, and forget them afterwards."""
    before, path = dict(sys.modules), list(sys.path)

    def import_module(folder: Path, name: str) -> ModuleType:
        sys.path[:] = [str(folder), *path]
        return importlib.import_module(name)

    yield import_module
    sys.path[:] = path
    for name in sys.modules.keys() - before.keys():
        origin = getattr(sys.modules[name], "__file__", None)
        if origin and EXAMPLES in Path(origin).parents:
            del sys.modules[name]


@pytest.fixture(scope="module")
def digits(import_from: Callable[[Path, str], ModuleType]) -> Digits:
    return Digits(*(import_from(EXAMPLES / "digits", name) for name in Digits._fields))


def spec_of(folder: Path) -> JobSpec:
    project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))
    return parse(project["tool"]["hanse"], default_name=project["project"]["name"])


def context(spec: JobSpec, task: Task, *, site: int, round_number: int) -> TaskContext:
    return TaskContext(
        client=ClientName(f"site-{site + 1}"),
        job=JobId("test"),
        round=round_number,
        name=task.name,
        config={**spec.config, **task.config},
        site={"partition": site, "partitions": SITES},
        seed=spec.seed,
    )


@pytest.mark.parametrize("folder", JOBS, ids=lambda folder: folder.name)
def test_job_of_every_example_is_valid(folder: Path) -> None:
    spec = spec_of(folder)
    load_workflow(spec.workflow, importlib.import_module)
    assert (folder / (spec.client if spec.is_script else f"{spec.client.partition(':')[0]}.py")).is_file()
    assert (folder / f"{spec.model.partition(':')[0]}.py").is_file()


@pytest.mark.parametrize("sites", [2, 3, 5, 10])
def test_shares_of_digits_are_disjoint_and_whole_and_each_lacks_a_digit(digits: Digits, sites: int) -> None:
    shares = [digits.data.share(number, sites) for number in range(sites)]
    assert sum(map(len, shares)) == len(digits.data.pooled())
    assert len(digits.data.pooled()) + len(digits.data.held_out()) == 1797
    for examples in shares:
        assert 0 < len(np.unique(examples.labels)) < 10
    images = np.concatenate([examples.images for examples in shares])
    assert sorted(map(bytes, images)) == sorted(map(bytes, digits.data.pooled().images))


def test_digits_of_one_site_are_all_digits(digits: Digits) -> None:
    assert np.array_equal(digits.data.share(0, 1).labels, digits.data.pooled().labels)


def test_share_that_there_is_not_is_refused(digits: Digits) -> None:
    with pytest.raises(ValueError, match="partition is 3; expected 0 to 2"):
        digits.data.share(3, 3)


def test_training_digits_changes_no_array_that_it_was_given(digits: Digits) -> None:
    model = digits.model.initial()
    digits.client.train_on_share(
        model, context(spec_of(EXAMPLES / "digits"), Task("train", model), site=0, round_number=1)
    )
    assert model == digits.model.initial()


async def test_federated_digits_come_close_to_pooled_ones_and_beat_every_site_alone(digits: Digits) -> None:
    spec = spec_of(EXAMPLES / "digits")
    federation: LocalFederation

    def site(number: int) -> Callable[[Task], Update]:
        def work(task: Task) -> Update:
            assert task.model is not None
            ctx = context(spec, task, site=number, round_number=federation.round)
            answer: Update = digits.client.app.handler(task.name)(task.model, ctx)
            return answer

        return work

    federation = LocalFederation({f"site-{number + 1}": site(number) for number in range(SITES)}, seed=spec.seed)
    workflow = load_workflow(spec.workflow, importlib.import_module)
    final = await federation.run(workflow, digits.model.initial())

    reached = digits.compare.accuracy(final.model)
    comparison = digits.compare.compare(SITES)
    assert reached >= comparison.pooled - 0.03
    assert reached >= max(comparison.alone) + 0.1
    assert final.metrics["eval_accuracy"] == pytest.approx(reached)


class ScriptRun:
    """A session for one script alone: each task has the model that it answered last."""

    def __init__(self, spec: JobSpec, model: Model, *, rounds: int) -> None:
        self._spec, self._rounds = spec, rounds
        self.model, self.answers, self.task = model, list[Update](), None
        ctx = self._context()
        self.site = Site(name=ctx.client, job=ctx.job, config=ctx.config, site=ctx.site, seed=ctx.seed)

    def wait_task(self) -> bool:
        return len(self.answers) < self._rounds

    def receive(self) -> ReceivedTask:
        return ReceivedTask(self.model, self._context())

    def send(self, update: Update) -> None:
        assert update.model is not None
        check(update.model.spec, self.model.spec)
        self.answers.append(update)
        self.model = update.model

    def _context(self) -> TaskContext:
        return context(self._spec, Task("train", None), site=0, round_number=len(self.answers) + 1)


def test_plain_script_learns_from_round_to_round(import_from: Callable[[Path, str], ModuleType]) -> None:
    folder = EXAMPLES / "breast_cancer_script"
    run = ScriptRun(spec_of(folder), import_from(folder, "start").initial(), rounds=5)
    with session_of(run):
        runpy.run_path(str(folder / "train.py"), run_name="__main__")
    accuracies = [update.metrics["accuracy"] for update in run.answers]
    assert len(accuracies) == 5
    assert accuracies[0] < 0.5
    assert accuracies[-1] > 0.9
    assert {update.num_examples for update in run.answers} == {152}


def test_script_differs_from_its_loop_without_a_federation_by_four_marked_lines() -> None:
    lines = (EXAMPLES / "breast_cancer_script" / "train.py").read_text(encoding="utf-8").splitlines()
    marked = [line for line in lines if line.endswith(("# 1", "# 2", "# 3", "# 4"))]
    assert len(marked) == 4
    assert [line for line in lines if "hanse" in line and line not in marked] == [
        line for line in lines if line.startswith("site = hanse.init().site")
    ]
