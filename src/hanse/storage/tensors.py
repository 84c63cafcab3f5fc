"""Tensor files: immutable bytes in one folder, each file named by the BLAKE3 digest of what it holds.

A file with a digest for its name is complete and never changes; it appears by a rename. Beside such files lie those in
the making: ``<digest>.part``, an upload that can be resumed, and ``<random>.tmp``. Who makes one holds a lock on it
(``flock``, which ends with the process that holds it, however it ends), so that several processes can share a folder
and ``keep_only`` can tell work in progress from what a crash left behind. Bytes are hashed once, when they come in, and
never pass through Python objects of their own: they are written from the caller's buffer, or already lie in the file
(``Scratch``), and are used by mapping.

Everything here blocks; an event loop calls it through ``asyncio.to_thread``. There is no NumPy here: ``models`` turns
buffers into arrays.
"""

import errno
import fcntl
import mmap
import os
import resource
import secrets
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Self, TypeVar

from blake3 import blake3

from hanse.errors import NotFound, ProtocolError, StoreFailed, TensorDamaged
from hanse.ids import Digest, is_digest
from hanse.storage.disk import delete_tree, on_disk

T = TypeVar("T")

MAX_TENSOR_BYTES: Final = 2**48
_WRITE_BYTES: Final = 1024 * 1024  # into preallocated blocks, as fast as larger writes and kinder to the page cache
_READ_BYTES: Final = 4 * 1024 * 1024  # enough for several threads to hash
_NO_WAIT: Final[int | None] = getattr(os, "RWF_NOWAIT", None)
"""Reads what the system has in memory, and nothing else; not every system can, nor every file system."""
_PART: Final = ".part"
_TEMPORARY: Final = ".tmp"


def digest_of(buffer: bytes | memoryview) -> Digest:
    """Return the name of these bytes."""
    return Digest(_hasher(buffer).hexdigest())


class TensorMap(mmap.mmap):
    """The memory behind a mapped tensor: whose it is, and its digest once it has one.

    It ends with the last view of it; a scratch that never got a digest takes its file along.
    """

    files: "TensorFiles"
    path: Path
    digest: Digest | None
    forget: "weakref.finalize[[Path], TensorMap] | None" = None


class TensorFiles:
    """Content-addressed files under *root*, which is made, with mode 0700, if it is not there.

    Any number of threads and processes may use the same folder, also to make the same tensor at once. Every method that
    takes a digest raises ``ProtocolError`` for text that is not one, and ``StoreFailed`` for what the disk refuses.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._synced: dict[Digest, tuple[int, int]] = {}
        self._unsynced: dict[Digest, tuple[int, int]] = {}
        self._is_named = False
        with on_disk("making the folder for tensors", root):
            root.mkdir(mode=0o700, parents=True, exist_ok=True)

    def path(self, digest: Digest) -> Path:
        """Return where the tensor *digest* is, or would be."""
        if not is_digest(digest):
            raise ProtocolError("tensor digest", got=digest, expected="64 lower-case hexadecimal digits")
        return self.root / digest

    def has(self, digest: Digest) -> bool:
        """Return whether the tensor *digest* is here, complete."""
        path = self.path(digest)
        with on_disk(f"looking up tensor {digest}", self.root):
            return path.exists()

    def size(self, digest: Digest) -> int:
        """Return the bytes of the tensor *digest*.

        Raises:
            NotFound: it is not here.
        """
        return self._stat(digest).st_size

    def missing(self, digests: Iterable[Digest]) -> list[Digest]:
        """Return those of *digests* that are not here, each once, in the order given."""
        return [digest for digest in dict.fromkeys(digests) if not self.has(digest)]

    def verify(self, digest: Digest) -> bool:
        """Return whether the tensor *digest* is here and holds what its name says; delete it if it does not.

        For after a power failure, which can leave a file under its name without all its bytes if it was not synced.
        """
        while True:
            try:
                with self._opened(digest) as descriptor:
                    looked_at = _identity(os.fstat(descriptor))
                    hasher = _hasher()
                    _read_into(hasher, descriptor)
                if hasher.hexdigest() == digest:
                    return True
                # Another who found that out before may have had it replaced by now, by one that is needed.
                if _identity(self._stat(digest)) != looked_at:
                    continue
            except NotFound:
                return False
            with on_disk(f"deleting tensor {digest}", self.root):
                self.path(digest).unlink(missing_ok=True)
            return False

    def check(self, digests: Iterable[Digest]) -> None:
        """Return if each of *digests* is here and holds what its name says.

        Raises:
            TensorDamaged: the first that is not, or does not; what does not is deleted.
        """
        for digest in dict.fromkeys(digests):
            if not self.verify(digest):
                raise TensorDamaged(digest, folder=str(self.root))

    def put(self, buffer: bytes | memoryview) -> Digest:
        """Return the digest of *buffer* (contiguous), having written it to its file unless that was there."""
        view = _bytes_of(buffer)
        digest = digest_of(view)
        if self.has(digest):
            return digest
        with on_disk("writing a tensor", self.root):
            descriptor, path = self._new_temporary()
            try:
                _reserve(descriptor, len(view))
                _write_all(descriptor, view, at=0)
                self._publish(path, digest)
            finally:
                path.unlink(missing_ok=True)
                os.close(descriptor)
        return digest

    def put_file(self, path: Path) -> Digest:
        """Return the digest of what the file at *path* holds, having copied that to its tensor file."""
        with on_disk(f"reading {path}", self.root), path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                return self.put(b"")
            return self.put(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))

    def move_in(self, path: Path) -> Digest:
        """Return the digest of what the file at *path* holds, which is its tensor file now, also where there was one.

        The file is on the same file system, and its bytes are on the disk already.
        """
        with on_disk(f"moving in {path}", self.root):
            hasher = _hasher()
            with path.open("rb") as file:
                _read_into(hasher, file.fileno())
                os.fchmod(file.fileno(), 0o600)
            digest = Digest(hasher.hexdigest())
            path.replace(self.path(digest))
        self.sync([digest])
        return digest

    def take_in(self, path: Path) -> bool:
        """Have the tensor file at *path*, of another folder, here too; return whether there was one to be had.

        It is one file with two names where the file system can do that, and else a copy.
        """
        final = self.path(Digest(path.name))
        with on_disk(f"taking over {path}", self.root):
            try:
                final.hardlink_to(path)
            except FileExistsError:
                return True
            except FileNotFoundError:
                return False
            except OSError:
                self.put_file(path)
        return final.exists()

    def map(self, digest: Digest) -> memoryview:
        """Return the tensor's bytes, mapped read-only; the mapping ends with the last view of it.

        Deleting the file meanwhile does not disturb the view.

        Raises:
            NotFound: it is not here.
        """
        with self._opened(digest) as descriptor:
            if os.fstat(descriptor).st_size == 0:
                return memoryview(b"")
            mapping = _with_descriptors(lambda: TensorMap(descriptor, 0, access=mmap.ACCESS_READ))
        mapping.files, mapping.path, mapping.digest = self, self.path(digest), digest
        return memoryview(mapping)

    def open(self, digest: Digest, *, on_trouble: Callable[[StoreFailed], None] = lambda _: None) -> "Reading":
        """Return the tensor, to be read bit by bit; the file is open until the last reference to that goes.

        Deleting the file meanwhile does not disturb it. *on_trouble* hears, before whoever asked, of what the disk does
        not give, now or later.

        Raises:
            NotFound: it is not here.
        """
        with on_disk(f"reading tensor {digest}", self.root, on_trouble):
            try:
                return Reading(digest, _opened(self.path(digest), os.O_RDONLY), self.root, on_trouble)
            except FileNotFoundError:
                raise NotFound("tensor", digest) from None

    def scratch(self, size: int) -> "Scratch":
        """Return *size* bytes of a new file, zero, mapped for writing: what is computed there needs no copying.

        The disk space is taken at once, because a mapped file that cannot grow kills the process that writes to it.
        """
        _check_size(size)
        with on_disk(f"taking {size} bytes for a tensor", self.root):
            descriptor, path = self._new_temporary()
            try:
                _reserve(descriptor, max(size, 1))
                mapping = _with_descriptors(lambda: TensorMap(descriptor, max(size, 1)))
            except BaseException:
                path.unlink(missing_ok=True)
                raise
            finally:
                os.close(descriptor)  # the mapping has its own, and with it the lock
        mapping.files, mapping.path, mapping.digest = self, path, None
        mapping.forget = weakref.finalize(mapping, _unlink, path)
        return Scratch(mapping, size)

    def begin(
        self, digest: Digest, size: int, *, on_trouble: Callable[[StoreFailed], None] = lambda _: None
    ) -> "Partial":
        """Return the tensor *digest* of *size* bytes in the making, from where an earlier attempt stopped.

        If somebody else is at it, from the start and on one's own: who is first to finish, provides it. *on_trouble*
        hears, before whoever asked, of what the disk does not take, now or later.
        """
        _check_size(size)
        with on_disk(f"receiving tensor {digest}", self.root, on_trouble):
            if self.path(digest).exists():
                return self._complete(digest, size)
            part = self.root / f"{digest}{_PART}"
            descriptor = _lock_resumable(part)
            if descriptor is None:
                descriptor, part = self._new_temporary()
            try:
                hasher, offset = _resume(descriptor, size)
            except BaseException:
                os.close(descriptor)
                raise
        return Partial(
            self, digest, size, descriptor=descriptor, path=part, hasher=hasher, offset=offset, on_trouble=on_trouble
        )

    def sync(self, digests: Iterable[Digest]) -> None:
        """Return when these tensors and their names are on the disk, to survive a power failure.

        What was synced before, and is still the same file, costs a look only. What could not be is written anew.

        Raises:
            NotFound: one is not here.
        """
        fresh: dict[Digest, tuple[int, int]] = {}
        for digest in dict.fromkeys(digests):
            state = _identity(self._stat(digest))
            if self._synced.get(digest) != state:
                fresh[digest] = self._sync_file(digest, state)
        if fresh:
            with on_disk("syncing the folder of tensors", self.root):
                _fsync(self.root)
                if not self._is_named:  # it may be new itself
                    _fsync(self.root.parent)
            self._is_named = True
        self._synced |= fresh

    def keep_only(self, digests: Collection[Digest]) -> int:
        """Delete all tensors but *digests*, and what nobody works on any more; return how many files that were.

        The caller makes sure that nobody relies meanwhile on a tensor that *digests* lacks.
        """
        keep = set(digests)
        with on_disk("deleting tensors", self.root):
            with os.scandir(self.root) as entries:
                names = [entry.name for entry in entries]
            deleted = [name for name in names if self._delete_unless_kept(name, keep)]
        return len(deleted)

    def drop_unfinished(self) -> int:
        """Delete what uploads that broke off have left behind, and return how many files that were.

        What somebody works on stays; an upload that would have been resumed begins again.
        """
        with on_disk("deleting unfinished tensors", self.root):
            with os.scandir(self.root) as entries:
                unfinished = [entry.name for entry in entries if entry.name.endswith((_PART, _TEMPORARY))]
            return sum(_unlink_if_idle(self.root / name) for name in unfinished)

    def set_aside(self, keep: Collection[Digest]) -> list[Path]:
        """Take all tensors but *keep* out of the way, and return the files that are now to be deleted.

        The tensors are gone at once; to delete their files takes as long as they are large, and can be done meanwhile
        (``delete_files``). Files that were never deleted because of a crash are ``keep_only``'s to find.
        """
        kept, doomed = set(keep), []
        with on_disk("setting tensors aside", self.root):
            with os.scandir(self.root) as entries:
                names = [entry.name for entry in entries]
            for name in names:
                if is_digest(name) and name not in kept:
                    path = self.root / f"{secrets.token_hex(16)}{_TEMPORARY}"
                    self.path(Digest(name)).rename(path)
                    self._synced.pop(Digest(name), None)
                    doomed.append(path)
        return doomed

    def delete_files(self, paths: Iterable[Path]) -> None:
        """Delete the files that ``set_aside`` has returned."""
        with on_disk("deleting tensors", self.root):
            for path in paths:
                path.unlink(missing_ok=True)

    def delete_all(self) -> None:
        """Delete the folder with everything in it; views that are mapped stay readable."""
        self._synced.clear()
        with on_disk("deleting tensors", self.root):
            delete_tree(self.root)

    @contextmanager
    def _opened(self, digest: Digest) -> Iterator[int]:
        with on_disk(f"reading tensor {digest}", self.root):
            try:
                descriptor = _opened(self.path(digest), os.O_RDONLY)
            except FileNotFoundError:
                raise NotFound("tensor", digest) from None
            try:
                yield descriptor
            finally:
                os.close(descriptor)

    def _stat(self, digest: Digest) -> os.stat_result:
        with on_disk(f"looking up tensor {digest}", self.root):
            try:
                return self.path(digest).stat()
            except FileNotFoundError:
                raise NotFound("tensor", digest) from None

    def _delete_unless_kept(self, name: str, keep: set[Digest]) -> bool:
        path = self.root / name
        if is_digest(name):
            digest = Digest(name)
            if digest in keep:
                return False
            self._synced.pop(digest, None)
            path.unlink(missing_ok=True)
            return True
        resumable = name.endswith(_PART) and name.removesuffix(_PART) in keep
        if resumable or path.suffix not in (_PART, _TEMPORARY):
            return False
        return _unlink_if_idle(path)

    def _sync_file(self, digest: Digest, state: tuple[int, int]) -> tuple[int, int]:
        """Return the state of the tensor's file, which is on the disk now and was in *state*."""
        if self._unsynced.get(digest) == state:
            return self._write_anew(digest)
        try:
            with on_disk(f"syncing tensor {digest}", self.root):
                _fsync(self.path(digest))
        except StoreFailed:
            self._unsynced[digest] = state
            raise
        return state

    def _write_anew(self, digest: Digest) -> tuple[int, int]:
        """Put a new file, which is on the disk, in place of the tensor's, and return its state.

        What a system could not write of the old one it has given up: asked again, it says that there is nothing to
        write, and what it still has in memory goes at any time.
        """
        self.check([digest])
        with on_disk(f"writing tensor {digest} anew", self.root):
            descriptor, path = self._new_temporary()
            try:
                view = self.map(digest)
                _reserve(descriptor, len(view))
                _write_all(descriptor, view, at=0)
                os.fsync(descriptor)
                path.rename(self.path(digest))
                state = _identity(os.fstat(descriptor))
            finally:
                path.unlink(missing_ok=True)
                os.close(descriptor)
        self._unsynced.pop(digest, None)
        return state

    def _complete(self, digest: Digest, size: int) -> "Partial":
        if (got := self.size(digest)) != size:
            raise ProtocolError(f"size of tensor {digest}", got=size, expected=f"{got}, which is what it has")
        return Partial(self, digest, size, descriptor=None, path=self.path(digest), hasher=None, offset=size)

    def _new_temporary(self) -> tuple[int, Path]:
        while True:
            path = self.root / f"{secrets.token_hex(16)}{_TEMPORARY}"
            descriptor = _opened(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.fstat(descriptor).st_nlink:
                return descriptor, path
            # Another process's keep_only saw the file in the moment before it was locked.
            os.close(descriptor)

    def _publish(self, path: Path, digest: Digest) -> None:
        """Give the finished file at *path* its name; where that exists, leave it: it may be synced, this one is not.

        To look first and rename then would replace one that came, and was synced, in between.
        """
        final = self.path(digest)
        try:
            final.hardlink_to(path)
        except FileExistsError:
            pass
        except OSError:  # of a file system without hard links
            path.rename(final)
            return
        _unlink(path)


class Reading:
    """A tensor that is read from its file; the file is closed with the last reference to this."""

    def __init__(
        self, digest: Digest, descriptor: int, folder: Path, on_trouble: Callable[[StoreFailed], None]
    ) -> None:
        self.digest, self.size = digest, os.fstat(descriptor).st_size
        self._descriptor, self._folder, self._on_trouble = descriptor, folder, on_trouble
        self._buffer = bytearray()
        weakref.finalize(self, os.close, descriptor)

    def read_nowait(self, at: int, most: int) -> memoryview | None:
        """Return what ``read`` does, until this is called again; ``None`` where a disk would have to be waited for."""
        if _NO_WAIT is None:
            return None
        self._buffer = self._buffer or bytearray(min(most, self.size))
        view = memoryview(self._buffer)[: min(most, self.size - at)]
        try:
            got = os.preadv(self._descriptor, [view], at, _NO_WAIT)
        except OSError:  # not in memory, or what ``read`` will tell of
            return None
        return view if got == len(view) else None

    def read(self, at: int, most: int) -> bytes:
        """Return *most* bytes from *at* on, or all that follow if they are fewer.

        Raises:
            ProtocolError: the file has lost some of them.
            StoreFailed: the disk does not give them.
        """
        with on_disk(f"reading tensor {self.digest}", self._folder, self._on_trouble):
            data = os.pread(self._descriptor, most, at)
        if len(data) < min(most, self.size - at):
            raise ProtocolError(f"tensor {self.digest}", got=f"{at + len(data)} bytes", expected=f"{self.size} bytes")
        return data


class Scratch:
    """A tensor being computed in its own file: write to ``view``, then ``finish`` (or ``discard``).

    Where neither is called, the file goes when the last view of it does.
    """

    def __init__(self, mapping: TensorMap, size: int) -> None:
        self._mapping = mapping
        self.size = size

    @property
    def view(self) -> memoryview:
        """The bytes, writable until ``finish``; nothing may write to them afterwards, for they are the file."""
        return memoryview(self._mapping)[: self.size]

    def finish(self) -> Digest:
        """Return the digest of the bytes, which are now the tensor file of that name; once more: the same."""
        mapping = self._mapping
        if mapping.digest is None:
            digest = digest_of(self.view)
            with on_disk(f"finishing tensor {digest}", mapping.files.root):
                if not self.size:
                    os.truncate(mapping.path, 0)
                mapping.files._publish(mapping.path, digest)
            mapping.digest = digest
            self._let_go()
        return mapping.digest

    def discard(self) -> None:
        """Delete the file, unless it is finished; views of it stay usable as plain memory."""
        if self._mapping.digest is None:
            _unlink(self._mapping.path)
            self._let_go()

    def _let_go(self) -> None:
        if self._mapping.forget is not None:
            self._mapping.forget.detach()


class Partial:
    """A tensor that arrives in pieces: ``write`` them in order from ``offset``, then ``finish``.

    ``close`` keeps what has come for the next ``begin``; it is the end of a ``with`` block too, and of a partial that
    nobody holds any more: who had it made in a thread may have been cancelled meanwhile. Not for several threads at
    once.
    """

    def __init__(
        self,
        files: TensorFiles,
        digest: Digest,
        size: int,
        *,
        descriptor: int | None,
        path: Path,
        hasher: "blake3 | None",
        offset: int,
        on_trouble: Callable[[StoreFailed], None] = lambda _: None,
    ) -> None:
        self.digest, self.size, self.offset = digest, size, offset
        self._is_resumed = offset > 0
        self._on_trouble = on_trouble
        self._files, self._path = files, path
        self._descriptor, self._hasher = descriptor, hasher
        self._let_go = weakref.finalize(self, _let_go, descriptor, path) if descriptor is not None else None
        if self._let_go is not None:
            self._let_go.atexit = False  # a thread may still write, and the lock ends with the process

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def missing_bytes(self) -> int:
        """How many bytes are still to come."""
        return self.size - self.offset

    def write(self, chunk: bytes | memoryview) -> None:
        """Append *chunk*.

        Raises:
            ProtocolError: the tensor would get longer than it is said to be; what has come is deleted.
            StoreFailed: the disk did not take it; ``offset`` is as before.
        """
        view = _bytes_of(chunk)
        if len(view) > self.missing_bytes:
            self._delete()
            raise ProtocolError(f"tensor {self.digest}", got=self.offset + len(view), expected=f"{self.size} bytes")
        if not view:
            return
        descriptor, hasher = self._in_use()
        with on_disk(f"receiving tensor {self.digest}", self._files.root, self._on_trouble):
            _write_all(descriptor, view, at=self.offset)
        hasher.update(view)
        self.offset += len(view)

    def finish(self) -> Digest:
        """Return the digest; the tensor is complete and in its place.

        Raises:
            ProtocolError: bytes are missing (what has come is kept), or they are not what the digest says (it is
            deleted).
            TensorDamaged: they are not, and some were here before: of these the disk may have given back others, as
            after a power failure. It is deleted, and can be had from the start.
        """
        if self.missing_bytes:
            raise ProtocolError(f"tensor {self.digest}", got=self.offset, expected=f"{self.size} bytes")
        if self._path == self._files.path(self.digest):
            return self.digest
        _, hasher = self._in_use()
        got = hasher.hexdigest()
        if got != self.digest:
            self._delete()
            if self._is_resumed:
                raise TensorDamaged(self.digest, folder=str(self._files.root))
            raise ProtocolError("digest of the received tensor", got=got, expected=self.digest)
        with on_disk(f"finishing tensor {self.digest}", self._files.root, self._on_trouble):
            self._files._publish(self._path, self.digest)
        self._path = self._files.path(self.digest)
        self._release()
        return self.digest

    def close(self) -> None:
        """Stop; what has come is kept for the next attempt. After ``finish``, and twice, nothing."""
        self._release()

    def _in_use(self) -> tuple[int, blake3]:
        if self._descriptor is None or self._hasher is None:
            raise ValueError(f"the partial tensor {self.digest} is closed")
        return self._descriptor, self._hasher

    def _delete(self) -> None:
        if self._descriptor is not None:
            _unlink(self._path)
            self._release()

    def _release(self) -> None:
        self._descriptor = None
        if self._let_go is not None:
            self._let_go()


def _let_go(descriptor: int, path: Path) -> None:
    if path.suffix == _TEMPORARY:
        _unlink(path)
    os.close(descriptor)


def _hasher(buffer: bytes | memoryview = b"") -> blake3:
    return blake3(buffer, max_threads=blake3.AUTO)


def _bytes_of(buffer: bytes | memoryview) -> memoryview:
    view = memoryview(buffer)
    return view.cast("B") if view.nbytes else memoryview(b"")


def _check_size(size: int) -> None:
    if not 0 <= size <= MAX_TENSOR_BYTES:
        raise ProtocolError("size of the tensor", got=size, expected=f"0 to {MAX_TENSOR_BYTES} bytes")


def _opened(path: Path, flags: int) -> int:
    return _with_descriptors(lambda: os.open(path, flags | os.O_CLOEXEC, 0o600))


def _with_descriptors(take: Callable[[], T]) -> T:
    """Return what *take* returns, going up to the process's hard limit of open files when the soft one is reached.

    Each mapping holds a descriptor (Python can do without from 3.13 on), and a round's updates are one mapping per
    large tensor and client, where many systems begin with 1024 descriptors a process.
    """
    try:
        return take()
    except OSError as error:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if error.errno != errno.EMFILE or soft == hard:
            raise
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        return take()


def _reserve(descriptor: int, size: int) -> None:
    """Take *size* bytes of disk for the file, so that a full disk shows now; this also makes writing faster."""
    if hasattr(os, "posix_fallocate") and size:
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.ftruncate(descriptor, size)


def _write_all(descriptor: int, view: memoryview, *, at: int) -> None:
    done = 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done : done + _WRITE_BYTES], at + done)


def _lock_resumable(path: Path) -> int | None:
    """Return the partial file at *path*, opened and locked; ``None`` when somebody else has it."""
    while True:
        descriptor = _opened(path, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        if os.fstat(descriptor).st_nlink and _is_at(path, descriptor):
            return descriptor
        os.close(descriptor)  # it was finished or deleted between opening and locking: look again


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _resume(descriptor: int, size: int) -> tuple[blake3, int]:
    """Return a hasher that has seen the bytes that are there, and their number; too many: none of them."""
    offset = os.fstat(descriptor).st_size
    if offset > size:
        os.ftruncate(descriptor, 0)
        offset = 0
    hasher = _hasher()
    _read_into(hasher, descriptor)
    return hasher, offset


def _read_into(hasher: blake3, descriptor: int) -> None:
    """Have *hasher* see the file from its beginning. Not mapped: of a mapping, what a disk cannot read kills."""
    buffer = memoryview(bytearray(min(os.fstat(descriptor).st_size + 1, _READ_BYTES)))
    while got := os.readv(descriptor, [buffer]):
        hasher.update(buffer[:got])


def _unlink_if_idle(path: Path) -> bool:
    try:
        descriptor = _opened(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def _unlink(path: Path) -> None:
    with suppress(OSError):  # what cannot be deleted now is, as nobody's work, by the next keep_only
        path.unlink(missing_ok=True)


def _identity(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_ino, stat.st_mtime_ns


def _fsync(path: Path) -> None:
    descriptor = _opened(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
