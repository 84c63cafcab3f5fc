"""Where runs keep their things on the server: each in ``runs/<job>`` of the folder that all servers of a project share.

Package, code, result and log are the run's for good. Its tensors are a tenure's: each has a folder of its own, named
after its epoch, and begins by bringing over what the journal names. So a server whose tenure has ended, and that does
not know it yet, deletes nothing that its successor relies on, and what it still writes is in nobody's way.

Servers may share a bucket instead. Then each has such folders for itself, and a ``RunMirror`` keeps in the bucket what
another server needs to go on; what is missing here is fetched from there.
"""

import asyncio
import secrets
import shutil
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hanse.ids import Digest, JobId
from hanse.job import JobRecord
from hanse.server.run_mirror import RunMirror
from hanse.storage.disk import delete_tree, on_disk, sync_tree
from hanse.storage.objects import Objects
from hanse.storage.packages import unpack_package
from hanse.storage.tensors import TensorFiles

_TENSORS: Final = "tensors-"
_FIRST_TENSORS: Final = "tensors"
"""Where release 0.1.0 kept a run's tensors, in all of its tenures."""
_UNSYNCED: Final = "unsynced"
_UNTOLD: Final = "untold"
"""In the folder of a job that is being submitted: names the store that has still to be told of it."""
_INCOMING: Final = ".incoming-"
"""What the folder of a job is called that is being submitted; the epoch follows, so that leftovers can be told."""


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The folder of one run, as the tenure *epoch* sees it.

    *mirror* keeps what others need of it in a bucket; ``None`` where the folder itself is all that they need.
    """

    path: Path
    epoch: int = 0
    mirror: RunMirror | None = None

    @property
    def package(self) -> Path:
        """The job's package, under its digest."""
        return self.path / "package"

    @property
    def code(self) -> Path:
        """The job's code, unpacked."""
        return self.path / "code"

    @property
    def tensors(self) -> Path:
        """The run's tensor files in this tenure."""
        return self.path / f"{_TENSORS}{self.epoch}"

    @property
    def result(self) -> Path:
        """The final model, under its digest."""
        return self.path / "result"

    @property
    def log(self) -> Path:
        """What the run's process says."""
        return self.path / "server.log"

    async def take_over(self, needed: Collection[Digest]) -> list[Digest]:
        """Bring the tensors *needed* over from earlier tenures, delete the rest; return those that are not to be had.

        Each tensor's bytes are checked: a disk that lost power, or lies, must not change a model unnoticed. This may be
        done again, as often as it fails.

        Raises:
            StoreFailed: the disk, or the bucket, does not do what it is asked.
        """
        files = await asyncio.to_thread(TensorFiles, self.tensors)
        missing = await asyncio.to_thread(self._take_over_files, files, needed)
        if self.mirror is not None:
            await self.mirror.take_over(files, needed)
            missing = await asyncio.to_thread(files.missing, missing)
        return missing

    async def have_package(self, record: JobRecord) -> None:
        """Return when the job's package and code are here, which another server may have received.

        Raises:
            NotFound, ProtocolError: they cannot be had.
            StoreFailed: not now.
        """
        if self.mirror is None:
            return
        files = await asyncio.to_thread(TensorFiles, self.package)
        await self.mirror.have_package(files, record.package, record.package_bytes)
        await asyncio.to_thread(self._have_code, files.path(record.package))

    async def have_result(self, record: JobRecord) -> None:
        """Return when the job's result is here, which another server may have seen the run reach.

        Raises:
            NotFound, ProtocolError: it cannot be had.
            StoreFailed: not now.
        """
        if self.mirror is not None and record.result:
            files = await asyncio.to_thread(TensorFiles, self.result)
            await self.mirror.have_result(files, Digest(record.result), record.result_bytes)

    async def keep_package(self, digest: Digest) -> None:
        """Return when package and code, which are here, are kept: on the disk, and where another server finds them.

        Raises:
            StoreFailed: they are not.
        """
        await asyncio.to_thread(sync_tree, self.path)
        if self.mirror is not None:
            await self.mirror.keep_package(TensorFiles(self.package), digest)

    async def keep_result(self, digest: Digest) -> None:
        """Return when the result, which is here, is kept where another server finds it.

        Raises:
            StoreFailed: it is not, or not yet.
        """
        if self.mirror is not None:
            await self.mirror.keep_result(TensorFiles(self.result), digest)

    async def keep_tensors(self, files: TensorFiles, digests: Collection[Digest]) -> None:
        """Return when the tensors *digests* of *files* are kept: on the disk, and where another server finds them.

        Raises:
            StoreFailed: they are not, or not yet.
        """
        await asyncio.to_thread(files.sync, digests)
        if self.mirror is not None:
            await self.mirror.keep(files, digests)

    async def restore_tensors(self, files: TensorFiles, lost: Collection[Digest]) -> list[Digest]:
        """Have again what *files* has *lost* of the run's tensors, as far as it is kept elsewhere; return what is not.

        Raises:
            StoreFailed: where it is kept cannot be asked now.
        """
        return list(lost) if self.mirror is None else await self.mirror.restore(files, lost)

    async def delete_tensors(self) -> None:
        """Delete the tensors of this tenure and of all before it.

        Raises:
            StoreFailed: some are left.
        """
        await asyncio.to_thread(self._delete_files)
        if self.mirror is not None:
            await self.mirror.delete_tensors()

    async def discard(self, record: JobRecord) -> None:
        """Delete all that there is of a job that there is not to be.

        Raises:
            StoreFailed: something is left.
        """
        await asyncio.to_thread(_delete, self.path)
        if self.mirror is not None:
            await self.mirror.delete_package(record.package)

    def note_untold(self, store_id: str) -> None:
        """Note down that the store *store_id* has still to be told of the job: nothing else says whose it is.

        Raises:
            StoreFailed: the disk does not take it.
        """
        with on_disk(f"writing to {self.path}", self.path):
            (self.path / _UNTOLD).write_text(store_id)

    def untold_to(self) -> str:
        """Return which store has perhaps not been told of the job; ``""`` when it has.

        Raises:
            StoreFailed: the disk does not tell.
        """
        with on_disk(f"looking into {self.path}", self.path), suppress(FileNotFoundError):
            return (self.path / _UNTOLD).read_bytes().decode(errors="replace")
        return ""

    def forget_untold(self) -> None:
        """Take note that the store has the job; where the disk does not take that, the next tenure asks the store."""
        with suppress(OSError):
            (self.path / _UNTOLD).unlink(missing_ok=True)

    def has_earlier_tensors(self) -> bool:
        """Return whether there are tensor files of earlier tenures.

        Raises:
            StoreFailed: the disk does not tell.
        """
        return bool(self._earlier())

    def delete_earlier_tensors(self) -> None:
        """Delete the tensor files of earlier tenures, whatever of them can be deleted.

        Raises:
            StoreFailed: the disk does not tell what there is.
        """
        for folder in self._earlier():
            shutil.rmtree(folder, ignore_errors=True)

    def _have_code(self, package: Path) -> None:
        """Have the code here: it is on the disk when it gets its name, for that is all that is looked at later."""
        with on_disk(f"unpacking a job into {self.code}", self.path):
            if self.code.is_dir():
                return
            unsynced = self.path / _UNSYNCED
            shutil.rmtree(unsynced, ignore_errors=True)  # with what a server that was killed has begun to unpack
            unpack_package(package, unsynced / "code")
            sync_tree(self.path)
            (unsynced / "code").rename(self.code)
            unsynced.rmdir()
            sync_tree(self.path)

    def _take_over_files(self, files: TensorFiles, needed: Collection[Digest]) -> list[Digest]:
        earlier = [*reversed(self._earlier())]
        missing = [digest for digest in dict.fromkeys(needed) if not _take_over_file(files, digest, earlier)]
        files.sync(set(needed) - set(missing))
        self.delete_earlier_tensors()
        return missing

    def _delete_files(self) -> None:
        for folder in [*self._earlier(), self.tensors]:
            _delete(folder)

    def _earlier(self) -> list[Path]:
        found = []
        with on_disk(f"looking into {self.path}", self.path):
            for folder in self.path.glob(f"{_TENSORS}*"):
                number = folder.name.removeprefix(_TENSORS)
                if number.isdigit() and int(number) < self.epoch:
                    found.append((int(number), folder))
            first = self.path / _FIRST_TENSORS
            return [*([first] if first.is_dir() else []), *(folder for _, folder in sorted(found))]


def _take_over_file(files: TensorFiles, digest: Digest, earlier: Sequence[Path]) -> bool:
    """Have a tensor in *files*, from the first of the *earlier* folders in which it is whole; return whether it is.

    A tenure that ended with its machine's power may have left a damaged copy of what the one before it has still.
    """
    if files.verify(digest):
        return True
    return any(files.take_in(folder / digest) and files.verify(digest) for folder in earlier)


@dataclass(frozen=True, slots=True)
class RunFolders:
    """The folders of all runs, as the tenure *epoch* sees them.

    Servers share the folder *path*; or they share *objects*, with which each can go on with what another has begun.
    """

    path: Path
    epoch: int
    objects: Objects | None = None

    def of(self, job_id: JobId) -> RunFolder:
        """Return where the job's run keeps its things."""
        mirror = RunMirror(self.objects, job_id, self.epoch) if self.objects is not None else None
        return RunFolder(self.path / job_id, self.epoch, mirror)

    def job_ids(self) -> list[JobId]:
        """Return the jobs that have a folder here.

        Raises:
            StoreFailed: the disk does not tell.
        """
        with on_disk(f"looking into {self.path}", self.path):
            return [JobId(path.name) for path in self.path.glob("*/") if not path.name.startswith(_INCOMING)]

    def new_incoming(self) -> RunFolder:
        """Return where a job that is being submitted keeps its things, until it has a name."""
        return RunFolder(self.path / f"{_INCOMING}{self.epoch}-{secrets.token_hex(8)}")

    def delete_earlier_incoming(self) -> None:
        """Delete what was being submitted in earlier tenures, whatever of it can be deleted.

        Raises:
            StoreFailed: the disk does not tell what there is.
        """
        with on_disk(f"looking into {self.path}", self.path):
            incoming = [*self.path.glob(f"{_INCOMING}*")]
        for path in incoming:
            number = path.name.removeprefix(_INCOMING).partition("-")[0]
            if number.isdigit() and int(number) < self.epoch:
                shutil.rmtree(path, ignore_errors=True)


def _delete(folder: Path) -> None:
    with on_disk(f"deleting {folder}", folder):
        delete_tree(folder)
