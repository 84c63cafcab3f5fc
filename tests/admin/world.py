"""What the tests of administration share: a project's kits, and a deployed server that its administrators reach.

Server and sessions live on the process's one background loop, as they do in a plain program; tests are plain functions.
"""

import argparse
import dataclasses
import random
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from hanse.admin.commands import AdminCommands
from hanse.admin.session import AdminSession, BlockingAdminSession
from hanse.cell.loop import run
from hanse.identity.kits import Kit
from hanse.identity.provision import provision
from hanse.job import JobSpec, WorkflowSpec
from hanse.server import FederatedServer
from hanse.settings import AdminSettings, ClientSettings, ServerSettings
from hanse.storage.packages import build_package
from hanse.storage.records import AuditEntry

WITHIN_S = 20.0
"""How long anything may take before the test has failed; nothing waits for this to pass."""

PROJECT = """
name = "demo"
[server]
hosts = ["localhost", "127.0.0.1"]
[[clients]]
name = "site-1"
[[admins]]
name = "ada@demo"
role = "admin"
[[admins]]
name = "lee@demo"
role = "lead"
[[admins]]
name = "lea@demo"
role = "lead"
[[admins]]
name = "mel@demo"
role = "member"
"""
T = TypeVar("T")


def wait(coroutine: Coroutine[Any, Any, T]) -> T:
    """Return what *coroutine* returns, run on the background loop, within the time that a test has."""
    return run(coroutine, WITHIN_S)


def make_kits(folder: Path) -> Path:
    (folder / "project.toml").write_text(PROJECT)
    provision(folder / "project.toml", folder / "kits", now=datetime.now(UTC))
    return folder / "kits"


@dataclasses.dataclass
class Deployment:
    """A deployed server, and the kits of those who reach it."""

    server: FederatedServer
    kits: Path
    workspace: Path
    tls: bool = True
    stop_asked: threading.Event = dataclasses.field(default_factory=threading.Event)

    @property
    def target(self) -> str:
        cell = self.server.get_cell()
        assert cell is not None
        assert cell.target is not None
        return cell.target

    def kit(self, name: str) -> Kit[AdminSettings]:
        """An administrator's kit that leads to this server."""
        if not self.tls:
            settings = AdminSettings(project="demo", name=name, servers=(self.target,), tls=False)
            return Kit(self.kits / name, settings, None, b"")
        kit = Kit.load(self.kits / name, AdminSettings)
        return dataclasses.replace(kit, settings=msgspec.structs.replace(kit.settings, servers=(self.target,)))

    def client_kit(self, name: str = "site-1") -> Kit[ClientSettings]:
        kit = Kit.load(self.kits / name, ClientSettings)
        return dataclasses.replace(kit, settings=msgspec.structs.replace(kit.settings, servers=(self.target,)))

    def session(self, name: str = "ada@demo") -> BlockingAdminSession:
        return BlockingAdminSession(self.kit(name))

    def async_session(self, name: str = "ada@demo", **more: Any) -> AdminSession:
        """A session to be entered on the background loop, and made there."""
        return AdminSession(self.kit(name), rng=random.Random(1), **more)

    def audited(self, limit: int = 100) -> list[AuditEntry]:
        return wait(self.server.jobs.services.store.audit_log(limit))

    def uploads(self) -> list[str]:
        """What lies where packages are uploaded."""
        return [path.name for path in (self.workspace / "uploads").rglob("*") if path.is_file()]


@contextmanager
def deployed(
    kits: Path, workspace: Path, *, tls: bool = True, target: str = "127.0.0.1:0", **more: Any
) -> Iterator[Deployment]:
    """A server of the project on a free port of loopback; *more* are its settings."""
    asked = threading.Event()
    server = FederatedServer(
        "demo", min_num_clients=1, shutdown_period=0.2, cmd_modules=[AdminCommands(on_stop=asked.set)]
    )
    server_kit = kits / "server"
    settings = ServerSettings(project="demo", **more)
    grpc_args = {
        "service": {"target": target, "scheme": "grpc"},
        "ssl_root_cert": server_kit / "ca.pem",
        "ssl_cert": server_kit / "cert.pem",
        "ssl_private_key": server_kit / "key.pem",
        "require_client_certificate": settings.client_certificates,
    }
    server.deploy(argparse.Namespace(workspace=workspace, settings=settings), grpc_args, secure_train=tls)
    try:
        yield Deployment(server, kits, workspace, tls, asked)
    finally:
        server.close()


def package(folder: Path, name: str = "digits") -> bytes:
    """A job's package that a server takes."""
    folder.mkdir(exist_ok=True)
    (folder / "client.py").write_text(f"app = {name!r}\n")
    workflow = WorkflowSpec("fedavg", {"rounds": 3})
    return build_package(folder, JobSpec(name, workflow, client="client:app", model="client:app", min_clients=1))
