"""Settings: one frozen type for a server and one for a client, read from ``settings.toml`` once and passed down.

Unknown fields are errors. The few time limits are derived from ``heartbeat_s``, so that they cannot contradict each
other. A relative path in a file is relative to the file.
"""

import difflib
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Final, TypeVar, get_args, get_type_hints
from urllib.parse import parse_qs

import msgspec

from hanse.errors import ConfigError
from hanse.ids import NAME_RULE, SERVER, is_dialable, is_name
from hanse.job import Config, Resources

SETTINGS_FILE: Final = "settings.toml"
STORES: Final = ("sqlite:////", "postgresql://")
"""What the URL of a store may begin with."""
_PASSWORD: Final = re.compile(r"postgresql://[^:/]*:[^@]*@")
"""How the URL of a store begins in which there is a password, as whoever opens it takes it apart: a password may have
a slash."""
LONGEST_S: Final = 1e9
"""The longest time that a setting may give, some thirty years: it becomes a timer, and clients take no longer one."""
MEND_WITHIN_S: Final = 7 * 24 * 3600.0
"""How long what a server cannot do for a run is tried again where nobody says otherwise: a week, and so a weekend."""
BUCKET: Final = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[A-Za-z0-9_-][A-Za-z0-9._-]*)*/?")
"""The URL of a bucket, and of what in it begins with a prefix."""
T = TypeVar("T", bound=msgspec.Struct)
_COMPLAINT: Final = re.compile(r"(?P<what>missing required|contains unknown) field `(?P<field>[^`]+)`")
"""What msgspec says of a field that is not there, or should not be."""
SINCE_RENAMED: Final = {"server_name": "server_names"}
"""What release 0.1.0 wrote into kits for what is now a list: its kits are read, so that to upgrade is to install."""


def _expect(holds: bool, field: str, got: object, expected: str) -> None:
    if not holds:
        raise ConfigError(field, got=got, expected=expected)


def _expect_server_names(names: tuple[str, ...]) -> None:
    _expect(bool(names), "server_names", names, "the name of at least one server")
    for index, name in enumerate(names):
        _expect(is_name(name), f"server_names[{index}]", name, NAME_RULE)


class ServerSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How a server runs."""

    project: str
    """The project that this server serves; clients and kits of another are refused."""

    name: str = "server"
    """The server's name, as in its certificate; no other server of the project has it."""

    target: str = "0.0.0.0:6007"
    """Where it listens: ``host:port``; an IPv6 host in brackets; port 0 picks a free one."""

    address: str = ""
    """Where clients reach it: ``host:port``. It tells this to whoever asks which server serves. Empty means ``target``,
    where that is not a wildcard."""

    workspace: str = "workspace"
    """The folder for what is this server's alone: its lock, its secrets, and the store and ``runs`` where nothing else
    is said; made with mode 0700. No two servers have the same."""

    store: str = ""
    """The store's URL: ``postgresql://user@host/database``, or ``sqlite:////shared/store.db`` (an absolute path) on one
    machine's disk. Empty means an SQLite store in the workspace. Servers of one project name the same store; the one
    with its lease serves. A password is best not here but where PostgreSQL's clients look for it: in the file that
    ``PGPASSFILE`` names (``~/.pgpass``), or in a service file (``postgresql:///?service=hanse``). Where the URL has
    one, this file must be readable by its owner alone."""

    runs: str = ""
    """The folder for the runs' packages, code, tensors, results and logs; empty means ``runs`` in the workspace.
    Servers of one project name the same folder, on a file system that all of them mount, so that each can go on with
    what another has begun. Or they name the same bucket, ``s3://bucket/prefix``: each then has its folder in its
    workspace, and keeps in the bucket what another one needs to go on. Region, endpoint and credentials come from the
    environment: ``AWS_REGION``, ``AWS_ENDPOINT_URL``, ``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``."""

    lease_s: float = 4.0
    """Seconds that a server which says nothing keeps the store's lease. A standby takes over about this long after the
    serving server has died; while the store is slower than this, nobody serves."""

    min_num_clients: int = 2
    """Below this many registered clients no job is scheduled."""

    max_num_clients: int = 1000
    """Above this many no client is registered."""

    max_running_jobs: int = 4
    """Above this many running jobs further ones wait; each has a process here and at each of its clients."""

    heartbeat_s: float = 5.0
    """Seconds between a client's heartbeats; with missing ones a broken network is noticed in a few of these."""

    lost_after_s: float = 0.0
    """A client without a stream for this long is lost to its runs; 0 means three heartbeats."""

    mend_within_s: float = MEND_WITHIN_S
    """What a running job needs and this server cannot do, because its disk is full, its store or its bucket fails, or
    its machine starts no process, is tried again for this long, a week; then the job fails, for that reason."""

    heart_beat_timeout_s: float = 600.0
    """A client not heard of for this long is removed from the registry."""

    shutdown_period_s: float = 30.0
    """At shutdown, clients are waited for at most this long."""

    token_lifetime_s: float = 3600.0
    """A token expires after this long; clients renew it over their stream at half of it."""

    client_certificates: bool = True
    """Whether TLS itself demands a client's certificate. Turn it off behind a proxy that ends TLS: identity is then
    proven by challenge and registration alone, which are always demanded."""

    tls: bool = True
    """Whether the port speaks TLS. Without it all can be read and changed on the way: loopback and tests only."""

    def __post_init__(self) -> None:
        _expect(is_name(self.name), "name", self.name, NAME_RULE)
        _expect(is_name(self.project), "project", self.project, NAME_RULE)
        _expect(
            1 <= self.min_num_clients <= self.max_num_clients,
            "min_num_clients",
            self.min_num_clients,
            f"1 to max_num_clients ({self.max_num_clients})",
        )
        _expect(self.max_running_jobs >= 1, "max_running_jobs", self.max_running_jobs, "1 or more")
        expected = f"more than 0 seconds, and at most {LONGEST_S:g}"
        for field in (
            "heartbeat_s",
            "heart_beat_timeout_s",
            "mend_within_s",
            "shutdown_period_s",
            "token_lifetime_s",
            "lease_s",
        ):
            value = getattr(self, field)
            _expect(0 < value <= LONGEST_S, field, value, expected)
        expected = f"0 to {LONGEST_S:g} seconds"
        _expect(0 <= self.lost_after_s <= LONGEST_S, "lost_after_s", self.lost_after_s, expected)
        _expect(
            not self.address or is_dialable(self.address),
            "address",
            self.address,
            "'host:port' that clients can dial (an IPv6 host in brackets), or nothing",
        )
        # What stands behind the scheme may hold a password, and is not shown.
        scheme = self.store.partition(":")[0]
        _expect(
            not self.store or self.store.startswith(STORES),
            "store",
            f"{scheme}:…",
            "'postgresql://user@host/database', 'sqlite:////absolute/path', or nothing",
        )
        # As above: whoever takes this for the place of a key must not see it shown.
        scheme, is_url, _ = self.runs.partition("://")
        _expect(
            not is_url or BUCKET.fullmatch(self.runs) is not None,
            "runs",
            f"{scheme}://…",
            "a folder, 's3://bucket/prefix' (letters, digits and . _ -, without keys), or nothing",
        )

    @property
    def lost_after(self) -> float:
        """Seconds without a stream after which a client is lost."""
        return self.lost_after_s or 3 * self.heartbeat_s

    @property
    def bucket(self) -> str:
        """The URL of the bucket that servers share; empty where they share a folder, or nothing."""
        return self.runs if "://" in self.runs else ""

    @property
    def runs_folder(self) -> str:
        """The folder for runs; empty where none is named, and it is in the workspace."""
        return "" if self.bucket else self.runs

    @property
    def has_password(self) -> bool:
        """Whether the store's URL holds a password."""
        return _PASSWORD.match(self.store) is not None or "password" in parse_qs(self.store.partition("?")[2])

    def reached_at(self, listens_at: str) -> str:
        """Return where clients reach the server that listens at *listens_at*; empty where that cannot be told."""
        return self.address or (listens_at if is_dialable(listens_at) else "")


class SitePolicy(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a site lets jobs do there; the site's word is the last."""

    job_code: str = "allow"
    """``allow``: code that comes with a job may run here. ``deny``: only code that is installed here, which a job must
    name (``module:app`` of an installed package)."""

    submitters: tuple[str, ...] = ()
    """Whose jobs may run here, by administrator's name; empty lets everybody's."""

    max_update_norm: float = 0.0
    """Updates are scaled down to at most this L2 distance from the received model; 0 leaves them as they are."""

    log_lines: int = 20
    """How many of the last lines of a job's log the server is told when the job fails or its process dies here, 8 KiB
    at most. They hold what the job's code printed, and tracebacks; 0 lets none leave the site."""

    def __post_init__(self) -> None:
        _expect(self.job_code in ("allow", "deny"), "policy.job_code", self.job_code, "'allow' or 'deny'")
        _expect(self.max_update_norm >= 0, "policy.max_update_norm", self.max_update_norm, "0 or more")
        _expect(self.log_lines >= 0, "policy.log_lines", self.log_lines, "0 or more")


class ClientSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How a client runs."""

    project: str
    """The project that the client takes part in."""

    name: str
    """The client's name, as in its certificate."""

    servers: tuple[str, ...]
    """Where servers listen: ``host:port`` each; tried in order."""

    server_names: tuple[str, ...] = ("server",)
    """The names of the project's servers. A server has to prove, by its certificate, that it is one of them."""

    workspace: str = "workspace"
    """The folder for jobs' code, tensor files and logs at this site; made with mode 0700."""

    config: Config = {}
    """What training code here may read of its site, as ``ctx.site``: where its data lies, which share it holds."""

    resources: Resources = Resources()
    """What jobs may use here; the server gives a job only to clients that have what it asks for. 0 promises nothing."""

    policy: SitePolicy = SitePolicy()
    """What jobs may do here."""

    tls_roots: str = ""
    """A PEM file with the authorities of which one must have issued the certificate that the TLS connection shows.
    Empty means the project's own; a proxy that ends TLS has another. The server itself proves itself by the project's
    in any case."""

    tls: bool = True
    """Whether the server's port speaks TLS. Turn it off for loopback and tests only."""

    def __post_init__(self) -> None:
        _expect(is_name(self.name) and self.name != SERVER, "name", self.name, f"{NAME_RULE}, and not 'server'")
        _expect(is_name(self.project), "project", self.project, NAME_RULE)
        _expect(bool(self.servers), "servers", self.servers, "at least one 'host:port'")
        _expect_server_names(self.server_names)


class AdminSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How an administrator's commands find and prove themselves to the server."""

    project: str
    """The project."""

    name: str
    """The administrator's name, as in their certificate."""

    servers: tuple[str, ...]
    """Where servers listen: ``host:port`` each; tried in order."""

    server_names: tuple[str, ...] = ("server",)
    """The names of the project's servers. A server has to prove, by its certificate, that it is one of them."""

    tls_roots: str = ""
    """A PEM file with the authorities of which one must have issued the certificate that the TLS connection shows.
    Empty means the project's own; a proxy that ends TLS has another. The server itself proves itself by the project's
    in any case."""

    tls: bool = True
    """Whether the server's port speaks TLS."""

    def __post_init__(self) -> None:
        _expect(is_name(self.name), "name", self.name, NAME_RULE)
        _expect(is_name(self.project), "project", self.project, NAME_RULE)
        _expect(bool(self.servers), "servers", self.servers, "at least one 'host:port'")
        _expect_server_names(self.server_names)


def read(path: Path, kind: type[T]) -> T:
    """Return the settings of *kind* that the TOML file at *path* holds.

    Raises:
        ConfigError: the file cannot be read or parsed, or a field is unknown, missing or out of range; it names the
        field.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError("settings file", got=str(path), expected=f"a readable file ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError("settings file", got=str(path), expected=f"TOML ({error})") from error
    return checked(table, kind, where=str(path))


def checked(table: Mapping[str, object], kind: type[T], *, where: str = "") -> T:
    """Return the settings of *kind* that *table*, which stands in *where*, holds.

    Raises:
        ConfigError: a field is unknown, missing or out of range; it names the field.
    """
    table = _with_todays_names(table, kind)
    try:
        return msgspec.convert(table, kind)
    except msgspec.ValidationError as error:
        what, _, place = str(error).partition(" - at `$.")
        place = place.rstrip("`")
        if (match := _COMPLAINT.search(what)) is None:
            got = _found(table, place)
            raise ConfigError(
                place or "settings", got=got, expected=what.removeprefix("Expected "), where=where
            ) from None
        name = f"{place}.{match['field']}" if place else match["field"]
        expected = "a value; it has no default"
        if match["what"] != "missing required":
            near = difflib.get_close_matches(match["field"], _fields_at(kind, place), n=1)
            expected = f"no such field; perhaps {near[0]!r} is meant" if near else "no such field"
        raise ConfigError(name, got=_found(table, name), expected=expected, where=where) from None
    except ConfigError as error:
        raise ConfigError(error.field, got=error.got, expected=error.expected, where=where) from None


def _with_todays_names(table: Mapping[str, object], kind: type[msgspec.Struct]) -> Mapping[str, object]:
    for then, now in SINCE_RENAMED.items():
        if then in table and now not in table and now in kind.__struct_fields__:
            table = {name: value for name, value in table.items() if name != then} | {now: [table[then]]}
    return table


def _found(table: object, name: str) -> object:
    """Return what *table* holds under *name*, such as ``policy.submitters[0]``; ``None`` where it holds nothing."""
    for part in re.findall(r"[^.\[\]]+", name):
        if isinstance(table, dict):
            table = table.get(part)
        elif isinstance(table, list) and part.isdigit() and int(part) < len(table):
            table = table[int(part)]
        else:
            return None
    return table


def _fields_at(kind: object, place: str) -> tuple[str, ...]:
    """Return the fields of the table that *place*, such as ``policy`` or ``clients[0]``, is in settings of *kind*."""
    for part in re.findall(r"[^.\[\]]+", place):
        kind = get_args(kind)[0] if part.isdigit() else get_type_hints(kind)[part]
    return getattr(kind, "__struct_fields__", ())
