"""A process that commits rounds, and prints each one's number once it is told that it is durable; for being killed."""

import asyncio
import itertools
import sys
from pathlib import Path

from hanse.storage.store import SqlStore

from .samples import JOB, answer, commit, record, take, task


async def main(where: Path | str) -> None:
    async with SqlStore(where) as store:
        epoch = (await take(store, "server-1")).epoch
        await store.add_job(epoch, record())
        await store.commit_round(epoch, JOB, commit(0), now_s=0.0)
        for number in itertools.count(1):
            await store.issue_tasks(epoch, JOB, [task(round_number=number), task("site-2", round_number=number)])
            await store.accept_answer(epoch, JOB, answer(round_number=number))
            await store.commit_round(epoch, JOB, commit(number), now_s=float(number))
            print(number, flush=True)  # noqa: T201 - this is how the test hears of it


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if "://" in sys.argv[1] else Path(sys.argv[1])))
