import asyncio
import errno
import gc
import os
import resource
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from hanse.errors import NoSpace, NotFound, ProtocolError, StoreFailed, TensorDamaged
from hanse.ids import Digest
from hanse.storage.tensors import TensorFiles, digest_of

CONTENT = bytes(range(256)) * 20_000  # 5 MB, in several blocks
DIGEST = Digest(blake3(CONTENT).hexdigest())
ABSENT = Digest("0" * 64)


@pytest.fixture
def files(tmp_path: Path) -> TensorFiles:
    return TensorFiles(tmp_path / "tensors")


def names(files: TensorFiles) -> set[str]:
    return {path.name for path in files.root.iterdir()}


def open_files() -> set[Path]:
    return {descriptor.readlink() for descriptor in Path("/proc/self/fd").iterdir() if descriptor.exists()}


# Complete tensors -----------------------------------------------------------------------------------------------------


def test_a_tensor_is_named_by_the_blake3_digest_of_its_bytes(files: TensorFiles) -> None:
    assert files.put(memoryview(CONTENT)) == DIGEST
    assert names(files) == {DIGEST}
    assert files.path(DIGEST).read_bytes() == CONTENT
    assert bytes(files.map(DIGEST)) == CONTENT
    assert files.size(DIGEST) == len(CONTENT)
    assert files.has(DIGEST)


def test_folder_and_files_are_nobody_elses_to_read(files: TensorFiles) -> None:
    files.put(CONTENT)

    assert stat.S_IMODE(files.root.stat().st_mode) == 0o700
    assert stat.S_IMODE(files.path(DIGEST).stat().st_mode) == 0o600


def test_the_empty_tensor_is_a_tensor(files: TensorFiles) -> None:
    digest = files.put(b"")

    assert digest == blake3(b"").hexdigest()
    assert bytes(files.map(digest)) == b""
    assert files.size(digest) == 0


def test_a_tensor_that_is_there_is_not_written_again(files: TensorFiles) -> None:
    files.put(CONTENT)
    before = files.path(DIGEST).stat()

    assert files.put(CONTENT) == DIGEST
    assert files.path(DIGEST).stat() == before


def test_a_file_of_any_size_can_be_put(files: TensorFiles, tmp_path: Path) -> None:
    (tmp_path / "some").write_bytes(CONTENT)
    (tmp_path / "empty").touch()

    assert files.put_file(tmp_path / "some") == DIGEST
    assert files.put_file(tmp_path / "empty") == blake3(b"").hexdigest()
    with pytest.raises(StoreFailed, match="missing"):
        files.put_file(tmp_path / "missing")


def test_a_file_that_is_moved_in_takes_the_place_of_one_that_was_there(
    files: TensorFiles, tmp_path: Path, synced: list[str]
) -> None:
    files.put(CONTENT)
    draft = tmp_path / "draft"
    draft.write_bytes(CONTENT)
    moved = draft.stat().st_ino

    assert files.move_in(draft) == DIGEST

    assert files.path(DIGEST).stat().st_ino == moved
    assert stat.S_IMODE(files.path(DIGEST).stat().st_mode) == 0o600
    assert names(files) == {DIGEST}
    assert not draft.exists()
    assert synced == [DIGEST, "tensors", tmp_path.name]
    with pytest.raises(StoreFailed, match="missing"):
        files.move_in(tmp_path / "missing")


def test_a_mapped_tensor_cannot_be_written_to(files: TensorFiles) -> None:
    view = files.map(files.put(CONTENT))

    assert view.readonly
    with pytest.raises(TypeError):
        view[0] = 1


def test_a_mapped_tensor_stays_readable_when_its_file_goes(files: TensorFiles) -> None:
    view = files.map(files.put(CONTENT))

    files.keep_only([])

    assert not files.has(DIGEST)
    assert bytes(view) == CONTENT


@pytest.mark.parametrize("at", [0, 1000, len(CONTENT) - 1])
def test_a_tensor_is_read_from_anywhere_in_it_also_when_its_file_goes(files: TensorFiles, at: int) -> None:
    reading = files.open(files.put(CONTENT))
    files.keep_only([])

    assert reading.size == len(CONTENT)
    assert reading.read(at, 4096) == CONTENT[at : at + 4096]
    assert reading.read_nowait(at, 4096) in (CONTENT[at : at + 4096], None)


def test_where_a_system_cannot_tell_what_is_in_memory_a_tensor_is_waited_for(
    files: TensorFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hanse.storage.tensors._NO_WAIT", None)

    assert files.open(files.put(CONTENT)).read_nowait(0, 4096) is None


def test_a_tensor_that_is_read_is_closed_with_the_last_reference_to_it(files: TensorFiles) -> None:
    path = files.path(files.put(CONTENT))
    reading = files.open(DIGEST)
    assert path in open_files()
    del reading
    assert path not in open_files()


def test_a_tensor_of_which_the_disk_has_lost_the_end_is_another_one(files: TensorFiles) -> None:
    reading = files.open(files.put(CONTENT))
    os.truncate(files.path(DIGEST), 1000)

    assert reading.read(0, 1000) == CONTENT[:1000]
    assert reading.read_nowait(0, 2000) is None
    with pytest.raises(ProtocolError, match="1000 bytes"):
        reading.read(0, 2000)


def test_what_a_disk_does_not_give_is_told_to_who_looks_after_it(
    files: TensorFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[StoreFailed] = []
    reading = files.open(files.put(CONTENT), on_trouble=told.append)

    def refuse(*_: object) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", refuse)
    monkeypatch.setattr(os, "preadv", refuse)
    assert reading.read_nowait(0, 1000) is None
    assert told == []
    with pytest.raises(StoreFailed, match="Input/output error") as failed:
        reading.read(0, 1000)
    assert told == [failed.value]


def test_what_is_missing_is_told_once_and_in_order(files: TensorFiles) -> None:
    files.put(CONTENT)
    other = Digest("f" * 64)

    assert files.missing([other, DIGEST, ABSENT, other]) == [other, ABSENT]


def test_an_absent_tensor_is_not_found(files: TensorFiles) -> None:
    assert not files.has(ABSENT)
    for use in (files.size, files.map, files.open, lambda digest: files.sync([digest])):
        with pytest.raises(NotFound, match=ABSENT):
            use(ABSENT)


@pytest.mark.parametrize(
    "name", ["", "..", "../../etc/passwd", "/etc/passwd", "A" * 64, "0" * 63, "0" * 65, "0" * 64 + "\n"]
)
def test_what_is_no_digest_reaches_no_file(files: TensorFiles, name: str) -> None:
    for use in (files.has, files.path, files.size, files.map, files.verify):
        with pytest.raises(ProtocolError, match="digest"):
            use(Digest(name))
    with pytest.raises(ProtocolError, match="digest"):
        files.begin(Digest(name), 1)
    with pytest.raises(ProtocolError, match="digest"):
        files.missing([Digest(name)])
    assert names(files) == set()


def test_a_damaged_tensor_is_found_out_and_deleted(files: TensorFiles) -> None:
    whole, damaged = files.put(b"whole"), files.put(CONTENT)
    with files.path(damaged).open("r+b") as file:
        file.truncate(len(CONTENT) - 1)

    assert files.verify(whole)
    assert not files.verify(damaged)
    assert not files.verify(ABSENT)
    assert names(files) == {whole}


def test_tensors_that_must_be_right_are_and_the_first_that_is_not_is_named(files: TensorFiles) -> None:
    whole, damaged = files.put(b"whole"), files.put(CONTENT)
    files.check([whole, damaged])
    with files.path(damaged).open("r+b") as file:
        file.write(b"?")

    with pytest.raises(TensorDamaged, match=f"tensor {damaged} in .* is missing or damaged"):
        files.check([whole, damaged])
    with pytest.raises(TensorDamaged, match=str(ABSENT)):
        files.check([ABSENT])
    assert names(files) == {whole}


def test_many_who_put_the_same_tensor_at_once_all_have_it(files: TensorFiles) -> None:
    others = [TensorFiles(files.root) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        digests = set(pool.map(lambda each: each.put(CONTENT), others))

    assert digests == {DIGEST}
    assert names(files) == {DIGEST}
    assert bytes(files.map(DIGEST)) == CONTENT


def test_a_damaged_tensor_that_another_has_replaced_while_it_was_looked_at_stays(
    files: TensorFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.put(CONTENT)
    with files.path(DIGEST).open("r+b") as file:
        file.write(b"?")

    def replaced_and_read(descriptor: int, buffers: list[memoryview]) -> int:
        monkeypatch.undo()
        other = TensorFiles(files.root)
        assert not other.verify(DIGEST)
        other.put(CONTENT)
        return os.readv(descriptor, buffers)

    monkeypatch.setattr(os, "readv", replaced_and_read)
    assert files.verify(DIGEST)
    assert names(files) == {DIGEST}


def test_a_damaged_tensor_that_another_has_deleted_while_it_was_looked_at_is_not_there(
    files: TensorFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.put(CONTENT)
    with files.path(DIGEST).open("r+b") as file:
        file.write(b"?")

    def deleted_and_read(descriptor: int, buffers: list[memoryview]) -> int:
        files.path(DIGEST).unlink(missing_ok=True)
        return readv(descriptor, buffers)

    readv = os.readv
    monkeypatch.setattr(os, "readv", deleted_and_read)
    assert not files.verify(DIGEST)


def test_a_tensor_that_the_disk_cannot_read_is_a_sentence_and_stays(
    files: TensorFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.put(CONTENT)
    with files.begin(ABSENT, len(CONTENT)) as partial:
        partial.write(CONTENT[:1000])

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "readv", fail)
    with pytest.raises(StoreFailed, match=rf"reading tensor {DIGEST}: Input/output error \(in {files.root}\)"):
        files.verify(DIGEST)
    with pytest.raises(StoreFailed, match=rf"receiving tensor {ABSENT}: Input/output error"):
        files.begin(ABSENT, len(CONTENT))
    monkeypatch.undo()
    assert files.verify(DIGEST)


def test_a_tensor_that_came_first_is_not_replaced_by_one_that_was_about_to_get_its_name(
    files: TensorFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    late, scratch = files.begin(DIGEST, len(CONTENT)), files.scratch(len(CONTENT))
    late.write(CONTENT)
    scratch.view[:] = CONTENT
    files.put(CONTENT)
    files.sync([DIGEST])
    first = files.path(DIGEST).stat()

    monkeypatch.setattr(Path, "exists", lambda path: False)  # whoever looked, did so before
    assert (late.finish(), scratch.finish()) == (DIGEST, DIGEST)
    monkeypatch.undo()

    assert files.path(DIGEST).stat().st_ino == first.st_ino
    assert names(files) == {DIGEST}


def test_a_tensor_gets_its_name_also_where_a_file_can_have_only_one(
    files: TensorFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    files.put(CONTENT)

    assert files.verify(DIGEST)
    assert names(files) == {DIGEST}


def test_a_full_disk_is_a_sentence_and_leaves_nothing_behind(
    files: TensorFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(NoSpace, match=rf"writing a tensor failed: .* holds {files.root}, is full \(No space left"):
        files.put(CONTENT)
    assert names(files) == set()

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StoreFailed, match="taking 5120000 bytes"):
        files.scratch(len(CONTENT))
    assert names(files) == set()


def test_that_the_disk_does_not_tell_of_a_tensor_does_not_mean_that_it_is_lost(
    files: TensorFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.put(CONTENT)

    def fail(path: Path, **_: object) -> os.stat_result:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "stat", fail)
    for use in (
        lambda: files.has(DIGEST),
        lambda: files.missing([DIGEST]),
        lambda: files.put(CONTENT),
        lambda: files.begin(DIGEST, len(CONTENT)),
    ):
        with pytest.raises(StoreFailed, match=f"(looking up|receiving) tensor {DIGEST}: Input/output error"):
            use()
    monkeypatch.undo()
    assert names(files) == {DIGEST}


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(StoreFailed, match="making the folder"):
        TensorFiles(tmp_path / "file" / "tensors")


# Deleting -------------------------------------------------------------------------------------------------------------


def test_keep_only_deletes_the_rest(files: TensorFiles) -> None:
    kept, gone = files.put(b"kept"), files.put(b"gone")

    assert files.keep_only([kept, ABSENT]) == 1
    assert names(files) == {kept}
    assert not files.has(gone)


def test_tensors_set_aside_are_gone_at_once_and_their_files_when_they_are_deleted(files: TensorFiles) -> None:
    kept, other = files.put(b"kept"), files.put(b"other")
    view = files.map(other)
    doomed = files.set_aside([kept])
    assert (files.has(kept), files.has(other)) == (True, False)
    assert [path.read_bytes() for path in doomed] == [b"other"]
    again = files.put(b"other")
    files.delete_files(doomed)
    assert not any(path.exists() for path in doomed)
    assert files.has(again)
    assert bytes(view) == b"other"


def test_keep_only_leaves_what_is_being_made(files: TensorFiles) -> None:
    scratch = files.scratch(100)
    with files.begin(DIGEST, len(CONTENT)) as partial:
        partial.write(CONTENT[:1000])

        assert files.keep_only([]) == 0

        partial.write(CONTENT[1000:])
        assert partial.finish() == DIGEST
    assert files.has(scratch.finish())


def test_keep_only_deletes_what_was_left_behind_unless_it_can_be_resumed_for_use(files: TensorFiles) -> None:
    for content in (CONTENT, b"unwanted"):
        with files.begin(digest_of(content), len(content)) as partial:
            partial.write(content[:5])
    (files.root / "0123.tmp").touch()

    assert files.keep_only([DIGEST]) == 2
    assert names(files) == {f"{DIGEST}.part"}


def test_unfinished_files_are_dropped_unless_somebody_works_on_them(files: TensorFiles) -> None:
    kept = files.put(b"kept")
    with files.begin(digest_of(b"broken off"), 10) as partial:
        partial.write(b"broke")
    (files.root / "0123.tmp").touch()
    with files.begin(DIGEST, len(CONTENT)) as partial:
        partial.write(CONTENT[:5])
        assert files.drop_unfinished() == 2
        assert names(files) == {kept, f"{DIGEST}.part"}


def test_keep_only_leaves_files_that_are_not_its_own(files: TensorFiles) -> None:
    (files.root / "README").touch()

    assert files.keep_only([]) == 0
    assert names(files) == {"README"}


def test_delete_all_deletes_the_folder_and_may_be_repeated(files: TensorFiles) -> None:
    files.put(CONTENT)
    with files.begin(ABSENT, 10) as partial:
        partial.write(b"12345")

    files.delete_all()
    files.delete_all()

    assert not files.root.exists()
    with pytest.raises(StoreFailed):
        files.put(CONTENT)


# Syncing --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the list of the files that are synced from here on."""
    seen: list[str] = []
    fsync = os.fsync

    def record(descriptor: int) -> None:
        seen.append(Path(f"/proc/self/fd/{descriptor}").resolve().name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    return seen


def test_sync_syncs_files_then_folder_and_each_file_and_the_folders_name_once(
    files: TensorFiles, synced: list[str]
) -> None:
    one, two = files.put(b"one"), files.put(b"two")

    files.sync([one, one])
    files.sync([one, two])
    files.sync([one, two])

    assert synced == [one, "tensors", files.root.parent.name, two, "tensors"]


def test_a_tensor_made_anew_is_synced_anew(files: TensorFiles, synced: list[str]) -> None:
    files.sync([files.put(b"one")])
    TensorFiles(files.root).keep_only([])  # another process's

    files.sync([files.put(b"one")])

    assert len(synced) == 5


def test_what_could_not_be_synced_is_written_anew_for_the_system_has_given_it_up(
    files: TensorFiles, synced: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files.put(CONTENT)
    given_up = files.path(DIGEST).stat()
    fsync = os.fsync
    written: set[int] = set()

    def fail_once(descriptor: int) -> None:
        """Do as Linux does, which tells of what it could not write once."""
        state = os.fstat(descriptor)
        if state.st_ino == given_up.st_ino and not written:
            written.add(state.st_ino)
            raise OSError(errno.EIO, "Input/output error")
        written.add(state.st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail_once)
    with pytest.raises(StoreFailed, match=f"syncing tensor {DIGEST}: Input/output error"):
        files.sync([DIGEST])
    files.sync([DIGEST])

    assert files.path(DIGEST).stat().st_ino in written - {given_up.st_ino}
    assert files.verify(DIGEST)
    assert names(files) == {DIGEST}
    synced.clear()
    files.sync([DIGEST])
    assert synced == []


def test_what_could_not_be_synced_waits_for_room_to_be_written_anew(
    files: TensorFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.put(CONTENT)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        for _ in range(3):
            with pytest.raises(NoSpace):
                files.sync([DIGEST])
            assert names(files) == {DIGEST}
    files.sync([DIGEST])
    assert files.verify(DIGEST)


# Scratches ------------------------------------------------------------------------------------------------------------


def test_a_scratch_becomes_a_tensor_in_place(files: TensorFiles) -> None:
    scratch = files.scratch(len(CONTENT))
    assert bytes(scratch.view[:3]) == b"\0\0\0"
    inode = next(files.root.iterdir()).stat().st_ino

    scratch.view[:] = CONTENT

    assert scratch.finish() == scratch.finish() == DIGEST
    assert names(files) == {DIGEST}
    assert files.path(DIGEST).stat().st_ino == inode


def test_an_empty_scratch_becomes_the_empty_tensor(files: TensorFiles) -> None:
    scratch = files.scratch(0)

    assert len(scratch.view) == 0
    assert files.size(scratch.finish()) == 0


def test_a_scratch_of_a_tensor_that_is_there_gives_way_to_it(files: TensorFiles) -> None:
    files.put(CONTENT)
    before = files.path(DIGEST).stat().st_ino
    scratch = files.scratch(len(CONTENT))
    scratch.view[:] = CONTENT

    assert scratch.finish() == DIGEST
    assert names(files) == {DIGEST}
    assert files.path(DIGEST).stat().st_ino == before


def test_a_discarded_scratch_leaves_no_file(files: TensorFiles) -> None:
    scratch = files.scratch(10)
    view = scratch.view

    scratch.discard()
    scratch.discard()
    view[0] = 1

    assert names(files) == set()


def test_a_finished_scratch_cannot_be_discarded(files: TensorFiles) -> None:
    scratch = files.scratch(10)
    digest = scratch.finish()

    scratch.discard()

    assert files.has(digest)


def test_a_forgotten_scratch_takes_its_file_along_with_its_last_view(files: TensorFiles) -> None:
    view = files.scratch(10).view
    gc.collect()
    assert len(names(files)) == 1

    del view
    gc.collect()

    assert names(files) == set()


@pytest.mark.parametrize("size", [-1, 2**50])
def test_a_size_that_no_tensor_has_is_refused(files: TensorFiles, size: int) -> None:
    with pytest.raises(ProtocolError, match="size"):
        files.scratch(size)
    with pytest.raises(ProtocolError, match="size"):
        files.begin(DIGEST, size)
    assert names(files) == set()


# Partial tensors ------------------------------------------------------------------------------------------------------


def receive(files: TensorFiles, content: bytes, *, until: int | None = None) -> int:
    """Send what is missing of *content* up to *until*, and return the offset from where it was sent."""
    with files.begin(digest_of(content), len(content)) as partial:
        start = partial.offset
        partial.write(content[start:until])
        if until is None:
            partial.finish()
        return start


@given(st.binary(max_size=200), st.lists(st.integers(0, 200), max_size=5))
def test_however_it_is_cut_and_interrupted_the_tensor_arrives(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, stops: list[int]
) -> None:
    files = TensorFiles(tmp_path_factory.mktemp("any") / "tensors")
    expected = 0
    for stop in sorted(min(stop, len(content)) for stop in stops):
        assert receive(files, content, until=stop) == expected
        expected = stop

    assert receive(files, content) == expected

    assert names(files) == {digest_of(content)}
    assert bytes(files.map(digest_of(content))) == content


def test_a_tensor_that_is_there_has_nothing_missing(files: TensorFiles) -> None:
    files.put(CONTENT)

    with files.begin(DIGEST, len(CONTENT)) as partial:
        assert partial.offset == len(CONTENT)
        assert partial.missing_bytes == 0
        assert partial.finish() == DIGEST
    assert names(files) == {DIGEST}


def test_a_tensor_that_is_there_with_another_size_is_refused(files: TensorFiles) -> None:
    files.put(CONTENT)

    with pytest.raises(ProtocolError, match="size"):
        files.begin(DIGEST, len(CONTENT) + 1)
    assert files.has(DIGEST)


def test_bytes_that_are_not_what_the_digest_says_are_deleted(files: TensorFiles) -> None:
    with files.begin(DIGEST, len(CONTENT)) as partial:
        partial.write(b"x" + CONTENT[1:])
        with pytest.raises(ProtocolError, match="digest"):
            partial.finish()

    assert names(files) == set()
    assert receive(files, CONTENT) == 0


def test_a_beginning_that_the_disk_has_lost_since_is_told_as_damage_and_received_anew(files: TensorFiles) -> None:
    with files.begin(DIGEST, len(CONTENT)) as partial:
        partial.write(bytes(10))  # what a power failure has left of it

    with files.begin(DIGEST, len(CONTENT)) as partial:
        partial.write(CONTENT[10:])
        with pytest.raises(TensorDamaged):
            partial.finish()

    assert names(files) == set()
    assert receive(files, CONTENT) == 0


def test_more_bytes_than_announced_are_refused_and_deleted(files: TensorFiles) -> None:
    partial = files.begin(DIGEST, 10)
    partial.write(b"12345")

    with pytest.raises(ProtocolError, match="10 bytes"):
        partial.write(b"678901")
    assert names(files) == set()
    with pytest.raises(ValueError, match="closed"):
        partial.write(b"6")


def test_an_early_finish_is_refused_and_what_came_is_kept(files: TensorFiles) -> None:
    with files.begin(DIGEST, len(CONTENT)) as partial:
        partial.write(CONTENT[:-1])
        with pytest.raises(ProtocolError, match="bytes"):
            partial.finish()

    assert not files.has(DIGEST)
    assert receive(files, CONTENT) == len(CONTENT) - 1


def test_leftovers_longer_than_the_tensor_are_thrown_away(files: TensorFiles) -> None:
    with files.begin(DIGEST, len(CONTENT) + 10) as partial:
        partial.write(CONTENT + b"1")

    assert receive(files, CONTENT) == 0
    assert files.has(DIGEST)


def test_two_who_receive_the_same_tensor_do_not_mix(files: TensorFiles) -> None:
    first, second = files.begin(DIGEST, len(CONTENT)), TensorFiles(files.root).begin(DIGEST, len(CONTENT))
    first.write(CONTENT[:1000])
    second.write(CONTENT)

    assert second.finish() == DIGEST
    first.write(CONTENT[1000:])
    assert first.finish() == DIGEST
    assert names(files) == {DIGEST}


def test_the_second_of_two_receivers_leaves_nothing_when_it_stops(files: TensorFiles) -> None:
    with files.begin(DIGEST, 10) as first:
        first.write(b"12345")
        with files.begin(DIGEST, 10) as second:
            assert second.offset == 0
            second.write(b"123")

    assert names(files) == {f"{DIGEST}.part"}


def test_a_write_that_the_disk_refuses_can_be_repeated(files: TensorFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    with files.begin(DIGEST, len(CONTENT)) as partial:
        partial.write(CONTENT[:1000])
        with monkeypatch.context() as patch:

            def full(*_: object) -> int:
                raise OSError(28, "No space left on device")

            patch.setattr(os, "pwrite", full)
            with pytest.raises(NoSpace, match="No space left"):
                partial.write(CONTENT[1000:])
        assert partial.offset == 1000

        partial.write(CONTENT[1000:])
        assert partial.finish() == DIGEST


def test_short_writes_are_continued(files: TensorFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, at: pwrite(descriptor, data[:70_000], at))

    assert receive(files, CONTENT) == 0
    assert bytes(files.map(DIGEST)) == CONTENT


def test_closing_twice_or_after_the_end_is_nothing(files: TensorFiles) -> None:
    partial = files.begin(DIGEST, len(CONTENT))
    partial.write(CONTENT)
    partial.finish()

    partial.close()
    partial.close()

    assert partial.finish() == DIGEST


def test_what_nobody_holds_any_more_can_be_resumed_and_deleted(files: TensorFiles) -> None:
    descriptors = len(list(Path("/dev/fd").iterdir()))
    dropped = files.begin(DIGEST, len(CONTENT))
    dropped.write(CONTENT[:1000])
    beside = files.begin(DIGEST, len(CONTENT))
    beside.write(CONTENT[:10])
    del dropped, beside
    gc.collect()

    assert names(files) == {f"{DIGEST}.part"}
    assert len(list(Path("/dev/fd").iterdir())) == descriptors
    assert files.begin(DIGEST, len(CONTENT)).offset == 1000
    gc.collect()
    assert files.keep_only([]) == 1


def test_what_a_killed_process_received_can_be_resumed(files: TensorFiles) -> None:
    dying = f"""
import os, pathlib
from hanse.storage.tensors import TensorFiles
files = TensorFiles(pathlib.Path({str(files.root)!r}))
partial = files.begin({DIGEST!r}, {len(CONTENT)})
partial.write(bytes(range(256)) * 100)
scratch = files.scratch(1000)
os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", dying], check=False).returncode == -9
    assert len(names(files)) == 2

    assert receive(files, CONTENT) == 25_600
    assert files.keep_only([DIGEST]) == 1  # the dead one's scratch
    assert names(files) == {DIGEST}


# Limits of the process ------------------------------------------------------------------------------------------------


def test_more_tensors_can_be_mapped_than_the_soft_limit_of_open_files(files: TensorFiles) -> None:
    digests = [files.put(str(n).encode()) for n in range(60)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 20, hard))
    try:
        views = [files.map(digest) for digest in digests]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    assert [bytes(view) for view in views] == [str(n).encode() for n in range(60)]


def test_writing_a_tensor_takes_no_memory_of_its_size(files: TensorFiles) -> None:
    content = memoryview(bytearray(64 * 1024 * 1024))
    before = _anonymous_bytes()

    digest = files.put(content)
    view = files.map(digest)
    assert digest_of(view) == digest
    scratch = files.scratch(len(content))
    scratch.view[:] = content

    assert _anonymous_bytes() - before < 8 * 1024 * 1024


def _anonymous_bytes() -> int:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) * 1024


async def test_the_work_can_be_done_beside_an_event_loop(files: TensorFiles) -> None:
    digests = await asyncio.gather(*(asyncio.to_thread(files.put, CONTENT) for _ in range(4)))

    assert set(digests) == {DIGEST}
