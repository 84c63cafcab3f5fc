"""How long it takes until all goes on, after a process was killed or a server handed over.

What counts is the journal's own record: the first round that was committed after the disturbance.
"""

import asyncio
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import msgspec
import psutil

from benchmarks.deployment import ADMIN, Deployment, deployment, two_servers
from benchmarks.figures import JOBS, Figure, figure, with_settings
from hanse.admin.session import AdminSession
from hanse.cell.loop import run
from hanse.events import EventType
from hanse.identity.kits import Kit
from hanse.ids import JobId
from hanse.job import JobState
from hanse.messages import CommitRound, JobEvent, JobView, ModelRef, StateRef
from hanse.settings import AdminSettings
from hanse.storage.store import SqlStore

GATED = Path(__file__).resolve().parent.parent / "tests" / "e2e" / "job"
ENDED_JOBS = 1000
RESTARTS = 5
KILLS = 8
CHANGES = 5
"""How often the serving server is changed."""
FOR_EVER = 1_000_000
"""Rounds of a job that goes on until it is aborted."""


def restart() -> Iterator[Figure]:
    """A killed server with 1,000 ended jobs in its store and one that runs: from its start until it serves again."""
    with deployment() as running, tempfile.TemporaryDirectory(prefix="hanse-jobs-") as name:
        running.start("server", *running.names)
        model = running.run(JOBS / "noop")["job_id"]
        assert running.end("server") == 0
        run(_multiply_job(running.workspace("server") / "store.db", JobId(model)))
        running.start("server")
        endless = with_settings(JOBS / "noop", Path(name), rounds=FOR_EVER)

        def kill_and_start() -> float:
            running.kill("server")
            began = time.time()
            running.start("server")
            return began

        times = [run(_disturbed(running, endless, kill_and_start)) for _ in range(RESTARTS)]
    yield figure(
        "restart_s",
        statistics.median(each.until_round_s for each in times),
        "s",
        "< 5",
        longest=round(max(each.until_round_s for each in times), 3),
        until_serving=round(statistics.median(each.acting_s for each in times), 3),
        jobs=ENDED_JOBS,
        restarts=RESTARTS,
        note="from the server's start until the running job's next round is committed",
    )


async def _multiply_job(path: Path, job_id: JobId) -> None:
    """Have the store at *path* hold what 1,000 jobs such as *job_id* leave behind."""
    async with SqlStore(path) as store:
        epoch = (await store.take_lease("benchmark", name="benchmark", target="", ttl_s=60, force=True)).epoch
        record, rounds = await store.job(job_id), await store.rounds(job_id)

        async def copy(number: int) -> None:
            ended = msgspec.structs.replace(record, job_id=JobId(f"{job_id}-{number}"))
            await store.add_job(epoch, msgspec.structs.replace(ended, state=JobState.RUNNING))
            for each in rounds:
                state = StateRef(each.round, ModelRef(), metrics=each.metrics)
                commit = CommitRound(state, each.took_s, record.clients)
                await store.commit_round(epoch, ended.job_id, commit, now_s=each.committed_at)
            await store.end_run(epoch, ended, was=JobState.RUNNING)

        await asyncio.gather(*(copy(number) for number in range(1, ENDED_JOBS)))
        await store.release_lease(epoch)


def client_kill() -> Iterator[Figure]:
    """A client's process killed in training: until the server knows, and until user code has its task again."""
    with (
        tempfile.TemporaryDirectory(prefix="hanse-gates-") as gates,
        tempfile.TemporaryDirectory(prefix="hanse-jobs-") as jobs,
        deployment() as running,
    ):
        for name in running.names:
            running.environments[name] = {"HANSE_TEST_GATES": gates}
        running.start("server", *running.names)
        for number in range(1, KILLS + 1):
            os.mkfifo(Path(gates) / f"site-1-{number}")
        folder = with_settings(GATED, Path(jobs), rounds=KILLS, process_tries=KILLS + 1)
        noticed, again = run(_kill_in_each_round(running, folder, Path(gates)))
    yield figure(
        "client_kill_noticed_s", statistics.median(noticed), "s", "< 1", longest=round(max(noticed), 3), kills=KILLS
    )
    yield figure(
        "client_kill_again_s",
        statistics.median(again),
        "s",
        "< 5",
        longest=round(max(again), 3),
        kills=KILLS,
        note="until the task is in user code again",
    )


async def _kill_in_each_round(running: Deployment, job: Path, gates: Path) -> tuple[list[float], list[float]]:
    noticed, again = [], []
    async with admin_session(running) as session:
        job_id = (await session.submit(job)).job_id
        for number in range(1, KILLS + 1):
            gate = gates / f"site-1-{number}"
            training = await asyncio.to_thread(gate.open, "wb")  # there is somebody who reads: it is in its code
            process = running.job_process("site-1")
            began = time.perf_counter()
            process.kill()
            noticed.append(await _until_not_running(session, job_id) - began)
            await asyncio.to_thread(psutil.wait_procs, [process])
            training.close()
            training = await asyncio.to_thread(gate.open, "wb")
            again.append(time.perf_counter() - began)
            training.close()
        await session.wait(job_id)
    return noticed, again


async def _until_not_running(session: AdminSession, job_id: JobId) -> float:
    """Return when (``perf_counter``) the server first says that site-1 does not run; asked as often as it answers."""
    while True:
        view = await session.show(job_id)
        if next(client.state for client in view.clients if client.name == "site-1") != "running":
            return time.perf_counter()


def failover() -> Iterator[Figure]:
    """The serving server is killed while another stands by: until the next round is committed there.

    That is no sooner than the next accepted answer. The one that was killed is started again, and stands by.
    """

    def kill(running: Deployment) -> float:
        running.kill(serving(running))
        return time.time()

    times = _with_two_servers(kill)
    yield figure(
        "failover_s",
        statistics.median(each.until_round_s for each in times),
        "s",
        "< 10",
        longest=round(max(each.until_round_s for each in times), 3),
        times=len(times),
        note="from the kill until the next round is committed",
    )


def handover() -> Iterator[Figure]:
    """The standby is made the serving server: the longest time between two rounds meanwhile."""

    def promote(running: Deployment) -> float:
        (other,) = {*running.servers} - {serving(running)}
        began = time.time()
        running.hanse("server", "promote", other)
        return began

    times = _with_two_servers(promote)
    yield figure(
        "handover_s",
        statistics.median(each.longest_gap_s for each in times),
        "s",
        "< 3",
        longest=round(max(each.longest_gap_s for each in times), 3),
        command_took=round(statistics.median(each.acting_s for each in times), 3),
        times=len(times),
        note="the longest time between two committed rounds",
    )


def serving(running: Deployment) -> str:
    """Return the name of the server that serves."""
    return str(running.hanse("server", "status")["name"])


def _with_two_servers(disturb: Callable[[Deployment], float]) -> list["Recovery"]:
    """Return how *disturb*, done again and again to a project with two servers, went each time."""
    times = []
    with two_servers() as running, tempfile.TemporaryDirectory(prefix="hanse-jobs-") as name:
        endless = with_settings(JOBS / "noop", Path(name), rounds=FOR_EVER)
        running.start("server")
        running.start("standby", *running.names)
        for _ in range(CHANGES):
            times.append(run(_disturbed(running, endless, lambda: disturb(running))))
            running.start(*({*running.servers} - running.processes.keys()))
    return times


class Recovery(msgspec.Struct, frozen=True):
    """How a disturbance went: what disturbed, until the first round after it, and the longest time between rounds."""

    acting_s: float
    until_round_s: float
    longest_gap_s: float


async def _disturbed(running: Deployment, endless: Path, disturb: Callable[[], float]) -> Recovery:
    """Run *endless*, *disturb* it, and tell how it went on; *disturb* returns when (POSIX) the clock starts."""
    async with admin_session(running) as session:
        job_id = (await session.submit(endless)).job_id
        async with aclosing(session.follow(job_id)) as events:
            async for happened in events:
                if _is_round(happened, at_least=20):
                    break
            began = await asyncio.to_thread(disturb)
            acted = time.time()
            async for happened in events:
                if _is_round(happened, at_least=20) and _time_of(happened) > acted:
                    break
        await session.abort(job_id)
        commits = [each.committed_at for each in (await session.wait(job_id)).history]
    after = next(at for at in commits if at > began)
    gaps = [later - earlier for earlier, later in itertools.pairwise(commits) if later > began]
    return Recovery(acting_s=acted - began, until_round_s=after - began, longest_gap_s=max(gaps))


def _is_round(happened: JobView | JobEvent, *, at_least: int) -> bool:
    return isinstance(happened, JobEvent) and happened.kind == EventType.ROUND_DONE and happened.round >= at_least


def _time_of(happened: JobView | JobEvent) -> float:
    return happened.at if isinstance(happened, JobEvent) else 0.0


@asynccontextmanager
async def admin_session(running: Deployment) -> AsyncIterator[AdminSession]:
    kit = Kit.load(running.kit(ADMIN), AdminSettings)
    async with AdminSession(kit, patience_s=60) as session:
        yield session
