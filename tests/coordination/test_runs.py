"""A run as a value: tasks and answers, rounds, clients and their processes, heartbeats."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hanse.coordination.runs import (
    ENDED,
    LEGAL,
    NOTHING_COMMITTED,
    Accepted,
    ClientState,
    Duplicate,
    Early,
    GiveUp,
    Participant,
    Restart,
    Run,
    Stale,
    Sync,
    after_death,
    heartbeat_sync,
)
from hanse.errors import Conflict, NotFound, ProcessHung, Unauthorized, UpdateRejected
from hanse.ids import ClientName, JobId
from hanse.messages import ModelRef, TaskAssignment, TaskFault, TaskKey, TaskResult, UpdateRef

ONE, TWO = ClientName("site-1"), ClientName("site-2")
JOB = JobId("j1")
DEPLOYED, STARTING, RUNNING, SUSPECT, LOST, FAILED, DONE = ClientState


def key(client: ClientName = ONE, *, round_number: int = 1, name: str = "train", sequence: int = 0) -> TaskKey:
    return TaskKey(round_number, name, sequence, client)


def task(client: ClientName = ONE, *, round_number: int = 1, name: str = "train", sequence: int = 0) -> TaskAssignment:
    return TaskAssignment(key(client, round_number=round_number, name=name, sequence=sequence), ModelRef())


def answer(to: TaskKey, examples: int = 1) -> TaskResult:
    return TaskResult(to, UpdateRef(ModelRef(), examples))


def run_in_round_1(**options: int) -> Run:
    run = Run(JOB, [TWO, ONE], **options)
    run.committed(0)
    return run


def restarted(verdict: Restart | GiveUp | None) -> int:
    """Return which start of the process *verdict* says comes next."""
    assert isinstance(verdict, Restart)
    assert verdict.reason.startswith("the job's process at site-")
    return verdict.attempt


def run_with(state: ClientState, client: ClientName = ONE) -> Run:
    """Return a run whose *client* has come to *state* by events, its process's stream being ``job``."""
    run = run_in_round_1()
    if state is DEPLOYED:
        return run
    run.starting(client, now=1)
    if state is STARTING:
        return run
    run.stream_up(client, now=2, stream="job")
    match state:
        case ClientState.SUSPECT | ClientState.LOST:
            run.stream_down(client, now=3, stream="job")
            run.lost(100 if state is LOST else 3, 15)
        case ClientState.FAILED:
            run.failed(client, "it broke", now=3)
        case ClientState.DONE:
            run.end(now=3)
        case _:
            pass
    assert run.participant(client).state is state
    return run


# rounds


def test_a_run_begins_before_its_first_round() -> None:
    run = Run(JOB, [TWO, ONE], now=5)

    assert (run.committed_round, run.round) == (NOTHING_COMMITTED, 0)
    assert run.clients == (ONE, TWO)
    assert run.participants == (Participant(ONE, since=5), Participant(TWO, since=5))
    assert not run.has_ended


def test_rounds_are_committed_one_after_the_other() -> None:
    run = run_in_round_1()

    for wrong in (-1, 2, 7):
        with pytest.raises(Conflict, match=f"run j1 is in round 1, so it cannot be at round {wrong}"):
            run.committed(wrong)
    run.committed(1)
    assert (run.committed_round, run.round) == (1, 2)


def test_committing_the_last_round_again_changes_nothing() -> None:
    run = run_in_round_1()
    run.issue([task()])

    assert run.committed(0) == ()
    assert run.task_for(ONE) == task()


def test_committing_a_round_ends_its_tasks_and_forgets_its_answers() -> None:
    run = run_in_round_1()
    run.issue([task(ONE), task(TWO)])
    run.accept(answer(key(ONE)), sender=ONE)

    assert run.committed(1) == (key(TWO),)
    assert run.answers == ()
    assert run.task_for(TWO) is None


def test_a_commit_carries_tasks_and_answers_on_and_ends_the_others() -> None:
    run = run_in_round_1()
    run.issue([task(ONE), task(TWO), task(ONE, sequence=1), task(TWO, sequence=1)])
    run.accept(answer(key(ONE)), sender=ONE)
    run.accept(answer(key(TWO)), sender=TWO)

    assert run.committed(1, carried=[key(ONE, sequence=1), key(TWO)]) == (key(TWO, sequence=1),)

    assert run.carried == (key(ONE, sequence=1), key(TWO))
    assert run.answers == (answer(key(TWO)),)
    assert run.tasks == run.tasks_for(ONE) == (task(ONE, sequence=1),)
    run.issue([task(ONE, round_number=2)])
    assert run.carried == (key(ONE, sequence=1), key(TWO)), "a task of this round is not carried yet"


def test_a_carried_task_is_answered_in_a_later_round_and_once() -> None:
    run = run_in_round_1()
    run.issue([task(ONE), task(TWO)])
    run.committed(1, carried=[key(ONE)])

    assert run.accept(answer(key(ONE)), sender=ONE) == Accepted()
    assert run.accept(answer(key(ONE)), sender=ONE) == Duplicate()
    stale = run.accept(answer(key(TWO)), sender=TWO)
    assert stale == Stale("task 'train' of round 1 is over: round 1 is committed")
    run.committed(2, carried=[key(ONE)])
    assert run.answers == (answer(key(ONE)),)
    assert run.accept(answer(key(ONE)), sender=ONE) == Duplicate()
    run.committed(3)
    assert run.answers == ()
    stale = run.accept(answer(key(ONE)), sender=ONE)
    assert stale == Stale("task 'train' of round 1 is over: round 3 is committed")


def test_a_carried_task_can_be_cancelled() -> None:
    run = run_in_round_1()
    run.issue([task(ONE)])
    run.committed(1, carried=[key(ONE)])

    assert run.cancel([key(ONE)]) == (key(ONE),)
    assert run.carried == ()
    assert run.accept(answer(key(ONE)), sender=ONE) == Stale("task 'train' of round 1 is no longer wanted")
    assert run.unknown([key(ONE), key(TWO)]) == (key(ONE), key(TWO))


def test_nothing_is_carried_that_there_is_not_and_the_round_is_not_committed_then() -> None:
    run = run_in_round_1()
    run.issue([task(ONE)])

    with pytest.raises(NotFound, match="no task of job j1 \"task 'train' of round 1\""):
        run.committed(1, carried=[key(ONE), key(TWO)])
    assert (run.committed_round, run.tasks) == (0, (task(ONE),))


def test_committing_a_round_again_carries_what_it_carried() -> None:
    run = run_in_round_1()
    run.issue([task(ONE), task(TWO)])
    run.committed(1, carried=[key(ONE)])

    assert run.committed(1, carried=[key(TWO)]) == ()
    assert run.carried == (key(ONE),)


def test_a_run_is_rebuilt_with_what_it_carries() -> None:
    run = Run.resumed(
        JOB,
        [TWO, ONE],
        now=100,
        committed=4,
        tasks=[task(ONE, round_number=3), task(TWO, round_number=5)],
        answers=[answer(key(TWO, round_number=4)), answer(key(ONE, round_number=5))],
    )

    assert run.carried == (key(ONE, round_number=3), key(TWO, round_number=4))
    assert run.accept(answer(key(ONE, round_number=3)), sender=ONE) == Accepted()


def resumed_run() -> Run:
    return Run.resumed(
        JOB,
        [TWO, ONE],
        process_tries=2,
        now=100,
        committed=4,
        tasks=[task(ONE, round_number=5), task(TWO, round_number=5)],
        answers=[answer(key(ONE, round_number=5))],
    )


def test_a_run_is_rebuilt_from_its_journal() -> None:
    run = resumed_run()

    assert run.round == 5
    assert run.answers == (answer(key(ONE, round_number=5)),)
    assert run.task_for(ONE) is None
    assert run.task_for(TWO) == task(TWO, round_number=5)
    assert run.judge(answer(key(ONE, round_number=5)), sender=ONE) == Duplicate()


def test_an_answer_to_a_task_that_the_journal_missed_counts_once_the_task_is_issued_again() -> None:
    run = resumed_run()
    ahead = answer(key(ONE, name="evaluate", round_number=5))
    assert run.may_be_ahead(ONE)
    assert run.accept(ahead, sender=ONE) == Early()
    assert run.answers == (answer(key(ONE, round_number=5)),)

    run.issue([task(ONE, name="evaluate", round_number=5)])

    assert not run.may_be_ahead(ONE)
    assert run.accept(ahead, sender=ONE) == Accepted()


def test_no_answer_is_early_from_a_client_that_has_another_task_or_none_any_more() -> None:
    run = resumed_run()
    assert run.judge(answer(key(TWO, name="evaluate", round_number=5)), sender=TWO) == Stale(
        "task 'evaluate' of round 5 was not issued to site-2"
    )
    run.failed(ONE, "it broke", now=101)
    assert not run.may_be_ahead(ONE)


def test_no_answer_is_early_once_the_round_is_committed_or_where_the_run_has_begun() -> None:
    taken_up, begun = resumed_run(), run_in_round_1()
    taken_up.committed(5)

    assert not taken_up.may_be_ahead(ONE)
    assert isinstance(taken_up.judge(answer(key(ONE, round_number=6)), sender=ONE), Stale)
    assert not begun.may_be_ahead(ONE)
    assert isinstance(begun.judge(answer(key(ONE)), sender=ONE), Stale)


def test_a_client_that_failed_is_out_of_the_run_that_is_rebuilt() -> None:
    run = Run.resumed(JOB, [TWO, ONE], now=100, committed=4, tasks=[], answers=[], failed={TWO: "its process died"})

    assert run.failed_clients == run.lost_clients == (TWO,)
    assert run.participant(TWO).reason == "its process died"
    assert (run.starting(TWO, now=101), run.stream_up(TWO, now=101)) == (None, None)
    assert run.participant(ONE) == Participant(ONE, SUSPECT, since=100)


def test_a_resumed_runs_clients_come_back_by_themselves_or_are_lost() -> None:
    run = resumed_run()
    assert run.participants == (Participant(ONE, SUSPECT, since=100), Participant(TWO, SUSPECT, since=100))
    assert run.next_deadline(15) == 115

    assert run.stream_up(ONE, now=110) is SUSPECT
    assert run.lost(115, 15) == [TWO]
    assert [part.state for part in run.participants] == [RUNNING, LOST]


def test_a_process_that_an_earlier_server_started_dies_as_any_other() -> None:
    run = resumed_run()
    run.stream_up(ONE, now=101)

    assert restarted(run.process_ended(ONE, attempt=1, status=1, now=102)) == 2
    assert restarted(run.process_ended(TWO, attempt=2, status=1, now=103)) == 3

    def died(where: ClientName) -> str:
        return f"the job's process at {where} ended with status 1"

    assert run.participant(ONE) == Participant(ONE, STARTING, since=102, attempt=2, reason=died(ONE), deaths=1)
    assert run.participant(TWO) == Participant(TWO, STARTING, since=103, attempt=3, reason=died(TWO), deaths=1)


def test_a_run_that_may_not_start_a_process_is_refused() -> None:
    with pytest.raises(ValueError, match="process_tries is 0"):
        Run(JOB, [ONE], process_tries=0)


# tasks


def test_new_tasks_are_returned_for_sending_and_kept_for_their_clients() -> None:
    run = run_in_round_1()
    tasks = (task(ONE), task(TWO), task(ONE, name="evaluate"))

    assert run.issue(tasks) == tasks
    assert run.task_for(ONE) == tasks[0]
    assert run.tasks_for(ONE) == (tasks[0], tasks[2])
    assert run.tasks_for(TWO) == (tasks[1],)
    assert run.task(key(TWO)) == tasks[1]
    assert run.task(key(TWO, sequence=1)) is None


def test_a_task_that_is_known_stays_as_it_was() -> None:
    run = run_in_round_1()
    run.issue([task(ONE), task(TWO)])
    run.accept(answer(key(TWO)), sender=TWO)
    changed = TaskAssignment(key(ONE), None, {"lr": 0.5})

    again = run.issue([changed, task(TWO), task(ONE, sequence=2), task(ONE, sequence=2)])
    assert again == (task(ONE, sequence=2),)
    assert run.tasks_for(ONE) == (task(ONE), task(ONE, sequence=2))
    assert run.tasks_for(TWO) == ()


def test_tasks_for_a_wrong_round_or_client_are_refused_and_none_is_taken() -> None:
    run = run_in_round_1()

    with pytest.raises(NotFound, match="no client of job j1 'site-9'"):
        run.issue([task(ONE), task(ClientName("site-9"))])
    for wrong in (0, 2):
        with pytest.raises(Conflict, match=f"run j1 is in round 1, so it cannot be at task 'train' of round {wrong}"):
            run.issue([task(ONE), task(ONE, round_number=wrong)])
    assert run.tasks_for(ONE) == ()


def test_a_run_that_is_over_takes_no_tasks() -> None:
    run = run_in_round_1()
    run.end(now=1)

    with pytest.raises(Conflict, match="run j1 is over, so it cannot be given tasks"):
        run.issue([task()])


def test_a_failed_client_has_no_task_to_work_on() -> None:
    run = run_in_round_1()
    run.issue([task(ONE)])
    run.failed(ONE, "refused", now=1)

    assert run.task_for(ONE) is None


def test_a_stranger_has_no_part_in_the_run() -> None:
    run = run_in_round_1()

    with pytest.raises(NotFound, match="site-9"):
        run.task_for(ClientName("site-9"))
    with pytest.raises(NotFound, match="site-9"):
        run.accept(answer(key(ClientName("site-9"))), sender=ClientName("site-9"))


# answers


def test_an_answer_is_accepted_once() -> None:
    run = run_in_round_1()
    run.issue([task(ONE), task(TWO)])

    assert run.accept(answer(key(ONE), examples=1), sender=ONE) == Accepted()
    assert run.accept(answer(key(ONE), examples=2), sender=ONE) == Duplicate()
    assert run.answers == (answer(key(ONE), examples=1),)
    assert run.task_for(ONE) is None
    assert run.task_for(TWO) == task(TWO)


def test_an_answer_that_is_taken_back_is_waited_for_again() -> None:
    run = run_in_round_1()
    run.issue([task(ONE), task(TWO)])
    run.accept(answer(key(ONE), examples=1), sender=ONE)

    assert run.retract([task(ONE), task(TWO)]) == (task(ONE),)
    assert run.answers == ()
    assert run.tasks_for(ONE) == (task(ONE),)
    assert run.accept(answer(key(ONE), examples=2), sender=ONE) == Accepted()


def test_a_fault_is_an_answer_too() -> None:
    run = run_in_round_1()
    run.issue([task()])
    fault = TaskResult(key(), fault=TaskFault("training-failed", "ValueError: no"))

    assert run.accept(fault, sender=ONE) == Accepted()
    assert run.answers == (fault,)


def test_judging_changes_nothing() -> None:
    run = run_in_round_1()
    run.issue([task()])

    assert run.judge(answer(key()), sender=ONE) == run.judge(answer(key()), sender=ONE) == Accepted()
    assert run.answers == ()
    assert run.task_for(ONE) == task()


def test_answers_come_out_in_the_order_in_which_they_came() -> None:
    run = run_in_round_1()
    run.issue([task(ONE), task(TWO)])
    run.accept(answer(key(TWO)), sender=TWO)
    run.accept(answer(key(ONE)), sender=ONE)

    assert [each.key.client for each in run.answers] == [TWO, ONE]


def test_nobody_answers_for_another() -> None:
    run = run_in_round_1()
    run.issue([task(ONE)])

    with pytest.raises(Unauthorized, match="site-2 may not answer for site-1"):
        run.accept(answer(key(ONE)), sender=TWO)
    assert run.answers == ()


@pytest.mark.parametrize(
    ("result", "what"),
    [
        (TaskResult(key()), "neither an update nor a fault"),
        (TaskResult(key(), UpdateRef(None, 1), TaskFault("c", "r")), "both an update and a fault"),
    ],
)
def test_an_answer_is_an_update_or_a_fault(result: TaskResult, what: str) -> None:
    run = run_in_round_1()
    run.issue([task()])

    with pytest.raises(UpdateRejected, match=f"site-1 sent {what}"):
        run.accept(result, sender=ONE)
    assert run.task_for(ONE) == task()


def test_answers_that_nobody_waits_for_are_stale_and_say_why() -> None:
    run = run_in_round_1()
    run.issue([task(ONE, sequence=1)])
    run.cancel([key(ONE, sequence=1)])

    def stale(to: TaskKey) -> str:
        reception = run.accept(answer(to), sender=ONE)
        assert isinstance(reception, Stale)
        return reception.reason

    assert stale(key(sequence=1)) == "task 'train' of round 1 is no longer wanted"
    assert stale(key()) == "task 'train' of round 1 was not issued to site-1"
    assert stale(key(round_number=2)) == "task 'train' of round 2 was not issued to site-1"
    assert stale(key(round_number=0)) == "task 'train' of round 0 is over: round 0 is committed"
    run.committed(1)
    assert stale(key(sequence=1)) == "task 'train' of round 1 is over: round 1 is committed"
    run.end(now=1)
    assert stale(key(round_number=2)) == "the run has ended"
    assert run.answers == ()


def test_cancelling_returns_the_tasks_that_were_out() -> None:
    run = run_in_round_1()
    run.issue([task(ONE), task(TWO)])
    run.accept(answer(key(ONE)), sender=ONE)

    assert run.cancel([key(TWO), key(ONE), key(TWO), key(TWO, sequence=9)]) == (key(TWO),)
    assert run.task_for(TWO) is None
    assert run.answers == (answer(key(ONE)),)


def test_a_cancelled_task_that_is_issued_again_is_out_again() -> None:
    # Its run's process was killed after it had cancelled the task, and before it committed: the next one waits for it.
    run = run_in_round_1()
    run.issue([task(ONE)])
    run.cancel([key(ONE)])

    assert run.issue([task(ONE)]) == (task(ONE),)
    assert run.task_for(ONE) == task(ONE)
    assert run.accept(answer(key(ONE)), sender=ONE) == Accepted()


def test_the_end_ends_everybodys_part_and_returns_the_tasks_still_out() -> None:
    run = run_in_round_1()
    run.issue([task(ONE), task(TWO)])
    run.failed(TWO, "broken", now=1)

    assert run.end(now=2) == (key(ONE), key(TWO))
    assert run.has_ended
    assert [part.state for part in run.participants] == [DONE, FAILED]
    assert run.participant(TWO).reason == "broken"
    assert run.end(now=3) == ()


# clients


@pytest.mark.parametrize(("state", "to"), list(product(ClientState, ClientState)))
def test_a_clients_state_moves_only_as_the_table_says(state: ClientState, to: ClientState) -> None:
    run = run_with(state)
    before = run.participant(ONE)
    if to in LEGAL[state]:
        assert run._move(ONE, to, now=9).state is run.participant(ONE).state is to
    else:
        with pytest.raises(Conflict, match=f"client site-1 of job j1 is {state}, so it cannot be {to}"):
            run._move(ONE, to, now=9)
        assert run.participant(ONE) == before


EVENTS = {
    "starting": lambda run: run.starting(ONE, now=50),
    "stream up": lambda run: run.stream_up(ONE, now=50, stream="job"),
    "job's stream down": lambda run: run.stream_down(ONE, now=50, stream="job"),
    "agent's stream down": lambda run: run.stream_down(ONE, now=50, stream="agent"),
    "time": lambda run: run.lost(150, 15),
    "failed": lambda run: run.failed(ONE, "because", now=50),
    "died": lambda run: run.process_ended(ONE, attempt=1, status=1, now=50),
    "gave up": lambda run: run.process_ended(ONE, attempt=1, status=0, now=50),
    "end": lambda run: run.end(now=50),
}
AFTER = {
    DEPLOYED: {
        "starting": STARTING, "stream up": RUNNING, "job's stream down": SUSPECT, "agent's stream down": SUSPECT,
        "failed": FAILED, "died": STARTING, "gave up": FAILED, "end": DONE,
    },
    STARTING: {
        "stream up": RUNNING, "job's stream down": SUSPECT, "agent's stream down": SUSPECT, "failed": FAILED,
        "gave up": FAILED, "end": DONE,
    },
    RUNNING: {
        "starting": STARTING, "job's stream down": SUSPECT, "failed": FAILED, "died": STARTING, "gave up": FAILED,
        "end": DONE,
    },
    SUSPECT: {
        "starting": STARTING, "stream up": RUNNING, "time": LOST, "failed": FAILED, "died": STARTING,
        "gave up": FAILED, "end": DONE,
    },
    LOST: {
        "starting": STARTING, "stream up": RUNNING, "failed": FAILED, "died": STARTING, "gave up": FAILED,
        "end": DONE,
    },
    FAILED: {},
    DONE: {},
}  # fmt: skip


@pytest.mark.parametrize(("state", "event"), list(product(ClientState, EVENTS)))
def test_each_event_takes_each_state_where_it_should_and_nowhere_else(state: ClientState, event: str) -> None:
    run = run_with(state)
    other = run.participant(TWO)
    EVENTS[event](run)

    assert run.participant(ONE).state is AFTER[state].get(event, state)
    if event != "end":
        assert run.participant(TWO) == other


def test_starts_are_counted() -> None:
    run = run_in_round_1()

    assert run.starting(ONE, now=1) == 1
    assert run.starting(ONE, now=2) == 2
    assert run.participant(ONE) == Participant(ONE, STARTING, since=2, attempt=2)
    run.failed(ONE, "x", now=3)
    assert run.starting(ONE, now=4) is None


def test_a_stream_tells_what_the_client_was_before() -> None:
    assert run_with(STARTING).stream_up(ONE, now=9) is STARTING
    assert run_with(LOST).stream_up(ONE, now=9) is LOST
    assert run_with(RUNNING).stream_up(ONE, now=9) is RUNNING
    assert run_with(DEPLOYED).stream_up(ONE, now=9) is DEPLOYED
    assert run_with(FAILED).stream_up(ONE, now=9) is None


def test_a_replaced_streams_end_hurts_nobody() -> None:
    run = run_with(RUNNING)
    run.stream_up(ONE, now=5, stream="newer")

    assert not run.stream_down(ONE, now=6, stream="job")
    assert run.participant(ONE) == Participant(ONE, RUNNING, since=2, attempt=1)
    assert run.stream_down(ONE, now=7, stream="newer")


def test_a_dead_processs_stream_does_not_make_its_successor_suspect() -> None:
    run = run_with(RUNNING)
    assert restarted(run.process_ended(ONE, attempt=1, status=-9, now=3)) == 2

    assert not run.stream_down(ONE, now=4, stream="job")
    assert run.participant(ONE).state is STARTING


def test_a_suspect_client_is_lost_at_its_time_and_said_so_once() -> None:
    run = run_with(SUSPECT)

    assert run.next_deadline(15) == 18
    assert run.lost(17.9, 15) == []
    assert run.lost(18, 15) == [ONE]
    assert run.lost(19, 15) == []
    assert run.next_deadline(15) is None
    assert run.participant(ONE) == Participant(ONE, LOST, since=18, attempt=1, reason="not connected for 15 s")
    assert run.lost_clients == (ONE,)
    assert run.live_clients == (ONE, TWO)


def test_a_client_that_comes_back_is_no_longer_lost() -> None:
    run = run_with(LOST)
    run.stream_up(ONE, now=200)

    assert run.lost_clients == ()
    assert run.participant(ONE).reason == ""


def test_a_lost_client_that_is_started_again_is_lost_until_it_connects() -> None:
    run = run_with(LOST)

    run.starting(ONE, now=200)
    assert run.lost_clients == (ONE,)
    run.stream_up(ONE, now=201)
    assert run.lost_clients == ()


def test_a_client_whose_process_cannot_be_started_is_lost_no_later_for_being_tried_again() -> None:
    run = run_with(SUSPECT)

    for now in (8, 13, 17):
        run.starting(ONE, now=now)
        run.not_started(ONE, "no memory", now=now + 0.5)
        assert run.participant(ONE).since == 3
        assert run.participant(ONE).reason == "no memory"

    assert run.lost(18, 15) == [ONE]
    assert run.participant(ONE).reason == "not connected for 15 s: no memory"


def test_a_start_that_failed_says_nothing_of_a_process_that_is_connected() -> None:
    run = run_with(RUNNING)

    run.not_started(ONE, "no memory", now=5)

    assert run.participant(ONE).state is RUNNING


def test_a_failure_is_news_once_and_keeps_its_first_reason() -> None:
    run = run_with(RUNNING)

    assert run.failed(ONE, "first", now=5)
    assert not run.failed(ONE, "second", now=6)
    assert run.participant(ONE) == Participant(ONE, FAILED, since=5, attempt=1, reason="first")
    assert run.lost_clients == (ONE,)
    assert run.live_clients == (TWO,)


# processes


def test_a_process_that_dies_is_started_again_a_bounded_number_of_times() -> None:
    run = run_in_round_1(process_tries=3)
    run.starting(ONE, now=1)

    assert restarted(run.process_ended(ONE, attempt=1, status=-9, now=2)) == 2
    assert restarted(run.process_ended(ONE, attempt=2, status=1, now=3)) == 3
    verdict = run.process_ended(ONE, attempt=3, status=-11, now=4, last_line="Segmentation fault")
    assert verdict == GiveUp(
        "the job's process at site-1 was killed by signal 11; its log ends with: Segmentation fault; "
        "that was start 3 of 3"
    )
    assert run.participant(ONE) == Participant(ONE, FAILED, since=4, attempt=3, reason=verdict.reason, deaths=3)


def test_a_process_that_has_got_on_in_between_may_die_again() -> None:
    run = run_in_round_1(process_tries=2)
    run.starting(ONE, now=1)
    run.issue([task(ONE), task(ONE, name="evaluate")])

    assert restarted(run.process_ended(ONE, attempt=1, status=-9, now=2)) == 2
    run.accept(answer(key(ONE)), sender=ONE)
    assert restarted(run.process_ended(ONE, attempt=2, status=-9, now=3)) == 3
    assert isinstance(run.process_ended(ONE, attempt=3, status=-9, now=4), GiveUp)


def test_starts_that_nobody_died_for_are_not_counted() -> None:
    run = run_in_round_1(process_tries=2)
    for now in range(1, 9):  # a site that is stopped and started again
        run.starting(ONE, now=now)

    assert restarted(run.process_ended(ONE, attempt=8, status=-9, now=9)) == 9


def test_a_report_about_an_earlier_start_changes_nothing() -> None:
    run = run_in_round_1()
    run.starting(ONE, now=1)
    run.process_ended(ONE, attempt=1, status=1, now=2)
    before = run.participant(ONE)

    for attempt in (-1, 0, 1):
        assert run.process_ended(ONE, attempt=attempt, status=1, now=3) is None
    assert run.participant(ONE) == before


def test_a_process_that_was_never_started_cannot_have_ended() -> None:
    assert run_in_round_1().process_ended(ONE, attempt=0, status=1, now=2) is None


@pytest.mark.parametrize("state", sorted(ENDED))
def test_the_end_of_a_process_after_its_clients_part_is_no_news(state: ClientState) -> None:
    assert run_with(state).process_ended(ONE, attempt=1, status=0, now=9) is None


def test_a_process_that_ends_of_its_own_accord_is_not_started_again() -> None:
    verdict = after_death("server", attempt=1, tries=3, status=0)

    assert verdict == GiveUp("the job's process at server ended with status 0; it ended before the run was over")


def test_with_a_single_try_the_reason_counts_nothing() -> None:
    assert after_death("server", attempt=1, tries=2, status=-9, cause="process-hung") == Restart(
        2, ProcessHung("server", -9).reason
    )
    assert after_death("server", attempt=1, tries=1, status=2) == GiveUp(
        "the job's process at server ended with status 2"
    )


@pytest.mark.parametrize(
    ("cause", "code"), [("out-of-memory", "out-of-memory"), ("", "process-died"), ("?", "process-died")]
)
def test_what_ended_a_process_is_told_by_its_code_where_the_site_knows(cause: str, code: str) -> None:
    run = run_in_round_1(process_tries=1)
    run.starting(ONE, now=1)

    verdict = run.process_ended(ONE, attempt=1, status=-9, now=4, cause=cause)

    assert isinstance(verdict, GiveUp)
    assert verdict.code == code
    assert ("used up the memory" in verdict.reason) is (cause == "out-of-memory")


# heartbeats

J1, J2, J3 = JobId("j1"), JobId("j2"), JobId("j3")


def test_a_job_that_the_server_does_not_run_is_to_be_aborted() -> None:
    assert heartbeat_sync([J3, J1, J2], expected=[J1], previously=[]) == Sync((J2, J3), (), frozenset({J1}))


def test_a_job_that_was_reported_before_and_is_not_now_is_dead_there() -> None:
    assert heartbeat_sync([J1], expected=[J1, J2, J3], previously=[J1, J2, J3]).dead == (J2, J3)


def test_a_job_whose_start_is_on_its_way_is_not_dead() -> None:
    assert heartbeat_sync([], expected=[J1], previously=[]) == Sync((), (), frozenset())


def test_a_dead_job_is_declared_once_and_again_only_after_a_new_report() -> None:
    first = heartbeat_sync([], expected=[J1], previously=[J1])
    second = heartbeat_sync([], expected=[J1], previously=first.known)
    third = heartbeat_sync([J1], expected=[J1], previously=second.known)
    fourth = heartbeat_sync([], expected=[J1], previously=third.known)

    assert [sync.dead for sync in (first, second, third, fourth)] == [(J1,), (), (), (J1,)]


job_sets = st.frozensets(st.sampled_from([J1, J2, J3]))


@given(job_sets, job_sets, job_sets)
def test_a_heartbeat_aborts_only_what_was_reported_and_buries_only_what_is_expected(
    reported: frozenset[JobId], expected: frozenset[JobId], previously: frozenset[JobId]
) -> None:
    sync = heartbeat_sync(reported, expected=expected, previously=previously)

    assert set(sync.abort) == reported - expected
    assert set(sync.dead) == (expected & previously) - reported
    assert sync.known == reported & expected
    assert list(sync.abort) == sorted(sync.abort)


# any history

keys = st.builds(
    key,
    st.sampled_from([ONE, TWO]),
    round_number=st.integers(0, 3),
    sequence=st.integers(0, 1),
)
happenings = st.lists(
    st.one_of(
        st.tuples(st.just("issue"), keys),
        st.tuples(st.just("answer"), keys),
        st.tuples(st.just("cancel"), keys),
        st.tuples(st.just("commit"), st.integers(0, 3)),
        st.tuples(st.sampled_from(list(EVENTS)), st.none()),
    ),
    max_size=40,
)


@given(happenings)
def test_whatever_happens_an_accepted_answer_stays_until_its_round_is_over_and_is_never_asked_again(
    history: list[tuple[str, object]],
) -> None:
    run = run_in_round_1()
    accepted: dict[TaskKey, TaskResult] = {}
    for number, (what, about) in enumerate(history):
        match what, about:
            case "issue", TaskKey() as about_key:
                try:
                    new = run.issue([TaskAssignment(about_key, ModelRef())])
                except Conflict:
                    new = ()
                assert not {each.key for each in new} & accepted.keys()
            case "answer", TaskKey() as about_key:
                result = answer(about_key, examples=number)
                if run.accept(result, sender=about_key.client) == Accepted():
                    assert about_key not in accepted
                    accepted[about_key] = result
            case "cancel", TaskKey() as about_key:
                run.cancel([about_key])
            case "commit", int() as round_number:
                before = run.committed_round
                try:
                    run.committed(round_number)
                except Conflict:
                    assert run.committed_round == before
                if run.committed_round != before:
                    accepted = {}
            case _:
                EVENTS[what](run)
                accepted = {} if run.has_ended else accepted
        assert run.answers == tuple(accepted.values())
        out = {each.key for client in run.clients for each in run.tasks_for(client)}
        assert not out & accepted.keys()
        assert all(each.round == run.round for each in out)
