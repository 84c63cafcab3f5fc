"""A client's part of a job as functions: ``ClientApp`` says which function works on which task.

::

    app = ClientApp()

    @app.train
    def train(model: Model, ctx: TaskContext) -> Update:
        ...
        return Update(Model(weights), num_examples=len(x), metrics={"loss": loss})

Every function has one shape: it gets a model, read-only and empty when the task has none, and returns an ``Update``; an
evaluation's has no model, ``Update(None, num_examples, metrics)``.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

from hanse.client.task import TaskContext
from hanse.errors import JobInvalid
from hanse.model import Model, Update

TaskFunction: TypeAlias = Callable[[Model, TaskContext], Update]

TRAIN: Final = "train"
EVALUATE: Final = "evaluate"


class NoSuchTask(JobInvalid):
    """The workflow asks for a task that the client's app does not offer."""

    code = "no-such-task"

    def __init__(self, name: str, offered: tuple[str, ...]) -> None:
        super().__init__("task", got=name, expected=f"one that the app offers: {', '.join(offered) or 'it has none'}")
        self.name, self.offered = name, offered


@dataclass(frozen=True, slots=True)
class AppReference:
    """Where an app is defined: ``str`` gives ``module:attribute`` as jobs name it; *source* is the file."""

    module: str
    attribute: str
    source: Path

    def __str__(self) -> str:
        return f"{self.module}:{self.attribute}"

    @property
    def folder(self) -> Path:
        """The folder from which ``module`` can be imported."""
        depth = self.module.count(".") + (self.source.name == "__init__.py")
        return self.source.parents[depth]


class ClientApp:
    """The functions of a client, by task name. Define it at the top level of a module, so that jobs can name it."""

    def __init__(self) -> None:
        self._functions: dict[str, TaskFunction] = {}
        self._defined_in = _calling_module()

    def train(self, function: TaskFunction) -> TaskFunction:
        """Have *function* work on ``train`` tasks."""
        return self.task(TRAIN)(function)

    def evaluate(self, function: TaskFunction) -> TaskFunction:
        """Have *function* work on ``evaluate`` tasks; it returns ``Update(None, num_examples, metrics)``."""
        return self.task(EVALUATE)(function)

    def task(self, name: str) -> Callable[[TaskFunction], TaskFunction]:
        """Return a decorator that has a function work on tasks called *name*, and leaves the function as it is.

        Raises:
            ValueError: the app has a function for *name* already.
        """

        def keep(function: TaskFunction) -> TaskFunction:
            if name in self._functions:
                there = self._functions[name].__qualname__
                raise ValueError(f"task {name!r} is {there}'s already; an app has one function a task")
            self._functions[name] = function
            return function

        return keep

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks that the app offers, sorted."""
        return tuple(sorted(self._functions))

    def handler(self, name: str) -> TaskFunction:
        """Return the function for tasks called *name*.

        Raises:
            NoSuchTask: the app does not offer it; the sentence lists what it does.
        """
        try:
            return self._functions[name]
        except KeyError:
            raise NoSuchTask(name, self.names) from None

    @property
    def reference(self) -> AppReference:
        """Where the app is defined.

        Raises:
            JobInvalid: it is not a variable at the top level of a module that comes from a file.
        """
        module = sys.modules.get(self._defined_in)
        source = getattr(module, "__file__", None)
        attribute = next((name for name, value in vars(module).items() if value is self), None) if module else None
        if source is None or attribute is None:
            expected = f"a ClientApp at the top level of a file; this one was made in {self._defined_in}"
            raise JobInvalid("client", got=self, expected=expected)
        return AppReference(_importable_name(self._defined_in, Path(source)), attribute, Path(source).resolve())


def _calling_module() -> str:
    """Return the name of the module whose code calls ``ClientApp()``."""
    name: str = sys._getframe(2).f_globals.get("__name__", "__main__")
    return name


def _importable_name(module: str, source: Path) -> str:
    """Return the name by which others can import *module*; a program's ``__main__`` goes by its file or its ``-m``."""
    if module != "__main__":
        return module
    spec = getattr(sys.modules[module], "__spec__", None)
    return spec.name if spec is not None else source.stem
