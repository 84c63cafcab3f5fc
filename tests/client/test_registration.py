import asyncio
import math
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest

from hanse.cell.cell import Cell
from hanse.cell.connector import Connector
from hanse.cell.link import Link
from hanse.client.registration import Registrant, registered_by
from hanse.errors import HanseError, ProtocolError, Unauthenticated
from hanse.identity.authorities import Authority
from hanse.ids import Fqcn, Ssid, Token
from hanse.job import Resources
from hanse.messages import PROTOCOL_VERSIONS, Hello, Register, Registered, Renew, Welcome, ok

from .fake_server import PROJECT, SITE, FakeServer, certified, fake_server

NOW = datetime.now(UTC)


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority.create(PROJECT, now=NOW)


@asynccontextmanager
async def outcome_of(
    server: FakeServer, registrant: Registrant
) -> AsyncIterator[tuple[Registered | HanseError, list[str]]]:
    """Register over a stream of its own and yield what came of it, and the notes that were made on the way."""
    cell = Cell(Fqcn(registrant.name))
    result: asyncio.Future[Registered | HanseError] = asyncio.get_running_loop().create_future()
    notes: list[str] = []

    async def on_welcome(link: Link, welcome: Welcome) -> None:
        try:
            result.set_result(await registrant.register(cell, link, on_server_proven=lambda: notes.append("proven")))
        except HanseError as error:
            result.set_result(error)

    connector = Connector(
        cell,
        targets=["memory"],
        hello=lambda: Hello(PROTOCOL_VERSIONS, cell.fqcn, PROJECT),
        tls=None,
        rng=random.Random(1),
        on_welcome=on_welcome,
        dial=server.dial,
    )
    running = asyncio.create_task(connector.run())
    try:
        yield await result, notes
    finally:
        await connector.close()
        await running
        await cell.close()


def registrant(authority: Authority, **changes: Any) -> Registrant:
    values: dict[str, Any] = {
        "identity": certified(authority, SITE, "client"),
        "roots": authority.certificate,
        "resources": Resources(cpus=2),
        "release": "0.1",
        **changes,
    }
    return Registrant(PROJECT, SITE, **{"server_names": ("server",), **values})


async def test_both_prove_themselves_and_the_client_is_registered(tmp_path: Path, authority: Authority) -> None:
    identity = certified(authority, "server", "server")
    async with (
        fake_server(tmp_path, identity=identity, roots=authority.certificate) as server,
        outcome_of(server, registrant(authority)) as (outcome, notes),
    ):
        assert isinstance(outcome, Registered)
        assert notes == ["proven"]
        request = await server.next(Register)
        assert (request.client, request.resources.cpus, request.release) == (SITE, 2, "0.1")


async def test_without_an_identity_nothing_is_proven_and_nothing_challenged(
    tmp_path: Path, authority: Authority
) -> None:
    async with (
        fake_server(tmp_path) as server,
        outcome_of(server, registrant(authority, identity=None, roots=b"")) as (outcome, _),
    ):
        assert isinstance(outcome, Registered)
        request = await server.next(Register)
        assert (request.certificate, request.signature) == (b"", b"")


def changed(**changes: Any) -> Any:
    return lambda reply: msgspec.structs.replace(reply, **changes)


@pytest.mark.parametrize(
    ("tamper", "sentence"),
    [
        (changed(server="other"), "the server calls itself 'other'; this kit expects 'server'"),
        (changed(signature=b"not one"), "the server's signature does not prove that it is 'server'"),
        (changed(nonce=bytes(32)), "the server's signature does not prove that it is 'server'"),
        (changed(certificate=b"not PEM"), "not one X.509 certificate in PEM"),
    ],
)
async def test_server_that_does_not_prove_itself_learns_nothing_of_the_client(
    tmp_path: Path, authority: Authority, tamper: Any, sentence: str
) -> None:
    identity = certified(authority, "server", "server")
    async with (
        fake_server(tmp_path, identity=identity, roots=authority.certificate, tamper=tamper) as server,
        outcome_of(server, registrant(authority)) as (outcome, notes),
    ):
        assert isinstance(outcome, Unauthenticated)
        assert sentence in outcome.reason
        assert notes == []
        assert server.queue(Register).empty()


@pytest.mark.parametrize("name", ["alpha", "server"])
async def test_any_of_the_projects_servers_may_answer(tmp_path: Path, authority: Authority, name: str) -> None:
    identity = certified(authority, name, "server")
    async with (
        fake_server(tmp_path, identity=identity, roots=authority.certificate) as server,
        outcome_of(server, registrant(authority, server_names=("alpha", "server"))) as (outcome, notes),
    ):
        assert isinstance(outcome, Registered)
        assert notes == ["proven"]


async def test_server_that_no_name_stands_for_learns_which_this_kit_expects(
    tmp_path: Path, authority: Authority
) -> None:
    identity = certified(authority, "gamma", "server")
    async with (
        fake_server(tmp_path, identity=identity, roots=authority.certificate) as server,
        outcome_of(server, registrant(authority, server_names=("alpha", "server"))) as (outcome, _),
    ):
        assert isinstance(outcome, Unauthenticated)
        assert outcome.reason == "the server calls itself 'gamma'; this kit expects 'alpha' or 'server'"
        assert server.queue(Register).empty()


async def test_server_cannot_pass_for_another_of_the_project(tmp_path: Path, authority: Authority) -> None:
    identity = certified(authority, "alpha", "server")
    async with (
        fake_server(
            tmp_path, identity=identity, roots=authority.certificate, tamper=changed(server="server")
        ) as server,
        outcome_of(server, registrant(authority, server_names=("alpha", "server"))) as (outcome, _),
    ):
        assert isinstance(outcome, Unauthenticated)
        assert outcome.reason == "the certificate is for 'alpha', not for 'server'"


async def test_short_nonce_is_no_challenge_reply(tmp_path: Path, authority: Authority) -> None:
    identity = certified(authority, "server", "server")
    async with (
        fake_server(tmp_path, identity=identity, roots=authority.certificate, tamper=changed(nonce=b"1")) as server,
        outcome_of(server, registrant(authority)) as (outcome, _),
    ):
        assert isinstance(outcome, ProtocolError)


async def test_certificate_of_a_participant_is_not_a_servers(tmp_path: Path, authority: Authority) -> None:
    impostor = certified(authority, "server", "client")
    async with (
        fake_server(tmp_path, identity=impostor, roots=authority.certificate) as server,
        outcome_of(server, registrant(authority)) as (outcome, _),
    ):
        assert isinstance(outcome, Unauthenticated)
        assert "for the role 'client'" in outcome.reason


async def test_server_of_another_authority_is_refused(tmp_path: Path, authority: Authority) -> None:
    other = Authority.create(PROJECT, now=NOW)
    async with (
        fake_server(tmp_path, identity=certified(other, "server", "server"), roots=other.certificate) as server,
        outcome_of(server, registrant(authority)) as (outcome, _),
    ):
        assert isinstance(outcome, Unauthenticated)
        assert "another authority" in outcome.reason


async def test_servers_expired_certificate_is_refused(tmp_path: Path, authority: Authority) -> None:
    identity = certified(authority, "server", "server")
    late = registrant(authority, wall=lambda: NOW + timedelta(days=2000))
    async with (
        fake_server(tmp_path, identity=identity, roots=authority.certificate) as server,
        outcome_of(server, late) as (outcome, _),
    ):
        assert isinstance(outcome, Unauthenticated)
        assert "expired" in outcome.reason


async def test_servers_refusal_is_raised_with_its_reason(tmp_path: Path, authority: Authority) -> None:
    identity = certified(authority, "server", "server")
    full = {"register": Unauthenticated("the project has all of its 10 clients")}
    async with (
        fake_server(tmp_path, identity=identity, roots=authority.certificate, refuse=full) as server,
        outcome_of(server, registrant(authority)) as (outcome, _),
    ):
        assert isinstance(outcome, Unauthenticated)
        assert outcome.reason == "the project has all of its 10 clients"


@pytest.mark.parametrize("value", [0.0, -1.0, 1e-9, math.nan, math.inf, -math.inf, 1e300], ids=str)
@pytest.mark.parametrize("field", ["expires_in_s", "heartbeat_s"])
def test_time_that_cannot_be_is_refused_where_it_enters(field: str, value: float) -> None:
    given = msgspec.structs.replace(Registered(Token("t"), "signed", Ssid("1"), 3600.0, 5.0), **{field: value})

    with pytest.raises(ProtocolError) as refused:
        registered_by(ok(given), to="renew")

    assert refused.value.reason == f"{field} in the reply to renew is {value!r}; expected 0.001 to 1e+09 seconds"


@pytest.mark.parametrize("value", [1e-3, 5, 1e9])
def test_time_that_a_server_may_give_is_taken(value: float) -> None:
    given = Registered(Token("t"), "signed", Ssid("1"), value, value)

    assert registered_by(ok(given), to="renew") is given


@pytest.mark.parametrize("payload", [None, Renew()])
def test_reply_of_another_kind_is_refused(payload: Renew | None) -> None:
    with pytest.raises(ProtocolError, match=r"^reply to register is .*; expected Registered$"):
        registered_by(ok(payload), to="register")


async def test_registration_with_a_time_that_cannot_be_is_none(tmp_path: Path, authority: Authority) -> None:
    async with (
        fake_server(tmp_path, heartbeat_s=math.nan) as server,
        outcome_of(server, registrant(authority, identity=None, roots=b"")) as (outcome, _),
    ):
        assert isinstance(outcome, ProtocolError)
        assert outcome.field == "heartbeat_s in the reply to register"


def test_registrant_does_not_show_what_it_trusts_or_signs_with(authority: Authority) -> None:
    shown = repr(registrant(authority))

    assert "BEGIN" not in shown
