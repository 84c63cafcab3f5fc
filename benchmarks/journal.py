"""What journalling costs: the same jobs with the store in SQLite and in memory, everything else alike.

Both servers run at once, and the jobs go to each by turns, so that whatever else the machine does meets both. What is
compared is the median of all rounds of each. Where the rounds differ more among each other than journalling could cost,
that says little: what the turns say one by one tells how much. So a third server adds up how long the writes themselves
took. A run waits for less than that, because it goes on while most of them are under way.

A disk that takes 600 MB a round makes rounds differ by tens of percent, which is no matter of the store's. So where
large tensors are compared they lie in memory, and only the store is on the disk; the rounds are shorter for it, and
what journalling costs is more of them. What the writes take is measured with everything on the disk.
"""

import itertools
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.deployment import Deployment, deployment
from benchmarks.figures import JOBS, Figure, figure, round_seconds, with_settings
from benchmarks.timed_server import FILE

MEMORY = Path("/dev/shm")  # a folder in memory, where the system has one
KINDS = (("noop", 12, 250, "< 5", None), ("bulk", 12, 16, "< 2", MEMORY if MEMORY.is_dir() else None))
"""Jobs, with their turns, the rounds of each, what journalling may cost, and where all but the store lies."""


def journal() -> Iterator[Figure]:
    """What journalling costs, in percent of a round."""
    with tempfile.TemporaryDirectory(prefix="hanse-jobs-") as name:
        for job, turns, rounds, target, place in KINDS:
            folder = with_settings(JOBS / job, Path(name), rounds=rounds)
            with _both(place) as (durable, forgetful):
                yield _compared(durable, forgetful, folder, name=f"journal_{job}_percent", turns=turns, target=target)
            yield _timed(folder, name=f"journal_{job}_writes_percent")


@contextmanager
def _both(place: Path | None) -> Iterator[tuple[Deployment, Deployment]]:
    """Give a deployment with its store in a file and one with its store in memory, with all else of both in *place*."""
    with tempfile.TemporaryDirectory(prefix="hanse-store-") as on_disk:
        settings = f'settings = {{ store = "sqlite:///{on_disk}/store.db" }}'
        with deployment(place, settings=settings) as durable, deployment(place) as forgetful:
            forgetful.programs["server"] = [sys.executable, "-m", "benchmarks.memory_server"]
            for running in (durable, forgetful):
                running.start("server", *running.names)
            yield durable, forgetful


def _compared(
    durable: Deployment, forgetful: Deployment, folder: Path, *, name: str, turns: int, target: str
) -> Figure:
    sqlite: list[list[float]] = []
    memory: list[list[float]] = []
    order = [(durable, sqlite), (forgetful, memory)]
    for _ in range(turns):
        for running, seconds in order:
            seconds.append(round_seconds(running.run(folder)))
        order.reverse()
    with_it, without = (statistics.median(itertools.chain(*seconds)) for seconds in (sqlite, memory))
    return figure(
        name,
        _cost(with_it, without),
        "% of a round",
        target,
        each_turn=sorted(round(_cost(*map(statistics.median, turn)), 1) for turn in zip(sqlite, memory, strict=True)),
        sqlite_ms=round(1000 * with_it, 3),
        memory_ms=round(1000 * without, 3),
        rounds=sum(map(len, sqlite)),
    )


def _cost(with_it: float, without: float) -> float:
    return 100 * (with_it / without - 1)


def _timed(folder: Path, *, name: str) -> Figure:
    with deployment() as running:
        written = running.root / "seconds"
        running.programs["server"] = [sys.executable, "-m", "benchmarks.timed_server"]
        running.environments["server"] = {FILE: str(written)}
        running.start("server", *running.names)
        history = running.run(folder)["history"]
        running.end("server")
        writes: dict[str, float] = json.loads(written.read_text())
    took_s = history[-1]["committed_at"] - history[0]["committed_at"]
    each_ms = {write: round(1000 * seconds / len(history), 3) for write, seconds in writes.items()}
    return figure(name, 100 * sum(writes.values()) / took_s, "% of a round", "", ms_a_round=each_ms)
