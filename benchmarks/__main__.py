"""Measure, one JSON line a figure: ``python -m benchmarks [NAME ...]``; without names, all that take seconds.

Each line is ``{"name", "value", "unit", "target", ...}``. Deployed means a server, its job process, two agents and
their job processes, mutual TLS, loopback, defaults. The figures are of one run on this machine, as busy as it is.
"""

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

from benchmarks.deployment import Deployment, MemoryPeak, deployment
from benchmarks.endurance import endurance_jobs, endurance_rounds
from benchmarks.figures import JOBS, Figure, figure, round_seconds
from benchmarks.journal import journal
from benchmarks.recovery import client_kill, failover, handover, restart

ROOT = Path(__file__).resolve().parent.parent
IDLE_S = 30.0


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
    seconds = round_seconds(job)
    model_mb = 10 * 2_500_000 * 4 / 1e6
    moved_mb = 2 * 2 * model_mb
    round_s = statistics.median(seconds)
    yield figure("bulk_mb_per_s", moved_mb / round_s, "MB/s", ">= 200", round_s=round(round_s, 3), rounds=len(seconds))
    yield figure("server_peak_mb", peak.mb, "MB", "< 400", note="anonymous memory, server and its job process")


ALONE: dict[str, Callable[[], Iterator[Figure]]] = {
    "help": help_,
    "install": install,
    "demo": demo,
    "restart": restart,
    "client_kill": client_kill,
    "failover": failover,
    "handover": handover,
}
LONG: dict[str, Callable[[], Iterator[Figure]]] = {
    "journal": journal,
    "endurance_rounds": endurance_rounds,
    "endurance_jobs": endurance_jobs,
}
"""What takes minutes, or hours, is measured when its name is given."""
DEPLOYED: dict[str, Callable[[Deployment], Iterator[Figure]]] = {
    "start": start,
    "idle": idle,
    "noop": noop,
    "bulk": bulk,
}


def main() -> int:
    """Print the figures that the command line names."""
    alone = ALONE | LONG
    names = sys.argv[1:] or [*ALONE, *DEPLOYED]
    if unknown := set(names) - set(alone) - set(DEPLOYED):
        print(f"no such benchmark: {', '.join(sorted(unknown))}; there are {', '.join([*alone, *DEPLOYED])}")
        return 2
    os.environ.pop("HANSE_KIT", None)
    for name in names:
        if name in alone:
            for line in alone[name]():
                print(json.dumps(line), flush=True)
    deployed = [name for name in names if name in DEPLOYED]
    if deployed:
        with deployment() as running:
            for name in dict.fromkeys(["start", *deployed]):
                for line in DEPLOYED[name](running):
                    print(json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
