"""A job's process at a site: ``python -m hanse.client.job_process``, started by the site's agent.

The job's code runs in the main thread, as such code expects; the connection to the server lives on the event loop's
thread (``JobConnection``); the two meet in a ``MainThreadTrainer``. Two more threads wait for what ends the process:
SIGTERM, and having been without an agent for too long (``LifeLine``). It then says goodbye and is gone within
``EXIT_GRACE_S``, whatever the job's code is doing.

When its agent dies, the process goes on: it has its own connection to the server, and delivers. The next agent takes it
over. One that comes to nobody ends by itself, with all that it has started, since nobody is there to see to it.

The exit status is ``TERMINATED`` after SIGTERM, whoever sent it, and 1 when the process could not go on; the log's last
line says why. Only the job's own code can end it with 0.
"""

import asyncio
import logging
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Final

import msgspec

from hanse.cell.connector import Connector, Dial
from hanse.cell.link import Link
from hanse.cell.loop import background_loop, run
from hanse.cell.refusals import shortened
from hanse.cell.rpc import ClientTls
from hanse.cell.transfer import TensorTransfers, Transfers
from hanse.client.api import Site
from hanse.client.job_cell import ClientJob, filters_of
from hanse.client.process_spec import TAIL_CHARS, JobProcessSpec
from hanse.client.registration import registered_by
from hanse.client.trainer import MainThreadTrainer, Trainer, load_app
from hanse.client.uplink import Uplink, first_error
from hanse.errors import HanseError, JobInvalid, TrainingFailed
from hanse.identity.tokens import parse_token
from hanse.ids import Digest, job_cell
from hanse.launch.log_lines import FieldLogger, log_to_stderr
from hanse.launch.process import end_with_group, last_lines, logged_before, read_spec
from hanse.launch.surviving import LifeLine
from hanse.messages import (
    PROTOCOL_VERSIONS,
    Channel,
    Credentials,
    Hello,
    JobFailure,
    Message,
    Renew,
    Welcome,
)
from hanse.storage.tensors import TensorFiles

_log = logging.getLogger(__name__)

EXIT_GRACE_S: Final = 2.0
"""How long the process may take to end once it must: less than its agent waits before it kills."""

TERMINATED: Final = 128 + signal.SIGTERM
"""The exit status of a process that was asked to end: as a shell has it for one that the signal killed."""

REPORT_TIMEOUT_S: Final = 15.0
"""How long a failure may take to reach the server; the agent tells of it too, by the log's last lines."""


class JobConnection:
    """The job's cell with its connection to the server: ``run`` is its life. Belongs to one event loop.

    *dial* and *transfers* stand in for gRPC where the server is in the same process; *keep_only* stands in for deleting
    tensors that no longer matter, where the job's folder for tensors is not its alone. *log_tail* gives the last lines
    of the log that may go with a failure.
    """

    def __init__(
        self,
        spec: JobProcessSpec,
        trainer: Trainer,
        *,
        rng: random.Random,
        wall: Callable[[], float] = time.time,
        dial: Dial | None = None,
        transfers: TensorTransfers | None = None,
        keep_only: Callable[[Collection[Digest]], object] | None = None,
        log_tail: Callable[[], str] = lambda: "",
    ) -> None:
        self._spec, self._wall, self._log_tail = spec, wall, log_tail
        self._credentials = spec.identity.credentials
        self._uplink = Uplink(job_cell(spec.client, spec.job_id), rng)
        self._log = FieldLogger(_log, {"job": spec.job_id})
        certificate = spec.identity.certificate or None
        tls = ClientTls(spec.roots, certificate, spec.identity.key or None) if spec.roots else None
        self._connector = Connector(
            self._uplink.cell,
            targets=spec.servers,
            hello=self._hello,
            tls=tls,
            rng=rng,
            on_welcome=self._on_welcome,
            on_waiting=lambda reason: self._log.info("waiting for the server", extra={"reason": reason}),
            dial=dial,
        )
        self._own_transfers = None
        if transfers is None:
            transfers = self._own_transfers = Transfers(
                target=lambda: self._connector.target, hello=self._hello, tls=tls, rng=rng
            )
        files = TensorFiles(Path(spec.tensors))
        self._job = ClientJob(
            self._uplink,
            job_id=spec.job_id,
            client=spec.client,
            spec=spec.spec,
            site=spec.site,
            transfers=transfers,
            files=files,
            keep_only=keep_only or files.keep_only,
            trainer=trainer,
            filters=filters_of(spec.policy),
            log_tail=log_tail,
        )
        self._uplink.cell.on(Channel.JOB, "goodbye", self._on_goodbye)

    async def run(self) -> None:
        """Work on the job's tasks until ``close`` or cancelled.

        Raises:
            HanseError: the server refuses the job's cell for good.
        """
        try:
            async with asyncio.TaskGroup() as group:
                work = group.create_task(self._job.run(), name="work on tasks")
                renewal = group.create_task(self._renew(), name="renew the token")
                try:
                    await self._connector.run()
                finally:
                    work.cancel()
                    renewal.cancel()
        except ExceptionGroup as errors:
            raise first_error(errors) from None
        finally:
            if self._own_transfers is not None:
                await self._own_transfers.close()
            await self._uplink.cell.close()

    async def close(self) -> None:
        """Leave the server, so that ``run`` returns. ``run`` must have begun."""
        await self._connector.close()

    async def report_failure(self, failure: HanseError) -> None:
        """Tell the server that the job cannot run here, for good; return when it knows.

        Raises:
            HanseError: what the server refuses the report with.
        """
        kind = "config" if isinstance(failure, JobInvalid) else "exception"
        reason = failure.why if isinstance(failure, TrainingFailed) else failure.reason
        log_tail = await asyncio.to_thread(self._log_tail)
        report = JobFailure(self._spec.job_id, kind, shortened(reason), failure.code, log_tail)
        await self._uplink.ask_until_answered(Channel.SERVER, "job_failure", report)

    def _hello(self) -> Hello:
        return Hello(PROTOCOL_VERSIONS, self._uplink.cell.fqcn, self._spec.project, credentials=self._credentials)

    async def _on_welcome(self, link: Link, welcome: Welcome) -> None:
        if self._own_transfers is not None:
            await self._own_transfers.renew()
        self._uplink.trust(link.peer, ssid=welcome.ssid)
        self._log.info("connected", extra={"server": welcome.server, "target": self._connector.target})

    def _on_goodbye(self, message: Message) -> None:
        self._log.info("the server is going; waiting for it to come back")

    async def _renew(self) -> None:
        """Renew the token at half of its life, for as long as the job runs.

        Raises:
            HanseError: the server does not renew it.
        """
        expires_in_s = parse_token(self._credentials.token).expires_at - self._wall()
        while True:
            await asyncio.sleep(max(expires_in_s / 2, 1.0))  # a renewal is due at a time, not on an event
            # A refusal ends the process: it could not answer any more, and the server would wait for it.
            fresh = registered_by(await self._uplink.ask_until_answered(Channel.SERVER, "renew", Renew()), to="renew")
            self._credentials = Credentials(self._credentials.name, fresh.token, fresh.token_signature, fresh.ssid)
            expires_in_s = fresh.expires_in_s


def main() -> int:
    """Run the job that standard input describes until asked to end; return the exit status."""
    log_start = logged_before()
    log_to_stderr()
    signals = _catch_sigterm()
    line = LifeLine()
    spec = msgspec.msgpack.decode(_read_input(), type=JobProcessSpec)
    folder = Path(spec.code or spec.tensors)
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    if spec.code:
        sys.path.insert(0, spec.code)
    ending = _Ending()
    trainer = MainThreadTrainer(folder)
    connection = run(_connection_of(spec, trainer, partial(_log_tail, spec, log_start)))
    life = asyncio.run_coroutine_threadsafe(connection.run(), background_loop())

    def ended(life: Future[None]) -> None:
        if (error := life.exception()) is not None:
            _log.error("the job cannot go on: %s", error, extra={"job": spec.job_id})
            ending.begin(1)
        trainer.close()

    def end(*, with_group: bool = False) -> None:
        ending.begin(TERMINATED, with_group=with_group)
        asyncio.run_coroutine_threadsafe(connection.close(), background_loop())

    def end_alone(why: str) -> None:
        _log.error("the job ends here: %s", why, extra={"job": spec.job_id})
        end(with_group=True)

    life.add_done_callback(ended)
    _on_sigterm(signals, end)
    line.watch(grace_s=spec.agent_grace_s, on_alone=end_alone)
    try:
        serve(spec, trainer, folder)
    except HanseError as failure:
        if failure.__cause__ is not None:
            _log.error("the job's code failed", exc_info=failure.__cause__)
        _tell(connection, failure)
        _log.error("the job cannot go on: %s", failure.reason, extra={"job": spec.job_id})
        ending.begin(1)
        run(connection.close())
    return ending.finish()


def serve(spec: JobProcessSpec, trainer: MainThreadTrainer, folder: Path) -> None:
    """Load the job's code and let it work on tasks, in this thread, until *trainer* is closed.

    Raises:
        JobInvalid: there is no such app or script.
        TrainingFailed: the code failed before it could work on a task.
    """
    if not spec.spec.is_script:
        trainer.serve_app(load_app(spec.spec.client, client=spec.client, code=folder))
        return
    script = folder / spec.spec.client
    if not script.is_file():
        raise JobInvalid("client", got=spec.spec.client, expected="a script among the job's files")
    sys.argv = [str(script)]
    site = Site(spec.client, spec.job_id, spec.spec.config, spec.site, spec.spec.seed)
    trainer.serve_script(script, site)


async def _connection_of(spec: JobProcessSpec, trainer: Trainer, log_tail: Callable[[], str]) -> JobConnection:
    rng = random.Random()  # noqa: S311 - spreads retries, hides nothing
    return JobConnection(spec, trainer, rng=rng, log_tail=log_tail)


def _log_tail(spec: JobProcessSpec, log_start: int) -> str:
    """Return what the site lets the server know of the end of this process's log, which begins at *log_start*."""
    if not spec.log:
        return ""
    return last_lines(Path(spec.log), spec.policy.log_lines, start=log_start)[-TAIL_CHARS:]


class _Ending:
    """The end of this process: whoever begins it first says how, and ``EXIT_GRACE_S`` later it is over, come what may.

    User code, or a thread of its own, may not want to end.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._status: int | None = None
        self._with_group = False

    def begin(self, status: int, *, with_group: bool = False) -> None:
        """Have the process end with *status*, and *with_group*, all that it has started, by SIGKILL."""
        with self._lock:
            if self._status is not None:
                return
            self._status, self._with_group = status, with_group
        timer = threading.Timer(EXIT_GRACE_S, self._force)
        timer.daemon = True
        timer.start()

    def finish(self) -> int:
        """Return the status to end with, now that the work is over; with its group, the process ends here."""
        if self._with_group:
            self._force()
        return self._status or 0

    def _force(self) -> None:
        if self._with_group:
            end_with_group(self._status or 0)
        os._exit(self._status or 0)


def _tell(connection: JobConnection, failure: HanseError) -> None:
    """Tell the server of *failure*, if it can be told."""
    try:
        run(connection.report_failure(failure), REPORT_TIMEOUT_S)
    except HanseError as error:
        _log.warning("the server was not told", extra={"reason": error.reason})


def _read_input() -> bytes:
    """Return the specification on standard input, which is empty from then on: the job's code may read it."""
    with os.fdopen(os.dup(0), "rb") as pipe:
        spec = read_spec(pipe)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return spec


def _catch_sigterm() -> int:
    """Return the end of a pipe on which SIGTERM arrives from now on.

    A handler would have to wait until the main thread leaves whatever the job's code calls.
    """
    signals, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    return signals


def _on_sigterm(signals: int, end: Callable[[], None]) -> None:
    """Call *end*, from a thread of its own, when SIGTERM arrives on *signals*."""

    def watch() -> None:
        while signal.SIGTERM not in os.read(signals, 64):
            continue
        end()

    threading.Thread(target=watch, name="signals", daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())
