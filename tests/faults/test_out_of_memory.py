"""A client's training that uses more memory than its site may: the system kills its process, and the job says that.

The client's agent runs in a control group of a few hundred megabytes, with all that it starts. Heartbeats are ten
minutes apart, so what the job says was told at once.
"""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from benchmarks.deployment import HANSE, Deployment, deployment

from hanse.codes import CODES
from tests.faults.small_memory import small_memory

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

JOB = Path(__file__).parents[1] / "e2e" / "failing"
GREEDY = "site-2"
SETTINGS = "settings = { heartbeat_s = 600.0 }"
MEMORY_MB = 400
"""More than an agent and a job's process that does little use, and less than the process that is greedy wants."""


@pytest.fixture(scope="module")
def greed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that makes training greedy at one client while it is there."""
    return tmp_path_factory.mktemp("greed") / "greedy"


@pytest.fixture(scope="module")
def running(greed: Path) -> Iterator[Deployment]:
    """Run a server and two clients, one of which may use little memory."""
    with small_memory(megabytes=MEMORY_MB) as group, deployment(settings=SETTINGS) as up:
        up.prefixes[GREEDY] = list(group.prefix)
        up.environments[GREEDY] = {"HANSE_TEST_FAILS": "memory", "HANSE_TEST_GREEDY": str(greed)}
        up.start("server", *up.names)
        yield up
        up.stop()


def ended(running: Deployment) -> dict[str, Any]:
    job = running.hanse("job", "submit", str(JOB))["job_id"]
    kit = {**os.environ, "HANSE_KIT": str(running.kit("admin@bench"))}
    subprocess.run([*HANSE, "job", "wait", job], env=kit, capture_output=True, check=False)
    view: dict[str, Any] = running.hanse("job", "show", job)
    return view


def test_job_whose_process_is_killed_for_memory_at_one_client_says_so_and_the_next_job_runs_there(
    running: Deployment, greed: Path
) -> None:
    agents = [running.process(name) for name in running.names]

    greed.touch()
    view = ended(running)

    sentence = (
        f"the job's process at {GREEDY} was killed because it had used up the memory that it may use; "
        f"its log ends with: {GREEDY} trains"
    )
    assert (view["state"], view["code"]) == ("failed", "too-few-clients")
    assert (view["client"], view["cause"]) == (GREEDY, "out-of-memory")
    assert sentence in view["reason"]
    assert view["log_tail"].splitlines()[-1] == f"{GREEDY} trains"
    assert view["advice"] == CODES["out-of-memory"].advice

    greed.unlink()
    view = ended(running)

    assert (view["state"], view["reason"]) == ("completed", "")
    assert all(agent.is_running() and agent.status() != psutil.STATUS_ZOMBIE for agent in agents)
