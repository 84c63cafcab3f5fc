"""What of a run outlives its server's machine: objects in a bucket that all servers of a project share.

``<job>/package/<digest>`` and ``<job>/result/<digest>`` are the run's for good. Its tensors are a tenure's, as in
``run_folder``: ``<job>/tensors-<epoch>/<digest>-<number>``. The number makes it a key that is written once and deleted
once. So a deletion that the bucket carries out late, when nobody waits for it any more, takes nothing that is needed by
then. A tenure begins by copying what the journal names from earlier ones, and then deletes those.

What is kept is on its way until it is there, whoever still waits for it: a large model takes longer than a peer waits
for an answer, and is asked about again.
"""

import asyncio
import itertools
import logging
import re
from collections.abc import Collection, Coroutine, Iterable, Iterator
from typing import Any, Final, NamedTuple

from hanse.errors import NotFound, ProtocolError, StoreFailed
from hanse.ids import Digest, JobId
from hanse.storage.objects import MAX_COPY_BYTES, Objects
from hanse.storage.tensors import TensorFiles

KEPT_WITHIN_S: Final = 20.0
"""How long who keeps something waits before it hears that it is still on its way; less than its own peer waits."""

_TENSOR: Final = re.compile(r"(?P<job>[^/]+)/tensors-(?P<epoch>\d+)/(?P<digest>[0-9a-f]{64})-(?P<number>\d+)")

_log = logging.getLogger(__name__)


class TensorObject(NamedTuple):
    """A tensor in the bucket; of those with one digest, the greatest is the newest."""

    epoch: int
    number: int
    key: str
    job_id: JobId
    digest: Digest
    size: int


class RunMirror:
    """The objects of the run *job_id* in *objects*, as the tenure *epoch* makes and sees them."""

    def __init__(self, objects: Objects, job_id: JobId, epoch: int) -> None:
        self._objects, self._job_id, self._epoch = objects, job_id, epoch
        self._kept: dict[Digest, str] = {}
        self._undeleted: list[str] = []
        self._sending: dict[str, asyncio.Task[None]] = {}
        self._numbers = itertools.count(1)

    # tensors

    async def keep(self, files: TensorFiles, digests: Collection[Digest]) -> None:
        """Return when the tensors *digests* of *files* are in the bucket.

        Raises:
            StoreFailed: they are not, or not yet.
        """
        new = [digest for digest in dict.fromkeys(digests) if digest not in self._kept]
        await self._sent([self._send(digest, self._put_tensor(files, digest)) for digest in new])

    def set_aside(self, keep: Collection[Digest]) -> list[str]:
        """Give up all tensors but *keep*, and return the objects that are now to be deleted."""
        doomed = [self._kept.pop(digest) for digest in self._kept.keys() - set(keep)] + self._undeleted
        self._undeleted = []
        return doomed

    async def delete(self, keys: Collection[str]) -> None:
        """Delete the objects that ``set_aside`` has returned; it returns them again if that cannot be done now."""
        try:
            await self._objects.delete(keys)
        except StoreFailed as failed:
            self._undeleted += keys
            _log.warning("objects left behind", extra={"job": self._job_id, "reason": failed.reason})

    async def delete_tensors(self) -> None:
        """Send no tensor any more, and delete those of this tenure and of all before it.

        Raises:
            StoreFailed: that cannot be done now.
        """
        await self.close()
        await self._delete_tensors(await self._objects.sizes(self._job_id), until=self._epoch)

    async def close(self) -> None:
        """Send nothing any more."""
        sending = list(self._sending.values())
        for task in sending:
            task.cancel()
        await asyncio.gather(*sending, return_exceptions=True)

    async def take_over(self, files: TensorFiles, needed: Collection[Digest]) -> None:
        """Have *needed*, of which *files* may hold some, there and in this tenure's objects; delete earlier tenures'.

        What is not to be had is in neither. This may be done again, as often as it fails.

        Raises:
            StoreFailed: the bucket does not do what it is asked; or it has nothing of the run, not even its package.
                Then it is not the one that the run's last server used, and must not be taken for a loss.
        """
        listed = await self._objects.sizes(self._job_id)
        sources = _by_digest(listed)
        missing = await asyncio.to_thread(files.missing, needed)
        if missing and not listed:
            why = "nothing of the job is there, so another server used another one; check the setting 'runs' of both"
            raise StoreFailed(f"looking for job {self._job_id} in {self._objects.url}", why)
        await _all(self._fetch_tensor(files, digest, sources.get(digest, [])) for digest in missing)
        gone = await asyncio.to_thread(files.missing, needed)
        here = dict.fromkeys(needed).keys() - set(gone) - self._kept.keys()
        await _all(self._bring(files, digest, sources.get(digest, [])) for digest in here)
        await self._delete_tensors(listed, until=self._epoch - 1)

    async def restore(self, files: TensorFiles, lost: Collection[Digest]) -> list[Digest]:
        """Fetch again what *files* has *lost* of this tenure's tensors; return what is not to be had, and give that up.

        Raises:
            StoreFailed: the bucket does not do what it is asked.
        """
        sources = _by_digest(await self._objects.sizes(self._key(f"tensors-{self._epoch}")))
        await _all(self._fetch_tensor(files, digest, sources.get(digest, [])) for digest in lost)
        gone = await asyncio.to_thread(files.missing, lost)
        self._undeleted += [self._kept.pop(digest) for digest in gone if digest in self._kept]
        return gone

    # package and result

    async def keep_package(self, files: TensorFiles, digest: Digest) -> None:
        """Return when the package *digest* of *files* is in the bucket.

        Raises:
            StoreFailed: it is not, or not yet.
        """
        await self._keep_file("package", files, digest)

    async def have_package(self, files: TensorFiles, digest: Digest, size: int) -> None:
        """Return when the package *digest* of *size* bytes is both in *files* and in the bucket, one of which had it.

        Raises:
            NotFound: neither had it.
            ProtocolError: what the bucket has under its name is something else.
            StoreFailed: the bucket does not do what it is asked.
        """
        if not await asyncio.to_thread(files.verify, digest):  # what was fetched before may not have been synced
            await self._fetch(self._key("package", digest), files, digest, size)
        elif (await self._objects.sizes(self._key("package"))).get(self._key("package", digest)) != size:
            await self.keep_package(files, digest)

    async def delete_package(self, digest: Digest) -> None:
        """Delete the package of a job that there is not to be.

        Raises:
            StoreFailed: that cannot be done now.
        """
        await self._objects.delete([self._key("package", digest)])

    async def delete_packages(self) -> None:
        """Delete whatever has been kept as the package of a job that there is not to be.

        Raises:
            StoreFailed: that cannot be done now.
        """
        await self._objects.delete(list(await self._objects.sizes(self._key("package"))))

    async def keep_result(self, files: TensorFiles, digest: Digest) -> None:
        """Return when the result *digest* of *files* is in the bucket.

        Raises:
            StoreFailed: it is not, or not yet.
        """
        await self._keep_file("result", files, digest)

    async def have_result(self, files: TensorFiles, digest: Digest, size: int) -> None:
        """Return when the result *digest* of *size* bytes is in *files*.

        Raises:
            NotFound: the bucket has it not either.
            ProtocolError: what the bucket has under its name is something else.
            StoreFailed: the bucket does not do what it is asked.
        """
        if not await asyncio.to_thread(files.verify, digest):  # what was fetched before may not have been synced
            await self._fetch(self._key("result", digest), files, digest, size)

    # parts

    def _key(self, *parts: str) -> str:
        return "/".join((self._job_id, *parts))

    def _new_key(self, digest: Digest) -> str:
        return self._key(f"tensors-{self._epoch}", f"{digest}-{next(self._numbers)}")

    def _send(self, what: str, sending: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Return the task that sends *what*: the one that is at it, or else one for *sending*."""
        if (task := self._sending.get(what)) is not None:
            sending.close()
            return task
        self._sending[what] = task = asyncio.create_task(sending, name=f"send {what} of {self._job_id}")
        task.add_done_callback(lambda done: self._has_sent(what, done))
        return task

    def _has_sent(self, what: str, task: asyncio.Task[None]) -> None:
        del self._sending[what]
        if not task.cancelled() and (error := task.exception()) is not None:  # who waited for it may have left
            _log.warning("not sent", extra={"job": self._job_id, "what": what, "reason": str(error)})

    async def _sent(self, sending: Collection[asyncio.Task[None]]) -> None:
        if not sending:
            return
        doing = f"keeping job {self._job_id} in {self._objects.url}"
        done, coming = await asyncio.wait(sending, timeout=KEPT_WITHIN_S, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            if task.cancelled():
                raise StoreFailed(doing, "this server has left the job")
            task.result()
        if coming:
            why = f"after {KEPT_WITHIN_S:g} s {len(coming)} of {len(sending)} files are still on their way"
            raise StoreFailed(doing, why)

    async def _put_tensor(self, files: TensorFiles, digest: Digest) -> None:
        key = self._new_key(digest)
        await self._objects.put(key, files.path(digest))
        self._kept[digest] = key

    async def _keep_file(self, kind: str, files: TensorFiles, digest: Digest) -> None:
        key = self._key(kind, digest)
        await self._sent([self._send(key, self._objects.put(key, files.path(digest)))])

    async def _fetch(self, key: str, files: TensorFiles, digest: Digest, size: int) -> None:
        with await asyncio.to_thread(files.begin, digest, size) as partial:
            await self._objects.fetch(key, partial)

    async def _fetch_tensor(self, files: TensorFiles, digest: Digest, sources: list[TensorObject]) -> None:
        """Fetch a tensor from the first of *sources* that has it; those before that have not are taken out."""
        while sources:
            try:
                await self._fetch(sources[0].key, files, digest, sources[0].size)
            except (NotFound, ProtocolError) as wrong:
                _log.warning("an object is not what it was", extra={"job": self._job_id, "reason": wrong.reason})
                del sources[0]
            else:
                return

    async def _bring(self, files: TensorFiles, digest: Digest, sources: Iterable[TensorObject]) -> None:
        """Have a tensor of *files* among this tenure's objects: copied there from one of *sources*, or put anew."""
        size = await asyncio.to_thread(files.size, digest)
        for source in sources:
            if source.size == size <= MAX_COPY_BYTES:
                key = self._new_key(digest)
                try:
                    await self._objects.copy(source.key, key)
                except NotFound:
                    continue
                self._kept[digest] = key
                return
        await self._put_tensor(files, digest)

    async def _delete_tensors(self, listed: dict[str, int], *, until: int) -> None:
        await self._objects.delete([tensor.key for tensor in tensors_in(listed) if tensor.epoch <= until])


def tensors_in(listed: dict[str, int]) -> Iterator[TensorObject]:
    """Yield the tensors among the objects that are *listed*, each with its bytes."""
    for key, size in listed.items():
        if (match := _TENSOR.fullmatch(key)) is not None:
            job_id, digest = JobId(match["job"]), Digest(match["digest"])
            yield TensorObject(int(match["epoch"]), int(match["number"]), key, job_id, digest, size)


def _by_digest(listed: dict[str, int]) -> dict[Digest, list[TensorObject]]:
    """Return the tensors among the objects that are *listed*, of each digest the newest first."""
    found: dict[Digest, list[TensorObject]] = {}
    for tensor in sorted(tensors_in(listed), reverse=True):
        found.setdefault(tensor.digest, []).append(tensor)
    return found


async def _all(work: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Do all *work* at once, and raise the first of what it raises when it is all done."""
    for outcome in await asyncio.gather(*work, return_exceptions=True):
        if isinstance(outcome, BaseException):
            raise outcome
