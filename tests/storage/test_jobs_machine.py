"""Any order of submissions, moves and ends by servers with good and with stale epochs, against the table of moves."""

import asyncio
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from hanse.errors import Conflict, HanseError, NotFound, StaleEpoch
from hanse.ids import JobId
from hanse.job import ENDED, LEGAL, JobRecord, JobState
from hanse.storage.memory import MemoryStore
from hanse.storage.records import Store
from hanse.storage.store import SqlStore

from .samples import record, take, task

states = st.sampled_from(JobState)
ids = st.sampled_from([JobId(f"digits-{number}") for number in range(4)])
TASK = task(round_number=0)

is_current = st.sampled_from([True, True, True, False])


class JobsMachine(RuleBasedStateMachine):
    """A store, and beside it what its jobs and their tasks must be."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.store = self.new_store()
        # The model.
        self.epoch = 0
        self.jobs: dict[JobId, JobRecord] = {}
        self.asked: set[JobId] = set()

    def new_store(self) -> Store:
        raise NotImplementedError

    def run(self, call: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(call)

    def outcome(self, call: Coroutine[Any, Any, object]) -> type[HanseError] | None:
        try:
            self.run(call)
        except HanseError as error:
            return type(error)
        return None

    def epoch_of(self, is_current: bool) -> int:
        return self.epoch if is_current else self.epoch - 1

    @initialize()
    def open(self) -> None:
        self.run(self.store.open())
        self.take_over()

    def teardown(self) -> None:
        self.run(self.store.close())
        self.loop.close()

    @rule()
    def take_over(self) -> None:
        self.epoch = self.run(take(self.store, "a", force=True)).epoch

    @rule(job_id=ids, submitter=st.sampled_from(["ada@demo", "bob@demo"]), is_current=is_current)
    def submit(self, job_id: JobId, submitter: str, is_current: bool) -> None:
        new = record(job_id, state=JobState.SUBMITTED, submitter=submitter)
        got = self.outcome(self.store.add_job(self.epoch_of(is_current), new))
        if not is_current:
            assert got is StaleEpoch
        elif self.jobs.get(job_id, new) != new:
            assert got is Conflict
        else:
            assert got is None, "a submission that is repeated is the same one"
            self.jobs[job_id] = new

    @rule(job_id=ids, was=states, to=states, is_current=is_current, is_end=st.booleans())
    def move(self, job_id: JobId, was: JobState, to: JobState, is_current: bool, is_end: bool) -> None:
        new = msgspec.structs.replace(record(job_id), state=to, reason="because")
        write = self.store.end_run if is_end else self.store.replace_job
        got = self.outcome(write(self.epoch_of(is_current), new, was=was))
        if not is_current:
            assert got is StaleEpoch
        elif job_id not in self.jobs:
            assert got is NotFound
        elif self.jobs[job_id] != new and (self.jobs[job_id].state is not was or to not in LEGAL[was] | {was}):
            assert got is Conflict
        else:
            assert got is None, "what the store has already, whoever writes it again may think lost"
            self.jobs[job_id] = new
            if is_end:
                self.asked.discard(job_id)

    @rule(job_id=ids, is_current=is_current)
    def ask(self, job_id: JobId, is_current: bool) -> None:
        got = self.outcome(self.store.issue_tasks(self.epoch_of(is_current), job_id, [TASK]))
        if not is_current:
            assert got is StaleEpoch
        elif job_id not in self.jobs:
            assert got is NotFound
        elif self.jobs[job_id].state in ENDED:
            assert got is Conflict
        else:
            assert got is None
            self.asked.add(job_id)

    @invariant()
    def the_store_has_what_was_written_and_nothing_else(self) -> None:
        if self.epoch == 0:
            return
        assert {each.job_id: each for each in self.run(self.store.jobs())} == self.jobs
        for state in JobState:
            found = {each.job_id for each in self.run(self.store.jobs(states=(state,)))}
            assert found == {job_id for job_id, each in self.jobs.items() if each.state is state}
        for job_id in self.jobs:
            assert self.run(self.store.snapshot(job_id)).tasks == ((TASK,) if job_id in self.asked else ())


class MemoryJobs(JobsMachine):
    def new_store(self) -> Store:
        return MemoryStore()


class SqlJobs(JobsMachine):
    def new_store(self) -> Store:
        self.folder = tempfile.TemporaryDirectory(prefix="hanse-jobs-")
        return SqlStore(Path(self.folder.name) / "store.db")

    def teardown(self) -> None:
        super().teardown()
        self.folder.cleanup()


TestMemoryJobs = MemoryJobs.TestCase
TestMemoryJobs.settings = settings(max_examples=60, deadline=None)
TestSqlJobs = SqlJobs.TestCase
TestSqlJobs.settings = settings(max_examples=25, deadline=None)
