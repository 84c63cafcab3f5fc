"""What a store keeps and what it promises: the ``Store`` protocol, its records, and the checks made before every write.

A run is a journal in the store: tasks issued, answers accepted, rounds committed, one transaction each. Round 0 is the
initial model; while round *r* is the last committed one, tasks and answers belong to round *r + 1*, and the commit of
that round deletes them. Whoever writes holds the lease, and names its epoch with every write: when the lease has gone
to another server, or was given back, nothing is written. A commit may carry tasks on, which then outlive their round.

No two machines' clocks are compared to tell whether the holder is alive. It *beats*, and a server that has seen the
same beat for the lease's ``ttl_s`` on its own clock may take the lease: it says which one it saw, and is refused if
that has moved since.

What is written comes, in the end, from other machines. The ``check_…`` functions here are the gate: both stores call
them before they change anything.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Protocol, Self, TypeVar

import msgspec
from blake3 import blake3

from hanse.errors import Conflict, NotFound, ProtocolError, StaleEpoch
from hanse.ids import JobId, Ssid, is_digest, is_job_id, is_name
from hanse.job import ENDED, LEGAL, JobRecord, JobState
from hanse.messages import (
    INLINE_LIMIT_BYTES,
    ITEM_BYTES,
    CommitRound,
    ModelRef,
    RoundView,
    StateRef,
    TaskAssignment,
    TaskKey,
    TaskResult,
    TensorRef,
)

T = TypeVar("T")

MAX_ROUND: Final = 2**31 - 1
MAX_DIMENSIONS: Final = 32
MAX_TENSOR_BYTES: Final = 2**48


class Lease(msgspec.Struct, frozen=True):
    """The right to write: ``epoch`` rises with every tenure, which ``ssid`` names; ``beat`` rises while it is held.

    ``holder`` is the server process's workspace and ``""`` while the lease is free, ``name`` the server's name and
    ``target`` where clients reach it. A holder that has not beaten for ``ttl_s`` seconds may be succeeded; a free lease
    keeps the ``ttl_s`` of its last holder, for so long it is ``successor``'s first, if that names a server.
    """

    epoch: int
    holder: str
    ssid: Ssid
    beat: int = 0
    ttl_s: float = 0.0
    name: str = ""
    target: str = ""
    successor: str = ""


class Standby(msgspec.Struct, frozen=True):
    """A server that stands by, for people to see; ``seen_at`` is when it last said so.

    That is in POSIX seconds by the store's own clock, which sets it: servers' clocks may differ by any amount.
    """

    holder: str
    name: str
    target: str
    seen_at: float = 0.0


class RunState(msgspec.Struct, frozen=True):
    """Where a run stands: its last committed state, and its tasks without and with an answer.

    The tasks are those of the next round and those that were carried on, in the order of their keys; the answers come
    in the order in which they were accepted.
    """

    state: StateRef | None
    tasks: tuple[TaskAssignment, ...] = ()
    answers: tuple[TaskResult, ...] = ()


class AuditEntry(msgspec.Struct, frozen=True):
    """Who did what to which thing, and how it went; ``at`` is POSIX seconds."""

    at: float
    actor: str
    action: str
    object: str
    outcome: str
    reason: str = ""


class Store(Protocol):
    """The server's memory across restarts.

    Every method that writes names the writer's ``epoch``, changes everything or nothing, and returns when the change is
    durable; cancelling the caller does not take a write back. Times are POSIX seconds, given by the caller.

    A write that raised ``StoreFailed`` may have happened all the same, when the database was lost while it committed.
    So a write may be asked for again: what is stored already is left as it is (but ``audit`` appends once more).

    All of them may raise ``StoreFailed``; those that write ``StaleEpoch`` (the epoch is not the lease's) and
    ``ProtocolError`` (what was given is not what its type says), and nothing was written then.
    """

    async def open(self) -> None:
        """Make the store usable; a new one is created."""
        ...

    async def close(self) -> None:
        """Finish the writes already asked for and release everything; twice is once."""
        ...

    async def __aenter__(self) -> Self:
        """Open."""
        ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        ...

    async def lease(self) -> Lease:
        """Return the lease as it is now."""
        ...

    async def lease_moved(self, seen: Lease, *, within_s: float) -> Lease:
        """Return the lease as soon as its epoch, beat or holder is not *seen*'s, or as it is after *within_s* seconds.

        Once it has been *seen*'s for ``seen.ttl_s``, on the caller's clock, the caller may take it.
        """
        ...

    async def take_lease(
        self, holder: str, *, name: str, target: str, ttl_s: float, seen: Lease | None = None, force: bool = False
    ) -> Lease:
        """Begin a tenure of *holder*, with a new epoch, and no longer list the server *name* as a standby.

        A holder may take its own lease again, as after a crash, and a free one may be taken that is not handed to
        another server. Any may be taken that has not moved since the caller saw it as *seen*, or with *force*.

        Raises:
            Conflict: none of this holds.
        """
        ...

    async def renew_lease(self, epoch: int) -> Lease:
        """Beat: return the lease of *epoch* with the next beat."""
        ...

    async def release_lease(self, epoch: int, *, successor: str = "") -> None:
        """End the tenure: *epoch* is over, and the lease free, for the server *successor* first if that is given."""
        ...

    async def note_standby(self, standby: Standby) -> None:
        """Remember that *standby* stands by, in place of what its name said before; this needs no epoch."""
        ...

    async def standbys(self, *, within_s: float) -> list[Standby]:
        """Return who has said within the last *within_s* that it stands by, and has not taken the lease since, by name.

        What was said at a time that is as far ahead, because the store's clock was set back, is forgotten too.
        """
        ...

    async def add_job(self, epoch: int, record: JobRecord) -> None:
        """Store a new job.

        Raises:
            Conflict: there is another job with this id.
        """
        ...

    async def replace_job(self, epoch: int, record: JobRecord, *, was: JobState) -> None:
        """Store *record* in place of the job's, if that is in state *was*, and the move is legal.

        Raises:
            Conflict: the stored job is in another state, or may not move so.
            NotFound: there is no such job.
        """
        ...

    async def job(self, job_id: JobId) -> JobRecord:
        """Return the job.

        Raises:
            NotFound: there is no such job.
        """
        ...

    async def jobs(self, *, states: Collection[JobState] = (), limit: int | None = None) -> list[JobRecord]:
        """Return jobs, the latest added first: those in one of *states* (empty: all), at most *limit*."""
        ...

    async def issue_tasks(self, epoch: int, job_id: JobId, tasks: Sequence[TaskAssignment]) -> None:
        """Journal *tasks*; one already journalled under its key stays as it was.

        Raises:
            Conflict: the job has ended, or a task is not of the round after the last committed one.
            NotFound: there is no such job.
        """
        ...

    async def accept_answer(self, epoch: int, job_id: JobId, result: TaskResult) -> TaskResult:
        """Return the answer that counts for *result*'s task: *result*, journalled now, or the one that was before it.

        Whoever asks again, not knowing what became of a first attempt, so learns which answer was accepted.

        Raises:
            NotFound: no such task is journalled: never issued, or over with its round.
        """
        ...

    async def retract_answers(self, epoch: int, job_id: JobId, keys: Sequence[TaskKey]) -> None:
        """Have the tasks of *keys* be without an answer again, because the answers' tensors are lost."""
        ...

    async def commit_round(self, epoch: int, job_id: JobId, commit: CommitRound, *, now_s: float) -> None:
        """Make *commit*'s state the run's newest, and delete the run's tasks but for those that *commit* carries on.

        Once more for the round committed last: nothing.

        Raises:
            Conflict: the job has ended, or the round is not the one after the last committed one.
            NotFound: there is no such job, or no such task as is to be carried on.
        """
        ...

    async def snapshot(self, job_id: JobId) -> RunState:
        """Return where the run stands.

        Raises:
            NotFound: there is no such job.
        """
        ...

    async def rounds(self, job_id: JobId) -> list[RoundView]:
        """Return the run's committed rounds in order; of a job that there is not: none."""
        ...

    async def last_round(self, job_id: JobId) -> RoundView | None:
        """Return the last of ``rounds`` without reading the others; ``None`` when there is none."""
        ...

    async def end_run(self, epoch: int, record: JobRecord, *, was: JobState) -> None:
        """Do ``replace_job`` and delete the run's tasks, together; the last committed state stays.

        Raises:
            Conflict, NotFound: as ``replace_job``.
        """
        ...

    async def set_disabled(self, epoch: int, client: str, disabled: bool, *, reason: str = "") -> None:
        """Remember that *client* is disabled, for *reason*, and that no token of it counts; or that it is no longer."""
        ...

    async def disabled_clients(self) -> dict[str, str]:
        """Return the disabled clients' names, with the reason for each."""
        ...

    async def keep_token(self, epoch: int, client: str, fingerprint: str, *, now_s: float, until_s: float) -> None:
        """Remember that of *client*'s tokens only that of *fingerprint* counts (nothing: none), until *until_s*.

        What was to be remembered of it for longer is; what was until *now_s*, of any client, is forgotten.
        """
        ...

    async def kept_tokens(self) -> dict[str, str]:
        """Return the fingerprint of the one token that counts, by client, as ``keep_token`` was told."""
        ...

    async def keep_certificate_ends(self, epoch: int, ends: Mapping[str, float], *, since_s: float) -> None:
        """Remember when the certificates of clients end, in place of what was to be remembered of those.

        Those, of any client, that ended before *since_s* are forgotten.
        """
        ...

    async def certificate_ends(self) -> dict[str, float]:
        """Return when clients' certificates end, as ``keep_certificate_ends`` was told."""
        ...

    async def audit(self, epoch: int, entry: AuditEntry) -> None:
        """Append *entry* to the audit log."""
        ...

    async def audit_log(self, limit: int = 100) -> list[AuditEntry]:
        """Return the last *limit* entries, the latest first."""
        ...


async def is_stored(store: Store, record: JobRecord) -> bool:
    """Return whether *store* has *record*: one that failed may have done what it could not say that it had.

    Raises:
        StoreFailed: it cannot be asked.
    """
    with suppress(NotFound):
        return await store.job(record.job_id) == record
    return False


# Checks before a write ------------------------------------------------------------------------------------------------


def session_id(store_id: str, epoch: int) -> Ssid:
    """Return the name of the tenure *epoch* of the store *store_id*: no other tenure of any store has it."""
    return Ssid(f"{store_id}-{epoch}")


def store_of(ssid: Ssid) -> str:
    """Return the id of the store of which *ssid* names a tenure."""
    return ssid.rpartition("-")[0]


def pack(value: msgspec.Struct) -> bytes:
    """Return *value* as msgpack, having made sure that it reads back as its type.

    Raises:
        ProtocolError: a field holds something that its type does not allow; the error names it.
    """
    blob = _encoded(value)
    kind = type(value)
    try:
        msgspec.msgpack.decode(blob, type=kind)
    except msgspec.ValidationError as error:
        what, _, path = str(error).partition(" - at `$")
        raise ProtocolError(f"{kind.__name__}{path.rstrip('`')}", got=value, expected=what) from error
    return blob


def unpack(blob: bytes, kind: type[T]) -> T:
    """Return the *kind* that ``pack`` made *blob* of."""
    return msgspec.msgpack.decode(blob, type=kind)


def check_job(record: JobRecord) -> bytes:
    """Return *record* packed, after checking it."""
    blob = pack(record)
    _expect(is_job_id(record.job_id), "JobRecord.job_id", record.job_id, "lower-case letters, digits and dashes")
    _expect(is_digest(record.package), "JobRecord.package", record.package, "a digest")
    _expect(record.package_bytes >= 0, "JobRecord.package_bytes", record.package_bytes, "0 or more")
    _expect(record.result == "" or is_digest(record.result), "JobRecord.result", record.result, "a digest, or nothing")
    _expect(record.result_bytes >= 0, "JobRecord.result_bytes", record.result_bytes, "0 or more")
    failed = record.state is JobState.FAILED
    _expect(bool(record.reason) or not failed, "JobRecord.reason", record.reason, "the reason why the job failed")
    return blob


@dataclass(frozen=True, slots=True)
class PackedTask:
    """A task as stores keep it: its model apart, by the digest of its packed reference (``None``: it has none)."""

    key: TaskKey
    blob: bytes
    model: bytes | None


def check_tasks(tasks: Sequence[TaskAssignment]) -> tuple[list[PackedTask], dict[bytes, bytes]]:
    """Return *tasks* and their models, by digest, packed, after checking them; tasks that share a model share it here.

    A round's tasks usually hand out one model, whose reference may name hundreds of tensors.
    """
    packed: list[PackedTask] = []
    models: dict[bytes, bytes] = {}
    for task in tasks:
        digest = None
        if task.model is not None:
            blob = _encoded(task.model)
            digest = blake3(blob).digest()
            if digest not in models:
                pack(task.model)
                check_model_ref(task.model, "TaskAssignment.model")
                models[digest] = blob
        packed.append(PackedTask(task.key, pack(msgspec.structs.replace(task, model=None)), digest))
        check_key(task.key)
    return packed, models


def unpack_task(blob: bytes, model: bytes | None) -> TaskAssignment:
    """Return the task that ``check_tasks`` took apart into *blob* and *model*."""
    task = unpack(blob, TaskAssignment)
    return task if model is None else msgspec.structs.replace(task, model=unpack(model, ModelRef))


def check_result(result: TaskResult) -> bytes:
    """Return *result* packed, after checking it."""
    blob = pack(result)
    check_key(result.key)
    update = result.update
    _expect((update is None) != (result.fault is None), "TaskResult", result, "an update or a fault, and not both")
    if update is not None:
        _expect(update.num_examples >= 0, "UpdateRef.num_examples", update.num_examples, "0 or more")
        if update.model is not None:
            check_model_ref(update.model, "UpdateRef.model")
    return blob


def check_commit(commit: CommitRound, *, now_s: float) -> tuple[bytes, bytes]:
    """Return *commit*'s state and its ``RoundView`` packed, after checking all of it."""
    pack(commit)
    state = commit.state
    _expect(0 <= state.round <= MAX_ROUND, "StateRef.round", state.round, f"0 to {MAX_ROUND}")
    check_model_ref(state.model, "StateRef.model")
    for name, model in state.extra.items():
        check_model_ref(model, f"StateRef.extra[{name!r}]")
    for key in commit.carried:
        check_key(key)
    return _encoded(state), pack(RoundView(state.round, state.metrics, commit.took_s, now_s, commit.answered))


def check_epoch(ours: int, current: int) -> None:
    """Raise ``StaleEpoch`` unless a writer of epoch *ours* may write while the lease is of epoch *current*."""
    if ours != current:
        raise StaleEpoch(ours=ours, current=current)


def check_taking(lease: Lease, holder: str, *, name: str, seen: Lease | None, force: bool) -> None:
    """Raise ``Conflict`` unless *holder*, of the server *name*, may take *lease*, which it saw last as *seen*."""
    is_free_for_it = lease.holder == "" and lease.successor in ("", name)
    is_its_own = lease.holder == holder
    has_stood_still = seen is not None and not has_moved(lease, seen)
    if not (is_free_for_it or is_its_own or has_stood_still or force):
        state = f"held by {lease.holder}" if lease.holder else f"handed to {lease.successor}"
        raise Conflict("the store's lease", state=state, wanted=f"taken by {holder}")


def has_moved(lease: Lease, seen: Lease) -> bool:
    """Return whether *lease* is not what it was when it was *seen*."""
    return (lease.epoch, lease.beat, lease.holder) != (seen.epoch, seen.beat, seen.holder)


def check_lease(lease: Lease) -> None:
    """Check a lease that somebody takes."""
    pack(lease)
    _expect(bool(lease.holder), "Lease.holder", lease.holder, "text")
    check_text(lease.holder, "Lease.holder")
    check_text(lease.target, "Lease.target")
    _expect(is_name(lease.name), "Lease.name", lease.name, "a server's name")
    _expect(0 < lease.ttl_s < math.inf, "Lease.ttl_s", lease.ttl_s, "a number of seconds above 0")


def check_successor(name: str) -> None:
    """Check the name of the server that is to have the lease next; nothing is nobody in particular."""
    _expect(name == "" or is_name(name), "successor", name, "a server's name, or nothing")


def check_standby(standby: Standby) -> None:
    """Check what a server says of itself that stands by."""
    pack(standby)
    _expect(is_name(standby.name), "Standby.name", standby.name, "a server's name")
    check_text(standby.holder, "Standby.holder")
    check_text(standby.target, "Standby.target")


def check_carried(carried: Collection[TaskKey], journalled: Collection[TaskKey]) -> None:
    """Raise ``NotFound`` unless all tasks that are to be *carried* on are *journalled*."""
    for key in carried:
        if key not in journalled:
            raise NotFound("task", task_title(key))


def check_disabling(client: str, reason: str) -> None:
    """Check the name of a client that is to be disabled or enabled, and the reason."""
    _expect(is_name(client), "client", client, "a participant's name")
    check_text(reason, "reason")


def check_token(client: str, fingerprint: str, *, now_s: float, until_s: float) -> None:
    """Check which token of a client is to count, and for how long."""
    _expect(is_name(client), "client", client, "a participant's name")
    _expect(fingerprint == "" or is_digest(fingerprint), "fingerprint", fingerprint, "a digest, or nothing")
    _expect(0 <= now_s < until_s < math.inf, "until_s", until_s, "a time after now")


def check_certificate_ends(ends: Mapping[str, float]) -> None:
    """Check when the certificates of clients are to end."""
    for client, ends_at in ends.items():
        _expect(is_name(client), "client", client, "a participant's name")
        _expect(math.isfinite(ends_at), f"the end of {client}'s certificate", ends_at, "a time")


def check_audit(entry: AuditEntry) -> None:
    """Check an entry for the audit log."""
    pack(entry)
    for name in ("actor", "action", "object", "outcome", "reason"):
        check_text(getattr(entry, name), f"AuditEntry.{name}")


def check_text(text: str, field: str) -> None:
    """Check that every database can hold *text* as text."""
    try:
        is_storable = b"\0" not in text.encode()
    except UnicodeEncodeError:
        is_storable = False
    _expect(is_storable, field, text, "Unicode text without zero characters")


def check_key(key: TaskKey) -> None:
    """Check a task's key."""
    _expect(0 <= key.round <= MAX_ROUND, "TaskKey.round", key.round, f"0 to {MAX_ROUND}")
    _expect(0 <= key.sequence <= MAX_ROUND, "TaskKey.sequence", key.sequence, f"0 to {MAX_ROUND}")
    _expect(0 < len(key.name) <= 200, "TaskKey.name", key.name, "1 to 200 characters")
    check_text(key.name, "TaskKey.name")
    _expect(is_name(key.client), "TaskKey.client", key.client, "a participant's name")


def check_model_ref(ref: ModelRef, field: str) -> None:
    """Check that every tensor of *ref* has a form that a tensor can have, and that no two share a name."""
    seen: set[str] = set()
    for tensor in ref.tensors:
        check_tensor_ref(tensor, f"{field} tensor {tensor.name!r}")
        _expect(tensor.name not in seen, f"{field} tensor", tensor.name, "a name that only one tensor has")
        seen.add(tensor.name)


def check_tensor_ref(tensor: TensorRef, field: str) -> None:
    """Check form, digest and the number of inline bytes; the bytes themselves are not hashed."""
    check_tensor_form(tensor.name, tensor.dtype, tensor.shape, field=field)
    _expect(is_digest(tensor.digest), f"{field} digest", tensor.digest, "64 lower-case hexadecimal digits")
    if tensor.inline is not None:
        got = len(tensor.inline)
        _expect(got == tensor.size_bytes, f"{field} inline bytes", got, f"{tensor.size_bytes}, as dtype and shape say")
        _expect(got <= INLINE_LIMIT_BYTES, f"{field} inline bytes", got, f"at most {INLINE_LIMIT_BYTES}")


def check_tensor_form(name: str, dtype: str, shape: tuple[int, ...], *, field: str) -> None:
    """Check that *name*, *dtype* and *shape* are such as a tensor can have."""
    _expect(bool(name), f"{field} name", name, "text")
    _expect(dtype in ITEM_BYTES, f"{field} dtype", dtype, f"one of {', '.join(ITEM_BYTES)}")
    _expect(len(shape) <= MAX_DIMENSIONS, f"{field} shape", shape, f"at most {MAX_DIMENSIONS} dimensions")
    _expect(all(size >= 0 for size in shape), f"{field} shape", shape, "sizes of 0 or more")
    # Also of an empty tensor, whose other sizes NumPy must still be able to multiply.
    most = math.prod(size for size in shape if size) * ITEM_BYTES[dtype]
    _expect(most <= MAX_TENSOR_BYTES, f"{field} shape", shape, f"at most {MAX_TENSOR_BYTES} bytes")


def check_move(stored: JobState, record: JobRecord, *, was: JobState) -> None:
    """Raise ``Conflict`` unless a job in state *stored* may become *record*, by one who saw it in state *was*."""
    legal = record.state is was or record.state in LEGAL[was]
    if stored is not was or not legal:
        raise Conflict(f"job {record.job_id}", state=stored.value, wanted=record.state.value)


def check_running(job_id: JobId, state: JobState, doing: str) -> None:
    """Raise ``Conflict`` when the job has ended."""
    if state in ENDED:
        raise Conflict(f"job {job_id}", state=state.value, wanted=doing)


def check_next_round(job_id: JobId, round_number: int, *, last: int, doing: str) -> None:
    """Raise ``Conflict`` unless *round_number* follows *last*, the last committed round (-1: none yet)."""
    if round_number != last + 1:
        at = f"at round {last}" if last >= 0 else "before round 0"
        raise Conflict(f"the run of job {job_id}", state=at, wanted=f"{doing} round {round_number}")


def key_order(key: TaskKey) -> tuple[int, str, int, str]:
    """Return what tasks and answers are sorted by."""
    return key.round, key.name, key.sequence, key.client


def task_title(key: TaskKey) -> str:
    """Return how a sentence calls the task of *key*."""
    return f"{key.name}#{key.sequence} of round {key.round} for {key.client}"


def _encoded(value: msgspec.Struct) -> bytes:
    try:
        return msgspec.msgpack.encode(value)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        expected = f"plain values that msgpack can hold ({error})"
        raise ProtocolError(type(value).__name__, got=value, expected=expected) from error


def _expect(holds: bool, field: str, got: object, expected: str) -> None:
    if not holds:
        raise ProtocolError(field, got=got, expected=expected)
