"""Registered clients: tokens, heartbeats, limits, one name registered twice, quitting, being disabled."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hanse.cell.refusals import RemoteError
from hanse.coordination.service import Verdict
from hanse.errors import HanseError, StoreFailed, Unauthenticated
from hanse.events import EventType, Refused
from hanse.identity.tokens import CLIENT_SCOPE, admin_scope, new_token
from hanse.ids import ClientName, Digest, JobId, Token
from hanse.job import Resources
from hanse.messages import (
    Channel,
    Credentials,
    Header,
    Heartbeat,
    HeartbeatReply,
    JobEnded,
    JobFailure,
    Message,
    Quit,
    Register,
    Registered,
    Renew,
    ReturnCode,
)
from hanse.server import FederatedServer
from hanse.server.federated_server import TaskMetaInfo
from hanse.storage.memory import MemoryStore

from .world import (
    PROJECT,
    Admin,
    Clock,
    Dialler,
    Project,
    Recorder,
    Wire,
    args,
    client_named,
    is_client,
    names,
    on_loop,
    peer_of,
    register_plain,
    register_secure,
    request,
    settings,
    target_of,
    transferring,
    unauthenticated,
    wait,
)

MakeServer = Callable[..., FederatedServer]


def beat(server: FederatedServer, headers: dict[str, str], *jobs: str) -> Message:
    return server.client_heartbeat(request(Heartbeat(tuple(map(JobId, jobs))), **headers))


def ok(reply: Message) -> Any:
    assert reply.return_code is ReturnCode.OK, reply.reason
    return reply.payload


def foreign(
    server: FederatedServer, name: str, *, lifetime_s: float = 600, scope: str = CLIENT_SCOPE
) -> dict[str, str]:
    """The headers of a client with a token that *server* signed and does not know: as after a restart."""
    token = new_token(now_s=1e9 if lifetime_s < 0 else 4e9, lifetime_s=lifetime_s, scope=scope)
    signature = server.sign_auth_token(name, token)
    return {Header.CLIENT: name, Header.TOKEN: token, Header.TOKEN_SIGNATURE: signature}


# tokens ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_secure", [False, True])
def test_a_signature_binds_one_token_to_one_name(
    make_server: MakeServer, deployed: MakeServer, is_secure: bool
) -> None:
    server = deployed() if is_secure else make_server()
    signature = server.sign_auth_token("site-1", "token")

    assert server.verify_auth_token("site-1", "token", signature)
    assert not server.verify_auth_token("site-2", "token", signature)
    assert not server.verify_auth_token("site-1", "token2", signature)
    assert not server.verify_auth_token("site-1", "token", signature[:-1])
    for none in ("", "=", "é", "x" * 1000):
        assert not server.verify_auth_token("site-1", "token", none)


@pytest.mark.parametrize(
    ("name", "token"), [("ab", "c"), ("abc", ""), ("", "abc"), ("a\x00", "bc"), ("a", "bc\x00"), ("a", " bc")]
)
def test_a_signature_is_not_ambiguous_about_where_the_name_ends(make_server: MakeServer, name: str, token: str) -> None:
    server = make_server()

    assert not server.verify_auth_token(name, token, server.sign_auth_token("a", "bc"))


def test_another_servers_signature_is_none(make_server: MakeServer) -> None:
    assert not make_server().verify_auth_token("site-1", "token", make_server().sign_auth_token("site-1", "token"))


def test_a_servers_signature_outlives_its_process(
    make_server: MakeServer, deployed: MakeServer, deployed_plain: MakeServer
) -> None:
    for deploy in (deployed, deployed_plain):
        before = deploy()
        signature = before.sign_auth_token("site-1", "token")
        before.close()

        assert deploy().verify_auth_token("site-1", "token", signature)


# heartbeats -----------------------------------------------------------------------------------------------------------


def test_a_heartbeat_refreshes_its_client_and_no_other(make_server: MakeServer) -> None:
    server = make_server()
    server.clock = clock = Clock()
    headers = register_plain(server, "site-1")
    register_plain(server, "site-2")
    clock.advance(5)

    reply = ok(beat(server, headers))

    assert reply == HeartbeatReply((), server.service.ssid)
    assert client_named(server, "site-1").last_connect_time == 1005
    assert client_named(server, "site-2").last_connect_time == 1000


def test_the_heartbeat_timeout_is_measured_on_the_servers_monotonic_clock(make_server: MakeServer) -> None:
    server = make_server(heart_beat_timeout=30)
    server.clock = clock = Clock()
    headers = register_plain(server, "site-1")
    register_plain(server, "site-2")
    clock.advance(29)
    ok(beat(server, headers))
    clock.advance(1)

    server.remove_dead_clients()

    assert names(server) == ["site-1"]


def test_the_liveness_loop_of_a_deployed_server_removes_dead_clients(deployed_plain: MakeServer) -> None:
    gone = threading.Event()
    clock = Clock()

    class Watch(Admin):
        def client_dead(self, client: Any) -> None:
            super().client_dead(client)
            gone.set()

    server = deployed_plain(heart_beat_timeout=30)
    server.clock = clock
    server.set_admin_server(admin := Watch())
    register_plain(server, "site-1")
    clock.advance(30)
    register_plain(server, "site-2")  # whoever comes wakes the loop, which looks at its clock again

    assert gone.wait(10)
    assert names(server) == ["site-2"]
    assert admin.dead == ["site-1"]


@pytest.mark.parametrize("missing", [Header.CLIENT, Header.TOKEN])
def test_a_heartbeat_that_does_not_say_who_it_is_is_refused(make_server: MakeServer, missing: str) -> None:
    server = make_server()
    headers = register_plain(server)
    del headers[missing]

    assert "names no client or no token" in unauthenticated(beat(server, headers))


@pytest.mark.parametrize("token", ["", "x", "client~0~0", "client~" + "0" * 32 + "~99999999999"])
def test_a_token_that_is_not_the_servers_is_refused(make_server: MakeServer, token: str) -> None:
    server = make_server()
    headers = register_plain(server) | {Header.TOKEN: token}

    unauthenticated(beat(server, headers))


def test_a_stolen_token_on_another_name_is_refused_and_refreshes_nobody(make_server: MakeServer) -> None:
    server = make_server()
    server.clock = clock = Clock()
    stolen = register_plain(server, "site-1")
    register_plain(server, "site-2")
    clock.advance(5)

    reply = beat(server, stolen | {Header.CLIENT: "site-2"})

    assert unauthenticated(reply) == "the token is not site-2's"
    assert {client.last_connect_time for client in server.get_all_clients().values()} == {1000}


def test_a_stolen_token_does_not_reactivate_another_name(make_server: MakeServer) -> None:
    server = make_server()

    unauthenticated(beat(server, foreign(server, "site-1") | {Header.CLIENT: "site-2"}))

    assert names(server) == []


def test_a_validly_signed_token_of_before_the_restart_reactivates_its_client(make_server: MakeServer) -> None:
    server = make_server()
    headers = foreign(server, "site-1")

    assert ok(beat(server, headers)).ssid == server.service.ssid

    assert list(server.get_all_clients()) == [headers[Header.TOKEN]]
    assert names(server) == ["site-1"]


def test_a_reactivated_client_offers_what_it_offered_before_the_restart(make_server: MakeServer) -> None:
    server = make_server()
    heartbeat = Heartbeat(resources=Resources(gpus=2), release="0.2.0")

    ok(server.client_heartbeat(request(heartbeat, **foreign(server, "site-1"))))

    assert client_named(server, "site-1").props == {"resources": Resources(gpus=2), "release": "0.2.0"}


def test_reactivation_keeps_within_the_limit(make_server: MakeServer) -> None:
    server = make_server(max_num_clients=2)
    ok(beat(server, foreign(server, "site-1")))
    ok(beat(server, foreign(server, "site-2")))

    assert "the server is full" in unauthenticated(beat(server, foreign(server, "site-3")))
    assert names(server) == ["site-1", "site-2"]


def test_reactivation_does_not_take_a_name_that_another_token_holds(make_server: MakeServer) -> None:
    server = make_server()
    before = foreign(server, "site-1")
    headers = register_plain(server, "site-1")

    reason = unauthenticated(beat(server, before))

    assert reason == "Client ID already registered as a client: site-1"
    assert list(server.get_all_clients()) == [headers[Header.TOKEN]]


@pytest.mark.parametrize("scope", [admin_scope("admin"), "job:digits-1"])
def test_a_token_of_another_kind_is_no_clients(make_server: MakeServer, scope: str) -> None:
    server = make_server()

    assert unauthenticated(beat(server, foreign(server, "site-1", scope=scope))) == "the token is not a client's"
    assert names(server) == []


def test_an_expired_token_reactivates_nobody(make_server: MakeServer) -> None:
    server = make_server()

    assert "expired" in unauthenticated(beat(server, foreign(server, "site-1", lifetime_s=-1)))
    assert names(server) == []


def test_a_token_without_the_servers_signature_reactivates_nobody(make_server: MakeServer) -> None:
    server = make_server()
    headers = foreign(server, "site-1")
    del headers[Header.TOKEN_SIGNATURE]

    assert "not one that this project's server gave" in unauthenticated(beat(server, headers))
    assert names(server) == []


def test_jobs_that_the_server_does_not_run_come_back_to_be_aborted(deployed_plain: MakeServer) -> None:
    server = deployed_plain()
    headers = register_plain(server)

    assert ok(beat(server, headers, "digits-1", "digits-2")).abort_jobs == ("digits-1", "digits-2")


def test_heartbeats_are_announced_and_may_be_refused(make_server: MakeServer) -> None:
    recorder = Recorder()
    server = make_server(handlers=[recorder])
    headers = register_plain(server)
    recorder.heard.clear()
    ok(beat(server, headers))
    assert recorder.kinds == [EventType.CLIENT_HEARTBEAT_RECEIVED, EventType.CLIENT_HEARTBEAT_PROCESSED]
    assert [context.peer for context in recorder.of(*EventType)] == ["site-1", "site-1"]

    recorder.raising[EventType.CLIENT_HEARTBEAT_RECEIVED] = Refused("maintenance")
    assert unauthenticated(beat(server, headers)) == "maintenance"
    recorder.raising[EventType.CLIENT_HEARTBEAT_RECEIVED] = KeyError("crash")
    assert "Recorder failed at client_heartbeat_received" in unauthenticated(beat(server, headers))


def test_the_admin_server_hears_of_heartbeats_and_its_failure_is_its_own(make_server: MakeServer) -> None:
    server = make_server()
    headers = register_plain(server)
    server.set_admin_server(admin := Admin())
    ok(beat(server, headers))
    assert admin.heard == ["site-1"]

    server.set_admin_server(Admin(fails=True))
    ok(beat(server, headers))

    server.set_admin_server(None)
    ok(beat(server, headers))
    assert admin.heard == ["site-1"]


def test_a_heartbeat_over_the_wire_refreshes_the_client(deployed: MakeServer, dialler: Dialler) -> None:
    server = deployed()
    site = dialler.site(server)
    before = client_named(server, "site-1").last_connect_time

    reply = site.ask(Channel.SERVER, "heartbeat", Heartbeat((JobId("digits-1"),))).payload

    assert reply == HeartbeatReply((JobId("digits-1"),), server.service.ssid)
    assert client_named(server, "site-1").last_connect_time > before


def test_a_client_of_before_the_restart_comes_back_with_its_token(deployed: MakeServer, dialler: Dialler) -> None:
    recorder = Recorder()
    first = deployed()
    site = dialler.site(first)
    credentials, former = site.credentials, first.service.ssid
    dialler.close()
    first.close()
    second = deployed(handlers=[recorder])

    back = dialler.site(second, credentials=credentials)
    assert names(second) == []
    reply = back.ask(Channel.SERVER, "heartbeat", Heartbeat()).payload

    assert names(second) == ["site-1"]
    assert isinstance(reply, HeartbeatReply)
    assert reply.ssid == second.service.ssid != former
    assert is_client(second, "site-1")


def test_a_token_that_was_replaced_or_given_up_does_not_come_back_after_a_restart(
    deployed: MakeServer, dialler: Dialler
) -> None:
    first = deployed()
    replaced = dialler.site(first).credentials
    renewed = dialler.site(first)
    former = renewed.credentials
    renewed.ask(Channel.SERVER, "renew", Renew())
    quitter = dialler.site(first, "site-2")
    quitter.ask(Channel.SERVER, "quit", Quit())
    dialler.close()
    first.close()

    second = deployed()

    for name, credentials in (("site-1", replaced), ("site-1", former), ("site-2", quitter.credentials)):
        refused = dialler.refused(dialler.site_wire(second, name, credentials=credentials))
        assert "revoked" in refused.reason
        headers = {
            Header.CLIENT: name,
            Header.TOKEN: credentials.token,
            Header.TOKEN_SIGNATURE: credentials.signature,
        }
        assert "revoked" in unauthenticated(beat(second, headers))
    assert names(second) == []


class _Away(MemoryStore):
    """A store that cannot remember which token counts while it is away."""

    is_away = False

    async def keep_token(self, epoch: int, client: str, fingerprint: str, *, now_s: float, until_s: float) -> None:
        if self.is_away:
            raise StoreFailed("writing", "the database is away")
        await super().keep_token(epoch, client, fingerprint, now_s=now_s, until_s=until_s)


def test_while_the_store_is_away_nobody_registers_and_who_is_there_goes_on(
    deployed: MakeServer, dialler: Dialler
) -> None:
    store = _Away()
    server = deployed(snapshot_persistor=store)
    site = dialler.site(server)
    store.is_away = True

    assert "the database is away" in site.refused(Channel.SERVER, "renew", Renew()).reason
    with pytest.raises(HanseError, match="the database is away") as refused:
        dialler.site(server, "site-2")
    assert refused.value.retryable
    assert isinstance(site.ask(Channel.SERVER, "heartbeat", Heartbeat()).payload, HeartbeatReply)

    store.is_away = False
    site.ask(Channel.SERVER, "renew", Renew())
    dialler.site(server, "site-2")
    assert sorted(names(server)) == ["site-1", "site-2"]


# limits ---------------------------------------------------------------------------------------------------------------


def test_a_full_server_says_so(make_server: MakeServer) -> None:
    server = make_server(max_num_clients=1)
    register_plain(server, "site-1")

    reply = server.register_client(request(Register("site-2", PROJECT)))

    assert "the server is full: 1 clients are registered" in unauthenticated(reply)
    assert names(server) == ["site-1"]


def test_a_full_server_takes_a_name_that_it_has_again(make_server: MakeServer) -> None:
    server = make_server(max_num_clients=1)
    register_plain(server, "site-1")

    register_plain(server, "site-1")

    assert names(server) == ["site-1"]


def test_a_client_that_leaves_makes_room(make_server: MakeServer) -> None:
    server = make_server(max_num_clients=1)
    headers = register_plain(server, "site-1")
    ok(server.quit_client(request(Quit(), **headers)))

    register_plain(server, "site-2")

    assert names(server) == ["site-2"]


def test_concurrent_registrations_do_not_pass_the_limit(make_server: MakeServer) -> None:
    server = make_server(max_num_clients=5)
    start = threading.Barrier(24)
    codes: list[ReturnCode] = []

    def come(number: int) -> None:
        start.wait(10)
        if number % 2:
            reply = server.register_client(request(Register(f"site-{number}", PROJECT)))
        else:
            reply = beat(server, foreign(server, f"site-{number}"))
        codes.append(reply.return_code)

    threads = [threading.Thread(target=come, args=(number,)) for number in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)

    assert sorted(codes) == sorted([ReturnCode.OK] * 5 + [ReturnCode.UNAUTHENTICATED] * 19)
    assert len(server.get_all_clients()) == 5


def test_concurrent_registrations_of_one_name_leave_one_token(make_server: MakeServer) -> None:
    server = make_server()
    given: list[dict[str, str]] = []
    threads = [threading.Thread(target=lambda: given.append(register_plain(server))) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)

    (token,) = server.get_all_clients()
    alive = [headers for headers in given if beat(server, headers).return_code is ReturnCode.OK]
    assert [headers[Header.TOKEN] for headers in alive] == [token]


# the same name again --------------------------------------------------------------------------------------------------


def test_the_same_name_again_logs_out_the_older_token_completely(make_server: MakeServer) -> None:
    server = make_server()
    server.set_admin_server(admin := Admin())
    old = register_plain(server)
    new = register_plain(server)

    assert list(server.get_all_clients()) == [new[Header.TOKEN]]
    assert admin.dead == ["site-1"]
    assert "revoked" in unauthenticated(beat(server, old))
    unauthenticated(server.quit_client(request(Quit(), **old)))
    assert server.logout_client(old[Header.TOKEN]) is None
    ok(beat(server, new))


def test_an_older_token_stays_out_when_the_newer_one_has_left(make_server: MakeServer) -> None:
    server = make_server()
    old = register_plain(server)
    new = register_plain(server)
    ok(server.quit_client(request(Quit(), **new)))

    assert "revoked" in unauthenticated(beat(server, old))
    assert names(server) == []


def test_an_older_token_opens_no_stream_and_moves_no_tensor(deployed: MakeServer, dialler: Dialler) -> None:
    server = deployed()
    old = dialler.site(server)
    assert old.credentials is not None
    new = dialler.site(server)

    ended = wait(old.ended())
    assert ended is not None
    assert "replaced by a newer one" in ended.reason
    refused = dialler.refused(dialler.site_wire(server, credentials=old.credentials))
    assert isinstance(refused, Unauthenticated)
    assert "revoked" in refused.reason
    assert "revoked" in moving(old, server, dialler).reason
    assert new.ask(Channel.SERVER, "heartbeat", Heartbeat()).return_code is ReturnCode.OK


def moving(wire: Wire, server: FederatedServer, dialler: Dialler) -> HanseError:
    """Return what the server refuses *wire*'s tensor calls with."""
    tls = dialler.tls(dialler.project.site(str(wire.fqcn)))
    with transferring(wire, target_of(server), tls) as transfers, pytest.raises(HanseError) as refused:
        wait(transfers.missing("job/digits-1", [Digest("0" * 64)]))
    return refused.value


def test_a_stream_whose_token_was_replaced_by_a_direct_call_is_refused_everywhere(
    deployed: MakeServer, dialler: Dialler, project: Project
) -> None:
    server = deployed()
    old = dialler.site(server)
    ok(register_secure(server, project.site("site-1")))

    for topic, payload in (
        ("heartbeat", Heartbeat()),
        ("quit", Quit()),
        ("renew", Renew()),
        ("job_failure", JobFailure(JobId("digits-1"), "exception", "no")),
        ("job_ended", JobEnded(JobId("digits-1"), 1, 1)),
    ):
        refused = old.refused(Channel.SERVER, topic, payload)
        assert isinstance(refused, Unauthenticated), topic
        assert "revoked" in refused.reason
    assert "revoked" in moving(old, server, dialler).reason


# renewal --------------------------------------------------------------------------------------------------------------


def test_a_token_is_renewed_over_the_stream_and_the_old_one_is_dead(deployed: MakeServer, dialler: Dialler) -> None:
    server = deployed()
    site = dialler.site(server)
    old = site.credentials
    assert old is not None

    given = site.ask(Channel.SERVER, "renew", Renew()).payload

    assert isinstance(given, Registered)
    assert list(server.get_all_clients()) == [given.token]
    assert given.token != old.token
    assert server.verify_auth_token("site-1", given.token, given.token_signature)
    assert site.ask(Channel.SERVER, "heartbeat", Heartbeat()).return_code is ReturnCode.OK
    refused = dialler.refused(dialler.site_wire(server, credentials=old))
    assert "revoked" in refused.reason


def test_an_administrators_renewed_token_has_their_role_and_no_more(deployed: MakeServer, dialler: Dialler) -> None:
    server = deployed()
    mel = dialler.site(server, "mel@demo")

    given = mel.ask(Channel.SERVER, "renew", Renew()).payload

    assert isinstance(given, Registered)
    assert given.token.startswith("admin:member~")
    assert names(server) == []


def test_a_token_that_expires_ends_what_its_stream_may_ask(
    deployed: MakeServer, dialler: Dialler, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server = deployed(arguments=args(tmp_path / "ws", settings=settings(token_lifetime_s=1e-3)))
    site = dialler.site(server)
    assert site.registered is not None
    monkeypatch.setattr("hanse.server.admittance.refuse_expired", _expired)

    for topic, payload in (("heartbeat", Heartbeat()), ("renew", Renew())):
        refused = site.refused(Channel.SERVER, topic, payload)
        assert isinstance(refused, Unauthenticated), topic
        assert "expired" in refused.reason
    assert "expired" in dialler.refused(dialler.site_wire(server, credentials=site.credentials)).reason
    assert "expired" in moving(site, server, dialler).reason


def _expired(info: Any, *, now_s: float) -> None:
    """Look at the token a minute later."""
    if info.is_expired(now_s + 60):
        raise Unauthenticated("the token has expired; register again")


def test_a_revoked_token_is_remembered_as_long_as_it_would_live(deployed_plain: MakeServer, tmp_path: Path) -> None:
    server = deployed_plain(arguments=args(tmp_path / "ws", settings=settings(token_lifetime_s=86400.0)))
    server.clock = clock = Clock()
    old = register_plain(server)
    register_plain(server)
    clock.advance(2 * 3600)
    for _ in range(2):  # every revocation forgets those that are over
        latest = register_plain(server)
    ok(server.quit_client(request(Quit(), **latest)))

    assert "revoked" in unauthenticated(beat(server, old))
    assert names(server) == []


# stolen tokens over the wire ------------------------------------------------------------------------------------------


def test_a_stolen_token_opens_no_stream_under_another_name(deployed: MakeServer, dialler: Dialler) -> None:
    server = deployed()
    site = dialler.site(server)
    assert site.credentials is not None
    stolen = site.credentials

    as_itself = dialler.refused(dialler.site_wire(server, "site-2", credentials=stolen))
    renamed = Credentials("site-2", stolen.token, stolen.signature, stolen.ssid)
    as_another = dialler.refused(dialler.site_wire(server, "site-2", credentials=renamed))

    assert isinstance(as_itself, Unauthenticated)
    assert as_itself.reason == "the token is site-1's, and the stream says 'site-2'"
    assert isinstance(as_another, Unauthenticated)
    assert "not one that this project's server gave to site-2" in as_another.reason


def test_a_stolen_token_needs_its_owners_certificate_too(
    deployed: MakeServer, dialler: Dialler, project: Project
) -> None:
    server = deployed()
    site = dialler.site(server)

    refused = dialler.refused(
        dialler.site_wire(server, "site-1", credentials=site.credentials, tls=dialler.tls(project.site("site-2")))
    )

    assert refused.reason == "the certificate is for 'site-2', not for 'site-1'"
    assert is_client(server, "site-1")


@pytest.mark.parametrize("token", ["", "nonsense", "client~" + "0" * 32 + "~99999999999"])
def test_a_made_up_token_opens_no_stream(deployed: MakeServer, dialler: Dialler, token: str) -> None:
    server = deployed()
    forged = Credentials("site-1", Token(token), "signature", server.service.ssid)

    assert isinstance(dialler.refused(dialler.site_wire(server, credentials=forged)), Unauthenticated)


def test_a_clients_token_opens_no_jobs_cell(deployed: MakeServer, dialler: Dialler) -> None:
    server = deployed()
    site = dialler.site(server)

    refused = dialler.refused(dialler.site_wire(server, fqcn="site-1.digits-1", credentials=site.credentials))

    assert refused.reason == "a client's token does not open 'site-1.digits-1'"


def _running_any_job(server: FederatedServer, monkeypatch: pytest.MonkeyPatch) -> FederatedServer:
    monkeypatch.setattr(server.jobs.live, "demand_alive", lambda job_id: None)
    return server


def test_a_jobs_token_opens_its_own_cell_alone(
    deployed: MakeServer, dialler: Dialler, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = _running_any_job(deployed(), monkeypatch)
    given = server.clients.job_credentials("site-1.digits-1", JobId("digits-1"))  # type: ignore[arg-type]

    for fqcn in ("site-1", "site-1.digits-2", "site-2.digits-1"):
        refused = dialler.refused(dialler.job_wire(server, fqcn, given))
        assert isinstance(refused, Unauthenticated), fqcn
    dialler.dial(dialler.job_wire(server, "site-1.digits-1", given))


def test_the_jobs_processes_of_a_client_that_quit_count_no_more(
    deployed: MakeServer, dialler: Dialler, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = _running_any_job(deployed(), monkeypatch)
    site = dialler.site(server)
    given = server.clients.job_credentials("site-1.digits-1", JobId("digits-1"))  # type: ignore[arg-type]
    job = dialler.dial(dialler.job_wire(server, "site-1.digits-1", given))

    site.ask(Channel.SERVER, "quit", Quit())

    ended = wait(job.ended())
    assert isinstance(ended, Unauthenticated)
    assert "has quit" in ended.reason
    assert "has quit" in dialler.refused(dialler.job_wire(server, "site-1.digits-1", given)).reason
    dialler.site(server)
    dialler.dial(dialler.job_wire(server, "site-1.digits-1", given))


def test_a_runs_token_is_good_on_this_machine_alone(deployed_plain: MakeServer, dialler: Dialler) -> None:
    server = deployed_plain()
    given = server.clients.job_credentials("server.digits-1", JobId("digits-1"))  # type: ignore[arg-type]

    refused = dialler.refused(dialler.job_wire(server, "server.digits-1", given))

    assert refused.reason == "a run's process connects to its server on the same machine only"


def test_a_runs_process_gets_no_certificate(deployed: MakeServer) -> None:
    given = deployed().clients.job_credentials("server.digits-1", JobId("digits-1"))  # type: ignore[arg-type]

    assert (given.certificate, given.key) == (b"", b"")


@pytest.mark.parametrize("fqcn", ["server", "server.digits-1"])
def test_nobody_is_the_server(deployed_plain: MakeServer, dialler: Dialler, fqcn: str) -> None:
    server = deployed_plain()

    refused = dialler.refused(Wire(target_of(server), fqcn))

    assert "is the server's own name" in refused.reason


# quitting -------------------------------------------------------------------------------------------------------------


def test_a_client_that_quits_is_logged_out_and_the_limits_stay(make_server: MakeServer) -> None:
    recorder = Recorder()
    server = make_server(handlers=[recorder], min_num_clients=2, max_num_clients=3)
    server.set_admin_server(admin := Admin())
    headers = register_plain(server, "site-1")
    register_plain(server, "site-2")

    ok(server.quit_client(request(Quit("going home"), **headers)))

    assert names(server) == ["site-2"]
    assert (server.min_num_clients, server.max_num_clients) == (2, 3)
    assert [context.peer for context in recorder.of(EventType.CLIENT_QUIT)] == ["site-1"]
    assert admin.dead == ["site-1"]
    assert "revoked" in unauthenticated(beat(server, headers))
    unauthenticated(server.quit_client(request(Quit(), **headers)))
    assert len(recorder.of(EventType.CLIENT_QUIT)) == 1


@pytest.mark.parametrize("changes", [{Header.CLIENT: "site-2"}, {Header.TOKEN: "nobody's"}, {Header.CLIENT: ""}])
def test_only_the_client_itself_can_quit(make_server: MakeServer, changes: dict[str, str]) -> None:
    recorder = Recorder()
    server = make_server(handlers=[recorder])
    headers = register_plain(server, "site-1")
    register_plain(server, "site-2")

    unauthenticated(server.quit_client(request(Quit(), **(headers | changes))))

    assert names(server) == ["site-1", "site-2"]
    assert recorder.of(EventType.CLIENT_QUIT) == []


def test_quitting_over_the_wire_ends_what_the_stream_may_ask(deployed: MakeServer, dialler: Dialler) -> None:
    server = deployed()
    site = dialler.site(server)

    assert site.ask(Channel.SERVER, "quit", Quit()).return_code is ReturnCode.OK

    assert names(server) == []
    assert isinstance(site.refused(Channel.SERVER, "heartbeat", Heartbeat()), Unauthenticated)
    assert isinstance(site.refused(Channel.SERVER, "renew", Renew()), Unauthenticated)
    assert isinstance(site.refused(Channel.SERVER, "job_ended", JobEnded(JobId("j"), 1, 1)), Unauthenticated)
    assert "revoked" in dialler.refused(dialler.site_wire(server, credentials=site.credentials)).reason
    assert "revoked" in moving(site, server, dialler).reason


def test_who_quit_may_register_again(deployed: MakeServer, dialler: Dialler) -> None:
    server = deployed()
    dialler.site(server).ask(Channel.SERVER, "quit", Quit())

    dialler.site(server)

    assert names(server) == ["site-1"]


# disabled clients -----------------------------------------------------------------------------------------------------


def test_a_disabled_client_can_do_nothing_and_is_told_so(make_server: MakeServer) -> None:
    server = make_server()
    headers = register_plain(server)
    unknown = foreign(server, "site-1")

    server.set_disabled(ClientName("site-1"), "broken data")

    assert names(server) == []
    for reply in (beat(server, headers), server.register_client(request(Register("site-1", PROJECT)))):
        assert "revoked" in unauthenticated(reply) or "disabled: broken data" in reply.reason
    assert unauthenticated(beat(server, unknown)) == "client site-1 is disabled: broken data"
    register_plain(server, "site-2")


def test_a_disabled_clients_heartbeat_says_disabled(make_server: MakeServer) -> None:
    server = make_server()
    headers = register_plain(server)

    server.set_disabled(ClientName("site-1"), "broken data")

    assert unauthenticated(beat(server, headers)) == "client site-1 is disabled: broken data"


def test_an_enabled_client_registers_again(make_server: MakeServer) -> None:
    server = make_server()
    register_plain(server)
    server.set_disabled(ClientName("site-1"), "")

    server.set_disabled(ClientName("site-1"), None)
    register_plain(server)

    assert names(server) == ["site-1"]


def test_disabling_ends_the_clients_stream_and_keeps_it_out(deployed: MakeServer, dialler: Dialler) -> None:
    server = deployed()
    site = dialler.site(server)
    given = server.clients.job_credentials("site-1.digits-1", JobId("digits-1"))  # type: ignore[arg-type]

    server.set_disabled(ClientName("site-1"), "broken data")

    ended = wait(site.ended())
    assert isinstance(ended, Unauthenticated)
    assert "disabled" in ended.reason
    assert "disabled" in dialler.refused(dialler.site_wire(server)).reason
    assert "disabled" in dialler.refused(dialler.job_wire(server, "site-1.digits-1", given)).reason
    assert isinstance(dialler.refused(dialler.site_wire(server, credentials=site.credentials)), Unauthenticated)
    assert names(server) == []


def test_disabling_ends_the_streams_of_the_clients_jobs(
    deployed: MakeServer, dialler: Dialler, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = _running_any_job(deployed(), monkeypatch)
    given = server.clients.job_credentials("site-1.digits-1", JobId("digits-1"))  # type: ignore[arg-type]
    job = dialler.dial(dialler.job_wire(server, "site-1.digits-1", given))

    server.set_disabled(ClientName("site-1"), "broken data")

    ended = wait(job.ended())
    assert isinstance(ended, Unauthenticated)
    assert "disabled" in ended.reason


def test_who_is_disabled_stays_so_over_a_restart(make_server: MakeServer, tmp_path: Path) -> None:
    store = MemoryStore()

    async def disable() -> None:
        async with store:
            lease = await store.take_lease("test", name="test", target="", ttl_s=1)
            await store.set_disabled(lease.epoch, "site-1", True, reason="broken data")
            await store.release_lease(lease.epoch)

    wait(disable())
    server = make_server(snapshot_persistor=store)
    server.deploy(args(tmp_path), {"service": {"target": "127.0.0.1:0"}})

    reply = server.register_client(request(Register("site-1", PROJECT)))

    assert unauthenticated(reply) == "client site-1 is disabled: broken data"


# what is kept about a client ------------------------------------------------------------------------------------------


def test_the_client_table_is_a_snapshot(make_server: MakeServer) -> None:
    server = make_server()
    register_plain(server, resources=Resources(cpus=2))
    handed_out = server.get_all_clients()
    (client,) = handed_out.values()
    assert client.props["resources"] == Resources(cpus=2)

    client.props.clear()
    client.token = Token("another")
    handed_out.clear()

    assert client_named(server, "site-1").props["resources"] == Resources(cpus=2)


def test_task_meta_info_outside_a_job_names_no_job(make_server: MakeServer) -> None:
    server = make_server()
    register_plain(server)

    assert server.task_meta_info("site-1") == TaskMetaInfo(PROJECT, JobId(""), -1, ClientName("site-1"))
    assert server.task_meta_info("nobody").job_id == ""


def test_forgetting_an_unknown_tokens_data_is_nothing(make_server: MakeServer) -> None:
    server = make_server()
    headers = register_plain(server)

    assert server.remove_client_data("nobody's") is None  # type: ignore[func-returns-value]
    server.remove_client_data(headers[Header.TOKEN])
    server.reset_tokens()

    assert names(server) == ["site-1"]


def test_notify_dead_client_of_a_server_without_runs_is_nothing(make_server: MakeServer) -> None:
    server = make_server()
    register_plain(server)

    server.notify_dead_client(client_named(server, "site-1"))

    assert names(server) == ["site-1"]


# authentication_check -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verdict", "ssid", "expected"),
    [
        (Verdict.YES, "ours", None),
        (Verdict.YES, "theirs", "Request from unknown client SSID"),
        (Verdict.YES, None, "Request from unknown client SSID"),
        (Verdict.NOT_IN_SERVICE, "ours", "Server not in service"),
        (Verdict.NOT_IN_SERVICE, "theirs", "Server not in service"),
        (Verdict.ABORT_RUN, "ours", "Abort current run"),
        (Verdict.ABORT_RUN, None, "Abort current run"),
    ],
)
def test_authentication_check(
    make_server: MakeServer, verdict: Verdict, ssid: str | None, expected: str | None
) -> None:
    server = make_server()
    stated = {} if ssid is None else {Header.SSID: str(server.service.ssid) if ssid == "ours" else ssid}

    assert server.authentication_check(request(Heartbeat(), **stated), verdict) == expected


# job failures ---------------------------------------------------------------------------------------------------------


def test_a_failure_of_no_job_is_not_found(deployed_plain: MakeServer) -> None:
    server = deployed_plain()
    headers = register_plain(server)

    reply = server.process_job_failure(request(JobFailure(JobId("digits-1"), "exception", "it broke"), **headers))

    assert (reply.return_code, reply.payload) == (ReturnCode.NOT_FOUND, None)


def test_a_failure_reported_by_who_is_not_registered_is_refused(deployed_plain: MakeServer) -> None:
    reply = deployed_plain().process_job_failure(
        request(JobFailure(JobId("digits-1"), "exception", "it broke"), client="site-1")
    )

    assert "not registered" in unauthenticated(reply)


# streams --------------------------------------------------------------------------------------------------------------


def test_streams_that_end_and_come_back_are_announced(deployed: MakeServer, dialler: Dialler) -> None:
    recorder = Recorder()
    server = deployed(handlers=[recorder])
    site = dialler.site(server)
    dialler.close()
    assert recorder.wait_for(EventType.CLIENT_DISCONNECTED).peer == "site-1"
    assert peer_of(server, "site-1") is None
    assert names(server) == ["site-1"]

    dialler.site(server, credentials=site.credentials)

    assert recorder.wait_for(EventType.CLIENT_RECONNECTED).peer == "site-1"
    assert on_loop(lambda: server.clients.presence(ClientName("site-1"))) == "connected"


def test_a_dead_client_is_taken_back_with_its_token(deployed: MakeServer, dialler: Dialler) -> None:
    server = deployed()
    site = dialler.site(server)
    assert site.registered is not None
    assert server.logout_client(site.registered.token) is not None
    assert names(server) == []

    site.ask(Channel.SERVER, "heartbeat", Heartbeat())

    assert list(server.get_all_clients()) == [site.registered.token]
    assert on_loop(lambda: server.clients.presence(ClientName("site-1"))) == "connected"


def test_a_payload_that_does_not_decode_is_refused_and_the_stream_lives(deployed: MakeServer, dialler: Dialler) -> None:
    server = deployed()
    site = dialler.site(server)

    refused = site.refused(Channel.SERVER, "heartbeat", Heartbeat(jobs=(1, 2)))  # type: ignore[arg-type]

    assert isinstance(refused, RemoteError)
    assert refused.return_code is ReturnCode.INVALID_REQUEST
    assert "jobs" in refused.reason
    assert site.ask(Channel.SERVER, "heartbeat", Heartbeat()).return_code is ReturnCode.OK
