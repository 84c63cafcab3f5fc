"""A real deployment for measuring: provisioned kits, a server and clients as processes, mutual TLS on loopback."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

HANSE = [str(Path(sys.executable).with_name("hanse"))]
PROJECT = """
name = "bench"
organisation = "Bench"

[server]
hosts = ["localhost", "127.0.0.1"]
listen = "127.0.0.1"
port = {port}

{clients}
[[admins]]
name = "admin@bench"
role = "admin"
"""


@dataclass
class Deployment:
    """The running processes and where their kits are; ``registered_s`` is from start until all were registered."""

    root: Path
    server: psutil.Process
    agents: list[psutil.Process]
    registered_s: float

    def hanse(self, *arguments: str) -> Any:
        """Return what ``hanse ARGUMENTS --format json`` prints, run with the administrator's kit."""
        environment = {**os.environ, "HANSE_KIT": str(self.root / "kits" / "admin@bench")}
        done = subprocess.run(
            [*HANSE, *arguments, "--format", "json"], env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise RuntimeError(f"hanse {' '.join(arguments)}: {done.stdout}{done.stderr}")
        return json.loads(done.stdout)

    def run(self, job: Path) -> dict[str, Any]:
        """Submit the job in the folder *job*, wait for its end, and return it, with its rounds' history."""
        submitted = self.hanse("job", "submit", str(job))
        ended: dict[str, Any] = self.hanse("job", "wait", submitted["job_id"])
        if ended["state"] != "completed":
            raise RuntimeError(f"job {ended['job_id']} {ended['state']}: {ended['reason']}")
        return ended

    def server_processes(self) -> list[psutil.Process]:
        """Return the server and its job processes."""
        return [self.server, *self.server.children(recursive=True)]


@contextmanager
def deployment(*, clients: int = 2) -> Iterator[Deployment]:
    """Run a server and *clients* agents until the block ends."""
    root = Path(tempfile.mkdtemp(prefix="hanse-bench-"))
    names = [f"site-{number}" for number in range(1, clients + 1)]
    sections = "".join(f'[[clients]]\nname = "{name}"\n\n' for name in names)
    (root / "project.toml").write_text(PROJECT.format(port=_free_port(), clients=sections))
    provision = [*HANSE, "provision", str(root / "project.toml"), "--out", str(root / "kits")]
    subprocess.run(provision, check=True, stdout=subprocess.DEVNULL)
    processes: list[subprocess.Popen[str]] = []
    began = time.perf_counter()
    try:
        for kind, name in [("server", "server"), *(("client", name) for name in names)]:
            with (root / f"{name}.log").open("w") as log:
                command = [*HANSE, kind, "start", str(root / "kits" / name)]
                processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True))
        for process in processes:  # each says one line when it is ready: the server serves, the client is registered
            if process.stdout is None or not process.stdout.readline():
                raise RuntimeError(f"a process did not start; see the logs in {root}")
        registered_s = time.perf_counter() - began
        server, *agents = (psutil.Process(process.pid) for process in processes)
        yield Deployment(root, server, agents, registered_s)
    finally:
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            process.wait(60)
            if process.stdout is not None:
                process.stdout.close()
        shutil.rmtree(root, ignore_errors=True)


class MemoryPeak:
    """Samples the anonymous memory of several processes together, and keeps the highest sum, in MB."""

    def __init__(self, processes: Callable[[], list[psutil.Process]], *, every_s: float = 0.02) -> None:
        self._processes, self._every_s = processes, every_s
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self.mb = 0.0

    def __enter__(self) -> "MemoryPeak":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stopping.wait(self._every_s):
            self.mb = max(self.mb, sum(anonymous_mb(process.pid) for process in self._processes()))


def anonymous_mb(pid: int) -> float:
    """Return the resident anonymous memory of a process: what is its own, and not a file's."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("RssAnon")), 0.0)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
