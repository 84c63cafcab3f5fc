"""Every stable code that Hanse records or prints, with what it means and what to do about it.

An error's class has a code, and so have the ends and faults that a run makes without raising anything. A code never
gets another meaning; sentences may. ``hanse explain CODE`` shows an entry of this table, ``hanse job show`` its advice,
and each code has a page in the reference that says more: why it happens, and how to find out which of the reasons it
is.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Code:
    """A code: what it *means*, and the *advice* for whoever meets it, a sentence or two each."""

    name: str
    means: str
    advice: str


_ALL: Final = (
    # Hanse itself
    Code(
        "error",
        "Something failed that has no code of its own.",
        "Act on the sentence; if it does not say how, report it with the log.",
    ),
    Code(
        "internal",
        "Hanse has a bug.",
        "Report it with the traceback from the log. A job that ended by it can be submitted again.",
    ),
    # whoever configures or commands
    Code(
        "usage",
        "The command or call was not given what it takes.",
        "Look at the command's --help, and call it again.",
    ),
    Code(
        "config",
        "A setting, a file or an argument is not usable; the sentence names it, what it is and what was expected.",
        "Correct what the sentence names and start again. Nothing was changed.",
    ),
    Code(
        "job-invalid",
        "A job's definition or package does not hold; the sentence names the field.",
        "Correct the field in the job's [tool.hanse] table or its files, and submit the job again.",
    ),
    Code(
        "model-invalid",
        "What was given as a model is none, or not one that can travel.",
        "Make the model of named arrays with one of the dtypes that the sentence lists.",
    ),
    Code(
        "tensor-mismatch",
        "A model's tensors are not those that were expected: by name, dtype, shape or order.",
        "Return the model that the task brought with its arrays changed in place or replaced by ones of the same "
        "name, dtype and shape.",
    ),
    Code(
        "no-such-task",
        "The job's ClientApp has no function for the task that the workflow asked for.",
        "Give the app a function for it (@app.train, @app.evaluate, @app.task), or use a workflow that does not ask.",
    ),
    Code(
        "outside-job",
        "A training script was run by itself, outside of a job.",
        "Run it by 'hanse simulate', or submit its job.",
    ),
    Code(
        "out-of-turn",
        "A training script called hanse.client's functions in an order that they do not allow.",
        "Receive a task, answer it once, and only then receive the next.",
    ),
    Code(
        "not-found",
        "There is no such job, client or file.",
        "Check the name: 'hanse job list' and 'hanse client list' show what there is.",
    ),
    Code(
        "conflict",
        "The thing is not in a state that allows this.",
        "Look at its state as the sentence says it, and do first what has to come first.",
    ),
    # someone who may not
    Code(
        "access",
        "Somebody asked for what they may not have.",
        "Ask with a kit that may, or have the project's administrator give the right.",
    ),
    Code(
        "unauthenticated",
        "Who a peer is has not been proven: by its certificate, its token or its name.",
        "Act on the sentence. Of a certificate: have the project's administrator provision it anew. Of a token: the "
        "client registers again by itself.",
    ),
    Code(
        "certificate-expired",
        "The certificate of a participant has ended; it cannot connect until it has a new one.",
        "Have the project's administrator provision that participant anew, and start it with the new kit. If the "
        "certificate has not ended yet, a clock is wrong.",
    ),
    Code(
        "unauthorized",
        "Who asked is known, and may not do this.",
        "Ask with the role that the sentence names, or have somebody do it who has that role.",
    ),
    Code(
        "not-in-service",
        "The server that was asked does not serve now: it starts, stops, or another one does.",
        "Wait: clients and commands ask again, and the next server in their list. 'hanse server status' tells more.",
    ),
    # something at one client
    Code(
        "site",
        "Something went wrong at one client.",
        "Act on the sentence, together with the site that it names.",
    ),
    Code(
        "site-refused",
        "A site's policy does not let the job run there.",
        "Ask the site to let it (policy in its settings), name the installed code that it wants instead, or leave the "
        "site out of the job's 'clients'.",
    ),
    Code(
        "training-failed",
        "The job's own code raised while it worked on a task.",
        "Mend the code at the line that the sentence names; the log's last lines have the traceback. 'hanse simulate' "
        "runs the same code here.",
    ),
    Code(
        "import-failed",
        "The job's code cannot be imported at a client, though the module is there.",
        "Mend the line that the sentence names. If it is right in your Python, compare the version of Python, and of "
        "the package that it imports from, with those at the site.",
    ),
    Code(
        "missing-dependency",
        "The job's code imports a module that is neither among the job's files nor installed there.",
        "Ask the site to install it in the environment of its agent, or ship it in the job's folder.",
    ),
    Code(
        "process-died",
        "A job's process ended without being asked, as often as the job lets it be started again.",
        "Read the log's last lines for what it did last. A signal that nobody of yours sent is the system's: look "
        "into the kernel's log at the site.",
    ),
    Code(
        "out-of-memory",
        "The system killed a job's process because the memory was used up that it may use.",
        "Have the job use less (a smaller batch, fewer loaders), or the site give it more; say what it needs in the "
        "job's 'resources', so that it only starts where there is enough.",
    ),
    Code(
        "update-rejected",
        "What a client sent is not what the job expects.",
        "Compare what the sentence says was sent with the model that the task brought, and correct the code that "
        "makes the update.",
    ),
    Code(
        "worker-fault",
        "A simulated client's worker could not do its part, for a reason that is not the job's code.",
        "Act on the sentence: mostly the disk of this machine is full, or its memory.",
    ),
    # the run as a whole
    Code(
        "workflow",
        "The run as a whole could not go on.",
        "Act on the sentence.",
    ),
    Code(
        "workflow-failed",
        "The workflow's own code raised, or returned what is no next state.",
        "Mend the code at the line that the traceback in the log's last lines names; what was committed stays.",
    ),
    Code(
        "too-few-clients",
        "A round cannot get as many updates as it needs.",
        "Mend what befell the clients that the sentence names, or let the round do with fewer (the workflow's quorum, "
        "min_clients, deadline_s).",
    ),
    Code(
        "no-updates",
        "There was nothing to aggregate: no update, or none that weighs anything.",
        "Have clients report how many examples they trained on, and demand at least one update (quorum).",
    ),
    Code(
        "simulation-failed",
        "The simulated job did not complete.",
        "Act on the sentence, which is the job's own, and look up the job's code.",
    ),
    # network, disk, clock, time
    Code(
        "environment",
        "Network, disk, clock or time did not do what was hoped.",
        "Act on the sentence, and try again.",
    ),
    Code(
        "unreachable",
        "Nobody answers there.",
        "Check name, port, proxy and firewall from the machine that asks, and that the other side runs.",
    ),
    Code(
        "timed-out",
        "An answer did not come in time.",
        "Try again. If it happens again, look whether the other side is overloaded or its disk slow.",
    ),
    Code(
        "protocol",
        "Something arrived that is not what was agreed.",
        "Compare the releases of both sides. If they are the same, report it.",
    ),
    Code(
        "version-mismatch",
        "Two sides speak no protocol version in common; the sentence names both releases.",
        "Bring the older side to a release of the same line as the newer: neighbouring releases understand each other.",
    ),
    Code(
        "store-failed",
        "The database or the disk did not do what it was asked.",
        "Act on the sentence: look at the disk or the database that it names. Runs go on when it answers again.",
    ),
    Code(
        "no-space",
        "A disk or a quota is full; the sentence names the disk and the folder.",
        "Make room there, or move the workspace to a larger disk. Logs and results of old jobs can be deleted.",
    ),
    Code(
        "not-started",
        "The machine did not let a job's process be started; it is tried again.",
        "Look at what the sentence names: memory, limits on open files and processes (ulimit -a), a folder's rights.",
    ),
    Code(
        "tensor-damaged",
        "A tensor's file is missing, or holds other bytes than it was given; it was not used.",
        "Check the disk that the sentence names. What a client has answered is asked for again by itself.",
    ),
    Code(
        "tensors-lost",
        "Tensors of a run's last committed state are missing or damaged on the server's disk.",
        "Check that disk, and submit the job again: its run cannot go on.",
    ),
    Code(
        "lease-run-out",
        "The server could not renew its lease in time, so another may serve.",
        "Look at the store that the sentence names: it was away, or too slow, for as long as a lease lasts (lease_s).",
    ),
    Code(
        "stale-epoch",
        "This server's tenure has ended and another holds the lease; nothing was written.",
        "Nothing has to be done for the jobs: they run on at the server that holds the lease. Start this one again as "
        "a standby.",
    ),
    Code(
        "tenure-lost",
        "The server stopped serving because its tenure ended without it.",
        "Start it again; its jobs go on, here or at the server that holds the lease. The log says what ended it.",
    ),
    # what another side said
    Code(
        "remote",
        "The other side refused, without a code of its own.",
        "Act on the sentence, which is the other side's; its log has more.",
    ),
    Code(
        "remote-fault",
        "The other side could not, this time.",
        "Try again. If it happens again, read the log there.",
    ),
    # ends of jobs
    Code(
        "aborted",
        "Somebody aborted the job; the sentence says who.",
        "Submit it again if that was a mistake.",
    ),
    Code(
        "stopped",
        "The run was asked to end after the round that it was in.",
        "Submit the job again to train on.",
    ),
    Code(
        "no-clients",
        "The clients that the job needs were not there within its start_within_s.",
        "Have the clients come that the sentence says are missing, ask for fewer or for less (min_clients, resources), "
        "or let the job wait longer.",
    ),
    Code(
        "launch-refused",
        "A handler at the server did not let the job start.",
        "Ask whoever runs the server; the sentence is the handler's.",
    ),
    Code(
        "client-config",
        "A client reported that the job is not set up so that it can run there.",
        "Act on the sentence, together with the site.",
    ),
    Code(
        "client-exception",
        "A client reported that the job raised there, for good.",
        "Read the log's last lines, and mend the code.",
    ),
    Code(
        "client-unsafe",
        "A client reported that it will not run the job because it takes it for unsafe.",
        "Talk to the site about what it objects to.",
    ),
    # faults of tasks
    Code(
        "client-lost",
        "A client had no connection for lost_after_s before it answered.",
        "Look at the site's network and whether its agent runs. It takes part again as soon as it is back.",
    ),
    Code(
        "client-failed",
        "A client is out of the run for good: its process was given up, or its site refused to start it.",
        "Mend what the sentence says, and submit the job again to have that client take part.",
    ),
    Code(
        "deadline",
        "A client had not answered when the round's deadline_s was over.",
        "Give rounds a longer deadline_s, or clients less to do; a quorum lets rounds go on without slow ones.",
    ),
    Code(
        "task-refused",
        "A handler at the server did not let the task go to the client.",
        "Ask whoever runs the server; the sentence is the handler's.",
    ),
    Code(
        "no-answer",
        "A client's answer held neither an update nor a fault.",
        "Compare the client's release with the server's, and report it.",
    ),
)

CODES: Final[Mapping[str, Code]] = {code.name: code for code in _ALL}
"""All codes by name, those that belong together beside each other."""


def advice(*codes: str) -> str:
    """Return what to do about the first of *codes* that is known; empty when none is."""
    return next((CODES[code].advice for code in codes if code in CODES), "")
