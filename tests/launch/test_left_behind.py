import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from hanse.launch.left_behind import ProcessNotes
from hanse.launch.process import ProcessLauncher

HERE = str(Path(__file__).parent)
PARENT = """
import asyncio, os, pathlib, signal, sys
from hanse.launch.left_behind import ProcessNotes
from hanse.launch.process import ProcessLauncher

async def main(spec, log, ready, notes):
    env = {"PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")]), "READY": ready}
    launcher = ProcessLauncher(notes=ProcessNotes(pathlib.Path(notes)))
    process = await launcher.launch("children", spec=spec.encode(), log_path=pathlib.Path(log), env=env, name="child")
    print(process.pid, pathlib.Path(ready).read_text(), flush=True)
    for pid in (process.pid, os.getpid()):
        os.kill(pid, signal.SIGKILL)

asyncio.run(main(*sys.argv[1:]))
"""
"""Starts a process, hears that it is ready, kills it, and dies before it could reap it."""


def left_by(log: Path, notes: ProcessNotes) -> psutil.Process:
    """Return what a process with that *log* had started that has been killed at once with its parent."""
    ready = log.with_suffix(".ready")
    os.mkfifo(ready)
    command = [sys.executable, "-c", PARENT, "with-child", str(log), str(ready), str(notes.folder)]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    ready.unlink()
    child = psutil.Process(int(done.stdout.split()[2]))
    assert child.is_running()
    return child


@pytest.fixture
def notes(tmp_path: Path) -> ProcessNotes:
    return ProcessNotes(tmp_path / "processes")


async def test_a_process_is_noted_for_as_long_as_it_lives(tmp_path: Path, notes: ProcessNotes) -> None:
    launcher = ProcessLauncher(notes=notes)
    process = await launcher.launch(
        "children", spec=b"stubborn", log_path=tmp_path / "log", env={"PYTHONPATH": HERE}, name="child"
    )
    assert [path.name for path in notes.folder.iterdir()] == [str(process.pid)]
    await process.stop(0)

    assert [*notes.folder.iterdir()] == []


async def test_a_process_that_cannot_be_noted_is_not_started(tmp_path: Path, notes: ProcessNotes) -> None:
    notes.folder.touch()
    with pytest.raises(FileExistsError):
        await ProcessLauncher(notes=notes).launch(
            "children", spec=b"print started", log_path=tmp_path / "log", env={"PYTHONPATH": HERE}, name="child"
        )
    assert (tmp_path / "log").read_text() == ""
    assert psutil.Process().children() == []


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what a process has left behind")
def test_what_a_process_has_left_behind_that_was_killed_with_its_parent_is_ended(
    tmp_path: Path, notes: ProcessNotes
) -> None:
    child = left_by(tmp_path / "log", notes)
    notes.end_left_behind()

    assert psutil.wait_procs([child], timeout=30)[1] == []
    assert [*notes.folder.iterdir()] == []


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what a process has left behind")
def test_what_other_processes_have_left_that_write_to_the_same_log_is_theirs(
    tmp_path: Path, notes: ProcessNotes
) -> None:
    others = ProcessNotes(tmp_path / "others")
    child, others_child = left_by(tmp_path / "log", notes), left_by(tmp_path / "log", others)
    notes.end_left_behind()
    assert psutil.wait_procs([child], timeout=30)[1] == []
    assert others_child.is_running()
    others.end_left_behind()

    assert psutil.wait_procs([others_child], timeout=30)[1] == []


@pytest.mark.parametrize("content", ["", "nonsense", '{"started":1,"log":"/nowhere"}'])
def test_a_note_that_tells_nothing_true_ends_nobody_and_is_dropped(notes: ProcessNotes, content: str) -> None:
    notes.end_left_behind()
    notes.folder.mkdir()
    (notes.folder / str(os.getpid())).write_text(content)
    (notes.folder / "other").touch()
    notes.end_left_behind()

    assert [path.name for path in notes.folder.iterdir()] == ["other"]
