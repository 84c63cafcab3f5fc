"""A site in the middle of a round: agent and job's process killed, one, the other and both; stopped and started."""

import os
import shutil
import subprocess
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from benchmarks.deployment import HANSE, Deployment, deployment

from hanse.client.workspace import job_folders
from hanse.launch.held import HeldProcess
from hanse.launch.surviving import pid_at
from tests.faults.changes import wait_none

JOB = Path(__file__).parent / "job"
ROUND = 3
ROUNDS = tomllib.loads((JOB / "pyproject.toml").read_text())["tool"]["hanse"]["workflow"]["rounds"]
ONCE = {str(number): 1 for number in range(1, ROUNDS + 1)}
"""How often a client trains for each round when nothing happens."""

AT_ONCE_S = 30.0
"""Far below the time after which a process without an agent ends by itself."""

COUNTED = """
import os
from pathlib import Path

import hanse
import gated

app = hanse.ClientApp()


@app.train
def train(model, ctx):
    with (Path(os.environ["HANSE_TEST_GATES"]) / "trained").open("a") as told:
        told.write(f"{ctx.client} {ctx.round} {os.getpid()}\\n")
    return gated.train(model, ctx)
"""
"""The gated job, which also tells of each time that it is run."""


class Site:
    """A deployment whose first client is disturbed while it works for round ``ROUND``."""

    def __init__(self, running: Deployment, folder: Path) -> None:
        self.running, self.folder = running, running.root / "gates"
        self.code = folder / "code"
        shutil.copytree(JOB, self.code)
        (self.code / "counted.py").write_text(COUNTED)
        definition = self.code / "pyproject.toml"
        definition.write_text(definition.read_text().replace('"gated:app"', '"counted:app"'))
        self.workspace = running.root / "kits" / "site-1" / "workspace"
        self.job = ""

    def gate(self, round_number: int = ROUND) -> Path:
        """Make a gate; opening it waits until the client stands before it, and closing it lets the client through."""
        path = self.folder / f"site-1-{round_number}"
        os.mkfifo(path)
        return path

    def submit(self) -> None:
        self.job = self.running.hanse("job", "submit", str(self.code))["job_id"]

    def process(self) -> psutil.Process:
        """Return the job's process at the client."""
        return self.running.job_process("site-1")

    def kill_process(self) -> None:
        """Kill the job's process, and return when it has ended."""
        held = HeldProcess(self.process().pid)
        self.process().kill()
        assert held.wait(30)
        held.close()

    def times_trained(self) -> Counter[str]:
        """Return how often the client's code was run for each round, and by how many processes, as ``round: times``."""
        lines = (self.folder / "trained").read_text().splitlines()
        return Counter(line.split()[1] for line in lines if line.startswith("site-1 "))

    def processes_trained(self) -> set[str]:
        """Return the numbers of the processes in which the client's code was run."""
        return {line.split()[2] for line in (self.folder / "trained").read_text().splitlines() if "site-1 " in line}

    @property
    def log_folder(self) -> Path:
        """The job's folder at the client, of which its log stays."""
        return self.workspace / "jobs" / self.job

    def left_of_the_job(self) -> list[str]:
        """Return what the client still has of the job, but for its log."""
        return sorted({path.name for path in self.log_folder.iterdir()} - {"job.log"})

    def ends_as(self, undisturbed: str) -> None:
        """Wait for the job's end, and check that nothing tells of what has happened."""
        ended = self.running.hanse("job", "wait", self.job)
        assert (ended["state"], ended["reason"]) == ("completed", "")
        assert ended["result"] == undisturbed
        assert [each["round"] for each in ended["history"]] == list(range(ROUNDS + 1))
        assert all(each["answered"] == ["site-1", "site-2"] for each in ended["history"][1:])


@pytest.fixture(scope="module")
def running() -> Iterator[Deployment]:
    """Run a server and two clients whose training waits at gates in the folder ``gates`` of the deployment."""
    with pytest.MonkeyPatch.context() as patch, deployment() as up:
        (up.root / "gates").mkdir()
        patch.setenv("HANSE_TEST_GATES", str(up.root / "gates"))
        up.start("server", *up.names)
        yield up


@pytest.fixture(scope="module")
def undisturbed(running: Deployment) -> str:
    """Return the digest of the model that a run without trouble ends with."""
    return str(running.run(JOB)["result"])


@pytest.fixture
def site(running: Deployment, tmp_path: Path) -> Iterator[Site]:
    """Give a site that is up, and leave one that is."""
    yield Site(running, tmp_path)
    if "site-1" not in running.processes:
        running.start("site-1")
    for left in (running.root / "gates").iterdir():
        left.unlink()


def test_process_goes_on_training_when_its_agent_is_killed_and_the_next_agent_takes_it_over(
    site: Site, undisturbed: str
) -> None:
    waiting = site.gate()
    site.submit()
    with waiting.open("wb"):  # from here on the client is in the middle of its training
        process = site.process()
        site.running.kill("site-1")
        site.running.start("site-1")
        assert site.process() == process
    site.ends_as(undisturbed)
    assert site.times_trained() == ONCE
    assert site.processes_trained() == {str(process.pid)}


def test_process_without_an_agent_delivers_and_gets_its_next_tasks(site: Site, undisturbed: str) -> None:
    waiting, later = site.gate(), site.gate(ROUND + 1)
    site.submit()
    with waiting.open("wb"):
        process = site.process()
        site.running.kill("site-1")
    with later.open("wb"):  # it has delivered, and works for the next round
        site.running.start("site-1")
        assert site.process() == process
    site.ends_as(undisturbed)
    assert site.times_trained() == ONCE


def test_agent_that_is_killed_again_and_again_keeps_its_process(site: Site, undisturbed: str) -> None:
    waiting = site.gate()
    site.submit()
    with waiting.open("wb"):
        process = site.process()
        for _ in range(3):
            site.running.kill("site-1")
            site.running.start("site-1")
        assert site.process() == process
    site.ends_as(undisturbed)
    assert site.times_trained() == ONCE


def test_killed_agent_and_process_start_the_job_anew(site: Site, undisturbed: str) -> None:
    waiting = site.gate()
    site.submit()
    with waiting.open("wb"):
        waiting.unlink()
        process = site.process()
        site.running.kill("site-1")
        process.kill()
    site.running.start("site-1")
    site.ends_as(undisturbed)
    assert site.times_trained() == {**ONCE, str(ROUND): 2}


def test_process_that_is_killed_while_its_agent_is_dead_is_started_anew_by_the_next(
    site: Site, undisturbed: str
) -> None:
    waiting = site.gate()
    site.submit()
    with waiting.open("wb"):
        waiting.unlink()
        site.running.kill("site-1")
        site.kill_process()
    site.running.start("site-1")
    site.ends_as(undisturbed)
    assert site.times_trained() == {**ONCE, str(ROUND): 2}


def test_process_that_was_taken_over_and_is_killed_is_started_anew(site: Site, undisturbed: str) -> None:
    waiting = site.gate()
    site.submit()
    with waiting.open("wb"):
        waiting.unlink()
        site.running.kill("site-1")
        site.running.start("site-1")
        site.kill_process()
    site.ends_as(undisturbed)
    assert site.times_trained() == {**ONCE, str(ROUND): 2}


def test_site_that_is_stopped_and_started_in_the_middle_of_a_round_does_its_part_again(
    site: Site, undisturbed: str
) -> None:
    waiting = site.gate()
    site.submit()
    kit = site.running.root / "kits" / "site-1"
    with waiting.open("wb"):
        waiting.unlink()
        agent = site.running.processes["site-1"].pid
        stopped = site.running.hanse("client", "stop", str(kit))
        assert stopped == {"client": "stopped", "process": agent, "left": []}
        assert {pid_at(folder.path) for folder in job_folders(site.workspace)} == {None}, "it ended with its agent"
    assert site.running.end("site-1") == 0
    site.running.start("site-1")
    site.ends_as(undisturbed)
    assert site.times_trained() == {**ONCE, str(ROUND): 2}


def test_process_of_a_job_that_was_aborted_while_its_agent_was_dead_is_ended_by_the_next_agent(site: Site) -> None:
    waiting = site.gate()
    site.submit()
    with waiting.open("wb"):
        waiting.unlink()
        process = HeldProcess(site.process().pid)
        site.running.kill("site-1")
        site.running.hanse("job", "abort", site.job)
        assert site.running.hanse("job", "show", site.job)["state"] == "aborted"
        assert not process.wait(0), "nobody is there to end it"
        site.running.start("site-1")
        assert process.wait(AT_ONCE_S)
        process.close()
    wait_none(site.left_of_the_job, [site.log_folder], what="the job's folder to be cleared", within_s=AT_ONCE_S)


def test_process_of_an_agent_that_was_killed_for_good_ends_when_the_client_is_stopped(site: Site) -> None:
    waiting = site.gate()
    site.submit()
    with waiting.open("wb"):
        waiting.unlink()
        process = HeldProcess(site.process().pid)
        site.running.kill("site-1")
        assert not process.wait(0)
        stopped = site.running.hanse("client", "stop", str(site.running.root / "kits" / "site-1"))
        assert stopped == {"client": "not running", "process": None, "left": [process.pid]}
        assert process.wait(0)
        process.close()


def test_second_agent_of_a_workspace_is_refused(site: Site) -> None:
    command = [*HANSE, "client", "start", str(site.running.root / "kits" / "site-1")]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 4
    assert f"is running already, as process {site.running.processes['site-1'].pid}" in refused.stderr
