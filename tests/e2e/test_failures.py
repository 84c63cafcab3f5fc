"""What fails at one client, with real processes, is told with its code, the client, its log's last lines and advice.

Heartbeats are ten minutes apart here, so whatever is told was told at once.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from benchmarks.deployment import ADMIN, HANSE, Deployment, deployment

from hanse.codes import CODES
from tests.certificates import certify_anew

JOB = Path(__file__).parent / "failing"
BROKEN = "site-2"


@pytest.fixture(scope="module")
def running() -> Iterator[Deployment]:
    """Run a server and a client that trains; the other is started as a test says."""
    with deployment(settings="settings = { heartbeat_s = 600.0 }") as up:
        up.start("server", "site-1")
        yield up


@pytest.fixture
def broken(running: Deployment) -> Iterator[Deployment]:
    """Leave the second client stopped."""
    yield running
    if BROKEN in running.processes:
        running.end(BROKEN)


def hanse(running: Deployment, *arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "HANSE_KIT": str(running.kit(ADMIN))}
    return subprocess.run([*HANSE, *arguments], env=environment, capture_output=True, text=True, check=False)


def submitted(running: Deployment, how: str, **environment: str) -> str:
    running.environments[BROKEN] = {"HANSE_TEST_FAILS": how, **environment}
    running.start(BROKEN)
    return str(running.hanse("job", "submit", str(JOB))["job_id"])


FAILURES = {
    "missing": (
        "missing-dependency",
        "",
        "module 'no_such_package', which failing.py:15 imports, is not installed (at site-2)",
        "ModuleNotFoundError: No module named 'no_such_package'",
    ),
    "import": (
        "import-failed",
        "",
        "ImportError: cannot import name 'no_such_name' from 'json'",
        "from json import no_such_name",
    ),
    "raise": ("too-few-clients", "training-failed", "site-2 (KeyError: 'label' (failing.py:33))", "site-2 trains"),
    "kill": (
        "too-few-clients",
        "process-died",
        "the job's process at site-2 was killed by signal 9; its log ends with: site-2 trains",
        "site-2 trains",
    ),
}


@pytest.mark.parametrize("how", FAILURES)
def test_failure_at_one_client_is_told_at_once_with_code_client_log_and_advice(broken: Deployment, how: str) -> None:
    code, cause, sentence, logged = FAILURES[how]
    job = submitted(broken, how)

    ended = hanse(broken, "job", "wait", job, "--format", "json")

    assert ended.returncode == 20, ended.stderr
    view: dict[str, Any] = json.loads(ended.stdout)
    assert (view["state"], view["code"], view["client"], view["cause"]) == ("failed", code, BROKEN, cause)
    assert sentence in view["reason"]
    assert any(logged in line for line in view["log_tail"].splitlines())
    assert view["advice"] == CODES[cause or code].advice
    assert view["waiting"] == []

    shown = hanse(broken, "job", "show", job).stdout
    assert f"at         {BROKEN}{f' ({cause})' if cause else ''}\n" in shown
    assert f"(hanse explain {cause or code})" in shown
    assert f"log        its last lines at {BROKEN}:\n" in shown


OTHER_PROTOCOL = """
import sys
import hanse.client.agent
from hanse.cli import main

hanse.client.agent.PROTOCOL_VERSIONS = (99,)
sys.exit(main(sys.argv[1:]))
"""


def test_client_of_another_protocol_is_told_at_the_server_and_there_until_it_is_of_the_same(broken: Deployment) -> None:
    job = broken.hanse("job", "submit", str(JOB))["job_id"]

    command = [sys.executable, "-c", OTHER_PROTOCOL, "client", "start", str(broken.kit(BROKEN)), "--format", "json"]
    agent = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)

    told = json.loads(agent.stderr.splitlines()[-1])["error"]
    assert (agent.returncode, told["code"]) == (12, "version-mismatch")
    assert told["advice"] == CODES["version-mismatch"].advice
    (refused,) = broken.hanse("client", "list")["refused"]
    assert (refused["name"], refused["code"]) == (BROKEN, "version-mismatch")
    assert f"{BROKEN} runs Hanse " in refused["reason"]
    assert "protocol 99" in refused["reason"]
    (waiting,) = broken.hanse("job", "show", job)["waiting"]
    (absent,) = waiting["whom"]
    assert (absent["name"], absent["state"]) == (BROKEN, "absent")
    assert absent["reason"] == f"{refused['reason']} [version-mismatch]"
    assert f"           {BROKEN}: cannot come: {BROKEN} runs Hanse " in hanse(broken, "job", "show", job).stdout

    broken.environments.pop(BROKEN, None)
    broken.start(BROKEN)
    assert broken.hanse("job", "wait", job)["state"] == "completed"
    assert broken.hanse("client", "list")["refused"] == []


@pytest.mark.slow
def test_certificate_that_expires_at_one_client_is_told_at_the_server_and_there() -> None:
    with deployment(settings="settings = { heartbeat_s = 1.0 }") as running:
        lifetime = timedelta(seconds=25)  # time enough to register on a busy machine
        certify_anew(running.kit(BROKEN), running.kit("authority"), made=datetime.now(UTC), lifetime=lifetime)
        gate = running.root / "gate"
        os.mkfifo(gate)
        running.start("server", "site-1")
        job = submitted(running, "wait", HANSE_TEST_GATE=str(gate))
        with gate.open("wb"):  # from here on the client is in the middle of its training
            assert running.processes[BROKEN].wait(60) == 5
            ended = json.loads(hanse(running, "job", "wait", job, "--format", "json").stdout)
        listed = hanse(running, "client", "list").stdout
        next_job = running.hanse("job", "submit", str(JOB))["job_id"]
        (waiting,) = running.hanse("job", "show", next_job)["waiting"]
        told = running.log(BROKEN).read_text().splitlines()[-1]

    because = "its certificate expired on "
    assert (ended["state"], ended["code"], ended["client"]) == ("failed", "too-few-clients", BROKEN)
    assert ended["cause"] == "certificate-expired"
    assert f"{BROKEN} was not connected for 3 s: {because}" in ended["reason"]
    assert ended["advice"] == CODES["certificate-expired"].advice
    assert any(line.startswith(BROKEN) and because in line for line in listed.splitlines())
    assert [(each["name"], each["state"]) for each in waiting["whom"]] == [(BROKEN, "absent")]
    assert waiting["whom"][0]["reason"].startswith(because)
    assert told.startswith("hanse: the certificate of 'site-2' expired on ")
    assert told.endswith(" [certificate-expired]")


def test_running_job_says_for_whom_it_waits_until_when_and_what_then(broken: Deployment, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    job = submitted(broken, "wait", HANSE_TEST_GATE=str(gate))

    with gate.open("wb"):  # from here on the client is in the middle of its training
        view = broken.hanse("job", "show", job)
        shown = hanse(broken, "job", "show", job).stdout

    (awaited,) = view["waiting"]
    assert awaited["what"].startswith("answers to 'train' of round 1 from ")
    assert (BROKEN, "running", 1) in [(each["name"], each["state"], each["attempt"]) for each in awaited["whom"]]
    assert view["started_at"] <= awaited["since"] < awaited["until"]
    assert "and fails with fewer" in awaited["then"]
    assert f"           {BROKEN}: connected and working, since " in shown
    assert broken.hanse("job", "wait", job)["state"] == "completed"
