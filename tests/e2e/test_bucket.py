"""Two servers with disks of their own, a store and a bucket: one is killed in a round, the other goes on.

And a bucket that is away for a while, which a run waits for.
"""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from benchmarks.deployment import Deployment, two_servers

from hanse.cell.loop import run
from hanse.storage.models import read_safetensors
from hanse.storage.objects import objects_at
from tests.s3 import S3

JOB = Path(__file__).parent / "job"
ROUND = 3
DELETED_WITHIN_S = 60.0


@pytest.fixture
def running(tmp_path: Path, s3: S3, bucket_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Deployment]:
    """Run two servers and two clients; training waits at gates in *tmp_path*. The environment has what S3 needs."""
    monkeypatch.setenv("HANSE_TEST_GATES", str(tmp_path))
    with two_servers(runs=bucket_url) as up:
        up.start("server")
        up.start("standby", *up.names)
        yield up


def keys(bucket_url: str) -> list[str]:
    """Return what is in the bucket."""

    async def listed() -> list[str]:
        return sorted(await objects_at(bucket_url).sizes())

    return run(listed(), 30)


def without_tensors(bucket_url: str, job: str) -> list[str]:
    """Return what is in the bucket of *job* once its tensors are gone: that comes after its end, and nobody tells."""
    give_up_at = time.monotonic() + DELETED_WITHIN_S
    found = keys(bucket_url)
    while any("/tensors-" in key for key in found):
        assert time.monotonic() < give_up_at, f"tensors are left {DELETED_WITHIN_S:g} s after the end: {found}"
        found = keys(bucket_url)
    return [key for key in found if key.startswith(job)]


def gate(folder: Path) -> Path:
    """Make the gate at which site-1 will wait in the round that is disturbed."""
    path = folder / f"site-1-{ROUND}"
    os.mkfifo(path)
    return path


@pytest.mark.timeout(240)
def test_a_run_goes_on_at_the_other_server_which_has_no_disk_in_common_with_the_one_that_was_killed(
    running: Deployment, tmp_path: Path, bucket_url: str
) -> None:
    undisturbed = running.run(JOB)["result"]
    waiting = gate(tmp_path)
    job = running.hanse("job", "submit", str(JOB))["job_id"]
    with waiting.open("wb"):  # from here on site-1 is in the middle of its training
        running.kill("server")
    ended = running.hanse("job", "wait", job)

    assert (ended["state"], ended["reason"]) == ("completed", "")
    assert ended["result"] == undisturbed
    assert [each["round"] for each in ended["history"]] == list(range(5))
    assert without_tensors(bucket_url, job) == [
        f"{job}/package/{_package_of(running, 'standby', job)}",
        f"{job}/result/{undisturbed}",
    ]

    # The one that was killed comes back with what it had, and hands out a result that it has never seen.
    running.start("server")
    running.end("standby")
    staying = {"package", "code", "result", "server.log"}
    assert {path.name for path in (running.workspace("standby") / "runs" / job).iterdir()} <= staying
    model = tmp_path / "model.safetensors"
    running.hanse("job", "download", job, str(model))
    assert set(read_safetensors(model)) == {"small", "large"}
    left = {path.name for path in (running.workspace("server") / "runs" / job).iterdir()}
    assert left <= staying, "its tensors of a run that has ended elsewhere are gone"


def _package_of(running: Deployment, server: str, job: str) -> str:
    (package,) = (running.workspace(server) / "runs" / job / "package").iterdir()
    return package.name


@pytest.mark.timeout(240)
def test_a_run_waits_for_a_bucket_that_is_away_and_says_so(
    running: Deployment, tmp_path: Path, s3: S3, bucket_url: str
) -> None:
    undisturbed = running.run(JOB)["result"]
    waiting = gate(tmp_path)
    job = running.hanse("job", "submit", str(JOB))["job_id"]
    with waiting.open("wb"):
        environment = running.job_process("server").environ()
        s3.stop()
    try:
        said = ""
        while "store" not in said:  # each look asks a process; it is told nothing by itself
            said = " ".join(each["what"] for each in running.hanse("job", "show", job)["waiting"])
    finally:
        s3.start()
    ended = running.hanse("job", "wait", job)

    assert environment.keys() & s3.environment.keys() == {"AWS_ENDPOINT_URL", "AWS_REGION"}, "a job has no keys"
    assert "it cannot be reached (Connection refused); check the network and AWS_ENDPOINT_URL" in said
    assert (ended["state"], ended["reason"]) == ("completed", "")
    assert ended["result"] == undisturbed
    assert without_tensors(bucket_url, job)
