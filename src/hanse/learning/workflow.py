"""A workflow is a step: ``async def round(state, federation) -> state``.

The runner takes ``workflow.start(model)`` as the state of round 0 and commits it; then it awaits ``workflow.round``
with the last committed state, checks that the state it returns is the next round's, and commits that, until
``is_over``. A workflow keeps nothing between rounds but its ``State``: each step is one of a copy of it (``afresh``).
So one that is killed anywhere goes on from the last commit: the round is run again, and the answers that were accepted
are handed out again without asking anybody twice. For that to give the same bytes, a workflow takes randomness from
``federation.rng`` alone. In which order it asks does not matter: an answer is found again by what was asked.

A workflow is written in a job as a short name of ``WORKFLOWS`` or as ``module:Class``, with settings: the fields of
that class, a dataclass or ``msgspec.Struct``.
"""

import copy
import dataclasses
import hashlib
import math
from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Final, Protocol, runtime_checkable

import msgspec
import numpy as np

from hanse.errors import JobInvalid, WorkflowFailed
from hanse.ids import ClientName
from hanse.job import Config, WorkflowSpec
from hanse.messages import Metrics, TaskFault
from hanse.model import Model, ModelSpec, Update

DEADLINE: Final = "deadline"
"""The code of the fault that stands for a client that had not answered at the deadline."""

CLIENT_LOST: Final = "client-lost"
"""The code of the fault that stands for a client that was lost before it answered."""

CLIENT_FAILED: Final = "client-failed"
"""The code of the fault that stands for a client that is out of the run for good."""

LONGEST_WAIT_S: Final = 24 * 3600.0
"""How long answers are waited for where nobody says otherwise: a day. Hardly a task trains for longer, and whoever has
one that does can say so; a client that hangs is found out the next day, and nothing waits for ever."""

THEN: Final = f"the workflow gets a fault of code {DEADLINE!r} in the place of each missing answer"
"""What happens at the deadline of a workflow that does not say it in its own words."""

WORKFLOWS: Final[Mapping[str, str]] = {
    "fedavg": "hanse.learning.fedavg:FedAvg",
    "fedavgm": "hanse.learning.fedopt:FedAvgM",
    "fedadagrad": "hanse.learning.fedopt:FedAdagrad",
    "fedadam": "hanse.learning.fedopt:FedAdam",
    "fedyogi": "hanse.learning.fedopt:FedYogi",
    "fedbuff": "hanse.learning.fedbuff:FedBuff",
    "fedprox": "hanse.learning.fedprox:FedProx",
    "cyclic": "hanse.learning.cyclic:Cyclic",
    "evaluation": "hanse.learning.evaluation:Evaluation",
}
"""The short names by which jobs name workflows, and the classes behind them; moving a class breaks no job."""


@dataclass(frozen=True, slots=True)
class State:
    """All that a workflow knows after a round; what it does not hold here, it does not know in the next one.

    ``round`` is 0 for the initial model. ``extra`` holds further models by name (a server optimizer's moments);
    ``values`` plain values that msgpack can carry, which the next round gets as msgpack brings them: a tuple as a list.
    ``metrics`` are this round's, for people. ``done`` ends the run before ``Workflow.rounds`` are over.
    """

    model: Model
    round: int = 0
    extra: Mapping[str, Model] = field(default_factory=dict)
    values: Mapping[str, object] = field(default_factory=dict)
    metrics: Metrics = field(default_factory=dict)
    done: bool = False


@dataclass(frozen=True, slots=True)
class Task:
    """What clients are asked to do.

    ``name`` picks their function (``train``, ``evaluate``); ``config`` is laid over the job's; ``expects_model`` says
    whether an answer must hold a model with the tensors of ``model``.
    """

    name: str
    model: Model | None
    config: Config = field(default_factory=dict)
    expects_model: bool = True


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a task at one client: an update or a fault, never both and never neither.

    A client that was lost, is out of the run or was too late answers too: with the fault ``CLIENT_LOST``,
    ``CLIENT_FAILED`` or ``DEADLINE``. ``staleness`` is how many rounds ago it was asked: 0 for a task of this round.
    """

    client: ClientName
    update: Update | None = None
    fault: TaskFault | None = None
    staleness: int = 0

    def __post_init__(self) -> None:
        if (self.update is None) == (self.fault is None):
            raise ValueError(f"an answer of {self.client} holds an update or a fault, and not both")


class Federation(Protocol):
    """The clients of a run, as a workflow sees them in one round."""

    @property
    def clients(self) -> tuple[ClientName, ...]:
        """All participants of the run in name order, also those that are lost just now.

        Lost ones are among them so that who is chosen depends on the seed alone and not on the moment.
        """

    @property
    def round(self) -> int:
        """The round that is being made: one more than the round of the state that the workflow was given."""

    @property
    def seed(self) -> int:
        """The job's seed."""

    def rng(self, *purpose: str) -> np.random.Generator:
        """Return the generator of this round for *purpose*: ``rng_for(seed, round, *purpose)``."""

    @property
    def elapsed_s(self) -> float:
        """Seconds since this round began, but for those in which the server took its tasks, or could not.

        After a crash a round begins anew, and so does its time.
        """

    def ask(
        self,
        task: Task,
        clients: Sequence[ClientName],
        *,
        deadline_s: float = LONGEST_WAIT_S,
        then: str = "",
        keep: bool = False,
    ) -> AsyncGenerator[Answer, None]:
        """Give *task* to each of *clients* and yield one answer per client, in the order of arrival.

        It ends when all have answered. At the deadline, *deadline_s* seconds after the server has the tasks, the
        missing ones answer with the fault ``DEADLINE``. *then* is one clause that tells people what happens at the
        deadline (``THEN`` without it). Closing the generator early cancels what is outstanding; since ``break`` alone
        does not close it, iterate within ``contextlib.aclosing``. Later answers are then stale and reach nobody.

        With *keep* the tasks outlive the iteration: closing it cancels nothing. What is ``outstanding`` when the round
        is committed is carried into the next ones, over crashes too, and the next ask of the same name with *keep*
        yields those answers as well; to wait for them alone, ask of nobody. A kept task also outlives the loss of its
        client, which answers with ``CLIENT_LOST`` once a loss and a round, and then with its update if it comes back.
        An answer is yielded once. One such ask of a name at a time.
        """

    def outstanding(self, name: str) -> Mapping[ClientName, int]:
        """Return the clients with a kept task *name* whose answer was not yielded yet, in name order.

        For each it says how many rounds ago its (oldest) task was asked; 0 is this round. Whether the answer has come
        meanwhile, or the client has failed, makes no difference, so at the beginning of a round that is run again they
        are the same.
        """

    async def cancel(self, name: str, clients: Collection[ClientName] | None = None) -> None:
        """Want the outstanding answers to kept tasks *name* no longer, of *clients* or of all."""

    def allocate(self, spec: ModelSpec) -> Model:
        """Return a model of *spec* with writable arrays of undefined content; large ones lie in mapped files.

        Returning such a model in a state costs no copy. Nobody writes into it once it was asked with or returned. It
        may be called from any thread.
        """


@runtime_checkable
class Workflow(Protocol):
    """What a job runs at the server."""

    @property
    def rounds(self) -> int:
        """After this many rounds the run is over, at the latest."""

    def start(self, model: Model) -> State:
        """Return the state of round 0, which holds the initial *model*."""

    async def round(self, state: State, federation: Federation) -> State:
        """Return the state that follows *state*: its round is one more.

        What it raises fails the run; a run that is to survive something handles it here.
        """


def afresh(workflow: Workflow, number: int) -> Workflow:
    """Return *workflow* for the step that leads to round *number*, as it was before its first one.

    What a step keeps on the workflow itself is gone at the next, so that nobody relies on what a crash would take.

    Raises:
        WorkflowFailed: it holds what cannot be copied.
    """
    try:
        return copy.deepcopy(workflow)
    except Exception as error:
        name, why = type(workflow).__name__, f"it cannot be copied, as it is for each round ({error})"
        raise WorkflowFailed(name, number, why) from error


def is_over(workflow: Workflow, state: State) -> bool:
    """Return whether the run ends with *state*."""
    return state.done or state.round >= workflow.rounds


def check_first(state: object, *, workflow: str) -> State:
    """Return *state*, with which *workflow* starts, if it is that of round 0; its metrics are plain.

    Raises:
        WorkflowFailed: it is not, or cannot be kept.
    """
    return _checked(state, 0, "start()", workflow)


def check_next(previous: State, state: object, *, workflow: str) -> State:
    """Return *state*, which *workflow* returned for *previous*, if it is the next round's; its metrics are plain.

    Raises:
        WorkflowFailed: it is not, or cannot be kept.
    """
    return _checked(state, previous.round + 1, "round()", workflow)


def _checked(state: object, expected: int, step: str, workflow: str) -> State:
    if not isinstance(state, State):
        raise WorkflowFailed(workflow, expected, f"{step} returned {type(state).__name__}; expected a State")
    if state.round != expected:
        raise WorkflowFailed(workflow, expected, f"{step} returned a state of round {state.round}")
    try:  # plain numbers in place of NumPy's, which do not travel
        metrics = {str(name): float(value) for name, value in state.metrics.items()}
    except (TypeError, ValueError, OverflowError) as error:
        why = f"{step} returned metrics that are no numbers ({error})"
        raise WorkflowFailed(workflow, expected, why) from error
    try:
        msgspec.msgpack.encode(dict(state.values))
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        why = f"{step} returned values that are not plain, such as int(...) and .tolist() make NumPy's ({error})"
        raise WorkflowFailed(workflow, expected, why) from error
    return replace(state, metrics=metrics, done=bool(state.done))


def check_wait(deadline_s: float) -> float:
    """Return *deadline_s* if it is a time that an ask can wait for answers.

    Raises:
        ValueError: it is negative, or has no end.
    """
    if not 0 <= deadline_s < math.inf:
        raise ValueError(f"deadline_s is {deadline_s}; expected 0 or more seconds, and an end")
    return deadline_s


def rng_for(seed: int, round_number: int, *purpose: str) -> np.random.Generator:
    """Return the random generator of *purpose*: the same for the same arguments, independent of all others.

    What the purposes are is up to who asks, for example a client's name and a task's. Nothing else has a part in it:
    not time, order, process or machine.
    """
    digest = hashlib.blake2b(person=b"hanse rng")
    for part in (str(seed), str(round_number), *purpose):
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little") + data)  # so that ("ab", "c") and ("a", "bc") differ
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest.digest(), "little")))


def load_workflow(spec: WorkflowSpec, import_module: Callable[[str], ModuleType]) -> Workflow:
    """Return the workflow that *spec* describes; *import_module* imports its module (``importlib.import_module``).

    Raises:
        JobInvalid: there is no such workflow, it is not one, or a setting is unknown or not what it should be; the
        error names the field.
    """
    cls = _workflow_class(spec.name, import_module)
    known = _field_names(cls)
    if known is None:
        raise JobInvalid("workflow", got=spec.name, expected="a class that is a dataclass or a msgspec.Struct")
    for name, value in spec.settings.items():
        if name not in known:
            raise JobInvalid(
                f"workflow.{name}", got=value, expected=f"no such field; it has {', '.join(sorted(known))}"
            )
    try:
        workflow: object = msgspec.convert(spec.settings, cls)
    except msgspec.ValidationError as error:
        what, _, path = str(error).partition(" - at `$.")
        name = path.rstrip("`").partition("[")[0]
        raise JobInvalid(
            f"workflow.{name}" if name else "workflow",
            got=spec.settings.get(name, spec.settings),
            expected=what.removeprefix("Expected "),
        ) from None
    if not isinstance(workflow, Workflow):
        raise JobInvalid("workflow", got=spec.name, expected="a class with 'rounds', 'start' and 'round'")
    return workflow


def workflow_spec(workflow: object) -> WorkflowSpec:
    """Return *workflow*, an instance, as plain data from which ``load_workflow`` makes an equal one.

    All settings are in it, defaults too, so that a stored job stays what it was when a release changes a default.

    Raises:
        JobInvalid: it is not a workflow, not a dataclass or struct, holds what is not plain data, or its class cannot
        be imported by name.
    """
    cls = type(workflow)
    reference = f"{cls.__module__}:{cls.__qualname__}"
    if isinstance(workflow, type) or not isinstance(workflow, Workflow):
        raise JobInvalid("workflow", got=workflow, expected="an instance with 'rounds', 'start' and 'round'")
    names = _field_names(cls)
    if names is None:
        raise JobInvalid("workflow", got=workflow, expected="a dataclass or a msgspec.Struct")
    if "." in cls.__qualname__ or cls.__module__ == "__main__":
        raise JobInvalid("workflow", got=reference, expected="a class at the top of a module that the job can import")
    try:
        settings = {name: msgspec.to_builtins(getattr(workflow, name)) for name in sorted(names)}
    except TypeError as error:
        raise JobInvalid("workflow", got=reference, expected=f"settings of plain data ({error})") from error
    short_names = {target: name for name, target in WORKFLOWS.items()}
    return WorkflowSpec(short_names.get(reference, reference), settings)


def _workflow_class(name: str, import_module: Callable[[str], ModuleType]) -> type:
    module_name, colon, class_name = WORKFLOWS.get(name, name).partition(":")
    if not (module_name and colon and class_name):
        raise JobInvalid("workflow", got=name, expected=f"'module:Class' or one of {', '.join(sorted(WORKFLOWS))}")
    try:
        module = import_module(module_name)
    except (Exception, SystemExit) as error:
        # The module is the job's own code and may raise anything; whoever wrote it needs the cause.
        cause = f"{type(error).__name__}: {error}"
        raise JobInvalid("workflow", got=name, expected=f"a module that can be imported ({cause})") from error
    cls = getattr(module, class_name, None)
    if not isinstance(cls, type):
        raise JobInvalid("workflow", got=name, expected=f"a class {class_name!r} in module {module_name!r}")
    return cls


def _field_names(cls: type) -> frozenset[str] | None:
    if dataclasses.is_dataclass(cls):
        return frozenset(item.name for item in dataclasses.fields(cls) if item.init)
    if issubclass(cls, msgspec.Struct):
        return frozenset(cls.__struct_fields__)
    return None
