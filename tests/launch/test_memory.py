import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hanse.launch.memory import OUT_OF_MEMORY, KillCounter, cause_of, first_to_go
from tests.faults.small_memory import small_memory

EVENTS = "low 0\nhigh 0\nmax 9\noom 3\noom_kill {}\noom_group_kill 0\n"
CONTROL = "oom_kill_disable 0\nunder_oom 0\noom_kill {}\n"
STAT = "nr_free_pages 5\noom_kill {}\nthp_fault 0\n"


@pytest.mark.parametrize(
    ("status", "before", "after", "cause"),
    [
        (-signal.SIGKILL, 0, 1, OUT_OF_MEMORY),
        (-signal.SIGKILL, 4, 6, OUT_OF_MEMORY),
        (-signal.SIGKILL, 1, 1, ""),
        (-signal.SIGKILL, 2, 0, ""),
        (-signal.SIGKILL, None, 1, ""),
        (-signal.SIGKILL, 0, None, ""),
        (-signal.SIGTERM, 0, 1, ""),
        (1, 0, 1, ""),
        (0, 0, 1, ""),
        (256, 0, 1, ""),
    ],
)
def test_memory_is_the_cause_of_a_kill_while_the_count_grew(
    status: int, before: int | None, after: int | None, cause: str
) -> None:
    assert cause_of(status, kills_before=before, kills_after=after) == cause


class System:
    """A system's word on processes and control groups, as files below *root*."""

    def __init__(self, root: Path, cgroup: str, pid: str = "self") -> None:
        self.proc, self.groups = root / "proc", root / "cgroup"
        self.write(self.proc / pid / "cgroup", cgroup)

    def write(self, path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def counter(self, pid: int | None = None) -> KillCounter:
        return KillCounter(pid, proc=self.proc, groups=self.groups)


@pytest.mark.parametrize(
    ("cgroup", "file", "text"),
    [
        ("0::/system.slice/site.service\n", "system.slice/site.service/memory.events", EVENTS),
        ("0::/\n", "memory.events", EVENTS),
        ("0::/docker/0abc\n", "memory.events", EVENTS),
        ("5:memory:/jobs\n0::/\n", "memory/jobs/memory.oom_control", CONTROL),
        ("5:cpu,memory:/docker/0abc\n4:pids:/x\n", "memory/memory.oom_control", CONTROL),
        ("9:pids:/\n0::/jobs\n", "unified/jobs/memory.events", EVENTS),
    ],
    ids=["v2", "v2 root of a container", "v2 path from outside", "v1", "v1 path from outside", "hybrid"],
)
def test_count_is_the_control_groups(tmp_path: Path, cgroup: str, file: str, text: str) -> None:
    system = System(tmp_path, cgroup)
    system.write(system.proc / "vmstat", STAT.format(77))
    system.write(system.groups / file, text.format(2))
    counter = system.counter()
    system.write(system.groups / file, text.format(3))

    assert (counter.before, counter.read()) == (2, 3)


def test_count_is_of_the_group_that_the_process_runs_in(tmp_path: Path) -> None:
    system = System(tmp_path, "0::/theirs\n", pid="41")
    system.write(system.proc / "self" / "cgroup", "0::/ours\n")
    for group, count in (("ours", 1), ("theirs", 8)):
        system.write(system.groups / group / "memory.events", EVENTS.format(count))

    assert system.counter(41).before == 8
    assert system.counter().before == 1


def test_without_a_group_that_counts_the_count_is_the_machines(tmp_path: Path) -> None:
    system = System(tmp_path, "0::/\n")
    system.write(system.proc / "vmstat", STAT.format(77))

    assert system.counter().before == 77


@pytest.mark.parametrize("cgroup", ["", "nonsense", "0::/gone\n"])
def test_where_nothing_counts_there_is_no_count(tmp_path: Path, cgroup: str) -> None:
    counter = System(tmp_path, cgroup).counter()

    assert (counter.before, counter.read()) == (None, None)


def test_group_that_is_gone_counts_no_more(tmp_path: Path) -> None:
    system = System(tmp_path, "0::/jobs\n")
    events = system.groups / "jobs" / "memory.events"
    system.write(events, EVENTS.format(2))
    counter = system.counter()
    events.unlink()

    assert (counter.before, counter.read()) == (2, None)


@pytest.mark.parametrize(("inherited", "then"), [(0, 500), (-900, -400), (700, 1000), (1000, 1000)])
def test_a_process_is_made_likelier_to_be_killed_than_it_would_be(tmp_path: Path, inherited: int, then: int) -> None:
    score = tmp_path / "41" / "oom_score_adj"
    score.parent.mkdir()
    score.write_text(f"{inherited}\n")
    first_to_go(41, proc=tmp_path)
    assert int(score.read_text()) == then


def test_where_the_system_weighs_nothing_nothing_is_changed(tmp_path: Path) -> None:
    first_to_go(41, proc=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_process_that_uses_more_memory_than_its_group_may_is_told_from_one_that_is_killed() -> None:
    program = "import sys; sys.stdin.readline(); print(len(b'x' * (1 << 30)))"
    with small_memory(megabytes=64) as group:
        for line, cause in (("go\n", OUT_OF_MEMORY), (None, "")):
            with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, text=True) as process:
                group.add(process.pid)
                counter = KillCounter(process.pid)
                if line is None:
                    os.kill(process.pid, signal.SIGKILL)
                    status = process.wait()
                else:
                    process.communicate(line)
                    status = process.returncode
            assert cause_of(status, kills_before=counter.before, kills_after=counter.read()) == cause
