import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from hanse.errors import UNKNOWN_STATUS, Conflict
from hanse.launch.held import HeldProcess, held_by, kill_session, lock_nowait, number_in, only_holder, started_at

LEADER = """
import subprocess, sys
child = subprocess.Popen(["sleep", "1000"], stdout=subprocess.DEVNULL)
print(child.pid, flush=True)
sys.stdin.read()
"""

BEHIND = """
import subprocess, sys
quiet = {"stderr": subprocess.DEVNULL}
with open(sys.argv[1], "a") as other:
    left = subprocess.Popen(["sleep", "1000"], **quiet)
    elsewhere = subprocess.Popen(["sleep", "1000"], stdout=other, **quiet)
print(left.pid, elsewhere.pid, file=sys.stderr)
"""

RESTLESS = """
import os, subprocess
pipes = [os.pipe() for _ in range(20)]
for _, theirs in pipes:
    subprocess.Popen(["sleep", "1000"], pass_fds=[theirs])
    os.close(theirs)
for ours, _ in pipes:
    subprocess.Popen(["sh", "-c", "read line; sleep 1000; :"], stdin=ours)
"""
"""Starts processes, and others that each start one more when one of those ends."""


def members_of(session: int) -> list[psutil.Process]:
    """Return the processes of *session* that live."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


@pytest.fixture
def leader() -> Iterator["subprocess.Popen[str]"]:
    """A process that leads a group, with a child of its own in it, and ends with its standard input."""
    command = [sys.executable, "-c", LEADER]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        yield process
        process.kill()


def child_of(leader: "subprocess.Popen[str]") -> HeldProcess:
    assert leader.stdout is not None
    return HeldProcess(int(leader.stdout.readline()))


def test_end_is_heard_of_with_its_status_by_whoever_holds_on(leader: "subprocess.Popen[str]") -> None:
    held = HeldProcess(leader.pid)
    child_of(leader).close()
    assert not held.wait(0)
    held.send(signal.SIGTERM)
    assert held.wait(30)
    assert held.exit_status() == -signal.SIGTERM, "before it is reaped"
    leader.wait()
    assert held.exit_status() in (-signal.SIGTERM, UNKNOWN_STATUS), "and after, where the kernel keeps it"
    with pytest.raises(ProcessLookupError):
        held.send(signal.SIGTERM)
    held.kill_group()
    held.close()


def test_group_is_killed_also_when_its_leader_has_ended(leader: "subprocess.Popen[str]") -> None:
    held, child = HeldProcess(leader.pid), child_of(leader)
    leader.communicate()
    assert held.wait(30)
    assert not child.wait(0)
    held.kill_group()
    if not child.wait(5):
        child.send(signal.SIGKILL)
        pytest.skip("this kernel does not know whose a group is once its leader is gone")
    held.close()
    child.close()


def test_nobody_is_held_who_does_not_live() -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait()
    with pytest.raises(ProcessLookupError):
        HeldProcess(process.pid)
    assert started_at(process.pid) == 0


def test_start_tells_two_processes_apart() -> None:
    assert 0 < started_at(1) <= started_at(os.getpid())


def test_lock_is_held_as_long_as_anybody_has_the_file_open(tmp_path: Path) -> None:
    first, second = (os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT) for _ in range(2))
    assert lock_nowait(first)
    assert lock_nowait(first)
    assert not lock_nowait(second)
    inherited = os.dup(first)
    os.close(first)
    assert not lock_nowait(second)
    os.close(inherited)
    assert lock_nowait(second)
    os.close(second)


@pytest.mark.parametrize(("text", "number"), [("12\n", 12), ("", 0), ("x", 0), ("-3", 0)])
def test_number_is_what_a_file_begins_with(tmp_path: Path, text: str, number: int) -> None:
    (tmp_path / "pid").write_text(text)
    with (tmp_path / "pid").open() as file:
        assert number_in(file.fileno()) == number


def test_file_has_one_holder_at_a_time(tmp_path: Path) -> None:
    with only_holder(tmp_path / "pid", what="the test") as descriptor:
        os.write(descriptor, b"77\n")
        refused = pytest.raises(Conflict, match="the test is running already, as process 77")
        with refused, only_holder(tmp_path / "pid", what="the test"):
            raise AssertionError("two at once")
    with only_holder(tmp_path / "pid", what="the test"):
        pass


HOLDING = """
import os, signal, sys
from pathlib import Path
from hanse.launch.held import only_holder
with only_holder(Path(sys.argv[1]), what="the test") as descriptor:
    os.pwrite(descriptor, sys.argv[2].format(os.getpid()).encode(), 0)
    print("holding", flush=True)
    signal.pause()
"""


@contextmanager
def holding(path: Path, content: str = "{}\n") -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-c", HOLDING, str(path), content]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "holding\n"
        try:
            yield process
        finally:
            process.kill()


def test_the_holder_of_a_file_is_known_for_as_long_as_it_lives(tmp_path: Path) -> None:
    assert held_by(tmp_path / "file") is None
    with holding(tmp_path / "file") as process:
        assert held_by(tmp_path / "file") == process.pid
        assert held_by(tmp_path / "file") == process.pid, "asking does not take it away"
    assert (tmp_path / "file").read_text() == f"{process.pid}\n", "it was killed, and its number is left"
    assert held_by(tmp_path / "file") is None


def test_a_holder_that_does_not_tell_its_number_is_one_all_the_same(tmp_path: Path) -> None:
    with holding(tmp_path / "file", ""):
        assert held_by(tmp_path / "file") == 0


def test_a_file_that_cannot_be_opened_is_held_by_nobody(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")

    assert held_by(tmp_path / "loop") is None
    assert held_by(tmp_path / "nothing" / "file") is None


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what a process has left behind")
def test_of_a_session_whose_leader_has_ended_those_are_killed_that_write_to_its_output(tmp_path: Path) -> None:
    output, other = tmp_path / "job.log", tmp_path / "other.log"
    with output.open("w") as its, other.open("w") as anothers:
        command = [sys.executable, "-c", BEHIND, str(other)]
        leader = subprocess.Popen(command, stdout=its, stderr=subprocess.PIPE, text=True, start_new_session=True)
        stranger = subprocess.Popen(["sleep", "1000"], stdout=its, stderr=anothers, start_new_session=True)
        started = started_at(leader.pid)
        _, said = leader.communicate()
    left, elsewhere = (HeldProcess(int(number)) for number in said.split())
    try:
        kill_session(leader.pid, started=started, output=tmp_path / "none.log")
        kill_session(leader.pid, started=started, output=output)

        assert left.wait(30)
        assert not elsewhere.wait(0), "its output goes to another file"
        assert stranger.poll() is None, "it is of another session"
    finally:
        stranger.kill()
        stranger.wait()
        for held in (left, elsewhere):
            with contextlib.suppress(ProcessLookupError):
                held.send(signal.SIGKILL)
            held.close()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what a process has left behind")
def test_session_whose_leader_has_got_the_number_of_another_is_left_alone(tmp_path: Path) -> None:
    output = tmp_path / "job.log"
    with output.open("w") as its:
        leader = subprocess.Popen(["sleep", "1000"], stdout=its, start_new_session=True)
    try:
        kill_session(leader.pid, started=started_at(leader.pid) + 1, output=output)
        assert leader.poll() is None

        kill_session(leader.pid, started=started_at(leader.pid), output=output)
        assert leader.wait(30) == -signal.SIGKILL, "one that still lives is killed, too"
    finally:
        leader.kill()
        leader.wait()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what a process has left behind")
def test_what_is_started_while_a_session_is_killed_is_killed_too(tmp_path: Path) -> None:
    output = tmp_path / "job.log"
    with output.open("w") as its:
        leader = subprocess.Popen([sys.executable, "-c", RESTLESS], stdout=its, start_new_session=True)
    started = started_at(leader.pid)
    leader.wait()
    try:
        kill_session(leader.pid, started=started, output=output)

        assert psutil.wait_procs(members_of(leader.pid), timeout=30)[1] == []
    finally:
        for process in members_of(leader.pid):
            process.kill()
