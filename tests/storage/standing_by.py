"""A process that stands by for an SQLite file's lease, and prints a line for each look at it and each move."""

import asyncio
import sys
from pathlib import Path

from hanse.storage.records import Lease
from hanse.storage.store import SqlStore


class Looking(SqlStore):
    """A store that says when the lease has been looked at."""

    async def lease(self) -> Lease:
        lease = await super().lease()
        print("look", flush=True)  # noqa: T201 - this is how the test hears of it
        return lease


async def main(path: Path) -> None:
    async with Looking(path) as store:
        seen = await SqlStore.lease(store)
        while True:
            seen = await store.lease_moved(seen, within_s=3600.0)
            print(seen.epoch, seen.beat, seen.holder or "nobody", seen.successor, flush=True)  # noqa: T201


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
