"""Records and messages for the tests of the store: small, valid, and varied by keyword; and what servers do with it."""

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec

from hanse.ids import ClientName, Digest, JobId
from hanse.job import JobRecord, JobSpec, JobState, WorkflowSpec, move
from hanse.messages import (
    CommitRound,
    ModelRef,
    StateRef,
    TaskAssignment,
    TaskFault,
    TaskKey,
    TaskResult,
    TensorRef,
    UpdateRef,
)
from hanse.storage.records import Lease, Store
from hanse.storage.store import SqlStore

DIGEST = Digest("0123456789abcdef" * 4)
JOB = JobId("digits-1")
SPEC = JobSpec("digits", WorkflowSpec("fedavg", {"rounds": 3}), client="app:app", model="app:model")


def record(job_id: str = JOB, *, state: JobState = JobState.RUNNING, **fields: Any) -> JobRecord:
    values: dict[str, Any] = {"submitter": "admin@demo", "submitted_at": 10.0, "package": DIGEST, "package_bytes": 3}
    return JobRecord(JobId(job_id), SPEC, state=state, **(values | fields))


def ended(of: JobRecord, to: JobState = JobState.COMPLETED, reason: str = "") -> JobRecord:
    return move(of, to, at=99.0, reason=reason)


def tensor(name: str = "w", **fields: Any) -> TensorRef:
    values: dict[str, Any] = {"dtype": "float32", "shape": (100, 100), "digest": DIGEST}
    return TensorRef(name, **(values | fields))


def model(*names: str, **metadata: str) -> ModelRef:
    return ModelRef(tuple(tensor(name) for name in names or ("w", "b")), metadata)


def key(client: str = "site-1", *, round_number: int = 1, name: str = "train", sequence: int = 0) -> TaskKey:
    return TaskKey(round_number, name, sequence, ClientName(client))


def task(client: str = "site-1", *, of: ModelRef | None = None, **where: Any) -> TaskAssignment:
    return TaskAssignment(key(client, **where), of or model(), {"rate": 0.1})


def answer(client: str = "site-1", *, num_examples: int = 7, **where: Any) -> TaskResult:
    return TaskResult(key(client, **where), UpdateRef(model(), num_examples, {"loss": 0.5}))


def fault(client: str = "site-1", **where: Any) -> TaskResult:
    return TaskResult(key(client, **where), fault=TaskFault("training-failed", "it broke"))


def commit(round_number: int, *, carried: Sequence[str] = (), **fields: Any) -> CommitRound:
    """Return a commit that carries on the tasks of round 1 for the clients *carried*."""
    state = StateRef(round_number, model(), metrics={"accuracy": round_number / 10}, **fields)
    answered = (ClientName("site-1"), ClientName("site-2"))
    return CommitRound(state, took_s=0.5, answered=answered, carried=tuple(key(client) for client in carried))


def changed(value: Any, **fields: Any) -> Any:
    """Return *value* with *fields*, of whatever type they are, as no type checker would allow."""
    return msgspec.structs.replace(value, **fields)


async def take(store: Store, server: str, *, seen: Lease | None = None, force: bool = False) -> Lease:
    return await store.take_lease(server, name=server, target=f"{server}:8102", ttl_s=30.0, seen=seen, force=force)


async def standby(store: SqlStore) -> "asyncio.Task[Lease]":
    """Return a task that waits for the lease to move, when it listens and has had its first look."""
    seen = await store.lease()
    assert store._listener is not None
    await store._listener.listen()
    waiting = asyncio.create_task(store.lease_moved(seen, within_s=3600.0), name="standby")
    await asyncio.sleep(0)  # its look has been asked for
    await store.standbys(within_s=60)
    assert not waiting.done()
    return waiting
