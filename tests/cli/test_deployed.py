"""The commands as people run them: processes, certificates, a port."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from hanse.cli.job_text import JOB_ABORTED, JOB_FAILED
from hanse.storage.models import read_safetensors
from tests.certificates import certify_anew

HANSE = str(Path(sys.executable).with_name("hanse"))
WITHIN_S = 60.0


def hanse(*arguments: object, status: int = 0, **environment: str) -> Any:
    """Run a command and return its JSON document, or the error's where it should end with another status."""
    ended = subprocess.run(
        [HANSE, *map(str, arguments), "--format", "json"],
        capture_output=True,
        text=True,
        timeout=WITHIN_S,
        env=os.environ | environment,
        check=False,
    )
    assert ended.returncode == status, ended.stderr
    if status in (0, JOB_FAILED, JOB_ABORTED):
        return json.loads(ended.stdout)
    assert ended.stdout == ""
    return json.loads(ended.stderr.splitlines()[-1])  # before it come log lines, where the command shows a log


class Running:
    """A command that runs on, and the one line that it says when it is ready."""

    def __init__(self, process: "subprocess.Popen[str]", ready: dict[str, Any], log: Path) -> None:
        self.process, self.ready, self.log = process, ready, log


@contextmanager
def running(*arguments: object, log: Path) -> Iterator[Running]:
    with (
        log.open("w") as errors,
        subprocess.Popen(
            [HANSE, *map(str, arguments), "--format", "json"], stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, log.read_text()
            yield Running(process, json.loads(line), log)
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    (folder / "project.toml").write_text(
        f"""
name = "demo"
[server]
hosts = ["127.0.0.1"]
listen = "127.0.0.1"
port = {free_port()}
settings = {{ shutdown_period_s = 0.5, heartbeat_s = 1.0 }}
[[clients]]
name = "site-1"
[[clients]]
name = "site-2"
[[admins]]
name = "ada@demo"
[[admins]]
name = "mel@demo"
role = "member"
"""
    )
    hanse("provision", folder / "project.toml", "--out", folder / "kits")
    return folder / "kits"


def test_from_kits_to_a_model_in_a_file(kits: Path, tmp_path: Path) -> None:
    hanse("new", tmp_path / "job")
    ada: dict[str, str] = {"HANSE_KIT": str(kits / "ada@demo")}
    with running("server", "start", kits / "server", log=tmp_path / "server.log") as server:
        assert server.ready["project"] == "demo"
        assert server.ready["serving"].startswith("127.0.0.1:")
        assert server.ready["tls"] is True

        waiting = hanse("job", "submit", tmp_path / "job", **ada)["job_id"]
        shown = hanse("job", "show", waiting, **ada)
        assert shown["state"] == "submitted"
        (awaited,) = shown["waiting"]
        assert "registered" in awaited["what"]
        assert awaited["until"] > shown["submitted_at"]
        assert hanse("job", "abort", waiting, **ada)["state"] == "aborted"
        assert hanse("job", "wait", waiting, status=21, **ada)["reason"] == "aborted by ada@demo"
        refused = hanse("job", "submit", tmp_path / "job", "--kit", kits / "mel@demo", status=5)
        assert refused["error"]["code"] == "unauthorized"
        assert "running already" in hanse("server", "start", kits / "server", status=4)["error"]["reason"]

        with (
            running("client", "start", kits / "site-1", log=tmp_path / "site-1.log") as first,
            running("client", "start", kits / "site-2", log=tmp_path / "site-2.log") as second,
        ):
            assert first.ready == {"client": "site-1", "project": "demo", "registered": True}
            view = hanse("job", "submit", tmp_path / "job", "--wait", **ada)
            assert (view["state"], view["round"]) == ("completed", 10)
            assert view["metrics"]["eval_accuracy"] > 0.85
            clients = hanse("client", "list", **ada)
            assert [client["name"] for client in clients["clients"]] == ["site-1", "site-2"]
            assert clients["disabled"] == {}
            assert hanse("server", "status", **ada)["clients"] == 2
            listed = hanse("job", "list", **ada)["jobs"]
            assert [job["state"] for job in listed] == ["completed", "aborted"]

            model = tmp_path / "model.safetensors"
            assert hanse("job", "download", view["job_id"], model, **ada)["path"] == str(model)
            assert set(read_safetensors(model)) == {"weights", "bias"}
            assert hanse("job", "download", view["job_id"], model, status=4, **ada)["error"]["code"] == "conflict"

            stopped = hanse("client", "stop", kits / "site-1")
            assert stopped == {"client": "stopped", "process": first.process.pid, "left": []}
            assert first.process.wait(10) == 0
            second.process.send_signal(signal.SIGINT)
            assert second.process.wait(10) == 0

        assert hanse("server", "stop", kits / "server") == {"server": "stopped", "process": server.process.pid}
        assert server.process.wait(10) == 0
        assert hanse("server", "stop", kits / "server") == {"server": "not running", "process": None}
    lines = [json.loads(line) for line in (tmp_path / "server.log").read_text().splitlines()]
    assert {"hanse.server.clients", "hanse.cli.server"} <= {line["logger"] for line in lines}
    assert "Traceback" not in (tmp_path / "server.log").read_text()


def test_ctrl_c_ends_waiting_and_leaves_the_job_alone_and_ends_a_server_in_order(kits: Path, tmp_path: Path) -> None:
    hanse("new", tmp_path / "job")
    kit = kits / "ada@demo"
    with running("server", "start", kits / "server", log=tmp_path / "server.log") as server:
        job = hanse("job", "submit", tmp_path / "job", "--kit", kit)["job_id"]
        late = hanse("job", "wait", job, "--timeout", 0.05, "--kit", kit, status=12)
        assert "has not ended" in late["error"]["reason"]
        command = [HANSE, "job", "wait", job, "--kit", str(kit)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as waiting:
            assert waiting.stderr is not None
            assert "waits for" in waiting.stderr.readline()
            waiting.send_signal(signal.SIGINT)
            out, err = waiting.communicate(timeout=10)
        assert (waiting.returncode, out, err) == (130, "", "")
        assert hanse("job", "abort", job, "--kit", kit)["state"] == "aborted"
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(10) == 0


def certified_anew(kit: Path, authority: Path, copy: Path, made: datetime, *hosts: str, **more: timedelta) -> Path:
    """A copy of *kit* whose certificate, for the same key and by the same authority, was made at *made*."""
    shutil.copytree(kit, copy, ignore=shutil.ignore_patterns("workspace"))
    certify_anew(copy, authority, made=made, hosts=hosts, **more)
    return copy


def test_a_certificate_that_is_not_valid_now_is_said_to_be_that(kits: Path, tmp_path: Path) -> None:
    now, authority = datetime.now(UTC), kits / "authority"
    old = certified_anew(kits / "site-1", authority, tmp_path / "old", now - timedelta(days=400))
    early = certified_anew(kits / "site-1", authority, tmp_path / "early", now + timedelta(days=40))
    with running("server", "start", kits / "server", log=tmp_path / "server.log"):
        ended = hanse("client", "start", old, status=5)["error"]
        assert ended["code"] == "certificate-expired"
        since = f"{now - timedelta(days=40):%Y-%m-%d %H:%M} UTC"
        assert ended["reason"] == f"the certificate of 'site-1' expired on {since}; ask the project for a new one"
        ended = hanse("client", "start", early, status=5)["error"]
        assert ended["reason"].startswith("the certificate of 'site-1' is not valid before")


@pytest.mark.slow
def test_a_certificate_that_expires_while_a_client_runs_ends_it_when_it_has_to_connect_again(
    kits: Path, tmp_path: Path
) -> None:
    lifetime = timedelta(seconds=25)  # time enough to register on a busy machine
    kit = certified_anew(kits / "site-1", kits / "authority", tmp_path / "kit", datetime.now(UTC), lifetime=lifetime)
    with (
        running("server", "start", kits / "server", log=tmp_path / "server.log") as server,
        running("client", "start", kit, log=tmp_path / "client.log") as client,
    ):
        server.process.kill()
        assert client.process.wait(WITHIN_S) == 5
    told = json.loads((tmp_path / "client.log").read_text().splitlines()[-1])["error"]
    assert told["code"] == "certificate-expired"
    assert told["reason"].startswith("the certificate of 'site-1' expired on")


def test_a_servers_certificate_that_is_not_valid_now_keeps_it_from_starting(kits: Path, tmp_path: Path) -> None:
    made = datetime.now(UTC) - timedelta(days=400)
    old = certified_anew(kits / "server", kits / "authority", tmp_path / "old", made, "127.0.0.1")
    ended = hanse("server", "start", old, status=5)["error"]
    assert ended["reason"].startswith("the certificate of 'server' expired on")
    assert not (old / "workspace").exists()


def test_a_server_is_stopped_by_an_administrator_and_takes_no_strangers(kits: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "project.toml").write_text((kits.parent / "project.toml").read_text())
    hanse("provision", other / "project.toml", "--out", other / "kits")
    with running("server", "start", kits / "server", log=tmp_path / "server.log") as server:
        ended = hanse("client", "start", other / "kits" / "site-1", status=5)
        assert ended["error"]["code"] == "unauthenticated"
        assert "is not one that the project's CA issued; another project's server is there" in ended["error"]["reason"]
        asked = hanse("server", "stop", "--kit", kits / "ada@demo")
        assert asked == {"server": "asked to stop", "process": None}
        assert server.process.wait(10) == 0
