"""Challenge and registration: both halves, by direct calls and over the wire, and everything that they refuse."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest

from hanse.errors import Unauthenticated, Unreachable
from hanse.events import EventType, Refused
from hanse.identity.certificates import Identity, verify_certificate, verify_signature
from hanse.identity.transcript import server_half, transcript
from hanse.messages import (
    Challenge,
    ChallengeReply,
    Channel,
    Header,
    Heartbeat,
    Message,
    Quit,
    Register,
    Registered,
    Renew,
    ReturnCode,
)
from hanse.server import FederatedServer
from hanse.server.overseer import ScriptedOverseer

from .world import (
    PROJECT,
    Clock,
    Dialler,
    Project,
    Recorder,
    Wire,
    args,
    client_named,
    is_client,
    names,
    nonce,
    register_plain,
    register_secure,
    request,
    signed,
    target_of,
    unauthenticated,
)

MakeServer = Callable[..., FederatedServer]


def challenged(server: FederatedServer, site: Identity, **fields: Any) -> tuple[Challenge, ChallengeReply]:
    challenge = Challenge(site.name, PROJECT, nonce(), site.certificate)
    challenge = msgspec.structs.replace(challenge, **fields)
    reply = server.client_challenge(request(challenge)).payload
    assert isinstance(reply, ChallengeReply)
    return challenge, reply


@pytest.fixture
def server(deployed: MakeServer) -> FederatedServer:
    return deployed()


@pytest.fixture
def site(project: Project) -> Identity:
    return project.site("site-1")


# the first half -------------------------------------------------------------------------------------------------------


def test_the_server_proves_itself_over_the_clients_nonce(
    server: FederatedServer, project: Project, site: Identity
) -> None:
    challenge, reply = challenged(server, site)

    certified = verify_certificate(
        reply.certificate, project.roots, now=datetime.now(UTC), role_prefix="server", name="server"
    )
    said = transcript(
        project=PROJECT,
        client="site-1",
        server="server",
        client_nonce=challenge.nonce,
        server_nonce=reply.nonce,
        client_certificate=site.certificate,
        server_certificate=reply.certificate,
    )
    assert (reply.server, len(reply.nonce)) == ("server", 32)
    assert verify_signature(certified.public_key, reply.signature, server_half(said))


def test_each_challenge_gets_a_nonce_of_its_own(server: FederatedServer, site: Identity) -> None:
    assert challenged(server, site)[1].nonce != challenged(server, site)[1].nonce


def test_a_server_that_is_not_secure_is_not_challenged(make_server: MakeServer, site: Identity) -> None:
    reply = make_server().client_challenge(request(Challenge("site-1", PROJECT, nonce(), site.certificate)))

    assert unauthenticated(reply) == "server is not in secure mode"


def test_a_server_that_is_not_in_service_answers_comm_error(make_server: MakeServer, site: Identity) -> None:
    cold = make_server(overseer_agent=ScriptedOverseer())

    reply = cold.client_challenge(request(Challenge("site-1", PROJECT, nonce(), site.certificate)))

    assert (reply.return_code, reply.reason) == (ReturnCode.COMM_ERROR, "Server not in service")


def test_a_challenge_for_another_project_is_refused(server: FederatedServer, site: Identity) -> None:
    reply = server.client_challenge(request(Challenge("site-1", "league", nonce(), site.certificate)))

    assert unauthenticated(reply) == "this server serves project 'demo', not 'league'; check the kit"


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_nonce_of_another_length_is_refused(server: FederatedServer, site: Identity, size: int) -> None:
    reply = server.client_challenge(request(Challenge("site-1", PROJECT, b"n" * size, site.certificate)))

    assert reply.return_code is ReturnCode.INVALID_REQUEST
    assert reply.reason == f"client_nonce is '{size} bytes'; expected 32 bytes"


def test_a_challenge_with_something_else_for_a_certificate_is_refused(server: FederatedServer) -> None:
    reply = server.client_challenge(request(Challenge("site-1", PROJECT, nonce(), b"no PEM")))

    assert "not one X.509 certificate" in unauthenticated(reply)


@pytest.mark.parametrize("payload", [None, Heartbeat()])
def test_a_request_of_another_kind_is_invalid(server: FederatedServer, payload: Any) -> None:
    for handler in (server.client_challenge, server.register_client):
        reply = handler(request(payload))
        assert reply.return_code is ReturnCode.INVALID_REQUEST
        assert "payload" in reply.reason


def test_registration_sessions_are_bounded_in_number(server: FederatedServer, site: Identity) -> None:
    challenge = Challenge("site-1", PROJECT, nonce(), site.certificate)
    replies = [server.client_challenge(request(challenge, origin=f"stranger-{n}")) for n in range(1025)]

    assert [reply.return_code for reply in replies[:1024]] == [ReturnCode.OK] * 1024
    assert replies[1024].return_code is ReturnCode.COMM_ERROR
    assert "1024 registrations are under way" in replies[1024].reason


# the second half ------------------------------------------------------------------------------------------------------


def test_a_proven_client_gets_token_signature_and_session(server: FederatedServer, site: Identity) -> None:
    reply = register_secure(server, site)

    given = reply.payload
    assert isinstance(given, Registered)
    assert reply.return_code is ReturnCode.OK
    assert given.ssid == server.service.ssid != ""
    assert given.expires_in_s > 0
    assert server.verify_auth_token("site-1", given.token, given.token_signature)
    client = client_named(server, "site-1")
    assert (client.token, client.fqcn) == (given.token, "site-1")


def test_registration_without_a_challenge_is_refused(server: FederatedServer, site: Identity) -> None:
    reply = server.register_client(request(Register("site-1", PROJECT, site.certificate, b"signature")))

    assert "no registration session" in unauthenticated(reply)
    assert names(server) == []


def test_a_session_is_used_once(server: FederatedServer, site: Identity) -> None:
    proof = signed(site, *challenged(server, site))
    assert server.register_client(request(proof)).return_code is ReturnCode.OK

    reply = server.register_client(request(proof))

    assert "no registration session" in unauthenticated(reply)
    assert names(server) == ["site-1"]


def test_a_session_is_used_up_by_a_failure_too(server: FederatedServer, site: Identity) -> None:
    challenge, half = challenged(server, site)
    unauthenticated(server.register_client(request(signed(site, challenge, half, project="league"))))

    assert "no registration session" in unauthenticated(server.register_client(request(signed(site, challenge, half))))


def test_a_session_ends_after_its_time(make_server: MakeServer, deployed: MakeServer, site: Identity) -> None:
    server = deployed()
    server.clock = clock = Clock()
    challenge, half = challenged(server, site)
    clock.advance(59.9)
    late, late_half = challenged(server, site)  # in place of the first, whose nonce is gone with it
    unauthenticated(server.register_client(request(signed(site, challenge, half))))

    late, late_half = challenged(server, site)
    clock.advance(60)

    reason = unauthenticated(server.register_client(request(signed(site, late, late_half))))
    assert "no registration session" in reason
    assert names(server) == []


def test_the_duration_of_registration_is_an_attribute(make_server: MakeServer) -> None:
    assert make_server().max_reg_duration == 60


def test_an_answer_to_an_older_nonce_is_refused(server: FederatedServer, site: Identity) -> None:
    old = challenged(server, site)
    challenged(server, site)

    assert "does not prove the key" in unauthenticated(server.register_client(request(signed(site, *old))))


def test_an_answer_replayed_at_another_server_is_refused(
    server: FederatedServer, deployed: MakeServer, site: Identity, tmp_path: Path
) -> None:
    twin = deployed(tmp_path / "twin")  # the same identity, so that nothing but its nonce differs
    challenge, half = challenged(server, site)
    challenged(twin, site)

    assert "does not prove the key" in unauthenticated(twin.register_client(request(signed(site, challenge, half))))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("project", "league"),
        ("client", "site-2"),
        ("server", "another"),
        ("client_nonce", nonce(8)),
        ("server_nonce", nonce(9)),
        ("client_certificate", b""),
        ("server_certificate", b""),
    ],
)
def test_a_transcript_with_any_field_changed_is_refused(
    server: FederatedServer, site: Identity, field: str, value: Any
) -> None:
    proof = signed(site, *challenged(server, site), **{field: value})

    assert "does not prove the key" in unauthenticated(server.register_client(request(proof)))
    assert names(server) == []


def test_the_servers_half_sent_back_is_refused(server: FederatedServer, site: Identity) -> None:
    _, half = challenged(server, site)
    mirrored = Register("site-1", PROJECT, site.certificate, half.signature)

    assert "does not prove the key" in unauthenticated(server.register_client(request(mirrored)))


@pytest.mark.parametrize("signature", [b"", b"x", b"\x30\x06\x02\x01\x00\x02\x01\x00"])
def test_a_signature_that_is_none_is_refused(server: FederatedServer, site: Identity, signature: bytes) -> None:
    challenged(server, site)

    unauthenticated(server.register_client(request(Register("site-1", PROJECT, site.certificate, signature))))


def test_a_name_that_the_challenge_did_not_say_is_refused(server: FederatedServer, site: Identity) -> None:
    proof = msgspec.structs.replace(signed(site, *challenged(server, site)), client="site-2")

    reply = server.register_client(request(proof, origin="site-1"))

    assert "the challenge was for 'site-1'" in unauthenticated(reply)


def test_a_certificate_that_the_challenge_did_not_show_is_refused(
    server: FederatedServer, project: Project, site: Identity
) -> None:
    proof = signed(site, *challenged(server, site))
    proof = msgspec.structs.replace(proof, certificate=project.site("site-2").certificate)

    assert "another certificate" in unauthenticated(server.register_client(request(proof)))


def test_a_registration_for_another_project_is_refused(server: FederatedServer, site: Identity) -> None:
    proof = msgspec.structs.replace(signed(site, *challenged(server, site)), project="league")

    assert "this server serves project 'demo', not 'league'" in unauthenticated(server.register_client(request(proof)))


def test_a_certificate_for_another_name_is_refused(server: FederatedServer, project: Project) -> None:
    reply = register_secure(server, project.site("site-2"), "site-1")

    assert unauthenticated(reply) == "the certificate is for 'site-2', not for 'site-1'"


def test_a_certificate_of_another_authority_is_refused(server: FederatedServer, other_project: Project) -> None:
    reply = register_secure(server, other_project.site("site-1"))

    assert "issued by another authority" in unauthenticated(reply)


def test_an_expired_certificate_is_refused(server: FederatedServer, project: Project, tmp_path: Path) -> None:
    old = project.issued(tmp_path, "site-1", now=datetime.now(UTC) - timedelta(days=3), lifetime=timedelta(days=1))

    assert "expired on" in unauthenticated(register_secure(server, old))
    (refused,) = server.refused.views()
    assert (refused.name, refused.code) == ("site-1", "certificate-expired")
    assert "expired on" in refused.reason

    register_secure(server, project.site("site-1"))
    assert server.refused.views() == ()


def test_a_certificate_that_is_not_valid_yet_is_refused(
    server: FederatedServer, project: Project, tmp_path: Path
) -> None:
    early = project.issued(tmp_path, "site-1", now=datetime.now(UTC) + timedelta(days=3))

    assert "not valid before" in unauthenticated(register_secure(server, early))


def test_a_servers_certificate_registers_nobody(server: FederatedServer, project: Project) -> None:
    assert "for the role 'server'" in unauthenticated(register_secure(server, project.server()))


def test_a_jobs_certificate_registers_nobody(server: FederatedServer, tmp_path: Path) -> None:
    given = server.clients.job_credentials("site-1.job", "job")  # type: ignore[arg-type]
    (tmp_path / "cert.pem").write_bytes(given.certificate)
    (tmp_path / "key.pem").write_bytes(given.key)
    stolen = Identity.load(tmp_path / "cert.pem", tmp_path / "key.pem")

    assert "issued by another authority" in unauthenticated(register_secure(server, stolen, "site-1"))


def test_an_administrator_is_identified_alike_and_is_no_client(server: FederatedServer, project: Project) -> None:
    given = register_secure(server, project.admin("lee@demo")).payload

    assert isinstance(given, Registered)
    assert given.role == "admin:lead"
    assert given.token.startswith("admin:lead~")
    assert names(server) == []


def test_an_identity_failure_is_never_an_empty_success(
    server: FederatedServer, project: Project, other_project: Project
) -> None:
    for identity in (other_project.site("site-1"), project.server()):
        reply = register_secure(server, identity)
        assert reply.return_code is not ReturnCode.OK
        assert reply.payload is None
        assert reply.reason
    assert server.get_all_clients() == {}


# without certificates -------------------------------------------------------------------------------------------------


def test_a_server_that_is_not_secure_believes_names(make_server: MakeServer) -> None:
    server = make_server()

    headers = register_plain(server)

    assert names(server) == ["site-1"]
    assert server.verify_auth_token("site-1", headers[Header.TOKEN], headers[Header.TOKEN_SIGNATURE])


@pytest.mark.parametrize("name", ["", "server", "a.b", "../x", "x" * 64, "-x"])
def test_what_cannot_be_a_clients_name_is_refused(make_server: MakeServer, name: str) -> None:
    server = make_server()

    assert "cannot be a client's name" in unauthenticated(server.register_client(request(Register(name, PROJECT))))


@pytest.mark.parametrize("role", ["admin:", "admin:root", "admin:A B", "admin", "boss", "server", ""])
def test_a_role_that_there_is_not_is_refused(make_server: MakeServer, role: str) -> None:
    reply = make_server().register_client(request(Register("ada@demo", PROJECT, role=role)))

    assert "role" in unauthenticated(reply)


def test_an_administrator_cannot_be_called_server(make_server: MakeServer) -> None:
    reply = make_server().register_client(request(Register("server", PROJECT, role="admin:admin")))

    assert "name" in unauthenticated(reply)


# events ---------------------------------------------------------------------------------------------------------------


def test_registration_is_announced_before_and_after(make_server: MakeServer) -> None:
    first, second = Recorder(), Recorder()
    server = make_server(handlers=[first, second])

    register_plain(server)

    for recorder in (first, second):
        assert recorder.kinds == [EventType.CLIENT_REGISTER_RECEIVED, EventType.CLIENT_REGISTER_PROCESSED]
        received, processed = recorder.of(*EventType)
        assert (received.peer, received.scope, received.project) == ("site-1", "server", PROJECT)
        assert isinstance(received.message, Message)
        assert (processed.peer, processed.reason) == ("site-1", "")


def test_a_handler_may_refuse_a_registration(make_server: MakeServer) -> None:
    server = make_server(handlers=[Recorder({EventType.CLIENT_REGISTER_RECEIVED: Refused("not on Sundays")})])

    reply = server.register_client(request(Register("site-1", PROJECT)))

    assert unauthenticated(reply) == "not on Sundays"
    assert names(server) == []


def test_a_handler_that_crashes_refuses(make_server: MakeServer) -> None:
    after = Recorder()
    server = make_server(handlers=[Recorder({EventType.CLIENT_REGISTER_RECEIVED: ZeroDivisionError("oh")}), after])

    reply = server.register_client(request(Register("site-1", PROJECT)))

    assert unauthenticated(reply) == "Recorder failed at client_register_received: oh"
    assert names(server) == []
    assert EventType.CLIENT_REGISTER_RECEIVED not in after.kinds


def test_a_notice_whose_handler_raises_hurts_nobody(make_server: MakeServer) -> None:
    after = Recorder()
    server = make_server(handlers=[Recorder({EventType.CLIENT_REGISTER_PROCESSED: Refused("too late")}), after])

    register_plain(server)

    assert names(server) == ["site-1"]
    assert EventType.CLIENT_REGISTER_PROCESSED in after.kinds


def test_handlers_are_asked_about_the_proven_only(
    deployed: MakeServer, other_project: Project, project: Project
) -> None:
    recorder = Recorder()
    server = deployed(handlers=[recorder])

    register_secure(server, other_project.site("site-1"))
    assert recorder.of(EventType.CLIENT_REGISTER_RECEIVED) == []

    register_secure(server, project.site("site-1"))
    assert [context.peer for context in recorder.of(EventType.CLIENT_REGISTER_RECEIVED)] == ["site-1"]


# a check that crashes -------------------------------------------------------------------------------------------------


def test_a_check_that_crashes_lets_nobody_in(
    server: FederatedServer, site: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    challenge, half = challenged(server, site)

    def crash(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a bug in a check")

    monkeypatch.setattr("hanse.server.identification.verify_certificate", crash)
    reply = server.register_client(request(signed(site, challenge, half)))

    assert (reply.return_code, reply.payload) == (ReturnCode.INTERNAL, None)
    assert "bug" in reply.reason
    assert "ZeroDivision" not in reply.reason
    assert names(server) == []


# over the wire --------------------------------------------------------------------------------------------------------


def test_a_client_registers_over_its_stream_and_is_its_from_then_on(server: FederatedServer, dialler: Dialler) -> None:
    site = dialler.site(server)

    assert names(server) == ["site-1"]
    assert is_client(server, "site-1")
    assert site.registered is not None
    assert site.welcome is not None
    assert site.registered.ssid == site.welcome.ssid == server.service.ssid
    assert site.ask(Channel.SERVER, "heartbeat", Heartbeat()).return_code is ReturnCode.OK


def test_a_client_of_another_authority_is_kept_out_by_tls(
    server: FederatedServer, dialler: Dialler, other_project: Project
) -> None:
    stolen = other_project.site("site-1")

    refused = dialler.refused(dialler.site_wire(server, identity=stolen, tls=dialler.tls(stolen)))

    assert isinstance(refused, Unreachable)
    assert names(server) == []


def test_a_client_without_a_certificate_is_kept_out_by_tls(server: FederatedServer, dialler: Dialler) -> None:
    assert isinstance(dialler.refused(dialler.site_wire(server, tls=dialler.tls(None))), Unreachable)


def test_a_client_finds_out_a_server_of_another_authority(
    server: FederatedServer, dialler: Dialler, other_project: Project
) -> None:
    refused = dialler.refused(
        dialler.site_wire(server, tls=dialler.tls(other_project.site("site-1"), other_project.roots))
    )

    assert isinstance(refused, Unauthenticated)
    assert "is not one that the project's CA issued" in refused.reason


def test_a_stream_under_another_name_than_its_certificates_is_refused(
    server: FederatedServer, dialler: Dialler, project: Project
) -> None:
    refused = dialler.refused(dialler.site_wire(server, "site-2", tls=dialler.tls(project.site("site-1"))))

    assert isinstance(refused, Unauthenticated)
    assert refused.reason == "the certificate is for 'site-1', not for 'site-2'"
    assert names(server) == []


def test_a_stream_of_another_project_is_refused(server: FederatedServer, dialler: Dialler) -> None:
    refused = dialler.refused(dialler.site_wire(server, project="league"))

    assert refused.reason == "this server serves project 'demo', not 'league'; check the kit"


def test_an_expired_certificate_is_refused_behind_a_proxy_too(
    make_server: MakeServer, project: Project, dialler: Dialler, tmp_path: Path
) -> None:
    server = make_server()
    server.deploy(args(tmp_path / "ws"), project.grpc_args(require_client_certificate=False), secure_train=True)
    old = project.issued(tmp_path, "site-1", now=datetime.now(UTC) - timedelta(days=3), lifetime=timedelta(days=1))

    refused = dialler.refused(dialler.site_wire(server, identity=old, tls=dialler.tls(None)))

    assert isinstance(refused, Unauthenticated)
    assert "expired on" in refused.reason


def test_a_client_behind_a_proxy_proves_itself_by_the_challenge(
    make_server: MakeServer, project: Project, dialler: Dialler, tmp_path: Path
) -> None:
    server = make_server()
    server.deploy(args(tmp_path / "ws"), project.grpc_args(require_client_certificate=False), secure_train=True)

    site = dialler.site(server, tls=dialler.tls(None))

    assert names(server) == ["site-1"]
    assert site.ask(Channel.SERVER, "heartbeat", Heartbeat()).return_code is ReturnCode.OK


@pytest.mark.parametrize("fqcn", ["site-1", "site-1.job-1", "site-2.job-1"])
def test_nobody_takes_anothers_address_by_registering_as_themselves(
    make_server: MakeServer, project: Project, dialler: Dialler, tmp_path: Path, fqcn: str
) -> None:
    server = make_server()
    server.deploy(args(tmp_path / "ws"), project.grpc_args(require_client_certificate=False), secure_train=True)
    victim = dialler.site(server, "site-1", tls=dialler.tls(None))

    refused = dialler.refused(dialler.site_wire(server, "site-2", fqcn=fqcn, tls=dialler.tls(None)))

    assert isinstance(refused, Unauthenticated)
    assert is_client(server, "site-1")
    assert victim.ask(Channel.SERVER, "heartbeat", Heartbeat()).return_code is ReturnCode.OK
    assert names(server) == ["site-1"]


def test_an_unproven_stream_can_do_nothing_but_identify_itself(server: FederatedServer, dialler: Dialler) -> None:
    stranger = dialler.stranger(server)

    for topic, payload in (("heartbeat", Heartbeat()), ("renew", Renew()), ("quit", Quit())):
        refused = stranger.refused(Channel.SERVER, topic, payload)
        assert "site-1 may not send" in refused.reason
    assert names(server) == []


def test_headers_that_a_peer_writes_itself_prove_nothing(server: FederatedServer, dialler: Dialler) -> None:
    victim = dialler.site(server, "site-1")
    assert victim.credentials is not None
    other = dialler.site(server, "site-2")
    before = client_named(server, "site-2").last_connect_time

    forged = {
        Header.CLIENT: "site-1",
        Header.TOKEN: victim.credentials.token,
        Header.TOKEN_SIGNATURE: victim.credentials.signature,
        Header.ORIGIN: "site-1",
    }
    other.ask(Channel.SERVER, "heartbeat", Heartbeat(), **forged)

    assert client_named(server, "site-2").last_connect_time > before


def test_a_challenge_of_one_stream_is_no_session_of_another(
    make_server: MakeServer, project: Project, dialler: Dialler, tmp_path: Path
) -> None:
    server = make_server()
    server.deploy(args(tmp_path / "ws"), project.grpc_args(require_client_certificate=False), secure_train=True)
    site = project.site("site-1")
    mine = dialler.dial(Wire(target_of(server), "site-1", tls=dialler.tls(None)))
    theirs = dialler.dial(Wire(target_of(server), "site-1", tls=dialler.tls(None)))
    challenge = Challenge("site-1", PROJECT, nonce(), site.certificate)
    half = mine.ask(Channel.SERVER, "challenge", challenge).payload
    assert isinstance(half, ChallengeReply)

    refused = theirs.refused(Channel.SERVER, "register", signed(site, challenge, half))
    assert "no registration session" in refused.reason

    assert mine.ask(Channel.SERVER, "register", signed(site, challenge, half)).return_code is ReturnCode.OK


def test_a_replayed_registration_is_refused_over_the_wire(
    server: FederatedServer, project: Project, dialler: Dialler
) -> None:
    site = project.site("site-1")
    stream = dialler.stranger(server)
    challenge = Challenge("site-1", PROJECT, nonce(), site.certificate)
    half = stream.ask(Channel.SERVER, "challenge", challenge).payload
    assert isinstance(half, ChallengeReply)
    proof = signed(site, challenge, half)
    stream.ask(Channel.SERVER, "register", proof)

    again = dialler.stranger(server)
    assert "no registration session" in again.refused(Channel.SERVER, "register", proof).reason
    again.ask(Channel.SERVER, "challenge", challenge)
    assert "does not prove the key" in again.refused(Channel.SERVER, "register", proof).reason


def test_an_administrator_registers_over_the_wire(server: FederatedServer, dialler: Dialler) -> None:
    ada = dialler.site(server, "ada@demo")

    assert ada.registered is not None
    assert ada.registered.role == "admin:admin"
    assert names(server) == []
    assert "may not send" in ada.refused(Channel.SERVER, "heartbeat", Heartbeat()).reason


def test_a_gate_that_crashes_lets_nothing_pass(
    server: FederatedServer, dialler: Dialler, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = dialler.site(server)
    before = client_named(server, "site-1").last_connect_time

    def crash(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a bug in the gate")

    monkeypatch.setattr("hanse.server.admittance.demand_use", crash)
    refused = site.refused(Channel.SERVER, "heartbeat", Heartbeat())

    assert "bug" in refused.reason
    assert "ZeroDivision" not in refused.reason
    assert client_named(server, "site-1").last_connect_time == before


def test_an_authorization_that_crashes_opens_no_stream(
    server: FederatedServer, dialler: Dialler, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a bug in the check")

    monkeypatch.setattr("hanse.server.admittance.split_cell", crash)
    refused = dialler.refused(dialler.site_wire(server))

    assert "bug" in refused.reason
    assert names(server) == []


def test_a_wire_registration_at_a_cold_server_is_not_in_service(
    make_server: MakeServer, project: Project, dialler: Dialler, tmp_path: Path
) -> None:
    server = make_server(overseer_agent=ScriptedOverseer())
    server.deploy(args(tmp_path / "ws"), project.grpc_args(), secure_train=True)

    refused = dialler.refused(dialler.site_wire(server))

    assert "Server not in service" in refused.reason
    assert names(server) == []
