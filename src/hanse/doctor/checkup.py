"""A kit's checks in their order: what is here first, then the way to each of its servers, all of them at once.

What depends on a failed check is skipped and says so. A server's kit has no way to go: its own port is looked at, and
the server itself if it runs.
"""

import asyncio
import os
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Final, TypeAlias, TypeVar

from hanse.cell.listener import split_target
from hanse.cell.rpc import ClientTls
from hanse.client.registration import Registrant
from hanse.doctor import probes
from hanse.doctor.findings import Check, Finding, Verdict, fail, ok, skip, with_spares
from hanse.doctor.kit import KitFacts, judge_certificate, judge_dates, judge_key, judge_settings, read_kit
from hanse.doctor.machine import (
    LEAST_FREE_BYTES,
    LOW_FREE_BYTES,
    descriptor_limit,
    first_bytes_of,
    free_bytes,
    judge_descriptors,
    judge_disk,
    judge_listen,
    judge_listening,
    judge_runs,
    judge_store_file,
    judge_workspace,
    look_at_folder,
    reachable,
)
from hanse.doctor.probes import Way
from hanse.doctor.route import Trust, judge_name, judge_port, judge_proxy, judge_tls, proxy_for
from hanse.doctor.service import ClockReading, judge_answer, judge_clock, judge_identity, judge_versions
from hanse.errors import ConfigError, EnvironmentFault, HanseError, NotInService, TimedOut
from hanse.identity.certificates import certificate_der
from hanse.identity.kits import CERTIFICATE_FILE, KEY_FILE, Kit
from hanse.identity.project import AnySettings
from hanse.ids import Fqcn
from hanse.messages import PROTOCOL_VERSIONS, Hello
from hanse.server.listening import SOCKET_FILE
from hanse.settings import AdminSettings, ClientSettings, ServerSettings
from hanse.storage.objects import objects_at

PATIENCE_S: Final = 10.0
"""How long all that is asked of one server may take together."""

_WAY: Final = (
    Check.PROXY,
    Check.NAME,
    Check.PORT,
    Check.TLS,
    Check.ANSWER,
    Check.IDENTITY,
    Check.CLOCK,
    Check.VERSIONS,
)
_SERVING: Final = (Check.LISTEN, Check.ANSWER, Check.IDENTITY, Check.VERSIONS)

SQLITE: Final = "sqlite:///"
"""What the URL of a file begins with, before its absolute path."""

STORE_FILE: Final = "store.db"
"""Where in its workspace a server has its store, if no other is named."""

DialSettings: TypeAlias = ClientSettings | AdminSettings
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What the checks take from outside the kit: by default this process's.

    *process_in* returns the number of the process that works in a workspace, 0 if it does not tell, ``None`` if there
    is none. *wall* is the time of day, POSIX.
    """

    process_in: Callable[[Path], int | None]
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    wall: Callable[[], float] = time.time
    release: str = field(default_factory=lambda: version("hanse"))
    patience_s: float = PATIENCE_S
    least_free_bytes: int = LEAST_FREE_BYTES
    low_free_bytes: int = LOW_FREE_BYTES

    def now(self) -> datetime:
        """Return the time of day, aware."""
        return datetime.fromtimestamp(self.wall(), UTC)


async def examine(folder: Path, around: Surroundings) -> AsyncIterator[Finding]:
    """Yield what is found about the kit in *folder*, in the order of the checks."""
    try:
        facts = await _looked(lambda: read_kit(folder), folder, around)
    except EnvironmentFault as error:
        yield fail(Check.SETTINGS, error)
        return
    for finding in (
        judge_settings(facts),
        judge_key(facts),
        judge_certificate(facts),
        judge_dates(facts, around.now()),
    ):
        yield finding
    settings = facts.settings
    if isinstance(settings, HanseError):
        yield skip(Check.WORKSPACE, "'settings' failed, and all that is left depends on them")
    elif isinstance(settings, ServerSettings):
        async for finding in _examine_server(facts, settings, around):
            yield finding
    else:
        if isinstance(settings, ClientSettings):
            workspace = (folder / settings.workspace).absolute()
            try:
                found, _ = await _examine_workspace(workspace, around)
            except EnvironmentFault as error:
                found = [fail(Check.WORKSPACE, error)]
            for finding in found:
                yield finding
        ways = await asyncio.gather(*(_examine_way(facts, settings, target, around) for target in settings.servers))
        for way in with_spares(ways):
            for finding in way:
                yield finding


async def _examine_workspace(workspace: Path, around: Surroundings) -> tuple[list[Finding], int | None]:
    """Return what is found of *workspace*, and the number of the process that works there.

    Raises:
        EnvironmentFault: what is mounted there does not answer.
    """

    def look() -> tuple[list[Finding], int | None]:
        found = look_at_folder(workspace, around.process_in(workspace))
        return [judge_workspace(found), _disk_at(found.nearest, around)], found.process

    return await _looked(look, workspace, around)


async def _looked(look: Callable[[], T], place: Path, around: Surroundings) -> T:
    """Return what *look* returns, which reads at *place*: a disk of another machine may never answer.

    Raises:
        EnvironmentFault: it has not in time.
    """
    deadline = asyncio.get_running_loop().time() + around.patience_s
    try:
        return await probes.answer_of(look, deadline, name=f"look at {place}")
    except TimeoutError as error:
        raise EnvironmentFault(
            f"{place} could not be looked at within {around.patience_s:g} s: the disk that is mounted there does not "
            "answer; check the machine that it comes from, or mount it anew"
        ) from error


def _disk_at(place: Path, around: Surroundings) -> Finding:
    least, low = around.least_free_bytes, around.low_free_bytes
    return judge_disk(place, free_bytes(place), least_bytes=least, low_bytes=low)


# The way to a server --------------------------------------------------------------------------------------------------


async def _examine_way(facts: KitFacts, settings: DialSettings, target: str, around: Surroundings) -> list[Finding]:
    return await _until_failure(_along_the_way(facts, settings, target, around), _WAY, about=target)


async def _along_the_way(
    facts: KitFacts, settings: DialSettings, target: str, around: Surroundings
) -> AsyncGenerator[Finding, None]:
    deadline = asyncio.get_running_loop().time() + around.patience_s
    try:
        host, port = split_target(target)
    except ConfigError as error:
        yield fail(Check.NAME, error, about=target)
        return
    proxy = proxy_for(host, around.environ)
    yield judge_proxy(target, proxy, around.environ)
    dialled, dialled_port = (proxy.host, proxy.port) if proxy else (host, port)
    addresses, problem = await probes.addresses_of(dialled, dialled_port, deadline)
    yield judge_name(target, dialled, tuple(map(probes.in_words, addresses)), problem)
    way = Way(host, port, addresses, proxy)
    # An address at which nothing answers must not take the time that is left for the others.
    ports = await probes.connections_to(way, asyncio.get_running_loop().time() + around.patience_s / 2)
    yield judge_port(target, ports, proxy)
    way = replace(way, addresses=tuple(each for each in addresses if probes.in_words(each) in ports.opened))
    kit = facts.kit
    if isinstance(kit, HanseError) or judge_certificate(facts).verdict is Verdict.FAIL:
        yield skip(Check.TLS, "the kit does not hold together", about=target)
        return
    if settings.tls:
        trust = Trust(settings.project, kit.ca_pem, kit.tls_roots)
        own = (kit.folder / CERTIFICATE_FILE, kit.folder / KEY_FILE)
        shown = await probes.handshake_with(way, roots=trust.roots, own=own, deadline=deadline)
        yield judge_tls(target, shown, trust, around.now())
    else:
        yield skip(Check.TLS, "'tls' is false in the settings", about=target)
    answer = await probes.greeting_of(
        target,
        hello=_hello(settings.name, settings.project, around),
        tls=_tls_of(kit),
        registrant=Registrant(
            settings.project, settings.name, settings.server_names, kit.identity, kit.ca_pem, wall=around.now
        ),
        wall=around.wall,
        deadline=deadline,
    )
    yield judge_answer(target, answer)
    yield judge_identity(target, answer)
    yield judge_clock(target, answer.clock)
    yield judge_versions(target, around.release, answer.welcome)


def _tls_of(kit: Kit[AnySettings]) -> ClientTls | None:
    if not kit.settings.tls or kit.identity is None:
        return None
    return ClientTls(kit.tls_roots, kit.identity.certificate, kit.identity.key_pem)


def _hello(name: str, project: str, around: Surroundings) -> Hello:
    """Return what opens a stream as *name*, under an address that is not its own: a stream that it has stays."""
    return Hello(PROTOCOL_VERSIONS, Fqcn(f"{name}.doctor-{secrets.token_hex(4)}"), project, around.release)


# A server's own -------------------------------------------------------------------------------------------------------


async def _examine_server(facts: KitFacts, settings: ServerSettings, around: Surroundings) -> AsyncIterator[Finding]:
    workspace = (facts.folder / settings.workspace).absolute()
    try:
        found, process = await _examine_workspace(workspace, around)
    except EnvironmentFault as error:
        yield fail(Check.WORKSPACE, error)
        yield skip(Check.DISK, "'workspace' failed, and all that is left depends on it")
        return
    for finding in found:
        yield finding
    yield judge_descriptors(descriptor_limit(), settings)
    if settings.bucket:
        yield await _look_into_bucket(settings.bucket, around)
    elif settings.runs_folder:
        for finding in await _look_at_runs((facts.folder / settings.runs_folder).absolute(), around):
            yield finding
    async for finding in _examine_store(settings, workspace, around):
        yield finding
    steps = _listening(settings, around) if process is None else _serving(facts, settings, process, around)
    for finding in await _until_failure(steps, _SERVING):
        yield finding


async def _look_at_runs(runs: Path, around: Surroundings) -> list[Finding]:
    def look() -> list[Finding]:
        found = look_at_folder(runs)
        return [judge_runs(found), _disk_at(found.nearest, around)]

    try:
        return await _looked(look, runs, around)
    except EnvironmentFault as error:
        return [fail(Check.RUNS, error)]


async def _look_into_bucket(url: str, around: Surroundings) -> Finding:
    try:
        async with asyncio.timeout(around.patience_s):
            await objects_at(url).reach()
    except HanseError as error:
        return fail(Check.RUNS, error)
    except TimeoutError:
        return fail(Check.RUNS, TimedOut(url, "list", around.patience_s))
    return ok(Check.RUNS, f"{url} answers; whether it may be written to shows with the first job")


async def _examine_store(settings: ServerSettings, workspace: Path, around: Surroundings) -> AsyncIterator[Finding]:
    url = settings.store
    if not url or url.startswith(SQLITE):
        try:
            path = _file_of(url) if url else workspace / STORE_FILE
            yield await _looked(
                lambda: judge_store_file(path, first_bytes_of(path), look_at_folder(path.parent)), path.parent, around
            )
        except (ConfigError, EnvironmentFault) as error:
            yield fail(Check.STORE, error)
        return

    def ask() -> tuple[str, ClockReading]:
        from hanse.doctor.database import ask_database  # noqa: PLC0415 - what it imports is for servers alone

        return ask_database(url, around.wall)

    deadline = asyncio.get_running_loop().time() + around.patience_s
    try:
        name, clock = await probes.answer_of(ask, deadline, name="store")
    except HanseError as error:
        yield fail(Check.STORE, error)
    except TimeoutError:
        yield fail(Check.STORE, TimedOut("the store's database", "SELECT", around.patience_s))
    else:
        yield ok(Check.STORE, f"{name} answers")
        yield judge_clock(name, clock, whose="the database")


def _file_of(url: str) -> Path:
    """Return the file of the store at *url*, as the server takes it.

    Raises:
        ConfigError: it takes it for none.
    """
    from hanse.storage.store import database_at  # noqa: PLC0415 - what it imports is for servers alone

    return Path(database_at(url).name)


async def _listening(settings: ServerSettings, around: Surroundings) -> AsyncGenerator[Finding, None]:
    """Yield whether a server that does not run could listen."""
    deadline = asyncio.get_running_loop().time() + around.patience_s
    yield judge_listen(settings.target, await probes.listening_problem(settings.target, deadline))
    yield skip(Check.ANSWER, "the server does not run")


async def _serving(
    facts: KitFacts, settings: ServerSettings, process: int, around: Surroundings
) -> AsyncGenerator[Finding, None]:
    """Yield how the server is that runs as *process*."""
    deadline = asyncio.get_running_loop().time() + around.patience_s
    kit, target = facts.kit, settings.target
    if isinstance(kit, HanseError):
        yield skip(Check.LISTEN, "the kit does not hold together")
        return
    try:
        host, port = split_target(target)
    except ConfigError as error:
        yield fail(Check.LISTEN, error)
        return
    if port:
        addresses, _ = await probes.addresses_of(reachable(host), port, deadline)
        way = Way(host, port, addresses)
        own = certificate_der(kit.identity.certificate) if settings.tls and kit.identity is not None else None
        yield judge_listening(target, process, await probes.shown_at(way, tls=own is not None, deadline=deadline), own)
    else:
        yield skip(Check.LISTEN, "port 0 in the settings means any")
    socket = kit.resolve(settings.workspace).absolute() / SOCKET_FILE
    if not socket.exists():  # the path was too long for a socket
        yield skip(Check.ANSWER, f"there is no {socket}")
        return
    here = f"unix:{socket}"
    answer = await probes.greeting_of(
        here,
        hello=_hello("doctor", settings.project, around),
        tls=None,
        registrant=Registrant(settings.project, "doctor", (settings.name,), kit.identity, kit.ca_pem, wall=around.now),
        wall=around.wall,
        deadline=deadline,
    )
    if isinstance(answer.refusal, NotInService):
        yield ok(Check.ANSWER, f"it runs, and serves nobody now ({answer.refusal.reason})")
        yield skip(Check.IDENTITY, "a server that does not serve proves nothing")
        return
    yield judge_answer(here, answer)
    yield judge_identity(here, answer)
    yield judge_versions(here, around.release, answer.welcome)


async def _until_failure(
    steps: AsyncGenerator[Finding, None], order: Sequence[Check], *, about: str = ""
) -> list[Finding]:
    """Return what *steps* find until one fails or they end; the checks of *order* that have not come are skipped."""
    found = []
    async with aclosing(steps):
        async for finding in steps:
            found.append(finding)
            if finding.verdict is Verdict.FAIL:
                break
    last = found[-1]
    because = "failed" if last.verdict is Verdict.FAIL else "was not looked at"
    left = order[order.index(last.check) + 1 :]
    return [*found, *(skip(check, f"'{last.check}' {because}", about=about) for check in left)]
