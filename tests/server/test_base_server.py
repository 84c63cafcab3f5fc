"""``BaseServer``, row by row: clients, liveness, the endpoint."""

import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from hanse.cell.refusals import RemoteError
from hanse.errors import ConfigError, Conflict
from hanse.ids import ClientName, Fqcn, Token
from hanse.messages import Client
from hanse.server import BaseServer

from .world import PROJECT, Admin, Clock, Dialler, Project, Wire, args, names, target_of


class Bare(BaseServer):
    """The least that makes a server of the base."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.forgotten: list[str] = []
        self.notified: list[str] = []
        self.breaks_at = ""

    def remove_client_data(self, token: str) -> None:
        if token == self.breaks_at:
            raise RuntimeError("cannot forget")
        self.forgotten.append(token)

    def notify_dead_client(self, client: Client) -> None:
        self.notified.append(client.name)

    def add(self, name: str, token: str = "") -> Client:
        token = token or f"token-{name}"
        return self._registry.register(
            ClientName(name), Token(token), fqcn=Fqcn(name), now=self.clock(), props={"release": "1"}
        ).client

    def hear(self, name: str) -> None:
        self._registry.heard(Token(f"token-{name}"), now=self.clock())


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def bare(clock: Clock) -> Iterator[Bare]:
    server = Bare(PROJECT, heart_beat_timeout=60)
    server.clock = clock
    yield server
    server.close()


# construction ---------------------------------------------------------------------------------------------------------


def test_the_base_alone_is_abstract() -> None:
    with pytest.raises(TypeError, match="remove_client_data"):
        BaseServer(PROJECT)  # type: ignore[abstract]


@pytest.mark.parametrize(("least", "most"), [(0, 10), (-1, 10), (3, 2), (1, 0)])
def test_limits_that_contradict_each_other_are_a_value_error(least: int, most: int) -> None:
    with pytest.raises(ValueError, match="1 <= min_num_clients <= max_num_clients"):
        Bare(PROJECT, least, most)


def test_the_defaults_are_the_contracts() -> None:
    server = Bare()

    assert (server.min_num_clients, server.max_num_clients) == (2, 10)
    assert (server.heart_beat_timeout, server.shutdown_period) == (600, 30.0)
    assert Bare(PROJECT, 1, 1).max_num_clients == 1


def test_a_handler_that_is_none_is_named() -> None:
    with pytest.raises(TypeError, match=r"handlers\[0\]"):
        Bare(PROJECT, handlers=["not a component"])


# clients --------------------------------------------------------------------------------------------------------------


def test_the_client_table_is_a_snapshot(bare: Bare) -> None:
    bare.add("site-1")
    handed_out = bare.get_all_clients()
    assert {token: client.name for token, client in handed_out.items()} == {"token-site-1": "site-1"}

    handed_out["token-site-1"].name = ClientName("mallory")
    handed_out["token-site-1"].props["release"] = "changed"
    handed_out.clear()

    (client,) = bare.get_all_clients().values()
    assert (client.name, client.fqcn, client.props) == ("site-1", "site-1", {"release": "1"})


def test_logging_out_removes_a_client_everywhere_and_returns_it(bare: Bare) -> None:
    admin = Admin()
    bare.set_admin_server(admin)
    bare.add("site-1")
    bare.add("site-2")

    client = bare.logout_client("token-site-1")

    assert client is not None
    assert (client.name, client.token) == ("site-1", "token-site-1")
    assert names(bare) == ["site-2"]
    assert (bare.forgotten, bare.notified, admin.dead) == (["token-site-1"], ["site-1"], ["site-1"])


def test_logging_out_an_unknown_token_is_none_and_tells_nobody(bare: Bare) -> None:
    admin = Admin()
    bare.set_admin_server(admin)

    assert bare.logout_client("nobody's") is None
    assert (bare.forgotten, bare.notified, admin.dead) == ([], [], [])


def test_the_admin_server_may_be_none_again(bare: Bare) -> None:
    admin = Admin()
    bare.set_admin_server(admin)
    bare.set_admin_server(None)
    bare.add("site-1")

    assert bare.logout_client("token-site-1") is not None
    assert admin.dead == []


def test_a_broken_admin_server_keeps_no_run_from_hearing_of_a_dead_client(bare: Bare) -> None:
    bare.set_admin_server(Admin(fails=True))
    bare.add("site-1")

    assert bare.logout_client("token-site-1") is not None
    assert bare.notified == ["site-1"]


def test_notify_dead_client_does_nothing_in_the_base(bare: Bare) -> None:
    BaseServer.notify_dead_client(bare, bare.add("site-1"))

    assert names(bare) == ["site-1"]


# liveness -------------------------------------------------------------------------------------------------------------


def test_a_client_is_dead_after_the_timeout_of_the_servers_own_clock(bare: Bare, clock: Clock) -> None:
    bare.add("site-1")
    clock.advance(30)
    bare.add("site-2")
    clock.advance(29.9)
    bare.remove_dead_clients()
    assert names(bare) == ["site-1", "site-2"]

    clock.advance(0.1)
    bare.remove_dead_clients()

    assert names(bare) == ["site-2"]
    assert bare.notified == ["site-1"]


def test_a_client_that_is_heard_lives(bare: Bare, clock: Clock) -> None:
    bare.add("site-1")
    clock.advance(59)
    bare.hear("site-1")
    clock.advance(59)

    bare.remove_dead_clients()

    assert names(bare) == ["site-1"]


def test_the_wall_clock_makes_nobody_dead(bare: Bare, monkeypatch: pytest.MonkeyPatch) -> None:
    bare.add("site-1")
    monkeypatch.setattr("time.time", lambda: 4e9)

    bare.remove_dead_clients()

    assert names(bare) == ["site-1"]


def test_one_client_that_cannot_be_removed_keeps_no_other(
    bare: Bare, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("site-1", "site-2", "site-3"):
        bare.add(name)
    bare.breaks_at = "token-site-2"
    clock.advance(60)

    bare.remove_dead_clients()

    assert names(bare) == []
    assert bare.notified == ["site-1", "site-3"]
    assert "dead client not removed" in caplog.text


def in_thread(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_an_exception_does_not_end_the_detection_of_dead_clients(
    bare: Bare, clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    looked = threading.Semaphore(0)
    honest = bare.remove_dead_clients
    failures = iter([RuntimeError("once"), RuntimeError("twice")])

    def remove_dead_clients() -> None:
        looked.release()
        for failure in failures:
            raise failure
        honest()

    monkeypatch.setattr(bare, "remove_dead_clients", remove_dead_clients)
    bare.add("site-1")
    clock.advance(60)
    loop = in_thread(bare.client_cleanup)

    for _ in range(3):
        assert looked.acquire(timeout=10)
    bare.close()
    loop.join(10)

    assert not loop.is_alive()
    assert names(bare) == []
    assert caplog.text.count("looking for dead clients failed") == 2


class OneWait:
    """A condition in which the loop waits once; then the server closes."""

    def __init__(self, server: Bare) -> None:
        self._server = server
        self.timeouts: list[float | None] = []

    def __enter__(self) -> "OneWait":
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def wait(self, timeout: float | None) -> None:
        self.timeouts.append(timeout)
        self._server._closing = True

    def notify_all(self) -> None:
        return None


def waited(server: Bare, monkeypatch: pytest.MonkeyPatch) -> float | None:
    """Return how long the liveness loop means to wait now."""
    condition = OneWait(server)
    monkeypatch.setattr(server, "_woken", condition)
    server.client_cleanup()
    (timeout,) = condition.timeouts
    return timeout


def test_a_timeout_without_an_end_is_waited_for_as_long_as_can_be(bare: Bare, monkeypatch: pytest.MonkeyPatch) -> None:
    bare.heart_beat_timeout = math.inf
    bare.add("site-1")

    assert waited(bare, monkeypatch) == threading.TIMEOUT_MAX


def test_the_liveness_loop_waits_for_ever_where_there_is_nobody(bare: Bare, monkeypatch: pytest.MonkeyPatch) -> None:
    assert waited(bare, monkeypatch) is None


def test_the_liveness_loop_waits_until_the_first_client_would_be_dead(
    bare: Bare, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare.add("site-1")
    clock.advance(20)
    bare.add("site-2")

    assert waited(bare, monkeypatch) == 40


def test_the_liveness_loop_does_not_spin_for_a_client_that_beats_without_a_stream(
    bare: Bare, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare.add("site-1")
    for _ in range(5):
        clock.advance(50)
        bare.hear("site-1")

    assert waited(bare, monkeypatch) == 60


# the endpoint ---------------------------------------------------------------------------------------------------------


def test_there_is_no_cell_before_deploy(bare: Bare, tmp_path: Path) -> None:
    assert bare.get_cell() is None

    bare.deploy(args(tmp_path), {"service": {"target": "127.0.0.1:0", "scheme": "grpc"}})

    cell = bare.get_cell()
    assert cell is not None
    assert cell.fqcn == "server"
    assert target_of(bare).startswith("127.0.0.1:")
    assert not target_of(bare).endswith(":0")


def healthy(target: str, credentials: grpc.ChannelCredentials | None = None) -> bool:
    with grpc.secure_channel(target, credentials) if credentials else grpc.insecure_channel(target) as channel:
        reply = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
    return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


def test_deploy_returns_when_the_port_answers(bare: Bare, tmp_path: Path) -> None:
    bare.deploy(args(tmp_path), {"service": {"target": "127.0.0.1:0"}})

    assert healthy(target_of(bare))


def test_ipv6_works(bare: Bare, tmp_path: Path) -> None:
    bare.deploy(args(tmp_path), {"service": {"target": "[::1]:0"}})

    assert target_of(bare).startswith("[::1]:")
    assert healthy(target_of(bare))


def test_the_host_part_is_honoured(bare: Bare, tmp_path: Path) -> None:
    bare.deploy(args(tmp_path), {"service": {"target": "127.0.0.1:0"}})
    port = target_of(bare).rpartition(":")[2]

    with grpc.insecure_channel(f"[::1]:{port}") as channel, pytest.raises(grpc.RpcError) as refused:
        health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


def test_tls_is_spoken_with_the_three_files(bare: Bare, project: Project, tmp_path: Path) -> None:
    bare.deploy(args(tmp_path), project.grpc_args(), secure_train=True)
    site = project.site("site-1")

    assert healthy(target_of(bare), grpc.ssl_channel_credentials(project.roots, site.key_pem, site.certificate))
    with pytest.raises(grpc.RpcError):
        healthy(target_of(bare), grpc.ssl_channel_credentials(project.roots))


def test_nobody_may_use_the_bases_port(bare: Bare, tmp_path: Path, dialler: Dialler) -> None:
    bare.deploy(args(tmp_path), {"service": {"target": "127.0.0.1:0"}})

    refused = dialler.refused(Wire(target_of(bare), "site-1"))

    assert isinstance(refused, RemoteError)
    assert "a server that registers clients" in refused.reason


@pytest.mark.parametrize("name", ["ssl_root_cert", "ssl_cert", "ssl_private_key"])
@pytest.mark.parametrize("what", ["left out", "missing", "a folder"])
def test_a_secure_deploy_names_the_file_that_is_not_there(
    bare: Bare, project: Project, tmp_path: Path, name: str, what: str
) -> None:
    grpc_args = project.grpc_args()
    if what == "left out":
        del grpc_args[name]
    else:
        grpc_args[name] = tmp_path / "no-such.pem" if what == "missing" else tmp_path

    with pytest.raises(ConfigError, match=name) as raised:
        bare.deploy(args(tmp_path), grpc_args, secure_train=True)

    if what != "left out":
        assert str(grpc_args[name]) in raised.value.reason
    assert bare.get_cell() is None


@pytest.mark.parametrize(
    "target", ["localhost", "::1:6007", "127.0.0.1:65536", "127.0.0.1:-1", ":6007", "[::1]", "a b:1", 6007, None]
)
def test_a_target_that_is_none_is_named(bare: Bare, tmp_path: Path, target: object) -> None:
    with pytest.raises(ConfigError, match="target"):
        bare.deploy(args(tmp_path), {"service": {"target": target}})


@pytest.mark.parametrize(
    ("grpc_args", "field"),
    [({"service": "localhost:1"}, "service"), ({"service": {"target": "127.0.0.1:0", "scheme": "http"}}, "scheme")],
)
def test_what_is_wrong_in_grpc_args_is_named(bare: Bare, tmp_path: Path, grpc_args: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        bare.deploy(args(tmp_path), grpc_args)


def test_a_workspace_is_needed(bare: Bare) -> None:
    with pytest.raises(ConfigError, match=r"args\.workspace"):
        bare.deploy(args(None))  # type: ignore[arg-type]


def test_a_port_in_use_is_named_and_another_can_be_tried(bare: Bare, tmp_path: Path) -> None:
    other = Bare(PROJECT)
    other.deploy(args(tmp_path / "other"), {"service": {"target": "127.0.0.1:0"}})
    try:
        with pytest.raises(ConfigError, match=target_of(other)):
            bare.deploy(args(tmp_path), {"service": {"target": target_of(other)}})
    finally:
        other.close()

    bare.deploy(args(tmp_path), {"service": {"target": "127.0.0.1:0"}})
    assert healthy(target_of(bare))


def test_deploying_twice_is_a_conflict_and_changes_nothing(bare: Bare, tmp_path: Path) -> None:
    bare.deploy(args(tmp_path), {"service": {"target": "127.0.0.1:0"}})
    target = target_of(bare)

    with pytest.raises(Conflict, match="deployed"):
        bare.deploy(args(tmp_path), {"service": {"target": "127.0.0.1:0"}})

    assert target_of(bare) == target
    assert healthy(target)


def test_a_port_without_tls_is_loud_unless_it_is_loopback(
    bare: Bare, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    bare.deploy(args(tmp_path), {"service": {"target": "0.0.0.0:0"}})

    (said,) = [record for record in caplog.records if "INSECURE" in record.message]
    assert said.levelname == "WARNING"


def test_closing_twice_is_once(bare: Bare, tmp_path: Path) -> None:
    bare.deploy(args(tmp_path), {"service": {"target": "127.0.0.1:0"}})
    target = target_of(bare)
    before = {thread.name for thread in threading.enumerate()}
    assert "client cleanup" in before

    assert bare.close() == 0
    assert bare.close() == 0

    assert "client cleanup" not in {thread.name for thread in threading.enumerate()}
    with pytest.raises(grpc.RpcError):
        healthy(target)
    with pytest.raises(Conflict, match="closed"):
        bare.deploy(args(tmp_path), {"service": {"target": "127.0.0.1:0"}})


def test_two_threads_may_close(bare: Bare, tmp_path: Path) -> None:
    bare.deploy(args(tmp_path), {"service": {"target": "127.0.0.1:0"}})
    results: list[int] = []
    threads = [in_thread(lambda: results.append(bare.close())) for _ in range(4)]
    for thread in threads:
        thread.join(10)

    assert results == [0, 0, 0, 0]


def test_closing_what_was_never_deployed_is_fine(bare: Bare) -> None:
    assert bare.close() == 0


def test_an_orderly_shutdown_closes(bare: Bare, tmp_path: Path) -> None:
    bare.deploy(args(tmp_path), {"service": {"target": "127.0.0.1:0"}})
    target = target_of(bare)

    bare.fl_shutdown()
    bare.fl_shutdown()

    with pytest.raises(grpc.RpcError):
        healthy(target)
