"""A server whose own certificate ends soon, over real mutual TLS: its log says so, and so does its state."""

import logging
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from queue import SimpleQueue

import pytest

from hanse.admin.commands import AdminCommands
from hanse.coordination.certificates import ENDS_SOON_S
from hanse.messages import Channel, ServerStatus, StatusQuery
from hanse.server import FederatedServer

from .world import WITHIN_S, Dialler, Project, args

MakeServer = Callable[..., FederatedServer]
Deploy = Callable[[timedelta], tuple[FederatedServer, datetime]]


@pytest.fixture
def deploy(make_server: MakeServer, project: Project, tmp_path: Path) -> Deploy:
    """``deploy(lifetime)``: a server whose certificate lasts for so long from now on, and when it ends."""

    def make(lifetime: timedelta) -> tuple[FederatedServer, datetime]:
        hosts, now = ["localhost", "127.0.0.1"], datetime.now(UTC)
        identity = project.issued(tmp_path, "server", role="server", hosts=hosts, now=now, lifetime=lifetime)
        own = {"ssl_cert": tmp_path / "cert.pem", "ssl_private_key": tmp_path / "key.pem"}
        server = make_server(cmd_modules=[AdminCommands()])
        server.deploy(args(tmp_path / "ws"), project.grpc_args(**own), secure_train=True)
        return server, identity.expires

    return make


@pytest.fixture
def logged() -> Iterator[SimpleQueue[str]]:
    """The warnings of this server's certificate, as they are logged."""
    reasons: SimpleQueue[str] = SimpleQueue()

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            reasons.put(vars(record)["reason"])

    logger, handler = logging.getLogger("hanse.server.own_certificate"), Handler()
    logger.addHandler(handler)
    yield reasons
    logger.removeHandler(handler)


def status(server: FederatedServer, dialler: Dialler) -> ServerStatus:
    told = dialler.site(server, "ada@demo").ask(Channel.ADMIN, "server.status", StatusQuery()).payload
    assert isinstance(told, ServerStatus)
    return told


def test_a_server_whose_certificate_ends_soon_says_so(
    deploy: Deploy, dialler: Dialler, logged: SimpleQueue[str]
) -> None:
    server, end = deploy(timedelta(days=11, minutes=1))

    remark = (
        f"it expires on {end:%Y-%m-%d %H:%M} UTC, in 11 days; "
        "from then on nobody can connect until the server has a new one and is started again"
    )
    assert logged.get(timeout=WITHIN_S) == remark
    told = status(server, dialler)
    assert (told.certificate_ends_at, told.remark) == (end.timestamp(), remark)


def test_a_server_says_it_when_its_certificate_comes_to_its_last_month(
    deploy: Deploy, logged: SimpleQueue[str]
) -> None:
    _, end = deploy(timedelta(seconds=ENDS_SOON_S + 2))

    assert logged.get(timeout=WITHIN_S).startswith(f"it expires on {end:%Y-%m-%d %H:%M} UTC, in 2")


def test_a_server_says_it_again_when_its_certificate_has_ended(deploy: Deploy, logged: SimpleQueue[str]) -> None:
    _, end = deploy(timedelta(seconds=2))

    assert logged.get(timeout=WITHIN_S).startswith("it expires on ")
    assert logged.get(timeout=WITHIN_S).startswith(f"it expired on {end:%Y-%m-%d %H:%M} UTC, and nobody can connect")


def test_a_server_whose_certificate_lasts_for_a_while_has_nothing_to_say(
    deploy: Deploy, dialler: Dialler, logged: SimpleQueue[str]
) -> None:
    server, end = deploy(timedelta(days=31))

    told = status(server, dialler)
    assert (told.certificate_ends_at, told.remark) == (end.timestamp(), "")
    assert logged.empty()


def test_a_server_without_a_certificate_has_none_that_ends(deployed_plain: MakeServer) -> None:
    assert deployed_plain().certificate_ends_at is None
