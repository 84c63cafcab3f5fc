"""A job's cell at a site: tasks come in, updates go out.

Tasks are worked on one at a time, in the order in which they came: fetch the tensors that are missing here, run the
job's code, let the site's privacy filters have the last word, check the result against what the task expects, send what
the server lacks, and answer with names. An answer is offered until the server takes or refuses it, through as many
broken connections as it takes; the same answer may be offered twice, because its key names it. A task that is
cancelled is dropped wherever it is, and code that runs on is not listened to any more.
"""

import asyncio
import logging
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from typing import Final

import msgspec

from hanse.cell.cell import RemoteError
from hanse.cell.refusals import shortened
from hanse.cell.transfer import TensorTransfers
from hanse.client.task import TaskContext
from hanse.client.trainer import Trainer, plain_update
from hanse.client.uplink import ANSWER_TIMEOUT_S, Uplink, first_error
from hanse.errors import (
    Conflict,
    HanseError,
    InternalError,
    ProtocolError,
    StoreFailed,
    TrainingFailed,
    Unauthenticated,
    UpdateRejected,
)
from hanse.ids import SERVER, ClientName, Digest, JobId
from hanse.job import Config, JobSpec
from hanse.launch.log_lines import FieldLogger
from hanse.learning.filters import Filter, NormClip, apply
from hanse.messages import (
    Channel,
    LogMetrics,
    Message,
    ModelRef,
    TaskAssignment,
    TaskCancelled,
    TaskFault,
    TaskKey,
    TaskResult,
    UpdateRef,
)
from hanse.model import Model, TensorMismatch, Update, check
from hanse.settings import SitePolicy
from hanse.storage.models import digests_of, load_model, name_model
from hanse.storage.records import check_model_ref
from hanse.storage.tensors import TensorFiles

_log = logging.getLogger(__name__)

MAX_QUEUED_TASKS: Final = 64
"""More tasks than this do not wait here with their models; whoever asks them is told so in their turn."""
MAX_LOGS_PER_S: Final = 100
"""More metrics than this are dropped: training code that logs every step must not fill the link's queue."""


def filters_of(policy: SitePolicy) -> tuple[Filter, ...]:
    """Return what *policy* puts between the job's code and the network."""
    return (NormClip(policy.max_update_norm),) if policy.max_update_norm else ()


class ClientJob:
    """One job's tasks at one site; ``run`` is its life.

    *keep_only* is called with the tensors that the next task may share with the last one, when its answer has been
    dealt with: ``files.keep_only`` where *files* are this job's alone, nothing where others use them too. *log_tail*
    gives the last lines of the log that may go with a fault.
    """

    def __init__(
        self,
        uplink: Uplink,
        *,
        job_id: JobId,
        client: ClientName,
        spec: JobSpec,
        site: Config,
        transfers: TensorTransfers,
        files: TensorFiles,
        keep_only: Callable[[Collection[Digest]], object],
        trainer: Trainer,
        filters: Sequence[Filter] = (),
        log_tail: Callable[[], str] = lambda: "",
    ) -> None:
        self._uplink = uplink
        self._job_id, self._client, self._spec, self._site = job_id, client, spec, site
        self._transfers, self._files, self._keep_only = transfers, files, keep_only
        self._trainer, self._filters, self._log_tail = trainer, filters, log_tail
        self._scope = f"job/{job_id}"
        self._queue: dict[TaskKey, TaskAssignment | None] = {}
        self._queued = asyncio.Event()
        self._current: tuple[TaskKey, asyncio.Task[None]] | None = None
        self._log = FieldLogger(_log, {"job": job_id})
        self._loop = asyncio.get_running_loop()
        self._logs_since, self._logs = self._loop.time(), 0
        uplink.cell.on(Channel.TASK, "task", self._on_task)
        uplink.cell.on(Channel.TASK, "cancelled", self._on_cancelled)

    async def run(self) -> None:
        """Work on tasks until cancelled."""
        while True:
            await self._queued.wait()
            if not self._queue:
                self._queued.clear()
                continue
            key, assignment = next(iter(self._queue.items()))
            del self._queue[key]
            async with asyncio.TaskGroup() as group:  # which lets a task that was cancelled alone end in peace
                work = group.create_task(self._work(key, assignment), name=f"task {key.name} of round {key.round}")
                self._current = key, work
            self._current = None

    # What the server says ---------------------------------------------------------------------------------------------

    def _on_task(self, message: Message) -> None:
        assignment = message.payload
        if not isinstance(assignment, TaskAssignment) or assignment.key.client != self._client:
            raise ProtocolError("TaskAssignment.key.client", got=assignment, expected=f"a task for {self._client}")
        key = assignment.key
        if key in self._queue or (self._current is not None and self._current[0] == key):
            return  # sent again because the link broke; it is being dealt with
        self._queue[key] = assignment if len(self._queue) < MAX_QUEUED_TASKS else None
        self._queued.set()
        self._log.info("task received", extra={"task": key.name, "round": key.round})

    def _on_cancelled(self, message: Message) -> None:
        if not isinstance(message.payload, TaskCancelled):
            raise ProtocolError("payload", got=message.payload, expected="TaskCancelled")
        key = message.payload.key
        self._queue.pop(key, None)
        if self._current is not None and self._current[0] == key:
            self._current[1].cancel()
            self._current = None  # while it ends, the task may come again
            self._log.info("task cancelled", extra={"task": key.name, "round": key.round})

    # A task's way -----------------------------------------------------------------------------------------------------

    async def _work(self, key: TaskKey, assignment: TaskAssignment | None) -> None:
        if assignment is None:
            busy = Conflict(self._client, state=f"busy with {MAX_QUEUED_TASKS} tasks", wanted="given another")
            await self._deliver(TaskResult(key, fault=TaskFault(busy.code, busy.reason, retryable=True)), {})
            return
        result, bytes_of = await self._result_of(assignment)
        if result.fault is not None:
            extra = {"task": assignment.key.name, "round": assignment.key.round, "reason": result.fault.reason}
            self._log.warning("task failed", extra=extra)
        await self._deliver(result, bytes_of)
        self._current = None  # it is answered: a server that has lost the answer since may ask for it again
        if assignment.model is not None:
            try:
                await asyncio.to_thread(self._keep_only, digests_of(assignment.model))
            except StoreFailed as failed:  # which the next task, or the agent at the job's end, tries again
                self._log.warning("tensors that are no longer needed stay", extra={"reason": failed.reason})

    async def _result_of(self, assignment: TaskAssignment) -> tuple[TaskResult, Mapping[Digest, memoryview]]:
        """Return the answer to a task with its large tensors' bytes; whatever goes wrong is the answer's fault."""
        key = assignment.key
        try:
            received = None if assignment.model is None else await self._fetch(assignment.model)
            update = await self._trained(assignment, received)
            if update.model is None:
                return TaskResult(key, UpdateRef(None, update.num_examples, update.metrics)), {}
            # The update stays in memory until it is delivered: writing it here would only delay it, since a process
            # that dies before that trains again.
            reference, bytes_of = await asyncio.to_thread(name_model, update.model, self._files)
            return TaskResult(key, UpdateRef(reference, update.num_examples, update.metrics)), bytes_of
        except TrainingFailed as error:
            fault = TaskFault(error.code, error.why)
        except RemoteError as error:  # by its code the server knows whether a tensor is lost there
            fault = TaskFault(error.error_code or error.code, error.reason, error.retryable)
        except HanseError as error:
            fault = TaskFault(error.code, error.reason, error.retryable)
        except Exception:  # noqa: BLE001 - a bug costs this task its answer, and no other
            self._log.exception("task failed")
            bug = InternalError(f"working on task {key.name!r} at {self._client}")
            fault = TaskFault(bug.code, bug.reason)
        log_tail = await asyncio.to_thread(self._log_tail)
        # What the job's code raises may say more than fits into a message.
        return TaskResult(
            key, fault=msgspec.structs.replace(fault, reason=shortened(fault.reason), log_tail=log_tail)
        ), {}

    async def _fetch(self, reference: ModelRef) -> Model:
        """Return the model that *reference* names, its missing tensors fetched."""
        check_model_ref(reference, "the task's model")
        sizes = {tensor.digest: tensor.size_bytes for tensor in reference.tensors if tensor.inline is None}
        # What is here has lain on the disk while others trained, and nobody but this site would notice.
        missing = [digest for digest in sizes if not await asyncio.to_thread(self._files.verify, digest)]
        await _together({f"download {digest}": self._download(digest, sizes[digest]) for digest in missing})
        return await asyncio.to_thread(load_model, reference, self._files)

    async def _download(self, digest: Digest, size: int) -> None:
        async def attempt() -> None:
            partial = await asyncio.to_thread(self._files.begin, digest, size)
            await self._transfers.download(self._scope, digest, size, partial)

        await self._uplink.persist(attempt, doing=f"download of tensor {digest}")

    async def _trained(self, assignment: TaskAssignment, received: Model | None) -> Update:
        """Return what leaves the site: what the job's code returned, filtered, and found to be what is expected."""
        update = await self._trainer.run(received or Model({}), self._context(assignment))
        update = plain_update(update, client=self._client, task=assignment.key.name)
        if not assignment.expects_model:
            return Update(None, update.num_examples, update.metrics)
        if update.model is None:
            raise UpdateRejected(self._client, f"no model; task {assignment.key.name!r} expects one")
        if received is not None:
            try:
                check(update.model.spec, received.spec)
            except TensorMismatch as mismatch:
                raise UpdateRejected(self._client, mismatch.reason) from mismatch
        return await asyncio.to_thread(apply, self._filters, update, received)

    def _context(self, assignment: TaskAssignment) -> TaskContext:
        key = assignment.key
        return TaskContext(
            client=self._client,
            job=self._job_id,
            round=key.round,
            name=key.name,
            config={**self._spec.config, **assignment.config},
            site=self._site,
            seed=self._spec.seed,
            log_metrics=lambda step, metrics: self._log_from_anywhere(LogMetrics(key, step, metrics)),
        )

    async def _deliver(self, result: TaskResult, bytes_of: Mapping[Digest, memoryview]) -> None:
        """Offer *result* until the server takes or refuses it.

        Raises:
            Unauthenticated: it does not take this process's token any more, so nothing that this process says counts.
        """
        extra = {"task": result.key.name, "round": result.key.round}
        try:
            await self._uplink.persist(lambda: self._offer(result, bytes_of), doing=f"answer to {result.key.name}")
        except Unauthenticated:
            raise
        except HanseError as error:
            self._log.warning("answer refused", extra={**extra, "reason": error.reason})
            if result.fault is None:
                # The server has not judged it, as where its tensors were not taken, and somebody waits for it.
                code = (error.error_code if isinstance(error, RemoteError) else "") or error.code
                await self._deliver(TaskResult(result.key, fault=TaskFault(code, shortened(error.reason))), {})

    async def _offer(self, result: TaskResult, bytes_of: Mapping[Digest, memoryview]) -> None:
        await self._upload(bytes_of)
        try:
            await self._ask(result)
        except RemoteError as error:
            # The server found a tensor missing that it had when it was asked: it has restarted in between.
            if error.error_code != ProtocolError.code or not await self._upload(bytes_of):
                raise
            await self._ask(result)

    async def _ask(self, result: TaskResult) -> None:
        """Return when the server has judged *result*; it knows best what it makes of one that it refuses."""
        extra = {"task": result.key.name, "round": result.key.round}
        try:
            await self._uplink.ask(Channel.TASK, "result", result, timeout_s=ANSWER_TIMEOUT_S)
        except RemoteError as error:
            if error.error_code != UpdateRejected.code:
                raise
            self._log.warning("answer refused", extra={**extra, "reason": error.reason})
        else:
            self._log.info("answer accepted", extra=extra)

    async def _upload(self, bytes_of: Mapping[Digest, memoryview]) -> int:
        """Send what the server lacks of these tensors; return how many that were."""
        missing = await self._transfers.missing(self._scope, sorted(bytes_of)) if bytes_of else []
        uploads = {digest: self._transfers.upload(self._scope, digest, bytes_of[digest]) for digest in missing}
        await _together({f"upload {digest}": upload for digest, upload in uploads.items()})
        return len(missing)

    # Metrics ----------------------------------------------------------------------------------------------------------

    def _log_from_anywhere(self, logged: LogMetrics) -> None:
        """Send metrics from whichever thread the training code runs in."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._tell_metrics, logged)

    def _tell_metrics(self, logged: LogMetrics) -> None:
        now = self._loop.time()
        if now - self._logs_since >= 1.0:
            self._logs_since, self._logs = now, 0
        self._logs += 1
        if self._logs > MAX_LOGS_PER_S:
            return
        try:
            self._uplink.cell.tell(SERVER, Channel.TASK, "metrics", logged)
        except HanseError as error:
            self._log.debug("metrics lost", extra={"reason": error.reason})


async def _together(works: Mapping[str, Coroutine[None, None, None]]) -> None:
    """Await all of *works*, each a task of that name; the first error ends the others and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            for name, work in works.items():
                group.create_task(work, name=name)
    except ExceptionGroup as errors:
        raise first_error(errors) from None
