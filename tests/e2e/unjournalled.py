"""``hanse``, but whose server does not come to journal the tasks of round 3: they are out, and it is killed before."""

import asyncio
import sys
from collections.abc import Sequence

from hanse.cli import main
from hanse.ids import JobId
from hanse.messages import TaskAssignment
from hanse.storage.store import SqlStore

ROUND = 3
_issue_tasks = SqlStore.issue_tasks


async def _issue_but_those(self: SqlStore, epoch: int, job_id: JobId, tasks: Sequence[TaskAssignment]) -> None:
    if any(task.key.round == ROUND for task in tasks):
        await asyncio.Event().wait()
    await _issue_tasks(self, epoch, job_id, tasks)


if __name__ == "__main__":
    SqlStore.issue_tasks = _issue_but_those  # type: ignore[method-assign]
    sys.exit(main())
