"""What one run has written down, and what it writes: whatever counts is here before anybody is told that it does.

Tasks, answers and rounds go into the store, each after the tensors that it names are kept. Answers are written while
work goes on, so a round is committed after the answers before it, and an answer after the task that it is for.
"""

import asyncio
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

from hanse.errors import Conflict, NotFound, StoreFailed
from hanse.ids import Digest, JobId
from hanse.job import ENDED, JobRecord, JobState
from hanse.messages import CommitRound, IssueTasks, StateRef, TaskAssignment, TaskKey, TaskResult
from hanse.server.mending import Mending
from hanse.server.run_folder import RunFolder
from hanse.server.run_services import RunServices
from hanse.server.run_tensors import needed_tensors, without_lost
from hanse.storage.models import digests_of, state_digests
from hanse.storage.records import RunState
from hanse.storage.tensors import TensorFiles


class RunJournal:
    """The journal of one run, whose tensors are *files*; it remembers what is kept of these already.

    Every method raises ``StoreFailed`` where store or disk do not do it. *mending* is told of that, and when they
    do; but ``mend`` leaves that to its caller.
    """

    def __init__(
        self, job_id: JobId, folder: RunFolder, files: TensorFiles, services: RunServices, mending: Mending
    ) -> None:
        self._job_id = job_id
        self._folder, self._files = folder, files
        self._services = services
        self._store, self._epoch = services.store, services.epoch
        self._kept: set[Digest] = set()
        self._named: set[Digest] = set()  # by the committed state, and by the models of tasks that are written
        self._unwritten: dict[TaskKey, TaskResult] = {}
        self._issuing: set[asyncio.Task[None]] = set()
        self._accepting: set[asyncio.Task[None]] = set()
        self._turn_over = asyncio.Event()  # of the answer that was accepted last
        self._turn_over.set()
        self._mending = mending

    # what is in it

    async def read(self) -> RunState:
        """Return where the run stands."""
        try:
            state = await self._store.snapshot(self._job_id)
        except StoreFailed as failed:
            self._mending.failed_to_read(failed)
            raise
        self._mending.can_be_read()
        for model in (task.model for task in state.tasks if task.model is not None):
            self._named.update(digests_of(model))
        if state.state is not None:
            self._named |= state_digests(state.state)
        return state

    def names(self, digests: Collection[Digest]) -> bool:
        """Return whether a server that took the run up now would have these tensors."""
        return self._named.issuperset(digests)

    def unwritten(self, key: TaskKey) -> TaskResult | None:
        """Return the answer to the task that was accepted, if it is not known to be written."""
        return self._unwritten.get(key)

    # what goes into it

    def issue(self, issue: IssueTasks, tasks: Sequence[TaskAssignment]) -> asyncio.Task[None]:
        """Begin to write *tasks* down, and return what is done when they are."""
        issuing = asyncio.create_task(self._issued(issue, tasks), name=f"journal tasks of {self._job_id}")
        self._issuing.add(issuing)
        issuing.add_done_callback(self._issuing.discard)
        return issuing

    async def _issued(self, issue: IssueTasks, tasks: Sequence[TaskAssignment]) -> None:
        digests = digests_of(issue.model) if issue.model is not None else ()
        with self._storing():
            await self._keep(digests)
            await self._store.issue_tasks(self._epoch, self._job_id, tasks)
        self._named.update(digests)

    async def accept(self, answer: TaskResult) -> None:
        """Write *answer* down, or return when an earlier attempt to of which the store could not tell has done so.

        A commit that may delete its task waits for that, too. Whoever takes the run up hears of answers in the order of
        their writing, so that is the order in which they come here, however long it takes to keep their tensors.
        """
        self._unwritten[answer.key] = answer
        before, turn_over = self._turn_over, asyncio.Event()
        self._turn_over = turn_over
        accepting = asyncio.create_task(
            self._accepted(answer, before, turn_over), name=f"journal an answer of {self._job_id}"
        )
        accepting.add_done_callback(lambda _: turn_over.set())
        self._accepting.add(accepting)
        try:
            await accepting
        finally:
            self._accepting.discard(accepting)

    async def _accepted(self, answer: TaskResult, before: asyncio.Event, turn_over: asyncio.Event) -> None:
        model = None if answer.update is None else answer.update.model
        with self._storing():
            await self._keep(() if model is None else digests_of(model))
            if self._issuing:  # a client may be done before its task is written down
                await asyncio.wait(tuple(self._issuing))
            await before.wait()
            turn_over.set()  # the store writes in the order in which it is asked
            try:
                await self._store.accept_answer(self._epoch, self._job_id, answer)
            except NotFound as error:  # the store could not take it just now
                raise StoreFailed("accepting an answer", "its task is not in the journal yet") from error
        self._unwritten.pop(answer.key, None)

    async def commit(self, commit: CommitRound, *, carried: Collection[Digest]) -> None:
        """Write a round down, after its answers. Of the tensors *carried* those that are here are kept with its own."""
        if self._accepting:  # answers of this round, which end with it
            await asyncio.wait(tuple(self._accepting))
        with self._storing():
            await self._keep(state_digests(commit.state).union(carried) - set(self._files.missing(carried)))
            await self._store.commit_round(self._epoch, self._job_id, commit, now_s=self._services.wall())

    def committed(self, state: StateRef, carried: Collection[TaskKey]) -> None:
        """Take note that the store has *state*, and of its tasks those *carried*."""
        self._named = state_digests(state)
        self._unwritten = {key: answer for key, answer in self._unwritten.items() if key in carried}

    async def note(self, record: JobRecord) -> None:
        """Write *record* down, the job's own in the state that it is in."""
        with self._storing():
            await self._store.replace_job(self._epoch, record, was=record.state)

    async def end(self, record: JobRecord, *, was: JobState) -> JobRecord:
        """Write the job's end down, and return it: *record*, or the end that the store took without telling so."""
        try:
            with self._storing():
                await self._store.end_run(self._epoch, record, was=was)
        except (Conflict, StoreFailed):
            stored = await self._store.job(self._job_id)
            if stored.state not in ENDED:
                raise
            return stored
        return record

    # its tensors

    async def keep_result(self, digest: Digest) -> None:
        """Return when the run's result survives whatever happens to this process."""
        with self._storing():
            await self._folder.keep_result(digest)

    def retain(self, digests: Collection[Digest]) -> None:
        """Take note that all tensors but *digests* are about to be deleted."""
        self._kept.intersection_update(digests)

    async def mend(self, answered: Collection[TaskKey]) -> Sequence[TaskAssignment] | None:
        """Have the journal name no tensor that is lost; return the tasks to answer again, or ``None`` where none was.

        What another place has kept is fetched from there; answers whose tensors nobody has are taken back. *answered*
        are the tasks whose answers the run has: among them may be some whose answers the store has taken back before,
        and could not say so.

        Raises:
            TensorsLost: the run cannot be without them.
        """
        written = set(answered) - self._unwritten.keys()
        state = await self._store.snapshot(self._job_id)
        lost = [digest for digest in needed_tensors(state) if not await asyncio.to_thread(self._files.verify, digest)]
        was_lost = bool(lost)
        if lost:
            self._kept.difference_update(lost)
            lost = await self._folder.restore_tensors(self._files, lost)
        if lost:
            written.update(answer.key for answer in state.answers)
            state = await without_lost(self._store, self._epoch, self._job_id, state, lost)
        again = [task for task in state.tasks if task.key in written]
        return again if was_lost or again else None

    async def _keep(self, digests: Collection[Digest]) -> None:
        """Return when the run's tensors *digests* survive whatever happens to this process."""
        if new := set(digests) - self._kept:
            await self._folder.keep_tensors(self._files, new)
            self._kept |= new

    @contextmanager
    def _storing(self) -> Iterator[None]:
        """Take note of how the store takes what it is to write within the block."""
        try:
            yield
        except StoreFailed as failed:
            self._mending.failed(failed)
            raise
        self._mending.mended()
