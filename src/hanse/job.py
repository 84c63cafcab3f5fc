"""A job: what runs, with whom, and how far it has come.

``Job`` is what a person writes in Python; ``JobSpec`` is the same as plain data, from ``[tool.hanse]`` of a folder's
``pyproject.toml`` or from a ``Job``, and is what is stored, hashed and sent. ``JobRecord`` is the server's row about a
submitted job. A job's state changes only through ``move``, and ``LEGAL`` is the table of what may follow what.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Final, TypeAlias

import msgspec

from hanse.errors import Conflict, JobInvalid
from hanse.ids import NAME_RULE, ClientName, Digest, JobId, is_name

Scalar: TypeAlias = bool | int | float | str
Config: TypeAlias = dict[str, Scalar]

MAX_CLIENTS: Final = 1_000_000
MAX_PROCESS_TRIES: Final = 100
_REFERENCE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_SCRIPT = re.compile(r"[\w./-]+\.py")
_MODEL_FILE = re.compile(r"[\w./-]+\.safetensors")


class Resources(msgspec.Struct, frozen=True):
    """What a site offers, or a job asks of each of its clients and of nobody else; 0 asks for nothing."""

    cpus: float = 0.0
    memory_mb: int = 0
    gpus: int = 0

    def __post_init__(self) -> None:
        for part in ("cpus", "memory_mb", "gpus"):
            if not getattr(self, part) >= 0:
                raise JobInvalid(f"resources.{part}", got=getattr(self, part), expected="0 or more")


class WorkflowSpec(msgspec.Struct, frozen=True):
    """A workflow by name: a registered short name (``fedavg``) or ``module:Class``, with its settings."""

    name: str
    settings: dict[str, object] = {}


class JobSpec(msgspec.Struct, frozen=True):
    """A job as plain data.

    ``client`` is ``module:app`` (a ``ClientApp``) or a script (``train.py``); ``model`` is ``module:function`` (returns
    the initial model) or a ``.safetensors`` file of the package. ``clients`` narrows who may take part (empty:
    anybody); ``required_clients`` must. ``start_within_s`` is how long the job may wait for enough clients.
    ``process_tries``, at most 100, bounds how often a job's process that died is started again, at each place.
    """

    name: str
    workflow: WorkflowSpec
    client: str
    model: str
    min_clients: int = 2
    required_clients: tuple[ClientName, ...] = ()
    clients: tuple[ClientName, ...] = ()
    resources: Resources = Resources()
    seed: int = 0
    config: Config = {}
    start_within_s: float = 24 * 3600.0
    process_tries: int = 3

    def __post_init__(self) -> None:
        if not is_name(self.name):
            raise JobInvalid("name", got=self.name, expected="1 to 63 letters, digits, '-' or '_'")
        if not (_REFERENCE.fullmatch(self.client) or _is_inside(self.client, _SCRIPT)):
            raise JobInvalid("client", got=self.client, expected="'module:app' or a script such as 'train.py'")
        if not (_REFERENCE.fullmatch(self.model) or _is_inside(self.model, _MODEL_FILE)):
            raise JobInvalid("model", got=self.model, expected="'module:function' or a .safetensors file of the job")
        if not 1 <= self.min_clients <= MAX_CLIENTS:
            raise JobInvalid("min_clients", got=self.min_clients, expected=f"1 to {MAX_CLIENTS}")
        if self.clients and not set(self.required_clients) <= set(self.clients):
            missing = sorted(set(self.required_clients) - set(self.clients))
            raise JobInvalid("required_clients", got=missing, expected="clients that 'clients' lists")
        if self.clients and self.min_clients > len(self.clients):
            raise JobInvalid(
                "min_clients", got=self.min_clients, expected=f"at most the {len(self.clients)} of 'clients'"
            )
        for listing in ("required_clients", "clients"):
            if bad := [name for name in getattr(self, listing) if not is_name(name)]:
                raise JobInvalid(listing, got=bad[0], expected=f"a client's name: {NAME_RULE}")
        if not self.start_within_s > 0:
            raise JobInvalid("start_within_s", got=self.start_within_s, expected="more than 0 seconds")
        if not 1 <= self.process_tries <= MAX_PROCESS_TRIES:
            raise JobInvalid("process_tries", got=self.process_tries, expected=f"1 to {MAX_PROCESS_TRIES}")
        if not 0 <= self.seed < 2**63:
            raise JobInvalid("seed", got=self.seed, expected="0 to 2**63 - 1")

    @property
    def is_script(self) -> bool:
        """Whether the client's side is a plain training script."""
        return self.client.endswith(".py")


@dataclass(frozen=True, slots=True)
class Job:
    """A job as written in Python; ``JobSpec`` says what each field means.

    ``workflow`` is an instance (``FedAvg(rounds=10)``), ``client`` a ``ClientApp``, a reference or a script's path,
    ``model`` a ``Model``, a function that returns one, or a reference. ``source`` is the folder whose Python files make
    up the job; by default the folder of the file that defines ``client``.
    """

    name: str
    workflow: object
    client: object
    model: object
    min_clients: int = 2
    required_clients: tuple[str, ...] = ()
    clients: tuple[str, ...] = ()
    resources: Resources = field(default_factory=Resources)
    seed: int = 0
    config: Mapping[str, Scalar] = field(default_factory=dict)
    start_within_s: float = 24 * 3600.0
    process_tries: int = 3
    source: Path | None = None


class JobState(StrEnum):
    """How far a job has come."""

    SUBMITTED = "submitted"
    SCHEDULED = "scheduled"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    ABORTED = "aborted"


LEGAL: Final[Mapping[JobState, frozenset[JobState]]] = {
    JobState.SUBMITTED: frozenset({JobState.SCHEDULED, JobState.FAILED, JobState.ABORTED}),
    JobState.SCHEDULED: frozenset({JobState.SUBMITTED, JobState.RUNNING, JobState.FAILED, JobState.ABORTED}),
    JobState.RUNNING: frozenset({JobState.COMPLETED, JobState.FAILED, JobState.ABORTED}),
    JobState.COMPLETED: frozenset(),
    JobState.FAILED: frozenset(),
    JobState.ABORTED: frozenset(),
}
"""What may follow what. A scheduled job goes back to submitted when a chosen client cannot take it after all."""

ENDED: Final = frozenset(state for state, following in LEGAL.items() if not following)


class FailedClient(msgspec.Struct, frozen=True):
    """A client that is out of a run for good: the sentence that says why, and the code of what befell it."""

    client: ClientName
    reason: str
    code: str = ""


class JobRecord(msgspec.Struct, frozen=True):
    """A submitted job as the server's store holds it; times are POSIX seconds, 0 where it has not happened.

    *failed_clients* are those of its clients that are out of its run.

    Of a bad end it says why: a stable *code*, a sentence (*reason*), the *client* concerned, if one is, with the code
    of what befell that client (*cause*) where the job's own is another, and the last lines of the log there
    (*log_tail*); without a client, those of the run's process.
    """

    job_id: JobId
    spec: JobSpec
    submitter: str
    submitted_at: float
    package: Digest
    package_bytes: int
    state: JobState = JobState.SUBMITTED
    started_at: float = 0.0
    ended_at: float = 0.0
    code: str = ""
    reason: str = ""
    clients: tuple[ClientName, ...] = ()
    result: Digest = Digest("")
    result_bytes: int = 0
    client: str = ""
    cause: str = ""
    log_tail: str = ""
    failed_clients: tuple[FailedClient, ...] = ()


def move(
    record: JobRecord,
    to: JobState,
    *,
    at: float,
    code: str = "",
    reason: str = "",
    client: str = "",
    cause: str = "",
    log_tail: str = "",
) -> JobRecord:
    """Return *record* in state *to*, entered at POSIX time *at*; failing needs a *reason*, the rest is as the record's.

    Raises:
        Conflict: ``LEGAL`` does not allow it.
    """
    if to not in LEGAL[record.state]:
        raise Conflict(f"job {record.job_id}", state=record.state.value, wanted=to.value)
    if to is JobState.FAILED and not reason:
        raise ValueError("a job fails for a reason")
    return msgspec.structs.replace(
        record,
        state=to,
        code=code,
        reason=reason,
        client=client,
        cause=cause,
        log_tail=log_tail,
        started_at=at if to is JobState.RUNNING else record.started_at,
        ended_at=at if to in ENDED else record.ended_at,
    )


def parse(table: Mapping[str, object], *, default_name: str = "") -> JobSpec:
    """Return the job that *table* (``[tool.hanse]`` of a ``pyproject.toml``) describes.

    ``workflow`` is a short name, a reference, or a table with ``name`` and the workflow's settings beside it.

    Raises:
        JobInvalid: a field is unknown, missing or not what it should be; the error names it.
    """
    known = set(JobSpec.__struct_fields__)
    for name in table:
        if name not in known:
            raise JobInvalid(name, got=table[name], expected=f"no such field; a job has {', '.join(sorted(known))}")
    values = {"name": default_name, **table}
    for name in ("workflow", "client", "model"):
        if name not in values:
            raise JobInvalid(name, got=None, expected="a value; it has no default")
    values["workflow"] = _workflow_table(values["workflow"])
    resources = values.get("resources", {})
    if isinstance(resources, Mapping) and (unknown := set(resources) - set(Resources.__struct_fields__)):
        name = min(map(str, unknown))
        raise JobInvalid(f"resources.{name}", got=resources[name], expected="cpus, memory_mb or gpus")
    try:
        return msgspec.convert(values, JobSpec)
    except msgspec.ValidationError as error:
        what, _, path = str(error).partition(" - at `$.")
        name = path.rstrip("`") or "definition"
        got = values.get(name.partition(".")[0].partition("[")[0])
        raise JobInvalid(name, got=got, expected=what.removeprefix("Expected ")) from None


def _workflow_table(value: object) -> dict[str, object]:
    if isinstance(value, str):
        return {"name": value}
    if isinstance(value, Mapping) and isinstance(value.get("name"), str):
        return {"name": value["name"], "settings": {key: item for key, item in value.items() if key != "name"}}
    raise JobInvalid("workflow", got=value, expected="a name, or a table with 'name' and the workflow's settings")


def _is_inside(path: str, pattern: re.Pattern[str]) -> bool:
    return pattern.fullmatch(path) is not None and not path.startswith("/") and ".." not in path.split("/")
