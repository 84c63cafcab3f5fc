import importlib.util
import runpy
import sys
from pathlib import Path
from types import ModuleType

import pytest

from hanse.client.app import ClientApp, NoSuchTask
from hanse.client.task import TaskContext
from hanse.errors import JobInvalid
from hanse.model import Model, Update

APP_SOURCE = "from hanse.client.app import ClientApp\nmine = ClientApp()\n"

app_of_this_file = ClientApp()


def answer(model: Model, ctx: TaskContext) -> Update:
    return Update(None, 0)


def imported(name: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def test_each_decorator_keeps_its_function_under_its_task_and_returns_it_unchanged() -> None:
    app = ClientApp()

    assert app.train(answer) is answer
    assert app.evaluate(answer) is answer
    assert app.task("statistics")(answer) is answer
    assert app.names == ("evaluate", "statistics", "train")
    assert app.handler("statistics") is answer


def test_second_function_for_one_task_is_refused_and_the_first_stays() -> None:
    app = ClientApp()
    app.train(answer)

    with pytest.raises(ValueError, match="'train' is answer's already"):
        app.train(lambda model, ctx: Update(None, 1))
    assert app.handler("train") is answer


def test_unknown_task_lists_what_the_app_offers() -> None:
    app = ClientApp()
    with pytest.raises(NoSuchTask, match="it has none"):
        app.handler("train")
    app.train(answer)
    app.evaluate(answer)

    with pytest.raises(NoSuchTask, match=r"task is 'predict'; expected one that the app offers: evaluate, train"):
        app.handler("predict")


def test_reference_names_the_module_variable_and_file_of_an_app() -> None:
    reference = app_of_this_file.reference

    assert str(reference) == f"{__name__}:app_of_this_file"
    assert reference.source == Path(__file__).resolve()


def test_folder_of_a_reference_is_where_its_module_can_be_imported_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "flat.py").write_text(APP_SOURCE)
    package = tmp_path / "package"
    package.mkdir()
    (package / "inner.py").write_text(APP_SOURCE)
    (package / "__init__.py").write_text(APP_SOURCE)

    for name, path in [("flat", "flat.py"), ("package.inner", "package/inner.py"), ("package", "package/__init__.py")]:
        reference = imported(name, tmp_path / path, monkeypatch).mine.reference
        assert (str(reference), reference.folder) == (f"{name}:mine", tmp_path)


def test_app_of_a_program_is_known_by_the_programs_file(tmp_path: Path) -> None:
    program = tmp_path / "client.py"
    program.write_text(APP_SOURCE + "reference = str(mine.reference)\nfolder = mine.reference.folder\n")

    result = runpy.run_path(str(program), run_name="__main__")

    assert (result["reference"], result["folder"]) == ("client:mine", tmp_path)


def test_app_that_is_no_variable_of_a_module_has_no_reference() -> None:
    with pytest.raises(JobInvalid, match="at the top level of a file"):
        ClientApp().reference  # noqa: B018 - the property raises


def test_app_without_a_file_has_no_reference() -> None:
    namespace: dict[str, object] = {"__name__": "notebook"}
    exec(APP_SOURCE, namespace)
    app = namespace["mine"]
    assert isinstance(app, ClientApp)

    with pytest.raises(JobInvalid, match="this one was made in notebook"):
        app.reference  # noqa: B018 - the property raises
