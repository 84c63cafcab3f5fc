"""A run's own process, as its server sees it: started, listened to, and started again until the job is over.

One that dies is tried again, boundedly often without progress. One that cannot go on by no fault of its own (a full
disk, a machine that starts nothing) is tried again for as long as to mend that may take. One that says nothing any more
is killed, and counts as dead. What it asks for and is told is ``ActiveRun``'s matter; here is only that it lives.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

import msgspec

from hanse.coordination.runs import GiveUp, after_death
from hanse.coordination.waiting import Phase, RunProcess, as_heard
from hanse.errors import ProcessHung, TensorDamaged
from hanse.ids import SERVER, job_cell
from hanse.job import JobRecord
from hanse.launch.log_lines import FieldLogger
from hanse.launch.process import Handle
from hanse.messages import RunEnded
from hanse.server.bounds import TAIL_LINES, ending, shortened
from hanse.server.run_folder import RunFolder
from hanse.server.run_services import RunServices
from hanse.server.run_spec import RunProcessSpec
from hanse.storage.disk import start_failure

_log = logging.getLogger(__name__)

PROCESS_MODULE: Final = "hanse.server.job_process"
RESTART_PAUSE_S: Final = 1.0
LONGEST_PAUSE_S: Final = 10.0
"""A run's process that died is started again at once, then after ever longer pauses, up to this."""
HINDERED_PAUSE_S: Final = 5.0
"""A run's process that cannot go on, by no fault of its own, is tried again after this: nobody tells of space again."""
RUN_SILENT_S: Final = 600.0
"""A run's process that has not said for so long that it lives is killed: it is stopped, or its code hangs.

It says so every few seconds, but not while a workflow's code computes without giving way, which may take minutes.
"""
STOP_GRACE_S: Final = 5.0
"""How long a job's process may take to end once asked."""


@dataclass(frozen=True, slots=True)
class GivenUp:
    """Why a run's process is not started again: what the job's record says of its failure."""

    code: str
    reason: str
    log_tail: str


class OwnProcess:
    """The own process of one run; ``keep_alive`` is its life, and the other methods tell of what is heard from it.

    *over* is set when the job has ended. *gone* is called when a process has ended, or could not be started. *mend* is
    awaited when it met a damaged tensor: it has the run go on without what is lost, and returns whether anything was.
    """

    def __init__(
        self,
        record: JobRecord,
        folder: RunFolder,
        services: RunServices,
        *,
        over: asyncio.Event,
        gone: Callable[[], None],
        mend: Callable[[], Awaitable[bool]],
    ) -> None:
        self._job_id, self._spec = record.job_id, record.spec
        self._folder = folder
        self._services = services
        self._over = over
        self._gone = gone
        self._mend = mend
        self._log = FieldLogger(_log, {"job": record.job_id})
        self._handle: Handle | None = None
        self._heard_at = services.now()
        self._stands(Phase.STARTING, attempt=1)
        self._beat = asyncio.Event()
        self._hindrance: RunEnded | None = None
        self._progress = self._answers = 0

    @property
    def standing(self) -> RunProcess:
        """How the process stands now, for people."""
        return as_heard(self._standing, heard_at=self._heard_at, now=self._services.now(), silent_s=RUN_SILENT_S)

    async def log_tail(self) -> str:
        """Return the last lines that the process has logged."""
        if self._handle is None:
            return ""
        return ending(await asyncio.to_thread(self._handle.log_tail, TAIL_LINES))

    # what is heard from it

    def beats(self) -> None:
        """Take note that the process lives."""
        self._heard_at = self._services.now()
        self._beat.set()

    def works(self) -> None:
        """Take note that the process is there and has something new to work on."""
        self._stands(Phase.WORKING, self._standing.attempt)

    def gets_answer(self) -> None:
        """Take note of an answer: something new to work on, for a process that works."""
        if self._standing.phase is Phase.WORKING:
            self._answers += 1
            self.works()

    def progressed(self) -> None:
        """Take note that a round is committed: the process works, and its earlier deaths count no more."""
        self._progress += 1
        self.works()

    def hindered(self, end: RunEnded) -> None:
        """Take note that the process ends now because it cannot go on, by no fault of its own."""
        self._hindrance = end

    # its life

    async def keep_alive(self) -> GivenUp | None:
        """Keep the process alive until the job is over, and return ``None``; or why it is given up before.

        The process has ended when this returns, or is cancelled.
        """
        attempt, hindered_since = 0, None
        while not self._over.is_set():
            attempt, progress, answers = attempt + 1, self._progress, self._answers
            status, cause = await self._live_once(attempt)
            self._gone()
            if self._over.is_set():
                return None
            if self._progress > progress:
                attempt = 1
            if (self._progress, self._answers) != (progress, answers):  # what hindered one before was mended
                hindered_since = None
            if self._hindrance is None:
                if (given_up := await self._follow_death(attempt, status, cause)) is not None:
                    return given_up
                continue
            attempt -= 1  # it was not this process's doing
            is_first, hindered_since = hindered_since is None, hindered_since or self._services.now()
            until = hindered_since + self._services.mend_within_s
            hindrance = self._hindrance
            self._standing = RunProcess(Phase.HINDERED, hindered_since, until, attempt + 1, hindrance.reason)
            if hindrance.code == TensorDamaged.code and await self._mend() and is_first:
                continue  # at once; but a disk that goes on losing what it has is waited for
            if (given_up := await self._wait_out(hindrance, until=until)) is not None:
                return given_up
        return None

    async def _live_once(self, attempt: int) -> tuple[int, str]:
        """Start the process, and return its status when it has ended, and the code of why, if that is known.

        The status of one that cannot start is 0.
        """
        self._hindrance = None
        self.beats()
        self._stands(Phase.STARTING, attempt)
        try:
            self._handle = handle = await self._services.launcher.launch(
                PROCESS_MODULE, spec=self._process_spec(), log_path=self._folder.log, env={}, name=f"run {self._job_id}"
            )
        except OSError as error:
            failed = start_failure("the run's process", error, self._folder.path)
            self._hindrance = RunEnded(completed=False, code=failed.code, reason=failed.reason, again=True)
            return 0, ""
        over = asyncio.create_task(self._over.wait(), name=f"end of {self._job_id}")  # awaited below
        ended = asyncio.create_task(handle.wait(), name=f"process of {self._job_id}")  # awaited below
        silent = asyncio.create_task(self._fallen_silent(), name=f"silence of {self._job_id}")  # awaited below
        try:
            await asyncio.wait({over, ended, silent}, return_when=asyncio.FIRST_COMPLETED)
            is_hung = silent.done() and not (over.done() or ended.done())
            return await handle.stop(STOP_GRACE_S), ProcessHung.code if is_hung else ""
        finally:
            for task in (over, ended, silent):
                task.cancel()
            await asyncio.gather(over, ended, silent, return_exceptions=True)
            await handle.stop(STOP_GRACE_S)

    async def _fallen_silent(self) -> None:
        """Return when the process has said nothing for ``RUN_SILENT_S``.

        A first half of it may have been the server's own pause, in which nothing that was said was read.
        """
        halves = 0
        while halves < 2:
            self._beat.clear()
            try:
                async with asyncio.timeout(RUN_SILENT_S / 2):
                    await self._beat.wait()
                halves = 0
            except TimeoutError:
                halves += 1

    async def _follow_death(self, attempt: int, status: int, cause: str) -> GivenUp | None:
        """Wait before the process, which died with *status* of *cause*, is started again; or return why it is not."""
        log_tail = await self.log_tail()
        last_line = shortened(log_tail.strip().rpartition("\n")[2])
        verdict = after_death(
            SERVER,
            attempt=attempt,
            tries=self._spec.process_tries,
            status=status,
            last_line=last_line,
            cause=cause,
        )
        if isinstance(verdict, GiveUp):
            return GivenUp(verdict.code, verdict.reason, log_tail)
        pause_s = min(RESTART_PAUSE_S * (attempt - 1), LONGEST_PAUSE_S)
        now = self._services.now()
        self._standing = RunProcess(Phase.PAUSING, now, now + pause_s, verdict.attempt, verdict.reason)
        self._log.warning("the run's process died and is started again", extra={"status": status, "pause_s": pause_s})
        await is_set_within(self._over, pause_s)
        return None

    async def _wait_out(self, hindrance: RunEnded, *, until: float) -> GivenUp | None:
        """Wait before the hindered process is tried again; or return why it is not, for *until* is over."""
        left_s = until - self._services.now()
        if left_s <= 0:
            return GivenUp(hindrance.code, hindrance.reason, await self.log_tail())
        self._log.warning("the run's process cannot go on and is tried again", extra={"reason": hindrance.reason})
        await is_set_within(self._over, min(HINDERED_PAUSE_S, left_s))
        return None

    def _stands(self, phase: Phase, attempt: int) -> None:
        self._standing = RunProcess(phase, self._services.now(), self._heard_at + RUN_SILENT_S, attempt)

    def _process_spec(self) -> bytes:
        fqcn = job_cell(SERVER, self._job_id)
        spec = RunProcessSpec(
            job_id=self._job_id,
            project=self._services.project,
            spec=self._spec,
            folder=str(self._folder.path),
            epoch=self._folder.epoch,
            parent_url=self._services.run_url,
            credentials=self._services.credentials(fqcn, self._job_id).credentials,
            check_frequency_s=self._services.check_frequency_s,
        )
        return msgspec.msgpack.encode(spec)


async def is_set_within(event: asyncio.Event, seconds: float) -> bool:
    """Wait *seconds*, or until *event* is set; return whether it is."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
    return event.is_set()
