"""Two servers on one store: who serves, who stands by, and how the one follows the other.

Their leases are short, and nothing here waits for a time: it waits for what is to happen.
"""

import asyncio
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from hanse.coordination.service import ServiceState
from hanse.errors import StaleEpoch, StoreFailed, Unreachable
from hanse.job import JobState
from hanse.messages import Channel, Heartbeat, TaskAssignment, TaskResult
from hanse.model import Model
from hanse.server import FederatedServer
from hanse.server.lifetime import holder_of
from hanse.server.overseer import LeaseOverseer, OverseerAgent, Primary
from hanse.storage.memory import MemoryStore
from hanse.storage.records import Lease, Standby
from hanse.storage.store import SqlStore

from .job_world import Site, Threads, outcome, plus, submit
from .world import WITHIN_S, Dialler, Project, args, on_loop, settings, wait

LEASE_S = 1.5
MakeServer = Callable[..., FederatedServer]


class Store(SqlStore):
    """A store that a test can take away: what keeps the lease waits, or fails."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.beats = asyncio.Event()
        self.fails = False

    async def renew_lease(self, epoch: int) -> Lease:
        await self.beats.wait()
        if self.fails:
            raise StoreFailed("renewing", "the database is away")
        return await super().renew_lease(epoch)

    async def release_lease(self, epoch: int, *, successor: str = "") -> None:
        await self.beats.wait()
        if self.fails:
            raise StoreFailed("releasing", "the database is away")
        await super().release_lease(epoch, successor=successor)


class Watched(LeaseOverseer):
    """An overseer that says when it has told its server something."""

    def __init__(self, *arguments: object, **more: object) -> None:
        super().__init__(*arguments, **more)  # type: ignore[arg-type]
        self.told = threading.Condition()

    def start(self, callback: Callable[[OverseerAgent], None]) -> None:
        def tell(agent: OverseerAgent) -> None:
            callback(agent)
            with self.told:
                self.told.notify_all()

        super().start(tell)


@dataclass
class Pair:
    """A server with what a test does to it."""

    server: FederatedServer
    store: Store
    overseer: Watched

    @property
    def state(self) -> ServiceState:
        return self.server.service.state

    def becomes(self, state: ServiceState) -> None:
        """Return when the server is in *state*."""
        with self.overseer.told:
            assert self.overseer.told.wait_for(lambda: self.state is state, WITHIN_S), f"{self.state}, not {state}"


@pytest.fixture
def start(make_server: MakeServer, project: Project, tmp_path: Path) -> Callable[[str], Pair]:
    """``start(name)``: a server of that name on the one store; its runs are in the one folder."""

    def starting(name: str) -> Pair:
        store = on_loop(lambda: Store(tmp_path / "store.db"))
        on_loop(store.beats.set)
        workspace = tmp_path / name
        workspace.mkdir(exist_ok=True, mode=0o700)
        target = f"{name}:1"
        overseer = Watched(store, holder=holder_of(workspace, name), name=name, target=target, ttl_s=LEASE_S)
        server = make_server(snapshot_persistor=store, overseer_agent=overseer, max_num_clients=10)
        own = settings(name=name, runs=str(tmp_path / "runs"), lease_s=LEASE_S)
        secret = tmp_path / "servers.secret"
        if not secret.exists():
            secret.write_text("5e" * 32)
            secret.chmod(0o600)
        where = project.grpc_args(servers_secret=secret)
        server.deploy(args(workspace, launcher=Threads(), settings=own), where, secure_train=True)
        return Pair(server, store, overseer)

    return starting


@pytest.fixture
def two(start: Callable[[str], Pair]) -> Iterator[tuple[Pair, Pair]]:
    first, second = start("server-1"), start("server-2")
    assert (first.state, second.state) == (ServiceState.HOT, ServiceState.COLD)
    yield first, second
    on_loop(first.store.beats.set)


def test_who_comes_to_a_server_that_stands_by_is_told_who_serves(two: tuple[Pair, Pair], dialler: Dialler) -> None:
    _, second = two

    with pytest.raises(Unreachable, match="server-1 at server-1:1 serves"):
        dialler.site(second.server, "site-1")


def test_a_server_that_stands_by_is_listed_from_its_start_on(two: tuple[Pair, Pair]) -> None:
    first, _ = two

    assert [each.name for each in wait(first.store.standbys(within_s=60))] == ["server-2"]


class Noting(MemoryStore):
    """A store that says when a server has told it that it stands by."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: asyncio.Queue[Standby] = asyncio.Queue()

    async def note_standby(self, standby: Standby) -> None:
        await super().note_standby(standby)
        self.noted.put_nowait(standby)


def test_a_server_that_has_handed_over_says_that_it_stands_by_without_waiting_for_its_time() -> None:
    store = on_loop(Noting)
    wait(store.open())
    overseer = LeaseOverseer(
        store, holder="one", name="server-1", target="server-1:1", ttl_s=LEASE_S, clock=lambda: 0.0
    )

    def taken_by_another() -> int:
        return wait(store.take_lease("two", name="server-2", target="server-2:1", ttl_s=LEASE_S)).epoch

    async def taken_by_it() -> int:
        lease = await store.lease()
        while lease.holder != "one":
            lease = await store.lease_moved(lease, within_s=WITHIN_S)
        return lease.epoch

    epoch = taken_by_another()
    overseer.start(lambda agent: None)
    try:
        assert wait(store.noted.get()).name == "server-1"
        wait(store.release_lease(epoch, successor="server-1"))
        wait(store.release_lease(wait(taken_by_it()), successor="server-2"))
        taken_by_another()

        assert wait(store.noted.get()).name == "server-1"
    finally:
        overseer.end()


class Moved(MemoryStore):
    """A store that says for how long a server waits for the lease to move."""

    def __init__(self) -> None:
        super().__init__()
        self.waits_s: asyncio.Queue[float] = asyncio.Queue()

    async def lease_moved(self, seen: Lease, *, within_s: float) -> Lease:
        self.waits_s.put_nowait(within_s)
        return await super().lease_moved(seen, within_s=within_s)


def test_a_server_that_cannot_serve_under_its_lease_does_not_take_it_again_at_once() -> None:
    store, now = on_loop(Moved), 0.0
    wait(store.open())
    overseer = LeaseOverseer(
        store, holder="one", name="server-1", target="server-1:1", ttl_s=LEASE_S, clock=lambda: now
    )
    served: list[int] = []
    has_served = threading.Semaphore(0)

    def cannot_serve(agent: OverseerAgent) -> None:
        primary = agent.primary()
        if primary is not None and primary.held is not None:
            served.append(primary.held.lease.epoch)
            wait(store.release_lease(primary.held.lease.epoch))
            has_served.release()

    overseer.start(cannot_serve)
    try:
        assert has_served.acquire(timeout=WITHIN_S)
        while not 0 < wait(store.waits_s.get()) < LEASE_S / 2:
            assert len(served) == 1, "it takes again what it has given back"

        now = LEASE_S

        assert has_served.acquire(timeout=WITHIN_S)
    finally:
        overseer.end()


class Unsure(MemoryStore):
    """A store that once fails to give the lease; or that gives it, and cannot say so, as when the line breaks then."""

    def __init__(self) -> None:
        super().__init__()
        self.failing: str | None = None

    async def take_lease(self, holder: str, **more: Any) -> Lease:
        failing, self.failing = self.failing, None
        if failing == "before":
            raise StoreFailed("using the database", "the connection was lost")
        lease = await super().take_lease(holder, **more)
        if failing == "after":
            raise StoreFailed("using the database", "the connection was lost")
        return lease


@pytest.mark.parametrize("failing", ["before", "after"])
@pytest.mark.parametrize("was_its_own", [True, False])
def test_a_lease_that_the_store_could_not_say_it_gives_is_taken_again_at_once_and_serves_nobody_before(
    failing: str, was_its_own: bool
) -> None:
    store = on_loop(Unsure)
    wait(store.open())
    if was_its_own:  # before it was killed, and started again
        wait(store.take_lease("one", name="server-1", target="server-1:1", ttl_s=LEASE_S))
    store.failing = failing
    overseer = LeaseOverseer(
        store, holder="one", name="server-1", target="server-1:1", ttl_s=LEASE_S, clock=lambda: 0.0
    )
    heard: list[Primary | None] = []
    is_primary = threading.Event()

    def hear(agent: OverseerAgent) -> None:
        heard.append(agent.primary())
        if heard[-1] is not None:
            is_primary.set()

    overseer.start(hear)
    try:
        assert is_primary.wait(WITHIN_S)
    finally:
        overseer.end()
    assert heard[-1] is not None
    assert heard[-1].held is not None, "it would serve under a lease of which it does not know until when it is good"


def test_a_server_that_says_nothing_is_succeeded_and_serves_nobody_when_it_wakes(
    two: tuple[Pair, Pair], dialler: Dialler
) -> None:
    first, second = two
    epoch = first.server.jobs.services.epoch

    on_loop(first.store.beats.clear)
    second.becomes(ServiceState.HOT)

    assert second.server.service.ssid != first.server.service.ssid
    with pytest.raises(Unreachable, match="Server not in service"):
        dialler.site(first.server, "site-1")
    with pytest.raises(StaleEpoch):
        wait(first.store.set_disabled(epoch, "site-9", True))
    on_loop(first.store.beats.set)
    first.becomes(ServiceState.COLD)
    Site(dialler, second.server, "site-1")


def test_the_server_that_takes_over_knows_whose_certificate_has_ended(
    two: tuple[Pair, Pair], dialler: Dialler, project: Project, tmp_path: Path
) -> None:
    first, second = two
    identity = project.issued(tmp_path, "site-1", now=datetime.now(UTC), lifetime=timedelta(minutes=10))
    dialler.site(first.server, identity=identity)
    dialler.site(first.server, "site-2")
    end = identity.expires.timestamp()
    for each in two:
        each.server.wall = lambda: end
    assert first.server.clients.expired() == {"site-1": end}

    on_loop(first.store.beats.clear)
    second.becomes(ServiceState.HOT)

    assert second.server.clients.expired() == {"site-1": end}


def test_a_server_whose_store_is_away_stops_serving_and_comes_back_with_it(start: Callable[[str], Pair]) -> None:
    alone = start("server-1")
    before = alone.server.service.ssid
    alone.store.fails = True
    alone.becomes(ServiceState.COLD)

    alone.store.fails = False
    alone.becomes(ServiceState.HOT)

    assert alone.server.service.ssid != before


def test_a_server_that_is_started_again_takes_its_own_lease_at_once(
    start: Callable[[str], Pair], tmp_path: Path
) -> None:
    first = start("server-1")
    on_loop(first.store.beats.clear)  # it says nothing any more, as if it had been killed
    first.overseer.end()
    store = on_loop(lambda: Store(tmp_path / "store.db"))

    async def take() -> Lease:
        async with store:
            seen = await store.lease()
            holder = holder_of(tmp_path / "server-1", "server-1")
            return await store.take_lease(holder, name="server-1", target="", ttl_s=LEASE_S, seen=None) or seen

    assert wait(take()).epoch == 2
    on_loop(first.store.beats.set)


def test_a_server_that_shuts_down_leaves_the_lease_to_who_stands_by(two: tuple[Pair, Pair]) -> None:
    first, second = two

    first.server.fl_shutdown()

    second.becomes(ServiceState.HOT)


def test_a_server_hands_over_to_the_one_that_is_named(two: tuple[Pair, Pair], start: Callable[[str], Pair]) -> None:
    first, second = two
    third = start("server-3")

    first.server.hand_over("server-3")

    third.becomes(ServiceState.HOT)
    assert (first.state, second.state) == (ServiceState.COLD, ServiceState.COLD)


def test_a_lease_left_to_a_server_that_does_not_take_it_is_anybodys(two: tuple[Pair, Pair]) -> None:
    first, second = two

    first.server.hand_over("server-9")

    assert wait(_next_holder(second.store)) in ("server-1", "server-2")


async def _next_holder(store: Store) -> str:
    lease = await store.lease()
    while not lease.holder:
        lease = await store.lease_moved(lease, within_s=LEASE_S)
    return lease.name


def test_a_run_goes_on_at_the_other_server_and_asks_for_no_accepted_answer_again(
    two: tuple[Pair, Pair], dialler: Dialler, tmp_path: Path
) -> None:
    first, second = two
    asked: list[str] = []

    def noted(task: TaskAssignment, model: Model) -> TaskResult | None:
        asked.append(f"{task.key.client}-{task.key.round}")
        return plus(1.0)(task, model)

    sites = [Site(dialler, first.server, "site-1", train=noted), Site(dialler, first.server, "site-2")]
    job_id = submit(first.server, tmp_path)
    assert wait(sites[0].answered.get()) is None, "site-1's answer of round 1 is accepted; site-2 has not answered"

    first.server.hand_over("server-2")
    second.becomes(ServiceState.HOT)

    back = Site(dialler, second.server, "site-1", train=noted), Site(dialler, second.server, "site-2", train=plus(1.0))
    for site in back:
        site.wire.ask(Channel.SERVER, "heartbeat", Heartbeat())
    record = outcome(second.server, job_id)
    assert (record.state, record.reason) == (JobState.COMPLETED, "")
    assert asked == ["site-1-1", "site-1-2"], "round 1 was answered once"
