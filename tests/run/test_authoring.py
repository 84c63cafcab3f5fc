"""From a folder, or a ``Job`` in Python, to a definition and a package; and what is said of one that cannot be."""

import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from hanse.client.app import ClientApp
from hanse.errors import ConfigError, JobInvalid
from hanse.ids import ClientName
from hanse.job import Job, JobSpec, Resources, WorkflowSpec
from hanse.learning.fedavg import FedAvg
from hanse.model import Model
from hanse.run.authoring import MODEL_FILE, package_of, spec_of_folder
from hanse.storage.models import read_safetensors
from hanse.storage.packages import unpack_package

PROJECT = """
[project]
name = "digits"

[tool.hanse]
workflow = "fedavg"
client = "job:app"
model = "job:initial"
"""
CODE = """
from hanse.client import ClientApp
from hanse.model import Model

app = ClientApp()

def initial():
    return Model({})

def outer():
    def inner():
        return Model({})
    return inner
"""

Import = Callable[..., ModuleType]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A job's folder: ``pyproject.toml``, ``job.py``, and ``train.py`` a folder below."""
    folder = tmp_path / "digits"
    (folder / "scripts").mkdir(parents=True)
    (folder / "pyproject.toml").write_text(PROJECT)
    (folder / "job.py").write_text(CODE)
    (folder / "scripts" / "train.py").write_text("print('training')\n")
    return folder


@pytest.fixture
def imported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Import]:
    """Run ``job.py`` as the module *name*; *run_as* is the name that ``python -m`` was given, if it was."""

    def run(name: str, *, run_as: str | None = None) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, folder / "job.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        if name == "__main__":
            module.__spec__ = None if run_as is None else ModuleSpec(run_as, None)
        return module

    yield run
    monkeypatch.undo()


def job(**changes: Any) -> Job:
    """A job that names everything, with *changes*."""
    values: dict[str, Any] = {
        "name": "digits",
        "workflow": FedAvg(rounds=3),
        "client": "job:app",
        "model": "job:initial",
        **changes,
    }
    return Job(**values)


def unpacked(package: bytes, into: Path) -> tuple[JobSpec, set[str]]:
    """Return the definition in *package*, and the names of the files beside it."""
    spec = unpack_package(package, into)
    return spec, {path.relative_to(into).as_posix() for path in into.rglob("*") if path.is_file()}


# A folder


@pytest.mark.parametrize("written_as", [Path, str])
def test_a_folder_is_packed_as_it_is(folder: Path, tmp_path: Path, written_as: Callable[[Path], Path | str]) -> None:
    spec, package = package_of(written_as(folder))

    assert spec == JobSpec(name="digits", workflow=WorkflowSpec("fedavg"), client="job:app", model="job:initial")
    files = {"job.json", "pyproject.toml", "job.py", "scripts/train.py"}
    assert unpacked(package, tmp_path / "out") == (spec, files)


def test_a_folders_own_name_of_the_job_comes_before_the_projects(folder: Path) -> None:
    (folder / "pyproject.toml").write_text(PROJECT + 'name = "mine"\n')

    assert spec_of_folder(folder).name == "mine"


def test_a_folder_without_a_project_file_is_no_job(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        spec_of_folder(tmp_path)

    assert refused.value.reason == f"job folder is {str(tmp_path)!r}; expected a folder with a pyproject.toml"


@pytest.mark.parametrize("content", [b"not = = TOML", b"name = '\xff'"])
def test_a_project_file_that_cannot_be_read_is_named(folder: Path, content: bytes) -> None:
    (folder / "pyproject.toml").write_bytes(content)

    with pytest.raises(ConfigError, match=r"pyproject\.toml is '.*/digits/pyproject\.toml'; expected TOML \("):
        spec_of_folder(folder)


@pytest.mark.parametrize("content", ["", "[tool.other]", "tool = 3", "tool.hanse = 3"])
def test_a_project_file_that_defines_no_job_is_named(folder: Path, content: str) -> None:
    (folder / "pyproject.toml").write_text(content)

    with pytest.raises(ConfigError, match=r"\[tool\.hanse\] in .*pyproject\.toml is .*; expected a table that defines"):
        spec_of_folder(folder)


@pytest.mark.parametrize("project", ["", "project = 3\n", "project.name = 3\n"])
def test_a_folder_whose_project_has_no_name_must_name_the_job(folder: Path, project: str) -> None:
    (folder / "pyproject.toml").write_text(project + PROJECT[PROJECT.index("[tool") :])

    with pytest.raises(JobInvalid, match=r"the job's name is ''"):
        spec_of_folder(folder)


def test_a_folder_that_does_not_define_a_whole_job_is_told_which_field(folder: Path) -> None:
    (folder / "pyproject.toml").write_text(PROJECT + "min_clients = 0\n")

    with pytest.raises(JobInvalid, match="the job's min_clients is 0"):
        package_of(folder)


# A job in Python


def test_every_field_of_a_job_is_in_its_definition(folder: Path) -> None:
    written = job(
        min_clients=1,
        required_clients=("site-1",),
        clients=("site-1", "site-2"),
        resources=Resources(gpus=1),
        seed=7,
        config={"lr": 0.1},
        start_within_s=60.0,
        process_tries=5,
        source=folder,
        workflow=WorkflowSpec("fedavg", {"rounds": 3}),
    )

    spec, _ = package_of(written)

    assert spec == JobSpec(
        name="digits",
        workflow=WorkflowSpec("fedavg", {"rounds": 3}),
        client="job:app",
        model="job:initial",
        min_clients=1,
        required_clients=(ClientName("site-1"),),
        clients=(ClientName("site-1"), ClientName("site-2")),
        resources=Resources(gpus=1),
        seed=7,
        config={"lr": 0.1},
        start_within_s=60.0,
        process_tries=5,
    )


def test_a_workflow_becomes_its_name_and_settings(folder: Path) -> None:
    spec, _ = package_of(job(source=folder))

    assert spec.workflow.name == "fedavg"
    assert spec.workflow.settings["rounds"] == 3


def test_what_is_no_workflow_is_named(folder: Path) -> None:
    with pytest.raises(JobInvalid, match="the job's workflow is 3; expected an instance"):
        package_of(job(workflow=3, source=folder))


def test_an_app_becomes_a_reference_and_tells_the_folder(folder: Path, imported: Import, tmp_path: Path) -> None:
    module = imported("job")

    spec, package = package_of(job(client=module.app))

    assert spec.client == "job:app"
    assert unpacked(package, tmp_path / "out")[1] == {"job.json", "pyproject.toml", "job.py", "scripts/train.py"}


def test_an_app_that_cannot_be_imported_again_is_named() -> None:
    with pytest.raises(JobInvalid, match=r"the job's client is .*; expected a ClientApp at the top level of a file"):
        package_of(job(client=ClientApp()))


def test_whatever_knows_where_it_is_defined_may_be_the_client(folder: Path) -> None:
    @dataclass
    class Reference:
        folder: Path

        def __str__(self) -> str:
            return "mine:thing"

    @dataclass
    class Client:
        reference: Reference

    assert package_of(job(client=Client(Reference(folder))))[0].client == "mine:thing"


def test_a_reference_needs_to_be_told_the_folder(folder: Path) -> None:
    assert package_of(job(source=folder))[0].client == "job:app"
    with pytest.raises(JobInvalid, match="the job's source is None; expected the job's folder, since 'client' is no"):
        package_of(job())


def test_a_scripts_folder_is_the_job_unless_told_otherwise(folder: Path, tmp_path: Path) -> None:
    script = folder / "scripts" / "train.py"

    alone, package = package_of(job(client=script))
    whole, _ = package_of(job(client=script, source=folder))

    assert alone.client == "train.py"
    assert unpacked(package, tmp_path / "out")[1] == {"job.json", "train.py"}
    assert whole.client == "scripts/train.py"


def test_a_script_may_be_named_from_where_one_stands(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder / "scripts")

    assert package_of(job(client=Path("train.py")))[0].client == "train.py"
    assert package_of(job(client=Path("train.py"), source=Path("..")))[0].client == "scripts/train.py"


def test_a_script_outside_the_jobs_folder_is_named_with_it(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("")

    with pytest.raises(JobInvalid) as refused:
        package_of(job(client=tmp_path / "train.py", source=folder))

    expected = f"the job's client is {str(tmp_path / 'train.py')!r}; expected a script in the job's folder, {folder}"
    assert refused.value.reason == expected


def test_a_script_that_is_not_there_is_named(folder: Path) -> None:
    with pytest.raises(JobInvalid, match=r"the job's client is 'test\.py'; expected a script that is in the job's"):
        package_of(job(client=folder / "test.py"))


def test_what_is_no_client_is_named(folder: Path) -> None:
    with pytest.raises(JobInvalid, match="the job's client is '3'; expected 'module:app' or a script"):
        package_of(job(client=3, source=folder))


# Its model


def test_a_model_becomes_a_file_of_the_package(folder: Path, tmp_path: Path) -> None:
    weights = np.arange(6, dtype=np.float32).reshape(2, 3)

    spec, package = package_of(job(model=Model({"w": weights}), source=folder))

    assert spec.model == MODEL_FILE
    unpacked(package, tmp_path / "out")
    model = read_safetensors(tmp_path / "out" / MODEL_FILE)
    assert list(model) == ["w"]
    np.testing.assert_array_equal(model["w"], weights)
    assert not (folder / MODEL_FILE).exists()


def test_a_function_becomes_a_reference(folder: Path, imported: Import) -> None:
    module = imported("models.digits")

    assert package_of(job(model=module.initial, source=folder))[0].model == "models.digits:initial"


@pytest.mark.parametrize(("run_as", "module"), [(None, "job"), ("digits.job", "digits.job")])
def test_what_a_program_defines_goes_by_its_file_or_by_what_it_was_run_as(
    folder: Path, imported: Import, run_as: str | None, module: str
) -> None:
    program = imported("__main__", run_as=run_as)

    spec, _ = package_of(job(client=program.app, model=program.initial, source=folder))

    assert (spec.client, spec.model) == (f"{module}:app", f"{module}:initial")


def test_a_function_of_a_program_without_a_file_is_refused(folder: Path, imported: Import) -> None:
    program = imported("__main__")
    del program.__file__

    with pytest.raises(JobInvalid, match="the job's model is <function initial"):
        package_of(job(model=program.initial, source=folder))


def test_what_cannot_be_imported_again_is_refused_as_a_model(folder: Path, imported: Import) -> None:
    module = imported("job")
    expected = "expected a Model, 'module:function', or a function at the top of a file"

    for model in (lambda: Model({}), module.outer(), functools.partial(module.initial), len, 3, None):
        with pytest.raises(JobInvalid, match=f"^the job's model is .*; {expected}$"):
            package_of(job(model=model, source=folder))
    with pytest.raises(JobInvalid, match=r"^the job's model is 'weights\.bin'; expected 'module:function' or a"):
        package_of(job(model="weights.bin", source=folder))
