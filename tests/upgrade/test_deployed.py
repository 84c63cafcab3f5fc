"""Old and new beside each other, as real processes over mutual TLS: each job completes, with the bytes of a new one.

What is tested is an upgrade as it happens: kits that the old release made, one participant after the other.
"""

import asyncio
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from benchmarks.deployment import ADMIN, HANSE, Deployment, deployment, two_servers

from hanse.storage.store import SqlStore
from tests.upgrade.release import OLD, Release

JOB = Path(__file__).parents[1] / "e2e" / "job"
ROUND = 3
TOLD = ("state", "submitter", "submitted_at", "started_at", "ended_at", "round", "metrics", "history", "result")
"""What is told of a job, whichever release it ran with."""
OPEN = """
import asyncio, sys
from pathlib import Path
from hanse.errors import StoreFailed
from hanse.storage.store import SqlStore
try:
    asyncio.run(SqlStore(Path(sys.argv[1])).open())
except StoreFailed as failed:
    print(failed.reason)
"""
"""A program with which the old release opens a store."""


@contextmanager
def made_by(old: Release, *, at_old: tuple[str, ...]) -> Iterator[Deployment]:
    """Give a deployment whose kits the *old* release made; it still runs for the participants *at_old*."""
    with deployment() as running:
        kits = running.root / "kits"
        shutil.rmtree(kits)
        provision = [*HANSE, "provision", str(running.root / "project.toml"), "--out", str(kits)]
        subprocess.run(provision, check=True, stdout=subprocess.DEVNULL, env={**os.environ, **old.environment})
        for name in at_old:
            running.environments[name] = old.environment
        yield running


def gate(folder: Path, client: str, number: int = ROUND) -> Path:
    """Make the gate at which *client* waits in a round."""
    path = folder / f"{client}-{number}"
    os.mkfifo(path)
    return path


def upgrade(running: Deployment, name: str) -> None:
    """Stop a participant that runs the old release, and start it with this one."""
    assert running.end(name) == 0
    del running.environments[name]
    running.start(name)


def releases(running: Deployment) -> dict[str, str]:
    """Return which release each participant runs, as the server tells."""
    clients = {each["name"]: each["release"] for each in running.hanse("client", "list")["clients"]}
    return clients | {"server": running.hanse("server", "status")["release"]}


def kill(running: Deployment, victim: str) -> None:
    """Kill what *victim* names; whatever is not the product's own to start again is started."""
    match victim:
        case "run":
            running.job_process("server").kill()
        case "job at the client":
            (job,) = running.process("site-1").children()
            job.kill()
        case name:
            running.kill(name)
            running.start(name)


@pytest.fixture(scope="module")
def all_new() -> str:
    """Return the digest of the model that the job ends with where all run this release."""
    with deployment() as running:
        running.start("server", *running.names)
        return str(running.run(JOB)["result"])


def test_client_of_the_old_release_works_with_this_server(old: Release, all_new: str) -> None:
    with made_by(old, at_old=("site-1", ADMIN)) as running:
        running.start("server", *running.names)
        assert running.run(JOB)["result"] == all_new
        told = releases(running)
        assert told["site-1"] == OLD
        assert OLD not in (told["server"], told["site-2"])


def test_client_of_this_release_works_with_the_old_server(old: Release, all_new: str) -> None:
    with made_by(old, at_old=("server",)) as running:
        running.start("server", *running.names)
        assert running.run(JOB)["result"] == all_new
        told = releases(running)
        assert told["server"] == OLD
        assert OLD not in (told["site-1"], told["site-2"])


def test_all_are_upgraded_one_after_the_other_in_the_middle_of_a_job(
    old: Release, all_new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HANSE_TEST_GATES", str(tmp_path))
    with made_by(old, at_old=("server", "site-1", "site-2", ADMIN)) as running:
        running.start("server", *running.names)
        before = running.run(JOB)
        waiting = {number: gate(tmp_path, "site-1", number) for number in (2, 3, 4)}
        job = running.hanse("job", "submit", str(JOB))["job_id"]
        with waiting[2].open("wb"):  # from here on site-1 is in the middle of its training
            upgrade(running, "server")
        with waiting[3].open("wb"):
            upgrade(running, "site-2")
        with waiting[4].open("wb"):
            waiting[4].unlink()  # its task is given to it again, and then nobody opens the gate
            upgrade(running, "site-1")
        del running.environments[ADMIN]
        ended = running.hanse("job", "wait", job)
        assert (ended["state"], ended["reason"]) == ("completed", "")
        assert ended["result"] == all_new
        assert [each["round"] for each in ended["history"]] == list(range(ended["rounds"] + 1))
        shown = running.hanse("job", "show", before["job_id"])
        assert {name: shown[name] for name in TOLD} == {name: before[name] for name in TOLD}
        assert OLD not in releases(running).values()


async def test_the_old_release_refuses_the_store_of_this_one_with_a_sentence(old: Release, tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    async with SqlStore(path):
        pass
    reason = await asyncio.to_thread(old.python, "-c", OPEN, str(path))
    assert "its schema is version" in reason
    assert "this release of Hanse works with version 1" in reason


@pytest.mark.slow
def test_client_of_the_old_release_follows_from_a_server_to_the_one_that_stands_by(
    old: Release, all_new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HANSE_TEST_GATES", str(tmp_path))
    with two_servers() as running:
        settings = running.kit("site-1") / "settings.toml"
        lines = settings.read_text().splitlines()
        settings.write_text("\n".join(line for line in lines if not line.startswith("server_names")))
        running.configure("site-1", server_name="server")
        running.environments["site-1"] = old.environment
        running.start("server")
        running.start("standby", *running.names)
        waiting = gate(tmp_path, "site-1")
        job = running.hanse("job", "submit", str(JOB))["job_id"]
        with waiting.open("wb"):  # from here on site-1 is in the middle of its training
            running.kill("server")
        ended = running.hanse("job", "wait", job)
        assert (ended["state"], ended["reason"]) == ("completed", "")
        assert ended["result"] == all_new
        assert running.hanse("server", "status")["name"] == "standby"


@pytest.mark.slow
@pytest.mark.parametrize("at_old", [("site-1",), ("server",)], ids=["old_client", "old_server"])
@pytest.mark.parametrize("victim", ["server", "run", "site-1", "job at the client"])
def test_whatever_is_killed_old_and_new_complete_the_job_together(
    old: Release, all_new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_old: tuple[str, ...], victim: str
) -> None:
    monkeypatch.setenv("HANSE_TEST_GATES", str(tmp_path))
    with made_by(old, at_old=at_old) as running:
        running.start("server", *running.names)
        waiting = gate(tmp_path, "site-1")
        job = running.hanse("job", "submit", str(JOB))["job_id"]
        with waiting.open("wb"):  # from here on site-1 is in the middle of its training
            waiting.unlink()
            kill(running, victim)
        ended = running.hanse("job", "wait", job)
        assert (ended["state"], ended["reason"]) == ("completed", "")
        assert ended["result"] == all_new
