import asyncio
import logging
import math
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from hanse.errors import NotInService, ProtocolError, Unauthenticated, Unreachable
from hanse.identity.authorities import Authority
from hanse.ids import JobId, Ssid
from hanse.messages import Heartbeat, Quit, Register, Renew

from .fake_server import JOB, PROJECT, SITE, certified, fake_server, job_spec
from .site import code_folder, site, within

AWAY = Unreachable("server", "it has gone")


async def test_agent_registers_beats_and_says_that_it_waits_for_a_job(tmp_path: Path) -> None:
    async with fake_server(tmp_path / "s") as server, site(server, tmp_path / "w") as here:
        assert here.agent.status == "waiting for an answer from memory"
        assert not here.agent.is_registered
        await server.up()

        assert await server.next(Heartbeat) == Heartbeat(())
        assert (await server.next(Register)).client == SITE
        assert here.agent.status == "registered at memory; waiting for a job"
        assert here.agent.is_registered


async def test_agent_proves_itself_with_its_kit(tmp_path: Path) -> None:
    authority = Authority.create(PROJECT, now=datetime.now(UTC))
    server_identity = certified(authority, "server", "server")
    mine = certified(authority, SITE, "client")
    async with (
        fake_server(tmp_path / "s", identity=server_identity, roots=authority.certificate) as server,
        site(server, tmp_path / "w", tls=True, identity=mine, roots=authority.certificate) as here,
    ):
        await within(20, here.agent.wait_registered())
        assert (await server.next(Register)).certificate == mine.certificate


async def test_stop_tells_the_server_and_ends_the_run(tmp_path: Path) -> None:
    async with fake_server(tmp_path / "s") as server, site(server, tmp_path / "w") as here:
        await within(20, here.agent.wait_registered())
        here.agent.stop()
        assert here.agent.status == "stopping"
        await within(20, here.running)

        assert await server.next(Quit) == Quit("the client is stopping")


async def test_agent_that_was_stopped_before_it_ran_does_nothing(tmp_path: Path) -> None:
    async with fake_server(tmp_path / "s") as server, site(server, tmp_path / "w") as here:
        here.agent.stop()
        await within(20, here.running)

        assert server.hellos == []


async def test_agent_that_was_not_heard_stops_all_the_same(tmp_path: Path) -> None:
    refuse = {"quit": NotInService()}
    async with fake_server(tmp_path / "s", refuse=refuse) as server, site(server, tmp_path / "w") as here:
        await within(20, here.agent.wait_registered())
        here.agent.stop()
        await within(20, here.running)


async def test_broken_stream_is_opened_again_with_the_token_and_without_registering(tmp_path: Path) -> None:
    async with fake_server(tmp_path / "s") as server, site(server, tmp_path / "w") as here:
        await server.up()
        await server.next(Heartbeat)
        server.ssid = Ssid("2")
        await server.go_away(AWAY)
        await server.up()
        await server.next(Heartbeat)

        assert [hello.credentials and hello.credentials.token for hello in server.hellos] == [None, "token-1"]
        assert server.queue(Register).qsize() == 1
        assert here.agent.is_registered


async def test_token_that_is_not_taken_any_more_is_thrown_away(tmp_path: Path) -> None:
    async with fake_server(tmp_path / "s") as server, site(server, tmp_path / "w"):
        await server.up()
        server.accept_tokens = False
        await server.go_away(AWAY)
        await server.up()

        tokens = [hello.credentials and hello.credentials.token for hello in server.hellos]
        assert tokens == [None, "token-1", None]
        assert server.queue(Register).qsize() == 2


async def test_heartbeat_that_is_not_authenticated_means_to_register_anew(tmp_path: Path) -> None:
    refuse = {"heartbeat": Unauthenticated("the server does not know this token")}
    async with fake_server(tmp_path / "s", refuse=refuse) as server, site(server, tmp_path / "w") as here:
        await server.up()
        await server.up()

        assert server.queue(Register).qsize() == 2
        await server.next(Heartbeat)
        assert here.agent.is_registered


async def test_heartbeat_that_fails_otherwise_is_followed_by_the_next(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    refuse = {"heartbeat": NotInService()}
    async with (
        fake_server(tmp_path / "s", refuse=refuse, heartbeat_s=0.05) as server,
        site(server, tmp_path / "w") as here,
    ):
        await server.next(Heartbeat)

        assert "heartbeat not answered" in caplog.text
        assert here.agent.is_registered


async def test_refusal_for_good_ends_the_agent_with_its_reason(tmp_path: Path) -> None:
    refuse = {"register": Unauthenticated("client site-1 is disabled: audit")}
    async with fake_server(tmp_path / "s", refuse=refuse) as server, site(server, tmp_path / "w") as here:
        with pytest.raises(Unauthenticated, match="client site-1 is disabled: audit"):
            await within(20, here.running)


async def test_client_disabled_while_it_runs_ends_with_the_reason(tmp_path: Path) -> None:
    async with fake_server(tmp_path / "s", heartbeat_s=0.05) as server, site(server, tmp_path / "w") as here:
        await server.next(Heartbeat)
        disabled = Unauthenticated("client site-1 is disabled: audit")
        server.refuse |= {"heartbeat": disabled, "register": disabled}

        with pytest.raises(Unauthenticated, match="disabled: audit"):
            await within(20, here.running)


async def test_server_that_does_not_serve_now_is_asked_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    refuse = {"register": NotInService()}
    async with fake_server(tmp_path / "s", refuse=refuse) as server, site(server, tmp_path / "w"):
        await server.up()

        waited = [record.reason for record in caplog.records if record.message == "waiting for the server"]  # type: ignore[attr-defined]  # the field of that log line
        assert waited[0].startswith("Server not in service; trying again in 0.")


async def test_bug_in_the_server_does_not_end_the_client(tmp_path: Path) -> None:
    refuse = {"register": ValueError("a bug")}
    async with fake_server(tmp_path / "s", refuse=refuse) as server, site(server, tmp_path / "w"):  # type: ignore[arg-type]  # what a handler must not raise
        await server.up()


async def test_token_is_renewed_at_half_of_its_life_and_used_from_then_on(tmp_path: Path) -> None:
    async with (
        fake_server(tmp_path / "s", heartbeat_s=0.02, token_lifetime_s=0.1) as server,
        site(server, tmp_path / "w") as here,
    ):
        await server.up()
        await server.next(Renew)
        server.token_lifetime_s = 3600
        await server.next(Renew)
        await server.go_away(AWAY)
        await server.up()

        credentials = server.hellos[-1].credentials
        assert credentials is not None
        assert credentials.token == f"token-{server.tokens}"
        assert server.queue(Register).qsize() == 1
        await within(20, here.agent.wait_registered())


async def test_server_that_gives_times_that_cannot_be_ends_the_agent(tmp_path: Path) -> None:
    async with fake_server(tmp_path / "s", heartbeat_s=0.0) as server, site(server, tmp_path / "w") as here:
        with pytest.raises(ProtocolError, match=r"^heartbeat_s in the reply to register is 0\.0; expected"):
            await within(20, here.running)
        assert server.queue(Heartbeat).empty()


async def test_renewal_with_a_time_that_cannot_be_leaves_the_token_as_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        fake_server(tmp_path / "s", heartbeat_s=0.02, token_lifetime_s=0.1) as server,
        site(server, tmp_path / "w") as here,
    ):
        await server.up()
        server.token_lifetime_s = math.nan
        for _ in range(2):  # the second says that the first was refused, and that the client goes on
            await server.next(Renew)
        beats = server.queue(Heartbeat)
        while not beats.empty():
            beats.get_nowait()
        for _ in range(2):  # a client that cannot renew is alive all the same, and says so
            await server.next(Heartbeat)
        await server.go_away(AWAY)
        await server.up()

        credentials = server.hellos[-1].credentials
        assert credentials is not None
        assert credentials.token == "token-1"
        assert not here.running.done()
        reasons = [getattr(record, "reason", "") for record in caplog.records]
        assert any(reason.startswith("expires_in_s in the reply to renew is nan") for reason in reasons)


async def test_jobs_that_the_server_does_not_run_are_ended_at_a_heartbeat(tmp_path: Path) -> None:
    async with fake_server(tmp_path / "s", heartbeat_s=0.05) as server, site(server, tmp_path / "w") as here:
        await server.up()
        await server.ask("deploy", server.announce(code_folder(tmp_path / "code"), job_spec()))
        await server.ask("start", server.start())
        assert here.agent.status == "registered at memory; running digits-1"
        while (await server.next(Heartbeat)).jobs != (JOB,):
            pass
        server.abort = (JOB, JobId("never-heard-of"))
        while (await server.next(Heartbeat)).jobs == (JOB,):
            pass

        assert here.launcher.launched[0].is_stopped


async def test_goodbye_of_a_server_that_comes_back_is_waited_for(tmp_path: Path) -> None:
    async with fake_server(tmp_path / "s") as server, site(server, tmp_path / "w") as here:
        await server.up()
        server.goodbye(retry=True)
        await server.go_away(AWAY)
        await server.up()

        assert not here.running.done()


async def test_goodbye_for_good_ends_the_agent(tmp_path: Path) -> None:
    async with fake_server(tmp_path / "s") as server, site(server, tmp_path / "w") as here:
        await server.up()
        server.goodbye(retry=False)

        await within(20, here.running)


async def test_while_the_server_is_away_the_status_says_why(tmp_path: Path) -> None:
    async with fake_server(tmp_path / "s") as server:
        failures: asyncio.Queue[str] = asyncio.Queue()
        is_down = False

        async def dial(target: str) -> object:
            if is_down:
                failures.put_nowait(target)
                raise Unreachable(target, "connection refused")
            return await server.dial(target)

        async with site(server, tmp_path / "w", dial=dial) as here:
            await within(20, here.agent.wait_registered())
            is_down = True
            await server.go_away(AWAY)
            for _ in range(2):  # the second time, the first has been told
                await within(20, failures.get())

            waiting = "waiting for the server: cannot reach memory: connection refused; trying again in "
            assert here.agent.status.startswith(waiting)


async def test_expired_certificate_ends_the_agent_at_once_and_nothing_is_said(tmp_path: Path) -> None:
    authority = Authority.create(PROJECT, now=datetime.now(UTC))
    old = certified(authority, SITE, "client", now=datetime.now(UTC) - timedelta(days=400))
    async with (
        fake_server(tmp_path / "s", identity=certified(authority, "server", "server")) as server,
        site(server, tmp_path / "w", identity=old, roots=authority.certificate) as here,
    ):
        with pytest.raises(
            Unauthenticated, match=r"^the certificate of 'site-1' expired on .* ask the project for a new"
        ):
            await within(20, here.running)
        assert server.hellos == []


async def test_certificate_that_expires_while_the_agent_runs_ends_it_when_it_dials_again(tmp_path: Path) -> None:
    now = datetime.now(UTC)
    authority = Authority.create(PROJECT, now=now)
    clock = [now]
    identity = certified(authority, "server", "server", now=now)
    async with (
        fake_server(tmp_path / "s", identity=identity, roots=authority.certificate) as server,
        site(
            server,
            tmp_path / "w",
            identity=certified(authority, SITE, "client", now=now),
            roots=authority.certificate,
            wall=lambda: clock[0],
        ) as here,
    ):
        await within(20, here.agent.wait_registered())
        clock[0] += timedelta(days=400)
        await server.next(Heartbeat)
        assert not here.running.done()
        await server.go_away(AWAY)

        with pytest.raises(Unauthenticated, match="the certificate of 'site-1' expired"):
            await within(20, here.running)
        assert len(server.hellos) == 1


async def test_impostor_ends_the_agent_before_it_has_said_who_it_is(tmp_path: Path) -> None:
    authority = Authority.create(PROJECT, now=datetime.now(UTC))
    other = Authority.create(PROJECT, now=datetime.now(UTC))
    impostor = certified(other, "server", "server")
    mine = certified(authority, SITE, "client")
    async with (
        fake_server(tmp_path / "s", identity=impostor, roots=authority.certificate) as server,
        site(server, tmp_path / "w", identity=mine, roots=authority.certificate) as here,
    ):
        with pytest.raises(Unauthenticated, match="another authority"):
            await within(20, here.running)
        assert server.queue(Register).empty()
