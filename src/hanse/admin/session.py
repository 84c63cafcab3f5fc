"""An administrator's session with a server: connect with a kit, prove who one is, and ask.

A session has an address of its own, ``<administrator>.cli-<random>``, so that two sessions of one person do not replace
each other. It reconnects by itself, each time proving itself anew, so it outlives a restart of the server: ``watch``
and ``wait`` go on where they were. Every other method asks once the link is up, waiting for it at most ``patience_s``.

``BlockingAdminSession`` is the same for programs without an event loop.
"""

import asyncio
import contextlib
import random
import secrets
import tempfile
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Final, Self, TypeVar

import msgspec
from blake3 import blake3

from hanse.cell.backoff import Backoff
from hanse.cell.cell import RemoteError
from hanse.cell.connector import Connector, Dial
from hanse.cell.link import Link, Peer
from hanse.cell.loop import run
from hanse.cell.rpc import ClientTls
from hanse.cell.transfer import TensorTransfers, Transfers
from hanse.client.registration import REGISTER_TIMEOUT_S, Registrant, registered_by
from hanse.client.uplink import Uplink, may_help_later
from hanse.errors import (
    ConfigError,
    Conflict,
    HanseError,
    ProtocolError,
    TimedOut,
    Unauthenticated,
    Unreachable,
)
from hanse.events import EventType
from hanse.identity.kits import Kit
from hanse.ids import SERVER, Digest, Fqcn, JobId
from hanse.job import ENDED, Job
from hanse.messages import (
    PROTOCOL_VERSIONS,
    Channel,
    ClientList,
    Credentials,
    DisableClient,
    Hello,
    JobEvent,
    JobList,
    JobQuery,
    JobSubmitted,
    JobView,
    ListClients,
    ListJobs,
    LogQuery,
    LogText,
    Message,
    PromoteServer,
    RefusedClient,
    Register,
    Registered,
    RegisteredClient,
    Renew,
    ReturnCode,
    ServerStatus,
    ServerStop,
    StatusQuery,
    SubmitJob,
    Welcome,
)
from hanse.settings import AdminSettings
from hanse.storage.tensors import TensorFiles

PATIENCE_S: Final = 10.0
ANSWER_TIMEOUT_S: Final = 60.0
SUCCEEDED_WITHIN_S: Final = 60.0
"""How long a server is waited for after the one that served has left; it takes over in seconds, or not at all."""
MAX_WAITING_EVENTS: Final = 4096
"""What a watcher has not taken yet; beyond that it misses the oldest, never the latest."""
INSECURE_ROLE: Final = "admin:admin"
"""What an administrator claims to be where nothing is proven."""

T = TypeVar("T")
S = TypeVar("S", bound=msgspec.Struct)


class AdminSession:
    """A session of the administrator whose *kit* it is; enter it to connect, and use it within.

    Belongs to one event loop. *on_waiting* hears in one sentence what is waited for while there is no link. *dial* and
    *transfers* stand in for gRPC where the server is in the same process.

    Entering raises ``Unreachable`` or ``TimedOut`` when no server answers within *patience_s*, and ``Unauthenticated``
    when either side does not prove itself. Every method may raise these, and ``RemoteError`` with what the server
    refuses.
    """

    def __init__(
        self,
        kit: Kit[AdminSettings],
        *,
        patience_s: float = PATIENCE_S,
        rng: random.Random | None = None,
        on_waiting: Callable[[str], None] | None = None,
        dial: Dial | None = None,
        transfers: TensorTransfers | None = None,
    ) -> None:
        self._kit = kit
        self._patience_s = patience_s
        self._rng = rng or random.Random()  # noqa: S311 - the jitter of pauses, nothing secret
        self._on_waiting = on_waiting
        self._dial, self._transfers = dial, transfers
        self._release = version("hanse")
        self._fqcn = Fqcn(f"{kit.settings.name}.cli-{secrets.token_hex(4)}")
        self._registrant = Registrant(
            kit.settings.project,
            kit.settings.name,
            kit.settings.server_names,
            kit.identity,
            kit.ca_pem,
            release=self._release,
        )
        self._registered: Registered | None = None
        self._is_registered = asyncio.Event()
        self._is_down = asyncio.Event()
        self._watches: set[_Watch] = set()
        self._life: AbstractAsyncContextManager[None] | None = None

    async def __aenter__(self) -> Self:
        """Connect."""
        self._life = self._connected()
        await self._life.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Disconnect."""
        if self._life is not None:
            await self._life.__aexit__(kind, error, trace)

    # jobs

    async def submit(self, job: Job | Path | str | bytes) -> JobSubmitted:
        """Submit *job*: a ``Job``, the folder of one, or a package (bytes).

        Raises:
            JobInvalid: it does not hold; here or, where only the server can tell, as a ``RemoteError`` from there.
        """
        package = job if isinstance(job, bytes) else await asyncio.to_thread(_package_of, job)
        digest = Digest(blake3(package).hexdigest())
        for may_try_again in (True, False):
            await self._ready()
            await self._moving.upload("upload", digest, memoryview(package))
            await self._ready()
            try:
                return await self._ask("job.submit", SubmitJob(digest, len(package)), JobSubmitted)
            except (Unreachable, TimedOut) as error:
                why = error.why if isinstance(error, Unreachable) else error.reason
                doubt = "whether it has taken the job is not known: look at 'hanse job list' before you submit it again"
                raise Unreachable(self._connector.target, f"{why}; {doubt}") from error
            except RemoteError as error:
                # Another session of the same administrator submitted the same bytes, and took them away.
                if not may_try_again or error.return_code is not ReturnCode.NOT_FOUND:
                    raise
        raise AssertionError("the loop above returns or raises")

    async def list(self, *, state: str = "", limit: int = 100) -> tuple[JobView, ...]:
        """Return the jobs, newest first, without their history; *state* narrows them."""
        return (await self._ask("job.list", ListJobs(state, limit), JobList)).jobs

    async def show(self, job_id: str) -> JobView:
        """Return the job with that id, or the only one whose id begins so, with its rounds' history."""
        return await self._ask("job.show", JobQuery(job_id), JobView)

    async def watch(self, job_id: str) -> AsyncIterator[JobEvent]:
        """Yield the job's events from now on until it has ended; nothing if it has.

        Goes on over a restart of the server; what happened meanwhile is not told again.
        """
        async for seen in self.follow(job_id):
            if isinstance(seen, JobEvent):
                yield seen

    async def follow(self, job_id: str) -> AsyncIterator[JobView | JobEvent]:
        """Yield the job as it is, and then what happens to it, until it has ended; then the job as it ended.

        After a break of the connection the job as it is comes again, then further events.
        """
        watch = _Watch()
        self._watches.add(watch)
        try:
            while True:
                view = await self._persist(lambda: self._ask("job.watch", JobQuery(job_id), JobView))
                yield view
                if view.state in ENDED:
                    return
                async for event in watch.events_of(view.job_id):
                    yield event
        finally:
            self._watches.discard(watch)

    async def wait(self, job_id: str) -> JobView:
        """Return the job once it has ended, with its history."""
        async for _ in self.follow(job_id):
            pass
        return await self._persist(lambda: self.show(job_id))

    async def abort(self, job_id: str) -> JobView:
        """Abort the job and return it."""
        return await self._ask("job.abort", JobQuery(job_id), JobView)

    async def log(self, job_id: str, *, client: str = "", lines: int = 200) -> str:
        """Return the last *lines* lines of the job's log at the server, or of what *client*'s process last reported."""
        return (await self._ask("job.log", LogQuery(job_id, client, lines), LogText)).text

    async def download(self, job_id: str, path: Path) -> JobView:
        """Write the model that the job resulted in to *path*, a ``.safetensors`` file, and return the job.

        The file appears whole, in place of one that was there, or not at all.

        Raises:
            Conflict: the job has no result.
            ConfigError: the file cannot be written.
        """
        view = await self.show(job_id)
        if not view.result:
            raise Conflict(f"job {view.job_id}", state=f"{view.state} without a result", wanted="downloaded")
        await self._ready()
        try:
            with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder:
                files = TensorFiles(Path(folder))
                partial = await asyncio.to_thread(files.begin, view.result, view.result_bytes)
                await self._moving.download(f"result/{view.job_id}", view.result, view.result_bytes, partial)
                await asyncio.to_thread(files.sync, [view.result])
                files.path(view.result).replace(path)
        except OSError as error:
            expected = f"a file that can be written ({error.strerror})"
            raise ConfigError("file", got=str(path), expected=expected) from error
        return view

    # clients and the server

    async def client_list(self) -> ClientList:
        """Return all that the server says of its clients: who is registered, and who cannot be, and why."""
        return await self._ask("client.list", ListClients(), ClientList)

    async def clients(self) -> tuple[RegisteredClient, ...]:
        """Return the registered clients, by name."""
        return (await self.client_list()).clients

    async def disabled_clients(self) -> dict[str, str]:
        """Return the names of the clients that are refused, each with the reason."""
        return (await self.client_list()).disabled

    async def refused_clients(self) -> tuple[RefusedClient, ...]:
        """Return who was refused lately, by the names that they gave, and why; none that is disabled."""
        return (await self.client_list()).refused

    async def disable(self, client: str) -> None:
        """Refuse *client* from now on."""
        await self._command("client.disable", DisableClient(client))

    async def enable(self, client: str) -> None:
        """Refuse *client* no longer."""
        await self._command("client.disable", DisableClient(client, disabled=False))

    async def status(self) -> ServerStatus:
        """Return how the server is."""
        return await self._ask("server.status", StatusQuery(), ServerStatus)

    async def stop(self) -> None:
        """Have the server shut down in order; running jobs stay resumable. Returns when it has agreed."""
        await self._command("server.stop", ServerStop())

    async def promote(self, name: str) -> ServerStatus:
        """Have the server called *name*, which stands by, take over from the one that serves; return how it is then.

        Raises:
            RemoteError: it does not stand by.
            Unreachable: another one serves now, or none that is heard of.
        """
        self._is_down.clear()
        await self._command("server.promote", PromoteServer(name))
        try:
            async with asyncio.timeout(self._patience_s):
                await self._is_down.wait()
        except TimeoutError:
            raise TimedOut("the server that serves", "server.promote", self._patience_s) from None
        try:
            async with asyncio.timeout(SUCCEEDED_WITHIN_S):
                status = await self._persist(self.status)
        except TimeoutError:
            nobody = f"no server has served for {SUCCEEDED_WITHIN_S:g} s since the other one left; look at both logs"
            raise Unreachable(f"server {name}", nobody) from None
        if status.name != name:
            raise Unreachable(f"server {name}", f"it did not take over; {status.name} serves")
        return status

    # the connection

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[None]:
        settings, identity = self._kit.settings, self._kit.identity
        tls = None
        if settings.tls and identity is not None:
            tls = ClientTls(self._kit.tls_roots, identity.certificate, identity.key_pem)
        self._uplink = Uplink(self._fqcn, self._rng)
        self._uplink.cell.on(Channel.ADMIN, "job.event", self._on_event)
        self._uplink.cell.on_link_down(self._on_link_down)
        self._connector = Connector(
            self._uplink.cell,
            targets=settings.servers,
            hello=self._hello,
            tls=tls,
            rng=self._rng,
            on_welcome=self._on_welcome,
            on_waiting=self._on_waiting,
            dial=self._dial,
        )
        own = Transfers(target=lambda: self._connector.target, hello=self._proven_hello, tls=tls, rng=self._rng)
        self._moving: TensorTransfers = self._transfers or own
        self._connection = asyncio.create_task(self._connector.run(), name="connection to the server")  # awaited below
        renewal = asyncio.create_task(self._keep_renewing(), name="renewal of the token")  # awaited below
        try:
            await self._ready()
            yield
        finally:
            renewal.cancel()
            await self._connector.close()
            await asyncio.gather(self._connection, renewal, return_exceptions=True)
            await own.close()
            await self._uplink.cell.close()

    async def _ready(self) -> None:
        await self._connector.wait_ready(self._patience_s)

    def _hello(self) -> Hello:
        """Return what opens a stream; raise ``Unauthenticated`` if the certificate that goes with it is not valid."""
        self._registrant.require_valid()
        return Hello(PROTOCOL_VERSIONS, self._fqcn, self._kit.settings.project, self._release)

    async def _on_welcome(self, link: Link, welcome: Welcome) -> None:
        def trust() -> None:
            self._uplink.trust(link.peer, ssid=welcome.ssid)

        if self._kit.identity is None:
            trust()
            self._take(await self._claim(link))
        else:
            self._take(await self._registrant.register(self._uplink.cell, link, on_server_proven=trust))

    async def _claim(self, link: Link) -> Registered:
        """Register where nothing is proven: the role is what one says."""
        settings = self._kit.settings
        request = Register(settings.name, settings.project, release=self._release, role=INSECURE_ROLE)
        reply = await self._uplink.cell.ask(
            SERVER, Channel.SERVER, "register", request, timeout_s=REGISTER_TIMEOUT_S, link=link
        )
        return registered_by(reply, to="register")

    def _take(self, registered: Registered) -> None:
        self._registered = registered
        self._uplink.enter_session(registered.ssid)
        self._is_registered.set()

    def _proven_hello(self) -> Hello:
        """Return what proves this session to a call of its own, beside the stream."""
        settings, given = self._kit.settings, self._registered
        credentials = Credentials(settings.name, given.token, given.token_signature, given.ssid) if given else None
        return Hello(PROTOCOL_VERSIONS, self._fqcn, settings.project, self._release, credentials)

    async def _keep_renewing(self) -> None:
        """Renew the token at half of its life, which is a time and no event; a new login brings a new one anyway."""
        while True:
            await self._is_registered.wait()
            given = self._registered
            await asyncio.sleep(given.expires_in_s / 2 if given else 0)  # a renewal is due at a time
            if given is not self._registered:
                continue
            with contextlib.suppress(HanseError):  # the link broke: the next one begins with a fresh token
                reply = await self._uplink.ask(Channel.SERVER, "renew", Renew(), timeout_s=ANSWER_TIMEOUT_S)
                self._take(registered_by(reply, to="renew"))
            if given is self._registered:
                self._is_registered.clear()

    def _on_link_down(self, peer: Peer, reason: str) -> None:
        del peer, reason
        self._is_down.set()
        for watch in self._watches:
            watch.interrupt()

    def _on_event(self, message: Message) -> None:
        if isinstance(message.payload, JobEvent):
            for watch in self._watches:
                watch.add(message.payload)

    # asking

    async def _ask(self, topic: str, request: msgspec.Struct, kind: type[S]) -> S:
        """Return the answer to *request*, a *kind*."""
        return _payload(await self._request(topic, request), kind, topic)

    async def _command(self, topic: str, request: msgspec.Struct) -> None:
        """Have done what *request* says; its answer says no more than that it was."""
        await self._request(topic, request)

    async def _request(self, topic: str, request: msgspec.Struct) -> Message:
        await self._ready()
        try:
            return await self._uplink.ask(Channel.ADMIN, topic, request, timeout_s=ANSWER_TIMEOUT_S)
        except Unauthenticated as error:
            await self._log_in_anew(error)
        return await self._uplink.ask(Channel.ADMIN, topic, request, timeout_s=ANSWER_TIMEOUT_S)

    async def _log_in_anew(self, error: Unauthenticated) -> None:
        """Prove oneself again over a new link: the token has ended before its time, as when a clock was set.

        Raises:
            HanseError: the server does not take the kit's identity any more either, or nobody answers in time.
        """
        self._is_registered.clear()
        self._uplink.cell.drop(SERVER, Unreachable(SERVER, f"the token is not taken any more ({error.reason})"))
        registered = asyncio.create_task(self._is_registered.wait(), name="login")  # ended below
        try:
            done = {registered, self._connection}
            await asyncio.wait(done, timeout=self._patience_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            registered.cancel()
        await self._ready()

    async def _persist(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """Return what *attempt* returns, made anew for as long as that may help; there is no last try."""
        backoff = Backoff(self._rng)
        while True:
            try:
                return await attempt()
            except HanseError as error:
                if self._connection.done() or not may_help_later(error):
                    raise
            await asyncio.sleep(backoff.next_s())  # before it is asked again what could not be answered


class _Watch:
    """What one watcher has not taken yet, whichever job it is about."""

    def __init__(self) -> None:
        self._events: deque[JobEvent] = deque(maxlen=MAX_WAITING_EVENTS)
        self._changed = asyncio.Event()
        self._is_interrupted = False

    def add(self, event: JobEvent) -> None:
        self._events.append(event)
        self._changed.set()

    def interrupt(self) -> None:
        self._is_interrupted = True
        self._changed.set()

    async def events_of(self, job_id: JobId) -> AsyncIterator[JobEvent]:
        """Yield the job's events until its end, or until the connection has broken."""
        while True:
            while self._events:
                event = self._events.popleft()
                if event.job_id == job_id:
                    yield event
                    if event.kind in _ENDS:
                        return
            if self._is_interrupted:
                self._is_interrupted = False
                return
            self._changed.clear()
            await self._changed.wait()


class BlockingAdminSession:
    """``AdminSession`` for programs without an event loop: enter it to connect, and call its methods from any thread.

    Its methods do, and raise, what those of the same name do there. ``wait`` calls *on_event* with each event.
    """

    def __init__(self, kit: Kit[AdminSettings], *, patience_s: float = PATIENCE_S) -> None:
        self._kit, self._patience_s = kit, patience_s

    def __enter__(self) -> Self:
        """Connect."""
        self._session = run(self._open())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Disconnect."""
        run(self._session.__aexit__(None, None, None))

    async def _open(self) -> AdminSession:
        return await AdminSession(self._kit, patience_s=self._patience_s).__aenter__()

    def submit(self, job: Job | Path | str | bytes) -> JobSubmitted:
        """Submit *job*."""
        return run(self._session.submit(job))

    def list(self, *, state: str = "", limit: int = 100) -> tuple[JobView, ...]:
        """Return the jobs, newest first."""
        return run(self._session.list(state=state, limit=limit))

    def show(self, job_id: str) -> JobView:
        """Return the job."""
        return run(self._session.show(job_id))

    def wait(self, job_id: str, *, on_event: Callable[[JobEvent], None] | None = None) -> JobView:
        """Return the job once it has ended; *on_event* is called on the event loop's thread and must be quick."""
        return run(self._wait(job_id, on_event))

    async def _wait(self, job_id: str, on_event: Callable[[JobEvent], None] | None) -> JobView:
        async for event in self._session.watch(job_id):
            if on_event is not None:
                on_event(event)
        return await self._session.wait(job_id)

    def abort(self, job_id: str) -> JobView:
        """Abort the job and return it."""
        return run(self._session.abort(job_id))

    def log(self, job_id: str, *, client: str = "", lines: int = 200) -> str:
        """Return the last lines of the job's log."""
        return run(self._session.log(job_id, client=client, lines=lines))

    def download(self, job_id: str, path: Path) -> JobView:
        """Write the model that the job resulted in to *path*."""
        return run(self._session.download(job_id, path))

    def client_list(self) -> ClientList:
        """Return all that the server says of its clients: who is registered, and who cannot be, and why."""
        return run(self._session.client_list())

    def clients(self) -> tuple[RegisteredClient, ...]:
        """Return the registered clients."""
        return run(self._session.clients())

    def disabled_clients(self) -> dict[str, str]:
        """Return the names of the clients that are refused, each with the reason."""
        return run(self._session.disabled_clients())

    def refused_clients(self) -> tuple[RefusedClient, ...]:
        """Return who was refused lately, by the names that they gave, and why."""
        return run(self._session.refused_clients())

    def disable(self, client: str) -> None:
        """Refuse *client* from now on."""
        run(self._session.disable(client))

    def enable(self, client: str) -> None:
        """Refuse *client* no longer."""
        run(self._session.enable(client))

    def status(self) -> ServerStatus:
        """Return how the server is."""
        return run(self._session.status())

    def promote(self, name: str) -> ServerStatus:
        """See ``AdminSession.promote``."""
        return run(self._session.promote(name))

    def stop(self) -> None:
        """Have the server shut down in order."""
        run(self._session.stop())


def _package_of(job: Job | Path | str) -> bytes:
    # It brings NumPy along, which is most of what a command takes to start; nothing but this needs it.
    from hanse.run.authoring import package_of  # noqa: PLC0415 - see above

    return package_of(job)[1]


_ENDS: Final = frozenset({EventType.JOB_COMPLETED.value, EventType.JOB_FAILED.value, EventType.JOB_ABORTED.value})


def _payload(reply: Message, kind: type[S], topic: str) -> S:
    if not isinstance(reply.payload, kind):
        raise ProtocolError(f"reply to {topic}", got=type(reply.payload).__name__, expected=kind.__name__)
    return reply.payload
