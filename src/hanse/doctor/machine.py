"""What a kit needs of this machine: its workspace, disk, file descriptors, and for a server its port and its store."""

import errno
import ipaddress
import os
import resource
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hanse.doctor.findings import Check, Finding, fail, ok, warn
from hanse.errors import ConfigError, EnvironmentFault, HanseError, StoreFailed, Unreachable
from hanse.identity.private_files import PRIVATE_FOLDER
from hanse.settings import ServerSettings

LEAST_FREE_BYTES: Final = 250 * 10**6
"""With less free disk than this nothing should be started: a store that cannot grow stops its server."""

LOW_FREE_BYTES: Final = 2 * 10**9
"""With less free disk than this somebody should look: updates wait on disk, so ten clients' of a model of 100 MB take
1 GB a round."""

OWN_DESCRIPTORS: Final = 64
"""What a server has open without a client; measured: about 20, and a few for each running job's process."""

DESCRIPTORS_PER_JOB: Final = 3
"""What a client costs its server for each job that it takes part in, besides the one of its stream; measured."""

_SQLITE: Final = b"SQLite format 3\0"


@dataclass(frozen=True, slots=True)
class FolderFacts:
    """A folder that is, or is to be made, at *path*.

    *nearest* is the folder itself or, where that is missing, the nearest one above it, in which it would be made; the
    rest is about that. *obstacle* is what is there and is no folder. *process* is the number of the process that works
    in the folder, 0 if it does not tell, ``None`` if there is none. Owner and user are user ids.
    """

    path: Path
    nearest: Path
    obstacle: Path | None = None
    is_usable: bool = True
    mode: int = PRIVATE_FOLDER
    owner: int = 0
    user: int = 0
    process: int | None = None


def look_at_folder(path: Path, process: int | None = None) -> FolderFacts:
    """Return what is at *path*, without making anything."""
    places = (path, *path.parents)
    nearest = next(place for place in places if _is_there(place) or place.parent == place)
    missing = places[: places.index(nearest)]
    obstacle = next(filter(_is_in_the_way, missing), None if nearest.is_dir() else nearest)
    if obstacle is not None:
        return FolderFacts(path, nearest, obstacle=obstacle)
    found = nearest.stat()
    return FolderFacts(
        path,
        nearest,
        is_usable=os.access(nearest, os.R_OK | os.W_OK | os.X_OK),
        mode=stat.S_IMODE(found.st_mode),
        owner=found.st_uid,
        user=os.geteuid(),
        process=process,
    )


def _is_there(place: Path) -> bool:
    try:
        return place.exists()
    except OSError:  # a folder above it that nobody lets us look into, a name that is too long
        return False


def _is_in_the_way(place: Path) -> bool:
    """Return whether no folder can be made as *place*, where none is: a link to nowhere, a name that cannot be."""
    try:
        place.lstat()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return False
    except OSError:
        return True
    return True


def judge_runs(facts: FolderFacts) -> Finding:
    """Return whether the folder for runs, which servers share, can be used or made."""
    name = str(facts.path)
    if facts.obstacle is not None:
        return fail(Check.RUNS, ConfigError("runs", got=name, expected=f"a folder, and {facts.obstacle} is none"))
    if not facts.is_usable:
        expected = f"a folder that can be written to; user {facts.user} may not write in {facts.nearest}"
        return fail(Check.RUNS, ConfigError("runs", got=name, expected=expected))
    return ok(Check.RUNS, name if facts.nearest == facts.path else f"{name} will be made")


def judge_workspace(facts: FolderFacts) -> Finding:
    """Return whether the workspace can be used, or made, and is private."""
    name = str(facts.path)
    if facts.obstacle is not None:
        return fail(
            Check.WORKSPACE, ConfigError("workspace", got=name, expected=f"a folder, and {facts.obstacle} is none")
        )
    is_there = facts.nearest == facts.path
    if is_there and facts.user not in (0, facts.owner):
        expected = f"a folder of its own: it belongs to user {facts.owner}, and this is user {facts.user}"
        return fail(Check.WORKSPACE, ConfigError("workspace", got=name, expected=expected))
    if not facts.is_usable:
        expected = f"a folder that can be written to; user {facts.user} may not write in {facts.nearest}"
        return fail(Check.WORKSPACE, ConfigError("workspace", got=name, expected=expected))
    if not is_there:
        return ok(Check.WORKSPACE, f"{name} will be made")
    if facts.user != facts.owner:
        return warn(
            Check.WORKSPACE, f"{name} belongs to user {facts.owner}: run what uses it as that user, not as root"
        )
    if facts.mode & ~PRIVATE_FOLDER:
        return warn(Check.WORKSPACE, f"others can look into {name}, which has mode {facts.mode:04o}: chmod 700")
    return ok(Check.WORKSPACE, f"{name}{_used_by(facts.process)}")


def free_bytes(place: Path) -> int:
    """Return how much more can be written where *place*, which exists, is."""
    return shutil.disk_usage(place).free


def judge_disk(
    place: Path, free: int, *, least_bytes: int = LEAST_FREE_BYTES, low_bytes: int = LOW_FREE_BYTES
) -> Finding:
    """Return whether *free* bytes at *place* are enough to begin with."""
    found = f"{_size(free)} free where {place} is"
    if free < least_bytes:
        error = EnvironmentFault(f"{found}, less than {_size(least_bytes)}; make room, or move the workspace")
        return fail(Check.DISK, error)
    if free < low_bytes:
        return warn(Check.DISK, f"{found}, less than {_size(low_bytes)}; make room before a large job")
    return ok(Check.DISK, found)


def descriptor_limit() -> int:
    """Return how many files and connections a process that is started like this one may have open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft if soft != resource.RLIM_INFINITY else 2**63


def judge_descriptors(limit: int, settings: ServerSettings) -> Finding:
    """Return whether a server with *settings* can have all open that its clients and jobs need."""

    def needed(clients: int) -> int:
        return OWN_DESCRIPTORS + clients * (1 + DESCRIPTORS_PER_JOB * settings.max_running_jobs)

    at_most = needed(settings.max_num_clients)
    if limit < needed(settings.min_num_clients):
        error = EnvironmentFault(
            f"{limit} files may be open at once, too few for {settings.min_num_clients} clients; "
            f"raise the limit (ulimit -n, LimitNOFILE) to {at_most}"
        )
        return fail(Check.DESCRIPTORS, error)
    if limit < at_most:
        return warn(
            Check.DESCRIPTORS,
            f"{limit} files may be open at once; {settings.max_num_clients} clients with {settings.max_running_jobs} "
            f"jobs may need {at_most}: raise the limit (ulimit -n, LimitNOFILE) or lower max_num_clients",
        )
    return ok(Check.DESCRIPTORS, f"{limit} files may be open at once, {at_most} at most are needed")


def judge_store_file(path: Path, first_bytes: bytes | OSError, folder: FolderFacts) -> Finding:
    """Return whether the file at *path*, in *folder*, is a store's or will be.

    It begins with *first_bytes*, or cannot be read.
    """
    if folder.obstacle is not None:
        return fail(Check.STORE, StoreFailed(f"opening {path}", f"{folder.obstacle} is no folder"))
    if not folder.is_usable:
        why = f"user {folder.user} may not write in {folder.nearest}"
        return fail(Check.STORE, StoreFailed(f"opening {path}", why))
    if isinstance(first_bytes, FileNotFoundError):
        return ok(Check.STORE, f"{path} will be made")
    if isinstance(first_bytes, OSError):
        return fail(Check.STORE, StoreFailed(f"opening {path}", first_bytes.strerror or str(first_bytes)))
    if first_bytes and not first_bytes.startswith(_SQLITE):
        error = StoreFailed(f"opening {path}", "it is no SQLite database; restore it from a backup, or move it away")
        return fail(Check.STORE, error)
    return ok(Check.STORE, str(path))


def first_bytes_of(path: Path) -> bytes | OSError:
    """Return what the file at *path* begins with, or why it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(len(_SQLITE))
    except OSError as error:
        return error


def reachable(host: str) -> str:
    """Return *host*, as a server listens on it, as this machine dials it: all addresses together are not one."""
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return host
    return host if not address.is_unspecified else "127.0.0.1" if address.version == 4 else "::1"


def judge_listen(target: str, problem: OSError | HanseError | None) -> Finding:
    """Return whether *target* can be listened on, which was tried with *problem*."""
    if problem is None:
        return ok(Check.LISTEN, f"{target} is free")
    if isinstance(problem, HanseError):
        return fail(Check.LISTEN, problem)
    match problem.errno:
        case errno.EADDRINUSE:
            why = "that is free on this machine; another program listens there"
        case errno.EADDRNOTAVAIL:
            why = "that is one of this machine's"
        case errno.EACCES:
            why = "that this user may listen on; take a port above 1023"
        case _:
            why = f"that can be listened on ({problem.strerror or problem})"
    return fail(Check.LISTEN, ConfigError("target", got=target, expected=f"an address {why}"))


def judge_listening(target: str, process: int, shown: bytes | None, own: bytes | None) -> Finding:
    """Return whether the server that runs as *process* can be reached at *target*.

    *shown* is the certificate (DER) that the port shows, empty without TLS and ``None`` where nobody answers; *own* is
    the kit's, ``None`` without TLS.
    """
    who = f"the server runs{_as_process(process)}"
    if shown is None:
        return fail(Check.LISTEN, Unreachable(target, f"{who} and does not answer there; see its log, or restart it"))
    if own is not None and shown != own:
        return warn(Check.LISTEN, f"{who} and shows another certificate than the kit has now: restart it")
    return ok(Check.LISTEN, f"{who} and answers at {target}")


def _used_by(process: int | None) -> str:
    return "" if process is None else f", used by what runs{_as_process(process)}"


def _as_process(process: int) -> str:
    return f" as process {process}" if process else ""


def _size(size: int) -> str:
    for unit, bytes_in_it in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= bytes_in_it:
            return f"{size / bytes_in_it:.1f} {unit}"
    return f"{size} bytes"
