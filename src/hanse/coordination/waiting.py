"""What a job that has not ended waits for, from whom, since when, until when, and what happens then.

Nothing here waits or decides: these functions turn what the schedule and a run know into records for people. Times come
in as the owner has them, POSIX seconds for what is stored and monotonic seconds for what happens while a run lives, and
go out as POSIX seconds.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from hanse.coordination.absence import NOBODY, Absence, with_absence
from hanse.coordination.runs import ClientState, Run
from hanse.coordination.schedule import Wait, is_meant
from hanse.ids import ClientName
from hanse.job import JobRecord
from hanse.messages import ClientView, IssueTasks, TaskKey, Waiting

GIVEN_UP: Final = "the job is given up"
HINDERED: Final = "the job fails, unless that was mended; it is tried again every few seconds"
IF_NEEDED: Final = "the job fails, if it has needed the store since and that was not mended"
END_TRIED_AGAIN: Final = "it is asked again, every few seconds, to take note that the job has ended"
SCHEDULED_AGAIN: Final = "it is scheduled again, or is given up if it should have begun by then"
NOT_TOLD_YET: Final = "the run's process has said how long answers are waited for"
OVERDUE: Final = "the run's process, which is late, has gone on"
UNLESS_HEARD_OF: Final = "unless it says before then that it lives"
TOLD_AFTER: Final = 0.05
"""A silence of this part of what is waited for is told of: 30 seconds of ten minutes, ten beats."""
NOT_DEPLOYED: Final = f"it goes on without those that have not; if they are too few, {SCHEDULED_AGAIN}"


@dataclass(frozen=True, slots=True)
class Ask:
    """Tasks that a run issued together: when, until when (``None``: that is not known yet), and what happens then."""

    keys: tuple[TaskKey, ...]
    since: float
    until: float | None
    then: str = ""


class Phase(StrEnum):
    """What the run's own process does."""

    STARTING = "starting"
    WORKING = "working"
    PAUSING = "pausing"
    HINDERED = "hindered"
    SILENT = "silent"


@dataclass(frozen=True, slots=True)
class RunProcess:
    """How the run's own process stands, as its *attempt*-th start, since when.

    One that is ``PAUSING`` died because of *reason*, and is started again at *until*. One that is ``HINDERED`` cannot
    go on because of *reason*, is tried again every few seconds, and given up at *until*. One that is ``WORKING`` has
    had nothing new to work on *since* then: an answer, or the commit of a round. One that is ``SILENT`` was last heard
    of *since* then. That one is killed at *until*, and so is one that starts or works and is not heard of before.
    """

    phase: Phase
    since: float
    until: float
    attempt: int = 1
    reason: str = ""


@dataclass(frozen=True, slots=True)
class StoreTrouble:
    """The store has not done what was asked of it since *since*, because of *reason*; at *until*, *then* happens.

    That is monotonic time for a run, and POSIX time for a job that does not run.
    """

    reason: str
    since: float
    until: float
    then: str = HINDERED


@dataclass(frozen=True, slots=True)
class Deployment:
    """Clients that have still to fetch a job and to check it, since when and until when they may (POSIX seconds)."""

    clients: frozenset[ClientName]
    since: float
    until: float


@dataclass(frozen=True, slots=True)
class TakingUp:
    """A run of an earlier tenure, with *clients*, is being taken up since *since*, until *until* (POSIX seconds).

    That fails because of *reason*, if there is one.
    """

    clients: frozenset[ClientName]
    since: float
    until: float
    reason: str = ""


def with_issue(asks: Iterable[Ask], issue: IssueTasks, *, run: Run, now: float) -> tuple[Ask, ...]:
    """Return *asks* with *issue*, issued at monotonic time *now*, and without those that nobody waits for any more.

    What a run's process that was started again issues again is waited for since it was issued first, and so is what a
    round asks of others in addition, which it waits for together. What earlier rounds left is waited for, from now on,
    as long as what is issued now; an issue may also have nothing new.
    """
    until = now + issue.deadline_s
    asks = [
        replace(ask, until=until, then=issue.then) if ask.keys[0].round < run.round else ask
        for ask in asks
        if _open_keys(ask, run)
    ]
    if not issue.keys:
        return tuple(asks)
    issued = frozenset(issue.keys)
    before = [ask for ask in asks if not issued.isdisjoint(ask.keys) or (issue.keeps and _are_alike(ask, issue))]
    keys = dict.fromkeys((*(key for ask in before for key in ask.keys), *issue.keys))
    since = min((ask.since for ask in before), default=now)
    return (*(ask for ask in asks if ask not in before), Ask(tuple(keys), since, until, issue.then))


def _are_alike(ask: Ask, issue: IssueTasks) -> bool:
    """Return whether what was asked and what is issued now are of one name and round."""
    asked, issued = ask.keys[0], issue.keys[0]
    return (asked.round, asked.name) == (issued.round, issued.name)


def asks_taken_up(run: Run, *, now: float) -> tuple[Ask, ...]:
    """Return what a *run* that was taken up at monotonic time *now* has asked, as far as the journal tells."""
    groups: dict[tuple[int, str], list[TaskKey]] = {}
    for task in run.tasks:
        groups.setdefault((task.key.round, task.key.name), []).append(task.key)
    return tuple(Ask(tuple(keys), now, until=None, then=NOT_TOLD_YET) for keys in groups.values())


def asks_untold(asks: Iterable[Ask]) -> tuple[Ask, ...]:
    """Return *asks* of which it is not known any more until when they are waited for: who has said it is dead."""
    return tuple(replace(ask, until=None, then=NOT_TOLD_YET) for ask in asks)


def waiting_of_submitted(
    job: JobRecord, wait: Wait, *, absent: Mapping[ClientName, Absence] = NOBODY
) -> tuple[Waiting, ...]:
    """Return what a submitted *job* waits for, by the schedule's word.

    Clients that are *absent*, and might take it, are named, each with what is known of why.
    """
    whom = tuple(ClientView(name, "absent", absent[name].why) for name in sorted(absent) if is_meant(name, job.spec))
    return (Waiting(wait.reason, job.submitted_at, wait.until, f"{GIVEN_UP} ({wait.code})", whom),)


def waiting_of_held_up(trouble: StoreTrouble) -> Waiting:
    """Return what a job waits for that does not run, and of which the store does not take what becomes of it."""
    return _waiting_of_trouble(trouble, trouble.since, trouble.until)


def waiting_of_schedule_held_up(job: JobRecord, reason: str, since: float, again_at: float) -> Waiting:
    """Return what a submitted *job* waits for while the store keeps the schedule from its work, tried *again_at*."""
    until = max(job.submitted_at + job.spec.start_within_s, again_at)
    return Waiting(_failing_store(reason), since, until, f"{GIVEN_UP}, as soon as the store takes note of that")


def waiting_of_fetching(since: float, until: float) -> Waiting:
    """Return what a scheduled job waits for whose package its server fetches since *since*, until *until* (POSIX)."""
    return Waiting("the server to have the job's package", since, until, SCHEDULED_AGAIN)


def waiting_of_scheduled(deployment: Deployment) -> tuple[Waiting, ...]:
    """Return what a scheduled job waits for: clients that have not taken it yet."""
    if not deployment.clients:
        return ()
    whom = tuple(ClientView(name, "deploying", since=deployment.since) for name in sorted(deployment.clients))
    what = "clients to fetch the job and to check it against their policies"
    return (Waiting(what, deployment.since, deployment.until, NOT_DEPLOYED, whom),)


def waiting_of_taking_up(taking_up: TakingUp) -> tuple[Waiting, ...]:
    """Return what a run waits for that another server, or this one before, has begun: to be gone on with here."""
    what = "this server to take the run up: its code, its last state, and the answers since"
    if taking_up.reason:
        what = _failing_store(taking_up.reason)
    return (Waiting(what, taking_up.since, taking_up.until, HINDERED),)


def views_of(
    run: Run, *, absent: Mapping[ClientName, Absence] = NOBODY, now: float, wall: float
) -> tuple[ClientView, ...]:
    """Return the clients of *run* as they stand at monotonic time *now*, which is POSIX time *wall*.

    Of one that is *absent* it is said why.
    """
    return tuple(_view(run, client, absent, lambda at: wall - (now - at)) for client in run.clients)


def waiting_of_running(
    run: Run,
    *,
    asks: Sequence[Ask],
    process: RunProcess,
    store: StoreTrouble | None = None,
    absent: Mapping[ClientName, Absence] = NOBODY,
    now: float,
    wall: float,
) -> tuple[Waiting, ...]:
    """Return what *run* waits for at monotonic time *now*, which is POSIX time *wall*.

    That is the store while it fails, its own process while that is started, and for each kind of task that is out those
    clients that have not answered. Where nothing is out, its own process works. Tasks that were asked one by one are
    told together: since the first of them was issued, until the first of them is given up. Until when is what the
    process has said; where it is to say so yet, or has not acted on it, what becomes of the process is told. Of clients
    that are *absent* it is said why.
    """
    if run.has_ended:
        return ()

    def posix(at: float) -> float:
        return wall - (now - at)

    found = []
    if store is not None:
        found.append(_waiting_of_trouble(store, posix(store.since), posix(store.until)))
    asks = [_as_it_ends(ask, run, process, now) for ask in asks]
    tasks = _waiting_for_answers(run, asks, absent, posix)
    if process.phase is not Phase.WORKING or not tasks:
        found.append(_waiting_for_process(run, process, posix))
    return (*found, *tasks)


def _failing_store(reason: str) -> str:
    return f"the server's store, which fails ({reason})"


def _waiting_of_trouble(trouble: StoreTrouble, since: float, until: float) -> Waiting:
    return Waiting(_failing_store(trouble.reason), since, until, trouble.then)


def _waiting_for_process(run: Run, process: RunProcess, posix: Callable[[float], float]) -> Waiting:
    what, then = _process_and_then(run, process)
    what = f"the run's process at the server{what}"
    return Waiting(what, posix(process.since), posix(process.until), then)


def _process_and_then(run: Run, process: RunProcess) -> tuple[str, str]:
    """Return what there is to say of a run's own *process*, and what happens then."""
    again = f"it is killed and started again, and goes on with round {run.round}"
    match process.phase:
        case Phase.PAUSING:
            then = f"it is started again, as start {process.attempt}, and goes on with round {run.round}"
            return f", which died ({process.reason})", then
        case Phase.HINDERED:
            return f", which cannot go on ({process.reason})", HINDERED
        case Phase.SILENT:
            return ", which no longer says that it lives", again
        case Phase.STARTING:
            return f" to begin (start {process.attempt})", f"{again}, {UNLESS_HEARD_OF}"
        case Phase.WORKING:
            return f", which {_doing(run)}", f"{again}, {UNLESS_HEARD_OF}"


def as_heard(process: RunProcess, *, heard_at: float, now: float, silent_s: float) -> RunProcess:
    """Return how *process* stands that was last heard of at *heard_at*, and is killed after *silent_s* of silence."""
    if process.phase not in (Phase.STARTING, Phase.WORKING):
        return process
    until = heard_at + silent_s
    if now - heard_at < silent_s * TOLD_AFTER:
        return replace(process, until=until)
    return RunProcess(Phase.SILENT, heard_at, until, process.attempt)


def _doing(run: Run) -> str:
    if run.answers:
        count = len(run.answers)
        return f"works on {count} answer{'s' if count > 1 else ''} of round {run.round}"
    return f"prepares round {run.round}" if run.round else "makes the initial model"


def _as_it_ends(ask: Ask, run: Run, process: RunProcess, now: float) -> Ask:
    """Return *ask* with what happens next, which is up to the run's *process*."""
    if ask.until is not None and ask.until > now:
        return ask
    first = NOT_TOLD_YET if ask.until is None else OVERDUE
    return replace(ask, until=process.until, then=f"{first}; otherwise {_process_and_then(run, process)[1]}")


def _waiting_for_answers(
    run: Run,
    asks: Iterable[Ask],
    absent: Mapping[ClientName, Absence],
    posix: Callable[[float], float],
) -> tuple[Waiting, ...]:
    groups: dict[tuple[int, str, str], list[Ask]] = {}
    for ask in asks:
        if open_keys := _open_keys(ask, run):
            groups.setdefault((open_keys[0].round, open_keys[0].name, ask.then), []).append(ask)
    return tuple(_waiting_for_tasks(run, group, absent, posix) for _, group in sorted(groups.items()))


def _waiting_for_tasks(
    run: Run,
    group: Collection[Ask],
    absent: Mapping[ClientName, Absence],
    posix: Callable[[float], float],
) -> Waiting:
    asked = {key.client for ask in group for key in ask.keys}
    missing = sorted({key.client for ask in group for key in _open_keys(ask, run)})
    first = min(group, key=lambda ask: ask.since)
    key = first.keys[0]
    clients = f"{len(missing)} of {len(asked)} client{'s' if len(asked) > 1 else ''}"
    return Waiting(
        what=f"answers to {key.name!r} of round {key.round} from {clients}",
        since=posix(first.since),
        until=posix(min(ask.until for ask in group if ask.until is not None)),
        then=first.then,
        whom=tuple(_view(run, client, absent, posix) for client in missing),
    )


def _view(
    run: Run, client: ClientName, absent: Mapping[ClientName, Absence], posix: Callable[[float], float]
) -> ClientView:
    part = run.participant(client)
    is_away = part.state in (ClientState.SUSPECT, ClientState.LOST)
    reason = with_absence(part.reason, client, absent) if is_away else part.reason
    return ClientView(part.name, part.state.value, reason, posix(part.since), part.attempt)


def _open_keys(ask: Ask, run: Run) -> tuple[TaskKey, ...]:
    return tuple(key for key in ask.keys if run.task(key) is not None)
