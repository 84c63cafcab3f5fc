"""What becomes of submitted jobs, as values: who starts with whom, who waits for what and until when."""

from collections.abc import Mapping

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hanse.coordination.absence import NOBODY, Absence
from hanse.coordination.schedule import (
    Candidate,
    Decision,
    GiveUp,
    Start,
    Wait,
    decide,
    free_resources,
    next_deadline,
    plan,
)
from hanse.errors import Conflict
from hanse.ids import ClientName, Digest, JobId
from hanse.job import JobRecord, JobSpec, JobState, Resources, WorkflowSpec


def job(
    job_id: str = "j1", *, submitted_at: float = 1000.0, start_within_s: float = 60.0, **fields: object
) -> JobRecord:
    base = JobSpec(name="j", workflow=WorkflowSpec("fedavg"), client="m:app", model="m:model")
    spec = msgspec.structs.replace(base, start_within_s=start_within_s, **fields)
    return JobRecord(JobId(job_id), spec, "ada@demo", submitted_at, Digest("0" * 64), 1)


def site(number: int, *, connected: bool = True, running: int = 0, **free: float) -> Candidate:
    return Candidate(ClientName(f"site-{number}"), msgspec.convert(free, Resources), connected, running)


def decision(
    record: JobRecord,
    *clients: Candidate,
    running_jobs: int = 0,
    max_running_jobs: int = 4,
    min_registered: int = 1,
    now_s: float = 1000.0,
    absent: Mapping[ClientName, Absence] = NOBODY,
) -> Decision:
    return decide(
        record,
        clients=clients,
        running_jobs=running_jobs,
        max_running_jobs=max_running_jobs,
        min_registered=min_registered,
        now_s=now_s,
        absent=absent,
    )


def reason(decided: Decision) -> str:
    assert isinstance(decided, Wait | GiveUp)
    return decided.reason


def test_a_job_starts_with_all_clients_that_can_take_it_in_the_order_of_their_names() -> None:
    assert decision(job(min_clients=2), site(3), site(1), site(2)) == Start(("site-1", "site-2", "site-3"))


def test_a_job_waits_for_enough_clients_until_its_time_is_over() -> None:
    assert decision(job(min_clients=2), site(1)) == Wait("1 of the 2 clients that the job needs can take it", 1060.0)


def test_a_job_whose_time_is_over_is_given_up_with_what_it_waited_for() -> None:
    record = job(min_clients=2)

    assert isinstance(decision(record, site(1), now_s=1059.9), Wait)
    assert decision(record, site(1), now_s=1060.0) == GiveUp(
        "the job could not start within 60 s: 1 of the 2 clients that the job needs can take it"
    )


def test_a_job_that_can_start_does_so_even_past_its_time() -> None:
    assert decision(job(), site(1), site(2), now_s=99_999.0) == Start(("site-1", "site-2"))


@pytest.mark.parametrize("state", [state for state in JobState if state is not JobState.SUBMITTED])
def test_only_a_submitted_job_is_decided_about(state: JobState) -> None:
    with pytest.raises(Conflict, match=f"job j1 is {state}, so it cannot be scheduled"):
        decision(msgspec.structs.replace(job(), state=state), site(1), site(2))


def test_a_job_waits_for_a_place_among_the_running_jobs() -> None:
    assert reason(decision(job(), site(1), site(2), running_jobs=4)) == (
        "4 jobs are running, and the server runs at most 4 at a time"
    )
    assert reason(decision(job(), site(1), site(2), running_jobs=1, max_running_jobs=1)).startswith("1 job is running")


def test_a_job_waits_no_longer_than_it_may_for_a_server_that_starts_no_further_ones() -> None:
    record, why = job(min_clients=1), "the server starts no further jobs"

    assert decision(record, site(1), max_running_jobs=0) == Wait(why, 1060.0)
    assert decision(record, site(1), max_running_jobs=0, now_s=1060.0) == GiveUp(
        f"the job could not start within 60 s: {why}"
    )


def test_no_job_starts_before_enough_clients_are_registered() -> None:
    record = job(min_clients=1)

    assert reason(decision(record, site(1), min_registered=2)) == ("1 client is registered, and the server waits for 2")
    assert isinstance(decision(record, site(1), site(2, connected=False), min_registered=2), Start)


def test_a_disconnected_client_is_not_given_a_job() -> None:
    assert decision(job(min_clients=1), site(1, connected=False), site(2)) == Start(("site-2",))
    assert reason(decision(job(), site(1, connected=False), site(2))).endswith(": site-1 is not connected")


def test_a_job_that_lists_clients_goes_to_no_other() -> None:
    record = job(clients=("site-1", "site-2"), min_clients=1)

    assert decision(record, site(1), site(2), site(3)) == Start(("site-1", "site-2"))
    assert reason(decision(record, site(3))) == (
        "0 of the 1 clients that the job needs can take it: site-1 is not registered, site-2 is not registered"
    )


def test_a_job_waits_for_each_client_that_it_requires() -> None:
    record = job(required_clients=("site-1", "site-2", "site-4"), min_clients=1, resources=Resources(gpus=1))
    decided = decision(record, site(1, connected=False, gpus=1), site(2), site(3, gpus=1))

    assert reason(decided) == (
        "the job requires clients that cannot take it: "
        "site-1 is not connected, site-2 has 0 of 1 GPUs free, site-4 is not registered"
    )


def test_a_job_starts_once_the_clients_that_it_requires_are_there() -> None:
    record = job(required_clients=("site-2",), min_clients=2)

    assert isinstance(decision(record, site(1), site(3)), Wait)
    assert decision(record, site(1), site(2)) == Start(("site-1", "site-2"))


@pytest.mark.parametrize(
    ("asked", "free", "fits"),
    [
        (Resources(), {}, True),
        (Resources(cpus=1), {"cpus": 1}, True),
        (Resources(cpus=1.5), {"cpus": 1}, False),
        (Resources(memory_mb=512), {"memory_mb": 512}, True),
        (Resources(memory_mb=512), {"memory_mb": 511}, False),
        (Resources(gpus=1), {"gpus": 2}, True),
        (Resources(gpus=1), {"cpus": 64}, False),
        (Resources(cpus=1, gpus=1), {"cpus": 1, "gpus": 1}, True),
    ],
)
def test_a_client_takes_a_job_if_it_has_all_that_the_job_asks_for(
    asked: Resources, free: dict[str, float], fits: bool
) -> None:
    assert isinstance(decision(job(min_clients=1, resources=asked), site(1, **free)), Start) == fits


def test_the_reason_names_what_is_short_and_what_it_is_short_beside() -> None:
    record = job(min_clients=3, resources=Resources(cpus=2, memory_mb=1024))
    clients = (site(1, cpus=0.5, running=1), site(2, cpus=2, memory_mb=512, running=2), site(3, cpus=2, memory_mb=2048))

    assert reason(decision(record, *clients)) == (
        "1 of the 3 clients that the job needs can take it: "
        "site-1 has 0.5 of 2 CPUs free and 0 of 1024 MB of memory free beside 1 running job, "
        "site-2 has 512 of 1024 MB of memory free beside 2 running jobs"
    )


def test_a_reason_about_many_clients_stays_a_sentence() -> None:
    text = reason(decision(job(), *(site(number, connected=False) for number in range(100, 130))))

    assert text.endswith("site-104 is not connected and 25 more")


def test_shares_of_a_cpu_add_up() -> None:
    left = free_resources(Resources(cpus=0.3), [Resources(cpus=0.1)] * 2)
    client = Candidate(ClientName("site-1"), left)

    assert left.cpus < 0.1
    assert isinstance(decision(job(min_clients=1, resources=Resources(cpus=0.1)), client), Start)


def test_what_is_left_is_never_less_than_nothing() -> None:
    taken = [Resources(cpus=1, memory_mb=5, gpus=1), Resources(cpus=2, memory_mb=6, gpus=1)]

    assert free_resources(Resources(cpus=2, memory_mb=20, gpus=1), taken) == Resources(memory_mb=9)


def planned(*jobs: JobRecord, clients: list[Candidate], max_running_jobs: int = 4) -> dict[JobId, Decision]:
    return plan(
        jobs,
        clients=clients,
        running_jobs=0,
        max_running_jobs=max_running_jobs,
        min_registered=1,
        now_s=1000.0,
    )


def test_jobs_are_decided_oldest_first_and_the_later_ones_get_what_is_left() -> None:
    asked = Resources(gpus=1)
    decided = planned(
        job("late", submitted_at=3, min_clients=1, resources=asked),
        job("early", submitted_at=1, min_clients=1, resources=asked),
        clients=[site(1, gpus=1), site(2)],
    )

    assert list(decided) == ["early", "late"]
    assert decided[JobId("early")] == Start(("site-1",))
    assert "site-1 has 0 of 1 GPUs free beside 1 running job" in reason(decided[JobId("late")])


def test_a_job_that_cannot_start_does_not_hold_up_a_younger_one() -> None:
    decided = planned(
        job("hungry", submitted_at=900, min_clients=1, start_within_s=1000, resources=Resources(gpus=8)),
        job("modest", submitted_at=990, min_clients=1),
        clients=[site(1, gpus=1)],
    )

    assert isinstance(decided[JobId("hungry")], Wait)
    assert decided[JobId("modest")] == Start(("site-1",))


def test_a_plan_starts_no_more_jobs_than_may_run() -> None:
    jobs = [job(f"j{number}", submitted_at=990 + number, min_clients=1) for number in range(3)]
    decided = planned(*jobs, clients=[site(1)], max_running_jobs=2)

    assert [type(each) for each in decided.values()] == [Start, Start, Wait]


def test_planning_changes_no_candidate() -> None:
    clients = [site(1, gpus=1)]
    planned(job(min_clients=1, resources=Resources(gpus=1)), clients=clients)

    assert clients == [site(1, gpus=1)]


def test_the_next_deadline_is_the_first_waiting_jobs() -> None:
    assert next_deadline([Start(()), Wait("a", 20.0), Wait("b", 10.0), GiveUp("c")]) == 10.0
    assert next_deadline([Start(())]) is None
    assert next_deadline([]) is None


sites = st.lists(
    st.builds(site, st.integers(1, 6), connected=st.booleans(), cpus=st.integers(0, 3)),
    unique_by=lambda candidate: candidate.name,
)
jobs_waiting = st.lists(
    st.builds(
        job,
        st.sampled_from([f"j{number}" for number in range(6)]),
        submitted_at=st.floats(0, 2000),
        min_clients=st.integers(1, 4),
        resources=st.builds(Resources, cpus=st.integers(0, 2)),
    ),
    unique_by=lambda record: record.job_id,
)


@given(jobs_waiting, sites, st.integers(0, 3))
def test_no_plan_promises_more_than_there_is(jobs: list[JobRecord], clients: list[Candidate], places: int) -> None:
    decided = planned(*jobs, clients=clients, max_running_jobs=places)
    starts = {job_id: each for job_id, each in decided.items() if isinstance(each, Start)}
    specs = {record.job_id: record.spec for record in jobs}

    assert set(decided) == set(specs)
    assert len(starts) <= places
    assert all(len(start.clients) >= specs[job_id].min_clients for job_id, start in starts.items())
    for client in clients:
        given_jobs = [specs[job_id] for job_id, start in starts.items() if client.name in start.clients]
        assert client.connected or not given_jobs
        assert sum(spec.resources.cpus for spec in given_jobs) <= client.free.cpus


@given(jobs_waiting, sites)
def test_the_order_in_which_clients_are_listed_decides_nothing(jobs: list[JobRecord], clients: list[Candidate]) -> None:
    assert planned(*jobs, clients=clients) == planned(*jobs, clients=clients[::-1])


@pytest.mark.parametrize(
    ("fields", "because"),
    [
        ({"min_clients": 2}, " (site-1: its certificate expired, site-2: too old)"),
        ({"min_clients": 2, "clients": ("site-2", "site-3")}, " (site-2: too old)"),
        ({"min_clients": 1, "clients": ("site-3",)}, ""),
    ],
)
def test_a_job_that_is_given_up_says_why_those_are_absent_that_might_have_taken_it(
    fields: dict[str, object], because: str
) -> None:
    absent = {
        ClientName("site-2"): Absence("version-mismatch", "too old"),
        ClientName("site-1"): Absence("certificate-expired", "its certificate expired"),
    }
    given_up = decision(job(**fields), site(4), now_s=1060.0, absent=absent)  # type: ignore[arg-type]  # as a case has them
    assert isinstance(given_up, GiveUp)
    without = decision(job(**fields), site(4), now_s=1060.0)  # type: ignore[arg-type]  # as a case has them
    assert given_up.reason == f"{reason(without)}{because}"
    assert decision(job(**fields), site(4), absent=absent) == decision(job(**fields), site(4))  # type: ignore[arg-type]
