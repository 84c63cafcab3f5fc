import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hanse.launch.held import held_by

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
