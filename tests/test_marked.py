import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

from benchmarks import marked

from hanse.launch.held import HeldProcess

WAITING = "import threading; threading.Event().wait()"
LEAVING = f"""
import subprocess, sys
print(subprocess.Popen([sys.executable, "-c", {WAITING!r}], stdout=subprocess.DEVNULL, start_new_session=True).pid)
"""


def test_what_a_process_has_left_behind_is_killed_by_its_mark_and_no_stranger_is(tmp_path: Path) -> None:
    mark = str(tmp_path)
    ours, others = ({**os.environ, marked.VARIABLE: each} for each in (mark, "another"))
    with subprocess.Popen([sys.executable, "-c", WAITING], env=others) as stranger:
        try:
            command = [sys.executable, "-c", LEAVING]
            done = subprocess.run(command, env=ours, stdout=subprocess.PIPE, text=True, check=True)
            with closing(HeldProcess(int(done.stdout))) as left:
                assert [process.pid for process in marked.living(mark)] == [left.pid]
                marked.kill(mark)
                assert left.wait(0)
            assert marked.living(mark) == []
            assert stranger.poll() is None
        finally:
            marked.kill(mark)
            stranger.kill()
