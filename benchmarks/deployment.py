"""A real deployment for measuring: provisioned kits, a server and clients as processes, mutual TLS on loopback."""

import json
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import psutil

from benchmarks import marked
from hanse.client.workspace import job_folders
from hanse.launch.surviving import pid_at

HANSE = [str(Path(sys.executable).with_name("hanse"))]
ADMIN = "admin@bench"
START_WITHIN_S = 60.0
STOP_WITHIN_S = 60.0
PROJECT = """
name = "bench"
organisation = "Bench"

[server]
hosts = {hosts}
listen = "{listen}"
port = {port}
{settings}

{clients}
{more}
[[admins]]
name = "admin@bench"
role = "admin"
"""


class Deployment:
    """A provisioned project and its running processes; ``processes`` maps participants' names to theirs.

    ``settings`` are lines of the project's server, ``more`` further sections of the project. What a participant is
    started with beyond its kit is in ``prefixes`` (words before the command), ``environments``, and ``programs`` (what
    is started in place of ``hanse``).
    """

    def __init__(
        self,
        root: Path,
        *,
        clients: int,
        settings: str = "",
        more: str = "",
        servers: Sequence[str] = ("server",),
        hosts: Sequence[str] = ("localhost", "127.0.0.1"),
        listen: str = "127.0.0.1",
    ) -> None:
        self.root = root
        self.shared = root
        """What several servers share; a server alone has it all."""
        self.servers = list(servers)
        self.names = [f"site-{number}" for number in range(1, clients + 1)]
        self.port = free_port()
        self.processes: dict[str, subprocess.Popen[str]] = {}
        self.environments: dict[str, dict[str, str]] = {}
        self.prefixes: dict[str, list[str]] = {}
        self.programs: dict[str, list[str]] = {}
        sections = "".join(f'[[clients]]\nname = "{name}"\n\n' for name in self.names)
        project = root / "project.toml"
        project.write_text(
            PROJECT.format(
                port=self.port,
                clients=sections,
                settings=settings,
                more=more,
                hosts=json.dumps(list(hosts)),
                listen=listen,
            )
        )
        provision = [*HANSE, "provision", str(project), "--out", str(root / "kits")]
        subprocess.run(provision, check=True, stdout=subprocess.DEVNULL)

    def kit(self, name: str) -> Path:
        """Return the folder of a participant's kit."""
        return self.root / "kits" / name

    def workspace(self, name: str) -> Path:
        """Return the folder in which a participant keeps its things."""
        return self.kit(name) / "workspace"

    def log(self, name: str) -> Path:
        """Return the file with what a participant's process has said, all its starts in one."""
        return self.root / f"{name}.log"

    def configure(self, name: str, **settings: object) -> None:
        """Change a participant's settings, from its next start on; the values are such as JSON and TOML write alike."""
        path = self.kit(name) / "settings.toml"
        kept = [line for line in path.read_text().splitlines() if line.partition(" = ")[0] not in settings]
        path.write_text("\n".join([*(f"{key} = {json.dumps(value)}" for key, value in settings.items()), *kept]) + "\n")

    def start(self, *names: str) -> float:
        """Start these participants; return the seconds until each has said that it is ready."""
        began = time.perf_counter()
        for name in names:
            kind = "server" if name in self.servers else "client"
            program = self.programs.get(name, HANSE)
            command = [*self.prefixes.get(name, []), *program, kind, "start", str(self.kit(name))]
            with self.log(name).open("a") as log:
                self.processes[name] = subprocess.Popen(
                    command, stdout=subprocess.PIPE, stderr=log, text=True, env=self._environment_of(name)
                )
        for name in names:
            pipe = _pipe_of(self.processes[name])
            ready, _, _ = select.select([pipe], [], [], max(began + START_WITHIN_S - time.perf_counter(), 0.0))
            if not ready or not pipe.readline():
                what = "ended" if ready else f"was not ready within {START_WITHIN_S:g} s"
                raise RuntimeError(f"{name} did not start, it {what}: {self.log(name).read_text()[-2000:]}")
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
        try:
            return process.wait(STOP_WITHIN_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise RuntimeError(
                f"{name} did not end within {STOP_WITHIN_S:g} s: {self.log(name).read_text()[-2000:]}"
            ) from None
        finally:
            _pipe_of(process).close()

    def stop(self) -> None:
        """Ask all processes to end, and wait for them; those that do not are killed, and so is what they left."""
        try:
            for process in self.processes.values():
                process.terminate()
            for process in self.processes.values():
                try:
                    process.wait(STOP_WITHIN_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                _pipe_of(process).close()
            self.processes.clear()
        finally:
            marked.kill(str(self.root))

    def process(self, name: str) -> psutil.Process:
        """Return a participant's process."""
        return psutil.Process(self.processes[name].pid)

    def job_process(self, name: str) -> psutil.Process:
        """Return the one job process of a participant; a client's may be one that an earlier agent has started."""
        if name not in self.names:
            (process,) = self.process(name).children()
            return process
        folders = job_folders(self.root / "kits" / name / "workspace")
        (pid,) = [pid for folder in folders if (pid := pid_at(folder.path)) is not None]
        return psutil.Process(pid)

    def living(self) -> list[psutil.Process]:
        """Return all processes of this deployment that run, whoever their parent is by now."""
        return marked.living(str(self.root))

    def hanse(self, *arguments: str) -> Any:
        """Return what ``hanse ARGUMENTS --format json`` prints, run with the administrator's kit."""
        environment = {**self._environment_of(ADMIN), "HANSE_KIT": str(self.kit(ADMIN))}
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
        return {**os.environ, marked.VARIABLE: str(self.root), **self.environments.get(name, {})}

    def server_processes(self) -> list[psutil.Process]:
        """Return the server and its job processes."""
        server = self.process("server")
        return [server, *server.children(recursive=True)]


@contextmanager
def deployment(place: Path | None = None, *, clients: int = 2, **project: Any) -> Iterator[Deployment]:
    """Provision a project with *clients* sites until the block ends; nothing is started yet. See ``Deployment``.

    All of it is in a new folder in *place*, by default where temporary files are.
    """
    root = Path(tempfile.mkdtemp(prefix="hanse-bench-", dir=place))
    try:
        running = Deployment(root, clients=clients, **project)
        try:
            yield running
        finally:
            running.stop()
    finally:
        shutil.rmtree(root, ignore_errors=True)


@contextmanager
def two_servers(store: str = "", runs: str = "", *, clients: int = 2) -> Iterator[Deployment]:
    """Provision a project with two servers on the database *store* (a URL; by default a SQLite file of its own).

    Their *runs* are in a bucket (a URL), by default in a folder that they share.
    """
    shared = Path(tempfile.mkdtemp(prefix="hanse-shared-"))
    settings = {
        "store": store or f"sqlite:///{shared}/store.db",
        "runs": runs or f"{shared}/runs",
        "shutdown_period_s": 5.0,
    }
    lines = ", ".join(f"{key} = {json.dumps(value)}" for key, value in settings.items())
    standby = f'[[standbys]]\nname = "standby"\nhosts = ["localhost"]\nlisten = "127.0.0.1"\nport = {free_port()}\n'
    try:
        with deployment(
            clients=clients, settings=f"settings = {{ {lines} }}", more=standby, servers=("server", "standby")
        ) as running:
            running.shared = shared
            yield running
    finally:
        shutil.rmtree(shared, ignore_errors=True)


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


def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _pipe_of(process: subprocess.Popen[str]) -> IO[str]:
    if process.stdout is None:
        raise RuntimeError("the process was started without a pipe")
    return process.stdout
