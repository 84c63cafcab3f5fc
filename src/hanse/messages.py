"""What participants say to each other: one frozen type per meaning, and the table of who answers which topic with what.

A ``Message`` is headers and a typed payload. On the wire a payload is msgpack of its type; ``CATALOGUE`` names the
types of each (channel, topic), and whatever does not decode as such is refused at the edge with the field that is
wrong. Fields that a newer release added are ignored, and a field added later must have a default, so that neighbouring
releases understand each other.

Tensors never travel in a message, except small ones (``INLINE_LIMIT_BYTES``), whose bytes ride along in their reference
because a transfer of their own would cost more than they weigh.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, TypeAlias

import msgspec

from hanse.ids import ClientName, Digest, Fqcn, JobId, Ssid, Token
from hanse.job import Config, JobSpec, Resources

PROTOCOL_VERSIONS: Final = (1,)
INLINE_LIMIT_BYTES: Final = 16 * 1024

Metrics: TypeAlias = dict[str, float]

ITEM_BYTES: Final[Mapping[str, int]] = {
    "bool": 1, "int8": 1, "uint8": 1, "int16": 2, "uint16": 2, "int32": 4, "uint32": 4, "int64": 8, "uint64": 8,
    "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8,
}  # fmt: skip
"""The dtypes that a tensor may have, by NumPy's name, with the bytes of one element."""


class ReturnCode(StrEnum):
    """How a request went; every reply carries one, and a ``reason`` when it is not OK."""

    OK = "ok"
    COMM_ERROR = "comm_error"
    UNAUTHENTICATED = "unauthenticated"
    UNAUTHORIZED = "unauthorized"
    INVALID_REQUEST = "invalid_request"
    NOT_FOUND = "not_found"
    CONFLICT = "conflict"
    REFUSED = "refused"
    ABORT_RUN = "abort_run"
    TIMED_OUT = "timed_out"
    INTERNAL = "internal"


class Header:
    """The names of headers that mean something to Hanse."""

    RETURN_CODE: Final = "return_code"
    REASON: Final = "reason"
    ERROR_CODE: Final = "error_code"
    ORIGIN: Final = "origin"
    PROJECT: Final = "project"
    CLIENT: Final = "client"
    TOKEN: Final = "token"  # noqa: S105 - the header's name, not a secret
    TOKEN_SIGNATURE: Final = "token_signature"  # noqa: S105 - the header's name, not a secret
    SSID: Final = "ssid"
    ROLE: Final = "role"


Payload: TypeAlias = msgspec.Struct | None


@dataclass(slots=True)
class Message:
    """A request or a reply: text headers beside one typed payload."""

    headers: dict[str, str] = field(default_factory=dict)
    payload: Payload = None

    def get_header(self, key: str, default: str | None = None) -> str | None:
        """Return the header *key*, or *default* when the message has none."""
        return self.headers.get(key, default)

    def set_header(self, key: str, value: str) -> None:
        """Set the header *key*, in place of what it was."""
        self.headers[key] = value

    @property
    def return_code(self) -> ReturnCode:
        """How the request went, for a reply; OK where no code was set."""
        return ReturnCode(self.headers.get(Header.RETURN_CODE, ReturnCode.OK))

    @property
    def reason(self) -> str:
        """Why it did not go well: one sentence, empty when it did."""
        return self.headers.get(Header.REASON, "")


def ok(payload: Payload = None) -> Message:
    """Return the reply to a request that went well."""
    return Message({Header.RETURN_CODE: ReturnCode.OK.value}, payload)


def refusal(code: ReturnCode, reason: str, *, error_code: str = "") -> Message:
    """Return the reply to a request that did not go well, with the sentence that says why."""
    headers = {Header.RETURN_CODE: code.value, Header.REASON: reason}
    if error_code:
        headers[Header.ERROR_CODE] = error_code
    return Message(headers)


@dataclass(slots=True)
class Client:
    """A registered client, as the server knows it.

    ``last_connect_time`` is in seconds of the server's monotonic clock. ``props`` holds what the client said of itself
    (its resources, its version) and what the server noted.
    """

    name: ClientName
    token: Token
    fqcn: Fqcn
    last_connect_time: float
    props: dict[str, object] = field(default_factory=dict)


# Opening a stream -----------------------------------------------------------------------------------------------------


class Credentials(msgspec.Struct, frozen=True):
    """A token and the server's signature over it: who someone is, once proven."""

    name: str
    token: Token
    signature: str
    ssid: Ssid


class Hello(msgspec.Struct, frozen=True):
    """The first frame of a stream: what I speak, which cell I am, and what proves it (none before registration)."""

    versions: tuple[int, ...]
    fqcn: Fqcn
    project: str
    release: str = ""
    credentials: Credentials | None = None


class Welcome(msgspec.Struct, frozen=True, omit_defaults=True):
    """The server's answer: the version that both speak from here on, and where the limits are.

    ``sent_at`` is the server's time of day (POSIX), for whoever compares clocks; 0 where it does not tell.
    """

    version: int
    server: str
    ssid: Ssid
    release: str = ""
    max_payload_bytes: int = 0
    sent_at: float = 0.0


# Registration ---------------------------------------------------------------------------------------------------------


class Challenge(msgspec.Struct, frozen=True):
    """First half of mutual identification: *certificate* is PEM, *nonce* 32 fresh random bytes."""

    client: str
    project: str
    nonce: bytes
    certificate: bytes = b""


class ChallengeReply(msgspec.Struct, frozen=True):
    """The server's half: its nonce, and its signature over the transcript of both."""

    server: str
    nonce: bytes
    certificate: bytes
    signature: bytes


class Register(msgspec.Struct, frozen=True):
    """Second half: the client's (or administrator's) signature over the same transcript.

    ``role`` (``client``, ``admin:<role>``) is believed where there are no certificates; else the certificate's counts.
    """

    client: str
    project: str
    certificate: bytes = b""
    signature: bytes = b""
    resources: Resources = Resources()
    release: str = ""
    role: str = "client"


class Registered(msgspec.Struct, frozen=True):
    """What registration, renewal and login give: a signed token with its lifetime, and the session it belongs to.

    ``job_authority`` names the key of the authority whose certificates the server takes from jobs' processes; empty
    where they need none.
    """

    token: Token
    token_signature: str
    ssid: Ssid
    expires_in_s: float
    heartbeat_s: float = 5.0
    role: str = ""
    job_authority: str = ""


class Renew(msgspec.Struct, frozen=True):
    """A request for a fresh token before the present one expires."""


class Quit(msgspec.Struct, frozen=True):
    """An existing client leaves."""

    reason: str = ""


class Heartbeat(msgspec.Struct, frozen=True, omit_defaults=True):
    """A client is alive, and runs these jobs; of the jobs that are *idle* it has files, and no process.

    What it offers and its release are those that it registered with: a server that was started again, or took over,
    knows them from here.
    """

    jobs: tuple[JobId, ...] = ()
    resources: Resources = Resources()
    release: str = ""
    idle: tuple[JobId, ...] = ()


class HeartbeatReply(msgspec.Struct, frozen=True):
    """The server heard it; it does not run these jobs, so the client should end them."""

    abort_jobs: tuple[JobId, ...] = ()
    ssid: Ssid = Ssid("")


class Goodbye(msgspec.Struct, frozen=True):
    """The server is going; *retry* says whether it means to come back."""

    reason: str
    retry: bool = True


# Jobs at a client -----------------------------------------------------------------------------------------------------


class JobCredentials(msgspec.Struct, frozen=True):
    """What a job's process needs to be its cell: a token for this job alone and, with TLS, its own certificate.

    ``authority`` names the key of the authority that gave the certificate.
    """

    credentials: Credentials
    certificate: bytes = b""
    key: bytes = b""
    authority: str = ""


class DeployJob(msgspec.Struct, frozen=True):
    """Fetch this job's package, check it against the site's policy, and be ready to start it."""

    job_id: JobId
    name: str
    submitter: str
    spec: JobSpec
    package: Digest
    package_bytes: int


class StartJob(msgspec.Struct, frozen=True):
    """Start the deployed job's process with these credentials."""

    job_id: JobId
    identity: JobCredentials
    attempt: int = 1


class AbortJob(msgspec.Struct, frozen=True):
    """End the job's process."""

    job_id: JobId
    reason: str


class JobEnded(msgspec.Struct, frozen=True):
    """A job's process at a client ended: *status* as from ``wait`` (negative: a signal), and its log's last lines.

    *cause* is the code of what ended it, where the site knows: ``out-of-memory``.
    """

    job_id: JobId
    attempt: int
    status: int
    log_tail: str = ""
    cause: str = ""


class JobFailure(msgspec.Struct, frozen=True):
    """A client reports that a job failed there for good: *kind* is ``config``, ``exception`` or ``unsafe``.

    ``log_tail`` are the last lines of the job's log there, as many as the site lets go.
    """

    job_id: JobId
    kind: str
    reason: str
    code: str = ""
    log_tail: str = ""


# Tensors by name ------------------------------------------------------------------------------------------------------


class TensorRef(msgspec.Struct, frozen=True):
    """A tensor by name: ``digest`` is BLAKE3 of its bytes (C order, little-endian), which small ones carry along."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    digest: Digest
    inline: bytes | None = None

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_BYTES:
            raise ValueError(
                f"tensor {self.name!r:.80} has dtype {self.dtype!r:.40}; expected one of {', '.join(ITEM_BYTES)}"
            )
        if any(size < 0 for size in self.shape):
            raise ValueError(f"tensor {self.name!r:.80} has the shape {self.shape}; expected no negative size")

    @property
    def size_bytes(self) -> int:
        """The bytes of the tensor: elements × item size."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


class ModelRef(msgspec.Struct, frozen=True):
    """A model by name: its tensors in order, and its metadata."""

    tensors: tuple[TensorRef, ...] = ()
    metadata: dict[str, str] = {}


class UpdateRef(msgspec.Struct, frozen=True):
    """A client's update by name: ``model`` is ``None`` where only metrics were asked for."""

    model: ModelRef | None
    num_examples: int
    metrics: Metrics = {}


# Tasks ----------------------------------------------------------------------------------------------------------------


class TaskKey(msgspec.Struct, frozen=True):
    """Names one task within its run; *sequence* tells those of one name, round and client apart.

    It follows from what is asked: ``coordination.task_keys``.
    """

    round: int
    name: str
    sequence: int
    client: ClientName


class TaskAssignment(msgspec.Struct, frozen=True):
    """A task for one client; ``expects_model`` says whether the answer must hold tensors like ``model``'s."""

    key: TaskKey
    model: ModelRef | None
    config: Config = {}
    expects_model: bool = True


class TaskFault(msgspec.Struct, frozen=True):
    """Why a task has no update: a stable code, a sentence, and the last lines of the job's log at the client."""

    code: str
    reason: str
    retryable: bool = False
    log_tail: str = ""


class TaskResult(msgspec.Struct, frozen=True):
    """The answer to a task: an update or a fault, never both."""

    key: TaskKey
    update: UpdateRef | None = None
    fault: TaskFault | None = None


class TaskCancelled(msgspec.Struct, frozen=True):
    """The answer to this task is no longer wanted."""

    key: TaskKey


class LogMetrics(msgspec.Struct, frozen=True):
    """Numbers that the training code logs while it works on a task."""

    key: TaskKey
    step: int
    metrics: Metrics


# A run's process and its server ---------------------------------------------------------------------------------------


class StateRef(msgspec.Struct, frozen=True):
    """A workflow's state by name: see ``hanse.learning.workflow.State``."""

    round: int
    model: ModelRef
    extra: dict[str, ModelRef] = {}
    values: dict[str, object] = {}
    metrics: Metrics = {}
    done: bool = False


class Attach(msgspec.Struct, frozen=True):
    """A run's process asks for what it must know to begin or to go on."""


class RunSnapshot(msgspec.Struct, frozen=True):
    """Where a run stands: the last committed state (``None`` before the first), and who takes part.

    Answers accepted since that state are not here: whoever issues an answered task again is handed its answer.
    ``carried`` are the tasks of earlier rounds that the last commit kept; answers to them follow as events. Of the
    ``lost_clients``, from which no answer is to be expected now, ``failed_clients`` will not come back. ``counted`` are
    the tasks of the present round that were asked by a release which counted them.
    """

    job_id: JobId
    spec: JobSpec
    clients: tuple[ClientName, ...]
    state: StateRef | None = None
    lost_clients: tuple[ClientName, ...] = ()
    carried: tuple[TaskKey, ...] = ()
    failed_clients: tuple[ClientName, ...] = ()
    counted: tuple[TaskKey, ...] = ()


class IssueTasks(msgspec.Struct, frozen=True):
    """Journal one task for each key and hand it to its client; a key that is answered already brings its answer.

    For people: the run waits for the answers at most ``deadline_s`` seconds, and ``then`` says what happens after that;
    where it ``keeps`` tasks, that is said anew of all that are out under the same name in the same round. A process
    of release 0.1.0 says neither: a day, and the workflow decides.
    """

    keys: tuple[TaskKey, ...]
    model: ModelRef | None
    deadline_s: float = 86_400.0
    then: str = "the workflow decides"
    config: Config = {}
    expects_model: bool = True
    keeps: bool = False


class CancelTasks(msgspec.Struct, frozen=True):
    """These tasks' answers are no longer wanted: later ones are answered as stale."""

    keys: tuple[TaskKey, ...]


class CommitRound(msgspec.Struct, frozen=True):
    """Commit this state as the run's newest; round 0 is the initial model.

    The tasks and answers of the round end with it, but for those that are ``carried`` into the following rounds.
    """

    state: StateRef
    took_s: float = 0.0
    answered: tuple[ClientName, ...] = ()
    carried: tuple[TaskKey, ...] = ()


class RunEnded(msgspec.Struct, frozen=True):
    """The run's process has reached its end: completed with a result in its folder, or failed with a reason.

    *client* is the one because of which it failed, where there is one, and *cause* the code of the fault that stands in
    the place of its answer. With ``again`` the run itself has not failed:
    its process cannot go on just now, for this reason, and is to be started again.
    """

    completed: bool
    code: str = ""
    reason: str = ""
    result: Digest = Digest("")
    result_bytes: int = 0
    client: str = ""
    again: bool = False
    cause: str = ""


class ClientChanged(msgspec.Struct, frozen=True):
    """A client of the run was lost, came back, or failed for good (``lost``, ``back``, ``failed``)."""

    client: ClientName
    change: str
    reason: str = ""


class RunHeartbeat(msgspec.Struct, frozen=True):
    """A run's process is alive."""


class AbortRun(msgspec.Struct, frozen=True):
    """End the run; what is committed stays."""

    reason: str


# Administration -------------------------------------------------------------------------------------------------------


class SubmitJob(msgspec.Struct, frozen=True):
    """Run this package, uploaded before under its digest."""

    package: Digest
    package_bytes: int


class JobSubmitted(msgspec.Struct, frozen=True):
    """The job is stored, under this id."""

    job_id: JobId
    name: str


class JobQuery(msgspec.Struct, frozen=True):
    """Which job is meant: its id, or a prefix that only one job has."""

    job_id: str


class ListJobs(msgspec.Struct, frozen=True):
    """All jobs, newest first; ``state`` narrows them."""

    state: str = ""
    limit: int = 100


class RoundView(msgspec.Struct, frozen=True):
    """One committed round, for people."""

    round: int
    metrics: Metrics
    took_s: float
    committed_at: float
    answered: tuple[str, ...] = ()


class ClientView(msgspec.Struct, frozen=True):
    """A client's part in a job, for people: its state, since when (POSIX seconds), and which start of its process."""

    name: str
    state: str
    reason: str = ""
    since: float = 0.0
    attempt: int = 0


class Waiting(msgspec.Struct, frozen=True):
    """Something that a job waits for, for people.

    *what* it is, and from *whom* it is to come: the clients, each as it stands, or nobody in particular. *since* and
    *until* are POSIX seconds, and *then* says what happens when it has not come by *until*. Nothing is waited for
    without an end; release 0.1.0 told of some waits that had none, with an *until* of 0.
    """

    what: str
    since: float
    until: float
    then: str
    whom: tuple[ClientView, ...] = ()


class JobView(msgspec.Struct, frozen=True):
    """A job, for people; times are POSIX seconds, 0 where it has not happened.

    ``waiting`` is what it waits for while it has not ended. Of a bad end, ``JobRecord`` says what is known; ``advice``
    is what to do about it.
    """

    job_id: JobId
    name: str
    state: str
    submitter: str
    submitted_at: float
    started_at: float = 0.0
    ended_at: float = 0.0
    code: str = ""
    reason: str = ""
    round: int = 0
    rounds: int = 0
    metrics: Metrics = {}
    clients: tuple[ClientView, ...] = ()
    history: tuple[RoundView, ...] = ()
    result: Digest = Digest("")
    result_bytes: int = 0
    waiting: tuple[Waiting, ...] = ()
    client: str = ""
    cause: str = ""
    log_tail: str = ""
    advice: str = ""


class JobList(msgspec.Struct, frozen=True):
    """Several jobs, for people."""

    jobs: tuple[JobView, ...]


class JobEvent(msgspec.Struct, frozen=True):
    """Something happened in a job that is being watched; ``kind`` is the event's name in ``hanse.events``."""

    job_id: JobId
    kind: str
    at: float
    round: int = 0
    client: str = ""
    metrics: Metrics = {}
    text: str = ""


class LogQuery(msgspec.Struct, frozen=True):
    """A job's log at the server (``client`` empty) or as one client last reported it; the last *lines* of it."""

    job_id: str
    client: str = ""
    lines: int = 200


class LogText(msgspec.Struct, frozen=True):
    """Lines of a log."""

    text: str


class ListClients(msgspec.Struct, frozen=True):
    """All registered clients."""


class RegisteredClient(msgspec.Struct, frozen=True):
    """A registered client, for people.

    ``certificate_ends_at`` is in POSIX seconds, 0 where the server has seen none; ``remark`` says what people should
    know of that: that it has ended, or will soon.
    """

    name: str
    state: str
    last_heard_s: float
    jobs: tuple[JobId, ...] = ()
    resources: Resources = Resources()
    release: str = ""
    certificate_ends_at: float = 0.0
    remark: str = ""


class RefusedClient(msgspec.Struct, frozen=True):
    """Somebody who calls itself *name* was refused *ago_s* seconds ago, for people."""

    name: str
    code: str
    reason: str
    ago_s: float


class ClientList(msgspec.Struct, frozen=True):
    """The registered clients, for people, those that are disabled, each with the reason, and who was refused lately.

    ``expired`` are clients that are not registered, and whose certificate, as it was shown last, has ended; each with
    what is to be said of that.
    """

    clients: tuple[RegisteredClient, ...]
    disabled: dict[str, str] = {}
    refused: tuple[RefusedClient, ...] = ()
    expired: dict[str, str] = {}


class DisableClient(msgspec.Struct, frozen=True):
    """Refuse *client* from now on (or no longer)."""

    client: str
    disabled: bool = True


class ServerStop(msgspec.Struct, frozen=True):
    """Shut the server down in order; running jobs stay resumable."""


class PromoteServer(msgspec.Struct, frozen=True):
    """Leave the primacy to the server called *name*, which stands by."""

    name: str


class StandbyView(msgspec.Struct, frozen=True):
    """A server that stands by, for people: where clients would reach it, and when it last said so (POSIX seconds)."""

    name: str
    target: str
    seen_at: float


class ServerStatus(msgspec.Struct, frozen=True):
    """How the server is that serves, and which ones stand by.

    ``certificate_ends_at`` is POSIX seconds (0: it has none, or does not tell); ``remark`` is what people should know
    of that.
    """

    state: str
    ssid: Ssid
    project: str
    release: str
    clients: int
    jobs_running: int
    since: float
    name: str = ""
    standbys: tuple[StandbyView, ...] = ()
    certificate_ends_at: float = 0.0
    remark: str = ""


class StatusQuery(msgspec.Struct, frozen=True):
    """A question for ``ServerStatus``."""


class Channel(StrEnum):
    """Groups of topics: what the listener lets a peer use depends on them."""

    SERVER = "server"
    JOB = "job"
    RUN = "run"
    TASK = "task"
    ADMIN = "admin"


Topic: TypeAlias = tuple[Channel, str]

CATALOGUE: Final[Mapping[Topic, tuple[type[msgspec.Struct] | None, type[msgspec.Struct] | None]]] = {
    # a client (or an administrator, for the first three) to the server
    (Channel.SERVER, "challenge"): (Challenge, ChallengeReply),
    (Channel.SERVER, "register"): (Register, Registered),
    (Channel.SERVER, "renew"): (Renew, Registered),
    (Channel.SERVER, "quit"): (Quit, None),
    (Channel.SERVER, "heartbeat"): (Heartbeat, HeartbeatReply),
    (Channel.SERVER, "job_failure"): (JobFailure, None),
    (Channel.SERVER, "job_ended"): (JobEnded, None),
    # the server to a client
    (Channel.JOB, "deploy"): (DeployJob, None),
    (Channel.JOB, "start"): (StartJob, None),
    (Channel.JOB, "abort"): (AbortJob, None),
    (Channel.JOB, "goodbye"): (Goodbye, None),
    # a run's process to its server, and back
    (Channel.RUN, "attach"): (Attach, RunSnapshot),
    (Channel.RUN, "issue"): (IssueTasks, None),
    (Channel.RUN, "cancel"): (CancelTasks, None),
    (Channel.RUN, "commit"): (CommitRound, None),
    (Channel.RUN, "ended"): (RunEnded, None),
    (Channel.RUN, "heartbeat"): (RunHeartbeat, None),
    (Channel.RUN, "answer"): (TaskResult, None),
    (Channel.RUN, "client"): (ClientChanged, None),
    (Channel.RUN, "abort"): (AbortRun, None),
    # the server to a job's process at a client, and back
    (Channel.TASK, "task"): (TaskAssignment, None),
    (Channel.TASK, "cancelled"): (TaskCancelled, None),
    (Channel.TASK, "result"): (TaskResult, None),
    (Channel.TASK, "metrics"): (LogMetrics, None),
    # an administrator to the server, and events back
    (Channel.ADMIN, "job.submit"): (SubmitJob, JobSubmitted),
    (Channel.ADMIN, "job.list"): (ListJobs, JobList),
    (Channel.ADMIN, "job.show"): (JobQuery, JobView),
    (Channel.ADMIN, "job.watch"): (JobQuery, JobView),
    (Channel.ADMIN, "job.event"): (JobEvent, None),
    (Channel.ADMIN, "job.abort"): (JobQuery, JobView),
    (Channel.ADMIN, "job.log"): (LogQuery, LogText),
    (Channel.ADMIN, "client.list"): (ListClients, ClientList),
    (Channel.ADMIN, "client.disable"): (DisableClient, None),
    (Channel.ADMIN, "server.status"): (StatusQuery, ServerStatus),
    (Channel.ADMIN, "server.stop"): (ServerStop, None),
    (Channel.ADMIN, "server.promote"): (PromoteServer, None),
}
"""For each topic, the type of a request's payload and of its reply's (``None``: it has none)."""
