"""A job's definition, its states, and what is said about a definition that does not hold."""

from itertools import product

import msgspec
import pytest

from hanse.errors import Conflict, JobInvalid
from hanse.ids import Digest, JobId
from hanse.job import (
    ENDED,
    LEGAL,
    MAX_CLIENTS,
    MAX_PROCESS_TRIES,
    JobRecord,
    JobSpec,
    JobState,
    Resources,
    WorkflowSpec,
    move,
    parse,
)

SUBMITTED, SCHEDULED, RUNNING, COMPLETED, FAILED, ABORTED = JobState
FOLLOWS = {
    (SUBMITTED, SCHEDULED), (SUBMITTED, FAILED), (SUBMITTED, ABORTED),
    (SCHEDULED, SUBMITTED), (SCHEDULED, RUNNING), (SCHEDULED, FAILED), (SCHEDULED, ABORTED),
    (RUNNING, COMPLETED), (RUNNING, FAILED), (RUNNING, ABORTED),
}  # fmt: skip
TABLE: dict[str, object] = {"name": "digits", "workflow": "fedavg", "client": "job:app", "model": "job:model"}


def record(state: JobState = SUBMITTED) -> JobRecord:
    return JobRecord(JobId("j1"), parse(TABLE), "ada@demo", 5.0, Digest("0" * 64), 1, state=state)


@pytest.mark.parametrize(("state", "to"), list(product(JobState, JobState)))
def test_a_job_moves_as_the_table_says_and_in_no_other_way(state: JobState, to: JobState) -> None:
    before = record(state)
    assert (to in LEGAL[state]) == ((state, to) in FOLLOWS)
    if (state, to) in FOLLOWS:
        assert move(before, to, at=9.0, reason="because").state is to
    else:
        with pytest.raises(Conflict, match=f"job j1 is {state}, so it cannot be {to}"):
            move(before, to, at=9.0, reason="because")
    assert before == record(state)


def test_the_states_without_a_way_out_are_the_ended_ones() -> None:
    assert {COMPLETED, FAILED, ABORTED} == ENDED


def test_a_move_notes_when_it_happened() -> None:
    scheduled = move(record(), SCHEDULED, at=6.0)
    running = move(scheduled, RUNNING, at=7.0)
    done = move(running, COMPLETED, at=8.0)

    assert (scheduled.started_at, scheduled.ended_at) == (0.0, 0.0)
    assert (running.started_at, running.ended_at) == (7.0, 0.0)
    assert (done.started_at, done.ended_at) == (7.0, 8.0)


def test_a_job_fails_for_a_reason() -> None:
    with pytest.raises(ValueError, match="a job fails for a reason"):
        move(record(RUNNING), FAILED, at=9.0)

    failed = move(record(RUNNING), FAILED, at=9.0, code="workflow-failed", reason="it broke")
    assert (failed.code, failed.reason) == ("workflow-failed", "it broke")


def test_going_back_to_submitted_drops_the_reason_of_before() -> None:
    assert move(record(SCHEDULED), SUBMITTED, at=9.0).reason == ""


def test_a_table_becomes_a_spec_with_defaults() -> None:
    spec = parse(TABLE)

    assert spec == JobSpec(name="digits", workflow=WorkflowSpec("fedavg"), client="job:app", model="job:model")
    assert (spec.min_clients, spec.seed, spec.process_tries) == (2, 0, 3)
    assert not spec.is_script


def test_every_field_can_be_given() -> None:
    spec = parse(
        {
            "name": "digits",
            "workflow": {"name": "fedavg", "rounds": 10, "fraction": 0.5},
            "client": "scripts/train.py",
            "model": "initial.safetensors",
            "min_clients": 2,
            "required_clients": ["site-1"],
            "clients": ["site-1", "site-2"],
            "resources": {"cpus": 1.5, "memory_mb": 512, "gpus": 1},
            "seed": 7,
            "config": {"lr": 0.1, "epochs": 3, "fast": True, "name": "x"},
            "start_within_s": 60,
            "process_tries": 1,
        }
    )

    assert spec.workflow == WorkflowSpec("fedavg", {"rounds": 10, "fraction": 0.5})
    assert spec.resources == Resources(1.5, 512, 1)
    assert spec.clients == ("site-1", "site-2")
    assert spec.config == {"lr": 0.1, "epochs": 3, "fast": True, "name": "x"}
    assert spec.is_script


def test_the_name_has_a_default_that_the_caller_gives() -> None:
    nameless = {key: value for key, value in TABLE.items() if key != "name"}

    assert parse(nameless, default_name="folder").name == "folder"
    assert parse(TABLE, default_name="folder").name == "digits"
    with pytest.raises(JobInvalid, match="the job's name is ''"):
        parse(nameless)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "two words"),
        ("name", ""),
        ("name", 3),
        ("workflow", 3),
        ("workflow", {"rounds": 3}),
        ("workflow", {"name": 3}),
        ("client", "no reference"),
        ("client", "../train.py"),
        ("client", "/etc/train.py"),
        ("client", "a/../../train.py"),
        ("client", 3),
        ("model", "weights.bin"),
        ("model", "module:"),
        ("min_clients", 0),
        ("min_clients", MAX_CLIENTS + 1),
        ("min_clients", "two"),
        ("min_clients", 2.5),
        ("required_clients", "site-1"),
        ("clients", 3),
        ("resources", 3),
        ("seed", -1),
        ("seed", 2**63),
        ("config", 3),
        ("start_within_s", 0),
        ("start_within_s", "soon"),
        ("process_tries", 0),
        ("process_tries", 101),
    ],
)
def test_a_field_that_does_not_hold_is_named(field: str, value: object) -> None:
    with pytest.raises(JobInvalid, match=f"^the job's {field} is ") as invalid:
        parse({**TABLE, field: value})

    assert invalid.value.field == field


def test_a_jobs_processes_are_tried_1_to_100_times() -> None:
    assert [parse({**TABLE, "process_tries": tries}).process_tries for tries in (1, MAX_PROCESS_TRIES)] == [1, 100]
    for tries in (0, 101):
        with pytest.raises(JobInvalid, match=f"^the job's process_tries is {tries}; expected 1 to 100$"):
            parse({**TABLE, "process_tries": tries})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("clients", ["site-1", 2]),
        ("required_clients", [1]),
        ("resources", {"cpus": "all"}),
        ("config", {"layers": [1, 2]}),
    ],
)
def test_a_part_of_a_field_that_does_not_hold_is_named_with_its_field(field: str, value: object) -> None:
    with pytest.raises(JobInvalid) as invalid:
        parse({**TABLE, field: value})

    assert invalid.value.field.startswith(field)


@pytest.mark.parametrize("field", ["workflow", "client", "model"])
def test_a_missing_field_is_named(field: str) -> None:
    with pytest.raises(JobInvalid, match=f"the job's {field} is None; expected a value") as invalid:
        parse({key: value for key, value in TABLE.items() if key != field})

    assert invalid.value.field == field


def test_an_unknown_field_is_named_with_those_that_there_are() -> None:
    with pytest.raises(JobInvalid, match=r"the job's min_client is 3; expected no such field.*min_clients") as invalid:
        parse({**TABLE, "min_client": 3})

    assert invalid.value.field == "min_client"


def test_required_clients_must_be_among_those_who_may_take_part() -> None:
    with pytest.raises(JobInvalid, match=r"required_clients is \['site-3'\]"):
        parse({**TABLE, "clients": ["site-1", "site-2"], "required_clients": ["site-3", "site-1"]})


def test_a_job_cannot_need_more_clients_than_it_lets_take_part() -> None:
    with pytest.raises(JobInvalid, match="min_clients is 3; expected at most the 2 of 'clients'"):
        parse({**TABLE, "clients": ["site-1", "site-2"], "min_clients": 3})


def test_parsing_leaves_the_table_as_it_was() -> None:
    table = {**TABLE, "workflow": {"name": "fedavg", "rounds": 3}}
    parse(table)

    assert table == {**TABLE, "workflow": {"name": "fedavg", "rounds": 3}}


def test_a_record_survives_storage() -> None:
    before = move(move(record(), SCHEDULED, at=1.0), RUNNING, at=2.0)

    assert msgspec.msgpack.decode(msgspec.msgpack.encode(before), type=JobRecord) == before
