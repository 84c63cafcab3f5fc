"""From what a person wrote, a folder or a ``Job`` in Python, to what is submitted: a definition and a package.

A folder is packed as it is. A ``Job`` is packed with the Python files of the folder that defines its client; what was
given as an object becomes a reference that can be imported again elsewhere, and a ``Model`` a file of the package.
"""

import inspect
import sys
import tempfile
import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Final, Protocol, runtime_checkable

from hanse.errors import ConfigError, JobInvalid
from hanse.ids import ClientName
from hanse.job import Job, JobSpec, WorkflowSpec, parse
from hanse.learning.workflow import workflow_spec
from hanse.model import Model
from hanse.storage.models import write_safetensors
from hanse.storage.packages import build_package

PROJECT_FILE: Final = "pyproject.toml"
MODEL_FILE: Final = "initial.safetensors"


class Reference(Protocol):
    """Where an object can be imported from again: ``str`` is ``module:name``."""

    @property
    def folder(self) -> Path:
        """The folder that must be on the module search path for it."""


@runtime_checkable
class HasReference(Protocol):
    """Something that knows where it is defined, as a ``ClientApp`` does."""

    @property
    def reference(self) -> Reference:
        """Where it is defined."""


def package_of(job: Job | Path | str) -> tuple[JobSpec, bytes]:
    """Return the definition and the package of *job*, a ``Job`` or the folder of one.

    Raises:
        JobInvalid: the definition does not hold; the error names the field.
        ConfigError: the folder has no readable ``pyproject.toml``.
    """
    if isinstance(job, Job):
        return _package_of_job(job)
    folder = Path(job)
    spec = spec_of_folder(folder)
    return spec, build_package(folder, spec)


def spec_of_folder(folder: Path) -> JobSpec:
    """Return the job that ``[tool.hanse]`` of the folder's ``pyproject.toml`` defines.

    Raises:
        ConfigError: there is no readable ``pyproject.toml`` with such a table.
        JobInvalid: the table does not define a job.
    """
    path = folder / PROJECT_FILE
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError("job folder", got=str(folder), expected=f"a folder with a {PROJECT_FILE}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(PROJECT_FILE, got=str(path), expected=f"TOML ({error})") from error
    table = _value_at(content, "tool", "hanse")
    if not isinstance(table, Mapping):
        raise ConfigError("[tool.hanse]", got=table, expected="a table that defines the job", where=str(path))
    name = _value_at(content, "project", "name")
    return parse(table, default_name=name if isinstance(name, str) else "")


def _value_at(content: Mapping[str, object], table: str, key: str) -> object:
    """Return what the TOML table called *table* holds under *key*; ``None`` when either is not there."""
    found = content.get(table)
    return found.get(key) if isinstance(found, Mapping) else None


def _package_of_job(job: Job) -> tuple[JobSpec, bytes]:
    folder = job.source or _folder_of(job.client)
    extra: dict[str, bytes] = {}
    if isinstance(job.model, Model):
        extra[MODEL_FILE] = _bytes_of(job.model)
    spec = JobSpec(
        name=job.name,
        workflow=job.workflow if isinstance(job.workflow, WorkflowSpec) else workflow_spec(job.workflow),
        client=_client_of(job.client, folder),
        model=MODEL_FILE if extra else _model_of(job.model),
        min_clients=job.min_clients,
        required_clients=tuple(map(ClientName, job.required_clients)),
        clients=tuple(map(ClientName, job.clients)),
        resources=job.resources,
        seed=job.seed,
        config=dict(job.config),
        start_within_s=job.start_within_s,
        process_tries=job.process_tries,
    )
    return spec, build_package(folder, spec, extra)


def _folder_of(client: object) -> Path:
    if isinstance(client, HasReference):
        return client.reference.folder
    if isinstance(client, Path):
        return client.parent
    raise JobInvalid("source", got=None, expected="the job's folder, since 'client' is no ClientApp that tells it")


def _client_of(client: object, folder: Path) -> str:
    if isinstance(client, HasReference):
        return str(client.reference)
    if isinstance(client, Path):
        script, root = client.resolve(), folder.resolve()
        if not script.is_relative_to(root):
            raise JobInvalid("client", got=str(client), expected=f"a script in the job's folder, {folder}")
        return script.relative_to(root).as_posix()
    return str(client)


def _model_of(model: object) -> str:
    if isinstance(model, str):
        return model
    name, module = getattr(model, "__qualname__", ""), inspect.getmodule(model)
    source = getattr(module, "__file__", None)
    if not name or "." in name or "<" in name or module is None or source is None:
        raise JobInvalid("model", got=model, expected="a Model, 'module:function', or a function at the top of a file")
    return f"{_importable_name(module, Path(source))}:{name}"


def _importable_name(module: ModuleType, source: Path) -> str:
    """Return the name by which others can import *module*; a program's ``__main__`` goes by its file or its ``-m``."""
    if module is not sys.modules.get("__main__"):
        return module.__name__
    spec = module.__spec__
    return spec.name if spec is not None else source.stem


def _bytes_of(model: Model) -> bytes:
    with tempfile.TemporaryDirectory(prefix="hanse-") as folder:
        path = Path(folder) / MODEL_FILE
        write_safetensors(model, path)
        return path.read_bytes()
