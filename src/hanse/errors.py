"""Every error that Hanse raises, in one tree that says whose it is.

::

    HanseError
    ├── InternalError            ours: a bug
    ├── OperatorError            whoever configures or commands: fix the input and try again
    │   ├── ConfigError          a settings file, a kit, an argument
    │   ├── JobInvalid           a job's definition
    │   ├── NotFound             no such job, client, file
    │   └── Conflict             the thing is not in a state that allows this
    ├── AccessError              someone who may not
    │   ├── Unauthenticated      who they are is not proven
    │   │   └── CertificateExpired   ... by a certificate that has ended
    │   ├── Unauthorized         who they are may not do this
    │   └── NotInService         this server is not the one to ask now
    ├── SiteError                something at one client
    │   ├── SiteRefused          the site's policy says no
    │   ├── TrainingFailed       the job's code raised there
    │   │   ├── ImportFailed         ... when it was imported
    │   │   └── MissingDependency    ... because a module is not installed
    │   ├── ProcessDied          the job's process ended without being asked
    │   │   ├── OutOfMemory      ... because it had used up its memory
    │   │   └── ProcessHung      ... because it was killed for saying nothing any more
    │   └── UpdateRejected       what the client sent is not what the job expects
    ├── WorkflowError            the run as a whole
    │   ├── WorkflowFailed       the workflow's code raised
    │   └── TooFewClients        a round could not get the answers that it needs
    └── EnvironmentFault         network, disk, clock, time
        ├── Unreachable          nobody answers there
        ├── TimedOut             an answer did not come in time
        ├── ProtocolError        bytes that are not what was agreed
        ├── VersionMismatch      two sides that share no protocol
        ├── StoreFailed          the database or the disk
        │   ├── NoSpace          ... which is full
        │   └── TensorDamaged    ... which gives back other bytes than it was given
        ├── NotStarted           the machine lets no process be started
        ├── TensorsLost          a run's tensors are missing or damaged
        └── StaleEpoch           this server's tenure has ended; nothing was written

A class carries the data of what happened and builds its sentence from it; whoever raises passes data. The sentence says
what happened, to what, and what to do. ``code`` is stable, and ``hanse.codes`` says more about it; ``retryable`` says
whether the same call may succeed later without anybody changing anything; ``exit_status`` is what the command line ends
with.
"""

from collections.abc import Collection
from datetime import UTC, datetime
from typing import ClassVar, Final

UNKNOWN_STATUS: Final = 256
"""Stands for the status of a process of which nobody knows how it ended: real ones are less, negative for a signal."""


class HanseError(Exception):
    """The root: ``str(error)`` is one sentence for the person who can act on it."""

    code: ClassVar[str] = "error"
    exit_status: ClassVar[int] = 1
    retryable: ClassVar[bool] = False

    @property
    def reason(self) -> str:
        """The sentence, as peers and job records get it."""
        return str(self)


class InternalError(HanseError):
    """A bug in Hanse: the sentence says what was being done."""

    code = "internal"
    exit_status = 70

    def __init__(self, doing: str) -> None:
        super().__init__(f"Hanse failed while {doing}; this is a bug, and the log has the traceback")
        self.doing = doing


class OperatorError(HanseError):
    """Input that a person gave and can mend."""

    code = "usage"
    exit_status = 2


class ConfigError(OperatorError):
    """A setting, file or argument is not usable; *field* names it."""

    code = "config"

    def __init__(self, field: str, *, got: object, expected: str, where: str = "") -> None:
        place = f" in {where}" if where else ""
        super().__init__(f"{field}{place} is {_shown(got)}; expected {expected}")
        self.field, self.got, self.expected, self.where = field, got, expected, where


class JobInvalid(OperatorError):
    """A job's definition does not hold; *field* names the part that does not."""

    code = "job-invalid"

    def __init__(self, field: str, *, got: object, expected: str) -> None:
        super().__init__(f"the job's {field} is {_shown(got)}; expected {expected}")
        self.field, self.got, self.expected = field, got, expected


class NotFound(OperatorError):
    """There is no such thing."""

    code = "not-found"
    exit_status = 3

    def __init__(self, kind: str, name: str) -> None:
        super().__init__(f"there is no {kind} {name!r}")
        self.kind, self.name = kind, name


class Conflict(OperatorError):
    """The thing is in a state that does not allow this."""

    code = "conflict"
    exit_status = 4

    def __init__(self, thing: str, *, state: str, wanted: str) -> None:
        super().__init__(f"{thing} is {state}, so it cannot be {wanted}")
        self.thing, self.state, self.wanted = thing, state, wanted


class AccessError(HanseError):
    """A request from someone who may not make it."""

    code = "access"
    exit_status = 5


class Unauthenticated(AccessError):
    """Who the peer is has not been proven; *why* is the sentence."""

    code = "unauthenticated"

    def __init__(self, why: str) -> None:
        super().__init__(why)


class CertificateExpired(Unauthenticated):
    """The certificate of *holder* has ended, at *since* (aware)."""

    code = "certificate-expired"

    def __init__(self, holder: str, *, since: datetime) -> None:
        when = f"{since.astimezone(UTC):%Y-%m-%d %H:%M} UTC"
        super().__init__(f"the certificate of {holder!r} expired on {when}; ask the project for a new one")

    @classmethod
    def told(cls, why: str) -> "CertificateExpired":
        """Return the error of which another side has told with the sentence *why*."""
        error = cls.__new__(cls)
        Unauthenticated.__init__(error, why)
        return error


class Unauthorized(AccessError):
    """*who* is known, and may not do *what*."""

    code = "unauthorized"

    def __init__(self, who: str, what: str, *, needs: str) -> None:
        super().__init__(f"{who} may not {what}; that needs {needs}")
        self.who, self.what, self.needs = who, what, needs


class NotInService(AccessError):
    """The server asked does not serve now; another one may."""

    code = "not-in-service"
    retryable = True

    def __init__(self, why: str = "Server not in service") -> None:
        super().__init__(why)


class SiteError(HanseError):
    """Something that happened at one client."""

    code = "site"
    exit_status = 10


class SiteRefused(SiteError):
    """A site's policy does not let the job run there."""

    code = "site-refused"

    def __init__(self, client: str, why: str) -> None:
        super().__init__(f"{client} refused the job: {why}")
        self.client, self.why = client, why


class TrainingFailed(SiteError):
    """The job's code raised at a client."""

    code = "training-failed"

    def __init__(self, client: str, task: str, why: str) -> None:
        super().__init__(f"task {task!r} failed at {client}: {why}")
        self.client, self.task, self.why = client, task, why


class ImportFailed(TrainingFailed):
    """The job's code cannot be imported at a client, by its *python*."""

    code = "import-failed"

    def __init__(self, client: str, error: str, *, python: str) -> None:
        super(TrainingFailed, self).__init__(
            f"the job's code cannot be imported by Python {python} at {client}: {error}"
        )
        self.client, self.task, self.error, self.python = client, "import", error, python
        self.why = f"the job's code cannot be imported by Python {python}: {error}"


class MissingDependency(TrainingFailed):
    """The job's code imports *module*, at *place*, which neither comes with the job nor is installed at a client."""

    code = "missing-dependency"

    def __init__(self, client: str, module: str, *, place: str) -> None:
        super(TrainingFailed, self).__init__(f"module {module!r}, which {place} imports, is not installed at {client}")
        self.client, self.task, self.module, self.place = client, "import", module, place
        self.why = f"module {module!r}, which {place} imports, is not installed"


class ProcessDied(SiteError):
    """A job's process ended without being asked."""

    code = "process-died"
    retryable = True

    def __init__(self, where: str, status: int, last_line: str = "") -> None:
        tail = f"; its log ends with: {last_line}" if last_line else ""
        super().__init__(f"the job's process at {where} {self._how(status)}{tail}")
        self.where, self.status, self.last_line = where, status, last_line

    @staticmethod
    def _how(status: int) -> str:
        if status == UNKNOWN_STATUS:
            return "ended, and its agent, which had not started it, cannot tell how"
        return f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"


class OutOfMemory(ProcessDied):
    """The system killed a job's process because it had used up the memory that it may use."""

    code = "out-of-memory"

    @staticmethod
    def _how(status: int) -> str:
        del status
        return "was killed because it had used up the memory that it may use"


class ProcessHung(ProcessDied):
    """A job's process no longer said that it lives, and was killed for that."""

    code = "process-hung"

    @staticmethod
    def _how(status: int) -> str:
        del status
        return (
            "was killed because it had not said for long that it lives; code there that computes for long belongs "
            "into a thread (asyncio.to_thread)"
        )


class UpdateRejected(SiteError):
    """What a client sent is not what the job expects: a tensor, a digest, a round."""

    code = "update-rejected"

    def __init__(self, client: str, why: str) -> None:
        super().__init__(f"{client} sent {why}")
        self.client, self.why = client, why


class WorkflowError(HanseError):
    """The run as a whole cannot go on."""

    code = "workflow"
    exit_status = 11


class WorkflowFailed(WorkflowError):
    """The workflow's own code raised."""

    code = "workflow-failed"

    def __init__(self, workflow: str, round_number: int, why: str) -> None:
        super().__init__(f"workflow {workflow!r} failed in round {round_number}: {why}")
        self.workflow, self.round_number, self.why = workflow, round_number, why


class TooFewClients(WorkflowError):
    """A round ended without the answers that it needs.

    *client* is the first of those whose answers are missing, and *cause* the code of why.
    """

    code = "too-few-clients"

    def __init__(self, *, got: int, needed: int, why: str, client: str = "", cause: str = "") -> None:
        super().__init__(f"only {got} of the {needed} answers that the round needs can come: {why}")
        self.got, self.needed, self.why = got, needed, why
        self.client, self.cause = client, cause


class EnvironmentFault(HanseError):
    """Network, disk, clock or time did not do what was hoped."""

    code = "environment"
    exit_status = 12
    retryable = True


class Unreachable(EnvironmentFault):
    """Nobody answers at *where*."""

    code = "unreachable"

    def __init__(self, where: str, why: str) -> None:
        super().__init__(f"cannot reach {where}: {why}")
        self.where, self.why = where, why


class TimedOut(EnvironmentFault):
    """*who* did not answer *what* in time."""

    code = "timed-out"

    def __init__(self, who: str, what: str, after_s: float) -> None:
        super().__init__(f"{who} did not answer {what!r} within {after_s:g} s")
        self.who, self.what, self.after_s = who, what, after_s


class ProtocolError(EnvironmentFault):
    """Bytes arrived that are not what was agreed; *field* names the part."""

    code = "protocol"
    retryable = False

    def __init__(self, field: str, *, got: object, expected: str) -> None:
        super().__init__(f"{field} is {_shown(got)}; expected {expected}")
        self.field, self.got, self.expected = field, got, expected


class VersionMismatch(EnvironmentFault):
    """*who* and this side speak no protocol version in common: their releases are too far apart."""

    code = "version-mismatch"
    retryable = False

    def __init__(
        self, who: str, *, release: str, versions: Collection[int], our_release: str, our_versions: Collection[int]
    ) -> None:
        super().__init__(
            f"{who} runs {_spoken(release, versions)}, and this side runs {_spoken(our_release, our_versions)}; "
            "they need a protocol in common"
        )
        self.who, self.release, self.our_release = who, release, our_release
        self.versions, self.our_versions = tuple(versions), tuple(our_versions)


class StoreFailed(EnvironmentFault):
    """The database or the disk failed while *doing*."""

    code = "store-failed"

    def __init__(self, doing: str, why: str) -> None:
        super().__init__(f"the store failed while {doing}: {why}")
        self.doing, self.why = doing, why


class NoSpace(StoreFailed):
    """The *disk* (where it is mounted) that holds *folder*, or somebody's quota on it, was full while *doing*."""

    code = "no-space"

    def __init__(self, doing: str, *, disk: str, folder: str, why: str) -> None:
        super(StoreFailed, self).__init__(
            f"{doing} failed: the disk mounted at {disk}, which holds {folder}, is full ({why})"
        )
        self.doing, self.disk, self.folder, self.why = doing, disk, folder, why


class TensorDamaged(StoreFailed):
    """The file of tensor *digest* in *folder* is gone, or its bytes are not those that it was given."""

    code = "tensor-damaged"

    def __init__(self, digest: str, *, folder: str) -> None:
        super(StoreFailed, self).__init__(
            f"tensor {digest} in {folder} is missing or damaged: its file holds not what was written; check that disk"
        )
        self.digest, self.folder = digest, folder


class NotStarted(EnvironmentFault):
    """The machine did not let *what*, a process, be started; *folder* is where it would have run."""

    code = "not-started"

    def __init__(self, what: str, why: str, *, folder: str) -> None:
        super().__init__(
            f"{what} could not be started: {why}; check the machine's memory, its limits on open files and processes, "
            f"and the rights in {folder}"
        )
        self.what, self.why, self.folder = what, why, folder


class TensorsLost(EnvironmentFault):
    """Tensors of a run's last committed state are not on the disk any more, or not with the bytes they had."""

    code = "tensors-lost"
    retryable = False

    def __init__(self, job_id: str, round_number: int, digest: str) -> None:
        super().__init__(
            f"tensor {digest} of round {round_number} of job {job_id} is missing or damaged on the server's disk, so "
            "the run cannot go on; check the disk, and submit the job again"
        )
        self.job_id, self.round_number, self.digest = job_id, round_number, digest


class StaleEpoch(EnvironmentFault):
    """A write named an epoch that is over: another server holds the lease, and nothing was written."""

    code = "stale-epoch"
    retryable = False

    def __init__(self, *, ours: int, current: int) -> None:
        super().__init__(f"epoch {ours} has ended (the store is at {current}); this server may not write any more")
        self.ours, self.current = ours, current


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:197] + "..."


def _spoken(release: str, versions: Collection[int]) -> str:
    listed = ", ".join(str(version) for version in sorted(set(versions))[:8]) or "none"
    return f"Hanse {release[:64] or 'of an unknown release'} (protocol {listed})"
