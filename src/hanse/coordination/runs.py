"""Who runs what, and whose answer counts.

A ``Run`` is one job while it runs: its clients, each in one state; the tasks that are out; the answers accepted since
the last committed round. It mirrors what the journal holds and can be built from it. The owner asks ``judge`` first,
writes the journal, and then calls ``accept``: in between other things may happen, and the journal's word on duplicates
is the last.

A run that was taken up again knows what the journal holds, and a client may know more: a task goes out while it is
being journalled. Until the round is committed, or the client has another task, its answer is early: it counts once the
task has been issued again.

Rounds: round 0 is the initial model. Tasks carry the number of the round that they work for, one more than the last
committed; committing that round ends them, but for those that the commit carries on. A task that is carried may be
answered in a later round; it and its answer stay until a commit no longer carries it.

A client's part in the run::

    deployed ──▶ starting ──▶ running ◀──▶ suspect ──▶ lost
                    ▲            │  ▲                    │
                    └────────────┘  └────────────────────┘      and from each of them: failed, done

``LEGAL`` has every arrow. A client that is suspect or lost may come back; one that failed is out of the run for good.
When a server takes a run up again, all clients are suspect: their processes may have gone on without it, and come back.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from types import MappingProxyType
from typing import Final, Self, TypeAlias

from hanse.coordination.task_keys import is_counted
from hanse.errors import Conflict, NotFound, OutOfMemory, ProcessDied, ProcessHung, Unauthorized, UpdateRejected
from hanse.ids import ClientName, JobId
from hanse.messages import TaskAssignment, TaskKey, TaskResult

NOTHING_COMMITTED: Final = -1
_CAUSES: Final = {each.code: each for each in (OutOfMemory, ProcessHung)}


class ClientState(StrEnum):
    """How a client stands in a run."""

    DEPLOYED = "deployed"
    STARTING = "starting"
    RUNNING = "running"
    SUSPECT = "suspect"
    LOST = "lost"
    FAILED = "failed"
    DONE = "done"


LEGAL: Final[Mapping[ClientState, frozenset[ClientState]]] = {
    ClientState.DEPLOYED: frozenset(
        {ClientState.STARTING, ClientState.RUNNING, ClientState.SUSPECT, ClientState.FAILED, ClientState.DONE},
    ),
    ClientState.STARTING: frozenset(
        {ClientState.STARTING, ClientState.RUNNING, ClientState.SUSPECT, ClientState.FAILED, ClientState.DONE},
    ),
    ClientState.RUNNING: frozenset(
        {ClientState.STARTING, ClientState.SUSPECT, ClientState.FAILED, ClientState.DONE},
    ),
    ClientState.SUSPECT: frozenset(
        {ClientState.STARTING, ClientState.RUNNING, ClientState.LOST, ClientState.FAILED, ClientState.DONE},
    ),
    ClientState.LOST: frozenset(
        {ClientState.STARTING, ClientState.RUNNING, ClientState.FAILED, ClientState.DONE},
    ),
    ClientState.FAILED: frozenset(),
    ClientState.DONE: frozenset(),
}
"""What may follow what. A process that died while it started is started again: starting follows itself."""

ENDED: Final = frozenset(state for state, following in LEGAL.items() if not following)


@dataclass(frozen=True, slots=True)
class Participant:
    """A client's part in a run: since when (monotonic seconds) it is in its state, and why, where that is bad news.

    ``attempt`` counts the starts of its process; 0 is before the first. ``deaths`` counts how often it has died since
    the client's last accepted answer: a long job may outlive any number of restarts, and still not go round in circles.
    """

    name: ClientName
    state: ClientState = ClientState.DEPLOYED
    since: float = 0.0
    attempt: int = 0
    reason: str = ""
    deaths: int = 0


@dataclass(frozen=True, slots=True)
class Accepted:
    """The answer counts."""


@dataclass(frozen=True, slots=True)
class Duplicate:
    """The task has its answer already: nothing changes, and the sender may forget what it sent."""


@dataclass(frozen=True, slots=True)
class Stale:
    """Nobody waits for this answer; *reason* says why."""

    reason: str


@dataclass(frozen=True, slots=True)
class Early:
    """The answer may count once its task has been issued again: the sender should keep it, and ask again."""


Reception: TypeAlias = Accepted | Duplicate | Stale | Early


@dataclass(frozen=True, slots=True)
class Restart:
    """Start the process again, as its *attempt*-th start; *reason* says how it died."""

    attempt: int
    reason: str = ""


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Do not start the process again; *reason* is the sentence for the job's record, *code* that of how it died."""

    reason: str
    code: str = ProcessDied.code


@dataclass(frozen=True, slots=True)
class Sync:
    """What a client's heartbeat tells: jobs that it should abort, jobs that are dead there, and what to remember.

    ``known`` is the *previously* of the next heartbeat.
    """

    abort: tuple[JobId, ...]
    dead: tuple[JobId, ...]
    known: frozenset[JobId]


def heartbeat_sync(reported: Iterable[JobId], *, expected: Collection[JobId], previously: Collection[JobId]) -> Sync:
    """Compare the jobs that a client *reported* with those that the server *expected* to run there.

    What only the client runs it should abort. What only the server believes in is dead, if the client reported it
    *previously*; otherwise its start is still on the way. A dead job is declared once: it counts again from its next
    report on.
    """
    here, there = frozenset(expected), frozenset(reported)
    before = here & frozenset(previously)
    return Sync(
        abort=tuple(sorted(there - here)),
        dead=tuple(sorted(before - there)),
        known=here & there,
    )


def after_death(
    where: str, *, attempt: int, tries: int, status: int, last_line: str = "", cause: str = ""
) -> Restart | GiveUp:
    """Return what to do about a job's process at *where* that ended unasked with *status* on its *attempt*-th start.

    Starts are counted since it last got on: a client by an accepted answer, a run by a committed round. It is started
    at most *tries* times without. One that ended with status 0 has ended of its own accord, and would again. *cause* is
    the code of what ended it, where that is known.
    """
    died = _CAUSES.get(cause, ProcessDied)(where, status, last_line)
    if status == 0:
        return GiveUp(f"{died}; it ended before the run was over", died.code)
    if attempt < tries:
        return Restart(attempt + 1, str(died))
    return GiveUp(f"{died}; that was start {attempt} of {tries}" if tries > 1 else str(died), died.code)


class Run:
    """One job while it runs: see the module.

    *committed* is the last committed round, and *tasks* and *answers* are what the journal holds since, the answers in
    the order in which they were accepted; a run that begins has none. Clients begin as deployed at monotonic time
    *now*; ``resumed`` gives a run that had begun before.
    """

    def __init__(
        self,
        job_id: JobId,
        clients: Iterable[ClientName],
        *,
        process_tries: int = 3,
        now: float = 0.0,
        committed: int = NOTHING_COMMITTED,
        tasks: Sequence[TaskAssignment] = (),
        answers: Sequence[TaskResult] = (),
    ) -> None:
        if process_tries < 1:
            raise ValueError(f"process_tries is {process_tries}; expected 1 or more")
        self.job_id = job_id
        self.process_tries = process_tries
        self._participants = {name: Participant(name, since=now) for name in sorted(clients)}
        self._committed = committed
        self._answers: dict[TaskKey, TaskResult] = {answer.key: answer for answer in answers}
        self._tasks: dict[TaskKey, TaskAssignment] = {t.key: t for t in tasks if t.key not in self._answers}
        self._cancelled: set[TaskKey] = set()
        self._streams: dict[ClientName, object] = {}
        self._suspect_since: dict[ClientName, float] = {}
        self._lost: set[ClientName] = set()
        self._ended = False
        self._taken_up_in: int | None = None

    @classmethod
    def resumed(
        cls,
        job_id: JobId,
        clients: Iterable[ClientName],
        *,
        process_tries: int = 3,
        now: float,
        committed: int,
        tasks: Sequence[TaskAssignment],
        answers: Sequence[TaskResult],
        failed: Mapping[ClientName, str] = MappingProxyType({}),
    ) -> Self:
        """Return the run as the journal holds it, with all clients suspect: who does not come back is lost in time.

        Those that had *failed*, and why, are out of it.
        """
        run = cls(
            job_id, clients, process_tries=process_tries, now=now, committed=committed, tasks=tasks, answers=answers
        )
        for client in run.clients:
            run._move(client, ClientState.SUSPECT, now=now)
        for client, reason in failed.items():
            run.failed(client, reason, now=now)
        run._taken_up_in = run.round
        return run

    # what it is

    @property
    def committed_round(self) -> int:
        """The last committed round; ``NOTHING_COMMITTED`` before the first."""
        return self._committed

    @property
    def round(self) -> int:
        """The round being worked for: one more than the last committed."""
        return self._committed + 1

    @property
    def has_ended(self) -> bool:
        """Whether ``end`` was called."""
        return self._ended

    @property
    def clients(self) -> tuple[ClientName, ...]:
        """All clients of the run, in the order of their names, whatever became of them."""
        return tuple(self._participants)

    @property
    def participants(self) -> tuple[Participant, ...]:
        """Each client's part, in the order of their names."""
        return tuple(self._participants.values())

    @property
    def answers(self) -> tuple[TaskResult, ...]:
        """The answers accepted since the last committed round, or carried on by it, in the order in which they came."""
        return tuple(self._answers.values())

    @property
    def tasks(self) -> tuple[TaskAssignment, ...]:
        """The tasks that are out, oldest first, whatever became of their clients."""
        return tuple(self._tasks.values())

    @property
    def carried(self) -> tuple[TaskKey, ...]:
        """The tasks of committed rounds that live on, answered or not."""
        return tuple(key for key in (*self._tasks, *self._answers) if key.round < self.round)

    @property
    def counted(self) -> tuple[TaskKey, ...]:
        """The tasks of the round being worked for that were asked by a release which counted them, answered or not."""
        return tuple(key for key in (*self._tasks, *self._answers) if key.round == self.round and is_counted(key))

    @property
    def lost_clients(self) -> tuple[ClientName, ...]:
        """The clients from which no answer is to be expected now: failed, or lost and not connected since."""
        parts = self._participants.values()
        return tuple(part.name for part in parts if part.state is ClientState.FAILED or part.name in self._lost)

    @property
    def failed_clients(self) -> tuple[ClientName, ...]:
        """The clients that are out of the run for good."""
        return tuple(part.name for part in self._participants.values() if part.state is ClientState.FAILED)

    @property
    def live_clients(self) -> tuple[ClientName, ...]:
        """The clients that have not ended their part."""
        return tuple(part.name for part in self._participants.values() if part.state not in ENDED)

    def participant(self, client: ClientName) -> Participant:
        """Return *client*'s part in the run.

        Raises:
            NotFound: it takes no part.
        """
        if client not in self._participants:
            raise NotFound(f"client of job {self.job_id}", client)
        return self._participants[client]

    # tasks and answers

    def issue(self, tasks: Sequence[TaskAssignment]) -> tuple[TaskAssignment, ...]:
        """Take *tasks* as issued and return those that are new, which are to be sent; all or none are taken.

        A task whose key is known stays as it was: a restarted workflow issues again what it had issued. One that was
        cancelled is new again: nobody works on it any more, and the workflow waits for its answer.

        Raises:
            Conflict: the run has ended, or a task is not for the round being worked for.
            NotFound: a task is for a client that takes no part.
        """
        if self._ended:
            raise Conflict(f"run {self.job_id}", state="over", wanted="given tasks")
        for task in tasks:
            self.participant(task.key.client)
            if task.key.round != self.round:
                raise Conflict(f"run {self.job_id}", state=f"in round {self.round}", wanted=f"at {_shown(task.key)}")
        new: dict[TaskKey, TaskAssignment] = {}
        for task in tasks:
            if not self._is_known(task.key):
                new.setdefault(task.key, task)
        self._cancelled.difference_update(new)
        self._tasks.update(new)
        return tuple(new.values())

    def task_for(self, client: ClientName) -> TaskAssignment | None:
        """Return the oldest task that *client* has to answer; ``None`` when there is none for it to work on."""
        return next(iter(self.tasks_for(client)), None)

    def tasks_for(self, client: ClientName) -> tuple[TaskAssignment, ...]:
        """Return the tasks that *client* has to answer, oldest first: what is sent again when its cell comes back."""
        if self.participant(client).state in ENDED:
            return ()
        return tuple(task for key, task in self._tasks.items() if key.client == client)

    def task(self, key: TaskKey) -> TaskAssignment | None:
        """Return the task out under *key*, against which an answer is checked; ``None`` when none is out."""
        return self._tasks.get(key)

    def may_be_ahead(self, client: ClientName) -> bool:
        """Return whether *client* may be at a task that this run does not know: see the module on early answers."""
        is_live = self.participant(client).state not in ENDED
        return is_live and self.round == self._taken_up_in and self.task_for(client) is None

    def judge(self, result: TaskResult, *, sender: ClientName) -> Reception:
        """Return what accepting *result* from *sender* would come to, and change nothing.

        Raises:
            NotFound: the sender takes no part in the run.
            Unauthorized: the answer is to another client's task.
            UpdateRejected: it holds neither an update nor a fault, or both.
        """
        self.participant(sender)
        key = result.key
        if key.client != sender:
            raise Unauthorized(sender, f"answer for {key.client}", needs=f"to be {key.client}")
        if (result.update is None) == (result.fault is None):
            what = "both an update and a fault" if result.update is not None else "neither an update nor a fault"
            raise UpdateRejected(sender, f"{what} for {_shown(key)}; an answer is one of them")
        if key in self._answers:
            return Duplicate()
        if self._ended:
            return Stale("the run has ended")
        if key in self._cancelled:
            return Stale(f"{_shown(key)} is no longer wanted")
        if key in self._tasks:
            return Accepted()
        if key.round < self.round:
            return Stale(f"{_shown(key)} is over: round {self._committed} is committed")
        if key.round == self.round and self.may_be_ahead(sender):
            return Early()
        return Stale(f"{_shown(key)} was not issued to {key.client}")

    def accept(self, result: TaskResult, *, sender: ClientName) -> Reception:
        """Take *result* as the answer to its task, unless it is a duplicate or stale; ``judge`` says what it raises."""
        reception = self.judge(result, sender=sender)
        if isinstance(reception, Accepted):
            del self._tasks[result.key]
            self._answers[result.key] = result
            self._participants[sender] = replace(self._participants[sender], deaths=0)
        return reception

    def retract(self, tasks: Iterable[TaskAssignment]) -> tuple[TaskAssignment, ...]:
        """Take back the answers to *tasks*, and return those that had one: they are out again, to be sent again."""
        retracted = tuple(task for task in tasks if self._answers.pop(task.key, None) is not None)
        self._tasks.update((task.key, task) for task in retracted)
        return retracted

    def cancel(self, keys: Iterable[TaskKey]) -> tuple[TaskKey, ...]:
        """Want the answers to *keys* no longer; return those that were out, whose clients are to be told."""
        out = tuple(dict.fromkeys(key for key in keys if key in self._tasks))
        for key in out:
            del self._tasks[key]
        self._cancelled.update(out)
        return out

    def unknown(self, keys: Iterable[TaskKey]) -> tuple[TaskKey, ...]:
        """Return those of *keys* that name no task that is out or answered: a commit cannot carry them."""
        return tuple(key for key in keys if key not in self._tasks and key not in self._answers)

    def committed(self, round_number: int, *, carried: Collection[TaskKey] = ()) -> tuple[TaskKey, ...]:
        """Take *round_number* as committed, and of its tasks and answers keep only those that are *carried* on.

        Return the tasks still out that are over. The round last committed, again, changes nothing.

        Raises:
            Conflict: the round is not the next one.
            NotFound: there is no such task to carry.
        """
        if round_number == self._committed:
            return ()
        if round_number != self.round:
            raise Conflict(f"run {self.job_id}", state=f"in round {self.round}", wanted=f"at round {round_number}")
        for key in self.unknown(carried):
            raise NotFound(f"task of job {self.job_id}", _shown(key))
        self._committed = round_number
        return self._forget_tasks(but=frozenset(carried))

    def end(self, *, now: float) -> tuple[TaskKey, ...]:
        """End the run: every client that has not failed is done; return the tasks still out. Twice is once."""
        self._ended = True
        self._lost.clear()
        for client in self.live_clients:
            self._move(client, ClientState.DONE, now=now)
        return self._forget_tasks()

    # clients and their processes; news that comes too late changes nothing

    def starting(self, client: ClientName, *, now: float) -> int | None:
        """Note that *client*'s process is being started; return which start it is, ``None`` when it is not to be."""
        part = self.participant(client)
        if ClientState.STARTING not in LEGAL[part.state]:
            return None
        self._suspect_since.pop(client, None)
        if part.state is ClientState.SUSPECT:
            self._suspect_since[client] = part.since
        return self._move(client, ClientState.STARTING, now=now, attempt=part.attempt + 1).attempt

    def not_started(self, client: ClientName, reason: str, *, now: float) -> None:
        """Note that *client*'s process could not be started: a client that was suspect before is so since then."""
        if self.participant(client).state is ClientState.STARTING:
            self._move(client, ClientState.SUSPECT, now=self._suspect_since.pop(client, now), reason=reason)

    def stream_up(self, client: ClientName, *, now: float, stream: object = None) -> ClientState | None:
        """Note that *client*'s job cell is connected; return what its state was, ``None`` when it has ended its part.

        *stream* identifies the connection, so that the end of the one that it replaced can be told from its own, in
        either order.
        """
        state = self.participant(client).state
        if state in ENDED:
            return None
        self._streams[client] = stream
        self._lost.discard(client)
        if state is not ClientState.RUNNING:
            self._move(client, ClientState.RUNNING, now=now)
        return state

    def stream_down(self, client: ClientName, *, now: float, stream: object = None) -> bool:
        """Note that *stream* of *client*, its job cell's or its agent's, broke; return whether it became suspect.

        It does not when its job cell is connected by another stream, so an agent's break hurts no run that has started;
        nor when its process is being started again and the stream was the former process's.
        """
        state = self.participant(client).state
        if ClientState.SUSPECT not in LEGAL[state]:
            return False
        latest = self._streams.get(client)
        if state is ClientState.RUNNING and stream is not latest:
            return False
        if state is not ClientState.RUNNING and latest is not None and stream is latest:
            return False
        self._move(client, ClientState.SUSPECT, now=now)
        return True

    def lost(self, now: float, lost_after_s: float) -> list[ClientName]:
        """Return the clients that are lost since the last call: suspect for *lost_after_s* seconds or longer."""
        late = [part for part in self._suspects() if part.since + lost_after_s <= now]
        for part in late:
            reason = f"not connected for {lost_after_s:g} s"
            self._move(part.name, ClientState.LOST, now=now, reason=": ".join(filter(None, (reason, part.reason))))
        newly = [part.name for part in late]
        self._lost.update(newly)
        return newly

    def next_deadline(self, lost_after_s: float) -> float | None:
        """Return when the first suspect client will be lost; ``None`` when none is suspect."""
        return min((part.since + lost_after_s for part in self._suspects()), default=None)

    def failed(self, client: ClientName, reason: str, *, now: float) -> bool:
        """Note that *client* is out of the run for good, because of *reason*; return whether that is news."""
        if self.participant(client).state in ENDED:
            return False
        self._move(client, ClientState.FAILED, now=now, reason=reason)
        return True

    def process_ended(
        self, client: ClientName, *, attempt: int, status: int, now: float, last_line: str = "", cause: str = ""
    ) -> Restart | GiveUp | None:
        """Return what to do about *client*'s process, whose *attempt*-th start ended unasked with *status*.

        To start it again is noted as starting, to give it up as failed. ``None`` is news of an earlier start, or of a
        client that has ended its part: nothing is to be done. Of a later start than this run knows of, the client
        knows better: the server that started it was another.
        """
        part = self.participant(client)
        if part.state in ENDED or attempt < max(part.attempt, 1):
            return None
        self._participants[client] = part = replace(part, deaths=part.deaths + 1)
        verdict = after_death(
            client, attempt=part.deaths, tries=self.process_tries, status=status, last_line=last_line, cause=cause
        )
        if isinstance(verdict, GiveUp):
            self._move(client, ClientState.FAILED, now=now, attempt=attempt, reason=verdict.reason)
            return verdict
        self._move(client, ClientState.STARTING, now=now, attempt=attempt + 1, reason=verdict.reason)
        return Restart(attempt + 1, verdict.reason)

    def _move(
        self, client: ClientName, to: ClientState, *, now: float, attempt: int | None = None, reason: str = ""
    ) -> Participant:
        part = self._participants[client]
        if to not in LEGAL[part.state]:
            raise Conflict(f"client {client} of job {self.job_id}", state=part.state.value, wanted=to.value)
        attempt = part.attempt if attempt is None else attempt
        moved = replace(part, state=to, since=now, attempt=attempt, reason=reason)
        self._participants[client] = moved
        return moved

    def _suspects(self) -> list[Participant]:
        return [part for part in self._participants.values() if part.state is ClientState.SUSPECT]

    def _forget_tasks(self, *, but: frozenset[TaskKey] = frozenset()) -> tuple[TaskKey, ...]:
        over = tuple(key for key in self._tasks if key not in but)
        self._tasks = {key: task for key, task in self._tasks.items() if key in but}
        self._answers = {key: answer for key, answer in self._answers.items() if key in but}
        self._cancelled.clear()
        return over

    def _is_known(self, key: TaskKey) -> bool:
        return key in self._tasks or key in self._answers


def _shown(key: TaskKey) -> str:
    return f"task {key.name!r} of round {key.round}"
