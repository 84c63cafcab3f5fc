"""The commands on clients and on the server's state, with a session that answers from memory."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from hanse.ids import JobId, Ssid
from hanse.messages import ClientList, RefusedClient, RegisteredClient, ServerStatus

from .conftest import Hanse

SITE = RegisteredClient("site-1", "connected", 2.5, jobs=(JobId("digits-1"),), release="0.1.0")
STATUS = ServerStatus("hot", Ssid("s"), "demo", "0.1.0", clients=1, jobs_running=1, since=1_700_000_000.0)


class FakeSession:
    """Answers as a server with one client would."""

    def __init__(self) -> None:
        self.registered: tuple[RegisteredClient, ...] = (SITE,)
        self.refused: dict[str, str] = {}
        self.knocking: tuple[RefusedClient, ...] = ()
        self.expired: dict[str, str] = {}
        self.state = STATUS

    async def client_list(self) -> ClientList:
        return ClientList(self.registered, self.refused, self.knocking, self.expired)

    async def disable(self, client: str) -> None:
        self.registered, self.refused = (), {client: "disabled by ada@demo"}

    async def enable(self, client: str) -> None:
        del self.refused[client]

    async def status(self) -> ServerStatus:
        return self.state


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> FakeSession:
    fake = FakeSession()

    def ask(kit: Path | None, work: Callable[[FakeSession], Awaitable[Any]], output: object) -> Any:
        async def asked() -> Any:
            return await work(fake)

        return asyncio.run(asked())

    monkeypatch.setattr("hanse.cli.clients.ask", ask)
    monkeypatch.setattr("hanse.cli.status.ask", ask)
    monkeypatch.setattr("hanse.cli.status.AdminSession", FakeSession)
    return fake


def test_clients_are_listed_and_so_are_those_that_are_refused(hanse: Hanse, session: FakeSession) -> None:
    head, line = hanse("client", "list").out.splitlines()
    assert head.split() == ["client", "state", "heard", "of", "jobs,", "or", "why"]
    assert line.split() == ["site-1", "connected", "2.50", "s", "ago", "digits-1"]

    assert hanse("client", "disable", "site-1").out == "client site-1 is refused from now on\n"
    _, line = hanse("client", "list").out.splitlines()
    assert line.split() == ["site-1", "disabled", "-", "disabled", "by", "ada@demo"]
    listed = json.loads(hanse("client", "list", "--format", "json").out)
    assert listed == {"clients": [], "disabled": {"site-1": "disabled by ada@demo"}, "refused": [], "expired": {}}

    enabled = json.loads(hanse("client", "enable", "site-1", "--format", "json").out)
    assert enabled == {"client": "site-1", "disabled": False}
    assert hanse("client", "list").out == "no clients\n"


def test_who_is_refused_is_listed_with_what_it_was_told(hanse: Hanse, session: FakeSession) -> None:
    session.registered = ()
    session.knocking = (RefusedClient("site-2", "unauthenticated", "its certificate has expired", 3.0),)
    _, line = hanse("client", "list").out.splitlines()
    assert line.rstrip().endswith("its certificate has expired [unauthenticated]")
    assert line.split()[:5] == ["site-2", "refused", "3.00", "s", "ago"]


def test_a_certificate_that_ends_is_told_of_clients_that_are_there_and_of_those_that_are_not(
    hanse: Hanse, session: FakeSession
) -> None:
    session.registered = (msgspec.structs.replace(SITE, remark="its certificate expires soon"),)
    session.expired = {"site-2": "its certificate expired"}
    _, first, second = hanse("client", "list").out.splitlines()
    assert first.rstrip().endswith("  digits-1; its certificate expires soon")
    assert second.rstrip().split(maxsplit=3) == ["site-2", "expired", "-", "its certificate expired"]


def test_the_servers_state_is_shown(hanse: Hanse, session: FakeSession) -> None:
    shown = hanse("server", "status").out.splitlines()
    assert (shown[0], shown[2]) == ("project       demo", "state         hot")
    assert shown[4:6] == ["clients       1 registered", "running jobs  1"]
    assert json.loads(hanse("server", "status", "--format", "json").out)["clients"] == 1


def test_a_servers_certificate_that_ends_is_shown_with_its_state(hanse: Hanse, session: FakeSession) -> None:
    session.state = msgspec.structs.replace(STATUS, remark="it expires soon")
    assert hanse("server", "status").out.splitlines()[-1] == "certificate   it expires soon"


@pytest.mark.parametrize("command", [("client", "list"), ("client", "disable", "x"), ("server", "status")])
def test_an_administrators_kit_is_needed(hanse: Hanse, command: tuple[str, ...]) -> None:
    ended = hanse(*command)
    assert ended.status == 2
    assert "administrator's kit" in ended.err
