"""The contract that every store keeps, and what a database adds to it: durability, fencing across processes, faults."""

import asyncio
import itertools
import math
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from hanse.errors import ConfigError, Conflict, NotFound, ProtocolError, StaleEpoch, StoreFailed
from hanse.ids import JobId
from hanse.job import JobState
from hanse.messages import ModelRef, RoundView
from hanse.storage.memory import MemoryStore
from hanse.storage.records import AuditEntry, Lease, RunState, Standby, Store
from hanse.storage.store import SqlStore

from .conftest import Where
from .samples import JOB, answer, changed, commit, ended, fault, model, record, take, task, tensor

EPOCH = 1


@pytest.fixture(params=["memory", "sqlite", "postgres"])
def new_store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "memory":
        return MemoryStore()
    if request.param == "sqlite":
        return SqlStore(tmp_path / "store" / "store.db")
    return SqlStore(request.getfixturevalue("postgres_url"))


@pytest.fixture
async def store(new_store: Store) -> AsyncIterator[Store]:
    """An open store, whose lease of ``EPOCH`` is held."""
    async with new_store:
        lease = await take(new_store, "server-1")
        assert lease.epoch == EPOCH
        yield new_store


@pytest.fixture
async def running(store: Store) -> Store:
    """The same with a running job whose initial model is committed."""
    await store.add_job(EPOCH, record())
    await store.commit_round(EPOCH, JOB, commit(0), now_s=1001.0)
    return store


async def everything(store: Store) -> object:
    """Return all that *store* shows, to compare before and after."""
    jobs = await store.jobs()
    runs = [(await store.snapshot(job.job_id), await store.rounds(job.job_id)) for job in jobs]
    clients = await store.disabled_clients(), await store.kept_tokens(), await store.certificate_ends()
    return jobs, runs, clients, await store.audit_log()


# The lease ------------------------------------------------------------------------------------------------------------


async def test_each_tenure_has_a_higher_epoch_and_a_session_of_its_own(store: Store) -> None:
    first = await store.lease()
    second = await take(store, "server-1")

    assert second.epoch > first.epoch
    assert second.ssid != first.ssid
    assert second == await store.lease()


async def test_the_lease_says_who_holds_it_and_where_clients_reach_them(store: Store) -> None:
    lease = await store.take_lease("a:1", name="a", target="a.example:8102", ttl_s=4.0, force=True)

    assert lease == Lease(EPOCH + 1, "a:1", lease.ssid, 0, 4.0, "a", "a.example:8102")


async def test_the_lease_of_a_new_store_is_free(new_store: Store) -> None:
    async with new_store as store:
        lease = await store.lease()

    assert lease == Lease(0, "", lease.ssid)


async def test_a_lease_that_another_holds_is_refused(store: Store) -> None:
    before = await store.lease()

    with pytest.raises(Conflict, match="held by server-1, so it cannot be taken by server-2"):
        await take(store, "server-2")
    assert await store.lease() == before


async def test_a_lease_that_has_not_moved_since_it_was_seen_may_be_taken(store: Store) -> None:
    seen = await store.lease()

    lease = await take(store, "server-2", seen=seen)

    assert (lease.epoch, lease.holder) == (EPOCH + 1, "server-2")


async def test_a_lease_that_beat_since_it_was_seen_is_refused(store: Store) -> None:
    seen = await store.lease()
    await store.renew_lease(EPOCH)

    with pytest.raises(Conflict):
        await take(store, "server-2", seen=seen)


async def test_a_lease_that_another_took_since_it_was_seen_is_refused(store: Store) -> None:
    seen = await store.lease()
    await take(store, "server-2", seen=seen)

    with pytest.raises(Conflict, match="held by server-2"):
        await take(store, "server-3", seen=seen)


async def test_force_takes_a_lease_that_beats(store: Store) -> None:
    lease = await take(store, "server-2", force=True)

    assert (lease.epoch, lease.holder) == (EPOCH + 1, "server-2")


async def test_a_renewed_lease_beats_and_is_else_what_it_was(store: Store) -> None:
    before = await store.lease()

    assert await store.renew_lease(EPOCH) == changed(before, beat=1)
    assert await store.renew_lease(EPOCH) == changed(before, beat=2)
    assert await store.lease() == changed(before, beat=2)


async def test_a_lease_taken_again_by_its_holder_begins_at_beat_0(store: Store) -> None:
    await store.renew_lease(EPOCH)

    lease = await take(store, "server-1")

    assert (lease.epoch, lease.beat) == (EPOCH + 1, 0)


async def test_a_released_lease_is_free_at_once_and_its_epoch_is_over(store: Store) -> None:
    held = await store.lease()
    await store.release_lease(EPOCH)

    with pytest.raises(StaleEpoch):
        await store.add_job(EPOCH, record())
    with pytest.raises(StaleEpoch):
        await store.renew_lease(EPOCH)
    free = await store.lease()
    assert free == Lease(EPOCH + 1, "", free.ssid, ttl_s=held.ttl_s)
    assert free.ssid != held.ssid
    lease = await take(store, "server-2")
    assert lease.epoch > free.epoch


async def test_a_lease_that_was_handed_over_is_its_successors_first(store: Store) -> None:
    await store.release_lease(EPOCH, successor="server-3")

    free = await store.lease()
    assert (free.holder, free.successor) == ("", "server-3")
    with pytest.raises(Conflict, match="handed to server-3"):
        await take(store, "server-2")
    lease = await take(store, "server-3")
    assert (lease.holder, lease.successor) == ("server-3", "")


async def test_a_lease_whose_successor_does_not_come_may_be_taken_by_who_saw_it_so(store: Store) -> None:
    await store.release_lease(EPOCH, successor="server-3")

    lease = await take(store, "server-2", seen=await store.lease())

    assert lease.holder == "server-2"


async def test_a_lease_released_by_mistake_with_a_foreign_epoch_stays(store: Store) -> None:
    before = await store.lease()

    for epoch in (EPOCH - 1, EPOCH + 1):
        with pytest.raises(StaleEpoch):
            await store.release_lease(epoch)
    assert await store.lease() == before


@pytest.mark.parametrize(
    ("field", "wrong"),
    [("holder", ""), ("name", ""), ("name", "../a"), ("ttl_s", 0.0), ("ttl_s", float("inf")), ("target", 8102)],
)
async def test_a_lease_that_cannot_be_is_refused_by_field(store: Store, field: str, wrong: object) -> None:
    before = await store.lease()
    values: dict[str, Any] = {"holder": "server-2", "name": "server-2", "target": "", "ttl_s": 4.0, field: wrong}

    with pytest.raises(ProtocolError) as caught:
        await store.take_lease(**values, force=True)

    assert caught.value.field == f"Lease.{field}"
    assert await store.lease() == before


async def test_who_waits_for_the_lease_hears_of_a_beat_a_release_and_a_new_holder(store: Store) -> None:
    for move in (
        store.renew_lease(EPOCH),
        store.release_lease(EPOCH),
        take(store, "server-2"),
        take(store, "server-2"),
    ):
        seen = await store.lease()
        waiting = asyncio.ensure_future(store.lease_moved(seen, within_s=60.0))
        await store.lease()  # the waiter has had its first look by now
        await move

        assert await waiting == await store.lease() != seen


async def test_who_saw_another_lease_than_there_is_does_not_wait(store: Store) -> None:
    lease = await store.lease()

    for field, other in (("epoch", EPOCH - 1), ("beat", 7), ("holder", "another")):
        assert await store.lease_moved(changed(lease, **{field: other}), within_s=3600.0) == lease


async def test_who_waits_for_a_lease_that_stands_still_learns_that_in_the_end(store: Store) -> None:
    seen = await store.lease()

    assert await store.lease_moved(seen, within_s=0.0) == seen
    assert await store.lease_moved(seen, within_s=0.05) == seen
    assert await store.lease_moved(changed(seen, ttl_s=0.03), within_s=0.05) == seen


async def test_servers_that_stand_by_are_listed_by_name_with_their_latest_word(store: Store) -> None:
    began = time.time()
    await store.note_standby(Standby("b:1", "b", "b.example:8102"))
    await store.note_standby(Standby("a:1", "a", "a.example:8102"))
    await store.note_standby(Standby("b:2", "b", "b.example:8103"))

    found = await store.standbys(within_s=60)
    assert [changed(each, seen_at=0.0) for each in found] == [
        Standby("a:1", "a", "a.example:8102"),
        Standby("b:2", "b", "b.example:8103"),
    ]
    assert all(began - 1 <= each.seen_at <= time.time() for each in found)  # a database may count whole seconds


async def test_when_a_server_stood_by_is_told_by_the_stores_clock_and_not_by_its_own(store: Store) -> None:
    for ahead_s in (-86400, 86400):
        await store.note_standby(Standby("a:1", "a", "a.example:8102", seen_at=time.time() + ahead_s))

        assert [each.name for each in await store.standbys(within_s=60)] == ["a"]


async def test_a_server_that_has_not_said_so_of_late_stands_by_no_longer(store: Store) -> None:
    await store.note_standby(Standby("a:1", "a", "a.example:8102"))

    assert await store.standbys(within_s=-2) == []


async def test_a_server_that_takes_the_lease_stands_by_no_longer(store: Store) -> None:
    await store.note_standby(Standby("a:1", "server-2", "a.example:8102"))
    await store.note_standby(Standby("b:1", "server-3", "b.example:8102"))
    with pytest.raises(Conflict):
        await take(store, "server-2")
    assert len(await store.standbys(within_s=60)) == 2

    await take(store, "server-2", force=True)

    assert [standby.name for standby in await store.standbys(within_s=60)] == ["server-3"]


async def test_a_standby_that_cannot_be_is_refused(store: Store) -> None:
    standby = Standby("a:1", "a", "a.example:8102")
    for wrong in (changed(standby, name="../a"), changed(standby, seen_at="now")):
        with pytest.raises(ProtocolError, match="Standby"):
            await store.note_standby(wrong)
    assert await store.standbys(within_s=60) == []


async def test_no_write_of_an_ended_epoch_changes_anything(running: Store) -> None:
    await running.issue_tasks(EPOCH, JOB, [task()])
    before = await everything(running)
    lease = await take(running, "server-2", force=True)
    writes = [
        running.renew_lease(EPOCH),
        running.release_lease(EPOCH),
        running.add_job(EPOCH, record("other")),
        running.replace_job(EPOCH, record(code="x"), was=JobState.RUNNING),
        running.issue_tasks(EPOCH, JOB, [task("site-2")]),
        running.accept_answer(EPOCH, JOB, answer()),
        running.commit_round(EPOCH, JOB, commit(1), now_s=1.0),
        running.end_run(EPOCH, ended(record()), was=JobState.RUNNING),
        running.set_disabled(EPOCH, "site-1", True, reason="why"),
        running.keep_token(EPOCH, "site-1", "", now_s=1.0, until_s=2.0),
        running.keep_certificate_ends(EPOCH, {"site-1": 2.0}, since_s=1.0),
        running.audit(EPOCH, AuditEntry(1.0, "a", "b", "c", "ok")),
    ]

    for write in writes:
        with pytest.raises(StaleEpoch) as caught:
            await write
        assert (caught.value.ours, caught.value.current) == (EPOCH, lease.epoch)

    assert await everything(running) == before


# Jobs -----------------------------------------------------------------------------------------------------------------


async def test_a_job_reads_back_as_it_was_stored(store: Store) -> None:
    await store.add_job(EPOCH, record())

    assert await store.job(JOB) == record()


async def test_a_second_job_of_the_same_id_is_refused(store: Store) -> None:
    await store.add_job(EPOCH, record())

    with pytest.raises(Conflict, match="stored already"):
        await store.add_job(EPOCH, record(submitter="somebody else"))
    assert await store.job(JOB) == record()


async def test_a_job_that_is_added_moved_or_ended_once_more_stays_as_it_is(store: Store) -> None:
    submitted, scheduled = record(state=JobState.SUBMITTED), record(state=JobState.SCHEDULED)
    done = ended(record())
    for _ in range(2):  # as one would who does not know what became of the first attempt
        await store.add_job(EPOCH, submitted)
    for _ in range(2):
        await store.replace_job(EPOCH, scheduled, was=JobState.SUBMITTED)
    await store.replace_job(EPOCH, record(), was=JobState.SCHEDULED)
    for _ in range(2):
        await store.end_run(EPOCH, done, was=JobState.RUNNING)

    assert await store.jobs() == [done]
    with pytest.raises(Conflict):
        await store.add_job(EPOCH, submitted)


async def test_an_unknown_job_is_not_found(store: Store) -> None:
    missing = JobId("missing")
    for call in (
        store.job(missing),
        store.snapshot(missing),
        store.replace_job(EPOCH, record("missing"), was=JobState.RUNNING),
        store.end_run(EPOCH, ended(record("missing")), was=JobState.RUNNING),
        store.issue_tasks(EPOCH, missing, [task()]),
        store.commit_round(EPOCH, missing, commit(0), now_s=1.0),
    ):
        with pytest.raises(NotFound, match="no job 'missing'"):
            await call
    assert await store.rounds(missing) == []
    assert await store.last_round(missing) is None


@pytest.mark.parametrize("text", ["", "digits\0", "\ud800", "Digits-1"])
async def test_what_can_be_no_jobs_id_is_not_found_either(running: Store, text: str) -> None:
    strange = JobId(text)
    for call in (running.job(strange), running.snapshot(strange), running.accept_answer(EPOCH, strange, answer())):
        with pytest.raises(NotFound):
            await call
    assert await running.rounds(strange) == []
    assert await running.last_round(strange) is None


async def test_jobs_come_newest_first_by_state_and_number(store: Store) -> None:
    await store.add_job(EPOCH, record("a", state=JobState.SUBMITTED))
    await store.add_job(EPOCH, record("b", state=JobState.RUNNING))
    await store.add_job(EPOCH, record("c", state=JobState.SUBMITTED))

    assert [job.job_id for job in await store.jobs()] == ["c", "b", "a"]
    assert [job.job_id for job in await store.jobs(states=[JobState.SUBMITTED])] == ["c", "a"]
    assert [job.job_id for job in await store.jobs(states={JobState.SUBMITTED, JobState.RUNNING}, limit=2)] == [
        "c",
        "b",
    ]
    assert await store.jobs(states=[JobState.FAILED]) == []


async def test_a_job_is_found_by_its_new_state_after_a_move(store: Store) -> None:
    submitted = record(state=JobState.SUBMITTED)
    await store.add_job(EPOCH, submitted)

    await store.replace_job(EPOCH, changed(submitted, state=JobState.SCHEDULED), was=JobState.SUBMITTED)

    assert await store.jobs(states=[JobState.SUBMITTED]) == []
    assert [job.job_id for job in await store.jobs(states=[JobState.SCHEDULED])] == [JOB]


async def test_of_two_moves_from_the_same_state_only_the_first_happens(store: Store) -> None:
    await store.add_job(EPOCH, record())
    completed, aborted = ended(record()), ended(record(), JobState.ABORTED)

    outcomes = await asyncio.gather(
        store.replace_job(EPOCH, completed, was=JobState.RUNNING),
        store.replace_job(EPOCH, aborted, was=JobState.RUNNING),
        return_exceptions=True,
    )

    assert outcomes[0] is None
    assert isinstance(outcomes[1], Conflict)
    assert await store.job(JOB) == completed


async def test_a_job_may_be_amended_without_moving(store: Store) -> None:
    await store.add_job(EPOCH, record())

    await store.replace_job(EPOCH, record(code="noted"), was=JobState.RUNNING)

    assert (await store.job(JOB)).code == "noted"


async def test_an_illegal_move_is_refused(store: Store) -> None:
    await store.add_job(EPOCH, record(state=JobState.SUBMITTED))

    with pytest.raises(Conflict, match="submitted"):
        await store.replace_job(EPOCH, record(state=JobState.COMPLETED), was=JobState.SUBMITTED)


# A run's journal ------------------------------------------------------------------------------------------------------


async def test_a_new_job_has_no_state_tasks_or_answers(store: Store) -> None:
    await store.add_job(EPOCH, record())

    assert await store.snapshot(JOB) == RunState(None)
    assert await store.rounds(JOB) == []
    assert await store.last_round(JOB) is None


async def test_issued_tasks_wait_in_the_order_of_their_keys(running: Store) -> None:
    tasks = [task("site-2"), task("site-1"), task("site-1", name="evaluate"), task("site-1", sequence=1)]

    await running.issue_tasks(EPOCH, JOB, tasks)

    run = await running.snapshot(JOB)
    assert run.state == commit(0).state
    assert run.tasks == (
        task("site-1", name="evaluate"),
        task("site-1"),
        task("site-2"),
        task("site-1", sequence=1),
    )
    assert run.answers == ()


async def test_a_task_issued_again_stays_as_it_was(running: Store) -> None:
    await running.issue_tasks(EPOCH, JOB, [task(of=model("first"))])

    await running.issue_tasks(EPOCH, JOB, [task(of=model("second")), task("site-2", of=model("second"))])

    assert (await running.snapshot(JOB)).tasks == (task(of=model("first")), task("site-2", of=model("second")))


async def test_a_task_without_a_model_is_kept_without_one(running: Store) -> None:
    bare = changed(task(), model=None, expects_model=False)

    await running.issue_tasks(EPOCH, JOB, [bare])

    assert (await running.snapshot(JOB)).tasks == (bare,)


async def test_no_tasks_are_nothing(running: Store) -> None:
    await running.issue_tasks(EPOCH, JOB, [])

    assert (await running.snapshot(JOB)).tasks == ()


@pytest.mark.parametrize("round_number", [0, 2])
async def test_tasks_of_another_round_than_the_next_are_refused(running: Store, round_number: int) -> None:
    with pytest.raises(Conflict, match=f"round {round_number}"):
        await running.issue_tasks(EPOCH, JOB, [task(), task("site-2", round_number=round_number)])

    assert (await running.snapshot(JOB)).tasks == ()


async def test_tasks_before_the_first_commit_are_of_round_0(store: Store) -> None:
    await store.add_job(EPOCH, record())

    await store.issue_tasks(EPOCH, JOB, [task(round_number=0)])

    assert len((await store.snapshot(JOB)).tasks) == 1


async def test_an_accepted_answer_takes_the_place_of_its_task(running: Store) -> None:
    await running.issue_tasks(EPOCH, JOB, [task("site-2"), task("site-1")])

    assert await running.accept_answer(EPOCH, JOB, answer("site-2")) == answer("site-2")
    assert await running.accept_answer(EPOCH, JOB, fault("site-1")) == fault("site-1")

    run = await running.snapshot(JOB)
    assert run.tasks == ()
    assert run.answers == (answer("site-2"), fault("site-1"))


async def test_answers_come_in_the_order_in_which_they_were_accepted(running: Store) -> None:
    sites = [f"site-{n}" for n in (3, 11, 1, 20, 2)]
    await running.issue_tasks(EPOCH, JOB, [task(site) for site in sorted(sites)])

    for site in sites:
        await running.accept_answer(EPOCH, JOB, answer(site))

    assert (await running.snapshot(JOB)).answers == tuple(answer(site) for site in sites)


async def test_answers_of_an_earlier_tenure_come_first(running: Store) -> None:
    sites = [f"site-{n}" for n in (3, 1, 4, 2)]
    await running.issue_tasks(EPOCH, JOB, [task(site) for site in sites])
    for site in sites[:2]:
        await running.accept_answer(EPOCH, JOB, answer(site))
    epoch = (await take(running, "server-1")).epoch

    for site in sites[2:]:
        await running.accept_answer(epoch, JOB, answer(site))

    assert (await running.snapshot(JOB)).answers == tuple(answer(site) for site in sites)


async def test_the_first_answer_to_a_task_counts_and_whoever_gives_another_is_told_it(running: Store) -> None:
    await running.issue_tasks(EPOCH, JOB, [task()])
    await running.accept_answer(EPOCH, JOB, answer(num_examples=1))

    for again in (answer(num_examples=2), fault(), answer(num_examples=1)):
        assert await running.accept_answer(EPOCH, JOB, again) == answer(num_examples=1)
    assert (await running.snapshot(JOB)).answers == (answer(num_examples=1),)


async def test_an_answered_task_issued_again_stays_answered(running: Store) -> None:
    await running.issue_tasks(EPOCH, JOB, [task()])
    await running.accept_answer(EPOCH, JOB, answer())

    await running.issue_tasks(EPOCH, JOB, [task()])

    run = await running.snapshot(JOB)
    assert (run.tasks, run.answers) == ((), (answer(),))


async def test_a_retracted_answer_leaves_its_task_to_be_answered_again(running: Store) -> None:
    await running.issue_tasks(EPOCH, JOB, [task("site-1"), task("site-2")])
    for site in ("site-1", "site-2"):
        await running.accept_answer(EPOCH, JOB, answer(site))

    await running.retract_answers(EPOCH, JOB, [task("site-1").key])

    run = await running.snapshot(JOB)
    assert (run.tasks, run.answers) == ((task("site-1"),), (answer("site-2"),))
    assert await running.accept_answer(EPOCH, JOB, answer("site-1", num_examples=77)) == answer(
        "site-1", num_examples=77
    )


async def test_an_answer_without_a_task_is_not_found(running: Store) -> None:
    await running.issue_tasks(EPOCH, JOB, [task()])

    for stray in (answer("site-2"), answer(name="evaluate"), answer(sequence=1), answer(round_number=2)):
        with pytest.raises(NotFound, match="task"):
            await running.accept_answer(EPOCH, JOB, stray)
    with pytest.raises(NotFound):
        await running.accept_answer(EPOCH, JobId("missing"), answer())


async def test_a_commit_replaces_the_state_and_deletes_what_its_round_needed(running: Store) -> None:
    await running.issue_tasks(EPOCH, JOB, [task("site-1"), task("site-2")])
    await running.accept_answer(EPOCH, JOB, answer("site-1"))

    await running.commit_round(EPOCH, JOB, commit(1, extra={"momentum": model("m")}), now_s=1002.0)

    assert await running.snapshot(JOB) == RunState(commit(1, extra={"momentum": model("m")}).state)
    with pytest.raises(NotFound):
        await running.accept_answer(EPOCH, JOB, answer("site-2"))


async def test_carried_tasks_and_answers_outlive_the_round_and_the_others_do_not(running: Store) -> None:
    sites = [f"site-{n}" for n in range(6)]
    await running.issue_tasks(EPOCH, JOB, [task(site, of=model(site)) for site in sites])
    for site in ("site-4", "site-1", "site-0"):
        await running.accept_answer(EPOCH, JOB, answer(site))

    await running.commit_round(EPOCH, JOB, commit(1, carried=["site-1", "site-2", "site-4"]), now_s=1002.0)

    assert await running.snapshot(JOB) == RunState(
        commit(1).state, (task("site-2", of=model("site-2")),), (answer("site-4"), answer("site-1"))
    )
    for gone in ("site-0", "site-3"):
        with pytest.raises(NotFound, match=f"round 1 for {gone}"):
            await running.accept_answer(EPOCH, JOB, answer(gone))


async def test_a_carried_task_may_be_answered_in_a_later_round(running: Store) -> None:
    await running.issue_tasks(EPOCH, JOB, [task("site-1"), task("site-2")])
    await running.commit_round(EPOCH, JOB, commit(1, carried=["site-1"]), now_s=1002.0)
    await running.issue_tasks(EPOCH, JOB, [task("site-2", round_number=2)])
    await running.accept_answer(EPOCH, JOB, answer("site-2", round_number=2))

    await running.accept_answer(EPOCH, JOB, answer("site-1"))

    assert (await running.snapshot(JOB)).answers == (answer("site-2", round_number=2), answer("site-1"))


async def test_a_task_is_carried_from_round_to_round_until_a_commit_leaves_it_out(running: Store) -> None:
    await running.issue_tasks(EPOCH, JOB, [task()])
    for number in (1, 2):
        await running.commit_round(EPOCH, JOB, commit(number, carried=["site-1"]), now_s=1002.0)
        assert (await running.snapshot(JOB)).tasks == (task(),)

    await running.commit_round(EPOCH, JOB, commit(3), now_s=1002.0)

    assert (await running.snapshot(JOB)).tasks == ()


async def test_a_model_that_carried_and_other_tasks_share_stays(running: Store) -> None:
    await running.issue_tasks(EPOCH, JOB, [task("site-1"), task("site-2")])

    await running.commit_round(EPOCH, JOB, commit(1, carried=["site-2"]), now_s=1002.0)

    assert (await running.snapshot(JOB)).tasks == (task("site-2"),)


async def test_a_commit_that_carries_a_task_which_there_is_not_is_refused(running: Store) -> None:
    await running.issue_tasks(EPOCH, JOB, [task("site-1")])
    before = await everything(running)

    with pytest.raises(NotFound, match="for site-2"):
        await running.commit_round(EPOCH, JOB, commit(1, carried=["site-1", "site-2"]), now_s=1002.0)

    assert await everything(running) == before


async def test_the_history_has_a_line_for_each_round(running: Store) -> None:
    await running.commit_round(EPOCH, JOB, commit(1), now_s=1002.0)

    assert await running.rounds(JOB) == [
        RoundView(0, {"accuracy": 0.0}, 0.5, 1001.0, ("site-1", "site-2")),
        RoundView(1, {"accuracy": 0.1}, 0.5, 1002.0, ("site-1", "site-2")),
    ]


async def test_the_last_round_is_that_of_the_job_and_stays_when_it_ends(running: Store) -> None:
    other = JobId("other")
    await running.add_job(EPOCH, record(other))
    await running.commit_round(EPOCH, other, commit(0), now_s=5.0)
    for number in range(1, 12):  # past 9, where order by text would differ
        await running.commit_round(EPOCH, JOB, commit(number), now_s=1001.0 + number)
        assert await running.last_round(JOB) == (await running.rounds(JOB))[-1]

    await running.end_run(EPOCH, ended(record()), was=JobState.RUNNING)

    last, others = await running.last_round(JOB), await running.last_round(other)
    assert last is not None
    assert others is not None
    assert (last.round, others.round) == (11, 0)


async def test_a_round_committed_again_stays_as_it_was(running: Store) -> None:
    await running.issue_tasks(EPOCH, JOB, [task()])
    before = await everything(running)

    await running.commit_round(EPOCH, JOB, commit(0, done=True), now_s=5000.0)

    assert await everything(running) == before


@pytest.mark.parametrize("round_number", [2, 7])
async def test_a_round_that_is_not_the_next_is_refused(running: Store, round_number: int) -> None:
    before = await everything(running)

    with pytest.raises(Conflict, match="at round 0"):
        await running.commit_round(EPOCH, JOB, commit(round_number), now_s=1002.0)

    assert await everything(running) == before


async def test_an_earlier_round_is_refused(running: Store) -> None:
    await running.commit_round(EPOCH, JOB, commit(1), now_s=1002.0)

    with pytest.raises(Conflict, match="at round 1"):
        await running.commit_round(EPOCH, JOB, commit(0), now_s=1003.0)


async def test_a_first_commit_other_than_round_0_is_refused(store: Store) -> None:
    await store.add_job(EPOCH, record())

    with pytest.raises(Conflict, match="before round 0"):
        await store.commit_round(EPOCH, JOB, commit(1), now_s=1.0)


async def test_a_state_keeps_its_plain_values(running: Store) -> None:
    values: dict[str, object] = {"schedule": [1, 2.5, "three", None, True], "nested": {"a": {"b": b"bytes"}}}

    await running.commit_round(EPOCH, JOB, commit(1, values=values), now_s=1002.0)

    state = (await running.snapshot(JOB)).state
    assert state is not None
    assert state.values == values


async def test_the_end_of_a_run_takes_its_tasks_and_leaves_its_last_state(running: Store) -> None:
    await running.issue_tasks(EPOCH, JOB, [task("site-1"), task("site-2")])
    await running.accept_answer(EPOCH, JOB, answer("site-1"))

    await running.end_run(EPOCH, ended(record()), was=JobState.RUNNING)

    assert await running.snapshot(JOB) == RunState(commit(0).state)
    assert (await running.job(JOB)).state is JobState.COMPLETED


async def test_a_run_whose_end_is_refused_keeps_its_tasks(running: Store) -> None:
    await running.issue_tasks(EPOCH, JOB, [task()])
    before = await everything(running)

    with pytest.raises(Conflict):
        await running.end_run(EPOCH, ended(record()), was=JobState.SCHEDULED)

    assert await everything(running) == before


async def test_a_job_that_has_ended_takes_no_tasks_and_no_rounds(running: Store) -> None:
    await running.end_run(EPOCH, ended(record(), JobState.FAILED, "it broke"), was=JobState.RUNNING)

    with pytest.raises(Conflict, match="failed"):
        await running.issue_tasks(EPOCH, JOB, [task()])
    with pytest.raises(Conflict, match="failed"):
        await running.commit_round(EPOCH, JOB, commit(1), now_s=1.0)


async def test_runs_do_not_see_each_others_journals(running: Store) -> None:
    other = JobId("other")
    await running.add_job(EPOCH, record(other))
    await running.commit_round(EPOCH, other, commit(0), now_s=1.0)
    await running.issue_tasks(EPOCH, JOB, [task()])
    await running.issue_tasks(EPOCH, other, [task(of=model("other"))])
    await running.accept_answer(EPOCH, other, answer())

    await running.commit_round(EPOCH, other, commit(1), now_s=2.0)

    assert (await running.snapshot(JOB)).tasks == (task(),)
    assert (await running.snapshot(JOB)).answers == ()
    assert len(await running.rounds(JOB)) == 1


async def test_what_is_not_valid_is_refused_before_anything_is_written(running: Store) -> None:
    await running.issue_tasks(EPOCH, JOB, [task()])
    before = await everything(running)
    bad = ModelRef((tensor(digest="no digest"),))

    for write in (
        running.add_job(EPOCH, record("Not An Id")),
        running.replace_job(EPOCH, record(state=JobState.FAILED), was=JobState.RUNNING),
        running.issue_tasks(EPOCH, JOB, [task("site-2"), task("site-3", of=bad)]),
        running.accept_answer(EPOCH, JOB, changed(answer(), update=None)),
        running.commit_round(EPOCH, JOB, changed(commit(1), state=changed(commit(1).state, model=bad)), now_s=1.0),
        running.issue_tasks(EPOCH, JOB, [task(name="tra\0in")]),
        running.set_disabled(EPOCH, "no.name", True),
        running.set_disabled(EPOCH, "site-1", True, reason="\0"),
        running.keep_token(EPOCH, "no.name", "", now_s=1.0, until_s=2.0),
        running.keep_token(EPOCH, "site-1", "no digest", now_s=1.0, until_s=2.0),
        running.keep_token(EPOCH, "site-1", "", now_s=2.0, until_s=2.0),
        running.keep_certificate_ends(EPOCH, {"site-1": 2.0, "no.name": 2.0}, since_s=1.0),
        running.keep_certificate_ends(EPOCH, {"site-1": math.inf}, since_s=1.0),
        running.audit(EPOCH, changed(AuditEntry(1.0, "a", "b", "c", "ok"), actor=3)),
        running.audit(EPOCH, AuditEntry(1.0, "a\0", "b", "c", "ok")),
        running.release_lease(EPOCH, successor="no.name"),
    ):
        with pytest.raises(ProtocolError):
            await write

    assert await everything(running) == before


async def test_what_was_stored_does_not_change_with_the_objects_it_was_made_of(running: Store) -> None:
    values: dict[str, object] = {"seen": [1]}
    await running.commit_round(EPOCH, JOB, commit(1, values=values), now_s=1.0)

    values["seen"] = [2]
    first = (await running.snapshot(JOB)).state
    assert first is not None
    first.values["seen"] = [3]

    again = (await running.snapshot(JOB)).state
    assert again is not None
    assert again.values == {"seen": [1]}


# Clients and the audit log --------------------------------------------------------------------------------------------


async def test_disabled_clients_are_remembered_with_the_latest_reason_until_enabled(store: Store) -> None:
    await store.set_disabled(EPOCH, "site-2", True, reason="lost its laptop")
    await store.set_disabled(EPOCH, "site-1", True, reason="first")
    await store.set_disabled(EPOCH, "site-1", True, reason="second")

    assert await store.disabled_clients() == {"site-1": "second", "site-2": "lost its laptop"}
    await store.set_disabled(EPOCH, "site-1", False)
    await store.set_disabled(EPOCH, "site-3", False)
    assert await store.disabled_clients() == {"site-2": "lost its laptop"}


async def test_of_each_client_the_last_token_is_remembered_for_as_long_as_any_of_them_matters(store: Store) -> None:
    first, second = "a" * 64, "b" * 64
    await store.keep_token(EPOCH, "site-1", first, now_s=1.0, until_s=50.0)
    await store.keep_token(EPOCH, "site-1", second, now_s=2.0, until_s=9.0)
    await store.keep_token(EPOCH, "site-2", first, now_s=3.0, until_s=10.0)
    assert await store.kept_tokens() == {"site-1": second, "site-2": first}

    await store.keep_token(EPOCH, "site-3", "", now_s=10.0, until_s=60.0)
    assert await store.kept_tokens() == {"site-1": second, "site-3": ""}


async def test_no_token_of_a_client_that_was_disabled_counts_once_it_is_enabled(store: Store) -> None:
    await store.keep_token(EPOCH, "site-1", "a" * 64, now_s=1.0, until_s=50.0)
    await store.set_disabled(EPOCH, "site-1", True)
    await store.set_disabled(EPOCH, "site-1", False)

    assert await store.kept_tokens() == {"site-1": ""}


async def test_of_each_client_the_end_of_its_last_certificate_is_remembered(store: Store) -> None:
    await store.keep_certificate_ends(EPOCH, {"site-2": 50.0, "site-1": 60.0}, since_s=1.0)
    assert list((await store.certificate_ends()).items()) == [("site-1", 60.0), ("site-2", 50.0)]

    await store.keep_certificate_ends(EPOCH, {"site-2": 40.0}, since_s=1.0)  # a new one may end sooner
    for _ in range(2):  # whoever does not know whether it was written writes it again
        await store.keep_certificate_ends(EPOCH, {"site-3": 70.0}, since_s=1.0)
    assert await store.certificate_ends() == {"site-1": 60.0, "site-2": 40.0, "site-3": 70.0}


async def test_certificates_that_ended_long_ago_are_forgotten_with_the_next_that_is_remembered(store: Store) -> None:
    await store.keep_certificate_ends(EPOCH, {"site-1": 10.0, "site-2": 11.0, "site-3": 12.0}, since_s=1.0)

    await store.keep_certificate_ends(EPOCH, {"site-4": 10.0, "site-1": 90.0}, since_s=11.0)

    assert await store.certificate_ends() == {"site-1": 90.0, "site-2": 11.0, "site-3": 12.0}


async def test_a_client_that_is_disabled_has_the_certificate_that_it_had(store: Store) -> None:
    await store.keep_certificate_ends(EPOCH, {"site-1": 10.0}, since_s=1.0)
    await store.set_disabled(EPOCH, "site-1", True)

    assert await store.certificate_ends() == {"site-1": 10.0}


async def test_the_audit_log_gives_the_latest_entries_first(store: Store) -> None:
    entries = [AuditEntry(float(n), "admin@demo", "abort", f"job-{n}", "refused", "why") for n in range(3)]
    for entry in entries:
        await store.audit(EPOCH, entry)

    assert await store.audit_log() == entries[::-1]
    assert await store.audit_log(1) == [entries[2]]


# The store's lifetime -------------------------------------------------------------------------------------------------


async def test_a_store_opened_again_holds_what_it_held(new_store: Store) -> None:
    async with new_store as store:
        lease = await take(store, "server-1")
        await store.add_job(lease.epoch, record())
        await store.commit_round(lease.epoch, JOB, commit(0), now_s=1.0)
        await store.issue_tasks(lease.epoch, JOB, [task("site-1"), task("site-2")])
        await store.accept_answer(lease.epoch, JOB, answer("site-1"))
        before = await everything(store)

    async with new_store as store:
        assert await everything(store) == before
        assert await store.lease() == lease
        assert await store.renew_lease(lease.epoch) == changed(lease, beat=1)


async def test_who_waits_for_the_lease_hears_that_the_store_is_closed(new_store: Store) -> None:
    await new_store.open()
    waiting = asyncio.create_task(new_store.lease_moved(await new_store.lease(), within_s=60))
    await asyncio.sleep(0)

    await new_store.close()

    async with asyncio.timeout(10):
        with pytest.raises(StoreFailed, match="not open"):
            await waiting


async def test_a_closed_store_says_so(new_store: Store) -> None:
    with pytest.raises(StoreFailed, match="not open"):
        await new_store.jobs()
    async with new_store:
        with pytest.raises(StoreFailed, match="open already"):
            await new_store.open()
    await new_store.close()
    for call in (new_store.jobs(), take(new_store, "server-1")):
        with pytest.raises(StoreFailed, match="not open"):
            await call


async def test_writes_asked_for_together_all_happen_or_fail_alone(running: Store) -> None:
    sites = [f"site-{n}" for n in range(50)]
    await running.issue_tasks(EPOCH, JOB, [task(site) for site in sites])

    outcomes = await asyncio.gather(
        *(running.accept_answer(EPOCH, JOB, answer(site)) for site in [*sites, "nobody", "site-7"]),
        return_exceptions=True,
    )

    assert outcomes[:50] == [answer(site) for site in sites]
    assert isinstance(outcomes[50], NotFound)
    assert outcomes[51] == answer("site-7")
    assert len((await running.snapshot(JOB)).answers) == 50


# Where a store is -----------------------------------------------------------------------------------------------------


async def test_a_file_is_named_by_its_path_or_by_a_url(path: Path) -> None:
    async with SqlStore(path) as one, SqlStore(f"sqlite:///{path}") as other:
        await take(one, "server-1")

        assert await other.lease() == await one.lease()


@pytest.mark.parametrize(
    "url",
    [
        "",
        "store.db",
        "/srv/hanse/store.db",
        "sqlite:///relative.db",
        "sqlite://",
        "sqlite://host/store.db",
        "sqlite:////srv/store.db?mode=ro",
        "postgres://hanse@db.example/hanse",
        "postgresql+asyncpg://hanse@db.example/hanse",
        "mysql://hanse:s3cret@db.example/hanse?password=s3cret",
        "postgresql://hanse@db.example:s3cret/hanse",
    ],
)
def test_what_names_no_database_that_hanse_can_use_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match=r"^store is .*; expected sqlite:////.* or postgresql://") as caught:
        SqlStore(url)
    assert "s3cret" not in str(caught.value)


# What a database adds: servers beside each other, and life after a kill ---------------------------------------------


async def test_a_deposed_server_writes_nothing_beside_its_successor(where: Where) -> None:
    async with SqlStore(where) as old, SqlStore(where) as new:
        first = await take(old, "server-1")
        await old.add_job(first.epoch, record())
        second = await take(new, "server-2", seen=first)

        with pytest.raises(StaleEpoch):
            await old.commit_round(first.epoch, JOB, commit(0), now_s=32.0)
        await new.commit_round(second.epoch, JOB, commit(0), now_s=32.0)

        assert await old.snapshot(JOB) == await new.snapshot(JOB) == RunState(commit(0).state)


@pytest.mark.parametrize("is_held", [False, True])
async def test_of_many_who_may_take_the_lease_at_once_one_gets_it(where: Where, is_held: bool) -> None:
    async with AsyncExitStack() as opened:
        stores = [await opened.enter_async_context(SqlStore(where)) for _ in range(4)]
        for turn in range(5):
            if is_held:
                await take(stores[0], f"holder-{turn}", force=True)
            elif turn:
                await stores[0].release_lease((await stores[0].lease()).epoch)
            seen = await stores[0].lease()

            outcomes = await asyncio.gather(
                *(take(store, f"server-{n}", seen=seen if is_held else None) for n, store in enumerate(stores)),
                return_exceptions=True,
            )

            assert sorted(type(outcome).__name__ for outcome in outcomes) == ["Conflict"] * 3 + ["Lease"]
            assert await stores[1].lease() in outcomes


async def test_who_waits_for_the_lease_hears_of_what_another_server_does_to_it(where: Where) -> None:
    async with SqlStore(where) as one, SqlStore(where) as other:
        seen = await take(one, "server-1")
        for move in (one.renew_lease, one.release_lease):
            waiting = asyncio.ensure_future(other.lease_moved(seen, within_s=3600.0))
            await other.standbys(within_s=60)
            await move(seen.epoch)

            seen = await waiting
            assert seen == await one.lease()


async def test_a_takeover_ends_the_writes_of_the_tenure_before_at_once(where: Where) -> None:
    async with SqlStore(where) as old, SqlStore(where) as new:
        for _ in range(5):
            epoch = (await take(old, "server-1", force=True)).epoch
            are_busy = [asyncio.Event() for _ in range(4)]
            writing = [asyncio.ensure_future(audit_until_refused(old, epoch, is_busy)) for is_busy in are_busy]
            for is_busy in are_busy:
                await is_busy.wait()

            await take(new, "server-2", force=True)
            written = len(await new.audit_log(100_000))

            await asyncio.gather(*writing)
            assert len(await new.audit_log(100_000)) == written


async def audit_until_refused(store: Store, epoch: int, is_busy: asyncio.Event) -> None:
    with suppress(StaleEpoch):
        for number in itertools.count():
            await store.audit(epoch, AuditEntry(float(number), "a", "b", "c", "ok"))
            if number == 3:
                is_busy.set()


async def test_writers_of_two_processes_worth_of_connections_do_not_lose_each_others_work(where: Where) -> None:
    async with SqlStore(where) as one, SqlStore(where) as two:
        epoch = (await take(one, "server-1")).epoch

        await asyncio.gather(
            *(
                store.add_job(epoch, record(f"job-{name}-{n}"))
                for name, store in (("a", one), ("b", two))
                for n in range(20)
            )
        )

        assert len(await one.jobs()) == len(await two.jobs()) == 40


async def test_a_cancelled_caller_leaves_the_store_usable(where: Where) -> None:
    async with SqlStore(where) as store:
        epoch = (await take(store, "server-1")).epoch
        adding = asyncio.ensure_future(store.add_job(epoch, record()))
        await asyncio.sleep(0)
        adding.cancel()
        with pytest.raises(asyncio.CancelledError):
            await adding

        # The write was asked for before the next operation, so it has happened by then.
        assert await store.job(JOB) == record()


async def test_what_was_answered_before_a_kill_is_there_after_it(where: Where) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.storage.committing",
        str(where),
        stdout=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    answered = -1
    while answered < 20:
        answered = int(await process.stdout.readline())
    os.kill(process.pid, signal.SIGKILL)
    rest = (await process.stdout.read()).split()
    assert await process.wait() == -signal.SIGKILL
    answered = int(rest[-1]) if rest else answered

    async with SqlStore(where) as store:
        run = await store.snapshot(JOB)
        rounds = await store.rounds(JOB)

    # The last commit may have been durable before its answer was printed.
    assert run.state is not None
    assert run.state.round in (answered, answered + 1)
    assert [view.round for view in rounds] == list(range(run.state.round + 1))
    keys = [each.key for each in run.tasks] + [each.key for each in run.answers]
    assert all(key.round == run.state.round + 1 for key in keys)
