"""Startup kits: a folder with all that one participant needs to take part.

A kit holds ``settings.toml``, the project's certificate (``ca.pem``) and the participant's own certificate and key
(``cert.pem``, ``key.pem``); where a project has several servers, theirs also hold the secret that they share
(``servers.secret``). ``Kit.load`` returns it only if the parts belong together, so a mix-up is found where it
was made and not as a refusal by somebody else. ``provision`` makes kits.
"""

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Final, Generic, TypeVar

from hanse.errors import ConfigError, Unauthenticated
from hanse.identity.certificates import (
    ADMIN_ROLE,
    CLIENT_ROLE,
    SERVER_ROLE,
    Identity,
    Subject,
    parse_certificate,
    require_issued_by,
)
from hanse.identity.private_files import read_file, require_private
from hanse.identity.project import AnySettings
from hanse.identity.servers_secret import SERVERS_SECRET_FILE, ServersSecret
from hanse.settings import SETTINGS_FILE, AdminSettings, ClientSettings, ServerSettings, read

CA_FILE: Final = "ca.pem"
CERTIFICATE_FILE: Final = "cert.pem"
KEY_FILE: Final = "key.pem"
REQUEST_FILE: Final = "request.pem"

_ROLES: Final[Mapping[type[AnySettings], str]] = {
    ServerSettings: SERVER_ROLE,
    ClientSettings: CLIENT_ROLE,
    AdminSettings: ADMIN_ROLE,
}

_WHOSE: Final = {SERVER_ROLE: "a server's", CLIENT_ROLE: "a client's", ADMIN_ROLE: "an administrator's"}

_DIALS: Final = re.compile(r"^\s*servers\s*=", re.MULTILINE)

S = TypeVar("S", bound=AnySettings)


def settings_kind(role: str) -> type[AnySettings]:
    """Return the type of settings that a kit for *role*, as in certificates, has.

    Raises:
        ConfigError: there is no such role.
    """
    for kind, prefix in _ROLES.items():
        if role.partition(":")[0] == prefix:
            return kind
    raise ConfigError("certificate's role", got=role, expected="'server', 'client' or 'admin:<role>'")


def kind_of(folder: Path) -> type[AnySettings]:
    """Return the type of settings of the kit in *folder*, as its certificate says whose it is.

    Where no certificate says it, the settings do: whoever dials has ``servers``. An administrator's kit is taken for a
    client's then, whose settings have all that an administrator's have.

    Raises:
        ConfigError: the kit has no settings, or its certificate has still to be installed.
    """
    path = folder / CERTIFICATE_FILE
    if not path.exists() and (folder / REQUEST_FILE).exists():
        raise _not_installed(folder)
    with suppress(ConfigError):
        return settings_kind(Subject.of(parse_certificate(read_file(path), path).subject).role)
    text = read_file(folder / SETTINGS_FILE, what="settings file").decode(errors="replace")
    return ClientSettings if _DIALS.search(text) else ServerSettings


@dataclass(frozen=True, slots=True)
class Kit(Generic[S]):
    """A startup kit that has been read and holds together.

    ``identity`` is ``None`` and ``ca_pem`` empty in a kit without certificates, which only ``tls = false`` allows.
    ``tls_roots`` is what the connection's certificate is checked against: ``ca_pem``, but for a proxy that ends TLS.
    """

    folder: Path
    settings: S
    identity: Identity | None
    ca_pem: bytes = field(repr=False)
    tls_roots: bytes = field(default=b"", repr=False)

    @classmethod
    def load(cls, folder: Path, kind: type[S]) -> "Kit[S]":
        """Return the kit in *folder*, whose settings are of *kind*.

        Whether its certificate is valid today is ``require_valid_at``'s question: a kit that is only looked at, as
        when it is made or its process is stopped, may be any age.

        Raises:
            ConfigError: the kit is another kind of participant's, a file is missing or not what it should be, others
            can read a key, secret or password, or the parts do not belong together: key and certificate, certificate
            and authority, certificate and settings, the servers' secret and settings.
        """
        paths = {name: folder / name for name in (CA_FILE, CERTIFICATE_FILE, KEY_FILE)}
        if paths[CERTIFICATE_FILE].exists():
            _require_kind(folder, kind)
        elif (folder / REQUEST_FILE).exists():
            raise _not_installed(folder)
        settings = read(folder / SETTINGS_FILE, kind)
        if isinstance(settings, ServerSettings):
            _require_ready_to_share(folder, settings)
        if not settings.tls and not any(path.exists() for path in paths.values()):
            return cls(folder, settings, None, b"")
        require_private(paths[KEY_FILE])
        identity = Identity.load(paths[CERTIFICATE_FILE], paths[KEY_FILE])
        ca_pem = read_file(paths[CA_FILE], what="certificate file")
        _require_coherent(folder, settings, identity, ca_pem)
        own_roots = "" if isinstance(settings, ServerSettings) else settings.tls_roots
        tls_roots = read_file(folder / own_roots, what="tls_roots file") if own_roots else ca_pem
        return cls(folder, settings, identity, ca_pem, tls_roots)

    @property
    def servers_secret(self) -> Path | None:
        """The file with what this server shares with the project's others; ``None`` where there is none."""
        path = self.folder / SERVERS_SECRET_FILE
        return path if path.exists() else None

    def require_valid_at(self, now: datetime) -> None:
        """Return if the kit's certificate, where it has one, is valid at *now*, which is aware.

        A server asks this before it serves; whoever dials with an identity asks it of that each time, because over TLS
        the other side's refusal says no more than that the connection was closed.

        Raises:
            Unauthenticated: it has expired, or is not valid yet; the sentence says whose it is and since when.
        """
        if self.identity is not None:
            self.identity.require_valid_at(now)

    def resolve(self, path: str) -> Path:
        """Return the place that *path* in the settings means: relative ones start at the kit's folder."""
        return self.folder / path


def _not_installed(folder: Path) -> ConfigError:
    return ConfigError(
        "kit", got=f"{folder} without {CERTIFICATE_FILE}", expected="what 'hanse kit install' makes of it"
    )


def _require_kind(folder: Path, kind: type[object]) -> None:
    """Raise unless the kit in *folder* is of *kind*: looked at first, for nothing else in another's kit makes sense."""
    path = folder / CERTIFICATE_FILE
    role = Subject.of(parse_certificate(read_file(path, what="certificate file"), path).subject).role
    whose = role.partition(":")[0]
    wanted = next(prefix for settings, prefix in _ROLES.items() if settings is kind)
    if whose != wanted:
        this = _WHOSE.get(whose, f"for {role!r}")
        raise ConfigError("kit", got=str(folder), expected=f"{_WHOSE[wanted]}, and this one is {this}")


def _require_ready_to_share(folder: Path, settings: ServerSettings) -> None:
    """Raise unless what servers share is complete: with the secret go a store and a folder that all of them use."""
    if settings.has_password:
        require_private(folder / SETTINGS_FILE, what="settings file with a password")
    path = folder / SERVERS_SECRET_FILE
    if not path.exists():
        return
    ServersSecret.load(path)
    for field_name in ("store", "runs"):
        if not getattr(settings, field_name):
            raise ConfigError(
                field_name, got="", expected=f"what the project's servers share, since {SERVERS_SECRET_FILE} is there"
            )


def _require_coherent(folder: Path, settings: AnySettings, identity: Identity, ca_pem: bytes) -> None:
    where = str(folder / CERTIFICATE_FILE)
    authority = Subject.of(parse_certificate(ca_pem, folder / CA_FILE).subject)
    try:
        require_issued_by(parse_certificate(identity.certificate, folder / CERTIFICATE_FILE), ca_pem)
    except Unauthenticated as error:
        raise ConfigError("certificate file", got=where, expected=f"one issued by {folder / CA_FILE}") from error
    if identity.name != settings.name:
        raise ConfigError("name", got=settings.name, expected=f"{identity.name!r}, as {where} says")
    if authority.organisation != settings.project:
        raise ConfigError(
            "project", got=settings.project, expected=f"{authority.organisation!r}, as {folder / CA_FILE} says"
        )
