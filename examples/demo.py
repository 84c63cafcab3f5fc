"""Three organisations train a model together, here and for real: ``make demo``.

A project is provisioned; a server and three clients start as processes of their own and talk over mutual TLS on
loopback; the job in ``examples/digits`` is submitted, its progress shown, and its model compared on held-out data with
what each client reaches alone and with what all data pooled would give. The demo fails if the federation is not worth
it. Whatever happens, Ctrl-C included, no process is left.
"""

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from hanse import HanseError, read_safetensors
from hanse.admin.session import AdminSession
from hanse.identity.kits import Kit
from hanse.messages import JobEvent, JobView
from hanse.settings import AdminSettings

ROOT = Path(__file__).resolve().parent.parent
JOB = ROOT / "examples" / "digits"
FOLDER = ROOT / ".demo"
CLIENTS = 3
WITHIN_POOLED = 0.03
START_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 15.0
HANSE = (str(Path(sys.executable).with_name("hanse")),)
console = Console()


def main() -> int:
    """Run the demo; return the exit status."""
    began = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        with ExitStack() as stack:
            kits = provision()
            server = stack.enter_context(running("server", kits / "server"))
            for number in range(1, CLIENTS + 1):
                stack.enter_context(running("client", kits / f"site-{number}"))
            console.print(f"server {server.pid} and {CLIENTS} clients are up; submitting [bold]{JOB.name}[/]")
            model = FOLDER / "model.safetensors"
            asyncio.run(run_job(kits / "admin@demo", model))
            return show_outcome(model, took_s=time.monotonic() - began)
    except KeyboardInterrupt:
        console.print("interrupted; every process has been ended")
        return 130
    except HanseError as error:
        console.print(f"[red]{error.reason}[/]")
        return error.exit_status


def provision() -> Path:
    """Write the project's description, make its kits, and return their folder."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    clients = "".join(
        f'[[clients]]\nname = "site-{number}"\norganisation = "Organisation {number}"\n'
        f"config = {{ partition = {number - 1}, partitions = {CLIENTS} }}\n\n"
        for number in range(1, CLIENTS + 1)
    )
    project = FOLDER / "project.toml"
    project.write_text(
        'name = "demo"\norganisation = "Demo"\n\n'
        f'[server]\nhosts = ["localhost", "127.0.0.1"]\nlisten = "127.0.0.1"\nport = {free_port()}\n\n'
        f'{clients}[[admins]]\nname = "admin@demo"\nrole = "admin"\n',
        encoding="utf-8",
    )
    kits = FOLDER / "kits"
    subprocess.run([*HANSE, "provision", str(project), "--out", str(kits)], check=True)
    return kits


@contextmanager
def running(kind: str, kit: Path) -> Iterator[subprocess.Popen[str]]:
    """Run ``hanse KIND start KIT`` until the block ends; enter it when the process says that it is ready."""
    with (FOLDER / f"{kit.name}.log").open("w", encoding="utf-8") as log:
        # In a session of its own, so that Ctrl-C reaches the demo alone, which then ends its processes in order.
        process = subprocess.Popen(
            [*HANSE, kind, "start", str(kit)], stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
        )
        try:
            console.print(f"[dim]{kit.name}:[/] {first_line(process, kit)}")
            yield process
        finally:
            end(process)


def first_line(process: subprocess.Popen[str], kit: Path) -> str:
    """Return the line by which *process* says that it is ready."""
    if process.stdout is None:
        raise RuntimeError(f"{kit.name} was started without a pipe")
    watchdog = threading.Timer(START_TIMEOUT_S, process.kill)
    watchdog.start()
    line = process.stdout.readline().strip()
    watchdog.cancel()
    if not line:
        log = (FOLDER / f"{kit.name}.log").read_text(encoding="utf-8").strip()
        raise SystemExit(f"{kit.name} did not start: {log[-2000:] or 'it said nothing'}")
    return line


def end(process: subprocess.Popen[str]) -> None:
    """Ask *process* to end, wait, force."""
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    finally:
        if process.stdout is not None:
            process.stdout.close()


async def run_job(kit: Path, model: Path) -> None:
    """Submit the job, show its progress until it has ended, and fetch its model into the file *model*."""
    async with AdminSession(Kit.load(kit, AdminSettings)) as session:
        submitted = await session.submit(JOB)
        progress = Progress()
        with Live(progress.table(), console=console, refresh_per_second=8) as live:
            async for seen in session.follow(submitted.job_id):
                progress.take(seen)
                live.update(progress.table())
        if not console.is_terminal:
            console.print()  # where nothing is drawn anew, the last line has no end
        view = await session.show(submitted.job_id)
        if view.state != "completed":
            raise SystemExit(f"job {view.job_id} {view.state}: {view.reason}")
        await session.download(view.job_id, model)


class Progress:
    """What is known of the job while it runs."""

    def __init__(self) -> None:
        self.view: JobView | None = None
        self.round = 0
        self.metrics: dict[str, float] = {}
        self.clients: dict[str, str] = {}

    def take(self, seen: JobView | JobEvent) -> None:
        """Take note of the job as it is, or of what happened."""
        if isinstance(seen, JobView):
            self.view, self.round, self.metrics = seen, max(self.round, seen.round), dict(seen.metrics) or self.metrics
            for client in seen.clients:
                self.clients.setdefault(client.name, client.state)
            return
        match seen.kind:
            case "task_sent":
                self.clients[seen.client] = "training"
            case "result_accepted":
                self.clients[seen.client] = seen.text or "answered"
            case "round_done":
                self.round, self.metrics = seen.round, dict(seen.metrics)
            case _:
                if seen.client:
                    self.clients[seen.client] = seen.kind.replace("_", " ")

    def table(self) -> Group:
        """Return how it looks now."""
        rounds = self.view.rounds if self.view else 0
        state = self.view.state if self.view else "submitted"
        done = round(30 * self.round / rounds) if rounds else 0
        bar = f"round {self.round:>2} of {rounds} [{'█' * done}{'·' * (30 - done)}] {state}"
        table = Table(box=None, padding=(0, 2))
        table.add_column("client")
        table.add_column("is")
        for name, doing in sorted(self.clients.items()):
            table.add_row(name, doing)
        numbers = "  ".join(f"{name} {value:.3f}" for name, value in sorted(self.metrics.items()))
        return Group(Text(bar), Text(numbers, style="green"), table)


def show_outcome(model: Path, *, took_s: float) -> int:
    """Print the federated model's accuracy beside the others'; return 1 if the federation was not worth it."""
    sys.path.insert(0, str(JOB))
    import compare  # noqa: PLC0415 - a module of the example job, which lies outside any package

    federated = compare.accuracy(read_safetensors(model))
    other = compare.compare(CLIENTS)
    table = Table(title="Accuracy on held-out digits")
    table.add_column("trained on")
    table.add_column("accuracy", justify="right")
    for number, reached in enumerate(other.alone, 1):
        table.add_row(f"site-{number} alone", f"{reached:.3f}")
    table.add_row("[bold]the federation[/]", f"[bold]{federated:.3f}[/]")
    table.add_row("all data pooled", f"{other.pooled:.3f}")
    console.print(table)
    console.print(f"the model is in {os.path.relpath(model, Path.cwd())}; the demo took {took_s:.0f} s")
    failures = []
    if federated < other.pooled - WITHIN_POOLED:
        failures.append(f"it is more than {WITHIN_POOLED} below pooled")
    if federated <= max(other.alone):
        failures.append("a client alone does as well")
    for failure in failures:
        console.print(f"[red]The federated model is not good enough: {failure}.[/]")
    return 1 if failures else 0


def free_port() -> int:
    """Return a port of loopback that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
