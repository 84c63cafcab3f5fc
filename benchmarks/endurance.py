"""Whether anything grows that should not: 20,000 rounds of one job, and 500 jobs one after the other.

Samples are taken when a round, or a job, is done. What each of them costs more than the one before is the slope of the
second half of the samples: in the first, caches fill. What is kept on purpose grows: a round's line in the store, and
of a job its record, package, result and logs; it is a figure like the others, so that it can be seen to be what it is.
"""

import asyncio
import os
import statistics
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.deployment import Deployment, anonymous_mb, deployment
from benchmarks.figures import JOBS, Figure, figure, with_settings
from benchmarks.recovery import admin_session
from hanse.cell.loop import run
from hanse.events import EventType

ROUNDS = 20_000
JOBS_IN_SEQUENCE = 500
SAMPLES = 100


def endurance_rounds() -> Iterator[Figure]:
    """One job of 20,000 rounds that do nothing."""
    with deployment() as running, tempfile.TemporaryDirectory(prefix="hanse-jobs-") as name:
        running.start("server", *running.names)
        job = with_settings(JOBS / "noop", Path(name), rounds=ROUNDS)
        series = run(_sampled(_rounds_done(running, job), running, every=max(ROUNDS // SAMPLES, 1)))
    yield from _figures("endurance_rounds", series, each="round")


def endurance_jobs() -> Iterator[Figure]:
    """500 jobs of a few rounds, one after the other."""
    with deployment() as running, tempfile.TemporaryDirectory(prefix="hanse-jobs-") as name:
        running.start("server", *running.names)
        job = with_settings(JOBS / "noop", Path(name), rounds=3)
        series = run(_sampled(_jobs_done(running, job), running, every=max(JOBS_IN_SEQUENCE // SAMPLES, 1)))
    yield from _figures("endurance_jobs", series, each="job")


async def _rounds_done(running: Deployment, job: Path) -> AsyncIterator[int]:
    """Yield the number of each round of *job* when it is done."""
    async with admin_session(running) as session:
        job_id = (await session.submit(job)).job_id
        async with aclosing(session.watch(job_id)) as events:
            async for happened in events:
                if happened.kind == EventType.ROUND_DONE and happened.round:
                    yield happened.round
        ended = await session.wait(job_id)
        if ended.state != "completed":
            raise RuntimeError(f"job {job_id} {ended.state}: {ended.reason}")


async def _jobs_done(running: Deployment, job: Path) -> AsyncIterator[int]:
    """Run *job* again and again; yield how often it was run."""
    async with admin_session(running) as session:
        for number in range(1, JOBS_IN_SEQUENCE + 1):
            ended = await session.wait((await session.submit(job)).job_id)
            if ended.state != "completed":
                raise RuntimeError(f"job {ended.job_id} {ended.state}: {ended.reason}")
            yield number


@dataclass(slots=True)
class Series:
    """Something measured again and again: at which round or job, and how much it was."""

    unit: str
    at: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def slope(self) -> float:
        """Return by how much the value grew with each step in the second half: the least-squares line's."""
        start = len(self.at) // 2
        return statistics.linear_regression(self.at[start:], self.values[start:]).slope


async def _sampled(done: AsyncIterator[int], running: Deployment, *, every: int) -> dict[str, Series]:
    """Return what was measured when each *every*-th step was *done*."""
    series: dict[str, Series] = {}
    async for number in done:
        if number % every == 0:
            for name, (value, unit) in (await asyncio.to_thread(_sample, running)).items():
                each = series.setdefault(name, Series(unit))
                each.at.append(number)
                each.values.append(value)
    return series


def _sample(running: Deployment) -> dict[str, tuple[float, str]]:
    sample: dict[str, tuple[float, str]] = {}
    for name in ("server", *running.names):
        agent = running.process(name)
        for process, called in ((agent, name), *((child, f"{name}_job") for child in agent.children())):
            try:
                sample[f"{called}_anonymous"] = anonymous_mb(process.pid) * 1024, "KB"
                sample[f"{called}_rss"] = process.memory_info().rss / 1024, "KB"
                sample[f"{called}_descriptors"] = process.num_fds(), "descriptors"
                sample[f"{called}_threads"] = process.num_threads(), "threads"
            except psutil.NoSuchProcess:  # a job's, that ends with it
                continue
        size, files = _disk_use(running.workspace(name))
        sample[f"{name}_disk"] = size / 1024, "KB"
        sample[f"{name}_files"] = files, "files"
    return sample


def _disk_use(folder: Path) -> tuple[int, int]:
    """Return the bytes that are allocated to what is below *folder*, and how many files that is."""
    size = files = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                size += (Path(parent) / name).lstat().st_blocks * 512
            except FileNotFoundError:  # deleted meanwhile
                continue
            files += 1
    return size, files


def _figures(name: str, series: dict[str, Series], *, each: str) -> Iterator[Figure]:
    for what, measured in series.items():
        if len(measured.at) < SAMPLES // 2:
            continue  # a process that was there by chance
        yield figure(
            f"{name}_{what}",
            1000 * measured.slope(),
            f"{measured.unit} / 1000 {each}s",
            "flat",
            first=round(measured.values[0], 1),
            middle=round(measured.values[len(measured.values) // 2], 1),
            last=round(measured.values[-1], 1),
            highest=round(max(measured.values), 1),
            steps=measured.at[-1],
        )
