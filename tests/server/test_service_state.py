"""The service-state table against live servers: every state with every request, and how a server moves between them."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from hanse.coordination.registry import fingerprint
from hanse.coordination.service import TABLE, RequestKind, ServiceState, message
from hanse.errors import Conflict, HanseError, NotInService, StaleEpoch, StoreFailed
from hanse.events import EventType
from hanse.ids import ClientName, Digest, JobId, Ssid
from hanse.job import JobRecord, JobState, move
from hanse.launch.process import Handle
from hanse.messages import (
    Challenge,
    Channel,
    Header,
    Heartbeat,
    Register,
    ReturnCode,
    TaskKey,
    TaskResult,
    UpdateRef,
)
from hanse.server import FederatedServer
from hanse.server.overseer import OverseerAgent, Primary, ScriptedOverseer
from hanse.server.tenure import Tenure
from hanse.storage.memory import MemoryStore
from hanse.storage.records import Lease, session_id

from .job_world import ScriptedLauncher, Site, Threads, spec, submit
from .world import (
    PROJECT,
    Dialler,
    Recorder,
    appoint,
    args,
    names,
    nonce,
    on_loop,
    request,
    settings,
    target_of,
    wait,
)

MakeServer = Callable[..., FederatedServer]
COLD, COLD2HOT, HOT, HOT2COLD, SHUTDOWN = ServiceState
JOB = JobId("tiny-1")


class SlowStore(MemoryStore):
    """A store whose lease can be held up, fail, or be somebody else's."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = threading.Event()
        self.may_lease = asyncio.Event()
        self.may_lease.set()
        self.fails: list[Exception] = []

    async def take_lease(
        self, holder: str, *, name: str, target: str, ttl_s: float, seen: Lease | None = None, force: bool = False
    ) -> Lease:
        self.asked.set()
        await self.may_lease.wait()
        if self.fails:
            raise self.fails.pop(0)
        return await super().take_lease(holder, name=name, target=target, ttl_s=ttl_s, seen=seen, force=force)


class Stage:
    """A server with an overseer, and a store with one running job, brought into any state and held there."""

    def __init__(self, make_server: MakeServer, workspace: Path) -> None:
        self.overseer = ScriptedOverseer()
        self.store = wait(_with_a_running_job())
        self.launcher = on_loop(ScriptedLauncher)
        self.recorder = Recorder()
        self.server = make_server(
            overseer_agent=self.overseer, snapshot_persistor=self.store, handlers=[self.recorder], max_num_clients=10
        )
        arguments = args(workspace, launcher=self.launcher, settings=settings(lease_s=0.05))
        self.server.deploy(arguments, {"service": {"target": "127.0.0.1:0"}})

    @contextmanager
    def held_in(self, state: ServiceState) -> Iterator[FederatedServer]:
        assert self.server.service.state is COLD
        if state is COLD:
            yield self.server
        elif state is COLD2HOT:
            on_loop(self.store.may_lease.clear)
            self.store.asked.clear()
            with self._turning(lambda: appoint(self.overseer, self.server)):
                assert self.store.asked.wait(10)
                yield self.server
                on_loop(self.store.may_lease.set)
        elif state is HOT2COLD:
            appoint(self.overseer, self.server)
            self.launcher.next()
            on_loop(self.launcher.stops.clear)
            with self._turning(lambda: self.overseer.appoint(None)):
                assert self.launcher.stopping.wait(10)
                yield self.server
                on_loop(self.launcher.stops.set)
        elif state is SHUTDOWN:
            self.server.close()
            yield self.server
        else:
            appoint(self.overseer, self.server)
            yield self.server

    @contextmanager
    def _turning(self, turn: Callable[[], None]) -> Iterator[None]:
        thread = threading.Thread(target=turn, daemon=True)
        thread.start()
        try:
            yield
        finally:
            on_loop(self.store.may_lease.set)
            on_loop(self.launcher.stops.set)
            thread.join(20)
            assert not thread.is_alive()


async def _with_a_running_job() -> SlowStore:
    store = SlowStore()
    async with store:
        lease = await store.take_lease("before", name="before", target="", ttl_s=1)
        record = JobRecord(
            JOB, spec(), submitter="ada@demo", submitted_at=1.0, package=Digest("0" * 64), package_bytes=1
        )
        await store.add_job(lease.epoch, record)
        scheduled = msgspec.structs.replace(
            move(record, JobState.SCHEDULED, at=2.0), clients=(ClientName("site-1"), ClientName("site-2"))
        )
        await store.replace_job(lease.epoch, scheduled, was=JobState.SUBMITTED)
        await store.replace_job(lease.epoch, move(scheduled, JobState.RUNNING, at=3.0), was=JobState.SCHEDULED)
        await store.release_lease(lease.epoch)
    return store


@pytest.fixture
def stage(make_server: MakeServer, tmp_path: Path) -> Stage:
    return Stage(make_server, tmp_path)


# the table ------------------------------------------------------------------------------------------------------------

# What the contract's table says, written out again on purpose.
YES, NO, ABORT = None, "Server not in service", "Abort current run"
CONTRACT = {
    COLD: {"register": NO, "heartbeat": NO, "get_task": NO, "submit": NO},
    COLD2HOT: {"register": YES, "heartbeat": NO, "get_task": ABORT, "submit": ABORT},
    HOT: {"register": YES, "heartbeat": YES, "get_task": YES, "submit": YES},
    HOT2COLD: {"register": NO, "heartbeat": NO, "get_task": NO, "submit": NO},
    SHUTDOWN: {"register": NO, "heartbeat": NO, "get_task": NO, "submit": NO},
}


def asked_directly(server: FederatedServer, kind: RequestKind) -> str | None:
    """Return what a handler of *server* answers to a request of *kind*: ``None``, or the reason."""
    ssid = str(server.service.ssid)
    if kind is RequestKind.REGISTER:
        reply = server.register_client(request(Register("site-3", PROJECT)))
    elif kind is RequestKind.HEARTBEAT:
        reply = server.client_heartbeat(request(Heartbeat(), **_signed(server, "site-4")))
    else:
        return server.authentication_check(request(None, **{Header.SSID: ssid}), server.service.verdict(kind))
    if reply.return_code is ReturnCode.OK:
        return None
    assert (reply.return_code, reply.payload) == (ReturnCode.COMM_ERROR, None)
    return reply.reason


def _signed(server: FederatedServer, name: str) -> dict[str, str]:
    token = f"client~{'0' * 32}~99999999999"
    return {Header.CLIENT: name, Header.TOKEN: token, Header.TOKEN_SIGNATURE: server.sign_auth_token(name, token)}


@pytest.mark.parametrize("kind", list(RequestKind))
@pytest.mark.parametrize("state", list(ServiceState))
def test_each_state_answers_each_request_as_the_table_says(
    stage: Stage, state: ServiceState, kind: RequestKind
) -> None:
    with stage.held_in(state) as server:
        assert server.service.state is state
        assert message(TABLE[state, kind]) == CONTRACT[state][kind.value]
        assert asked_directly(server, kind) == CONTRACT[state][kind.value]


def result() -> TaskResult:
    return TaskResult(TaskKey(1, "train", 0, ClientName("site-1")), UpdateRef(None, 1))


def asked_over_the_wire(stage: Stage, dialler: Dialler, kind: RequestKind) -> str | None:
    """The same over streams: ``None``, or the reason; a stream that is not even opened gives its reason."""
    server = stage.server
    try:
        if kind is RequestKind.REGISTER:
            dialler.plain(server, "site-3")
            return None
        if kind is RequestKind.HEARTBEAT:
            dialler.plain(server, "site-3").ask(Channel.SERVER, "heartbeat", Heartbeat())
            return None
        given = server.clients.job_credentials("site-1.tiny-1", JOB)  # type: ignore[arg-type]
        dialler.dial(dialler.job_wire(server, "site-1.tiny-1", given)).ask(Channel.TASK, "result", result())
    except HanseError as error:
        return error.reason
    return None


@pytest.mark.parametrize("kind", [RequestKind.REGISTER, RequestKind.HEARTBEAT, RequestKind.SUBMIT])
@pytest.mark.parametrize("state", [COLD, COLD2HOT, HOT, HOT2COLD])
def test_each_state_answers_so_over_the_wire(
    stage: Stage, dialler: Dialler, state: ServiceState, kind: RequestKind
) -> None:
    with stage.held_in(state):
        answered = asked_over_the_wire(stage, dialler, kind)

    expected = CONTRACT[state][kind.value]
    if state is HOT and kind is RequestKind.SUBMIT:
        expected = "a stale answer"  # the state lets it pass, and then the run says that it had not asked
    assert (answered is None) == (expected is None)
    assert expected is None or (answered is not None and expected in answered)


def test_who_waits_for_a_servers_turn_is_sent_on_as_soon_as_another_one_serves(
    stage: Stage, dialler: Dialler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hanse.server.primacy.TURN_COMES_WITHIN_S", 1000.0)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(asked_over_the_wire, stage, dialler, RequestKind.REGISTER)
        while on_loop(lambda: stage.server._primacy._turn) is None:  # nothing tells that somebody waits
            pass
        stage.overseer.appoint(Primary("b.example:6007", Ssid("theirs"), "standby"))

        assert "standby at b.example:6007 serves" in str(asked.result(20))


@pytest.mark.parametrize("state", list(ServiceState))
def test_a_challenge_is_answered_where_a_registration_is(stage: Stage, state: ServiceState) -> None:
    with stage.held_in(state) as server:
        reply = server.client_challenge(request(Challenge("site-1", PROJECT, nonce())))

        # This server has no certificate, which it says only where the state lets it speak.
        expected = ReturnCode.UNAUTHENTICATED if CONTRACT[state]["register"] is YES else ReturnCode.COMM_ERROR
        assert reply.return_code is expected


# who begins where -----------------------------------------------------------------------------------------------------


def test_the_token_of_who_registers_while_a_server_takes_over_is_the_one_that_counts(
    stage: Stage, dialler: Dialler
) -> None:
    with stage.held_in(COLD2HOT):
        site = dialler.plain(stage.server, "site-3")
        assert site.registered is not None
        assert wait(stage.store.kept_tokens()) == {}  # there is no epoch yet to write it under

    assert stage.server.service.state is HOT
    assert wait(stage.store.kept_tokens()) == {"site-3": fingerprint(site.registered.token)}


def test_a_server_with_an_overseer_begins_cold(make_server: MakeServer) -> None:
    server = make_server(overseer_agent=ScriptedOverseer())

    assert (server.service.state, server.service.ssid) == (COLD, "")


def test_a_server_without_one_begins_hot_with_a_session_of_its_own(make_server: MakeServer) -> None:
    first, second = make_server(), make_server()

    assert first.service.state is second.service.state is HOT
    assert first.service.ssid != second.service.ssid != ""


def test_the_session_of_a_server_alone_is_the_lease_that_fences_its_store(
    make_server: MakeServer, tmp_path: Path
) -> None:
    store = MemoryStore()
    server = make_server(snapshot_persistor=store)

    server.deploy(args(tmp_path), {"service": {"target": "127.0.0.1:0"}})

    assert server.service.ssid == session_id("memory", 1)
    with pytest.raises(StaleEpoch):
        wait(store.renew_lease(0))


# how it moves ---------------------------------------------------------------------------------------------------------


def test_an_overseer_that_knows_the_primary_at_once_is_heard_at_deploy(make_server: MakeServer, tmp_path: Path) -> None:
    class Me(ScriptedOverseer):
        def primary(self) -> Primary | None:
            return Primary(target_of(server), Ssid("tenure-1"))

    server = make_server(overseer_agent=Me())
    server.deploy(args(tmp_path), {"service": {"target": "127.0.0.1:0"}})

    assert (server.service.state, server.service.ssid) == (HOT, "tenure-1")


def test_becoming_primary_takes_the_session_and_resumes_the_committed_runs(stage: Stage) -> None:
    appoint(stage.overseer, stage.server, "tenure-1")

    assert (stage.server.service.state, stage.server.service.ssid) == (HOT, "tenure-1")
    stage.launcher.next()
    assert [run.job_id for run in stage.launcher.specs] == [JOB]
    assert stage.server.task_meta_info("site-1").job_id == JOB


def test_somebody_else_who_is_primary_makes_nobody_hot(stage: Stage) -> None:
    stage.overseer.appoint(Primary("10.0.0.1:6007", Ssid("theirs")))

    assert stage.server.service.state is COLD
    assert names(stage.server) == []


def test_somebody_else_who_is_primary_at_an_address_that_reads_the_same_is_still_somebody_else(stage: Stage) -> None:
    before = wait(stage.store.lease())
    stage.overseer.appoint(Primary(target_of(stage.server), Ssid("theirs"), "standby"))

    assert stage.server.service.state is COLD
    assert wait(stage.store.lease()) == before, "it takes the lease from who has it"

    stage.overseer.appoint(Primary(target_of(stage.server), Ssid("tenure-1"), stage.server.name))

    assert stage.server.service.state is HOT


@pytest.mark.parametrize(
    "word", [None, Primary("10.0.0.1:6007", Ssid("theirs")), "another session", Primary("10.0.0.1:6007", Ssid(""))]
)
def test_losing_primacy_parks_the_runs_and_sends_everybody_away(stage: Stage, dialler: Dialler, word: Any) -> None:
    appoint(stage.overseer, stage.server, "tenure-1")
    process = stage.launcher.next()
    site = dialler.plain(stage.server)
    down = threading.Event()
    on_loop(lambda: site.cell.on_link_down(lambda *_: down.set()))
    if word == "another session":
        word = Primary(target_of(stage.server), Ssid("tenure-2"))

    stage.overseer.appoint(word)

    assert (stage.server.service.state, stage.server.service.ssid) == (COLD, "")
    assert wait(process.wait()) == -15
    assert down.wait(10)
    assert wait(stage.store.job(JOB)).state is JobState.RUNNING
    with pytest.raises(NotInService):
        _ = stage.server.jobs


def test_a_new_tenure_has_its_own_session_and_takes_the_runs_up_again(stage: Stage) -> None:
    appoint(stage.overseer, stage.server, "tenure-1")
    stage.launcher.next()
    stage.overseer.appoint(None)

    appoint(stage.overseer, stage.server, "tenure-2")

    assert (stage.server.service.state, stage.server.service.ssid) == (HOT, "tenure-2")
    stage.launcher.next()


def test_the_same_word_again_changes_nothing(stage: Stage) -> None:
    appoint(stage.overseer, stage.server, "tenure-1")
    stage.launcher.next()

    appoint(stage.overseer, stage.server, "tenure-1")

    assert stage.server.service.ssid == "tenure-1"
    assert on_loop(stage.launcher.started.empty)


def test_calls_of_the_overseer_do_not_overlap(stage: Stage) -> None:
    at_once, most = 0, 0
    primacy = stage.server._primacy
    honest = primacy._observe

    def watched(agent: OverseerAgent) -> None:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        honest(agent)
        at_once -= 1

    primacy._observe = watched  # type: ignore[method-assign]
    words = [Primary(target_of(stage.server), Ssid("tenure-1")), None] * 4
    threads = [threading.Thread(target=stage.overseer.appoint, args=(word,)) for word in words]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)

    assert most == 1
    stage.overseer.appoint(None)
    assert stage.server.service.state is COLD


def test_an_error_is_never_raised_into_the_agent(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(ScriptedOverseer):
        def primary(self) -> Primary | None:
            raise RuntimeError("the overseer is gone")

    stage.server.overseer_callback(Broken())

    assert stage.server.service.state is COLD
    assert "taking the overseer's word failed" in caplog.text


def test_a_tenure_that_cannot_begin_leaves_a_cold_server_that_can_try_again(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    stage.store.fails = [StoreFailed("taking the lease", "no space left on device")]

    appoint(stage.overseer, stage.server, "tenure-1")
    assert (stage.server.service.state, stage.server.service.ssid) == (COLD, "")
    assert "no space left on device" in caplog.text

    appoint(stage.overseer, stage.server, "tenure-1")
    assert stage.server.service.state is HOT


def test_a_lease_that_somebody_else_has_taken_ends_the_tenure(stage: Stage, dialler: Dialler) -> None:
    lost = threading.Event()
    stage.server.call_when_lost(lost.set)
    appoint(stage.overseer, stage.server, "tenure-1")
    process = stage.launcher.next()
    site = dialler.plain(stage.server)
    down = threading.Event()
    on_loop(lambda: site.cell.on_link_down(lambda *_: down.set()))

    wait(stage.store.take_lease("another server", name="another", target="", ttl_s=60, force=True))

    assert down.wait(10)
    assert wait(process.wait()) == -15
    assert lost.wait(10), "whoever runs the server is told"
    assert stage.server.service.state is COLD
    stage.overseer.appoint(None)
    appoint(stage.overseer, stage.server, "tenure-2")
    assert stage.server.service.state is HOT


def test_a_tenure_that_is_lost_at_the_moment_at_which_it_has_begun_makes_nobody_hot(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = Tenure.begin

    async def lost_at_once(tenure: Tenure) -> None:
        await begin(tenure)
        await stage.store.take_lease("another server", name="another", target="", ttl_s=60, force=True)
        assert tenure._work is not None
        await asyncio.wait({tenure._work})

    with monkeypatch.context() as patched:
        patched.setattr(Tenure, "begin", lost_at_once)
        appoint(stage.overseer, stage.server, "tenure-1")

    assert stage.server.service.state is COLD
    appoint(stage.overseer, stage.server, "tenure-2")
    assert stage.server.service.state is HOT


def test_a_server_whose_runs_do_not_stop_in_time_is_cold_and_can_be_primary_again(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    appoint(stage.overseer, stage.server, "tenure-1")
    stage.launcher.next()
    on_loop(stage.launcher.stops.clear)

    with monkeypatch.context() as patched:
        patched.setattr("hanse.server.primacy.TURN_TIMEOUT_S", 0.1)
        stage.overseer.appoint(None)

    assert stage.server.service.state is COLD
    on_loop(stage.launcher.stops.set)
    appoint(stage.overseer, stage.server, "tenure-2")
    assert stage.server.service.state is HOT


class OneStops(ScriptedLauncher):
    """A launcher of whose processes the first one stops at once, and the others when they may."""

    async def launch(self, module: str, **more: Any) -> Handle:
        process = await super().launch(module, **more)
        if len(self.specs) == 1:
            process._stops = asyncio.Event()  # type: ignore[attr-defined]
            process._stops.set()  # type: ignore[attr-defined]
        return process


def test_no_answer_is_refused_for_good_while_a_tenure_that_is_lost_ends(
    deployed: MakeServer, dialler: Dialler, tmp_path: Path
) -> None:
    overseer, store, launcher = ScriptedOverseer(), MemoryStore(), on_loop(OneStops)
    arguments = args(tmp_path / "ws", launcher=launcher, settings=settings(lease_s=0.05))
    server = deployed(arguments=arguments, overseer_agent=overseer, snapshot_persistor=store)
    appoint(overseer, server, "tenure-1")
    site = Site(dialler, server)
    first = submit(server, tmp_path, min_clients=1)
    process, life = site.started(), server.jobs.live.task_of(first)
    submit(server, tmp_path, min_clients=1)
    site.started()
    on_loop(launcher.stops.clear)

    wait(store.take_lease("another server", name="another", target="", ttl_s=60, force=True))
    wait(_ended(life))
    answer = TaskResult(TaskKey(1, "train", 0, ClientName("site-1")), UpdateRef(None, 1))
    refused = process.refused(Channel.TASK, "result", answer)
    on_loop(launcher.stops.set)

    assert isinstance(refused, NotInService)


def test_an_answer_that_a_server_may_not_accept_any_more_is_for_the_next(
    deployed: MakeServer, dialler: Dialler, tmp_path: Path
) -> None:
    store = MemoryStore()
    arguments = args(tmp_path / "ws", launcher=Threads(), settings=settings(lease_s=600.0))
    server = deployed(arguments=arguments, snapshot_persistor=store)
    site = Site(dialler, server)
    submit(server, tmp_path, min_clients=1)
    task = site.task()

    wait(store.take_lease("another server", name="another", target="", ttl_s=60, force=True))

    assert isinstance(site.refused(TaskResult(task.key, UpdateRef(task.model, 1))), NotInService)


async def _ended(task: asyncio.Task[None]) -> None:
    await asyncio.wait({task})


def test_nothing_is_committed_under_an_older_session(stage: Stage) -> None:
    appoint(stage.overseer, stage.server, "tenure-1")
    stage.launcher.next()
    wait(stage.store.take_lease("another server", name="another", target="", ttl_s=60, force=True))

    with pytest.raises(StaleEpoch):
        wait(stage.server.jobs.abort(JOB, reason="too late"))
    assert wait(stage.store.job(JOB)).state is JobState.RUNNING


def test_a_result_that_states_another_session_is_refused(stage: Stage, dialler: Dialler) -> None:
    appoint(stage.overseer, stage.server, "tenure-1")
    given = stage.server.clients.job_credentials("site-1.tiny-1", JOB)  # type: ignore[arg-type]
    job = dialler.dial(dialler.job_wire(stage.server, "site-1.tiny-1", given))

    refused = job.refused(Channel.TASK, "result", result(), ssid="tenure-0")

    assert refused.reason == "Request from unknown client SSID"


def test_shutdown_is_for_good_and_stops_the_agent(stage: Stage) -> None:
    appoint(stage.overseer, stage.server, "tenure-1")

    assert stage.server.close() == 0
    appoint_after = stage.server.overseer_callback
    appoint_after(ScriptedOverseer(Primary("127.0.0.1:1", Ssid("tenure-2"))))

    assert stage.server.service.state is SHUTDOWN
    assert stage.overseer._callback is None
    assert stage.server.close() == 0
    with pytest.raises(Conflict):
        stage.server.deploy(args(Path("/nowhere")), {"service": {"target": "127.0.0.1:0"}})


def test_an_orderly_shutdown_of_a_hot_server_parks_its_runs_and_says_so_last(stage: Stage) -> None:
    appoint(stage.overseer, stage.server, "tenure-1")
    process = stage.launcher.next()

    stage.server.fl_shutdown()

    assert wait(process.wait()) == -15
    assert stage.recorder.kinds[0] is EventType.SYSTEM_START
    assert stage.recorder.kinds[-1] is EventType.SYSTEM_END
    assert stage.server.service.state is SHUTDOWN
