import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hanse.cli.process_file import announced, stop
from hanse.errors import Conflict, TimedOut
from hanse.launch.held import HeldProcess

SERVING = """
import signal, sys
from pathlib import Path
from hanse.cli.process_file import announced
if sys.argv[2] == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
else:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
with announced(Path(sys.argv[1]), what="the test"):
    print("serving", flush=True)
    signal.pause()
    signal.pause()
"""


@contextmanager
def serving(path: Path, how: str = "") -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", SERVING, str(path), how]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "serving\n"
        try:
            yield process
        finally:
            process.kill()


def test_stop_ends_the_process_and_says_which(tmp_path: Path) -> None:
    with serving(tmp_path / "pid") as process:
        assert stop(tmp_path / "pid", what="the test", timeout_s=10) == process.pid
        assert process.wait(10) == 0
        assert stop(tmp_path / "pid", what="the test", timeout_s=10) is None


def test_a_process_that_does_not_end_is_killed_only_if_asked(tmp_path: Path) -> None:
    with serving(tmp_path / "pid", "stubborn") as process:
        with pytest.raises(TimedOut, match=str(process.pid)):
            stop(tmp_path / "pid", what="the test", timeout_s=0.1)
        assert process.poll() is None
        assert stop(tmp_path / "pid", what="the test", timeout_s=0.1, force=True) == process.pid
        assert process.wait(10) == -signal.SIGKILL


def test_a_process_that_ends_by_itself_just_before_it_is_asked_has_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(tmp_path / "pid") as process:

        def end(_: int) -> bool:
            process.kill()
            process.wait()
            return False  # it held the lock when this was asked

        monkeypatch.setattr("hanse.cli.process_file.lock_nowait", end)
        assert stop(tmp_path / "pid", what="the test", timeout_s=10) == process.pid


def test_a_process_that_not_even_a_kill_ends_is_not_said_to_have_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that waits for a disk that does not answer."""
    with serving(tmp_path / "pid") as process:
        monkeypatch.setattr(HeldProcess, "wait", lambda *_: False)
        with pytest.raises(TimedOut, match=str(process.pid)):
            stop(tmp_path / "pid", what="the test", timeout_s=0.1, force=True)


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    with serving(tmp_path / "pid") as process:
        refused = pytest.raises(Conflict, match=f"running already, as process {process.pid}")
        with refused, announced(tmp_path / "pid", what="the test"):
            raise AssertionError("two at once")
        assert (tmp_path / "pid").read_text() == f"{process.pid}\n"


def test_what_a_killed_process_left_behind_counts_for_nothing(tmp_path: Path) -> None:
    with serving(tmp_path / "pid") as process:
        process.kill()
        process.wait()
    assert (tmp_path / "pid").read_text() == f"{process.pid}\n"
    (tmp_path / "pid").write_text(f"{os.getpid()}\n")  # its number is ours by now
    assert stop(tmp_path / "pid", what="the test", timeout_s=10) is None
    with announced(tmp_path / "pid", what="the test"):
        assert (tmp_path / "pid").read_text() == f"{os.getpid()}\n"
    assert (tmp_path / "pid").read_text() == ""


@pytest.mark.parametrize("text", ["", "what\n", "99999999\n", "0\n"])
def test_a_file_that_tells_of_nobody_stops_nobody(text: str, tmp_path: Path) -> None:
    (tmp_path / "pid").write_text(text)
    assert stop(tmp_path / "pid", what="the test", timeout_s=10) is None
    assert stop(tmp_path / "none", what="the test", timeout_s=10) is None
