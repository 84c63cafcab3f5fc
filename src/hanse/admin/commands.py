"""What a server answers its administrators: one handler a topic.

Whether a role may ask at all is decided before a handler is called, by the server's gate, which notes whom it refuses;
here only what depends on the thing itself is: whose job is to be aborted. Every command that changes something is in
the audit log, whether it was done or refused, with who asked and why it was refused.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from hanse.cell.cell import Cell, Handler
from hanse.cell.frames import MAX_PAYLOAD_BYTES
from hanse.coordination.certificates import expired_text, servers_remark
from hanse.coordination.policy import demand_abort
from hanse.errors import HanseError, NotFound, ProtocolError, Unauthenticated
from hanse.ids import NAME_RULE, ClientName, Fqcn, JobId, is_name
from hanse.job import ENDED, JobState, Resources
from hanse.messages import (
    Channel,
    ClientList,
    DisableClient,
    Header,
    JobList,
    JobQuery,
    JobSubmitted,
    ListClients,
    ListJobs,
    LogQuery,
    LogText,
    Message,
    PromoteServer,
    RegisteredClient,
    ServerStatus,
    ServerStop,
    StandbyView,
    StatusQuery,
    SubmitJob,
    ok,
)
from hanse.server.bounds import shortened
from hanse.server.federated_server import FederatedServer
from hanse.server.job_board import looked_up
from hanse.server.payloads import expect
from hanse.storage.packages import MAX_PACKAGE_BYTES
from hanse.storage.records import AuditEntry, Standby
from hanse.storage.tensors import TensorFiles

MAX_JOBS: Final = 1000
MAX_ROUNDS: Final = 1000
"""The most rounds that a job's history is shown with: the last ones. An answer has to fit into one message."""
MAX_ANSWER_BYTES: Final = MAX_PAYLOAD_BYTES - 64 * 1024
MAX_LOG_LINES: Final = 10_000
MAX_AUDITED_CHARS: Final = 128
STANDBY_HEARD_S: Final = 60.0
"""A server that has not said for so long that it stands by is not handed over to; every few seconds is usual."""

_log = logging.getLogger(__name__)
T = TypeVar("T")
S = TypeVar("S", bound=msgspec.Struct)


class AdminCommands:
    """A command module: ``FederatedServer(cmd_modules=[AdminCommands()])``.

    *on_stop* is called, on the event loop, when an administrator stops the server: whoever owns the server then shuts
    it down. Without it the server is shut down from a thread of its own.
    """

    def __init__(self, *, on_stop: Callable[[], None] | None = None, wall: Callable[[], float] = time.time) -> None:
        self._on_stop = on_stop
        self._wall = wall

    def register(self, server: FederatedServer, cell: Cell) -> None:
        """Let *cell* answer administrators on behalf of *server*."""
        desk = _Desk(server, on_stop=self._on_stop or (lambda: _shut_down(server)), wall=self._wall)
        for topic, handler in desk.handlers().items():
            cell.on(Channel.ADMIN, topic, handler)


class _Desk:
    """The handlers of one server."""

    def __init__(self, server: FederatedServer, *, on_stop: Callable[[], None], wall: Callable[[], float]) -> None:
        self._server = server
        self._on_stop = on_stop
        self._wall = wall
        self._since = wall()

    def handlers(self) -> Mapping[str, Handler]:
        """Return the handler of each topic."""
        return {
            "job.submit": self._submit,
            "job.list": self._list,
            "job.show": self._show,
            "job.watch": self._watch,
            "job.abort": self._abort,
            "job.log": self._job_log,
            "client.list": self._clients,
            "client.disable": self._disable,
            "server.status": self._status,
            "server.stop": self._stop,
            "server.promote": self._promote,
        }

    # jobs

    async def _submit(self, message: Message) -> Message:
        request, who = expect(message, SubmitJob), _asker(message)
        files = self._server.jobs.files.upload_files(who)
        record = await self._audited(who, "job.submit", request.package, self._submitted(request, who, files))
        return ok(record)

    async def _submitted(self, request: SubmitJob, who: str, files: TensorFiles) -> JobSubmitted:
        package = files.path(request.package)
        try:
            if not 0 < request.package_bytes <= MAX_PACKAGE_BYTES:
                expected = f"1 to {MAX_PACKAGE_BYTES} bytes"
                raise ProtocolError("SubmitJob.package_bytes", got=request.package_bytes, expected=expected)
            if not await asyncio.to_thread(files.verify, request.package):
                raise NotFound("uploaded package", request.package)
            if (size := files.size(request.package)) != request.package_bytes:
                raise ProtocolError("SubmitJob.package_bytes", got=request.package_bytes, expected=f"{size}, its size")
            record = await self._server.jobs.submit(package, submitter=who)
        finally:
            await asyncio.to_thread(_clear_up, files, package)
        return JobSubmitted(record.job_id, record.spec.name)

    async def _list(self, message: Message) -> Message:
        request = expect(message, ListJobs)
        states = [state.value for state in JobState]
        if request.state and request.state not in states:
            raise ProtocolError("ListJobs.state", got=request.state, expected=f"nothing, or one of {', '.join(states)}")
        limit = min(max(request.limit, 1), MAX_JOBS)
        views = await self._server.jobs.board.views(state=request.state, limit=limit)
        return ok(JobList(_fitting(views, MAX_ANSWER_BYTES)))

    async def _show(self, message: Message) -> Message:
        view = await self._server.jobs.board.view(await self._found(message))
        bare = msgspec.structs.replace(view, history=())
        last_first = view.history[: -MAX_ROUNDS - 1 : -1]
        fitting = _fitting(last_first, MAX_ANSWER_BYTES - len(msgspec.msgpack.encode(bare)))
        return ok(msgspec.structs.replace(view, history=fitting[::-1]))

    async def _watch(self, message: Message) -> Message:
        jobs, job_id = self._server.jobs, await self._found(message)
        if (await jobs.board.view(job_id, history=False)).state not in ENDED:
            jobs.board.watch(job_id, Fqcn(message.headers[Header.ORIGIN]))
        # Looked up once more: what happened before it was watched must be in the answer, or its end might be missed.
        return ok(await jobs.board.view(job_id, history=False))

    async def _abort(self, message: Message) -> Message:
        job_id, who = await self._found(message), _asker(message)
        await self._audited(who, "job.abort", job_id, self._aborted(job_id, who, _role(message)))
        return ok(await self._server.jobs.board.view(job_id, history=False))

    async def _aborted(self, job_id: JobId, who: str, role: str) -> None:
        jobs = self._server.jobs
        demand_abort((await jobs.board.view(job_id, history=False)).submitter, who=who, role=role)
        await jobs.abort(job_id, reason=f"aborted by {who}")

    async def _job_log(self, message: Message) -> Message:
        query, jobs = expect(message, LogQuery), self._server.jobs
        job_id = await jobs.board.find(query.job_id)
        view = await jobs.board.view(job_id, history=False)
        if query.client and query.client not in {client.name for client in view.clients}:
            raise NotFound(f"client of job {job_id}", query.client)
        client = ClientName(query.client) if query.client else None
        return ok(LogText(await jobs.board.log_of(job_id, client, lines=min(max(query.lines, 1), MAX_LOG_LINES))))

    async def _found(self, message: Message) -> JobId:
        return await self._server.jobs.board.find(expect(message, JobQuery).job_id)

    # clients and the server

    async def _clients(self, message: Message) -> Message:
        expect(message, ListClients)
        running = await looked_up(self._server.jobs.services.store.jobs(states=(JobState.RUNNING,)))
        now = self._server.clock()
        clients = []
        for client in sorted(self._server.get_all_clients().values(), key=lambda each: each.name):
            resources, release = client.props.get("resources"), client.props.get("release")
            ends_at, remark = self._server.clients.certificate_of(client.name)
            clients.append(
                RegisteredClient(
                    name=client.name,
                    state=self._server.clients.presence(client.name),
                    last_heard_s=max(now - client.last_connect_time, 0.0),
                    jobs=tuple(job.job_id for job in running if client.name in job.clients),
                    resources=resources if isinstance(resources, Resources) else Resources(),
                    release=release if isinstance(release, str) else "",
                    certificate_ends_at=ends_at,
                    remark=remark,
                )
            )
        disabled = await looked_up(self._server.jobs.services.store.disabled_clients(), what="disabled clients")
        refused = tuple(each for each in self._server.refused.views() if each.name not in disabled)
        registered = {client.name for client in clients}
        expired = {
            str(name): expired_text(ended_at)
            for name, ended_at in self._server.clients.expired().items()
            if name not in registered
        }
        return ok(ClientList(tuple(clients), disabled, refused, expired))

    async def _disable(self, message: Message) -> None:
        request, who = expect(message, DisableClient), _asker(message)
        action = "client.disable" if request.disabled else "client.enable"
        await self._audited(who, action, request.client, self._disabled(request, who))

    async def _disabled(self, request: DisableClient, who: str) -> None:
        if not is_name(request.client):
            raise ProtocolError("DisableClient.client", got=request.client, expected=NAME_RULE)
        services = self._server.jobs.services
        reason = f"disabled by {who}"
        await services.store.set_disabled(services.epoch, request.client, request.disabled, reason=reason)
        self._server.set_disabled(ClientName(request.client), reason if request.disabled else None)

    async def _status(self, message: Message) -> Message:
        expect(message, StatusQuery)
        running = await looked_up(self._server.jobs.services.store.jobs(states=(JobState.RUNNING,)))
        ends_at = self._server.certificate_ends_at
        return ok(
            ServerStatus(
                state=self._server.service.state.value,
                ssid=self._server.service.ssid,
                project=self._server.project_name,
                release=version("hanse"),
                clients=len(self._server.get_all_clients()),
                jobs_running=len(running),
                since=self._since,
                name=self._server.name,
                standbys=tuple(StandbyView(each.name, each.target, each.seen_at) for each in await self._standbys()),
                certificate_ends_at=ends_at or 0.0,
                remark="" if ends_at is None else servers_remark(ends_at, self._server.wall()),
            )
        )

    async def _stop(self, message: Message) -> None:
        expect(message, ServerStop)
        who = _asker(message)
        await self._audited(who, "server.stop", self._server.project_name, _nothing())
        _log.info("stopped by an administrator", extra={"admin": who})
        self._on_stop()

    async def _promote(self, message: Message) -> None:
        request, who = expect(message, PromoteServer), _asker(message)
        await self._audited(who, "server.promote", request.name, self._demand_standby(request.name))
        _log.info("handing over", extra={"admin": who, "successor": request.name})
        # In a thread, for it waits for the loop; and not awaited, for the answer must be out before everybody is.
        threading.Thread(target=_hand_over, args=(self._server, request.name), name="handover").start()

    async def _demand_standby(self, name: str) -> None:
        """Let a handover to the server called *name* pass.

        Raises:
            NotFound: no server of that name has said of late that it stands by; the sentence says which have.
        """
        names = [standby.name for standby in await self._standbys()]
        if name not in names:
            known = f"; {', '.join(names)} stands by" if names else "; none stands by"
            raise NotFound(f"server standing by{known}:", name)

    async def _standbys(self) -> list[Standby]:
        """Return the other servers that have said within the last minute that they stand by."""
        store = self._server.jobs.services.store
        found = await looked_up(store.standbys(within_s=STANDBY_HEARD_S), what="servers that stand by")
        return [each for each in found if each.name != self._server.name]

    # audit

    async def _audited(self, who: str, action: str, thing: str, work: Awaitable[T]) -> T:
        """Return what *work* returns, with an entry in the audit log about how it went."""
        try:
            result = await work
        except HanseError as error:
            await self._audit(who, action, thing, error.code, error.reason)
            raise
        if isinstance(result, JobSubmitted):
            thing = result.job_id
        await self._audit(who, action, thing, "done")
        return result

    async def _audit(self, who: str, action: str, thing: str, outcome: str, reason: str = "") -> None:
        """Add an entry to the audit log; if that fails, the server's log has it, and the answer stays what it is.

        Whoever heard that a job was not submitted, because this was not written, would submit it once more.
        """
        entry = AuditEntry(self._wall(), who, action, shortened(thing, MAX_AUDITED_CHARS), outcome, shortened(reason))
        try:
            services = self._server.jobs.services
            await services.store.audit(services.epoch, entry)
        except HanseError as failed:
            extra = {**msgspec.structs.asdict(entry), "failed": failed.reason}
            _log.error("a command is not in the audit log", extra=extra)


def _fitting(views: Sequence[S], room: int) -> tuple[S, ...]:
    """Return as many of the first *views* as *room* bytes hold."""
    fitting: list[S] = []
    for view in views:
        room -= len(msgspec.msgpack.encode(view))
        if room < 0:
            break
        fitting.append(view)
    return tuple(fitting)


def _shut_down(server: FederatedServer) -> None:
    """Shut *server* down; not on the event loop, because that is among what it waits for."""
    threading.Thread(target=server.fl_shutdown, name="shutdown").start()


def _hand_over(server: FederatedServer, successor: str) -> None:
    try:
        server.hand_over(successor)
    except HanseError as error:  # it has lost the primacy meanwhile, so another has it
        _log.warning("not handed over", extra={"successor": successor, "reason": error.reason})


def _clear_up(files: TensorFiles, package: Path) -> None:
    """Delete *package*, which has been dealt with, and what this administrator's earlier uploads broke off at."""
    package.unlink(missing_ok=True)
    files.drop_unfinished()


async def _nothing() -> None:
    """Do the work of a command whose effect comes after its answer."""


def _asker(message: Message) -> str:
    """Return the name of the administrator who asks, as the cell has stamped it.

    Raises:
        Unauthenticated: nobody has proven to be one.
    """
    who = message.get_header(Header.CLIENT)
    if not who:
        raise Unauthenticated("the request comes from nobody: log in with an administrator's kit")
    return who


def _role(message: Message) -> str:
    return message.get_header(Header.ROLE) or ""
