"""Any history of a run: issued, answered, carried, cancelled, committed, taken up again, while its clients come and go.

The machine keeps its own, simpler book of what should be, and holds the run against it after every step: an answer
counts once, whoever sends it again and whenever; rounds follow one another; what is carried lives on, and nothing else
does; clients move as ``LEGAL`` says and no further once their part has ended.
"""

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hanse.coordination.runs import ENDED, LEGAL, Accepted, ClientState, Duplicate, Early, Run, Stale
from hanse.errors import Conflict, NotFound, Unauthorized
from hanse.ids import ClientName, JobId
from hanse.messages import ModelRef, TaskAssignment, TaskKey, TaskResult, UpdateRef

JOB = JobId("j1")
CLIENTS = tuple(ClientName(f"site-{number}") for number in (1, 2, 3))
LOST_AFTER_S = 15.0
TRIES = 3


class Runs(RuleBasedStateMachine):
    """The book: ``out`` are tasks that may be answered, ``answers`` those that count, in the order of acceptance."""

    def __init__(self) -> None:
        super().__init__()
        self.run = Run(JOB, CLIENTS, process_tries=TRIES)
        self.now = 0.0
        self.committed = -1
        self.out: dict[TaskKey, TaskAssignment] = {}
        self.answers: dict[TaskKey, TaskResult] = {}
        self.was_accepted: set[TaskKey] = set()
        self.states = dict.fromkeys(CLIENTS, ClientState.DEPLOYED)
        self.lost: set[ClientName] = set()
        self.examples = 0
        self.taken_up_in = -1

    @initialize()
    def commit_the_initial_model(self) -> None:
        self._commit(frozenset())

    # tasks, answers, rounds

    @rule(name=st.sampled_from(["train", "evaluate"]), client=st.sampled_from(CLIENTS), sequence=st.integers(0, 1))
    def issue(self, name: str, client: ClientName, sequence: int) -> None:
        key = TaskKey(self.committed + 1, name, sequence, client)
        task = TaskAssignment(key, ModelRef(), {"issue": self.examples})
        try:
            new = self.run.issue([task])
        except Conflict:
            assert self.run.has_ended
            return
        if new:
            assert new == (task,)
            assert key not in self.was_accepted, "what was answered is not asked again"
            self.out[key] = task
        assert key in self.out or key in self.answers, "whoever asks waits for an answer"

    @rule(round_number=st.integers(0, 6))
    def issue_for_another_round(self, round_number: int) -> None:
        if round_number == self.committed + 1:
            return
        try:
            self.run.issue([TaskAssignment(TaskKey(round_number, "train", 0, CLIENTS[0]), None)])
        except Conflict:
            return
        raise AssertionError("a task of another round was taken")

    def _answer(self, key: TaskKey) -> None:
        self.examples += 1
        result = TaskResult(key, UpdateRef(None, self.examples))
        expected = self.run.judge(result, sender=key.client)
        assert self.run.accept(result, sender=key.client) == expected
        match expected:
            case Accepted():
                assert key in self.out
                assert key not in self.was_accepted, "an answer counts once"
                del self.out[key]
                self.was_accepted.add(key)
                self.answers[key] = result
            case Duplicate():
                assert key in self.answers
            case Stale(reason=reason):
                assert reason
                assert key not in self.out or self.run.has_ended
                assert key not in self.answers or self.run.has_ended
            case Early():
                assert key.round == self.committed + 1 == self.taken_up_in
                assert not any(known.client == key.client for known in self.out), "it has another task"
                assert key not in self.answers

    @precondition(lambda self: self.out)
    @rule(data=st.data())
    def answer_a_task(self, data: st.DataObject) -> None:
        self._answer(data.draw(st.sampled_from(sorted(self.out, key=str))))

    @precondition(lambda self: self.was_accepted)
    @rule(data=st.data())
    def answer_again(self, data: st.DataObject) -> None:
        self._answer(data.draw(st.sampled_from(sorted(self.was_accepted, key=str))))

    @rule(
        round_number=st.integers(0, 6),
        name=st.sampled_from(["train", "evaluate"]),
        sequence=st.integers(0, 1),
        client=st.sampled_from(CLIENTS),
    )
    def answer_whatever(self, round_number: int, name: str, sequence: int, client: ClientName) -> None:
        self._answer(TaskKey(round_number, name, sequence, client))

    @precondition(lambda self: self.out)
    @rule(data=st.data())
    def answer_for_another(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.out, key=str)))
        other = next(client for client in CLIENTS if client != key.client)
        try:
            self.run.accept(TaskResult(key, UpdateRef(None, 1)), sender=other)
        except Unauthorized:
            return
        raise AssertionError("one client answered for another")

    @precondition(lambda self: self.out)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        keys = data.draw(st.sets(st.sampled_from(sorted({*self.out, *self.answers}, key=str)), min_size=1))
        cancelled = self.run.cancel(sorted(keys, key=str))
        assert set(cancelled) == keys & self.out.keys()
        for key in cancelled:
            del self.out[key]

    @precondition(lambda self: not self.run.has_ended)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        known = sorted({*self.out, *self.answers}, key=str)
        carried = data.draw(st.sets(st.sampled_from(known))) if known else set()
        self._commit(frozenset(carried))

    def _commit(self, carried: frozenset[TaskKey]) -> None:
        over = self.run.committed(self.committed + 1, carried=carried)
        assert set(over) == self.out.keys() - carried
        self.committed += 1
        self.out = {key: task for key, task in self.out.items() if key in carried}
        self.answers = {key: result for key, result in self.answers.items() if key in carried}

    @rule(round_number=st.integers(-1, 8))
    def commit_out_of_turn(self, round_number: int) -> None:
        if round_number in (self.committed, self.committed + 1):
            return
        try:
            self.run.committed(round_number)
        except Conflict:
            return
        raise AssertionError("a round was skipped, or committed once more")

    @precondition(lambda self: not self.run.has_ended)
    @rule()
    def carry_what_there_is_not(self) -> None:
        try:
            self.run.committed(self.committed + 1, carried=[TaskKey(99, "train", 0, CLIENTS[0])])
        except NotFound:
            return
        raise AssertionError("a task was carried that there is not")

    @precondition(lambda self: not self.run.has_ended)
    @rule()
    def take_up_again(self) -> None:
        """Rebuild the run from what a journal would hold, as another server does."""
        tasks = sorted(self.out.values(), key=lambda task: (task.key.round, str(task.key)))
        self.run = Run.resumed(
            JOB,
            CLIENTS,
            process_tries=TRIES,
            now=self.now,
            committed=self.committed,
            tasks=tasks,
            answers=tuple(self.answers.values()),
        )
        self.states = dict.fromkeys(CLIENTS, ClientState.SUSPECT)
        self.lost.clear()
        self.taken_up_in = self.committed + 1

    # clients

    @rule(client=st.sampled_from(CLIENTS))
    def start(self, client: ClientName) -> None:
        self.run.starting(client, now=self.now)

    @rule(client=st.sampled_from(CLIENTS))
    def start_in_vain(self, client: ClientName) -> None:
        before = self.run.participant(client)
        if self.run.starting(client, now=self.now) is None:
            return
        self.run.not_started(client, "no memory", now=self.now)
        after = self.run.participant(client)
        assert after.state is ClientState.SUSPECT
        assert after.since == (before.since if before.state is ClientState.SUSPECT else self.now)
        self.states[client] = ClientState.STARTING  # which it was in between

    @rule(client=st.sampled_from(CLIENTS), stream=st.sampled_from(["a", "b"]))
    def stream_up(self, client: ClientName, stream: str) -> None:
        if self.run.stream_up(client, now=self.now, stream=stream) is not None:
            self.lost.discard(client)

    @rule(client=st.sampled_from(CLIENTS), stream=st.sampled_from(["a", "b", None]))
    def stream_down(self, client: ClientName, stream: str | None) -> None:
        self.run.stream_down(client, now=self.now, stream=stream)

    @rule(seconds=st.sampled_from([1.0, LOST_AFTER_S]))
    def time_passes(self, seconds: float) -> None:
        due = self.run.next_deadline(LOST_AFTER_S)
        self.now += seconds
        lost = self.run.lost(self.now, LOST_AFTER_S)
        assert bool(lost) == (due is not None and due <= self.now)
        assert self.run.lost(self.now, LOST_AFTER_S) == []
        self.lost.update(lost)

    @rule(client=st.sampled_from(CLIENTS), attempt=st.integers(0, 4), status=st.sampled_from([0, 1, -9]))
    def process_ends(self, client: ClientName, attempt: int, status: int) -> None:
        before = self.run.participant(client)
        verdict = self.run.process_ended(client, attempt=attempt, status=status, now=self.now)
        if verdict is None:
            assert self.run.participant(client) == before
        assert self.run.participant(client).attempt >= before.attempt

    @rule(client=st.sampled_from(CLIENTS))
    def fail(self, client: ClientName) -> None:
        is_news = self.run.participant(client).state not in ENDED
        assert self.run.failed(client, "it broke", now=self.now) == is_news

    @rule()
    def end(self) -> None:
        if self.committed < 2:  # most histories should go on
            return
        assert set(self.run.end(now=self.now)) == self.out.keys()
        self.out.clear()
        self.answers.clear()
        self.lost.clear()

    # what holds after every step

    @invariant()
    def the_run_is_as_the_book_has_it(self) -> None:
        assert self.run.committed_round == self.committed
        assert self.run.answers == tuple(self.answers.values())
        assert {task.key: task for task in self.run.tasks} == self.out
        carried = {key for key in (*self.out, *self.answers) if key.round <= self.committed}
        assert set(self.run.carried) == carried
        assert self.run.unknown([*self.out, *self.answers]) == ()

    @invariant()
    def tasks_are_for_those_that_have_not_ended_their_part(self) -> None:
        for client in CLIENTS:
            keys = {task.key for task in self.run.tasks_for(client)}
            mine = {key for key in self.out if key.client == client}
            assert keys == (set() if self.run.participant(client).state in ENDED else mine)

    @invariant()
    def clients_move_as_the_table_says(self) -> None:
        for part in self.run.participants:
            before = self.states[part.name]
            assert part.state is before or part.state in LEGAL[before]
            self.states[part.name] = part.state
        failed = {client for client in CLIENTS if self.states[client] is ClientState.FAILED}
        assert set(self.run.lost_clients) == failed | self.lost
        assert set(self.run.live_clients) == {client for client in CLIENTS if self.states[client] not in ENDED}


TestRuns = Runs.TestCase
