"""Which submitted job starts now, with which clients, and what the others wait for.

``decide`` looks at one job, ``plan`` at all that wait, oldest first, each seeing what the ones before it took. A job
that cannot start does not hold up a younger one that can. The clients of a job are all that can take it, not only as
many as it needs at least.

A job that may start does, even past its time: a server that was down must not fail what it can now run. Only one that
still cannot start when its time is over is given up, and the reason is what it was waiting for.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, TypeAlias

from hanse.coordination.absence import NOBODY, Absence
from hanse.errors import Conflict
from hanse.ids import ClientName, JobId
from hanse.job import JobRecord, JobSpec, JobState, Resources

NAMES_SHOWN: Final = 5
NO_CLIENTS: Final = "no-clients"
"""The code of a job that is given up because it has waited in vain for its clients."""
# Shares of a CPU are decimal fractions: 0.3 less two jobs of 0.1 must leave enough for a third.
_ROUNDING: Final = 1e-9


@dataclass(frozen=True, slots=True)
class Candidate:
    """A registered client as the schedule sees it: what it has left, and how many jobs it runs."""

    name: ClientName
    free: Resources = field(default_factory=Resources)
    connected: bool = True
    running: int = 0


@dataclass(frozen=True, slots=True)
class Start:
    """The job starts, with these clients in the order of their names."""

    clients: tuple[ClientName, ...]


@dataclass(frozen=True, slots=True)
class Wait:
    """The job waits: *reason* says for what, *until* (POSIX seconds) when it is given up, with this *code*."""

    reason: str
    until: float
    code: str = NO_CLIENTS


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The job has waited as long as it may; *reason* says for what."""

    reason: str


Decision: TypeAlias = Start | Wait | GiveUp


def decide(
    job: JobRecord,
    *,
    clients: Sequence[Candidate],
    running_jobs: int,
    max_running_jobs: int,
    min_registered: int,
    now_s: float,
    absent: Mapping[ClientName, Absence] = NOBODY,
) -> Decision:
    """Return what becomes of the submitted *job* at POSIX time *now_s*.

    Of clients that are *absent* it is known why; a job that is given up says so. *max_running_jobs* is 0 for a server
    that starts no further jobs.

    Raises:
        Conflict: the job is not submitted, but scheduled, running or ended.
    """
    if job.state is not JobState.SUBMITTED:
        raise Conflict(f"job {job.job_id}", state=job.state.value, wanted=JobState.SCHEDULED.value)
    reason = _crowded(running_jobs, max_running_jobs) or _too_few_registered(len(clients), min_registered)
    if not reason:
        obstacles = {c.name: _obstacle(c, job.spec) for c in clients if is_meant(c.name, job.spec)}
        able = sorted(name for name, obstacle in obstacles.items() if not obstacle)
        reason = _required_missing(job.spec, obstacles) or _too_few_able(job.spec, able, obstacles)
        if not reason:
            return Start(tuple(able))
    until = job.submitted_at + job.spec.start_within_s
    if now_s < until:
        return Wait(reason, until)
    known = [f"{name}: {absent[name].why}" for name in sorted(absent) if is_meant(name, job.spec)]
    because = f" ({_listed(known)})" if known else ""
    return GiveUp(f"the job could not start within {job.spec.start_within_s:g} s: {reason}{because}")


def plan(
    jobs: Iterable[JobRecord],
    *,
    clients: Sequence[Candidate],
    running_jobs: int,
    max_running_jobs: int,
    min_registered: int,
    now_s: float,
    absent: Mapping[ClientName, Absence] = NOBODY,
) -> dict[JobId, Decision]:
    """Return what becomes of each of the submitted *jobs*, in the order in which they were submitted.

    What a job that starts takes, its place and its resources at each of its clients, the later ones do not get.

    Raises:
        Conflict: one of the jobs is not submitted.
    """
    decisions: dict[JobId, Decision] = {}
    for job in sorted(jobs, key=lambda job: (job.submitted_at, job.job_id)):
        decision = decide(
            job,
            clients=clients,
            running_jobs=running_jobs,
            max_running_jobs=max_running_jobs,
            min_registered=min_registered,
            now_s=now_s,
            absent=absent,
        )
        decisions[job.job_id] = decision
        if isinstance(decision, Start):
            running_jobs += 1
            clients = _after_start(clients, decision.clients, job.spec.resources)
    return decisions


def next_deadline(decisions: Iterable[Decision]) -> float | None:
    """Return the POSIX time at which the first waiting job is given up; ``None`` when none waits."""
    return min((decision.until for decision in decisions if isinstance(decision, Wait)), default=None)


def free_resources(offered: Resources, taken: Iterable[Resources]) -> Resources:
    """Return what is left of *offered* once each of *taken* has its part, and never less than nothing."""
    cpus, memory_mb, gpus = offered.cpus, offered.memory_mb, offered.gpus
    for part in taken:
        cpus, memory_mb, gpus = cpus - part.cpus, memory_mb - part.memory_mb, gpus - part.gpus
    return Resources(cpus=max(cpus, 0.0), memory_mb=max(memory_mb, 0), gpus=max(gpus, 0))


def _after_start(clients: Sequence[Candidate], chosen: Collection[ClientName], asked: Resources) -> list[Candidate]:
    taken = set(chosen)
    return [
        replace(client, free=free_resources(client.free, [asked]), running=client.running + 1)
        if client.name in taken
        else client
        for client in clients
    ]


def _crowded(running_jobs: int, max_running_jobs: int) -> str:
    if running_jobs < max_running_jobs:
        return ""
    if not max_running_jobs:
        return "the server starts no further jobs"
    return f"{_count(running_jobs, 'job')} running, and the server runs at most {max_running_jobs} at a time"


def _too_few_registered(registered: int, min_registered: int) -> str:
    if registered >= min_registered:
        return ""
    return f"{_count(registered, 'client')} registered, and the server waits for {min_registered}"


def _required_missing(spec: JobSpec, obstacles: Mapping[ClientName, str]) -> str:
    missing = [
        f"{name} {obstacles.get(name, 'is not registered')}"
        for name in sorted(spec.required_clients)
        if obstacles.get(name, "missing")
    ]
    return f"the job requires clients that cannot take it: {_listed(missing)}" if missing else ""


def _too_few_able(spec: JobSpec, able: Sequence[ClientName], obstacles: Mapping[ClientName, str]) -> str:
    if len(able) >= spec.min_clients:
        return ""
    reasons = [f"{name} {obstacle}" for name, obstacle in sorted(obstacles.items()) if obstacle]
    reasons += [f"{name} is not registered" for name in sorted(set(spec.clients) - set(obstacles))]
    because = f": {_listed(reasons)}" if reasons else ""
    return f"{len(able)} of the {spec.min_clients} clients that the job needs can take it{because}"


def is_meant(name: ClientName, spec: JobSpec) -> bool:
    """Return whether the job *spec* may run at the client *name*."""
    return not spec.clients or name in spec.clients


def _obstacle(client: Candidate, spec: JobSpec) -> str:
    if not client.connected:
        return "is not connected"
    asked, free = spec.resources, client.free
    short = [
        f"{has:g} of {wants:g} {unit} free"
        for has, wants, unit in (
            (free.cpus, asked.cpus, "CPUs"),
            (free.memory_mb, asked.memory_mb, "MB of memory"),
            (free.gpus, asked.gpus, "GPUs"),
        )
        # What a job does not ask for cannot be short, however little is left of it.
        if wants > 0 and has + _ROUNDING < wants
    ]
    if not short:
        return ""
    beside = f" beside {client.running} running job{'s' if client.running > 1 else ''}" if client.running else ""
    return f"has {' and '.join(short)}{beside}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun} is" if number == 1 else f"{number} {noun}s are"


def _listed(items: Sequence[str]) -> str:
    shown = ", ".join(items[:NAMES_SHOWN])
    more = len(items) - NAMES_SHOWN
    return f"{shown} and {more} more" if more > 0 else shown
