"""Where and how a server listens, from the arguments of ``deploy``: checked here, before anything is opened."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from hanse.cell.rpc import ServerTls
from hanse.errors import ConfigError
from hanse.ids import is_target

DEFAULT_TARGET: Final = "0.0.0.0:6007"
SCHEMES: Final = ("grpc", "memory")
"""``memory`` listens nowhere: cells of the same process dial in memory, as the simulator's do."""
SOCKET_FILE: Final = "jobs.sock"
"""Where in the workspace cells of this machine connect; elsewhere if the path would be too long for a socket."""
TLS_FILES: Final = ("ssl_root_cert", "ssl_cert", "ssl_private_key")


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """The three files that a secure server needs; all are readable."""

    root: Path
    certificate: Path
    key: Path


@dataclass(frozen=True, slots=True)
class Place:
    """Where a server keeps its things, where it listens, and with what.

    ``tls`` is ``None`` for a server without. ``servers_secret`` is the file with the secret that the servers of a
    project share, ``None`` for a server that shares nothing.
    """

    workspace: Path
    target: str
    scheme: str
    tls: TlsFiles | None
    require_client_certificate: bool = True
    servers_secret: Path | None = None


def place(args: object, grpc_args: Mapping[str, Any] | None, *, secure: bool) -> Place:
    """Return where to listen: *args* has at least ``workspace``, *grpc_args* is as ``BaseServer.deploy`` says.

    Raises:
        ConfigError: something is missing, unreadable or not what it should be; the error names it.
    """
    workspace = getattr(args, "workspace", None)
    if not isinstance(workspace, str | Path) or not str(workspace):
        raise ConfigError("args.workspace", got=workspace, expected="the path of a folder")
    grpc_args = grpc_args or {}
    service = grpc_args.get("service", {})
    if not isinstance(service, Mapping):
        raise ConfigError("grpc_args['service']", got=service, expected="a mapping with 'target' and 'scheme'")
    scheme = service.get("scheme", "grpc")
    if scheme not in SCHEMES:
        raise ConfigError("grpc_args['service']['scheme']", got=scheme, expected=" or ".join(map(repr, SCHEMES)))
    return Place(
        workspace=Path(workspace),
        target=checked_target(service.get("target", DEFAULT_TARGET)),
        scheme=scheme,
        tls=_tls_files(grpc_args) if secure else None,
        require_client_certificate=bool(grpc_args.get("require_client_certificate", True)),
        servers_secret=_servers_secret(grpc_args),
    )


def server_tls(where: Place, further_roots: bytes = b"") -> ServerTls | None:
    """Return what the port needs for TLS, ``None`` without it; *further_roots* count beside the project's."""
    if where.tls is None:
        return None
    return ServerTls(
        where.tls.certificate.read_bytes(),
        where.tls.key.read_bytes(),
        where.tls.root.read_bytes() + further_roots,
        require_client_certificate=where.require_client_certificate,
    )


def checked_target(target: object) -> str:
    """Return *target* if it is ``host:port``, with an IPv6 host in brackets.

    Raises:
        ConfigError: it is not.
    """
    if not isinstance(target, str) or not is_target(target):
        raise ConfigError("target", got=target, expected="'host:port' (an IPv6 host in brackets), port 0 to 65535")
    return target


def is_loopback(target: str) -> bool:
    """Return whether *target* can be reached from this machine alone."""
    host = target.rpartition(":")[0].strip("[]")
    return host in ("localhost", "::1") or host.startswith("127.")


def _servers_secret(grpc_args: Mapping[str, Any]) -> Path | None:
    value = grpc_args.get("servers_secret")
    if value is None:
        return None
    if not isinstance(value, str | Path) or not str(value):
        expected = "the path of the file with the servers' secret, or nothing"
        raise ConfigError("grpc_args['servers_secret']", got=value, expected=expected)
    return Path(value)


def _tls_files(grpc_args: Mapping[str, Any]) -> TlsFiles:
    paths: list[Path] = []
    for name in TLS_FILES:
        value = grpc_args.get(name)
        if not isinstance(value, str | Path) or not str(value):
            raise ConfigError(f"grpc_args[{name!r}]", got=value, expected="the path of a PEM file, for a secure server")
        path = Path(value)
        try:
            with path.open("rb"):
                paths.append(path)
        except OSError as error:
            raise ConfigError(
                f"grpc_args[{name!r}]", got=str(path), expected=f"a readable PEM file ({error.strerror})"
            ) from error
    return TlsFiles(*paths)
