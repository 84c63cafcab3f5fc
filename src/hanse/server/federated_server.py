"""The server's public contract: ``BaseServer`` and ``FederatedServer``.

Both are small because they compose: ``clients`` (who they prove to be, which tokens they hold), ``admittance`` (who may
open a stream and ask what), ``tenure`` (the lease and the jobs under it), ``coordination.service`` (hot or cold).
Message handlers are plain functions ``Message -> Message``: the network calls them, and so may a test or a program.
What a handler raises becomes its reply, in one place (``_answered``), so that no failure is ever answered with an empty
success.

``FederatedServer`` has two roles in two processes, as the contract wants. The deployed server registers clients and
runs jobs; in a job's own process, ``create_job_cell`` and ``start_run`` drive one run (``run_manager``).
"""

import argparse
import asyncio
import logging
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

from hanse.cell.cell import Cell, current_peer
from hanse.cell.handshake import Reception
from hanse.cell.link import Peer
from hanse.cell.listener import Listener
from hanse.cell.loop import background_loop, run
from hanse.cell.refusals import RemoteError, refuse
from hanse.cell.transfer import Files
from hanse.coordination.absence import Absence, disabled_text
from hanse.coordination.certificates import EXPECTED_S, expired_text
from hanse.coordination.policy import ADMIN_RIGHTS, PeerKind, Right
from hanse.coordination.registry import Presence, fingerprint
from hanse.coordination.service import (
    RequestKind,
    Service,
    ServiceState,
    Verdict,
    refusal,
)
from hanse.errors import (
    CertificateExpired,
    ConfigError,
    Conflict,
    HanseError,
    InternalError,
    NotInService,
    StaleEpoch,
    StoreFailed,
    Unauthenticated,
    Unauthorized,
)
from hanse.events import EventType, FLComponent, FLContext
from hanse.identity.private_files import make_private_folder
from hanse.identity.tokens import CLIENT_SCOPE, parse_token
from hanse.ids import SERVER, ClientName, Fqcn, JobId, Ssid, split_cell
from hanse.job import Job, JobRecord, JobSpec
from hanse.launch.left_behind import ProcessNotes
from hanse.launch.process import Launcher, ProcessLauncher
from hanse.messages import (
    Challenge,
    Channel,
    Client,
    Credentials,
    Header,
    Heartbeat,
    HeartbeatReply,
    Hello,
    JobFailure,
    Message,
    Payload,
    Quit,
    Register,
    Registered,
    ReturnCode,
    RunEnded,
    RunSnapshot,
    Topic,
    ok,
)
from hanse.run.authoring import package_of
from hanse.server.admittance import Admittance
from hanse.server.base_server import AdminServer, BaseServer
from hanse.server.clients import Clients, Lifetimes
from hanse.server.identities import identities_of
from hanse.server.jobs import JobLimits, Jobs
from hanse.server.lifetime import holder_of, only_user_of
from hanse.server.listening import SOCKET_FILE, Place, server_tls
from hanse.server.overseer import HeldFor, OverseerAgent
from hanse.server.own_certificate import warning_of_the_end
from hanse.server.payloads import expect
from hanse.server.primacy import Primacy
from hanse.server.refused import RefusedPeers
from hanse.server.run_desk import answer_not_in_service
from hanse.server.run_host import RunHost
from hanse.server.run_manager import RunManager
from hanse.server.run_services import RunServices
from hanse.server.run_spec import WITHHELD
from hanse.server.tenure import HeldLease, Tenure, boot_time
from hanse.settings import ServerSettings
from hanse.storage.objects import Objects, objects_at
from hanse.storage.records import AuditEntry, Lease, Store, store_of

__all__ = ["AdminServer", "BaseServer", "CommandModule", "FederatedServer", "TaskMetaInfo"]

MAX_SOCKET_PATH: Final = 100
"""Unix socket paths are limited to little more than this; a longer workspace has its socket in the temporary folder."""
NOTES_FOLDER: Final = "processes"
"""Where in the workspace notes are kept of the runs' processes while they live."""

_log = logging.getLogger(__name__)


class CommandModule(Protocol):
    """A set of administrative commands."""

    def register(self, server: "FederatedServer", cell: Cell) -> None:
        """Let *cell* answer the module's commands, on behalf of *server*."""


class TaskMetaInfo(NamedTuple):
    """What identifies the model that a client works on."""

    project: str
    job_id: JobId
    round: int
    client: ClientName


@dataclass(frozen=True, slots=True)
class _Deployed:
    """What a deployed server works with."""

    store: Store
    cell: Cell
    reception: Reception
    workspace: Path
    runs: Path
    objects: Objects | None
    launcher: Launcher
    socket: Path


class FederatedServer(BaseServer):
    """A federated-learning server: identifies and registers clients, and runs jobs with them.

    ``cmd_modules`` are admin command modules: each has ``register(server, cell)``. ``snapshot_persistor`` is the store
    of run state (``hanse.storage.records.Store``); by default one is embedded in the workspace. ``overseer_agent`` says
    which server is primary; without one, this server is, alone. ``check_engine_frequency`` is the seconds between a job
    process's heartbeats to its parent. ``args`` may hold ``settings`` (``hanse.settings.ServerSettings``), whose time
    limits then apply, and ``launcher``, which starts the runs' processes.
    """

    def __init__(
        self,
        project_name: str | None = None,
        min_num_clients: int = 2,
        max_num_clients: int = 10,
        cmd_modules: Sequence[CommandModule] | None = None,
        heart_beat_timeout: float = 600,
        handlers: list[FLComponent] | None = None,
        args: argparse.Namespace | None = None,
        secure_train: bool = False,
        snapshot_persistor: Store | None = None,
        overseer_agent: OverseerAgent | None = None,
        shutdown_period: float = 30.0,
        check_engine_frequency: float = 3.0,
    ) -> None:
        super().__init__(project_name, min_num_clients, max_num_clients, heart_beat_timeout, handlers, shutdown_period)
        self.args = args
        self.secure_train = secure_train
        self.check_engine_frequency = check_engine_frequency
        self.max_reg_duration = 60.0
        self._settings: ServerSettings = getattr(args, "settings", None) or ServerSettings(
            project=self.project_name or "hanse"
        )
        self._cmd_modules = tuple(cmd_modules or ())
        self._store = snapshot_persistor
        self._overseer = overseer_agent
        self._primacy = Primacy(
            is_alone=overseer_agent is None,
            name=lambda: self.name,
            begin=self._begin_tenure,
            cell=self._own_cell,
        )
        self._clients = Clients(
            self._registry,
            self._lock,
            project=self.project_name,
            session=lambda: self._primacy.service.ssid,
            clock=lambda: self.clock(),
            wall=lambda: self.wall(),
        )
        self._refused = RefusedPeers(lambda: self.clock())
        self._is_leaving = False
        self._tokens: set[str] = set()
        self._registered_early: set[ClientName] = set()  # before there was an epoch to write their tokens under
        self._deployed: _Deployed | None = None
        self._run_host = RunHost(self.project_name, self._handlers, heartbeat_s=check_engine_frequency)

    # the requests of the contract: each handler raises, and ``_answered`` makes the reply

    def client_challenge(self, request: Message) -> Message:
        """First half of mutual identification: open a session, and prove this server over the client's nonce.

        Not in service: COMM_ERROR. Not secure, another project, a bad certificate: UNAUTHENTICATED.
        """
        return self._noting_refusal(request, _answered(self._challenge, request))

    def register_client(self, request: Message) -> Message:
        """Second half: verify who the client is, register it, and reply with token, token signature and SSID.

        The same name again: the older token is logged out completely. Project mismatch, full, disabled, bad identity, a
        handler's refusal: UNAUTHENTICATED with the reason. An administrator is identified in the same way and gets a
        token of its role; it is no client, and is not counted as one.
        """
        reply = self._noting_refusal(request, _answered(self._register, request))
        self._fire(EventType.CLIENT_REGISTER_PROCESSED, request, reason=reply.reason)
        return reply

    def client_heartbeat(self, request: Message) -> Message:
        """Refresh the client; reply with the jobs that it should abort.

        A validly signed token that this server does not know (it restarted) re-activates the client, within
        ``max_num_clients``, if the name is free. Jobs that this server runs there, and that were reported before, are
        declared dead on that client. Disabled: UNAUTHENTICATED, "disabled" in the reason.
        """
        reply = _answered(self._heartbeat, request)
        self._fire(EventType.CLIENT_HEARTBEAT_PROCESSED, request, reason=reply.reason)
        return reply

    def quit_client(self, request: Message) -> Message:
        """Log out an existing client that quits: its further contributions are rejected; min and max are unchanged."""
        reply = _answered(self._quit, request)
        if reply.reason == "":
            self._fire(EventType.CLIENT_QUIT, request)
        return reply

    def process_job_failure(self, request: Message) -> Message:
        """Take a client's word that a job failed there for good: the run ends with that reason.

        The sender must be a registered client that takes part in the job.
        """
        return _answered(self._job_failure, request)

    def authentication_check(self, request: Message, state_check: Verdict) -> str | None:
        """Return ``None`` when the request may pass; otherwise the reason.

        *state_check* is what the service state says to the request's kind: its message comes first; then "Request from
        unknown client SSID" when the request's SSID is not this service session's.
        """
        ssid = request.get_header(Header.SSID)
        return refusal(self._primacy.service, state_check, ssid=None if ssid is None else Ssid(ssid))

    def sign_auth_token(self, client_name: str, token: str) -> str:
        """Return the server's signature that binds *token* to *client_name*; fields are separated unambiguously."""
        return self._clients.identities.signer.sign(client_name, token)

    def verify_auth_token(self, client_name: str, token: str, signature: str) -> bool:
        """Return whether *signature* binds *token* to *client_name*."""
        return self._clients.identities.signer.verify(client_name, token, signature)

    def task_meta_info(self, client_name: str) -> TaskMetaInfo:
        """Return what identifies the model that *client_name* works on: an update with an older one is stale.

        Outside a job, ``job_id`` is empty and ``round`` -1.
        """
        tenure = self._primacy.tenure
        meta = tenure.jobs.live.current_task(ClientName(client_name)) if tenure is not None else None
        job_id, round_number = meta if meta is not None else (JobId(""), -1)
        return TaskMetaInfo(self.project_name, job_id, round_number, ClientName(client_name))

    def reset_tokens(self) -> None:
        """Let each registered client take a task again: what is outstanding is handed out once more."""
        with self._lock:
            self._tokens = set(self._registry.snapshot())
        if self._primacy.tenure is not None:
            self._primacy.tenure.jobs.hand_out_again()

    def remove_client_data(self, token: str) -> None:
        """Forget the token's task data; unknown: nothing."""
        with self._lock:
            self._tokens.discard(token)

    def notify_dead_client(self, client: Client) -> None:
        """Tell every run in which *client* takes part."""
        if self._primacy.tenure is not None:
            self._primacy.tenure.jobs.client_watch.gone(client.name)

    def set_disabled(self, name: ClientName, reason: str | None) -> None:
        """Refuse client *name* from now on, because of *reason*; ``None``: no longer."""
        client = self._clients.set_disabled(name, reason)
        if client is not None:
            self._forget(client)
            self._keep_token_soon(name)
        if reason is None:
            self._refused.forget(name)  # what it was refused for counts no more
        else:
            self._drop_cells_of(name, Unauthenticated(f"client {name} is disabled"))

    # service state

    def overseer_callback(self, overseer_agent: OverseerAgent) -> None:
        """Take the overseer's word on who is primary and move the service state.

        Becoming primary resumes the committed runs; losing it stops serving before anyone else may start. Calls do not
        overlap; an error is logged and never raised into the agent.
        """
        self._primacy.observe(overseer_agent)

    @property
    def service(self) -> Service:
        """The service state and the session (SSID) of this tenure."""
        return self._primacy.service

    @property
    def jobs(self) -> Jobs:
        """The jobs of this tenure.

        Raises:
            NotInService: the server is not deployed, or not hot.
        """
        if self._primacy.tenure is None:
            raise NotInService
        return self._primacy.tenure.jobs

    def submit_job(self, job: Job | Path | str, *, submitter: str = "server") -> JobId:
        """Submit *job*, a ``Job`` or the folder of one, and return its id; from a plain thread.

        Raises:
            JobInvalid: its definition does not hold, or a handler refuses it.
            NotInService: the server is not deployed, or not hot.
        """
        _, package = package_of(job)
        with tempfile.TemporaryDirectory(prefix="hanse-") as folder:
            path = Path(folder) / "package.zip"
            path.write_bytes(package)
            return run(self.jobs.submit(path, submitter=submitter)).job_id

    def wait_for_job(self, job_id: JobId, timeout_s: float | None = None) -> JobRecord:
        """Return the job's record once it has ended; from a plain thread.

        Raises:
            NotFound: there is no such job.
            NotInService: the server is not deployed, or not hot, or ceases to be.
            TimedOut: it has not ended within *timeout_s*.
        """
        return run(self.jobs.wait(job_id), timeout_s)

    def hand_over(self, successor: str) -> None:
        """Leave the primacy to the server called *successor*, which stands by; from a plain thread.

        Runs are parked and the lease is left to the successor; if that does not take it, any server may.

        Raises:
            Conflict: this server is not hot.
        """
        self._primacy.hand_over(successor)

    def call_when_lost(self, callback: Callable[[], None]) -> None:
        """Call *callback*, on the event loop, when this server's tenure ends that nobody ended.

        Its lease is another's, or what serves the jobs broke; the log says which. A server without an overseer agent
        serves nobody from then on, so whoever runs it does best to end and start it again: its runs resume.
        """
        self._primacy.call_when_lost(callback)

    @property
    def name(self) -> str:
        """What its settings and its certificate call the server."""
        return self._settings.name

    @property
    def certificate_ends_at(self) -> float | None:
        """When its certificate ends, in POSIX seconds; ``None`` where it has none."""
        identification = self._clients.identities.identification
        return None if identification is None else identification.identity.expires.timestamp()

    @property
    def clients(self) -> Clients:
        """The clients of this server."""
        return self._clients

    @property
    def refused(self) -> RefusedPeers:
        """Who was refused lately, and why."""
        return self._refused

    @property
    def reception(self) -> Reception:
        """Where cells of the same process dial in.

        Raises:
            NotInService: the server is not deployed.
        """
        if self._deployed is None:
            raise NotInService
        return self._deployed.reception

    # lifetime

    def deploy(
        self, args: argparse.Namespace, grpc_args: Mapping[str, Any] | None = None, secure_train: bool = False
    ) -> None:
        """Deploy as the base does, with everything that makes a server of it.

        The handlers are registered, every incoming message's credentials are checked, the service state is the overseer
        agent's word, and what the store says was running is resumed.
        """
        self.secure_train = self.secure_train or secure_train
        super().deploy(args, grpc_args, self.secure_train)
        if self._overseer is not None:
            self._overseer.start(self.overseer_callback)

    def fl_shutdown(self) -> None:
        """Park all jobs (they resume at the next start), fire SYSTEM_END, then as the base."""
        if self._overseer is not None:
            self._overseer.end()
        if self._deployed is not None and not self._closing:
            self._is_leaving = True
            run(self._primacy.park())
            self._handlers.tell(EventType.SYSTEM_END, self._context())
        super().fl_shutdown()

    def close(self) -> int:
        """Close as the base does, and stop the overseer agent."""
        if self._overseer is not None:
            self._overseer.end()
        result = super().close()
        self._primacy.shut_down()
        return result

    @asynccontextmanager
    async def _services(self, where: Place, args: argparse.Namespace) -> AsyncIterator[Cell]:
        """Run the store, the port and the jobs; whichever of them started is gone when this ends."""
        self._settings = getattr(args, "settings", None) or self._settings
        self._clients.lifetimes = Lifetimes(self._settings.token_lifetime_s, self._settings.heartbeat_s)
        self._registry.token_lifetime_s = self._settings.token_lifetime_s
        make_private_folder(where.workspace)
        async with AsyncExitStack() as stack:
            stack.enter_context(only_user_of(where.workspace))
            notes = ProcessNotes(where.workspace / NOTES_FOLDER)
            await asyncio.to_thread(notes.end_left_behind)  # when this server was killed with a run's process
            self._clients.identities = identities_of(where, self.project_name, max_reg_duration_s=self.max_reg_duration)
            if (ends_at := self.certificate_ends_at) is not None:
                await stack.enter_async_context(warning_of_the_end(ends_at, lambda: self.wall()))
            store = await stack.enter_async_context(self._store or _embedded_store(where.workspace))
            admittance = self._admittance()
            cell = Cell(Fqcn(SERVER), gate=lambda *arrival: self._gate(admittance, *arrival))
            stack.push_async_callback(cell.close)
            self._answer_on(cell)
            self._deployed = deployed = _Deployed(
                store=store,
                cell=cell,
                reception=Reception(
                    cell,
                    authorize=admittance.authorize,
                    session=lambda: self._primacy.service.ssid,
                    wait_turn=self._primacy.wait_turn,
                    server=self._settings.name,
                    release=version("hanse"),
                    on_refused=self._note_refused_hello,
                ),
                workspace=where.workspace,
                runs=Path(self._settings.runs_folder or where.workspace / "runs"),
                objects=objects_at(self._settings.bucket) if self._settings.bucket else None,
                launcher=getattr(args, "launcher", None) or ProcessLauncher(withheld=WITHHELD, notes=notes),
                socket=stack.enter_context(_socket_of(where)),
            )
            stack.push_async_callback(self._primacy.park)
            if self._overseer is None:
                await self._primacy.begin(None)
            cell.target = where.target
            if where.scheme == "grpc":
                await self._listen(stack, where, deployed, admittance)
            else:
                stack.push_async_callback(deployed.reception.close, NotInService("the server is stopping"))
            # Before the port closes, or the runs' processes, cut off from it, would count as having died.
            stack.push_async_callback(self._primacy.park)
            self._handlers.tell(EventType.SYSTEM_START, self._context())
            yield cell

    async def _listen(self, stack: AsyncExitStack, where: Place, deployed: _Deployed, admittance: Admittance) -> None:
        authority = self._clients.identities.job_authority
        listener = Listener(
            deployed.reception,
            scopes=lambda peer, scope, *, write: self._scope(admittance, peer, scope, write),
            stays=admittance.stays,
            tls=server_tls(where, authority.certificate if authority is not None else b""),
            target=where.target,
            unix_path=deployed.socket,
        )
        deployed.cell.target = await listener.start()
        stack.callback(deployed.socket.unlink, missing_ok=True)
        stack.push_async_callback(listener.stop)

    def _admittance(self) -> Admittance:
        return Admittance(
            project=self.project_name,
            signer=self._clients.identities.signer,
            wall=lambda: self.wall(),
            serving=self._primacy.demand_serving,
            admitting=self._demand_admitting,
            disabled=self._clients.disabled_because,
            revoked=self._clients.is_revoked,
            certified=self._clients.demand_certified,
            left=self._clients.has_left,
            alive=self._demand_alive,
            job_cell_of=self._clients.job_cell_of,
        )

    def _demand_alive(self, job_id: JobId) -> None:
        if self._primacy.tenure is not None:
            self._primacy.tenure.jobs.live.demand_alive(job_id)

    def _gate(self, admittance: Admittance, peer: Peer, topic: Topic, message: Message) -> None:
        """Let *peer*'s message pass: who it is, what it may ask, and whether this service takes a contribution now."""
        try:
            admittance.gate(peer, topic, message)
        except CertificateExpired as expired:
            # Nothing more is to go to it either. Over TLS it cannot come back as it is, and is not heard of again.
            self._drop_cell(peer.fqcn, expired)
            raise
        except Unauthorized as refused:
            self._audit_refused(peer, topic, refused)
            raise
        if topic != (Channel.TASK, "result"):
            return
        verdict = self._primacy.service.verdict(RequestKind.SUBMIT)
        reason = self.authentication_check(message, verdict)
        if verdict is Verdict.ABORT_RUN:
            raise RemoteError(reason or "", return_code=ReturnCode.ABORT_RUN)
        if verdict is Verdict.NOT_IN_SERVICE:
            raise NotInService
        if reason is not None:
            raise Unauthenticated(reason)

    async def _scope(self, admittance: Admittance, peer: Peer, scope: str, write: bool) -> Files:
        try:
            return await admittance.scope(peer, scope, write, self.jobs.files)
        except Unauthorized as refused:
            if scope == "upload":  # with which a submission begins
                self._audit_refused(peer, (Channel.ADMIN, "job.submit"), refused)
            raise

    def _audit_refused(self, peer: Peer, topic: Topic, refused: Unauthorized) -> None:
        """Have the audit log say who asked for a change that is not theirs to make."""
        tenure, right = self._primacy.tenure, ADMIN_RIGHTS.get(topic)
        if peer.kind != PeerKind.ADMIN or right in (None, Right.SEE) or tenure is None:
            return
        services = tenure.jobs.services
        entry = AuditEntry(self.wall(), split_cell(peer.fqcn)[0], topic[1], "", refused.code, refused.reason)

        async def write() -> None:
            try:
                await services.store.audit(services.epoch, entry)
            except HanseError as failed:
                extra = {"admin": entry.actor, "refused": refused.reason, "reason": failed.reason}
                _log.error("a command that was refused is not in the audit log", extra=extra)

        asyncio.run_coroutine_threadsafe(write(), background_loop())

    def _answer_on(self, cell: Cell) -> None:
        answer_not_in_service(cell)
        cell.on(Channel.SERVER, "challenge", lambda request: self.client_challenge(_from_stream(request)))
        cell.on(Channel.SERVER, "register", lambda request: self._register_over_stream(cell, _from_stream(request)))
        cell.on(Channel.SERVER, "renew", self._renew)
        cell.on(Channel.SERVER, "heartbeat", self.client_heartbeat)
        cell.on(Channel.SERVER, "quit", self._quit_over_stream)
        cell.on(Channel.SERVER, "job_failure", self.process_job_failure)
        cell.on_link_up(self._link_up)
        cell.on_link_down(self._link_down)
        for module in self._cmd_modules:
            module.register(self, cell)

    async def _begin_tenure(self, held: HeldFor | None, on_lost: Callable[[], None]) -> Tenure:
        """Return the tenure under the lease that is *held*, or is taken now; it has still to begin."""
        try:
            return await self._new_tenure(held, on_lost)
        finally:
            self._registered_early.clear()

    async def _new_tenure(self, held: HeldFor | None, on_lost: Callable[[], None]) -> Tenure:
        deployed = self._deployed
        if deployed is None:
            raise Conflict("the server", state="not deployed", wanted="made primary")
        is_contended = held is not None
        if held is None:
            held = HeldFor(await self._taken_lease(deployed), boot_time())
        # Another server may have changed them.
        self._clients.disable_only(await deployed.store.disabled_clients())
        kept = await deployed.store.kept_tokens()
        earlier = {name: counting for name, counting in kept.items() if name not in self._registered_early}
        for client in self._clients.count_only(earlier):
            self._forget(client)
        self._clients.restore_ends(await deployed.store.certificate_ends())
        lease = HeldLease(deployed.store, held.lease, is_contended=is_contended, taken_at=held.taken_at)
        services = RunServices(
            project=self.project_name,
            epoch=held.lease.epoch,
            store=deployed.store,
            store_id=store_of(held.lease.ssid),
            cell=deployed.cell,
            launcher=deployed.launcher,
            credentials=self._clients.job_credentials,
            absent=self._absent,
            handlers=self._handlers,
            now=asyncio.get_running_loop().time,
            wall=lambda: self.wall(),
            run_url=f"unix:{deployed.socket}",
            check_frequency_s=self.check_engine_frequency,
            mend_within_s=self._settings.mend_within_s,
        )
        limits = JobLimits(self._settings.max_running_jobs, self.min_num_clients, self._settings.lost_after)
        jobs = Jobs(
            services,
            workspace=deployed.workspace,
            runs=deployed.runs,
            objects=deployed.objects,
            clients=self._clients,
            limits=limits,
        )
        while self._registered_early:
            await self._store_token(services, self._registered_early.pop())
        self._keep_ends_soon(services)
        return Tenure(lease, jobs, on_lost=on_lost)

    async def _taken_lease(self, deployed: _Deployed) -> Lease:
        """Take the lease because nobody else can have it: this server is alone, or its overseer says that it is due."""
        settings = self._settings
        return await deployed.store.take_lease(
            await asyncio.to_thread(holder_of, deployed.workspace, settings.name),
            name=settings.name,
            target=settings.reached_at(settings.target),
            ttl_s=settings.lease_s,
            force=True,
        )

    def _own_cell(self) -> Cell | None:
        return self._deployed.cell if self._deployed is not None else None

    def _demand_admitting(self) -> None:
        self._primacy.demand_serving()
        if self._is_leaving:
            raise NotInService("Server not in service: it is shutting down")

    # what the handlers of the contract do

    def _challenge(self, request: Message) -> Payload:
        self._primacy.demand(RequestKind.REGISTER)
        challenge = expect(request, Challenge)
        return self._clients.challenge(request.get_header(Header.ORIGIN) or challenge.client, challenge)

    def _register(self, request: Message) -> Payload:
        self._primacy.demand(RequestKind.REGISTER)
        register = expect(request, Register)
        role = self._clients.identify(request.get_header(Header.ORIGIN) or register.client, register)
        _demand_own_stream(register.client, role)
        self._ask_handlers(EventType.CLIENT_REGISTER_RECEIVED, register.client, request)
        if role.partition(":")[0] == "admin":
            return self._clients.log_in(register, role)
        registered, replaced = self._clients.register(register)
        if replaced is not None:
            self._forget(replaced)
        with self._lock:
            self._tokens.add(registered.token)
        if self._primacy.tenure is not None:
            self._primacy.tenure.jobs.client_watch.registered(ClientName(register.client))
        self._wake_cleanup()
        self._keep_token_soon(ClientName(register.client))
        return registered

    async def _register_over_stream(self, cell: Cell, request: Message) -> Message:
        """Register, and take the stream for the client's (or administrator's) own from then on."""
        reply = self.register_client(request)
        peer = current_peer()
        if peer is not None and isinstance(reply.payload, Registered) and isinstance(request.payload, Register):
            given = reply.payload
            if given.role == CLIENT_SCOPE:  # the answer must stay true when this server crashes after it
                await self._keep_token(ClientName(request.payload.client))
            kind, _, role = given.role.partition(":")
            credentials = Credentials(request.payload.client, given.token, given.token_signature, given.ssid)
            kind = PeerKind.ADMIN.value if kind == "admin" else PeerKind.CLIENT.value
            cell.prove(peer, kind=kind, credentials=credentials, role=role)
        return reply

    async def _renew(self, request: Message) -> Message:
        """Give the stream's own peer a fresh token of the same scope, before the present one expires."""
        del request
        peer = current_peer()
        if peer is None:
            raise Unauthenticated("a token is renewed over the stream that it opened")
        before = peer.credentials
        token = self._clients.fresh_token(peer)
        if before is not None and parse_token(token).scope == CLIENT_SCOPE:
            # Before the old one ceases to count: while the store is away, the client goes on with that.
            await self._keep_token(ClientName(before.name), fingerprint(token))
        given = self._clients.renew(peer, token)
        with self._lock:
            if before is not None and before.token in self._tokens:
                self._tokens = self._tokens - {before.token} | {given.token}
        return ok(given)

    def _heartbeat(self, request: Message) -> Payload:
        self._primacy.demand(RequestKind.HEARTBEAT)
        heartbeat = expect(request, Heartbeat)
        self._ask_handlers(EventType.CLIENT_HEARTBEAT_RECEIVED, request.get_header(Header.CLIENT) or "", request)
        client, is_back = self._clients.hear(request)
        if is_back:
            with self._lock:
                self._tokens.add(client.token)
            self._wake_cleanup()
            self._note_stream(Fqcn(client.name))
        self._tell_admin_server(lambda admin_server: admin_server.client_heartbeat(client))
        tenure = self._primacy.tenure
        abort = (
            tenure.jobs.client_watch.heartbeat(client.name, heartbeat.jobs, heartbeat.idle)
            if tenure is not None
            else ()
        )
        return HeartbeatReply(abort, self._primacy.service.ssid)

    def _quit(self, request: Message) -> Payload:
        expect(request, Quit)
        client = self._clients.quit(self._clients.known(request).token)
        if client is not None:
            self._forget(client)
            # Its own stream stays for the reply, and the client closes it.
            self._drop_cells_of(client.name, Unauthenticated(f"client {client.name} has quit"), jobs_only=True)
            self._keep_token_soon(client.name)
        return None

    async def _quit_over_stream(self, request: Message) -> Message:
        reply = self.quit_client(request)
        if reply.return_code is ReturnCode.OK:
            await self._keep_token(ClientName(request.get_header(Header.CLIENT) or ""))
        return reply

    async def _keep_token(self, name: ClientName, of_token: str | None = None) -> None:
        """Have the store remember which of *name*'s tokens counts: the registry's, or that of fingerprint *of_token*.

        While this server is about to serve, that is done before it does.

        Raises:
            NotInService: it cannot be.
        """
        tenure = self._primacy.tenure
        if tenure is None and self._primacy.service.state is ServiceState.COLD2HOT:
            self._registered_early.add(name)
        elif tenure is None:
            raise NotInService
        else:
            await self._store_token(tenure.jobs.services, name, of_token)

    async def _store_token(self, services: RunServices, name: ClientName, of_token: str | None = None) -> None:
        now_s = services.wall()
        # Looked up here, on the event loop, and asked for at once, so that what is asked for last is what holds.
        counting = self._clients.counting(name) if of_token is None else of_token
        until_s = now_s + 2 * self._clients.lifetimes.token_s  # twice, for no two servers' clocks quite agree
        try:
            await services.store.keep_token(services.epoch, name, counting, now_s=now_s, until_s=until_s)
        except (StaleEpoch, StoreFailed) as failed:
            raise NotInService(f"Server not in service: {failed.reason}") from failed
        if ends := self._clients.take_ends():
            await self._keep_ends(services, ends)

    def _keep_token_soon(self, name: ClientName) -> None:
        """Do ``_keep_token`` for what did not come by a stream, which must not wait."""
        if current_peer() is not None or self._primacy.tenure is None:
            return

        async def keep() -> None:
            try:
                await self._keep_token(name)
            except HanseError as error:
                _log.warning("which token counts was not kept", extra={"client": name, "reason": error.reason})

        asyncio.run_coroutine_threadsafe(keep(), background_loop())

    async def _keep_ends(self, services: RunServices, ends: Mapping[str, float]) -> None:
        """Have the store remember *ends*: when clients' certificates end, where it has not been told.

        No client is refused because it cannot be. Then only this server knows, and tries again with the next client
        that comes or renews its token.
        """
        try:
            await services.store.keep_certificate_ends(services.epoch, ends, since_s=services.wall() - EXPECTED_S)
        except StaleEpoch:
            pass  # the clients show their certificates to this server's successor
        except StoreFailed as failed:
            self._clients.put_back_ends(ends)
            _log.warning("when certificates end was not kept", extra={"clients": sorted(ends), "reason": failed.reason})

    def _keep_ends_soon(self, services: RunServices) -> None:
        """Do ``_keep_ends`` for what must not wait."""
        if ends := self._clients.take_ends():
            asyncio.run_coroutine_threadsafe(self._keep_ends(services, ends), background_loop())

    def _job_failure(self, request: Message) -> Payload:
        failure = expect(request, JobFailure)
        participant, job_id = split_cell(Fqcn(request.get_header(Header.CLIENT) or ""))
        if job_id not in (None, failure.job_id):
            raise Unauthorized(f"{participant}.{job_id}", f"report on job {failure.job_id}", needs="to be of that job")
        self.jobs.client_watch.failed_at(self._clients.named(participant).name, failure)
        return None

    def _drop_cell(self, fqcn: Fqcn, error: HanseError) -> None:
        """End the stream of *fqcn*, once what has just come on it is answered; from any thread."""
        if self._deployed is not None:
            background_loop().call_soon_threadsafe(self._deployed.cell.drop, fqcn, error)

    def _drop_cells_of(self, name: ClientName, error: HanseError, *, jobs_only: bool = False) -> None:
        """End the streams of client *name* and of its jobs' processes; from any thread."""
        if self._deployed is None:
            return
        cell = self._deployed.cell

        def drop() -> None:
            for peer in cell.peers():
                participant, job_id = split_cell(peer.fqcn)
                if participant == name and (job_id is not None or not jobs_only):
                    cell.drop(peer.fqcn, error)

        background_loop().call_soon_threadsafe(drop)

    def _ask_handlers(self, gate: EventType, peer: str, request: Message) -> None:
        refused = self._handlers.ask(gate, self._context(peer=peer, message=request))
        if refused is not None:
            raise Unauthenticated(refused)

    # who is refused

    def _absent(self) -> dict[ClientName, Absence]:
        """Return the clients that cannot come, as far as that is known, each with why.

        Who is refused has proven nothing, so of a client that is there it says nothing.
        """
        refused = {
            ClientName(each.name): Absence(each.code, f"{each.reason} [{each.code}]") for each in self._refused.views()
        }
        expired = {
            name: Absence(CertificateExpired.code, expired_text(ended_at))
            for name, ended_at in self._clients.expired().items()
        }
        away = {name: why for name, why in refused.items() if self._clients.presence(name) != Presence.CONNECTED}
        disabled = {
            name: Absence(Unauthenticated.code, disabled_text(name, reason))
            for name, reason in self._clients.disabled().items()
        }
        return away | expired | disabled

    def _noting_refusal(self, request: Message, reply: Message) -> Message:
        """Return *reply*, having noted whom it lets in or refuses for good."""
        payload = request.payload
        if isinstance(payload, Challenge | Register) and reply.return_code is not ReturnCode.COMM_ERROR:
            if reply.return_code is not ReturnCode.OK:
                code = reply.get_header(Header.ERROR_CODE) or ""
                self._refused.note(payload.client, code=code, reason=reply.reason)
            elif isinstance(payload, Register):
                self._refused.forget(payload.client)
        return reply

    def _note_refused_hello(self, hello: Hello, error: HanseError) -> None:
        name, job_id = split_cell(hello.fqcn)
        if job_id is None and not error.retryable:
            self._refused.note(name, code=error.code, reason=error.reason)

    # streams

    def _link_up(self, peer: Peer) -> None:
        if peer.kind in (PeerKind.CLIENT, PeerKind.ADMIN):
            self._clients.shown(peer)
        if peer.kind == PeerKind.CLIENT:
            self._refused.forget(peer.fqcn)
            self._note_stream(peer.fqcn)
        if (tenure := self._primacy.tenure) is not None:
            self._keep_ends_soon(tenure.jobs.services)
            tenure.jobs.client_watch.link_up(peer)

    def _link_down(self, peer: Peer, reason: str) -> None:
        if peer.kind == PeerKind.CLIENT:
            self._clients.stream_down(peer)
            self._handlers.tell(EventType.CLIENT_DISCONNECTED, self._context(peer=peer.fqcn, reason=reason))
        if self._primacy.tenure is not None:
            self._primacy.tenure.jobs.board.leave(peer.fqcn)
            self._primacy.tenure.jobs.client_watch.link_down(peer)

    def _note_stream(self, fqcn: Fqcn) -> None:
        """Note that a client's stream is up, if it is: it may have come before the client was known."""
        peer = self._deployed.cell.peer(fqcn) if self._deployed is not None else None
        if peer is None:
            return
        if self._clients.stream_up(peer):
            self._handlers.tell(EventType.CLIENT_RECONNECTED, self._context(peer=fqcn))
        if self._primacy.tenure is not None:
            self._primacy.tenure.jobs.wake_soon()

    def _context(self, *, peer: str = "", message: Message | None = None, reason: str = "") -> FLContext:
        return FLContext("server", project=self.project_name, peer=peer, message=message, reason=reason)

    def _fire(self, notice: EventType, request: Message, *, reason: str = "") -> None:
        name = request.get_header(Header.CLIENT)
        if name is None and isinstance(request.payload, Register):
            name = request.payload.client
        self._handlers.tell(notice, self._context(peer=name or "", message=request, reason=reason))

    # a run in this process

    def create_job_cell(
        self, job_id: str, root_url: str, parent_url: str, secure_train: bool, server_config: Mapping[str, Any]
    ) -> Cell:
        """In a job's process: connect it as ``server.<job_id>`` to its parent, and make it obey the parent's commands.

        *parent_url* is where the parent listens for it (``unix:<path>``); *server_config* holds ``credentials``, those
        of this job's cell. The parent is on this machine, so *root_url* and *secure_train* make no difference.

        Raises:
            Unreachable: the parent does not answer.
            Unauthenticated: it does not take the credentials.
        """
        del root_url, secure_train
        credentials = server_config.get("credentials")
        if not isinstance(credentials, Credentials):
            raise ConfigError(
                "server_config['credentials']", got=credentials, expected="the Credentials of the job's cell"
            )
        return self._run_host.connect(JobId(job_id), parent_url, credentials)

    def create_run_manager(self, workspace: str | Path, job_id: str) -> RunManager:
        """Return what holds a run's components, handlers and context."""
        return self._run_host.manager(Path(workspace), JobId(job_id))

    def start_run(
        self,
        job_id: str,
        run_root: str | Path,
        conf: JobSpec,
        args: argparse.Namespace | None,
        snapshot: RunSnapshot | None,
    ) -> RunEnded:
        """Run a job in this process and return when it has ended; with a snapshot it continues from there.

        *run_root* is the run's folder, *conf* the job; ``args.epoch`` says whose tenure the run is of. Without
        *snapshot* the parent is asked where the run stands.

        Raises:
            Conflict: there is no job cell (``create_job_cell`` makes it), or a run already.
        """
        manager = replace(self.create_run_manager(run_root, job_id), epoch=getattr(args, "epoch", 0))
        self._run_host.start(manager, conf, snapshot)
        try:
            return self.run_engine()
        finally:
            self._run_host.end()

    def run_engine(self) -> RunEnded:
        """Run the current run to its end; a failure ends the run with its reason.

        Raises:
            Conflict: there is no current run.
        """
        return self._run_host.drive()

    def abort_run(self) -> None:
        """Abort the run in this process, if there is one: its clients are told, its state stays committed."""
        self._run_host.abort("aborted in its process")

    def stop_run_engine_cell(self) -> None:
        """Close the job cell, if there is one; a run in this process ends with it, and its server has it go on anew."""
        self._run_host.close_cell()

    def stop_training(self) -> None:
        """Hand out no new work: no further job starts here, and a run in this process ends after its present round."""
        if self._primacy.tenure is not None:
            self._primacy.tenure.jobs.stop_handing_out()
        self._run_host.stop_after_round()


def _answered(handler: Callable[[Message], Payload], request: Message) -> Message:
    """Return what *handler* makes of *request* as a reply: OK with its payload, or the error that it raised."""
    try:
        return ok(handler(request))
    except HanseError as error:
        _log.info("request refused", extra={"reason": error.reason, "origin": request.get_header(Header.ORIGIN)})
        return refuse(error)
    except Exception:  # noqa: BLE001 - a reply always says how it went; a check that crashed has let nobody pass
        _log.exception("request failed", extra={"origin": request.get_header(Header.ORIGIN)})
        return refuse(InternalError("answering a request"))


def _demand_own_stream(name: str, role: str) -> None:
    """Let *name* register over the stream that this comes by, if any; otherwise it would get what is for another.

    Raises:
        Unauthenticated: the stream was opened as another.
    """
    peer = current_peer()
    if peer is None:
        return
    opened_as = split_cell(peer.fqcn)[0] if role.startswith("admin:") else peer.fqcn
    if opened_as != name:
        raise Unauthenticated(f"{name!r} registers over a stream that was opened as {peer.fqcn!r}")


def _from_stream(request: Message) -> Message:
    """Return *request* with its stream for an origin: the name that an unproven peer claims is not one."""
    peer = current_peer()
    if peer is None or peer.proven:
        return request
    return Message({**request.headers, Header.ORIGIN: f"{peer.fqcn}#{id(peer):x}"}, request.payload)


@contextmanager
def _socket_of(where: Place) -> Iterator[Path]:
    """Give the path of the socket for runs' processes: in the workspace, or where that is too deep, apart."""
    path = (where.workspace / SOCKET_FILE).absolute()
    if where.scheme != "grpc" or len(str(path)) <= MAX_SOCKET_PATH:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="hanse-") as folder:
        yield Path(folder) / SOCKET_FILE


def _embedded_store(workspace: Path) -> Store:
    # A job's process has this class too and holds no database; SQLAlchemy would double what it takes to start.
    from hanse.storage.store import SqlStore  # noqa: PLC0415 - see above

    return SqlStore(workspace / "store.db")
