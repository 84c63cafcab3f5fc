"""A job's code: its workflow and its initial model, by name."""

import sys
from pathlib import Path

import numpy as np
import pytest

from hanse.errors import JobInvalid, MissingDependency
from hanse.job import JobSpec, WorkflowSpec
from hanse.learning.fedavg import FedAvg
from hanse.model import Model
from hanse.run.loading import importing_from, initial_model_of, workflow_of
from hanse.storage.models import write_safetensors

CODE = """
from dataclasses import dataclass
import numpy as np
from hanse.learning.workflow import State
from hanse.model import Model

def seeded(seed):
    return Model({"w": np.full(2, seed, np.float32)})

def by_keyword(*, seed=0):
    return seeded(seed)

def plain():
    seed = 3  # its own, and no argument
    return seeded(seed)

class Made:
    def __call__(self, seed):
        return seeded(seed)

made = Made()

def wrong():
    return {"w": 1}

@dataclass
class Mine:
    rounds: int = 1

    def start(self, model):
        return State(model)

    async def round(self, state, federation):
        return state
"""


@pytest.fixture
def code(tmp_path: Path) -> Path:
    (tmp_path / "own_model.py").write_text(CODE)
    return tmp_path


def spec(model: str = "own_model:plain", workflow: str = "fedavg", seed: int = 9) -> JobSpec:
    return JobSpec("tiny", WorkflowSpec(workflow), client="app:app", model=model, seed=seed)


@pytest.mark.parametrize(("name", "value"), [("seeded", 9), ("by_keyword", 9), ("plain", 3), ("made", 9)])
def test_a_function_gets_the_seed_if_it_takes_one(code: Path, name: str, value: float) -> None:
    with importing_from(code):
        assert initial_model_of(spec(f"own_model:{name}"), code) == Model({"w": np.full(2, value, np.float32)})


@pytest.mark.parametrize("name", ["no_such:model", "own_model:missing"])
def test_a_function_that_is_not_there_is_named(code: Path, name: str) -> None:
    with importing_from(code), pytest.raises(JobInvalid, match=name):
        initial_model_of(spec(name), code)


def test_what_the_models_module_needs_and_the_server_has_not_is_a_missing_dependency(code: Path) -> None:
    (code / "needs_much.py").write_text("import no_such_package.part\n")
    with importing_from(code), pytest.raises(MissingDependency) as caught:
        initial_model_of(spec("needs_much:model"), code)
    assert caught.value.reason == "module 'no_such_package', which needs_much imports, is not installed at server"


def test_a_function_that_returns_something_else_is_named(code: Path) -> None:
    with importing_from(code), pytest.raises(JobInvalid, match=r"own_model:wrong to return a hanse\.Model"):
        initial_model_of(spec("own_model:wrong"), code)


def test_a_model_may_be_a_file_of_the_job(code: Path) -> None:
    write_safetensors(Model({"w": np.arange(3)}), code / "start.safetensors")

    assert initial_model_of(spec("start.safetensors"), code) == Model({"w": np.arange(3)})


@pytest.mark.parametrize("name", ["missing.safetensors", "../outside.safetensors", "/etc/passwd.safetensors"])
def test_a_file_that_is_not_of_the_job_is_refused(code: Path, name: str) -> None:
    write_safetensors(Model({"w": np.arange(3)}), code.parent / "outside.safetensors")

    with pytest.raises(JobInvalid, match=r"\.safetensors file (of|among) the job"):
        initial_model_of(spec(name), code)


def test_a_workflow_is_a_short_name_or_the_jobs_own_class(code: Path) -> None:
    assert workflow_of(spec()) == FedAvg()
    with importing_from(code):
        assert workflow_of(spec(workflow="own_model:Mine")).rounds == 1


def test_a_workflow_that_is_not_there_is_named(code: Path) -> None:
    with importing_from(code), pytest.raises(JobInvalid, match="Yours"):
        workflow_of(spec(workflow="own_model:Yours"))


def test_what_was_imported_from_a_job_is_forgotten(code: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "own_model.py").write_text("ANSWER = 42\n")
    path = list(sys.path)

    with importing_from(code):
        initial_model_of(spec(), code)
    assert "own_model" not in sys.modules
    assert sys.path == path
    with importing_from(other):
        import own_model  # type: ignore[import-not-found]  # noqa: PLC0415 - of the folder just entered

        assert own_model.ANSWER == 42
