"""What a job waits for, as a value: of the schedule, of deployment, and of a run in each of its situations."""

from dataclasses import replace

import pytest

from hanse.coordination.absence import Absence
from hanse.coordination.runs import Run
from hanse.coordination.schedule import Wait
from hanse.coordination.waiting import (
    GIVEN_UP,
    HINDERED,
    NOT_DEPLOYED,
    NOT_TOLD_YET,
    OVERDUE,
    Ask,
    Deployment,
    Phase,
    RunProcess,
    StoreTrouble,
    as_heard,
    asks_taken_up,
    asks_untold,
    views_of,
    waiting_of_running,
    waiting_of_schedule_held_up,
    waiting_of_scheduled,
    waiting_of_submitted,
    with_issue,
)
from hanse.ids import ClientName, Digest, JobId
from hanse.job import JobRecord, JobSpec, WorkflowSpec
from hanse.messages import (
    ClientView,
    IssueTasks,
    ModelRef,
    TaskAssignment,
    TaskKey,
    TaskResult,
    UpdateRef,
    Waiting,
)

ONE, TWO, THREE = (ClientName(f"site-{number}") for number in (1, 2, 3))
JOB = JobId("j1")
NOW, WALL = 100.0, 1_700_000_100.0
"""So monotonic second 40 is POSIX second 1,700,000,040."""
WORKING = RunProcess(Phase.WORKING, since=90.0, until=700.0)
THEN = "the round goes on with the answers that have come"


def posix(monotonic: float) -> float:
    return WALL - NOW + monotonic


def key(client: ClientName, name: str = "train", round_number: int = 1) -> TaskKey:
    return TaskKey(round_number, name, 0, client)


def run_in_round_1(*clients: ClientName) -> Run:
    run = Run(JOB, clients or (ONE, TWO, THREE), now=0.0)
    run.committed(0)
    return run


def issued(run: Run, *keys: TaskKey, at: float = 40.0, deadline_s: float = 300.0, then: str = THEN) -> tuple[Ask, ...]:
    run.issue([TaskAssignment(each, ModelRef()) for each in keys])
    return with_issue((), IssueTasks(keys, None, deadline_s, then), run=run, now=at)


def answer(run: Run, to: TaskKey) -> None:
    run.accept(TaskResult(to, UpdateRef(ModelRef(), 1)), sender=to.client)


def told(run: Run, *asks: Ask, process: RunProcess = WORKING, store: StoreTrouble | None = None) -> list[Waiting]:
    return list(waiting_of_running(run, asks=asks, process=process, store=store, now=NOW, wall=WALL))


def test_a_submitted_job_waits_for_what_the_schedule_says_and_is_given_up() -> None:
    spec = JobSpec("digits", WorkflowSpec("fedavg"), "job:app", "job:model")
    record = JobRecord(JOB, spec, "ada", 5.0, Digest(""), 0)

    assert waiting_of_submitted(record, Wait("1 of the 2 clients", 65.0)) == (
        Waiting("1 of the 2 clients", since=5.0, until=65.0, then=f"{GIVEN_UP} (no-clients)"),
    )


def test_a_submitted_job_names_those_that_are_absent_and_might_take_it() -> None:
    spec = JobSpec("digits", WorkflowSpec("fedavg"), "job:app", "job:model", min_clients=1, clients=(ONE, TWO))
    record = JobRecord(JOB, spec, "ada", 5.0, Digest(""), 0)
    old, expired = Absence("version-mismatch", "too old"), Absence("certificate-expired", "its certificate expired")
    absent = {THREE: old, TWO: old, ONE: expired}

    (waiting,) = waiting_of_submitted(record, Wait("1 of the 2 clients", 65.0), absent=absent)

    assert waiting.whom == (ClientView(ONE, "absent", "its certificate expired"), ClientView(TWO, "absent", "too old"))


def test_a_scheduled_job_waits_for_the_clients_that_have_not_taken_it() -> None:
    (waiting,) = waiting_of_scheduled(Deployment(frozenset({TWO, ONE}), since=5.0, until=125.0))

    assert [view.name for view in waiting.whom] == [ONE, TWO]
    assert {(view.state, view.since) for view in waiting.whom} == {("deploying", 5.0)}
    assert (waiting.since, waiting.until, waiting.then) == (5.0, 125.0, NOT_DEPLOYED)
    assert waiting_of_scheduled(Deployment(frozenset(), since=5.0, until=125.0)) == ()


def test_a_round_waits_for_those_that_have_not_answered_each_as_it_stands() -> None:
    run = run_in_round_1()
    run.starting(ONE, now=10.0)
    for client in (TWO, THREE):
        run.stream_up(client, now=20.0)
    asks = issued(run, key(ONE), key(TWO), key(THREE), deadline_s=300.0, then=THEN)
    answer(run, key(THREE))
    run.stream_down(TWO, now=95.0)

    assert told(run, *asks) == [
        Waiting(
            "answers to 'train' of round 1 from 2 of 3 clients",
            since=posix(40),
            until=posix(340),
            then=THEN,
            whom=(
                ClientView(ONE, "starting", since=posix(10), attempt=1),
                ClientView(TWO, "suspect", since=posix(95)),
            ),
        )
    ]


def test_a_lost_client_is_told_with_the_reason() -> None:
    run = run_in_round_1(ONE, TWO)
    for client in (ONE, TWO):
        run.stream_up(client, now=20.0)
    asks = issued(run, key(ONE), key(TWO))
    run.stream_down(TWO, now=50.0)
    run.lost(65.0, 15.0)

    (waiting,) = told(run, *asks)

    assert waiting.whom[1] == ClientView(TWO, "lost", "not connected for 15 s", posix(65))


def test_when_all_have_answered_the_runs_process_is_what_the_job_waits_for() -> None:
    run = run_in_round_1(ONE)
    asks = issued(run, key(ONE))
    answer(run, key(ONE))

    assert told(run, *asks, process=as_heard(WORKING, heard_at=98.0, now=100.0, silent_s=600.0)) == [
        Waiting(
            "the run's process at the server, which works on 1 answer of round 1",
            since=posix(90),
            until=posix(698),
            then="it is killed and started again, and goes on with round 1, unless it says before then that it lives",
        )
    ]


def test_before_anything_is_asked_the_runs_process_prepares() -> None:
    run = Run(JOB, [ONE])
    (initial,) = told(run)
    run.committed(0)
    (first,) = told(run)

    assert initial.what.endswith("which makes the initial model")
    assert first.what.endswith("which prepares round 1")


def test_a_cancelled_task_is_not_waited_for() -> None:
    run = run_in_round_1(ONE, TWO)
    asks = issued(run, key(ONE), key(TWO))
    run.cancel([key(TWO)])

    (waiting,) = told(run, *asks)

    assert [view.name for view in waiting.whom] == [ONE]


def test_a_process_that_cannot_go_on_is_told_with_the_reason_and_until_when_it_is_tried() -> None:
    run = run_in_round_1(ONE)
    process = RunProcess(Phase.HINDERED, 80.0, until=5000.0, reason="the disk is full")

    (hindered,) = told(run, process=process)

    assert hindered == Waiting(
        "the run's process at the server, which cannot go on (the disk is full)",
        since=posix(80),
        until=posix(5000),
        then="the job fails, unless that was mended; it is tried again every few seconds",
    )


def test_a_process_that_died_is_told_beside_the_clients_that_work_on() -> None:
    run = run_in_round_1(ONE)
    asks = issued(run, key(ONE))
    process = RunProcess(Phase.PAUSING, 80.0, 101.0, 2, "the job's process at server ended with status 1")

    paused, clients = told(run, *asks, process=process)

    assert paused == Waiting(
        "the run's process at the server, which died (the job's process at server ended with status 1)",
        since=posix(80),
        until=posix(101),
        then="it is started again, as start 2, and goes on with round 1",
    )
    assert [view.name for view in clients.whom] == [ONE]


def test_a_process_that_is_being_started_is_waited_for() -> None:
    starting = as_heard(RunProcess(Phase.STARTING, 80.0, 680.0, 3), heard_at=80.0, now=100.0, silent_s=600.0)

    (waiting,) = told(run_in_round_1(ONE), process=starting)

    assert waiting == Waiting(
        "the run's process at the server to begin (start 3)",
        since=posix(80),
        until=posix(680),
        then="it is killed and started again, and goes on with round 1, unless it says before then that it lives",
    )


def test_a_process_that_says_nothing_is_told_beside_the_clients_that_work_on_and_until_when() -> None:
    run = run_in_round_1(ONE)
    asks = issued(run, key(ONE))
    silent = as_heard(WORKING, heard_at=60.0, now=100.0, silent_s=600.0)

    process, clients = told(run, *asks, process=silent)

    assert process == Waiting(
        "the run's process at the server, which no longer says that it lives",
        since=posix(60),
        until=posix(660),
        then="it is killed and started again, and goes on with round 1",
    )
    assert [view.name for view in clients.whom] == [ONE]


def test_a_process_is_as_it_was_while_it_is_heard_of_or_is_not_there() -> None:
    paused = RunProcess(Phase.PAUSING, 80.0, 101.0, 2, "it died")

    assert as_heard(WORKING, heard_at=98.0, now=100.0, silent_s=600.0) == replace(WORKING, until=698.0)
    assert as_heard(paused, heard_at=0.0, now=100.0, silent_s=600.0) is paused


def test_a_store_that_fails_comes_first() -> None:
    run = run_in_round_1(ONE)
    asks = issued(run, key(ONE))

    store, clients = told(run, *asks, store=StoreTrouble("the store failed while using x: no route", 30.0, 5000.0))

    assert store.what == "the server's store, which fails (the store failed while using x: no route)"
    assert (store.since, store.until, store.then) == (posix(30), posix(5000), HINDERED)
    assert clients.what.startswith("answers to 'train'")


def test_tasks_asked_one_by_one_are_told_together_and_different_ones_apart() -> None:
    run = run_in_round_1()
    asks: tuple[Ask, ...] = ()
    for at, each in ((40.0, key(ONE)), (50.0, key(TWO)), (60.0, key(THREE, "evaluate"))):
        run.issue([TaskAssignment(each, ModelRef())])
        asks = with_issue(asks, IssueTasks((each,), None, 100.0, THEN), run=run, now=at)

    evaluating, training = told(run, *asks)

    assert evaluating.what == "answers to 'evaluate' of round 1 from 1 of 1 client"
    assert training.what == "answers to 'train' of round 1 from 2 of 2 clients"
    assert (training.since, training.until) == (posix(40), posix(140))


def test_what_is_issued_again_is_waited_for_since_it_was_issued_first() -> None:
    run = run_in_round_1(ONE, TWO)
    (first,) = issued(run, key(ONE), key(TWO), deadline_s=10.0)
    answer(run, key(TWO))

    (again,) = with_issue((first,), IssueTasks((key(ONE),), None, 10.0, THEN), run=run, now=70.0)

    assert (again.keys, again.since, again.until) == (first.keys, first.since, 80.0)
    assert with_issue((again,), IssueTasks((), None, 10.0, THEN), run=run, now=75.0) == (again,)


def test_what_a_round_asks_of_a_substitute_is_waited_for_together_with_the_rest_of_it() -> None:
    run = run_in_round_1()
    asks = issued(run, key(ONE), key(TWO))
    run.issue([TaskAssignment(key(THREE), ModelRef())])
    later = "the round goes on with three"

    together = with_issue(asks, IssueTasks((key(THREE),), None, 250.0, later, keeps=True), run=run, now=80.0)
    apart = with_issue(asks, IssueTasks((key(THREE),), None, 250.0, later), run=run, now=80.0)

    (waiting,) = told(run, *together)
    assert waiting.what == "answers to 'train' of round 1 from 3 of 3 clients"
    assert (waiting.since, waiting.until, waiting.then) == (posix(40), posix(330), later)
    assert [each.then for each in told(run, *apart)] == [THEN, later]


@pytest.mark.parametrize("how", ["answered", "committed"])
def test_what_nobody_waits_for_any_more_is_forgotten_with_the_next_issue(how: str) -> None:
    run = run_in_round_1(ONE)
    asks = issued(run, key(ONE))
    answer(run, key(ONE))
    following = key(ONE, round_number=2 if how == "committed" else 1, name="evaluate")
    if how == "committed":
        run.committed(1)
    run.issue([TaskAssignment(following, ModelRef())])

    asks = with_issue(asks, IssueTasks((following,), None, 10.0, THEN), run=run, now=70.0)

    assert [ask.keys for ask in asks] == [(following,)]


@pytest.mark.parametrize("new", [(), (key(TWO, round_number=2),)])
def test_what_an_earlier_round_left_is_waited_for_as_long_as_the_present_one(new: tuple[TaskKey, ...]) -> None:
    run = run_in_round_1(ONE, TWO)
    asks = issued(run, key(ONE), deadline_s=10.0, then="the first round ends")
    run.committed(1, carried=[key(ONE)])
    run.issue([TaskAssignment(each, ModelRef()) for each in new])

    asks = with_issue(asks, IssueTasks(new, None, 50.0, THEN), run=run, now=70.0)

    left, *fresh = told(run, *asks)
    assert left.what == "answers to 'train' of round 1 from 1 of 1 client"
    assert (left.since, left.until, left.then) == (posix(40), posix(120), THEN)
    assert [waiting.until for waiting in fresh] == [posix(120)] * len(new)


def test_a_run_that_was_taken_up_waits_for_what_the_journal_has_out() -> None:
    tasks = [TaskAssignment(each, ModelRef()) for each in (key(ONE), key(TWO), key(ONE, "evaluate"))]
    run = Run.resumed(JOB, [ONE, TWO], now=90.0, committed=0, tasks=tasks, answers=[])

    asks = asks_taken_up(run, now=90.0)
    evaluating, training = told(run, *asks)

    assert evaluating.what == "answers to 'evaluate' of round 1 from 1 of 1 client"
    assert [(view.name, view.state) for view in training.whom] == [(ONE, "suspect"), (TWO, "suspect")]
    assert (training.since, training.until) == (posix(90), posix(WORKING.until))
    assert training.then.startswith(f"{NOT_TOLD_YET}; otherwise it is killed and started again")


def test_a_run_that_has_ended_waits_for_nothing() -> None:
    run = run_in_round_1(ONE)
    asks = issued(run, key(ONE))
    run.end(now=50.0)

    assert told(run, *asks, store=StoreTrouble("away", 1.0, 2.0)) == []


def test_clients_are_shown_as_they_stand_since_when() -> None:
    run = run_in_round_1(ONE, TWO)
    run.stream_up(ONE, now=20.0)
    run.failed(TWO, "it refused", now=30.0)

    assert views_of(run, now=NOW, wall=WALL) == (
        ClientView(ONE, "running", since=posix(20)),
        ClientView(TWO, "failed", "it refused", posix(30)),
    )


def test_of_a_client_that_is_away_it_is_said_why_where_that_is_known() -> None:
    run = run_in_round_1()
    asks = issued(run, key(ONE), key(TWO), key(THREE))
    run.stream_up(THREE, now=50.0)
    for client in (ONE, TWO):
        run.stream_up(client, now=50.0)
        run.stream_down(client, now=60.0)
    assert run.lost(75.0, 15.0) == [ONE, TWO]
    run.stream_up(TWO, now=80.0)
    run.stream_down(TWO, now=90.0)
    because = "its certificate expired"
    absent = dict.fromkeys((ONE, TWO, THREE), Absence("certificate-expired", because))

    (waiting,) = waiting_of_running(run, asks=asks, process=WORKING, absent=absent, now=NOW, wall=WALL)

    shown = [(view.name, view.state, view.reason) for view in waiting.whom]
    assert shown == [
        (ONE, "lost", f"not connected for 15 s: {because}"),
        (TWO, "suspect", because),
        (THREE, "running", ""),  # its process goes on, with a certificate of its own
    ]
    assert [view.reason for view in views_of(run, absent=absent, now=NOW, wall=WALL)] == [each[2] for each in shown]


@pytest.mark.parametrize(
    ("process", "then"),
    [
        (RunProcess(Phase.PAUSING, 90.0, 110.0, 2, "killed"), "it is started again, as start 2"),
        (RunProcess(Phase.HINDERED, 90.0, 604_890.0, 2, "a full disk"), HINDERED),
        (RunProcess(Phase.STARTING, 90.0, 690.0, 2), "it is killed and started again"),
    ],
)
def test_what_a_process_has_asked_that_is_dead_waits_for_what_the_next_one_says(process: RunProcess, then: str) -> None:
    run = run_in_round_1(ONE)

    *_, waiting = told(run, *asks_untold(issued(run, key(ONE))), process=process)

    assert (waiting.since, waiting.until) == (posix(40), posix(process.until))
    assert waiting.then.startswith(f"{NOT_TOLD_YET}; otherwise {then}")


def test_what_a_process_has_not_done_in_time_is_due_when_it_goes_on_or_is_killed() -> None:
    run = run_in_round_1(ONE)
    silent = RunProcess(Phase.SILENT, since=50.0, until=650.0)

    *_, waiting = told(run, *issued(run, key(ONE), deadline_s=30.0), process=silent)

    assert (waiting.since, waiting.until) == (posix(40), posix(650))
    assert waiting.then.startswith(f"{OVERDUE}; otherwise it is killed and started again")


def test_a_job_whose_time_is_over_while_the_schedule_is_held_up_is_given_up_when_that_is_tried_again() -> None:
    spec = JobSpec("digits", WorkflowSpec("fedavg"), "job:app", "job:model", start_within_s=60.0)
    record = JobRecord(JOB, spec, "ada", 5.0, Digest(""), 0)

    assert waiting_of_schedule_held_up(record, "a full disk", since=30.0, again_at=35.0).until == 65.0
    assert waiting_of_schedule_held_up(record, "a full disk", since=30.0, again_at=105.0).until == 105.0
