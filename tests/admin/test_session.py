import asyncio
import dataclasses
import random
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path

import msgspec
import pytest
from blake3 import blake3

from hanse.admin.commands import AdminCommands
from hanse.admin.session import AdminSession, BlockingAdminSession
from hanse.cell.cell import Cell, RemoteError
from hanse.cell.connector import Connector
from hanse.cell.loop import background_loop
from hanse.cell.rpc import ClientTls
from hanse.cell.transfer import Transfers
from hanse.client.agent import ClientAgent
from hanse.coordination.policy import ADMIN_RIGHTS
from hanse.errors import ConfigError, Conflict, HanseError, JobInvalid, NotInService, Unauthenticated, Unreachable
from hanse.identity.authorities import Authority
from hanse.identity.kits import Kit
from hanse.ids import SERVER, Digest, Fqcn, JobId
from hanse.job import JobRecord, JobSpec, JobState, Resources, WorkflowSpec
from hanse.launch.surviving import SurvivingLauncher
from hanse.messages import (
    CATALOGUE,
    PROTOCOL_VERSIONS,
    Attach,
    Challenge,
    ChallengeReply,
    Channel,
    DisableClient,
    Header,
    Heartbeat,
    Hello,
    JobEvent,
    JobQuery,
    JobView,
    ListClients,
    ListJobs,
    LogQuery,
    Message,
    PromoteServer,
    Quit,
    Renew,
    ReturnCode,
    ServerStop,
    StatusQuery,
    SubmitJob,
    Topic,
)
from hanse.settings import AdminSettings

from .world import Deployment, deployed, make_kits, package, wait

REQUESTS: dict[Topic, msgspec.Struct] = {
    (Channel.ADMIN, "job.submit"): SubmitJob(Digest("0" * 64), 1),
    (Channel.ADMIN, "job.list"): ListJobs(),
    (Channel.ADMIN, "job.show"): JobQuery("any"),
    (Channel.ADMIN, "job.watch"): JobQuery("any"),
    (Channel.ADMIN, "job.abort"): JobQuery("any"),
    (Channel.ADMIN, "job.log"): LogQuery("any"),
    (Channel.ADMIN, "client.list"): ListClients(),
    (Channel.ADMIN, "client.disable"): DisableClient("site-1"),
    (Channel.ADMIN, "server.status"): StatusQuery(),
    (Channel.ADMIN, "server.stop"): ServerStop(),
    (Channel.ADMIN, "server.promote"): PromoteServer("standby"),
}
OTHERS_REQUESTS: dict[Topic, msgspec.Struct] = {
    (Channel.SERVER, "renew"): Renew(),
    (Channel.SERVER, "quit"): Quit(),
    (Channel.SERVER, "heartbeat"): Heartbeat(),
    (Channel.RUN, "attach"): Attach(),
}


def refused(call: Callable[[], object]) -> RemoteError:
    """Return the server's refusal of *call*."""
    with pytest.raises(RemoteError) as caught:
        call()
    return caught.value


# Jobs -----------------------------------------------------------------------------------------------------------------


def test_a_submitted_folder_is_a_job_that_says_what_it_waits_for(deployment: Deployment, tmp_path: Path) -> None:
    (tmp_path / "client.py").write_text("app = 1\n")
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "mine"\n[tool.hanse]\nclient = "client:app"\nmodel = "client:app"\nworkflow = "fedavg"\n'
    )
    with deployment.session("lee@demo") as session:
        submitted = session.submit(tmp_path)
        view = session.show(submitted.job_id)
    assert (view.name, view.state, view.submitter) == ("mine", "submitted", "lee@demo")
    (waiting,) = view.waiting
    assert "registered" in waiting.what
    assert waiting.until > view.submitted_at
    assert deployment.uploads() == []


def test_a_folder_that_is_no_job_is_refused_before_anything_is_sent(deployment: Deployment, tmp_path: Path) -> None:
    with deployment.session() as session, pytest.raises(ConfigError, match="pyproject"):
        session.submit(tmp_path)
    (tmp_path / "pyproject.toml").write_text('[tool.hanse]\nclient = "client:app"\nmodel = "m:f"\nworkflw = "fedavg"\n')
    with deployment.session() as session, pytest.raises(JobInvalid, match="workflw"):
        session.submit(tmp_path)


def test_a_package_that_the_server_refuses_leaves_nothing_but_an_audit_entry(deployment: Deployment) -> None:
    with deployment.session() as session:
        error = refused(lambda: session.submit(b"not a zip"))
    assert (error.return_code, error.error_code) == (ReturnCode.INVALID_REQUEST, "job-invalid")
    assert "zip" in error.reason
    assert deployment.uploads() == []
    entry = deployment.audited(1)[0]
    assert (entry.actor, entry.action, entry.outcome) == ("ada@demo", "job.submit", "job-invalid")
    assert entry.reason == error.reason


def test_the_same_bytes_submitted_by_two_sessions_at_once_are_two_jobs(deployment: Deployment, tmp_path: Path) -> None:
    data = package(tmp_path / "job")

    async def both() -> set[JobId]:
        async with deployment.async_session() as one, deployment.async_session() as other:
            return {each.job_id for each in await asyncio.gather(one.submit(data), other.submit(data))}

    assert len(wait(both())) == 2
    assert deployment.uploads() == []


def test_what_was_not_uploaded_or_has_another_size_is_not_submitted(deployment: Deployment, tmp_path: Path) -> None:
    data = package(tmp_path / "job")
    digest = Digest(blake3(data).hexdigest())

    async def submit(size: int, *, upload: bool) -> None:
        async with deployment.async_session() as session:
            if upload:
                await session._moving.upload("upload", digest, memoryview(data))
            await session._command("job.submit", SubmitJob(digest, size))

    assert refused(lambda: wait(submit(len(data), upload=False))).return_code is ReturnCode.NOT_FOUND
    assert refused(lambda: wait(submit(len(data) - 1, upload=True))).return_code is ReturnCode.INVALID_REQUEST
    assert refused(lambda: wait(submit(2**40, upload=True))).return_code is ReturnCode.INVALID_REQUEST
    assert deployment.uploads() == []


def test_an_upload_that_broke_off_is_cleared_away_with_the_next_one(deployment: Deployment, tmp_path: Path) -> None:
    files = deployment.server.jobs.files.upload_files("ada@demo")
    with files.begin(Digest("0" * 64), 100) as partial:
        partial.write(b"not all of it")
    assert deployment.uploads() == [f"{'0' * 64}.part"]
    with deployment.session() as session:
        session.submit(package(tmp_path / "job"))
    assert deployment.uploads() == []


@pytest.mark.parametrize("is_dead", [True, False])
def test_a_server_that_dies_or_falls_silent_in_a_submission_may_have_taken_the_job(
    is_dead: bool, kits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with deployed(kits, tmp_path / "ws") as deployment:
        cell = deployment.server.get_cell()
        assert cell is not None

        async def never(message: Message) -> None:
            if is_dead:
                cell.drop(Fqcn(message.headers[Header.ORIGIN]), Unreachable("the server", "it was killed"))
            await asyncio.Event().wait()

        cell.on(Channel.ADMIN, "job.submit", never)
        monkeypatch.setattr("hanse.admin.session.ANSWER_TIMEOUT_S", 60.0 if is_dead else 0.3)
        with deployment.session() as session, pytest.raises(Unreachable) as caught:
            session.submit(package(tmp_path / "job"))

    told = caught.value.reason
    assert told.startswith(f"cannot reach {caught.value.where}: ")
    assert ("it was killed" if is_dead else "did not answer 'admin/job.submit' within 0.3 s") in told
    assert "not known: look at 'hanse job list' before you submit it again" in told


def test_jobs_are_listed_newest_first_and_by_state(deployment: Deployment, tmp_path: Path) -> None:
    with deployment.session() as session:
        first = session.submit(package(tmp_path / "job", "first")).job_id
        second = session.submit(package(tmp_path / "job", "second")).job_id
        session.abort(first)
        listed = [view.job_id for view in session.list()]
        assert listed.index(second) < listed.index(first)
        assert [view.job_id for view in session.list(limit=1)] == [second]
        assert first in {view.job_id for view in session.list(state="aborted")}
        assert first not in {view.job_id for view in session.list(state="submitted")}
        assert "running" in refused(lambda: session.list(state="done")).reason


def test_a_job_is_found_by_the_beginning_of_its_id(deployment: Deployment, tmp_path: Path) -> None:
    with deployment.session() as session:
        job_id = session.submit(package(tmp_path / "job", "prefixed")).job_id
        assert session.show("prefixed").job_id == job_id
        assert refused(lambda: session.show("nothing-like-it")).return_code is ReturnCode.NOT_FOUND
        session.submit(package(tmp_path / "job", "prefixed"))
        assert "2" in refused(lambda: session.show("prefixed")).reason


def test_a_watcher_hears_what_happens_until_the_end(deployment: Deployment, tmp_path: Path) -> None:
    async def scene() -> list[JobView | JobEvent]:
        seen: list[JobView | JobEvent] = []
        async with deployment.async_session() as session:
            job_id = (await session.submit(package(tmp_path / "job"))).job_id
            async for each in session.follow(job_id):
                seen.append(each)
                if len(seen) == 1:
                    deployment.server.jobs.board.emit(
                        JobEvent(job_id, "round_done", 1.0, round=1, metrics={"loss": 0.5})
                    )
                    deployment.server.jobs.board.emit(JobEvent(JobId("another"), "round_done", 1.0, round=9))
                if len(seen) == 2:
                    await session.abort(job_id)
            assert [event async for event in session.watch(job_id)] == []
        return seen

    first, round_done, end, last = wait(scene())
    assert isinstance(first, JobView)
    assert first.state == "submitted"
    assert isinstance(round_done, JobEvent)
    assert (round_done.kind, round_done.round, round_done.metrics) == ("round_done", 1, {"loss": 0.5})
    assert isinstance(end, JobEvent)
    assert end.kind == "job_aborted"
    assert isinstance(last, JobView)
    assert (last.state, last.reason) == ("aborted", "aborted by ada@demo")


def test_watching_goes_on_when_the_connection_broke(deployment: Deployment, tmp_path: Path) -> None:
    async def scene() -> list[str]:
        seen: list[str] = []
        async with deployment.async_session() as session:
            job_id = (await session.submit(package(tmp_path / "job"))).job_id
            async for each in session.follow(job_id):
                seen.append(each.kind if isinstance(each, JobEvent) else each.state)
                if len(seen) == 1:
                    cell = deployment.server.get_cell()
                    assert cell is not None
                    cell.drop(session._fqcn, NotInService("a test broke this"))
                if len(seen) == 2:
                    await session.abort(job_id)
        return seen

    assert wait(scene()) == ["submitted", "submitted", "job_aborted", "aborted"]


def test_waiting_outlives_a_restart_of_the_server(kits: Path, tmp_path: Path) -> None:
    async def follow(session: AdminSession, job_id: str, seen: asyncio.Queue[str]) -> JobView:
        async for each in session.follow(job_id):
            if isinstance(each, JobView):
                await seen.put(each.state)
        return await session.wait(job_id)

    with deployed(kits, tmp_path / "ws") as before:
        session = wait(_entered(before.async_session()))
        job_id = wait(session.submit(package(tmp_path / "job"))).job_id
        seen: asyncio.Queue[str] = asyncio.Queue()
        following = asyncio.run_coroutine_threadsafe(follow(session, job_id, seen), background_loop())
        assert wait(seen.get()) == "submitted"
        target = before.target
    with deployed(kits, tmp_path / "ws", target=target) as after:
        assert wait(seen.get()) == "submitted"
        with after.session() as other:
            other.abort(job_id)
        assert following.result(20).state == "aborted"
        wait(session.__aexit__(None, None, None))


def test_a_jobs_log_is_shown(deployment: Deployment, tmp_path: Path) -> None:
    with deployment.session() as session:
        job_id = session.submit(package(tmp_path / "job")).job_id
        assert session.log(job_id) == ""
        (deployment.workspace / "runs" / job_id / "server.log").write_text("one\ntwo\nthree\n")
        assert session.log(job_id, lines=2) == "two\nthree"
        assert refused(lambda: session.log(job_id, client="site-9")).return_code is ReturnCode.NOT_FOUND


def completed(deployment: Deployment, data: bytes) -> JobId:
    """Put a completed job, with *data* for a result, into the server's store."""
    jobs = deployment.server.jobs
    job_id = JobId(f"done-{blake3(data).hexdigest()[:8]}")
    (deployment.workspace / "runs" / job_id).mkdir()
    record = JobRecord(
        job_id=job_id,
        spec=JobSpec("done", WorkflowSpec("fedavg"), client="client:app", model="client:app"),
        submitter="ada@demo",
        submitted_at=1.0,
        package=Digest("0" * 64),
        package_bytes=1,
        state=JobState.COMPLETED,
        result=wait(jobs.files.result_files(job_id)).put(data),
        result_bytes=len(data),
    )
    wait(jobs.services.store.add_job(jobs.services.epoch, record))
    return job_id


def test_a_result_is_downloaded_whole_and_in_place_of_an_older_file(deployment: Deployment, tmp_path: Path) -> None:
    data = random.Random(1).randbytes(3_000_000)
    job_id = completed(deployment, data)
    path = tmp_path / "model.safetensors"
    path.write_text("older")
    with deployment.session("mel@demo") as session:
        view = session.download(job_id, path)
    assert (view.job_id, view.result_bytes) == (job_id, len(data))
    assert path.read_bytes() == data
    assert [each.name for each in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_result_that_cannot_be_written_or_is_not_there_leaves_no_file(deployment: Deployment, tmp_path: Path) -> None:
    job_id = completed(deployment, b"small")
    with deployment.session() as session:
        with pytest.raises(ConfigError, match="No such file"):
            session.download(job_id, tmp_path / "nowhere" / "model.safetensors")
        waiting = session.submit(package(tmp_path / "job")).job_id
        with pytest.raises(Conflict, match="without a result"):
            session.download(waiting, tmp_path / "model.safetensors")
        (wait(deployment.server.jobs.files.result_files(job_id)).root / blake3(b"small").hexdigest()).write_bytes(
            b"spoilt"
        )
        with pytest.raises(HanseError):
            session.download(job_id, tmp_path / "model.safetensors")
    assert [each.name for each in tmp_path.iterdir()] == ["job"]


# Roles ----------------------------------------------------------------------------------------------------------------


def test_a_member_sees_and_changes_nothing(deployment: Deployment, tmp_path: Path) -> None:
    with deployment.session() as session:
        job_id = session.submit(package(tmp_path / "job")).job_id
    with deployment.session("mel@demo") as member:
        assert member.show(job_id).state == "submitted"
        assert member.status().project == "demo"
        for change in (
            lambda: member.submit(package(tmp_path / "job")),
            lambda: member.abort(job_id),
            lambda: member.disable("site-1"),
            member.stop,
        ):
            error = refused(change)
            assert (error.return_code, error.error_code) == (ReturnCode.UNAUTHORIZED, "unauthorized")
            assert "needs role" in error.reason
        assert member.show(job_id).state == "submitted"
    assert not deployment.stop_asked.is_set()
    with deployment.session() as session:
        session.enable("site-1")  # whose own entry is written after those
    refusals = {(entry.actor, entry.action): entry for entry in deployment.audited(10) if entry.outcome != "done"}
    for action in ("job.submit", "job.abort", "client.disable", "server.stop"):
        entry = refusals["mel@demo", action]
        assert entry.outcome == "unauthorized"
        assert entry.reason.startswith("mel@demo may not ")
    assert deployment.uploads() == []


def test_a_lead_aborts_own_jobs_and_no_others(deployment: Deployment, tmp_path: Path) -> None:
    with deployment.session("lee@demo") as lee, deployment.session("lea@demo") as lea:
        job_id = lee.submit(package(tmp_path / "job")).job_id
        error = refused(lambda: lea.abort(job_id))
        assert error.error_code == "unauthorized"
        assert lee.show(job_id).state == "submitted"
        entry = deployment.audited(1)[0]
        assert (entry.actor, entry.object, entry.outcome) == ("lea@demo", job_id, "unauthorized")
        assert lee.abort(job_id).state == "aborted"
        assert refused(lambda: lee.abort(job_id)).return_code is ReturnCode.CONFLICT


def test_an_admin_aborts_anybodys_job_and_the_audit_log_says_who(deployment: Deployment, tmp_path: Path) -> None:
    with deployment.session("lee@demo") as lee, deployment.session() as ada:
        job_id = lee.submit(package(tmp_path / "job")).job_id
        assert ada.abort(job_id).reason == "aborted by ada@demo"
    aborted, submitted = deployment.audited(2)
    assert (submitted.actor, submitted.action, submitted.object) == ("lee@demo", "job.submit", job_id)
    assert (aborted.actor, aborted.action, aborted.object, aborted.outcome) == (
        "ada@demo",
        "job.abort",
        job_id,
        "done",
    )


def test_who_has_not_proven_anything_can_do_nothing_but_challenge_and_register(deployment: Deployment) -> None:
    kit = deployment.kit("ada@demo")
    assert kit.identity is not None
    tls = ClientTls(kit.ca_pem, kit.identity.certificate, kit.identity.key_pem)
    fqcn = Fqcn("ada@demo.stranger")
    hello = Hello(PROTOCOL_VERSIONS, fqcn, "demo")
    certificate = kit.identity.certificate

    async def scene() -> None:
        cell = Cell(fqcn)
        connector = Connector(cell, targets=(deployment.target,), hello=lambda: hello, tls=tls, rng=random.Random(1))
        running = asyncio.create_task(connector.run())
        transfers = Transfers(target=lambda: deployment.target, hello=lambda: hello, tls=tls, rng=random.Random(1))
        try:
            await connector.wait_ready(10)
            for (channel, topic), request in (REQUESTS | OTHERS_REQUESTS).items():
                with pytest.raises(RemoteError, match="may not send") as caught:
                    await cell.ask(SERVER, channel, topic, request, timeout_s=10)
                assert caught.value.error_code == "unauthorized"
            with pytest.raises(Unauthenticated, match="must register"):
                await transfers.upload("upload", Digest(blake3(b"x").hexdigest()), memoryview(b"x"))
            with pytest.raises(Unauthenticated, match="must register"):
                await transfers.missing("result/any", [Digest("0" * 64)])
            challenge = Challenge("ada@demo", "demo", b"n" * 32, certificate)
            reply = await cell.ask(SERVER, Channel.SERVER, "challenge", challenge, timeout_s=10)
            assert isinstance(reply.payload, ChallengeReply)
        finally:
            await transfers.close()
            await connector.close()
            await running

    wait(scene())


def test_every_topic_of_administration_is_answered(deployment: Deployment) -> None:
    cell = deployment.server.get_cell()
    assert cell is not None
    asked = {(channel, topic) for channel, topic in CATALOGUE if channel is Channel.ADMIN} - {
        (Channel.ADMIN, "job.event")
    }
    assert asked == set(ADMIN_RIGHTS) == set(REQUESTS)
    assert asked <= set(cell._handlers)


# Clients and the server -----------------------------------------------------------------------------------------------


async def take_part(deployment: Deployment, workspace: Path) -> tuple[ClientAgent, asyncio.Task[None]]:
    """Start site-1's agent; return it, registered, and its task."""
    kit = deployment.client_kit()
    settings = msgspec.structs.replace(kit.settings, resources=Resources(cpus=2.0))
    agent = ClientAgent(
        settings,
        workspace=workspace,
        launcher=SurvivingLauncher(),
        rng=random.Random(1),
        identity=kit.identity,
        roots=kit.ca_pem,
        release="9.9",
    )
    running = asyncio.create_task(agent.run())
    registered = asyncio.ensure_future(agent.wait_registered())
    await asyncio.wait({running, registered}, return_when=asyncio.FIRST_COMPLETED)
    if running.done():
        registered.cancel()
        running.result()
    return agent, running


def test_clients_are_listed_and_a_disabled_one_stays_out_until_enabled(kits: Path, tmp_path: Path) -> None:
    async def scene(deployment: Deployment) -> None:
        async with deployment.async_session() as session:
            assert await session.clients() == ()
            _, running = await take_part(deployment, tmp_path / "site")
            (client,) = await session.clients()
            assert (client.name, client.state, client.release) == ("site-1", "connected", "9.9")
            assert client.resources.cpus == 2.0
            assert client.jobs == ()
            assert 0 <= client.last_heard_s < 20
            assert (await session.status()).clients == 1

            await session.disable("site-1")
            with pytest.raises(Unauthenticated, match="disabled by ada@demo"):
                await running
            assert await session.clients() == ()
            assert await session.disabled_clients() == {"site-1": "disabled by ada@demo"}

    async def enable(deployment: Deployment) -> None:
        async with deployment.async_session() as session:
            await session.enable("site-1")
            agent, running = await take_part(deployment, tmp_path / "site")
            agent.stop()
            await running

    with deployed(kits, tmp_path / "ws") as before:
        wait(scene(before))
        assert [(entry.action, entry.object) for entry in before.audited(1)] == [("client.disable", "site-1")]
    with deployed(kits, tmp_path / "ws") as after:
        assert wait(after.server.jobs.services.store.disabled_clients()) == {"site-1": "disabled by ada@demo"}
        wait(enable(after))
        assert [(entry.action, entry.outcome) for entry in after.audited(1)] == [("client.enable", "done")]


def test_a_site_of_another_protocol_is_shown_as_refused_with_both_releases_until_it_comes_as_it_should(
    kits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene(deployment: Deployment) -> None:
        async with deployment.async_session() as session:
            with monkeypatch.context() as patched:
                patched.setattr("hanse.client.agent.PROTOCOL_VERSIONS", (99,))
                with pytest.raises(RemoteError, match=r"site-1 runs Hanse 9\.9 \(protocol 99\)"):
                    await take_part(deployment, tmp_path / "site")
            (refused,) = await session.refused_clients()
            assert (refused.name, refused.code) == ("site-1", "version-mismatch")
            assert f"this side runs Hanse {version('hanse')} (protocol 1)" in refused.reason
            assert 0 <= refused.ago_s < 20

            agent, running = await take_part(deployment, tmp_path / "site")
            assert await session.refused_clients() == ()
            agent.stop()
            await running

    with deployed(kits, tmp_path / "ws") as deployment:
        wait(scene(deployment))


def test_what_cannot_be_a_client_is_not_disabled(deployment: Deployment) -> None:
    with deployment.session() as session:
        assert refused(lambda: session.disable("../x")).return_code is ReturnCode.INVALID_REQUEST
    assert wait(deployment.server.jobs.services.store.disabled_clients()) == {}


def test_the_server_says_how_it_is(deployment: Deployment) -> None:
    with deployment.session("mel@demo") as session:
        status = session.status()
    assert (status.state, status.project, status.clients, status.jobs_running) == ("hot", "demo", 0, 0)
    assert status.ssid == deployment.server.service.ssid
    assert status.since > 1_700_000_000


def test_stopping_the_server_is_left_to_its_owner(kits: Path, tmp_path: Path) -> None:
    with deployed(kits, tmp_path / "ws") as deployment, deployment.session() as session:
        session.stop()
        assert deployment.stop_asked.wait(10)
        assert session.status().state == "hot"
        assert (deployment.audited(1)[0].action, deployment.audited(1)[0].actor) == ("server.stop", "ada@demo")


def test_a_server_without_an_owner_who_listens_shuts_itself_down(kits: Path, tmp_path: Path) -> None:
    with deployed(kits, tmp_path / "ws") as deployment:
        cell = deployment.server.get_cell()
        assert cell is not None
        AdminCommands().register(deployment.server, cell)
        gone = threading.Event()
        with deployment.session() as session:
            session._session._uplink.cell.on_link_down(lambda peer, reason: gone.set())
            session.stop()
            assert gone.wait(10)


# The connection -------------------------------------------------------------------------------------------------------


def test_a_handover_after_which_nobody_serves_is_not_waited_for_without_end(
    kits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hanse.admin.session.SUCCEEDED_WITHIN_S", 0.3)
    with deployed(kits, tmp_path / "ws") as deployment, deployment.session() as session:
        cell = deployment.server.get_cell()
        assert cell is not None

        def leave(_: Message) -> None:
            threading.Thread(target=deployment.server.close).start()  # and the other one does not come

        cell.on(Channel.ADMIN, "server.promote", leave)
        with pytest.raises(Unreachable, match=r"no server has served for 0\.3 s since the other one left"):
            session.promote("standby")


def test_two_sessions_of_one_person_do_not_replace_each_other(deployment: Deployment) -> None:
    with deployment.session() as one, deployment.session() as other:
        assert one.status() == other.status()


def test_a_token_is_renewed_before_it_expires(kits: Path, tmp_path: Path) -> None:
    async def scene(deployment: Deployment) -> None:
        async with deployment.async_session() as session:
            first = session._registered
            renewed = asyncio.Event()
            take = session._take
            session._take = lambda given: (take(given), renewed.set())  # type: ignore[method-assign,assignment]
            await renewed.wait()
            assert first is not None
            assert session._registered is not None
            assert session._registered.token != first.token
            assert (await session.status()).state == "hot"

    with deployed(kits, tmp_path / "ws", token_lifetime_s=1.5) as deployment:
        wait(scene(deployment))


def test_a_session_whose_token_has_ended_proves_itself_anew(
    kits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a clock was set, or a machine has slept through its renewal."""
    lifetime_s = 1.0

    async def never(_: AdminSession) -> None:
        await asyncio.Event().wait()

    async def scene() -> None:
        async with deployment.async_session() as session:
            first = session._registered
            await asyncio.sleep(lifetime_s + 1.0)  # the token's life, which ends with a full second
            assert (await session.status()).state == "hot"
            assert session._registered is not first

    monkeypatch.setattr(AdminSession, "_keep_renewing", never)
    with deployed(kits, tmp_path / "ws", token_lifetime_s=lifetime_s) as deployment:
        wait(scene())


def test_without_tls_an_administrator_is_believed(kits: Path, tmp_path: Path) -> None:
    with deployed(kits, tmp_path / "ws", tls=False) as deployment, deployment.session("anybody") as session:
        job_id = session.submit(package(tmp_path / "job")).job_id
        assert session.abort(job_id).submitter == "anybody"


def test_where_nobody_answers_the_session_says_so_in_good_time(deployment: Deployment) -> None:
    kit = deployment.kit("ada@demo")
    nowhere = dataclasses.replace(kit, settings=msgspec.structs.replace(kit.settings, servers=("127.0.0.1:1",)))
    waited: list[str] = []

    async def scene() -> None:
        async with AdminSession(nowhere, patience_s=0.3, on_waiting=waited.append):
            raise AssertionError("there is nobody")

    with pytest.raises(Unreachable, match=r"127\.0\.0\.1:1"):
        wait(scene())
    assert "trying again" in waited[0]


def test_a_server_of_another_authority_is_not_talked_to(deployment: Deployment, tmp_path: Path) -> None:
    stranger = Kit.load(make_kits(tmp_path) / "ada@demo", AdminSettings)
    kit = dataclasses.replace(
        stranger, settings=msgspec.structs.replace(stranger.settings, servers=(deployment.target,))
    )
    with pytest.raises((Unauthenticated, Unreachable)), BlockingAdminSession(kit, patience_s=1.0):
        raise AssertionError("it is another project's server")


def test_an_expired_certificate_is_said_to_be_that(deployment: Deployment) -> None:
    kit = deployment.kit("ada@demo")
    authority = Authority.load(deployment.kits / "authority")
    assert kit.identity is not None
    made = datetime.now(UTC) - timedelta(days=400)
    key = kit.identity.key.public_key()
    old = authority.issue(name="ada@demo", organisation="demo", role="admin:admin", public_key=key, now=made)
    late = dataclasses.replace(kit, identity=dataclasses.replace(kit.identity, certificate=old))
    with pytest.raises(Unauthenticated, match="the certificate of 'ada@demo' expired on"), BlockingAdminSession(late):
        raise AssertionError("it cannot have been let in")


def test_another_projects_kit_is_refused_by_name(deployment: Deployment) -> None:
    kit = deployment.kit("ada@demo")
    other = dataclasses.replace(kit, settings=msgspec.structs.replace(kit.settings, project="another"))
    with pytest.raises(Unauthenticated, match="another"), BlockingAdminSession(other):
        raise AssertionError("the server serves another project")


def test_a_blocking_session_waits_and_passes_events_on(deployment: Deployment, tmp_path: Path) -> None:
    heard: list[str] = []
    with deployment.session() as session:
        job_id = session.submit(package(tmp_path / "job")).job_id

        def abort_once_watched(event: JobEvent) -> None:
            heard.append(event.kind)

        waiting: list[JobView] = []
        thread = threading.Thread(target=lambda: waiting.append(session.wait(job_id, on_event=abort_once_watched)))
        thread.start()
        wait(_watched(deployment, job_id))
        session.abort(job_id)
        thread.join(20)
    assert [view.state for view in waiting] == ["aborted"]
    assert heard == ["job_aborted"]


async def _watched(deployment: Deployment, job_id: JobId) -> None:
    """Return when somebody watches the job."""
    jobs = deployment.server.jobs
    watch, watched = jobs.board.watch, asyncio.Event()

    def watching(job: JobId, watcher: Fqcn) -> None:
        watch(job, watcher)
        watched.set()

    jobs.board.watch = watching  # type: ignore[method-assign]
    try:
        if not jobs.board._watchers.get(job_id):
            await watched.wait()
    finally:
        jobs.board.watch = watch  # type: ignore[method-assign]


async def _entered(session: AdminSession) -> AdminSession:
    return await session.__aenter__()
