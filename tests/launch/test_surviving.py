import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import psutil
import pytest

from hanse.errors import UNKNOWN_STATUS, Conflict
from hanse.launch.held import HeldProcess, lock_nowait
from hanse.launch.process import MAX_SPEC_BYTES, ProcessLauncher, RunningProcess
from hanse.launch.surviving import LINE_FILE, LOCK_FILE, SurvivingLauncher, end_survivor, pid_at, survivor_at

PATHS = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
ENV = {"PYTHONPATH": PATHS}
PARENT = """
import asyncio, os, pathlib, signal, sys
from hanse.launch.surviving import SurvivingLauncher

async def main(spec, log, ready, paths):
    env = {"PYTHONPATH": paths, "READY": ready}
    process = await SurvivingLauncher().launch(
        "children", spec=spec.encode(), log_path=pathlib.Path(log), env=env, name="child"
    )
    said = pathlib.Path(ready).read_text()
    print(process.pid, said, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main(*sys.argv[1:]))
"""
"""Starts a process, hears that it is ready, and dies."""


async def launch(spec: str, log: Path, **env: str) -> RunningProcess:
    return await SurvivingLauncher().launch(
        "children", spec=spec.encode(), log_path=log, env={**ENV, **env}, name="child"
    )


def ready_of(log: Path) -> Path:
    """Make the named pipe on which a child says things to the test."""
    ready = log.with_suffix(".ready")
    os.mkfifo(ready)
    return ready


def left_by_a_dead_parent(spec: str, log: Path) -> tuple[int, str]:
    """Return the number of a process whose parent has been killed since it was ready, and what it said then."""
    command = [sys.executable, "-c", PARENT, spec, str(log), str(ready_of(log)), PATHS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    pid, _, said = done.stdout.strip().partition(" ")
    return int(pid), said


def is_free(folder: Path) -> bool:
    with (folder / LOCK_FILE).open("r+") as file:
        return lock_nowait(file.fileno())


async def test_process_is_found_by_its_folder_while_it_lives(tmp_path: Path) -> None:
    log = tmp_path / "log"
    ready = ready_of(log)
    assert pid_at(tmp_path) is None
    process = await launch("survive 60", log, READY=str(ready))
    assert pid_at(tmp_path) == process.pid, "from its first moment on"
    await asyncio.to_thread(ready.read_text)
    assert pid_at(tmp_path) == process.pid
    await process.stop(0)

    assert pid_at(tmp_path) is None
    assert is_free(tmp_path)


async def test_second_process_of_a_folder_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    process = await launch("survive 60", tmp_path / "log")
    with pytest.raises(Conflict, match=f"child is running already, as process {process.pid}"):
        await launch("exit 3", tmp_path / "log")
    assert pid_at(tmp_path) == process.pid
    await process.stop(0)
    again = await launch("exit 3", tmp_path / "log")

    assert await again.wait() == 3


async def test_process_goes_on_when_its_parent_is_killed_and_another_takes_it_over(tmp_path: Path) -> None:
    log = tmp_path / "log"
    pid, said = left_by_a_dead_parent("survive 60", log)
    with closing(HeldProcess(pid)) as held:
        assert said == "surviving"
        assert not held.wait(0)
        survivor = survivor_at(log, name="child")
        assert survivor is not None
        assert survivor.pid == pid
        survivor.take_over()

        assert await survivor.stop() == -signal.SIGTERM
        assert await survivor.wait() == -signal.SIGTERM, "waiting again gives the same"
        assert await survivor.stop() == -signal.SIGTERM, "stopping what has ended is fine"
        assert survivor.log_tail().splitlines()[0] == "surviving"
        assert pid_at(tmp_path) is None


async def test_process_ends_by_itself_when_nobody_comes_in_time(tmp_path: Path) -> None:
    log = tmp_path / "log"
    pid, _ = left_by_a_dead_parent("survive 0.05", log)
    with closing(HeldProcess(pid)) as held:
        said = await asyncio.to_thread(log.with_suffix(".ready").read_text)

        assert said == "ending: its agent has been gone for 0.05 s, and no other has come"
        assert await asyncio.to_thread(held.wait, 30)


async def test_process_that_was_taken_over_waits_anew_when_that_agent_is_gone_too(tmp_path: Path) -> None:
    log = tmp_path / "log"
    pid, _ = left_by_a_dead_parent("survive 60", log)
    for _ in range(2):
        survivor = survivor_at(log, name="child")
        assert survivor is not None
        survivor.take_over()
        assert survivor._life_line is not None
        os.close(survivor._life_line)  # as the kernel does when the agent dies
        survivor._life_line = None
    assert survivor.pid == pid
    assert await survivor.stop() == -signal.SIGTERM


async def test_end_of_a_process_that_was_taken_over_is_noticed_with_its_status(tmp_path: Path) -> None:
    log = tmp_path / "log"
    pid, _ = left_by_a_dead_parent("survive 60", log)
    with closing(HeldProcess(pid)) as held:
        survivor = survivor_at(log, name="child")
        assert survivor is not None
        survivor.take_over()
        waiting = asyncio.create_task(survivor.wait())
        held.send(signal.SIGKILL)

        assert await waiting in (-signal.SIGKILL, UNKNOWN_STATUS)


async def test_life_line_that_is_gone_ends_the_process_and_cannot_be_taken(tmp_path: Path) -> None:
    log = tmp_path / "log"
    left_by_a_dead_parent("survive 60", log)
    survivor = survivor_at(log, name="child")
    assert survivor is not None
    (tmp_path / LINE_FILE).unlink()
    with pytest.raises(FileNotFoundError):
        survivor.take_over()

    assert await survivor.stop() == -signal.SIGTERM


async def test_stubborn_process_is_killed_with_its_group(tmp_path: Path) -> None:
    log = tmp_path / "log"
    pid, _ = left_by_a_dead_parent("stubborn", log)
    with closing(HeldProcess(pid)) as held:
        survivor = survivor_at(log, name="child")
        assert survivor is not None
        await survivor.stop(grace_s=0.05)

        assert held.wait(0)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what a process has left behind")
async def test_what_a_process_has_left_ends_with_it_also_where_the_kernel_cannot_say_whose_the_group_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hanse.launch.held._PROCESS_GROUP", 1 << 20)  # to Linux before 6.9, 1 << 2 is no flag either
    log = tmp_path / "log"
    pid, said = left_by_a_dead_parent("with-child", log)
    with closing(HeldProcess(pid)) as held, closing(HeldProcess(int(said.split()[1]))) as child:
        survivor = survivor_at(log, name="child")
        assert survivor is not None
        survivor.take_over()
        held.send(signal.SIGKILL)
        await survivor.wait()

        assert await asyncio.to_thread(child.wait, 30)


async def test_what_a_process_forks_does_not_hold_its_lock_and_ends_with_it(tmp_path: Path) -> None:
    log = tmp_path / "log"
    pid, said = left_by_a_dead_parent("fork-and-end", log)
    forked = int(said.split()[1])
    with closing(HeldProcess(forked)) as held:
        with suppress(ProcessLookupError), closing(HeldProcess(pid)) as process:  # it may be gone by now
            await asyncio.to_thread(process.wait, 30)
        assert not held.wait(0), "the process has ended, what it has forked has not"
        assert pid_at(tmp_path) is None
        assert is_free(tmp_path)


async def test_what_a_forked_process_forks_in_turn_keeps_all_that_was_opened_meanwhile(tmp_path: Path) -> None:
    process = await SurvivingLauncher().launch(
        "children", spec=b"fork-twice", log_path=tmp_path / "log", env=ENV, name="child"
    )
    status = await process.wait()
    assert (status, process.log_tail(1)) == (0, "all that was opened is open")


def test_survivor_can_be_ended_by_who_has_no_loop(tmp_path: Path) -> None:
    log = tmp_path / "log"
    pid, _ = left_by_a_dead_parent("survive 60", log)
    with closing(HeldProcess(pid)) as held:
        assert end_survivor(tmp_path, grace_s=30) == pid
        assert held.wait(0)
        assert end_survivor(tmp_path, grace_s=30) is None


def test_stubborn_survivor_is_killed(tmp_path: Path) -> None:
    pid, _ = left_by_a_dead_parent("stubborn", tmp_path / "log")
    with closing(HeldProcess(pid)) as held:
        assert end_survivor(tmp_path, grace_s=0.05) == pid
        assert held.wait(0)


@pytest.fixture
def stranger() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "1000"], start_new_session=True) as process:
        yield process
        process.kill()


@pytest.mark.parametrize("is_locked", [False, True])
@pytest.mark.parametrize("note", ['{{"pid":{pid},"started":1,"log_start":0}}', "", "nonsense", '{{"pid":-1}}'])
async def test_stranger_that_has_the_number_is_never_taken_for_the_process(
    tmp_path: Path, stranger: "subprocess.Popen[bytes]", note: str, is_locked: bool
) -> None:
    (tmp_path / LOCK_FILE).write_text(note.format(pid=stranger.pid))
    with (tmp_path / LOCK_FILE).open("r+") as left_behind:  # by a process that is dead, say
        if is_locked:
            assert lock_nowait(left_behind.fileno())
        assert pid_at(tmp_path) is None
        assert survivor_at(tmp_path / "log", name="child") is None
        assert end_survivor(tmp_path, grace_s=1) is None
        assert stranger.poll() is None
        process = await launch("exit 3", tmp_path / "log")

        assert await process.wait() == 3, "nor does it keep the job from being started"


async def test_process_that_another_launcher_started_says_so(tmp_path: Path) -> None:
    process = await ProcessLauncher().launch(
        "children", spec=b"survive 60", log_path=tmp_path / "log", env=ENV, name="child"
    )
    assert await process.wait() == 1
    assert "HANSE_PROCESS_LOCK is ''; expected what a SurvivingLauncher sets" in process.log_tail(1)


async def test_process_that_cannot_be_started_leaves_no_lock(tmp_path: Path) -> None:
    launcher = SurvivingLauncher("/no/such/python")
    before = psutil.Process().num_fds()
    with pytest.raises(FileNotFoundError):
        await launcher.launch("m", spec=b"", log_path=tmp_path / "log", env={}, name="child")
    with pytest.raises(ValueError, match="at most"):
        await launcher.launch("m", spec=bytes(MAX_SPEC_BYTES + 1), log_path=tmp_path / "log", env={}, name="child")

    assert psutil.Process().num_fds() <= before + 1, "the log, the lock, the pipe and the life line are closed"
    assert is_free(tmp_path)
    assert sorted(await asyncio.to_thread(os.listdir, tmp_path)) == [LINE_FILE, "log", LOCK_FILE]
