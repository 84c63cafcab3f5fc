"""A real deployment for measuring: provisioned kits, a server and clients as processes, mutual TLS on loopback."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

HANSE = [sys.executable, "-m", "hanse.cli"]
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
    registered_s: float = 0.0
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def hanse(self, *arguments: str) -> Any:
        """Return what ``hanse ARGUMENTS --format json`` prints, run with the administrator's kit."""
        environment = {**os.environ, "HANSE_KIT": str(self.root / "kits" / "admin@bench")}
        done = subprocess.run(
            [*HANSE, *arguments, "--format", "json"], env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise RuntimeError(f"hanse {' '.join(arguments)}: {done.stdout}{done.stderr}")
        return json.loads(done.stdout)

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
    subprocess.run(
        [*HANSE, "provision", str(root / "project.toml"), "--out", str(root / "kits")],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    processes: list[subprocess.Popen[bytes]] = []
    began = time.perf_counter()
    try:
        for kind, name in [("server", "server"), *(("client", name) for name in names)]:
            log = (root / f"{name}.log").open("wb")
            processes.append(
                subprocess.Popen([*HANSE, kind, "start", str(root / "kits" / name)], stdout=log, stderr=log)
            )
        running = Deployment(
            root,
            psutil.Process(processes[0].pid),
            [psutil.Process(process.pid) for process in processes[1:]],
            processes=processes,
        )
        _wait_registered(running, names)
        running.registered_s = _registered_at(running, names) - (time.time() - (time.perf_counter() - began))
        yield running
    finally:
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            process.wait(30)
        shutil.rmtree(root, ignore_errors=True)
