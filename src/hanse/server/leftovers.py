"""What jobs leave behind, and how it is deleted: files, objects in a bucket, and jobs that a client still holds."""

import asyncio
import logging
import shutil
from collections.abc import Collection, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from hanse.cell.cell import Cell
from hanse.errors import HanseError, NotFound, StoreFailed
from hanse.ids import ClientName, Fqcn, JobId
from hanse.job import ENDED
from hanse.messages import AbortJob, Channel
from hanse.server.lifetime import start_in
from hanse.server.run_folder import RunFolder, RunFolders
from hanse.server.run_mirror import tensors_in
from hanse.storage.objects import Objects
from hanse.storage.records import Store

MAX_DOUBTFUL: Final = 20
"""The most jobs that are looked up for one heartbeat; they go as they are found to have ended, so others follow."""
DELETED_WITHIN_S: Final = 30.0
"""How long the end of a run waits for its tensors to be deleted, by a disk or a bucket."""
CLEARED_WITHIN_S: Final = 3.0
"""How long a server that begins to serve waits for what it deletes first: most is deleted at once."""
CLEARED_AGAIN_S: Final = 60.0
"""What could not be deleted from the bucket is tried again after this long."""

_log = logging.getLogger(__name__)


class Leftovers:
    """Deletes what jobs leave behind, in this tenure and in those before it; where that fails, nothing else does.

    - A run that has ended leaves its tensors. ``delete_tensors`` deletes them there and then. What a disk or a bucket
      does not delete in time is left, and all of it where the server is killed at that moment. The next tenure's
      ``clear_folders`` deletes that from the folders; ``clear_bucket``, in every tenure, from the bucket.
    - A server that is killed while it receives a job leaves files. The next tenure's ``clear_folders`` deletes them,
      whether they have become a job's or not, and what the bucket has of the job's package, if the store was to be told
      of the job and was not. Other jobs that the store does not know are left alone, for they may be another store's:
      one that this server used before, or whose name was mistaken once. So are other packages in the bucket, which may
      be another project's.
    - A client still holds a job that has ended. ``abort_at`` tells it so; a client that did not hear of it says at its
      heartbeats that it holds the job, and ``end_at`` tells it again.
    """

    def __init__(self, store: Store, store_id: str, cell: Cell, folders: RunFolders) -> None:
        self._store, self._store_id = store, store_id
        self._cell = cell
        self._folders = folders
        self._left_in_bucket = asyncio.Event()

    # files

    async def clear_folders(self, running: Collection[JobId], *, group: asyncio.TaskGroup) -> None:
        """Delete what earlier tenures have left in the folders, but for jobs that are *running* and go on in this one.

        What takes longer than ``CLEARED_WITHIN_S`` goes on in a task of *group*, and holds nobody up. What cannot be
        told to be left, or deleted, because the store or a disk does not answer, is for the next tenure.
        """
        try:
            # Listed now, for what is submitted from now on is no leftover.
            job_ids = await asyncio.to_thread(self._folders.job_ids)
        except StoreFailed as failed:
            _tell_of_files(self._folders.path, failed)
            return
        clearing = group.create_task(self._clear(job_ids, running), name="clear the folders")
        await asyncio.wait({clearing}, timeout=CLEARED_WITHIN_S)

    def _left_in_folders(self, job_ids: Collection[JobId], running: Collection[JobId]) -> list[JobId]:
        """Return those of *job_ids* with something left, having deleted submissions that broke off before."""
        try:
            self._folders.delete_earlier_incoming()
        except StoreFailed as failed:
            _tell_of_files(self._folders.path, failed)
        return [job_id for job_id in sorted(job_ids) if self._has_leftovers(job_id, running)]

    def _has_leftovers(self, job_id: JobId, running: Collection[JobId]) -> bool:
        folder = self._folders.of(job_id)
        try:
            is_untold = folder.untold_to() == self._store_id
            return is_untold or (job_id not in running and folder.has_earlier_tensors())
        except StoreFailed as failed:
            _tell_of_files(folder.path, failed)
            return False

    async def _clear(self, job_ids: Collection[JobId], running: Collection[JobId]) -> None:
        for job_id in await asyncio.to_thread(self._left_in_folders, job_ids, running):
            try:
                await self._store.job(job_id)
            except NotFound:
                await self._clear_unknown(self._folders.of(job_id))
            except StoreFailed as failed:
                _log.warning("what is left of jobs stays", extra={"reason": failed.reason})
                return
            else:
                await asyncio.to_thread(self._clear_known, self._folders.of(job_id), running)

    async def _clear_unknown(self, folder: RunFolder) -> None:
        """Delete all of a job that this store was to be told of, and was not; others may be another store's."""
        try:
            if await asyncio.to_thread(folder.untold_to) != self._store_id:
                return
            if folder.mirror is not None:  # before the folder, which says whose job it was to be
                await folder.mirror.delete_packages()
        except StoreFailed as failed:
            _tell_of_files(folder.path, failed)
            return
        await asyncio.to_thread(shutil.rmtree, folder.path, ignore_errors=True)

    def _clear_known(self, folder: RunFolder, running: Collection[JobId]) -> None:
        """Delete the tensors of a job that the store has, unless it is running."""
        folder.forget_untold()
        try:
            if folder.path.name not in running:
                folder.delete_earlier_tensors()
        except StoreFailed as failed:
            _tell_of_files(folder.path, failed)

    async def delete_tensors(self, folder: RunFolder) -> None:
        """Delete the tensors of a run that has ended; what cannot be deleted now does not keep it from that."""
        try:
            async with asyncio.timeout(DELETED_WITHIN_S):
                await folder.delete_tensors()
        except (StoreFailed, TimeoutError) as failed:
            _log.warning("tensors left behind", extra={"folder": str(folder.path), "reason": str(failed)})
            self._left_in_bucket.set()

    # the bucket

    async def clear_bucket(self, objects: Objects) -> None:
        """Delete the tensors that runs have left in the bucket, in this tenure or in earlier ones, until cancelled."""
        while True:
            self._left_in_bucket.clear()
            again_in_s = None
            try:
                await self._delete_left(objects)
            except StoreFailed as failed:
                _log.warning("objects left behind", extra={"reason": failed.reason})
                again_in_s = CLEARED_AGAIN_S  # a bucket tells nobody when it is well again
            with suppress(TimeoutError):
                async with asyncio.timeout(again_in_s):
                    await self._left_in_bucket.wait()

    async def _delete_left(self, objects: Objects) -> None:
        """Delete what runs that have ended have left. A job that the store does not know may be another project's."""
        left: dict[JobId, list[str]] = {}
        for tensor in tensors_in(await objects.sizes()):
            if tensor.epoch <= self._folders.epoch:
                left.setdefault(tensor.job_id, []).append(tensor.key)
        for job_id, keys in left.items():
            with suppress(NotFound):
                if (await self._store.job(job_id)).state in ENDED:
                    await objects.delete(keys)

    # clients

    def end_at(self, client: ClientName, idle: Collection[JobId], *, group: asyncio.TaskGroup) -> None:
        """Have *client* abort those of the jobs *idle* there that have ended, by a task of *group*.

        Where they are many, or the store cannot tell, the client's next heartbeat asks again.
        """
        if doubtful := list(idle)[:MAX_DOUBTFUL]:
            name = f"look up what {client} has left"
            start_in(group, self._end_left(client, doubtful), _if_it_can, name=name)

    async def _end_left(self, client: ClientName, doubtful: Collection[JobId]) -> None:
        for job_id in doubtful:
            with suppress(NotFound):
                if (await self._store.job(job_id)).state not in ENDED:
                    continue
            self.abort_at(client, job_id, "it has ended")

    def abort_at(self, client: ClientName, job_id: JobId, reason: str) -> None:
        """Have *client* abort a job that has ended, if it can be reached."""
        try:
            self._cell.tell(Fqcn(client), Channel.JOB, "abort", AbortJob(job_id, reason))
        except HanseError as error:
            _log.debug("not told", extra={"destination": client, "reason": error.reason})


def _tell_of_files(folder: Path, failed: StoreFailed) -> None:
    _log.warning("files left behind", extra={"folder": str(folder), "reason": failed.reason})


async def _if_it_can(work: Coroutine[Any, Any, None]) -> None:
    try:
        await work
    except HanseError as error:
        _log.info("not looked up", extra={"reason": error.reason})
