"""The command itself: its lines, its exit status, and a federation that runs and is left alone."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from benchmarks.deployment import HANSE, Deployment, deployment, free_port

from hanse.doctor.findings import Check

from .conftest import Hanse

WITHIN_S = 60.0


@pytest.fixture(scope="module")
def running() -> Iterator[Deployment]:
    with deployment(clients=1) as project:
        project.start("server", "site-1")
        yield project


def lines(out: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in out.splitlines()]


def doctor(kit: Path, *, status: int = 0) -> list[dict[str, str]]:
    """What the command prints about *kit*, in a process of its own."""
    command = [*HANSE, "doctor", str(kit), "--format", "json"]
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=WITHIN_S, env=environment, check=False)
    assert (ended.returncode, ended.stderr) == (status, "")
    return lines(ended.stdout)


@pytest.mark.parametrize("name", ["server", "site-1", "admin@bench"])
def test_every_kit_of_a_running_federation_is_good(running: Deployment, name: str) -> None:
    found = doctor(running.root / "kits" / name)

    left = {(line["check"], line["verdict"]) for line in found} - {("descriptors", "warn"), ("disk", "warn")}
    assert {verdict for _, verdict in left} == {"ok"}
    assert {line["check"] for line in found} >= {"settings", "key", "certificate", "dates", "answer", "identity"}


def test_a_client_that_runs_is_seen_and_left_alone(running: Deployment) -> None:
    log = running.root / "site-1.log"
    before = log.read_text()
    found = doctor(running.root / "kits" / "site-1")

    (workspace,) = (line for line in found if line["check"] == "workspace")
    assert workspace["text"].endswith(f"used by what runs as process {running.processes['site-1'].pid}")
    (client,) = running.hanse("client", "list")["clients"]
    assert (client["name"], client["state"]) == ("site-1", "connected")
    assert log.read_text() == before, "its stream was not replaced"


def test_a_server_that_runs_says_so_by_its_own_kit(running: Deployment) -> None:
    (listen,) = (line for line in doctor(running.root / "kits" / "server") if line["check"] == "listen")

    assert f"the server runs as process {running.processes['server'].pid} and answers at 127.0.0.1:" in listen["text"]


STANDBY = """
[[standbys]]
name = "standby"
hosts = ["127.0.0.2"]
listen = "127.0.0.2"
port = {port}
"""


def test_a_standby_is_good_though_it_serves_nobody(tmp_path: Path) -> None:
    shared = f'settings = {{ store = "sqlite:///{tmp_path}/store.db", runs = "{tmp_path}/runs" }}'
    port = free_port()
    more = STANDBY.format(port=port)
    with deployment(clients=1, settings=shared, more=more, servers=("server", "standby")) as project:
        project.start("server")
        project.start("standby")

        found = doctor(project.kit("standby"))
        (answer,) = (line for line in found if line["check"] == "answer")
        assert answer["verdict"] == "ok"
        assert answer["text"].startswith("it runs, and serves nobody now (Server not in service: server at ")

        found = doctor(project.kit("site-1"))
        answers = {line["about"]: line["verdict"] for line in found if line["check"] == "answer"}
        assert answers == {
            f"localhost:{project.port}": "ok",
            f"127.0.0.1:{project.port}": "ok",
            f"127.0.0.2:{port}": "warn",
        }


@pytest.fixture
def kits(hanse: Hanse, tmp_path: Path) -> Path:
    (tmp_path / "project.toml").write_text(
        f'name = "demo"\n[server]\nhosts = ["127.0.0.1"]\nport = {free_port()}\n[[clients]]\nname = "site-1"\n'
    )
    assert hanse("provision", tmp_path / "project.toml", "--out", tmp_path / "kits").status == 0
    return tmp_path / "kits"


def test_a_line_says_verdict_check_and_what_to_do(hanse: Hanse, kits: Path) -> None:
    ended = hanse("doctor", kits / "site-1")

    told = ended.out.splitlines()
    assert told[0].startswith("ok    settings     site-1 is a client of project demo; dials 127.0.0.1:")
    (failed,) = (line for line in told if line.startswith("FAIL"))
    assert failed.startswith("FAIL  port         cannot reach 127.0.0.1:")
    assert failed.endswith("check that the server runs, its port, and firewalls between")
    skipped = [line for line in told if line.startswith("skip")]
    assert len(skipped) == 5
    assert all(line.endswith("not checked: 'port' failed") for line in skipped)
    assert (ended.status, ended.err) == (12, "")


def test_as_json_each_line_is_a_document_and_only_a_failure_has_a_code(hanse: Hanse, kits: Path) -> None:
    (kits / "site-1" / "key.pem").chmod(0o644)
    ended = hanse("doctor", kits / "site-1", "--format", "json")

    found = lines(ended.out)
    assert {tuple(line) for line in found} == {("check", "about", "verdict", "text", "code")}
    assert {line["check"] for line in found} <= set(Check)
    assert {line["check"]: line["code"] for line in found if line["code"]} == {"key": "config", "port": "unreachable"}
    assert ended.status == 2


def test_no_secret_is_printed(hanse: Hanse, kits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_grpc_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("grpc_proxy", "http://ada:hunter2@127.0.0.1:9")
    ended = hanse("doctor", kits / "site-1", "--verbose")

    assert "gRPC goes through http://127.0.0.1:9, as grpc_proxy says" in ended.out
    assert "hunter2" not in ended.out + ended.err
    key = (kits / "site-1" / "key.pem").read_text().splitlines()[1]
    assert key not in ended.out + ended.err


def test_a_folder_that_is_no_kit_is_said_to_be_none(hanse: Hanse, tmp_path: Path) -> None:
    ended = hanse("doctor", tmp_path / "nothing")

    assert ended.out.startswith("FAIL  settings     settings file is ")
    assert ended.status == 2


def test_nothing_is_made_in_a_kit(hanse: Hanse, kits: Path) -> None:
    def everything() -> dict[Path, Any]:
        return {path: path.stat().st_mtime_ns for path in kits.rglob("*")}

    before = everything()
    for name in ("server", "site-1"):
        hanse("doctor", kits / name)

    assert everything() == before
