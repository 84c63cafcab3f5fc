"""``FederatedServer``: its construction, its deployment and end, and its second role, in a job's own process."""

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hanse.cell.cell import Cell
from hanse.errors import ConfigError, Conflict, HanseError, NotInService, Unreachable
from hanse.events import EventType, FLComponent, FLContext
from hanse.ids import ClientName, JobId
from hanse.job import JobState, WorkflowSpec
from hanse.messages import Channel, ClientList, Heartbeat, ListClients, Message, Quit, ReturnCode, RunSnapshot, ok
from hanse.server import BaseServer, FederatedServer
from hanse.server.federated_server import CommandModule
from hanse.server.overseer import ScriptedOverseer
from hanse.storage.memory import MemoryStore

from .job_world import ScriptedLauncher, Site, answer, outcome, spec, submit, w
from .world import (
    PROJECT,
    Dialler,
    Project,
    Recorder,
    args,
    names,
    on_loop,
    register_plain,
    settings,
    target_of,
    wait,
)

MakeServer = Callable[..., FederatedServer]


# construction ---------------------------------------------------------------------------------------------------------


def test_it_is_a_base_server_with_the_contracts_defaults() -> None:
    server = FederatedServer()

    assert isinstance(server, BaseServer)
    assert (server.min_num_clients, server.max_num_clients, server.heart_beat_timeout) == (2, 10, 600)
    assert (server.shutdown_period, server.check_engine_frequency, server.secure_train) == (30.0, 3.0, False)
    assert server.args is None
    assert server.get_cell() is None
    assert server.get_all_clients() == {}
    assert server.close() == 0


@pytest.mark.parametrize(("least", "most"), [(0, 1), (2, 1)])
def test_limits_that_contradict_each_other_are_a_value_error(least: int, most: int) -> None:
    with pytest.raises(ValueError, match="min_num_clients"):
        FederatedServer(PROJECT, least, most)


def test_before_deploy_there_are_no_jobs_and_nowhere_to_dial(make_server: MakeServer) -> None:
    server = make_server()

    with pytest.raises(NotInService):
        _ = server.jobs
    with pytest.raises(NotInService):
        _ = server.reception


# deployment -----------------------------------------------------------------------------------------------------------


def test_deploy_says_where_it_listens(deployed: MakeServer) -> None:
    server = deployed()

    assert target_of(server).startswith("127.0.0.1:")
    assert server.get_cell() is not None
    assert server.secure_train


def test_secure_train_of_the_constructor_counts_at_deploy(
    make_server: MakeServer, project: Project, tmp_path: Path, dialler: Dialler
) -> None:
    server = make_server(secure_train=True)
    with pytest.raises(ConfigError, match="ssl_root_cert"):
        server.deploy(args(tmp_path), {"service": {"target": "127.0.0.1:0"}})

    server.deploy(args(tmp_path), project.grpc_args())
    dialler.site(server)
    assert names(server) == ["site-1"]


def test_the_hosts_of_the_kit_are_reached_by_ipv6(
    make_server: MakeServer, project: Project, tmp_path: Path, dialler: Dialler
) -> None:
    server = make_server()
    server.deploy(args(tmp_path), project.grpc_args("[::1]:0"), secure_train=True)

    site = dialler.site(server)

    assert target_of(server).startswith("[::1]:")
    assert site.ask(Channel.SERVER, "heartbeat", Heartbeat()).return_code is ReturnCode.OK


@pytest.mark.parametrize("name", ["ssl_root_cert", "ssl_cert", "ssl_private_key"])
@pytest.mark.parametrize("content", [None, b"", b"no PEM"])
def test_a_file_that_is_not_what_it_should_be_is_named(
    make_server: MakeServer, project: Project, tmp_path: Path, name: str, content: bytes | None
) -> None:
    grpc_args = project.grpc_args()
    grpc_args[name] = path = tmp_path / "bad.pem"
    if content is not None:
        path.write_bytes(content)
    server = make_server()

    with pytest.raises(ConfigError, match=r"bad\.pem"):
        server.deploy(args(tmp_path / "ws"), grpc_args, secure_train=True)

    assert server.get_cell() is None
    server.deploy(args(tmp_path / "ws"), project.grpc_args(), secure_train=True)
    assert server.get_cell() is not None


def test_a_key_of_another_certificate_is_named(make_server: MakeServer, project: Project, tmp_path: Path) -> None:
    grpc_args = project.grpc_args(ssl_private_key=project.folder / "site-1" / "key.pem")

    with pytest.raises(ConfigError, match="key file"):
        make_server().deploy(args(tmp_path), grpc_args, secure_train=True)


def test_a_deploy_that_failed_lets_go_of_the_workspace(
    make_server: MakeServer, deployed_plain: MakeServer, tmp_path: Path
) -> None:
    other = deployed_plain(tmp_path / "other")
    server = make_server()
    with pytest.raises(ConfigError, match="target"):
        server.deploy(args(tmp_path / "ws"), {"service": {"target": target_of(other)}})

    server.deploy(args(tmp_path / "ws"), {"service": {"target": "127.0.0.1:0"}})

    assert names(server) == []
    assert server.jobs is not None


def test_a_store_that_cannot_be_opened_is_an_error_of_deploy(make_server: MakeServer, tmp_path: Path) -> None:
    (tmp_path / "store.db").write_bytes(b"no database" * 1000)
    server = make_server()

    with pytest.raises(HanseError, match="store"):
        server.deploy(args(tmp_path), {"service": {"target": "127.0.0.1:0"}})


def test_a_given_store_is_used_and_closed(make_server: MakeServer, tmp_path: Path) -> None:
    store = MemoryStore()
    server = make_server(snapshot_persistor=store)
    server.deploy(args(tmp_path), {"service": {"target": "127.0.0.1:0"}})
    job_id = submit(server, tmp_path)
    assert wait(store.job(job_id)).state is JobState.SUBMITTED

    server.close()

    assert not (tmp_path / "store.db").exists()
    with pytest.raises(HanseError, match="not open"):
        wait(store.job(job_id))


def test_a_workspace_is_private_and_its_path_may_be_long(deployed_plain: MakeServer, tmp_path: Path) -> None:
    workspace = tmp_path / ("long" * 30) / "ws"

    server = deployed_plain(workspace)

    assert workspace.stat().st_mode & 0o077 == 0
    assert (workspace / "token.secret").stat().st_mode & 0o077 == 0
    assert server.close() == 0


def test_command_modules_answer_what_they_register(deployed: MakeServer, dialler: Dialler) -> None:
    class Listing:
        def register(self, server: FederatedServer, cell: Cell) -> None:
            self.server = server
            cell.on(Channel.ADMIN, "client.list", self.answer)

        def answer(self, message: Message) -> Message:
            del message
            return ok(ClientList(()))

    module: CommandModule = Listing()
    server = deployed(cmd_modules=[module])

    reply = dialler.site(server, "mel@demo").ask(Channel.ADMIN, "client.list", ListClients())

    assert reply.payload == ClientList(())
    assert module.server is server  # type: ignore[attr-defined]
    refused = dialler.site(server, "site-1").refused(Channel.ADMIN, "client.list", ListClients())
    assert "site-1 may not send admin/client.list" in refused.reason


def test_the_memory_scheme_listens_nowhere_and_is_dialled_in_this_process(
    make_server: MakeServer, tmp_path: Path
) -> None:
    server = make_server()
    server.deploy(args(tmp_path), {"service": {"target": "127.0.0.1:0", "scheme": "memory"}})

    pipe = wait(server.reception.dial("anywhere"))
    wait(pipe.close())

    assert target_of(server) == "127.0.0.1:0"


# the end --------------------------------------------------------------------------------------------------------------


def test_an_orderly_shutdown_tells_clients_and_waits_for_them(
    deployed: MakeServer, dialler: Dialler, recorder: Recorder
) -> None:
    server = deployed(handlers=[recorder], shutdown_period=600)
    site = dialler.site(server)
    leaving = threading.Thread(target=server.fl_shutdown)
    leaving.start()
    goodbye = site.told(Channel.JOB, "goodbye")
    assert goodbye.retry
    assert leaving.is_alive()

    wait(site.close())
    leaving.join(20)

    assert not leaving.is_alive()
    assert EventType.SYSTEM_END in recorder.kinds
    assert server.get_cell() is not None
    assert server.fl_shutdown() is None  # type: ignore[func-returns-value]


def test_clients_that_do_not_leave_are_waited_for_no_longer_than_the_period(
    deployed: MakeServer, dialler: Dialler
) -> None:
    server = deployed(shutdown_period=0.05)
    site = dialler.site(server)

    server.fl_shutdown()

    assert site.told(Channel.JOB, "goodbye").reason == "the server shuts down"


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


def test_the_system_starts_once_and_ends_once(deployed_plain: MakeServer, recorder: Recorder) -> None:
    server = deployed_plain(handlers=[recorder])

    server.fl_shutdown()
    server.fl_shutdown()
    server.close()

    assert recorder.kinds == [EventType.SYSTEM_START, EventType.SYSTEM_END]


def test_two_instances_of_one_class_both_hear_and_one_that_fails_hurts_nobody(deployed_plain: MakeServer) -> None:
    first, second = Recorder({EventType.SYSTEM_START: RuntimeError("no")}), Recorder()

    deployed_plain(handlers=[first, second])

    assert first.kinds == second.kinds == [EventType.SYSTEM_START]


def test_closing_stops_the_overseers_agent_even_where_nothing_was_deployed(make_server: MakeServer) -> None:
    class Agent(ScriptedOverseer):
        ended = 0

        def end(self) -> None:
            self.ended += 1
            super().end()

    agent = Agent()
    server = make_server(overseer_agent=agent)

    assert server.close() == 0

    assert agent.ended >= 1


def test_nothing_is_left_running_after_close(deployed: MakeServer, dialler: Dialler) -> None:
    before = on_loop(lambda: {task for task in asyncio.all_tasks() if not task.done()})
    server = deployed()
    site = dialler.site(server)
    site.ask(Channel.SERVER, "quit", Quit())
    dialler.close()
    server.close()

    left = on_loop(lambda: {task.get_name() for task in asyncio.all_tasks() - before if not task.done()})

    assert {name for name in left if not name.startswith("Task-")} == set()


def test_a_server_that_is_closed_under_its_clients_sends_them_away(deployed: MakeServer, dialler: Dialler) -> None:
    server = deployed()
    site = dialler.site(server)
    down = threading.Event()
    on_loop(lambda: site.cell.on_link_down(lambda *_: down.set()))

    server.close()

    assert down.wait(10)


def test_a_job_outlives_a_server_that_is_closed_in_the_middle_of_it(
    deployed: MakeServer, dialler: Dialler, tmp_path: Path
) -> None:
    store = MemoryStore()
    launcher = on_loop(ScriptedLauncher)
    server = deployed(arguments=args(tmp_path / "ws", launcher=launcher, settings=settings()), snapshot_persistor=store)
    Site(dialler, server, "site-1")
    job_id = submit(server, tmp_path, min_clients=1, process_tries=1)
    process = launcher.next()

    server.close()

    assert wait(process.wait()) == -15
    assert wait(_stored(store, job_id)) is JobState.RUNNING


async def _stored(store: MemoryStore, job_id: JobId) -> JobState:
    async with store:
        return (await store.job(job_id)).state


# a run in this process ------------------------------------------------------------------------------------------------


def test_without_a_run_there_is_nothing_to_run_abort_or_stop(make_server: MakeServer) -> None:
    server = make_server()

    server.abort_run()
    server.stop_training()
    server.stop_run_engine_cell()
    with pytest.raises(Conflict, match="not started"):
        server.run_engine()


def test_a_run_needs_its_job_cell(make_server: MakeServer, tmp_path: Path) -> None:
    with pytest.raises(Conflict, match="without a job cell"):
        make_server().start_run("tiny-1", tmp_path, spec(), None, None)


@pytest.mark.parametrize("config", [{}, {"credentials": "token"}])
def test_a_job_cell_needs_credentials(make_server: MakeServer, config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="credentials"):
        make_server().create_job_cell("tiny-1", "", "unix:/nowhere", False, config)


def test_a_job_cell_of_a_parent_that_is_not_there_is_unreachable(
    deployed_plain: MakeServer, make_server: MakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hanse.server.job_cell.CONNECT_TIMEOUT_S", 0.2)
    given = deployed_plain().clients.job_credentials("server.tiny-1", JobId("tiny-1"))  # type: ignore[arg-type]

    with pytest.raises(Unreachable):
        make_server().create_job_cell(
            "tiny-1", "", f"unix:{tmp_path}/no.sock", False, {"credentials": given.credentials}
        )


def test_a_job_cell_with_credentials_of_another_server_is_refused(
    deployed_plain: MakeServer, make_server: MakeServer, tmp_path: Path
) -> None:
    one, other = deployed_plain(tmp_path / "one"), deployed_plain(tmp_path / "other")
    given = one.clients.job_credentials("server.tiny-1", JobId("tiny-1"))  # type: ignore[arg-type]
    where = f"unix:{tmp_path / 'other' / 'jobs.sock'}"

    with pytest.raises(HanseError, match="not one that this project's server gave"):
        make_server().create_job_cell("tiny-1", "", where, False, {"credentials": given.credentials})
    assert names(other) == []


def test_the_run_manager_holds_components_handlers_and_context(make_server: MakeServer, tmp_path: Path) -> None:
    recorder, component = Recorder(), Recorder()
    server = make_server(handlers=[recorder])

    manager = server.create_run_manager(str(tmp_path), "tiny-1")
    with_component = manager.add("watch", component)
    with_component.fire(EventType.START_RUN)

    assert (manager.job_id, manager.workspace, manager.components) == ("tiny-1", tmp_path, {})
    assert with_component.components == {"watch": component}
    assert manager.context == FLContext("run", project=PROJECT, job_id=JobId("tiny-1"))
    assert recorder.kinds == component.kinds == [EventType.START_RUN]
    assert recorder.of(EventType.START_RUN) == [manager.context]


def driven(
    deployed: MakeServer, dialler: Dialler, tmp_path: Path, run_server: FederatedServer, **fields: Any
) -> tuple[FederatedServer, Site, ScriptedLauncher, JobId]:
    """A deployed server whose run's process is *run_server*, in the hands of the test; its job cell is connected."""
    launcher = on_loop(ScriptedLauncher)
    server = deployed(arguments=args(tmp_path / "ws", launcher=launcher, settings=settings()))
    site = Site(dialler, server, "site-1")
    job_id = submit(server, tmp_path, min_clients=1, **fields)
    launcher.next()
    (run_spec,) = launcher.specs
    cell = run_server.create_job_cell(job_id, "", run_spec.parent_url, False, {"credentials": run_spec.credentials})
    assert cell.fqcn == f"server.{job_id}"
    return server, site, launcher, job_id


def in_thread(work: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(work()), daemon=True)
    thread.start()
    return thread, results


def test_a_run_driven_by_the_two_calls_of_the_contract(
    deployed: MakeServer, make_server: MakeServer, dialler: Dialler, tmp_path: Path
) -> None:
    recorder = Recorder()
    run_server = make_server(handlers=[recorder], check_engine_frequency=0.01)
    server, site, launcher, job_id = driven(
        deployed, dialler, tmp_path, run_server, workflow=WorkflowSpec("fedavg", {"rounds": 1})
    )
    folder, job_spec = Path(launcher.specs[0].folder), launcher.specs[0].spec
    thread, results = in_thread(lambda: run_server.start_run(job_id, folder, job_spec, None, None))
    task = site.task()
    with pytest.raises(Conflict, match="running another"):
        run_server.start_run(job_id, folder, job_spec, None, None)

    site.send(answer(task, w(2)))
    thread.join(20)
    run_server.stop_run_engine_cell()
    run_server.stop_run_engine_cell()

    (end,) = results
    assert end.completed
    record = outcome(server, job_id)
    assert (record.state, record.result) == (JobState.COMPLETED, end.result)
    assert recorder.kinds == [EventType.START_RUN, EventType.END_RUN]
    assert {context.scope for context in recorder.of(*EventType)} == {"run"}
    with pytest.raises(Conflict, match="not started"):
        run_server.run_engine()


def test_a_run_with_a_snapshot_goes_on_from_there(
    deployed: MakeServer, make_server: MakeServer, dialler: Dialler, tmp_path: Path
) -> None:
    first_process = make_server()
    server, site, launcher, job_id = driven(deployed, dialler, tmp_path, first_process)
    (run_spec,) = launcher.specs
    folder, job_spec = Path(run_spec.folder), run_spec.spec
    thread, ends = in_thread(lambda: first_process.start_run(job_id, folder, job_spec, None, None))
    site.send(answer(site.task(), w(2)))
    second_round = site.task()
    first_process.stop_run_engine_cell()
    thread.join(20)
    assert [end.completed for end in ends] == [False]

    committed = wait(server.jobs.services.store.snapshot(job_id)).state
    assert committed is not None
    assert committed.round == 1
    snapshot = RunSnapshot(job_id, job_spec, (ClientName("site-1"),), committed)
    second_process = make_server()
    credentials = {"credentials": run_spec.credentials}
    second_process.create_job_cell(job_id, "", run_spec.parent_url, False, credentials)
    thread, results = in_thread(lambda: second_process.start_run(job_id, folder, job_spec, None, snapshot))
    site.send(answer(second_round, w(3)))
    thread.join(20)
    launcher.stops.set()

    assert [end.completed for end in results] == [True], "the round was not begun anew: its one answer was enough"
    assert outcome(server, job_id).state is JobState.COMPLETED
    second_process.stop_run_engine_cell()


def test_a_run_that_its_server_aborts_ends_and_says_so(
    deployed: MakeServer, make_server: MakeServer, dialler: Dialler, tmp_path: Path
) -> None:
    run_server = make_server()
    server, site, launcher, job_id = driven(deployed, dialler, tmp_path, run_server)
    folder, job_spec = Path(launcher.specs[0].folder), launcher.specs[0].spec
    thread, results = in_thread(lambda: run_server.start_run(job_id, folder, job_spec, None, None))
    site.task()

    wait(server.jobs.abort(job_id, reason="ada wants another"))
    thread.join(20)

    (end,) = results
    assert (end.completed, end.code, end.reason) == (False, "aborted", "ada wants another")
    assert outcome(server, job_id).state is JobState.ABORTED


def test_a_handler_of_the_run_that_fails_at_a_notice_hurts_nobody(
    deployed: MakeServer, make_server: MakeServer, dialler: Dialler, tmp_path: Path
) -> None:
    run_server = make_server(handlers=[Recorder({EventType.START_RUN: RuntimeError("no")}), FLComponent()])
    _, site, launcher, job_id = driven(
        deployed, dialler, tmp_path, run_server, workflow=WorkflowSpec("fedavg", {"rounds": 1})
    )
    folder, job_spec = Path(launcher.specs[0].folder), launcher.specs[0].spec
    thread, results = in_thread(lambda: run_server.start_run(job_id, folder, job_spec, None, None))

    site.send(answer(site.task(), w(2)))
    thread.join(20)

    assert results[0].completed


def test_a_plain_program_registers_and_beats(make_server: MakeServer) -> None:
    server = make_server()
    headers = register_plain(server)

    assert server.client_heartbeat(Message(headers, Heartbeat())).return_code is ReturnCode.OK
    assert server.quit_client(Message(headers, Quit())).return_code is ReturnCode.OK
