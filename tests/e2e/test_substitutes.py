"""A client whose machine dies in the middle of a round: it is lost, another stands in for it, and it comes back."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from benchmarks.deployment import Deployment, deployment

JOB = Path(__file__).parent / "job"
DEFINITION = """
[project]
name = "standing-in"
version = "0.1.0"

[tool.hanse]
client = "gated:app"
model = "gated:initial"
min_clients = 3
seed = 11

[tool.hanse.workflow]
name = "fedavg"
rounds = 3
fraction = 0.6
quorum = 1.0
substitutes = 1
"""
"""Each round wants two of the three clients, no fewer, and may call the third."""


@pytest.fixture
def running() -> Iterator[Deployment]:
    """Run a server and three clients, one of which is lost a second after its connection broke."""
    with (
        pytest.MonkeyPatch.context() as patch,
        deployment(clients=3, settings="settings = { lost_after_s = 1.0 }") as up,
    ):
        (up.root / "gates").mkdir()
        patch.setenv("HANSE_TEST_GATES", str(up.root / "gates"))
        up.start("server", *up.names)
        yield up


def gate(running: Deployment, client: str) -> Path:
    """Make a gate before the client's training for the first round."""
    path = running.root / "gates" / f"{client}-1"
    os.mkfifo(path)
    return path


@pytest.mark.slow
def test_a_client_that_was_not_selected_stands_in_for_one_that_is_lost(running: Deployment, tmp_path: Path) -> None:
    code = tmp_path / "code"
    shutil.copytree(JOB, code)
    (code / "pyproject.toml").write_text(DEFINITION)
    undisturbed = running.run(code)
    first, other = undisturbed["history"][1]["answered"]
    (substitute,) = set(running.names) - {first, other}

    at_first, at_substitute = gate(running, first), gate(running, substitute)
    job = running.hanse("job", "submit", str(code))["job_id"]
    with at_first.open("wb"):  # it is in the middle of its training
        process = running.job_process(first)
        running.kill(first)
        process.kill()
    with at_substitute.open("wb"):  # the substitute has the task
        view = running.hanse("job", "show", job)
    ended = running.hanse("job", "wait", job)

    (waiting,) = view["waiting"]
    whom = {each["name"]: (each["state"], each["reason"]) for each in waiting["whom"]}
    assert whom[first] == ("lost", "not connected for 1 s")
    assert whom[substitute] == ("running", "")
    assert waiting["then"].startswith("the round goes on with the answers of at least 2 of its 3 clients")
    assert (ended["state"], ended["reason"]) == ("completed", "")
    assert ended["history"][1]["answered"] == sorted([other, substitute])
    assert [each["round"] for each in ended["history"]] == [0, 1, 2, 3]

    for left in (at_first, at_substitute):
        left.unlink()
    running.start(first)
    assert running.run(code)["result"] == undisturbed["result"]
