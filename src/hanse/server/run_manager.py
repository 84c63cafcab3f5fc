"""A run in this process: what holds its components, handlers and context, and what drives it to its end.

``RunManager`` is the first, ``LocalRun`` the second. A failure of the run is reported to its server with its reason,
once; what is committed by then stays.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path

from hanse.errors import HanseError, InternalError, StoreFailed, TooFewClients
from hanse.events import EventType, FLComponent, FLContext, Handlers
from hanse.ids import Digest, JobId
from hanse.job import JobSpec
from hanse.learning.workflow import State, is_over
from hanse.messages import RunEnded, RunSnapshot
from hanse.model import Model
from hanse.run.federation import RunFederation
from hanse.run.loading import importing_from, initial_model_of, workflow_of
from hanse.run.runner import drive
from hanse.run.server_link import ServerLink
from hanse.server.active_run import ABORTED
from hanse.server.bounds import shortened
from hanse.server.run_folder import RunFolder
from hanse.storage.models import write_safetensors
from hanse.storage.tensors import TensorFiles

RESULT_FILE = "model.safetensors"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RunManager:
    """A run's components and handlers, in the order in which they hear of events, and its context.

    ``workspace`` is the run's folder, ``epoch`` the tenure whose tensors it works with.
    """

    job_id: JobId
    workspace: Path
    project: str
    handlers: Handlers
    components: dict[str, FLComponent] = field(default_factory=dict)
    epoch: int = 0

    @property
    def context(self) -> FLContext:
        """What an event of this run is about."""
        return FLContext("run", project=self.project, job_id=self.job_id)

    def add(self, name: str, component: FLComponent) -> "RunManager":
        """Return this manager with *component* under *name*, last among the handlers."""
        return replace(
            self,
            handlers=self.handlers.extended([component]),
            components={**self.components, name: component},
        )

    def fire(self, notice: EventType) -> None:
        """Tell the run's handlers of *notice*."""
        self.handlers.tell(notice, self.context)


class LocalRun:
    """One run, driven in this process over *link*; ``drive`` is its life.

    *importing* and *initial_model* are how the job's code is found and its first model made; a process that is not the
    run's alone has ways of its own.
    """

    def __init__(
        self,
        manager: RunManager,
        spec: JobSpec,
        link: ServerLink,
        *,
        heartbeat_s: float,
        snapshot: RunSnapshot | None,
        importing: Callable[[Path], AbstractContextManager[None]] = importing_from,
        initial_model: Callable[[JobSpec, Path], Model] = initial_model_of,
    ) -> None:
        self._manager = manager
        self._spec = spec
        self._link = link
        self._heartbeat_s = heartbeat_s
        self._snapshot = snapshot
        self._importing, self._initial_model = importing, initial_model
        self._stopping = asyncio.Event()
        self._aborted: str | None = None
        self._is_last_round = False
        self._is_cut_off = False

    def stop_after_round(self) -> None:
        """Hand out no new work: the run ends with the round that it is in."""
        self._is_last_round = True

    def abort(self, reason: str) -> None:
        """End the run; what is committed stays, and the server is told that it was aborted."""
        self._aborted = reason
        self._stopping.set()

    def cut_off(self) -> None:
        """End the run in this process alone: its server is not told, and has it go on in another."""
        self._is_cut_off = True
        self._link.cut_off()
        self._stopping.set()

    async def drive(self) -> RunEnded:
        """Drive the run to its end, tell the server, and return how it ended."""
        manager = self._manager
        manager.fire(EventType.START_RUN)
        beating = asyncio.create_task(self._beat(), name=f"heartbeat of run {manager.job_id}")  # ended below
        work = asyncio.create_task(self._work(), name=f"run {manager.job_id}")  # awaited below
        stopping = asyncio.create_task(self._stopping.wait(), name="abort")  # ended below
        try:
            await asyncio.wait({work, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                work.cancel()
                await asyncio.gather(work, return_exceptions=True)
                end = RunEnded(completed=False, code=ABORTED, reason=self._aborted or "the run was aborted")
                if not self._is_cut_off:
                    with contextlib.suppress(HanseError):  # the server knows, where it was the one that said so
                        await self._link.given_up(end)
                return end
            end = work.result()
            telling = asyncio.create_task(self._link.ended(end), name="tell of the end")  # awaited below
            await asyncio.wait({telling, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if telling.done():
                telling.result()
            else:  # the server is not there to hear it, and has the run go on in another process
                telling.cancel()
                await asyncio.gather(telling, return_exceptions=True)
            return end
        finally:
            for task in (beating, stopping, work):
                task.cancel()
            await asyncio.gather(beating, stopping, work, return_exceptions=True)
            manager.fire(EventType.END_RUN)

    async def _work(self) -> RunEnded:
        folder = RunFolder(self._manager.workspace, self._manager.epoch)
        try:
            with self._importing(folder.code):
                return await self._run(folder)
        except StoreFailed as failed:
            _log.error("run interrupted", extra={"job": self._manager.job_id, "reason": failed.reason})
            return RunEnded(completed=False, code=failed.code, reason=failed.reason, again=True)
        except HanseError as error:
            extra = {"job": self._manager.job_id, "code": error.code, "reason": error.reason}
            _log.error("run failed", exc_info=error.__cause__, extra=extra)
            client, cause = (error.client, error.cause) if isinstance(error, TooFewClients) else ("", "")
            # What the job's code raised may say more than fits into a message.
            reason = shortened(error.reason)
            return RunEnded(completed=False, code=error.code, reason=reason, client=client, cause=cause)
        except Exception:  # noqa: BLE001 - the edge of the run: the server must hear that it is over
            _log.exception("run failed", extra={"job": self._manager.job_id})
            bug = InternalError(f"driving run {self._manager.job_id}")
            return RunEnded(completed=False, code=bug.code, reason=bug.reason)

    async def _run(self, folder: RunFolder) -> RunEnded:
        files = TensorFiles(folder.tensors)
        snapshot = self._snapshot or await self._link.attach()
        federation = RunFederation(
            self._link,
            files,
            clients=snapshot.clients,
            seed=self._spec.seed,
            carried=snapshot.carried,
            counted=snapshot.counted,
        )
        federation.attached(snapshot)
        self._link.listen(federation)
        workflow = workflow_of(self._spec)
        keeping = asyncio.create_task(self._link.keep_attached(), name="keep attached")  # ended below
        try:
            state = await drive(
                workflow,
                spec=self._spec,
                snapshot=snapshot,
                initial=lambda: self._initial_model(self._spec, folder.code),
                link=self._link,
                files=files,
                federation=federation,
                is_stopping=lambda: self._is_last_round,
            )
        finally:
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)
        if not is_over(workflow, state):
            reason = f"stopped after round {state.round} as asked; what is committed stays"
            return RunEnded(completed=False, code="stopped", reason=reason)
        digest, size_bytes = await asyncio.to_thread(_write_result, state, folder)
        return RunEnded(completed=True, result=digest, result_bytes=size_bytes)

    async def _beat(self) -> None:
        while True:
            with contextlib.suppress(HanseError):  # the link says itself when it is down
                self._link.heartbeat()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._heartbeat_s):
                    await self._stopping.wait()
                    return


def _write_result(state: State, folder: RunFolder) -> tuple[Digest, int]:
    """Write the final model as one safetensors file into the run's results; return its digest and size."""
    draft = folder.tensors / RESULT_FILE  # this tenure's own: another may be writing the same result
    write_safetensors(state.model, draft)
    results = TensorFiles(folder.result)
    digest = results.move_in(draft)  # in place of an earlier process's, of which nobody knows whether it is on the disk
    return digest, results.size(digest)
