import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hanse.client.in_background import running_client
from hanse.client.workspace import JobFolder, StartedJob, end_orphans, job_folders, only_agent_of
from hanse.errors import Conflict, NoSpace, StoreFailed
from hanse.ids import Digest
from hanse.messages import DeployJob
from hanse.storage.packages import build_package

from .fake_server import JOB, job_spec
from .site import settings

STARTED = StartedJob(
    DeployJob(JOB, "digits", "lead", job_spec(seed=3, config={"lr": 1.0}), Digest("0" * 64), 7), 2, "terms"
)


def test_what_was_started_is_noted_for_the_next_agent(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path)
    assert folder.started() is None
    folder.note(STARTED)
    assert JobFolder(tmp_path).started() == STARTED
    assert [path.name for path in tmp_path.iterdir()] == ["started"]
    assert (tmp_path / "started").stat().st_mode & 0o077 == 0


def test_note_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    (tmp_path / "started").write_bytes(b"\xff what")
    assert JobFolder(tmp_path).started() is None


def test_note_that_the_disk_does_not_take_says_so(tmp_path: Path) -> None:
    (tmp_path / "started.tmp").mkdir()
    with pytest.raises(StoreFailed, match=f"the store failed while noting the start of job {tmp_path.name}"):
        JobFolder(tmp_path).note(STARTED)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a file that is always full")
def test_note_for_which_the_disk_has_no_space_says_which_disk(tmp_path: Path) -> None:
    (tmp_path / "started.tmp").symlink_to("/dev/full")
    with pytest.raises(
        NoSpace, match=f"noting the start of job {tmp_path.name} failed: the disk mounted at .* is full"
    ):
        JobFolder(tmp_path).note(STARTED)
    assert JobFolder(tmp_path).started() is None


def test_folder_is_cleared_of_all_but_its_logs(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path)
    for path in (folder.package, folder.code, folder.tensors):
        path.mkdir()
        (path / "file").touch()
    for name in ("job.log", "job.log.1", "process", "started.tmp"):
        (tmp_path / name).touch()
    os.mkfifo(tmp_path / "life-line")
    folder.note(STARTED)
    folder.clear()
    folder.clear()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["job.log", "job.log.1"]


def test_folders_of_jobs_are_found(tmp_path: Path) -> None:
    assert job_folders(tmp_path) == []
    for name in ("b-1", "a-1"):
        (tmp_path / "jobs" / name).mkdir()
    (tmp_path / "jobs" / "file").touch()
    assert [folder.path.name for folder in job_folders(tmp_path)] == ["a-1", "b-1"]


def test_workspace_is_one_agents_at_a_time(tmp_path: Path) -> None:
    with only_agent_of(tmp_path):
        refused = pytest.raises(Conflict, match=f"the client of {tmp_path} is running already")
        with refused, running_client(settings(), workspace=tmp_path):
            raise AssertionError("two at once")
    with only_agent_of(tmp_path):
        pass


def test_agent_that_was_killed_has_the_workspace_no_longer(tmp_path: Path) -> None:
    program = f"""
import os, pathlib, signal
from hanse.client.workspace import only_agent_of
with only_agent_of(pathlib.Path({str(tmp_path)!r})):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", program], check=False)
    with only_agent_of(tmp_path):
        pass


def test_where_no_process_was_left_none_is_ended(tmp_path: Path) -> None:
    (tmp_path / "jobs" / "a-1").mkdir(parents=True)
    assert end_orphans(tmp_path, grace_s=1) == []


def test_what_an_agent_has_unpacked_when_it_is_killed_is_cleared_too(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path / "jobs" / JOB)
    folder.code.parent.mkdir(parents=True)
    (tmp_path / "app.py").write_text("app = 1")
    package = tmp_path / "package.zip"
    package.write_bytes(build_package(tmp_path, job_spec()))
    program = f"""
import os, pathlib, shutil, signal
from hanse.storage.packages import unpack_package
shutil.copyfileobj = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
unpack_package(pathlib.Path({str(package)!r}), pathlib.Path({str(folder.code)!r}))
"""
    killed = subprocess.run([sys.executable, "-c", program], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert list(folder.path.iterdir()) != []

    folder.clear()

    assert not folder.path.exists()
