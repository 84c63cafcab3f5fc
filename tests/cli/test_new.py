import json
from pathlib import Path

import pytest

from hanse.model import Model
from hanse.run.authoring import package_of
from hanse.storage.models import read_safetensors

from .conftest import Hanse


@pytest.mark.parametrize("template", ["numpy", "script"])
def test_a_new_job_can_be_packed_and_simulated(template: str, hanse: Hanse, tmp_path: Path) -> None:
    folder, model = tmp_path / "my-job", tmp_path / "model.safetensors"
    made = hanse("new", folder, "--template", template)
    assert made.status == 0, made.err
    assert f"hanse simulate {folder}" in made.out
    spec, _ = package_of(folder)
    assert spec.name == "my-job"

    ended = hanse("simulate", folder, "--clients", 2, "--workers", 1, "--out", model, "--format", "json")
    assert ended.status == 0, ended.err
    document = json.loads(ended.out)
    assert document["job"]["state"] == "completed"
    assert document["job"]["round"] == document["job"]["rounds"] == 10
    metrics = document["job"]["metrics"]
    assert max(metrics.get("eval_accuracy", 0), metrics.get("accuracy", 0)) > 0.85
    assert document["model"] == str(model)
    assert isinstance(read_safetensors(model), Model)


def test_a_folder_that_is_there_stays_as_it_is(hanse: Hanse, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "client.py").write_text("mine")
    ended = hanse("new", tmp_path / "mine")
    assert ended.status == 4
    assert "already" in ended.err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["client.py"]


def test_a_name_that_no_job_can_have_is_refused(hanse: Hanse, tmp_path: Path) -> None:
    ended = hanse("new", tmp_path / "my job")
    assert ended.status == 2
    assert "'my job'" in ended.err
    assert not (tmp_path / "my job").exists()


def test_a_folder_that_cannot_be_made_is_one_sentence(hanse: Hanse, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ended = hanse("new", tmp_path / "file" / "job", "--format", "json")
    assert ended.status == 2
    assert json.loads(ended.err)["error"]["code"] == "config"


def test_what_was_made_is_told_as_json(hanse: Hanse, tmp_path: Path) -> None:
    document = json.loads(hanse("new", tmp_path / "job", "--format", "json").out)
    assert document["folder"] == str(tmp_path / "job")
    assert document["files"] == sorted(path.name for path in (tmp_path / "job").iterdir())


def test_a_simulation_that_fails_says_why_and_with_which_status(hanse: Hanse, tmp_path: Path) -> None:
    hanse("new", tmp_path / "job")
    client = tmp_path / "job" / "client.py"
    client.write_text(
        client.read_text().replace("    points, labels = examples_of", "    1 / 0\n    points, labels = examples_of")
    )
    ended = hanse("simulate", tmp_path / "job", "--clients", 2, "--workers", 1)
    assert ended.status == 20
    assert "ZeroDivisionError" in ended.out
    assert "state      failed" in ended.out
    nowhere = hanse("simulate", tmp_path / "nowhere")
    assert (nowhere.status, nowhere.err.count("\n")) == (2, 1)
