"""What a benchmark gives: figures, and what several benchmarks make them from."""

import itertools
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

JOBS = Path(__file__).resolve().parent / "jobs"
Figure = dict[str, object]


def figure(name: str, value: float, unit: str, target: str, **more: object) -> Figure:
    """Return one line of output."""
    return {"name": name, "value": round(value, 3), "unit": unit, "target": target, **more}


def with_settings(job: Path, into: Path, **settings: int) -> Path:
    """Return a copy of the folder *job* below *into* in whose ``pyproject.toml`` each of *settings* has that value.

    One that is not there comes first in ``[tool.hanse]``.
    """
    copy = Path(shutil.copytree(job, into / "-".join([job.name, *(f"{name}-{n}" for name, n in settings.items())])))
    definition = copy / "pyproject.toml"
    text = definition.read_text()
    for name, value in settings.items():
        text, found = re.subn(rf"^{name} = .*$", f"{name} = {value}", text, flags=re.MULTILINE)
        if not found:
            text = text.replace("[tool.hanse]\n", f"[tool.hanse]\n{name} = {value}\n")
    definition.write_text(text)
    return copy


def round_seconds(job: dict[str, Any]) -> list[float]:
    """Return how long each round of *job* took but the first, in which processes start."""
    commits: Sequence[float] = [each["committed_at"] for each in job["history"]]
    return [after - before for before, after in itertools.pairwise(commits[1:])]
