"""The command line: one file a command, each a composition root or a few calls, and what they share.

Here belong arguments, output, exit statuses, and putting a process together: settings, then services, then serving. No
rule belongs here; whatever a command decides is decided by what it calls, so that the console and a program get the
same. A command's module is imported when it is called, and ``hanse --help`` imports none of them.
"""

import os
import sys
from collections.abc import Sequence
from typing import Final

from cyclopts import App, CycloptsError

from hanse.cli.failures import INTERRUPTED, USAGE, Failure, failure_of, wants_json, wants_log

COMMANDS: Final = {
    "new": ("hanse.cli.new:new", "Make a job's folder that runs, to start from."),
    "simulate": ("hanse.cli.simulate:simulate", "Run a job here, with simulated clients."),
    "provision": ("hanse.cli.provision:provision", "Make the project's authority and a kit for each participant."),
    "kit request": ("hanse.cli.kit:request", "Make a key here, and a request for a certificate."),
    "kit approve": ("hanse.cli.kit:approve", "Answer a request, as the holder of the project's authority."),
    "kit install": ("hanse.cli.kit:install", "Put what was approved beside the key."),
    "doctor": (
        "hanse.cli.doctor:doctor",
        "Check a kit before any job: files, certificates, disk, the way to the server.",
    ),
    "server start": ("hanse.cli.server:start", "Run the server until it is stopped."),
    "server status": ("hanse.cli.status:status", "Show how the server is."),
    "server stop": (
        "hanse.cli.stop:server",
        "Stop the server in order, by its kit, here, or by an administrator's (--kit).",
    ),
    "server promote": ("hanse.cli.promote:promote", "Have a server that stands by take over."),
    "client start": ("hanse.cli.client:start", "Run a site's agent until it is stopped."),
    "client stop": ("hanse.cli.stop:client", "Stop a site's agent."),
    "client list": ("hanse.cli.clients:list_clients", "List the clients that the server knows."),
    "client disable": ("hanse.cli.clients:disable", "Refuse a client from now on."),
    "client enable": ("hanse.cli.clients:enable", "Refuse a client no longer."),
    "job submit": ("hanse.cli.submit:submit", "Submit a job; prints its id."),
    "job list": ("hanse.cli.job:list_jobs", "List all jobs, newest first."),
    "job show": ("hanse.cli.job:show", "Show one job: state, what it waits for or how it ended, clients, rounds."),
    "job wait": (
        "hanse.cli.job:wait",
        "Follow a job to its end; ends with 0 (completed), 20 (failed) or 21 (aborted).",
    ),
    "job log": ("hanse.cli.job:log", "Show the last lines of a job's log, at the server or as a client reported it."),
    "job abort": ("hanse.cli.job:abort", "End a job; what is committed stays."),
    "job download": ("hanse.cli.job:download", "Fetch the model that a job resulted in."),
    "explain": ("hanse.cli.explain:explain", "Say what a code means, as errors and jobs have it, and what to do."),
    "version": ("hanse.cli.version:version", "Print the release."),
}
"""Each command, the function behind it, and what it does."""

GROUPS: Final = {
    "kit": "Certificates for keys that never leave their site.",
    "server": "The server.",
    "client": "A site's agent; and the clients of a server, asked for with an administrator's kit.",
    "job": "Jobs at a server, asked for with an administrator's kit.",
}


def _app() -> App:
    top = App(
        name="hanse",
        help="Hanse: a federated-learning server, its sites' agents, and a simulator.",
        help_format="plaintext",
        version=_version,
        suppress_keyboard_interrupt=False,  # how Ctrl-C ends a command is said in main
    )
    groups = {"": top}
    for name, text in GROUPS.items():
        groups[name] = App(name=name, help=text)
        top.command(groups[name])
    for command, (function, text) in COMMANDS.items():
        group, _, name = command.rpartition(" ")
        groups[group].command(function, name=name, help=text)
    return top


def _version() -> str:
    from importlib.metadata import version  # noqa: PLC0415 - costs more than all of the help, and is rarely asked for

    return version("hanse")


app: Final = _app()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that *arguments* name (by default the process's) and return the exit status."""
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    _open_standard_files()
    if not wants_log(tokens):
        # gRPC's core writes to standard error by itself, of connections that we tell of in our own words.
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        status = app(tokens, exit_on_error=False, print_error=False, result_action="return_value")
        sys.stdout.flush()
    except CycloptsError as error:
        return Failure("usage", _sentence(error), USAGE).tell(as_json=wants_json(tokens))
    except KeyboardInterrupt:
        return INTERRUPTED
    except (BrokenPipeError, SystemExit) as error:
        # Whoever read our output has enough; what prints tables and help makes SystemExit of that.
        if isinstance(error, SystemExit) and not isinstance(error.__context__, BrokenPipeError):
            raise
        # What is still in the buffer must not be written when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:  # noqa: BLE001 - the edge of the process: a sentence for people, a status for scripts
        return failure_of(error, with_traceback=wants_log(tokens)).tell(as_json=wants_json(tokens))
    return status if isinstance(status, int) else 0


def _open_standard_files() -> None:
    """Have the null device where whoever started this process has closed a standard file.

    Python has nothing there to print to; and what libraries write to standard error would go to whatever is opened
    next and gets its number: a connection, or the database.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))  # the lowest number that is free


def _sentence(error: CycloptsError) -> str:
    return f"{' '.join(str(error).split()).rstrip('.')} (hanse --help shows what there is)"
