"""Never two committers: three servers on one store, disturbed in any order, and what each of them got written."""

import asyncio
import contextlib
import os
import random
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from hanse.cell.loop import run
from hanse.coordination.service import ServiceState
from hanse.errors import HanseError, NotInService, StaleEpoch, StoreFailed
from hanse.server import FederatedServer
from hanse.server.lifetime import holder_of
from hanse.server.overseer import LeaseOverseer
from hanse.storage.records import AuditEntry, Lease
from hanse.storage.store import SqlStore

from .history import History, Write, overlaps, shared_epochs
from .job_world import Threads
from .world import Project, args, on_loop, settings

LEASE_S = 0.8
FAULTS = 12
FAULTS_WITHIN_S = 100.0
SEED = int(os.environ.get("HANSE_FAULTS_SEED") or secrets.randbelow(2**32))
NAMES = ("server-1", "server-2", "server-3")


class Recorded(SqlStore):
    """A store whose writes are noted, and whose answers a test can hold back or refuse: a server that is cut off."""

    def __init__(self, path: Path, server: str, history: History) -> None:
        super().__init__(path)
        self._server, self._history = server, history
        self.reachable = asyncio.Event()
        self.fails = False

    async def audit(self, epoch: int, entry: AuditEntry) -> None:
        await self._reach()
        with self._history.write(self._server, epoch):
            await super().audit(epoch, entry)

    async def renew_lease(self, epoch: int) -> Lease:
        await self._reach()
        return await super().renew_lease(epoch)

    async def _reach(self) -> None:
        await self.reachable.wait()
        if self.fails:
            raise StoreFailed("writing", "it is away")


@dataclass
class Member:
    """A server, and the store as it sees it."""

    server: FederatedServer
    store: Recorded

    async def write_on(self) -> None:
        """Write under whatever tenure this server believes to have, without a pause, until cancelled."""
        entry = AuditEntry(0.0, self.server.name, "write", "thing", "done")
        while True:
            try:
                await self.store.audit(self.server.jobs.services.epoch, entry)
            except (NotInService, StaleEpoch, StoreFailed):
                await self.store.lease_moved(await self.store.lease(), within_s=LEASE_S / 10)


@pytest.fixture
def members(
    make_server: Callable[..., FederatedServer], project: Project, tmp_path: Path
) -> Iterator[tuple[list[Member], History]]:
    history = History()
    secret = tmp_path / "servers.secret"
    secret.write_text("5e" * 32)
    secret.chmod(0o600)
    made = []
    for name in NAMES:
        store = on_loop(partial(Recorded, tmp_path / "store.db", name, history))
        on_loop(store.reachable.set)
        workspace = tmp_path / name
        workspace.mkdir(mode=0o700)
        overseer = LeaseOverseer(store, holder=holder_of(workspace, name), name=name, target=f"{name}:1", ttl_s=LEASE_S)
        server = make_server(snapshot_persistor=store, overseer_agent=overseer, max_num_clients=10)
        own = settings(name=name, runs=str(tmp_path / "runs"), lease_s=LEASE_S)
        server.deploy(
            args(workspace, launcher=Threads(), settings=own),
            project.grpc_args(servers_secret=secret),
            secure_train=True,
        )
        made.append(Member(server, store))
    yield made, history
    for each in made:
        each.store.fails = False
        on_loop(each.store.reachable.set)


def test_whatever_is_done_to_three_servers_no_two_commit_at_once(members: tuple[list[Member], History]) -> None:
    """The order of faults follows from a seed, which is in the message; ``HANSE_FAULTS_SEED`` gives it again."""
    servers, history = members
    rng = random.Random(SEED)

    async def disturb() -> None:
        writing = [asyncio.create_task(each.write_on(), name=f"writes of {each.server.name}") for each in servers]
        try:
            for _ in range(FAULTS):
                await _fault(servers, rng)
        finally:
            for task in writing:
                task.cancel()
            await asyncio.gather(*writing, return_exceptions=True)

    run(disturb(), FAULTS_WITHIN_S)

    assert not overlaps(history.writes), f"two committed at once; HANSE_FAULTS_SEED={SEED}"
    assert not shared_epochs(history.writes), f"two wrote under one epoch; HANSE_FAULTS_SEED={SEED}"
    assert len({write.epoch for write in history.writes}) > 3, f"too little happened; HANSE_FAULTS_SEED={SEED}"


async def _fault(servers: list[Member], rng: random.Random) -> None:
    """Do one thing to whoever serves, and return when another tenure has begun and has written."""
    hot, before = await _hot(servers)
    store = hot.store
    match rng.choice(("held back", "cut off", "hands over", "both")):
        case "held back":
            store.reachable.clear()
        case "cut off":
            store.fails = True
        case "hands over":
            await asyncio.to_thread(_hand_over, hot.server, rng.choice(NAMES))
        case "both":
            store.reachable.clear()
            store.fails = rng.random() < 0.5
    lease = await store.lease()
    while lease.epoch <= before or not lease.holder:
        lease = await store.lease_moved(lease, within_s=LEASE_S)
    store.fails = False
    store.reachable.set()


async def _hot(servers: list[Member]) -> tuple[Member, int]:
    """Return who serves under the lease as it stands, and its epoch, once somebody does.

    A server that has just lost the lease may not have heard of it, and a fault there would disturb nobody.
    """
    store = servers[0].store
    while True:
        lease = await store.lease()
        for each in servers:
            with contextlib.suppress(NotInService):
                if each.server.jobs.services.epoch == lease.epoch and each.server.service.state is ServiceState.HOT:
                    return each, lease.epoch
        await store.lease_moved(lease, within_s=LEASE_S / 10)


def _hand_over(server: FederatedServer, successor: str) -> None:
    try:
        server.hand_over(successor)
    except HanseError:  # it has lost the primacy at this very moment
        return


# what is looked for can be found -------------------------------------------------------------------------------------


def test_a_write_of_an_earlier_tenure_after_one_of_a_later_is_an_overlap() -> None:
    first, second = Write("a", 2, 0, 1), Write("b", 3, 2, 3)

    assert overlaps([first, second]) == []
    assert overlaps([first, second, Write("a", 2, 4, 5)]) == [(second, Write("a", 2, 4, 5))]
    assert overlaps([second, Write("a", 2, 1, 9)]) == [], "it may have been taken before"


def test_an_epoch_is_one_servers() -> None:
    assert shared_epochs([Write("a", 2, 0, 1), Write("a", 2, 2, 3)]) == {}
    assert shared_epochs([Write("a", 2, 0, 1), Write("b", 2, 2, 3)]) == {2: {"a", "b"}}
