"""The fixtures of the server's tests: a project's kits, made once, and servers and streams that are gone at the end."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hanse.server import FederatedServer

from .job_world import MakeServer, StartServer, Threads
from .world import PROJECT, Dialler, Project, Recorder, args, settings


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return Project.make(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="session")
def other_project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Another project of the same name: other authority, other keys."""
    return Project.make(tmp_path_factory.mktemp("other"))


@pytest.fixture
def make_server() -> Iterator[MakeServer]:
    """``make_server(**arguments)``: a server of the project, closed at the end of the test."""
    made: list[FederatedServer] = []

    def make(**arguments: Any) -> FederatedServer:
        server = FederatedServer(PROJECT, **{"min_num_clients": 1, "shutdown_period": 5.0, **arguments})
        made.append(server)
        return server

    yield make
    for server in reversed(made):
        server.close()


@pytest.fixture
def deployed(make_server: MakeServer, project: Project, tmp_path: Path) -> MakeServer:
    """``deployed(**arguments)``: the same, deployed with mutual TLS on a free port of loopback; *wall* is its clock."""

    def make(
        workspace: Path = tmp_path / "ws",
        arguments: Any = None,
        wall: Callable[[], float] = time.time,
        **more: Any,
    ) -> FederatedServer:
        server = make_server(**more)
        server.wall = wall
        server.deploy(arguments or args(workspace), project.grpc_args(), secure_train=True)
        return server

    return make


@pytest.fixture
def deployed_plain(make_server: MakeServer, tmp_path: Path) -> MakeServer:
    """The same without TLS."""

    def make(workspace: Path = tmp_path / "plain", arguments: Any = None, **more: Any) -> FederatedServer:
        server = make_server(**more)
        server.deploy(arguments or args(workspace), {"service": {"target": "127.0.0.1:0"}})
        return server

    return make


@pytest.fixture
def dialler(project: Project, make_server: MakeServer) -> Iterator[Dialler]:
    """Streams to servers; they are closed before the servers are."""
    dialling = Dialler(project)
    yield dialling
    dialling.close()


@pytest.fixture
def recorder() -> Recorder:
    """A handler of a server's events that keeps them."""
    return Recorder()


@pytest.fixture
def start(deployed: MakeServer, recorder: Recorder, tmp_path: Path) -> StartServer:
    """``start(**settings)``: a deployed server whose runs are threads."""

    def make(workspace: Path = tmp_path / "ws", launcher: Any = None, **more: Any) -> FederatedServer:
        arguments = args(workspace, launcher=launcher or Threads(), settings=settings(**more))
        return deployed(arguments=arguments, handlers=[recorder])

    return make
