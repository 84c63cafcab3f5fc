"""What a tenure takes over of a run's tensors."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from hanse.errors import StoreFailed
from hanse.ids import Digest
from hanse.server.run_folder import RunFolder
from hanse.storage.tensors import TensorFiles


async def test_tensors_of_an_earlier_tenure_are_taken_over_and_the_rest_of_them_deleted(tmp_path: Path) -> None:
    before = RunFolder(tmp_path, epoch=3)
    needed, other = (TensorFiles(before.tensors).put(memoryview(data)) for data in (b"needed", b"other"))
    now = RunFolder(tmp_path, epoch=4)
    assert await now.take_over([needed]) == []
    assert TensorFiles(now.tensors).has(needed)
    assert not TensorFiles(now.tensors).has(other)
    assert not before.tensors.exists()


async def test_tensors_of_release_0_1_0_are_taken_over_like_those_of_a_tenure(tmp_path: Path) -> None:
    needed = TensorFiles(tmp_path / "tensors").put(memoryview(b"needed"))
    now = RunFolder(tmp_path, epoch=1)
    assert await now.take_over([needed]) == []
    assert TensorFiles(now.tensors).has(needed)
    assert not (tmp_path / "tensors").exists()


async def test_a_tensor_that_the_last_tenure_has_damaged_is_taken_over_from_the_one_before(tmp_path: Path) -> None:
    needed = TensorFiles(RunFolder(tmp_path, epoch=3).tensors).put(memoryview(b"needed"))
    last = TensorFiles(RunFolder(tmp_path, epoch=4).tensors)
    last.put(memoryview(b"needed"))
    last.path(needed).write_bytes(b"\0" * 6)  # its power failed while it took over, from a disk without hard links
    now = RunFolder(tmp_path, epoch=5)

    assert await now.take_over([needed]) == []
    assert TensorFiles(now.tensors).verify(needed)


async def test_a_disk_that_does_not_tell_what_there_is_may_tell_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = TensorFiles(RunFolder(tmp_path, epoch=3).tensors).put(memoryview(b"needed"))
    now = RunFolder(tmp_path, epoch=4)

    def fail(path: Path, pattern: str) -> Iterator[Path]:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "glob", fail)
    with pytest.raises(StoreFailed, match=f"looking into {tmp_path}: Input/output error"):
        await now.take_over([needed])
    monkeypatch.undo()

    assert await now.take_over([needed]) == []


async def test_what_no_tenure_has_is_told(tmp_path: Path) -> None:
    lost = Digest("ab" * 32)
    assert await RunFolder(tmp_path, epoch=2).take_over([lost]) == [lost]


async def test_tensors_are_deleted_while_another_deletes_some_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path / "job", 2)
    for number in range(5):
        TensorFiles(folder.tensors).put(memoryview(bytes([number])))
    unlink, seen = os.unlink, list[str]()

    def deleted_twice(name: str, *, dir_fd: int | None = None) -> None:
        unlink(name, dir_fd=dir_fd)
        if not seen:
            seen.append(name)
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)

    monkeypatch.setattr(os, "unlink", deleted_twice)
    await folder.delete_tensors()

    assert seen
    assert not folder.tensors.exists()
