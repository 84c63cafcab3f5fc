"""``hanse`` whose server adds up how long each way of journalling took, and writes the seconds to a file as it ends."""

import functools
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from hanse.cli import main
from hanse.storage.store import SqlStore

FILE = "HANSE_BENCH_STORE_SECONDS"
"""The variable that names the file."""
JOURNALLING = ("issue_tasks", "accept_answer", "commit_round")

seconds = dict.fromkeys(JOURNALLING, 0.0)


def timed(name: str, write: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """Return *write*, whose duration is added up."""

    @functools.wraps(write)
    async def write_and_add(*arguments: Any, **options: Any) -> Any:
        began = time.perf_counter()
        try:
            return await write(*arguments, **options)
        finally:
            seconds[name] += time.perf_counter() - began

    return write_and_add


if __name__ == "__main__":
    for name in JOURNALLING:
        setattr(SqlStore, name, timed(name, getattr(SqlStore, name)))
    status = main()
    Path(os.environ[FILE]).write_text(json.dumps(seconds))
    sys.exit(status)
