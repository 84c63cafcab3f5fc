"""Any order of takes, beats, releases, handovers and writes by three servers, against a model of twenty lines."""

import asyncio
import tempfile
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from hanse.errors import Conflict, StaleEpoch
from hanse.storage.memory import MemoryStore
from hanse.storage.records import AuditEntry, Lease, Store
from hanse.storage.store import SqlStore

T = TypeVar("T")

SERVERS = ("a", "b", "c")
servers = st.sampled_from(SERVERS)


@dataclass
class Server:
    """What one server knows: the lease as it saw it last, and the epoch that it was given last."""

    store: Store
    seen: Lease | None = None
    epoch: int | None = None


class LeaseMachine(RuleBasedStateMachine):
    """The stores of three servers, and beside them what the lease must be."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.servers = {name: Server(store) for name, store in zip(SERVERS, self.stores(), strict=True)}
        # The model.
        self.epoch = 0
        self.beat = 0
        self.holder = ""
        self.successor = ""
        self.given: set[int] = set()
        self.written = 0

    def stores(self) -> list[Store]:
        raise NotImplementedError

    def run(self, call: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(call)

    @initialize()
    def open(self) -> None:
        for store in {id(server.store): server.store for server in self.servers.values()}.values():
            self.run(store.open())

    def teardown(self) -> None:
        for server in self.servers.values():
            self.run(server.store.close())
        self.loop.close()

    def take(self, name: str, *, may: bool, seen: Lease | None = None, force: bool = False) -> None:
        server = self.servers[name]
        call = server.store.take_lease(f"{name}:1", name=name, target="", ttl_s=4.0, seen=seen, force=force)
        if not may:
            assert self.fails(call, Conflict)
            return
        lease = self.run(call)
        self.epoch, self.beat, self.holder, self.successor = self.epoch + 1, 0, name, ""
        server.epoch = lease.epoch
        self.given.add(lease.epoch)

    def fails(self, call: Coroutine[Any, Any, object], kind: type[Exception]) -> bool:
        try:
            self.run(call)
        except kind:
            return True
        return False

    # What servers do

    @rule(name=servers)
    def look(self, name: str) -> None:
        server = self.servers[name]
        server.seen = self.run(server.store.lease())

    @rule(name=servers)
    def wait_for_a_move(self, name: str) -> None:
        server = self.servers[name]
        if server.seen is not None:
            server.seen = self.run(server.store.lease_moved(server.seen, within_s=0.0))

    @rule(name=servers)
    def take_what_is_free_or_its_own(self, name: str) -> None:
        self.take(name, may=self.holder == name or (not self.holder and self.successor in ("", name)))

    @rule(name=servers)
    def take_what_stood_still(self, name: str) -> None:
        seen = self.servers[name].seen
        if seen is None:
            return
        stood_still = (seen.epoch, seen.beat, seen.holder.partition(":")[0]) == (self.epoch, self.beat, self.holder)
        is_free_for_it = self.holder == name or (not self.holder and self.successor in ("", name))
        self.take(name, may=stood_still or is_free_for_it, seen=seen)

    @rule(name=servers)
    def promote(self, name: str) -> None:
        self.take(name, may=True, force=True)

    @rule(name=servers)
    def renew(self, name: str) -> None:
        server = self.servers[name]
        if server.epoch is None:
            return
        call = server.store.renew_lease(server.epoch)
        if server.epoch == self.epoch:
            self.beat += 1
            assert self.run(call).beat == self.beat
        else:
            assert self.fails(call, StaleEpoch)

    @rule(name=servers, successor=st.sampled_from(("", *SERVERS)))
    def release(self, name: str, successor: str) -> None:
        server = self.servers[name]
        if server.epoch is None:
            return
        call = server.store.release_lease(server.epoch, successor=successor)
        if server.epoch == self.epoch:
            self.run(call)
            self.epoch, self.beat, self.holder, self.successor = self.epoch + 1, 0, "", successor
        else:
            assert self.fails(call, StaleEpoch)

    @rule(name=servers)
    def crash_and_come_back(self, name: str) -> None:
        server = self.servers[name]
        server.seen = server.epoch = None
        if all(other is server or other.store is not server.store for other in self.servers.values()):
            self.run(server.store.close())
            self.run(server.store.open())

    # What must hold

    @invariant()
    def the_lease_is_the_models(self) -> None:
        for server in self.servers.values():
            lease = self.run(server.store.lease())
            assert (lease.epoch, lease.beat, lease.successor) == (self.epoch, self.beat, self.successor)
            assert lease.holder == (f"{self.holder}:1" if self.holder else "")

    @rule(name=servers)
    def of_all_epochs_only_the_holders_writes(self, name: str) -> None:
        store = self.servers[name].store
        may_write = set()
        for epoch in self.given:
            if not self.fails(store.audit(epoch, AuditEntry(float(epoch), "a", "b", "c", "ok")), StaleEpoch):
                may_write.add(epoch)
                self.written += 1
        assert may_write == ({self.epoch} if self.holder else set())
        assert len(self.run(store.audit_log(10_000))) == self.written


class MemoryLeaseMachine(LeaseMachine):
    def stores(self) -> list[Store]:
        return [MemoryStore()] * 3


class SqliteLeaseMachine(LeaseMachine):
    def stores(self) -> list[Store]:
        self.folder = tempfile.TemporaryDirectory(prefix="hanse-lease-")
        return [SqlStore(Path(self.folder.name) / "store.db") for _ in SERVERS]

    def teardown(self) -> None:
        super().teardown()
        self.folder.cleanup()


TestMemoryLease = MemoryLeaseMachine.TestCase
TestMemoryLease.settings = settings(max_examples=100, stateful_step_count=40)
TestSqliteLease = SqliteLeaseMachine.TestCase
TestSqliteLease.settings = settings(max_examples=15, stateful_step_count=30)
