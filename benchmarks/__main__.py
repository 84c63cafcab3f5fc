"""Measure, one JSON line a figure: ``python -m benchmarks [NAME ...]``; without names, all of them.

Each line is ``{"name", "value", "unit", "target", ...}``. Deployed means a server, its job process, two agents and
their job processes, mutual TLS, loopback, defaults. The figures are of one run on this machine, as busy as it is.
"""

import itertools
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from benchmarks.deployment import Deployment, MemoryPeak, deployment

ROOT = Path(__file__).resolve().parent.parent
JOBS = Path(__file__).resolve().parent / "jobs"
IDLE_S = 30.0
Figure = dict[str, object]


def figure(name: str, value: float, unit: str, target: str, **more: object) -> Figure:
    """Return one line of output."""
    return {"name": name, "value": round(value, 3), "unit": unit, "target": target, **more}


def demo() -> Iterator[Figure]:
    """``make demo`` once installed."""
    began = time.perf_counter()
    subprocess.run(["make", "demo"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    yield figure("demo_s", time.perf_counter() - began, "s", "< 60")


def install() -> Iterator[Figure]:
    """The plain install: a new environment with the package and what it needs, and nothing else."""
    folder = Path(tempfile.mkdtemp(prefix="hanse-install-"))
    try:
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "--quiet", "install", "--disable-pip-version-check"]
        (packages,) = folder.glob("lib/python*/site-packages")
        before = {entry.name for entry in packages.iterdir()}
        subprocess.run([*pip, str(ROOT)], check=True)
        added = [entry for entry in packages.iterdir() if entry.name not in before]
        size = sum(path.stat().st_size for entry in added for path in _files(entry))
        names = {d.metadata["Name"] for d in metadata.distributions(path=[str(packages)])}
        yield figure("install_mb", size / 1e6, "MB", "< 200")
        yield figure("install_packages", len(names - {"pip", "setuptools"}), "packages", "< 45")
    finally:
        shutil.rmtree(folder)


def _files(entry: Path) -> Iterator[Path]:
    return (path for path in entry.rglob("*") if path.is_file()) if entry.is_dir() else iter([entry])


def help_() -> Iterator[Figure]:
    """``hanse --help``: median CPU seconds of nine."""
    command = [str(Path(sys.executable).with_name("hanse")), "--help"]
    seconds = []
    for _ in range(10):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    yield figure("help_s", statistics.median(seconds[1:]), "CPU s", "< 0.25")


def start(running: Deployment) -> Iterator[Figure]:
    """From the start of the server and two clients until both are registered."""
    yield figure("registered_s", running.start("server", *running.names), "s", "< 3")


def idle(running: Deployment) -> Iterator[Figure]:
    """A client's agent at rest, and the CPU of server and two agents together over 30 s."""
    processes = [running.process(name) for name in ("server", *running.names)]
    before = sum(sum(process.cpu_times()[:2]) for process in processes)
    time.sleep(IDLE_S)
    used = sum(sum(process.cpu_times()[:2]) for process in processes) - before
    yield figure("agent_idle_mb", max(agent.memory_info().rss for agent in processes[1:]) / 1e6, "MB", "< 80")
    yield figure("idle_cpu_percent", 100 * used / IDLE_S, "% of a core", "< 1")


def noop(running: Deployment) -> Iterator[Figure]:
    """A round that does nothing, and how long the first task takes to reach a client's code."""
    submitted = time.time()
    job = running.run(JOBS / "noop")
    rounds = {each["round"]: each for each in job["history"]}
    first_s = rounds[1]["metrics"]["task_at"] - submitted
    yield figure("first_task_s", first_s, "s", "< 2", note="includes the start of `hanse job submit`")
    slope_s = (rounds[110]["committed_at"] - rounds[10]["committed_at"]) / 100
    yield figure("noop_round_ms", 1000 * slope_s, "ms", "< 50")


def bulk(running: Deployment) -> Iterator[Figure]:
    """100 MB of float32 noise in 10 tensors, changed by every client: bytes moved a second of round, and memory."""
    with MemoryPeak(running.server_processes) as peak:
        job = running.run(JOBS / "bulk")
    commits = [each["committed_at"] for each in job["history"]]
    seconds = [after - before for before, after in itertools.pairwise(commits[1:])]
    model_mb = 10 * 2_500_000 * 4 / 1e6
    moved_mb = 2 * 2 * model_mb
    round_s = statistics.median(seconds)
    yield figure("bulk_mb_per_s", moved_mb / round_s, "MB/s", ">= 200", round_s=round(round_s, 3), rounds=len(seconds))
    yield figure("server_peak_mb", peak.mb, "MB", "< 400", note="anonymous memory, server and its job process")


def killed(running: Deployment) -> Iterator[Figure]:
    """A client's job process is killed in training: when the server knows, and when its code runs the task again."""
    gate = Path(os.environ["HANSE_TEST_GATES"]) / "site-1-1"
    noticed, again = [], []
    for _ in range(5):
        os.mkfifo(gate)
        job = running.hanse("job", "submit", str(ROOT / "tests" / "e2e" / "job"))["job_id"]
        with gate.open("wb"), _lines_of(running.root / "server.log") as lines:  # in the middle of its training
            gate.unlink()
            os.mkfifo(gate)
            began = time.perf_counter()
            running.job_process("site-1").kill()
            next(line for line in lines if "process died" in line)
            noticed.append(time.perf_counter() - began)
            with gate.open("wb"):
                again.append(time.perf_counter() - began)
                gate.unlink()
        running.hanse("job", "wait", job)
    yield figure("client_kill_noticed_s", statistics.median(noticed), "s", "< 1", worst=round(max(noticed), 3))
    yield figure("client_kill_again_s", statistics.median(again), "s", "< 5", worst=round(max(again), 3))


@contextmanager
def _lines_of(log: Path) -> Iterator[Iterable[str]]:
    """Give the lines that are added to *log* from now on, each as it comes."""
    command = ["tail", "-c", f"+{log.stat().st_size + 1}", "-F", str(log)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as tail:
        try:
            yield tail.stdout or []
        finally:
            tail.kill()


ALONE: dict[str, Callable[[], Iterator[Figure]]] = {"help": help_, "install": install, "demo": demo}
DEPLOYED: dict[str, Callable[[Deployment], Iterator[Figure]]] = {
    "start": start,
    "idle": idle,
    "noop": noop,
    "bulk": bulk,
    "killed": killed,
}


def main() -> int:
    """Print the figures that the command line names."""
    names = sys.argv[1:] or [*ALONE, *DEPLOYED]
    if unknown := set(names) - set(ALONE) - set(DEPLOYED):
        print(f"no such benchmark: {', '.join(sorted(unknown))}; there are {', '.join([*ALONE, *DEPLOYED])}")
        return 2
    for name in names:
        if name in ALONE:
            for line in ALONE[name]():
                print(json.dumps(line), flush=True)
    deployed = [name for name in names if name in DEPLOYED]
    if deployed:
        os.environ.pop("HANSE_KIT", None)
        with tempfile.TemporaryDirectory(prefix="hanse-gates-") as gates, deployment() as running:
            os.environ["HANSE_TEST_GATES"] = gates
            for name in dict.fromkeys(["start", *deployed]):
                for line in DEPLOYED[name](running):
                    print(json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
