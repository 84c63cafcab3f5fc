"""A job's process at a site: ``python -m hanse.client.job_process``, started by the site's agent.

The job's code runs in the main thread, as such code expects; the connection to the server lives on the event loop's
thread (``JobConnection``); the two meet in a ``MainThreadTrainer``. A third thread watches the life line, the pipe that
the specification came on and that the agent holds: its end, or SIGTERM, means that the process is to end. It then says
goodbye and is gone within ``EXIT_GRACE_S``, whatever the job's code is doing.

The exit status is 0 when the process was asked to end, and 1 when it could not go on; the log's last line says why.
"""

import asyncio
import logging
import os
import random
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future
from pathlib import Path
from typing import BinaryIO, Final

import msgspec

from hanse.cell.connector import Connector, Dial
from hanse.cell.link import Link
from hanse.cell.loop import background_loop, run
from hanse.cell.rpc import ClientTls
from hanse.cell.transfer import TensorTransfers, Transfers
from hanse.client.api import Site
from hanse.client.job_cell import ClientJob, filters_of
from hanse.client.process_spec import JobProcessSpec
from hanse.client.registration import registered_by
from hanse.client.trainer import MainThreadTrainer, Trainer, load_app
from hanse.client.uplink import Uplink, first_error
from hanse.errors import HanseError, JobInvalid, TrainingFailed
from hanse.identity.tokens import parse_token
from hanse.ids import Digest, job_cell
from hanse.launch.log_lines import FieldLogger, log_to_stderr
from hanse.launch.process import read_spec
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

REPORT_TIMEOUT_S: Final = 15.0
"""How long a failure may take to reach the server; the agent tells of it too, by the log's last lines."""


class JobConnection:
    """The job's cell with its connection to the server: ``run`` is its life. Belongs to one event loop.

    *dial* and *transfers* stand in for gRPC where the server is in the same process; *keep_only* stands in for deleting
    tensors that no longer matter, where the job's folder for tensors is not its alone.
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
    ) -> None:
        self._spec, self._wall = spec, wall
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
        report = JobFailure(self._spec.job_id, kind, reason, failure.code)
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
            await asyncio.sleep(max(expires_in_s / 2, 1.0))
            # A refusal ends the process: it could not answer any more, and the server would wait for it.
            fresh = registered_by(await self._uplink.ask_until_answered(Channel.SERVER, "renew", Renew()), to="renew")
            self._credentials = Credentials(self._credentials.name, fresh.token, fresh.token_signature, fresh.ssid)
            expires_in_s = fresh.expires_in_s


def main() -> int:
    """Run the job that standard input describes until asked to end; return the exit status."""
    log_to_stderr()
    signals = _catch_sigterm()
    life_line = _take_life_line()
    spec = msgspec.msgpack.decode(read_spec(life_line), type=JobProcessSpec)
    folder = Path(spec.code or spec.tensors)
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    if spec.code:
        sys.path.insert(0, spec.code)
    trainer = MainThreadTrainer(folder)
    connection = run(_connection_of(spec, trainer))
    life = asyncio.run_coroutine_threadsafe(connection.run(), background_loop())

    def ended(life: Future[None]) -> None:
        trainer.close()
        if (error := life.exception()) is not None:
            _log.error("the job cannot go on: %s", error, extra={"job": spec.job_id})
            _exit_within(EXIT_GRACE_S, status=1)

    def end() -> None:
        _exit_within(EXIT_GRACE_S)
        asyncio.run_coroutine_threadsafe(connection.close(), background_loop())

    life.add_done_callback(ended)
    _watch(life_line, signals, end)
    try:
        serve(spec, trainer, folder)
    except HanseError as failure:
        _tell(connection, failure)
        _log.error("the job cannot go on: %s", failure.reason, extra={"job": spec.job_id})
        return 1
    return 0 if life.exception() is None else 1


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


async def _connection_of(spec: JobProcessSpec, trainer: Trainer) -> JobConnection:
    return JobConnection(spec, trainer, rng=random.Random())  # noqa: S311 - spreads retries, hides nothing


def _tell(connection: JobConnection, failure: HanseError) -> None:
    """Tell the server of *failure*, if it can be told, and leave it."""
    try:
        run(connection.report_failure(failure), REPORT_TIMEOUT_S)
    except HanseError as error:
        _log.warning("the server was not told", extra={"reason": error.reason})
    _exit_within(EXIT_GRACE_S, status=1)
    run(connection.close())


def _take_life_line() -> BinaryIO:
    """Return the pipe to the agent, moved away from standard input, which the job's code may read and finds empty."""
    life_line = os.fdopen(os.dup(0), "rb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return life_line


def _catch_sigterm() -> int:
    """Return the end of a pipe on which SIGTERM arrives from now on.

    A handler would have to wait until the main thread leaves whatever the job's code calls.
    """
    signals, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    return signals


def _watch(life_line: BinaryIO, signals: int, end: Callable[[], None]) -> None:
    """Call *end*, from a thread of its own, when the agent is gone or asks by SIGTERM."""
    agent = life_line.fileno()

    def watch() -> None:
        while True:
            ready, _, _ = select.select([agent, signals], [], [])
            if signals in ready and signal.SIGTERM in os.read(signals, 64):
                break
            if agent in ready and not os.read(agent, 64):
                break
        end()

    threading.Thread(target=watch, name="life line", daemon=True).start()


def _exit_within(grace_s: float, status: int = 0) -> None:
    """Have the process be gone after *grace_s* seconds, though user code or one of its threads may not want to end."""
    timer = threading.Timer(grace_s, os._exit, [status])
    timer.daemon = True
    timer.start()


if __name__ == "__main__":
    sys.exit(main())
