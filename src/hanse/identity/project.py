"""A project's file: who takes part, under which role, and what stands in each participant's ``settings.toml``.

The operator writes ``project.toml``; ``provision`` makes of it one startup kit a participant::

    name = "demo"
    organisation = "Example Hospital"       # whose a participant is where its own entry does not say

    [server]
    hosts = ["fl.example.org", "10.0.0.7"]  # where clients reach it; all of them stand in its certificate
    port = 6007

    [[clients]]
    name = "site-1"
    organisation = "Site One"
    config = { data = "/srv/data" }         # what training code reads there as ctx.site

    [[admins]]
    name = "ada@demo"
    role = "lead"                           # admin: everything; lead: submit, abort own, see all; member: see

With ``[[standbys]]``, which have the fields of ``[server]``, a project has further servers: one of them takes over when
the one that serves is gone. All of them then share a store, and a folder or bucket for runs, which their settings name.
"""

import ipaddress
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import PurePath
from types import MappingProxyType
from typing import Final, TypeAlias

import msgspec

from hanse.errors import ConfigError
from hanse.identity.certificates import ADMIN_ROLE, CLIENT_ROLE, SERVER_ROLE, Subject
from hanse.ids import NAME_RULE, SERVER, is_dialable, is_name
from hanse.job import Config
from hanse.settings import AdminSettings, ClientSettings, ServerSettings, checked

AnySettings: TypeAlias = ServerSettings | ClientSettings | AdminSettings

ADMIN_ROLES: Final = ("admin", "lead", "member")
AUTHORITY_FOLDER: Final = "authority"
_MAX_VALID_DAYS: Final = 3650

_COMMENTS: Final[Mapping[str, str]] = {
    "project": "The project, and the name under which you take part in it: as in the certificate.",
    "target": "Where the server listens, and where clients reach it: host:port.",
    "store": "The store: the same for all servers of the project.",
    "runs": "The folder or bucket for runs: the same for all servers of the project.",
    "servers": "Where servers listen: host:port, tried in order.",
    "server_names": "The names of the project's servers; a certificate must prove one of them.",
    "config": "What training code may read of this site, as ctx.site.",
    "resources": "What jobs may use here.",
    "policy": "What jobs may do here; the site's word is the last.",
}


class ServerEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A server of a project: the one that clients try first, or one that stands by."""

    hosts: tuple[str, ...]
    """The DNS names and IP addresses under which clients reach it, tried in this order."""

    name: str = str(SERVER)
    """Its name in its certificate. A standby needs another."""

    port: int = 6007
    """The port at which clients reach it."""

    listen: str = "0.0.0.0"  # noqa: S104 - a server that is reached from elsewhere; the operator can narrow it
    """The address that it listens on; ``127.0.0.1`` where nothing outside this machine shall reach it."""

    organisation: str = ""
    """Whose it is; empty: the project's."""

    own_key: bool = False
    """Whether it makes its own key, which then never leaves it (``hanse kit request``); no kit is made for it here."""

    settings: dict[str, object] = {}
    """Further fields of its ``settings.toml``. A standby has those of ``[server]`` where its own say nothing. Where
    there are standbys, ``store`` and ``runs`` are among them."""


class ClientEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A client of a project."""

    name: str
    """Its name in its certificate, and everywhere."""

    organisation: str = ""
    """Whose it is; empty: the project's."""

    config: Config = {}
    """What training code may read there, as ``ctx.site``."""

    own_key: bool = False
    """Whether it makes its own key, which then never leaves it (``hanse kit request``); no kit is made for it here."""

    settings: dict[str, object] = {}
    """Further fields of its ``settings.toml``."""


class AdminEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An administrator of a project."""

    name: str
    """Their name in their certificate, and in the audit log."""

    role: str = "admin"
    """``admin``: everything; ``lead``: submit, abort their own jobs, see all; ``member``: see."""

    organisation: str = ""
    """Whose they are; empty: the project's."""

    own_key: bool = False
    """Whether they make their own key, which then never leaves them (``hanse kit request``)."""


@dataclass(frozen=True, slots=True)
class Participant:
    """One entry of a project's file, whatever its kind; ``role`` is as in the certificate.

    ``shares_secret`` says whether its kit has the secret that the project's servers share.
    """

    name: str
    organisation: str
    role: str
    own_key: bool
    kind: type[AnySettings]
    settings: Mapping[str, object]
    hosts: tuple[str, ...] = ()
    shares_secret: bool = False

    @property
    def subject(self) -> Subject:
        """What the participant's certificate says."""
        return Subject(self.name, self.organisation, self.role)

    def settings_text(self) -> str:
        """Return the participant's ``settings.toml``, made to be read and edited."""
        head = (
            f"# Settings of {self.name} ({self.role}) in the project {self.settings['project']}.\n"
            "# What is left out has its default. Relative paths start at this file's folder.\n"
        )
        values = {key: value for key, value in self.settings.items() if not isinstance(value, Mapping)}
        tables = {key: value for key, value in self.settings.items() if isinstance(value, Mapping)}
        lines = [f"{_comment(key)}{_key(key)} = {_toml(value)}\n" for key, value in values.items()]
        for key, table in tables.items():
            lines += [f"{_comment(key) or chr(10)}[{_key(key)}]\n"]
            lines += [f"{_key(field)} = {_toml(value)}\n" for field, value in table.items()]
        return head + "".join(lines)


class Project(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A project's file, checked."""

    name: str
    """The project's name; kits of another project are refused."""

    server: ServerEntry
    """Where all meet."""

    standbys: tuple[ServerEntry, ...] = ()
    """Further servers: one of them takes over when the one that serves is gone."""

    organisation: str = ""
    """Whose a participant is where its entry does not say; empty: the project's name stands for it."""

    valid_days: int = 360
    """How long the certificates made from this file are valid."""

    clients: tuple[ClientEntry, ...] = ()
    """Who trains."""

    admins: tuple[AdminEntry, ...] = ()
    """Who commands."""

    def __post_init__(self) -> None:
        if not is_name(self.name):
            raise ConfigError("name", got=self.name, expected=NAME_RULE)
        if not 1 <= self.valid_days <= _MAX_VALID_DAYS:
            raise ConfigError("valid_days", got=self.valid_days, expected=f"1 to {_MAX_VALID_DAYS}")
        self._require_distinct_addresses()
        for index, admin in enumerate(self.admins):
            if admin.role not in ADMIN_ROLES:
                raise ConfigError(f"admins[{index}].role", got=admin.role, expected=f"one of {', '.join(ADMIN_ROLES)}")
        self._require_distinct_names()
        for participant in self.participants():
            participant.subject.require_certifiable()
            _require_valid_settings(participant)
            if participant.shares_secret:
                _require_shared_places(participant)

    @property
    def lifetime(self) -> timedelta:
        """How long a certificate made from this file is valid."""
        return timedelta(days=self.valid_days)

    def participants(self) -> Iterator[Participant]:
        """Yield the servers, the clients and the administrators, each in the file's order."""
        house = self.organisation or self.name
        dialling = {
            "servers": tuple(address for _, server in self._servers() for address in _addresses(server)),
            "server_names": tuple(server.name for _, server in self._servers()),
        }
        for _, server in self._servers():
            where = {"target": f"{_bracketed(server.listen)}:{server.port}", "address": _addresses(server)[0]}
            yield Participant(
                name=server.name,
                organisation=server.organisation or house,
                role=SERVER_ROLE,
                own_key=server.own_key,
                kind=ServerSettings,
                settings=self._settings(server.name, where, further={**self.server.settings, **server.settings}),
                hosts=tuple(map(_canonical, server.hosts)),
                shares_secret=bool(self.standbys),
            )
        for client in self.clients:
            config = {"config": client.config} if client.config else {}
            yield Participant(
                name=client.name,
                organisation=client.organisation or house,
                role=CLIENT_ROLE,
                own_key=client.own_key,
                kind=ClientSettings,
                settings=self._settings(client.name, {**dialling, **config}, further=client.settings),
            )
        for admin in self.admins:
            yield Participant(
                name=admin.name,
                organisation=admin.organisation or house,
                role=f"{ADMIN_ROLE}:{admin.role}",
                own_key=admin.own_key,
                kind=AdminSettings,
                settings=self._settings(admin.name, dialling),
            )

    def _settings(
        self, name: str, own: Mapping[str, object], *, further: Mapping[str, object] = MappingProxyType({})
    ) -> dict[str, object]:
        fixed = {"project": self.name, "name": name, **own}
        for key in fixed.keys() & further.keys():
            raise ConfigError(
                f"settings.{key} of {name}", got=further[key], expected="nothing: other fields of the entry set it"
            )
        return {**fixed, **further}

    def _servers(self) -> Iterator[tuple[str, ServerEntry]]:
        """Yield the servers in the order in which clients try them, each with where it stands in the file."""
        yield "server", self.server
        for index, standby in enumerate(self.standbys):
            yield f"standbys[{index}]", standby

    def _require_distinct_addresses(self) -> None:
        taken: set[str] = set()
        for where, server in self._servers():
            if not 1 <= server.port <= 65535:
                raise ConfigError(f"{where}.port", got=server.port, expected="1 to 65535")
            addresses = _addresses(server)
            if not addresses:
                expected = "at least one name that clients can dial"
                raise ConfigError(f"{where}.hosts", got=server.hosts, expected=expected)
            for address in addresses:
                if not is_dialable(address):
                    expected = "hosts that clients can dial, without port or brackets"
                    raise ConfigError(f"{where}.hosts", got=address.rpartition(":")[0], expected=expected)
                if address in taken:
                    expected = "an address that no other server of the project has"
                    raise ConfigError(f"{where}.hosts and port", got=address, expected=expected)
            taken.update(addresses)

    def _require_distinct_names(self) -> None:
        # Kits are folders, and some file systems do not tell "Site-1" from "site-1".
        taken = {AUTHORITY_FOLDER}
        servers = [server.name for _, server in self._servers()]
        for name in (*servers, *(client.name for client in self.clients), *(admin.name for admin in self.admins)):
            if not is_name(name):
                raise ConfigError("name", got=name, expected=NAME_RULE)
            if name.casefold() in taken:
                raise ConfigError("name", got=name, expected="a name that nothing else in the project has")
            # Whatever the servers' certificates call them, SERVER is the address of their cell.
            taken |= {name.casefold(), str(SERVER)}


def _require_valid_settings(participant: Participant) -> None:
    try:
        checked(participant.settings, participant.kind)
    except ConfigError as error:
        field = f"settings.{error.field} of {participant.name}"
        raise ConfigError(field, got=error.got, expected=error.expected) from None


def _require_shared_places(server: Participant) -> None:
    """Raise unless *server*, one of several, has a store, and a folder or bucket for runs, that others can have too."""
    for key in ("store", "runs"):
        if not server.settings.get(key):
            expected = f"the {key} that all servers share, since the project has standbys"
            raise ConfigError(f"settings.{key} of {server.name}", got=server.settings.get(key), expected=expected)
    if "://" in str(server.settings["runs"]):
        return
    runs = PurePath(os.path.normpath(str(server.settings["runs"])))
    if not runs.is_absolute() and runs.parts[:1] != (os.pardir,):
        expected = "a folder or bucket that all servers share, not a folder in this server's kit"
        raise ConfigError(f"settings.runs of {server.name}", got=str(runs), expected=expected)


def _addresses(server: ServerEntry) -> tuple[str, ...]:
    """Return where clients dial *server*, in the order in which they try."""
    return tuple(f"{_bracketed(host)}:{server.port}" for host in server.hosts if not host.startswith("*"))


def _canonical(host: str) -> str:
    """Return *host* in the one spelling that an IP address has in a certificate."""
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return host


def _bracketed(host: str) -> str:
    host = _canonical(host)
    return f"[{host}]" if ":" in host else host


def _comment(key: str) -> str:
    return f"\n# {_COMMENTS[key]}\n" if key in _COMMENTS else ""


def _key(key: str) -> str:
    is_bare = key.isascii() and key.replace("-", "").replace("_", "").isalnum()
    return key if is_bare else _toml(key)


def _toml(value: object) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case int() | float():
            return repr(value)  # inf and nan are TOML's words too
        case str():
            # JSON's escapes are TOML's, except that TOML wants DEL escaped as well.
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")
        case list() | tuple():
            return f"[{', '.join(map(_toml, value))}]"
        case Mapping():
            return f"{{ {', '.join(f'{_key(key)} = {_toml(item)}' for key, item in value.items())} }}"
    raise ConfigError("settings", got=value, expected="a text, number, truth value, list or table")
