"""Loading a job's code: its workflow and its initial model, by the names that its ``JobSpec`` gives.

A job's code is imported from its own folder, which is first on ``sys.path`` for as long as ``importing_from`` is
entered; what was imported from there is forgotten afterwards, so that two jobs in one process may both have a
``model.py``.
"""

import importlib
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hanse.errors import JobInvalid, MissingDependency
from hanse.ids import SERVER
from hanse.job import JobSpec
from hanse.learning.workflow import Workflow, load_workflow
from hanse.model import Model
from hanse.storage.models import read_safetensors
from hanse.storage.packages import comes_with


@contextmanager
def importing_from(code: Path) -> Iterator[None]:
    """Let imports find the modules in *code* first; forget those modules at the end."""
    folder = str(code.resolve())
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(folder)
        for name, module in list(sys.modules.items()):
            if (getattr(module, "__file__", None) or "").startswith(folder + "/"):
                del sys.modules[name]


def workflow_of(spec: JobSpec) -> Workflow:
    """Return the workflow that *spec* names, with its settings.

    Raises:
        JobInvalid: there is no such workflow, or a setting is unknown or not what it should be.
    """
    return load_workflow(spec.workflow, importlib.import_module)


def initial_model_of(spec: JobSpec, code: Path) -> Model:
    """Return the initial model that *spec* names: a file of the job, or what its function returns.

    The function is called with the job's seed when it takes an argument named ``seed``, else with nothing.

    Raises:
        JobInvalid: no such file, module or function, or the function returns no ``Model``.
        MissingDependency: its module imports one that is neither the job's nor installed here.
    """
    if spec.model.endswith(".safetensors"):
        path = code / spec.model
        if not path.resolve().is_relative_to(code.resolve()) or not path.is_file():
            raise JobInvalid("model", got=spec.model, expected="a .safetensors file among the job's files")
        return read_safetensors(path)
    module_name, _, attribute = spec.model.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        is_missing = isinstance(error, ModuleNotFoundError) and error.name and not comes_with(code, error.name)
        if is_missing and not f"{module_name}.".startswith(f"{error.name}."):
            raise MissingDependency(SERVER, str(error.name), place=module_name) from error
        raise JobInvalid("model", got=spec.model, expected=f"a function that can be imported ({error})") from error
    takes_seed = "seed" in inspect.signature(function).parameters
    model = function(seed=spec.seed) if takes_seed else function()
    if not isinstance(model, Model):
        raise JobInvalid("model", got=type(model).__name__, expected=f"{spec.model} to return a hanse.Model")
    return model
