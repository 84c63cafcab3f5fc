"""One job while it runs, the server's side: it journals what the run decides, and hands tasks and answers across.

The run's process (workflow, aggregation) and each client's process talk to their ``ActiveRun`` and never to each other.
Whatever counts is in the store before anybody is told that it does: an answer before its sender hears that it was
accepted, a round before the next one begins. Meanwhile work goes on: a task is on its way to its client, and an answer
to the run's process, while they are being written, for whatever comes of them is written behind them, by one writer.
``coordination.runs.Run`` holds the decisions and mirrors the journal; ``run_journal.RunJournal`` writes it;
``run_process.OwnProcess`` keeps the run's own process alive, and ``client_processes.ClientProcesses`` the clients'.
This class owns the tensor files and the order of things.
"""

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import msgspec

from hanse.cell.link import Peer
from hanse.coordination.runs import Accepted, Duplicate, Early, Run, Stale
from hanse.coordination.waiting import (
    END_TRIED_AGAIN,
    IF_NEEDED,
    Ask,
    StoreTrouble,
    asks_taken_up,
    asks_untold,
    views_of,
    waiting_of_running,
    with_issue,
)
from hanse.errors import (
    HanseError,
    InternalError,
    NotFound,
    NotInService,
    ProtocolError,
    StoreFailed,
    TensorsLost,
    UpdateRejected,
    WorkflowFailed,
)
from hanse.events import EventType, FLContext
from hanse.ids import SERVER, ClientName, Digest, Fqcn, JobId, job_cell
from hanse.job import ENDED, FailedClient, JobRecord, JobState, move
from hanse.launch.log_lines import FieldLogger
from hanse.messages import (
    AbortJob,
    AbortRun,
    Channel,
    ClientChanged,
    ClientView,
    CommitRound,
    IssueTasks,
    JobEvent,
    LogMetrics,
    Message,
    ModelRef,
    RunEnded,
    RunSnapshot,
    StateRef,
    TaskAssignment,
    TaskCancelled,
    TaskFault,
    TaskKey,
    TaskResult,
    Waiting,
)
from hanse.model import TensorMismatch
from hanse.server.bounds import MAX_CODE_CHARS, check_metrics, ending, shortened
from hanse.server.causes import cause_of, code_of
from hanse.server.client_processes import ClientProcesses
from hanse.server.inbox import Inbox
from hanse.server.lifetime import start_in
from hanse.server.mending import Mending
from hanse.server.run_folder import RunFolder
from hanse.server.run_journal import RunJournal
from hanse.server.run_process import OwnProcess, is_set_within
from hanse.server.run_services import RunServices
from hanse.storage.models import check_ref, digests_of, state_digests
from hanse.storage.records import RunState
from hanse.storage.tensors import TensorFiles

_log = logging.getLogger(__name__)

HAND_OVER_TIMEOUT_S: Final = 30.0
"""How long a run's process may take to hear of an answer; it has a loop of its own for that."""
STORE_PAUSE_S: Final = 5.0
"""What the store did not take is tried again after this: nobody tells when it would."""
MAX_LOGS_PER_S: Final = 200
"""More events with metrics of one client are dropped; a site's own part sends half as many at most."""
_OF_LOST: Final = frozenset({NotFound.code, ProtocolError.code})
"""Of these faults the cause may be a tensor that is lost here: it is not found, or is another."""
ABORTED: Final = "aborted"
"""The code of a run that was aborted, by a person or in its own process."""
ENDINGS: Final = {
    JobState.COMPLETED: EventType.JOB_COMPLETED,
    JobState.FAILED: EventType.JOB_FAILED,
    JobState.ABORTED: EventType.JOB_ABORTED,
}


class ActiveRun:
    """One job while it runs; ``live`` is its life. Whatever happens in it, *emit* is told.

    *suspect* is called when a client has become suspect by itself, and may in time be lost.
    """

    def __init__(
        self,
        record: JobRecord,
        run: Run,
        folder: RunFolder,
        services: RunServices,
        *,
        emit: Callable[[JobEvent], None],
        suspect: Callable[[], None] = lambda: None,
    ) -> None:
        self.record = record
        self.run = run
        self.folder = folder
        self.files = TensorFiles(folder.tensors)
        self._mending = Mending(within_s=services.mend_within_s, now=services.now, give_up=self._give_up)
        self._journal = RunJournal(record.job_id, folder, self.files, services, self._mending)
        self._services = services
        self._emit = emit
        self._log = FieldLogger(_log, {"job": record.job_id})
        self._over = asyncio.Event()
        self._ending = asyncio.Lock()
        self._end_held_up: StoreTrouble | None = None
        self._group: asyncio.TaskGroup | None = None
        self._work: set[asyncio.Task[None]] = set()
        self._process = OwnProcess(record, folder, services, over=self._over, gone=self._process_gone, mend=self._mend)
        self.processes = ClientProcesses(
            record,
            run,
            services,
            over=self._over,
            spawn=self._spawn,
            changed=self._changed,
            suspect=suspect,
        )
        self._asks: tuple[Ask, ...] = asks_taken_up(run, now=services.now())
        self._inboxes: dict[ClientName, Inbox] = {}
        self._arriving: Counter[Digest] = Counter()
        self._withheld: set[TaskKey] = set()  # out, but told to nobody before they are journalled
        self._refusals: dict[TaskKey, str] = {}
        self._failed = {failed.client: failed for failed in record.failed_clients}
        self._clearing = asyncio.Lock()
        self._committing = asyncio.Lock()
        self._attaching = 0
        self._attached_over: Peer | None = None
        self._logged: dict[ClientName, tuple[int, int]] = {}
        self._round_announced = -1
        self._round_done = run.committed_round

    @property
    def job_id(self) -> JobId:
        """The job's id."""
        return self.record.job_id

    @property
    def has_ended(self) -> bool:
        """Whether the job has ended, for whatever reason."""
        return self.record.state in ENDED

    # its life

    async def live(
        self, *, resumed: bool = False, heard: Mapping[ClientName, bool] = MappingProxyType({})
    ) -> JobRecord:
        """Run the job to its end, and return it; cancelled, it is parked: its processes here end, its state stays.

        A resumed run does not start clients' processes by itself: they may be running, as their next heartbeats tell.
        *heard* is what those have told that came already: whether the client runs the job.
        """
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                if resumed:
                    self.processes.take_up(heard)
                else:
                    self.processes.begin()
                if (given_up := await self._process.keep_alive()) is not None:
                    code, reason, log_tail = given_up.code, given_up.reason, given_up.log_tail
                    await self.end_once_stored(JobState.FAILED, code=code, reason=reason, log_tail=log_tail)
                self._group = None
                for task in self._work:
                    task.cancel()
        finally:
            self._mending.mended()
            if self.folder.mirror is not None:
                await self.folder.mirror.close()
        async with self._ending:  # whoever ended it has told everybody
            return self.record

    async def end(
        self,
        to: JobState,
        *,
        code: str = "",
        reason: str = "",
        client: str = "",
        cause: str = "",
        log_tail: str = "",
        ended: RunEnded | None = None,
    ) -> None:
        """End the job as *to*: in the store first, then everywhere; the first end counts.

        ``JobRecord`` says what *code* to *log_tail* are.
        """
        async with self._ending:
            if self.has_ended:
                return
            record = move(
                msgspec.structs.replace(self.record, failed_clients=()),
                to,
                at=self._services.wall(),
                code=shortened(code, MAX_CODE_CHARS),
                reason=shortened(reason),
                client=client,
                cause=shortened(cause, MAX_CODE_CHARS),
                log_tail=ending(log_tail),
            )
            if ended is not None:
                record = msgspec.structs.replace(record, result=ended.result, result_bytes=ended.result_bytes)
            self.record = record = await self._journal.end(record, was=self.record.state)
            self._over.set()
            self.run.end(now=self._services.now())
            self._services.handlers.tell(EventType.END_RUN, self._context(round_number=self.run.round))
            self._notify(ENDINGS[record.state], reason=record.reason, text=record.reason)
            why = record.reason or record.state.value
            self._tell_run("abort", AbortRun(why))
            for client in self.run.clients:
                self._tell(Fqcn(client), Channel.JOB, "abort", AbortJob(self.job_id, why))

    async def end_once_stored(
        self, to: JobState, *, code: str, reason: str, client: str = "", log_tail: str = ""
    ) -> None:
        """End the job as ``end`` does, as soon as the store takes that: nobody else will end it for this reason."""
        began = self._services.now()
        while True:
            try:
                await self.end(to, code=code, reason=reason, client=client, log_tail=log_tail)
                return
            except StoreFailed as failed:
                self._log.error("the end waits for the store", extra={"code": code, "reason": failed.reason})
                again_at = self._services.now() + STORE_PAUSE_S
                self._end_held_up = StoreTrouble(failed.reason, began, again_at, END_TRIED_AGAIN)
            if await is_set_within(self._over, STORE_PAUSE_S):
                return

    async def _mend(self) -> bool:
        """Do as ``_ask_for_lost``, as soon as the store lets it: a process that begins before that fails."""
        while True:
            with contextlib.suppress(StoreFailed):
                return await self._ask_for_lost()
            if await is_set_within(self._over, STORE_PAUSE_S):
                return True

    def _give_up(self, failed: StoreFailed) -> None:
        """End the job because of what *failed* and was not mended in time."""
        ending = self.end_once_stored(JobState.FAILED, code=failed.code, reason=failed.reason)
        self._spawn(ending, f"give up {self.job_id}")

    async def _ask_for_lost(self, told_by: TaskKey | None = None) -> bool:
        """Have the run go on without the tensors that are lost here; return whether any were.

        Answers whose tensors nobody has are asked for again; the job ends if it cannot be without. For each task,
        *told_by*, that is done once, however often its client tells of it.
        """
        try:
            async with self._committing:  # what a commit deletes is not lost
                if told_by is not None and self.run.task(told_by) is None:
                    return False
                tasks = await self._journal.mend([answer.key for answer in self.run.answers])
                again = self.run.retract(tasks or ())
        except TensorsLost as error:
            await self.end(JobState.FAILED, code=error.code, reason=error.reason)
            return True
        except StoreFailed as failed:
            self.store_failed(failed)
            raise
        for task in again:
            await self._send(task)
        return tasks is not None

    # what the run's process asks

    def _process_gone(self) -> None:
        """Take note that the run's process has ended: the next one says anew until when it waits for answers."""
        self._asks = asks_untold(self._asks)

    def beats(self) -> None:
        """Take note that the run's process lives."""
        self._process.beats()

    async def attach(self) -> RunSnapshot:
        """Return where the run stands, having handed over its answers: its process is there, and begins or goes on.

        A commit that an earlier process has asked for comes first, whatever becomes of it.
        """
        self._services.handlers.tell(EventType.START_RUN, self._context(round_number=self.run.round))
        link = self._process_link()
        self._attaching += 1  # an answer that is accepted meanwhile waits for those before it
        try:
            state = await self._caught_up()
            self._process.works()
            handed: dict[TaskKey, TaskResult] = {}
            while coming := [answer for answer in self.run.answers if handed.get(answer.key) is not answer]:
                await self._hand_over(coming)
                handed.update((answer.key, answer) for answer in coming)
            self._attached_over = link
        finally:
            self._attaching -= 1
        return RunSnapshot(
            self.job_id,
            self.record.spec,
            self.run.clients,
            state.state,
            lost_clients=self.run.lost_clients,
            carried=self.run.carried,
            failed_clients=self.run.failed_clients,
            counted=self.run.counted,
        )

    async def _caught_up(self) -> RunState:
        """Return what the journal holds, when no commit is under way and the run knows of the last one."""
        async with self._committing:
            state = await self._journal.read()
            if state.state is not None and state.state.round == self.run.round:
                # The store could not say that it had committed the round, and who would have asked again has died.
                journalled = [task.key for task in state.tasks] + [answer.key for answer in state.answers]
                await self._end_round(state.state, set(journalled) - set(self.run.unknown(journalled)))
        return state

    async def issue(self, issue: IssueTasks) -> None:
        """Journal the tasks, send those that are new, and hand over the answers of those that have one.

        Tasks are on their way while they are being journalled; a server that dies in between issues them again. Not so
        those with a model that the journal does not name yet: the next server would not have it for whoever is at them.
        """
        tasks = [TaskAssignment(key, issue.model, issue.config, issue.expects_model) for key in issue.keys]
        new = self.run.issue(tasks)
        if not self._journal.names(digests_of(issue.model) if issue.model is not None else ()):
            self._withheld.update(issue.keys)
        writing = self._journal.issue(issue, tasks)
        self._asks = with_issue(self._asks, issue, run=self.run, now=self._services.now())
        if new and self.run.round != self._round_announced:
            self._round_announced = self.run.round
            self._notify(EventType.ROUND_STARTED, round_number=self.run.round)
        for task in new:
            if (reason := self._refusal_of(task)) is None:
                self._hand_out(task)
            else:
                self._refusals[task.key] = reason
        await writing
        for key in self._withheld.intersection(issue.keys):
            self._withheld.discard(key)
            if key not in self._refusals and (known := self.run.task(key)) is not None:
                self._hand_out(known)
        for key in issue.keys:
            if (reason := self._refusals.pop(key, None)) is not None:
                await self._accept(key.client, _refused(key, reason))
        asked = frozenset(issue.keys)
        await self._hand_over([answer for answer in self.run.answers if answer.key in asked])

    async def _hand_over(self, answers: Sequence[TaskResult]) -> None:
        """Hand *answers* to the run's process, which may know them; asked and not told, as many would fill the link."""
        for answer in answers:
            await self._services.cell.ask(
                job_cell(SERVER, self.job_id), Channel.RUN, "answer", answer, timeout_s=HAND_OVER_TIMEOUT_S
            )

    async def cancel(self, keys: Collection[TaskKey]) -> None:
        """Refuse later answers to *keys*, and tell the clients."""
        for key in self.run.cancel(keys):
            self._tell(self._cell_of(key.client), Channel.TASK, "cancelled", TaskCancelled(key))

    async def commit(self, commit: CommitRound) -> None:
        """Commit a round: its tensors, then its state; then delete what only it needed.

        The run's process waits for this, so it writes no tensor while others are deleted.
        """
        check_metrics(commit.state.metrics)
        if strangers := set(commit.answered) - set(self.run.clients):
            raise ProtocolError("CommitRound.answered", got=min(strangers), expected="clients of the run")
        async with self._committing:
            carried = frozenset(commit.carried if commit.state.round == self.run.round else self.run.carried)
            if unknown := self.run.unknown(carried):
                raise ProtocolError("CommitRound.carried", got=min(unknown, key=str), expected="tasks out or answered")
            needed, kept = state_digests(commit.state), self._needed_by(carried)
            if missing := self.files.missing(needed):
                got = f"digest {missing[0]} without a file"
                raise ProtocolError("state", got=got, expected="tensors that are stored")
            await self._failures_noted()  # before a round that went on without them counts
            await self._journal.commit(commit, carried=kept)
            await self._end_round(commit.state, carried)

    async def _end_round(self, state: StateRef, carried: Collection[TaskKey]) -> None:
        """Take note that *state* is committed, and delete what only its round needed."""
        self._process.progressed()
        self._journal.committed(state, carried)
        self._withheld.clear()
        for key in self.run.committed(state.round, carried=carried):
            self._tell(self._cell_of(key.client), Channel.TASK, "cancelled", TaskCancelled(key))
        try:
            await self._clear(state_digests(state))
        except StoreFailed as failed:  # the round is committed; whoever has asked for that asks again
            self.store_failed(failed)
            raise
        if self._round_done < state.round:
            self._round_done = state.round
            self._notify(EventType.ROUND_DONE, round_number=state.round, metrics=state.metrics)

    async def _clear(self, needed: set[Digest]) -> None:
        """Delete all tensors but those *needed*, and those of tasks that live on: models, answers, what is coming."""
        self._inboxes = {client: inbox for client, inbox in self._inboxes.items() if self.run.tasks_for(client)}
        async with self._clearing:
            begun = [inbox.begun for inbox in self._inboxes.values()]
            kept = needed.union(self._needed_by(frozenset(self.run.carried)), *begun, self._arriving)
            self._journal.retain(kept)
            doomed = await asyncio.to_thread(self.files.set_aside, kept)
            objects = mirror.set_aside(kept) if (mirror := self.folder.mirror) is not None else []
        self._spawn(self._delete_files(doomed), f"delete tensors of {self.job_id}")
        if mirror is not None and objects:
            self._spawn(mirror.delete(objects), f"delete objects of {self.job_id}")

    async def _delete_files(self, paths: Sequence[Path]) -> None:
        """Delete files that were set aside; those that cannot be deleted go with the run's folder, at its end."""
        try:
            await asyncio.to_thread(self.files.delete_files, paths)
        except StoreFailed as failed:
            self._log.warning("tensors left behind", extra={"reason": failed.reason})

    def _needed_by(self, keys: frozenset[TaskKey]) -> set[Digest]:
        """Return the tensors of these tasks' models, and of their answers."""
        models = [task.model for task in self.run.tasks if task.key in keys]
        models += [answer.update.model for answer in self.run.answers if answer.update and answer.key in keys]
        return set().union(*(digests_of(model) for model in models if model is not None))

    async def ended(self, end: RunEnded) -> None:
        """Take the run's process's word that it has reached its end, or cannot go on just now."""
        if end.again:
            self._process.hindered(end)
            return
        if not end.completed and end.code == ABORTED:
            await self.end(JobState.ABORTED, code=ABORTED, reason=end.reason)
            return
        if not end.completed:
            code, reason = end.code or WorkflowFailed.code, end.reason or "no reason given"
            if end.client not in self.run.clients:
                await self.end(JobState.FAILED, code=code, reason=reason, log_tail=await self._process.log_tail())
                return
            trouble = self.processes.cause_of(ClientName(end.client), end.cause)
            await self.end(
                JobState.FAILED,
                code=code,
                reason=reason,
                client=end.client,
                cause=trouble.code,
                log_tail=trouble.log_tail if trouble.code else "",
            )
            return
        if end.result and not (self.folder.result / end.result).is_file():
            raise ProtocolError("result", got=end.result, expected="a file in the run's folder")
        if end.result:
            await self._journal.keep_result(end.result)
        await self.end(JobState.COMPLETED, ended=end)

    # what clients' processes send

    async def result(self, sender: ClientName, result: TaskResult, message: Message) -> None:
        """Accept *sender*'s answer if it is one that the run waits for and what the job expects.

        An update that is not becomes a fault, so that the run does not wait for an answer that will not come.

        Raises:
            UpdateRejected: nobody waits for it, or it is not what the job expects; the sentence names the tensor.
            ProtocolError: it names a tensor that was not uploaded: upload it and send the answer again.
            NotInService: its task was out before this server took the run up, and still has to be issued again.
        """
        async with self._keeping(result):
            await self._judged(sender, result, message)

    async def _judged(self, sender: ClientName, result: TaskResult, message: Message) -> None:
        match self.run.judge(result, sender=sender):
            case Duplicate():
                if (unwritten := self._journal.unwritten(result.key)) is not None:
                    await self._journal.accept(unwritten)
                return
            case Stale(reason=reason):
                raise UpdateRejected(sender, f"a stale answer: {reason}")
            case Early():
                key = result.key
                raise NotInService(
                    f"Server not in service: it takes up job {self.job_id}, and has not come to task {key.name!r} of "
                    f"round {key.round} yet"
                )
            case Accepted():
                pass
        task = self.run.task(result.key)
        if task is None:
            raise InternalError(f"looking up the task that {sender} answered")
        rejected = self._objection(sender, task, result, message)
        if rejected is not None:
            result = TaskResult(result.key, fault=TaskFault(rejected.code, rejected.reason))
        if (fault := result.fault) is not None:
            code, log_tail = shortened(fault.code, MAX_CODE_CHARS), ending(fault.log_tail)
            result = TaskResult(
                result.key, fault=TaskFault(code, shortened(fault.reason), fault.retryable, log_tail=log_tail)
            )
            # Whoever got other bytes than a digest names got what is on this disk, or what the network made of it.
            if code in _OF_LOST and await self._ask_for_lost(result.key) and self.has_ended:
                return
        await self._accept(sender, result)
        if rejected is not None:
            raise rejected

    @contextlib.asynccontextmanager
    async def _keeping(self, result: TaskResult) -> AsyncIterator[None]:
        """Have no commit delete the answer's tensors within the block: a carried task is answered at any time."""
        model = None if result.update is None else result.update.model
        digests = set() if model is None else digests_of(model)
        async with self._clearing:
            self._arriving.update(digests)
        try:
            yield
        finally:
            self._arriving -= Counter(digests)

    def inbox(self, client: ClientName) -> Inbox:
        """Return what *client* may add to the run's tensors, until its next answer is accepted or it has no task."""
        inbox = self._inboxes.setdefault(client, Inbox(self.files, client, on_trouble=self.store_failed))
        inbox.expect(self.run.tasks_for(client), may_be_ahead=self.run.may_be_ahead(client))
        return inbox

    def log_metrics(self, sender: ClientName, logged: LogMetrics) -> None:
        """Pass on what training code at *sender* logged; what comes faster than watchers could read is dropped.

        Raises:
            ProtocolError: it is more than is passed on.
        """
        second, count = self._logged.get(sender, (0, 0))
        now = int(self._services.now())
        self._logged[sender] = now, count + 1 if now == second else 1
        if self._logged[sender][1] > MAX_LOGS_PER_S:
            return
        check_metrics(logged.metrics)
        self._emit(
            JobEvent(
                self.job_id,
                "metrics",
                self._services.wall(),
                round=logged.key.round,
                client=sender,
                metrics=logged.metrics,
                text=f"step {logged.step}",
            )
        )

    def _objection(
        self, sender: ClientName, task: TaskAssignment, result: TaskResult, message: Message
    ) -> HanseError | None:
        context = self._context(round_number=task.key.round, peer=sender, message=message)
        if (refused := self._services.handlers.ask(EventType.BEFORE_TASK_RESULT, context)) is not None:
            return UpdateRejected(sender, f"an answer that was refused: {refused}")
        if result.update is None:
            return None
        try:
            check_metrics(result.update.metrics)
        except ProtocolError as too_much:
            return UpdateRejected(sender, f"too much: {too_much.reason}")
        model = result.update.model
        if result.update.num_examples < 0:
            return UpdateRejected(sender, f"num_examples {result.update.num_examples}; the job expects 0 or more")
        if not task.expects_model:
            return None if model is None else UpdateRejected(sender, "a model; the task expects metrics alone")
        if model is None:
            return UpdateRejected(sender, "no model; the task expects one")
        try:
            check_ref(model, task.model or ModelRef())
        except (TensorMismatch, ProtocolError) as mismatch:
            return UpdateRejected(sender, mismatch.reason)
        if missing := self.files.missing(digests_of(model)):
            raise ProtocolError("update", got=f"digest {missing[0]} without a file", expected="uploaded tensors")
        for tensor in model.tensors:
            if tensor.inline is None and (got := self.files.size(tensor.digest)) != tensor.size_bytes:
                what = f"tensor {tensor.name!r} of {got} bytes; the job expects {tensor.size_bytes}"
                return UpdateRejected(sender, what)
        return None

    async def _accept(self, sender: ClientName, result: TaskResult) -> None:
        """Take an answer that counts, and return when it is journalled.

        The run's process has it at once, for whatever it makes of it is written behind it.
        """
        if not isinstance(self.run.accept(result, sender=sender), Accepted):
            return
        self._inboxes.pop(sender, None)
        self._process.gets_answer()
        self.processes.answered(sender, result.fault)
        if not self._attaching and self._attached_over is self._process_link():  # else it comes after those before it
            self._tell_run("answer", result)
        await self._journal.accept(result)
        self._notify(
            EventType.RESULT_ACCEPTED,
            round_number=result.key.round,
            peer=sender,
            metrics=result.update.metrics if result.update is not None else {},
            text=result.fault.reason if result.fault is not None else "",
        )

    async def _send(self, task: TaskAssignment) -> None:
        if (reason := self._refusal_of(task)) is None:
            self._hand_out(task)
        else:
            # The run has the fault, stored or not; a server that takes the run up asks the handler again.
            with contextlib.suppress(StoreFailed):
                await self._accept(task.key.client, _refused(task.key, reason))

    def _refusal_of(self, task: TaskAssignment) -> str | None:
        """Return why a handler does not let the task go to its client, or ``None``."""
        context = self._context(round_number=task.key.round, peer=task.key.client)
        return self._services.handlers.ask(EventType.BEFORE_TASK_DATA, context)

    def _hand_out(self, task: TaskAssignment) -> None:
        if task.key in self._withheld:
            return
        if self._tell(self._cell_of(task.key.client), Channel.TASK, "task", task):
            self._notify(EventType.TASK_SENT, round_number=task.key.round, peer=task.key.client)

    # whom it reaches

    async def cell_up(self, client: ClientName, stream: object) -> None:
        """Take note that *client*'s process is connected: it gets the tasks that it has to answer."""
        if self.processes.stream_up(client, stream):
            await self.send_out(client)

    async def hand_out_again(self) -> None:
        """Send every client again what it has to answer; who has it already takes no notice."""
        for client in self.run.live_clients:
            await self.send_out(client)

    async def send_out(self, client: ClientName) -> None:
        """Send *client* what it has to answer."""
        for task in self.run.tasks_for(client):
            await self._send(task)

    # what it waits for

    def waiting(self, *, looked: StoreFailed | None = None) -> tuple[Waiting, ...]:
        """Return what the run waits for now, for people, whose own look into the store may have failed."""
        store = self._end_held_up or self._mending.trouble
        if store is None and looked is not None:
            now = self._services.now()
            store = StoreTrouble(looked.reason, now, now + self._services.mend_within_s, IF_NEEDED)
        return waiting_of_running(
            self.run,
            asks=self._asks,
            process=self._process.standing,
            store=store,
            absent=self._services.absent(),
            now=self._services.now(),
            wall=self._services.wall(),
        )

    def views(self) -> tuple[ClientView, ...]:
        """Return the run's clients as they stand now, for people."""
        services = self._services
        return views_of(self.run, absent=services.absent(), now=services.now(), wall=services.wall())

    def store_failed(self, failed: StoreFailed) -> None:
        """Take note that the store, or the disk with the tensors, did not do what this run needs; from any thread."""
        self._mending.failed(failed)

    # telling

    def _cell_of(self, client: ClientName) -> Fqcn:
        return job_cell(client, self.job_id)

    def _process_link(self) -> Peer | None:
        """Return what the run's own process is linked by, if it is."""
        return self._services.cell.peer(job_cell(SERVER, self.job_id))

    def _tell_run(self, topic: str, payload: msgspec.Struct) -> None:
        self._tell(job_cell(SERVER, self.job_id), Channel.RUN, topic, payload)

    def _tell(self, destination: Fqcn, channel: Channel, topic: str, payload: msgspec.Struct) -> bool:
        """Tell *destination*, if it is there; who is not learns the same thing when it connects."""
        try:
            self._services.cell.tell(destination, channel, topic, payload)
        except HanseError as error:
            self._log.debug("not told", extra={"destination": destination, "topic": topic, "reason": error.reason})
            return False
        return True

    def _changed(self, client: ClientName, change: str, reason: str) -> None:
        if change == "failed":
            code = shortened(self.processes.trouble(client).code, MAX_CODE_CHARS)
            self._failed[client] = FailedClient(client, shortened(reason), code)
            self._spawn(self._note_failed(), f"note that {client} failed in {self.job_id}")
        self._tell_run("client", ClientChanged(client, change, reason))
        self._emit(JobEvent(self.job_id, f"client_{change}", self._services.wall(), client=client, text=reason))

    async def _note_failed(self) -> None:
        """Have whoever takes the run up know which clients are out of it, as soon as the store takes that."""
        while True:
            try:
                await self._failures_noted()
            except StoreFailed as error:
                self._log.warning("a failed client is not noted yet", extra={"reason": error.reason})
            except HanseError as error:  # the job has ended, or is another server's
                self._log.info("a failed client is not noted", extra={"reason": error.reason})
                return
            else:
                return
            if await is_set_within(self._over, STORE_PAUSE_S):
                return

    async def _failures_noted(self) -> None:
        """Return when the store has all clients that have failed by now, or the run is over."""
        async with self._ending:  # which changes the record, too
            failed = tuple(self._failed.values())
            if self.has_ended or self.record.failed_clients == failed:
                return
            record = msgspec.structs.replace(self.record, failed_clients=failed)
            await self._journal.note(record)
            self.record = record

    def _context(self, *, round_number: int = 0, peer: str = "", message: Message | None = None) -> FLContext:
        return FLContext(
            "server",
            project=self._services.project,
            peer=peer,
            job_id=self.job_id,
            round=round_number,
            message=message,
        )

    def _notify(
        self,
        notice: EventType,
        *,
        round_number: int = 0,
        peer: str = "",
        metrics: dict[str, float] | None = None,
        reason: str = "",
        text: str = "",
    ) -> None:
        context = replace(self._context(round_number=round_number, peer=peer), metrics=metrics, reason=reason)
        self._services.handlers.tell(notice, context)
        self._emit(
            JobEvent(
                self.job_id,
                notice.value,
                self._services.wall(),
                round=round_number,
                client=peer,
                metrics=metrics or {},
                text=text or reason,
            )
        )

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        if self._group is None:
            work.close()
            return
        task = start_in(self._group, work, self._guarded, name=name)
        if task is not None:
            self._work.add(task)
            task.add_done_callback(self._work.discard)

    async def _guarded(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception as error:  # noqa: BLE001 - the edge of a run's task: its failure ends the job, with a reason
            self._log.exception("a run's task failed")
            cause = cause_of(error, doing=f"running job {self.job_id}")
            await self.end_once_stored(JobState.FAILED, code=code_of(cause), reason=cause.reason)


def _refused(key: TaskKey, reason: str) -> TaskResult:
    return TaskResult(key, fault=TaskFault("task-refused", reason))
