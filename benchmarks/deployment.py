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
from pathlib import Path
from typing import IO, Any

import psutil

HANSE = [str(Path(sys.executable).with_name("hanse"))]
ADMIN = "admin@bench"
PROJECT = """
name = "bench"
organisation = "Bench"

[server]
hosts = ["localhost", "127.0.0.1"]
listen = "127.0.0.1"
port = {port}
{settings}

{clients}
[[admins]]
name = "admin@bench"
role = "admin"
"""


class Deployment:
    """A provisioned project and its running processes; ``processes`` maps participants' names to theirs.

    By name of a participant, ``environments`` holds what its environment has besides this one's, and ``programs`` what
    is started in place of ``hanse``.
    """

    def __init__(self, root: Path, *, clients: int, settings: str = "") -> None:
        self.root = root
        self.names = [f"site-{number}" for number in range(1, clients + 1)]
        self.processes: dict[str, subprocess.Popen[str]] = {}
        self.environments: dict[str, dict[str, str]] = {}
        self.programs: dict[str, list[str]] = {}
        sections = "".join(f'[[clients]]\nname = "{name}"\n\n' for name in self.names)
        project = root / "project.toml"
        project.write_text(PROJECT.format(port=_free_port(), clients=sections, settings=settings))
        provision = [*HANSE, "provision", str(project), "--out", str(root / "kits")]
        subprocess.run(provision, check=True, stdout=subprocess.DEVNULL)

    def start(self, *names: str) -> float:
        """Start these participants; return the seconds until each has said that it is ready."""
        began = time.perf_counter()
        for name in names:
            kind = "server" if name == "server" else "client"
            with (self.root / f"{name}.log").open("a") as log:
                command = [*self.programs.get(name, HANSE), kind, "start", str(self.root / "kits" / name)]
                self.processes[name] = subprocess.Popen(
                    command, stdout=subprocess.PIPE, stderr=log, text=True, env=self._environment_of(name)
                )
        for name in names:
            if not _pipe_of(self.processes[name]).readline():
                raise RuntimeError(f"{name} did not start: {(self.root / f'{name}.log').read_text()[-2000:]}")
        return time.perf_counter() - began

    def kill(self, name: str) -> None:
        """Kill a participant's process, so that it can do nothing more, and reap it."""
        process = self.processes.pop(name)
        process.kill()
        process.wait()
        _pipe_of(process).close()

    def end(self, name: str) -> int:
        """Ask a participant's process to end, and return its exit status."""
        process = self.processes.pop(name)
        process.terminate()
        status = process.wait(60)
        _pipe_of(process).close()
        return status

    def stop(self) -> None:
        """Ask all processes to end, and wait for them; those that do not are killed."""
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            _pipe_of(process).close()
        self.processes.clear()

    def process(self, name: str) -> psutil.Process:
        """Return a participant's process."""
        return psutil.Process(self.processes[name].pid)

    def job_process(self, name: str) -> psutil.Process:
        """Return the one job process of a participant."""
        (process,) = self.process(name).children()
        return process

    def hanse(self, *arguments: str) -> Any:
        """Return what ``hanse ARGUMENTS --format json`` prints, run with the administrator's kit."""
        environment = {**self._environment_of(ADMIN), "HANSE_KIT": str(self.root / "kits" / ADMIN)}
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

    def _environment_of(self, name: str) -> dict[str, str]:
        return {**os.environ, **self.environments.get(name, {})}

    def server_processes(self) -> list[psutil.Process]:
        """Return the server and its job processes."""
        server = self.process("server")
        return [server, *server.children(recursive=True)]


@contextmanager
def deployment(*, clients: int = 2, settings: str = "") -> Iterator[Deployment]:
    """Provision a project with *clients* sites until the block ends; nothing is started yet."""
    root = Path(tempfile.mkdtemp(prefix="hanse-bench-"))
    try:
        running = Deployment(root, clients=clients, settings=settings)
        try:
            yield running
        finally:
            running.stop()
    finally:
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


def _pipe_of(process: subprocess.Popen[str]) -> IO[str]:
    if process.stdout is None:
        raise RuntimeError("the process was started without a pipe")
    return process.stdout
