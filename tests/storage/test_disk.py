"""Full disks and databases are told apart, and named."""

import errno
import os
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hanse.errors import NoSpace, NotStarted, StoreFailed
from hanse.storage.disk import database_failure, disk_failure, mount_point, start_failure
from hanse.storage.tensors import TensorFiles


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_named_by_where_it_is_mounted_and_the_folder_on_it(tmp_path: Path, number: int) -> None:
    error = disk_failure("writing a tensor", OSError(number, "it is full"), tmp_path / "not" / "there")

    assert isinstance(error, NoSpace)
    assert (error.disk, error.folder) == (str(mount_point(tmp_path)), str(tmp_path / "not" / "there"))
    assert "(it is full)" in error.reason


def test_another_failure_of_the_disk_says_what_and_where() -> None:
    denied = OSError(errno.EACCES, "Permission denied")

    assert disk_failure("writing a tensor", denied, Path("/srv")).reason == (
        "the store failed while writing a tensor: Permission denied (in /srv)"
    )
    assert type(disk_failure("opening /srv/store.db", denied, Path("/srv"))) is StoreFailed
    assert "(in" not in disk_failure("opening /srv/store.db", denied, Path("/srv")).reason


def test_a_process_that_cannot_be_started_is_not_the_disks_fault_unless_that_is_full() -> None:
    full = start_failure("the run's process", OSError(errno.ENOSPC, "No space left on device"), Path("/srv"))
    limited = start_failure("the run's process", OSError(errno.EMFILE, "Too many open files"), Path("/srv"))

    assert isinstance(full, NoSpace)
    assert isinstance(limited, NotStarted)
    assert (limited.why, limited.folder) == ("Too many open files", "/srv")


def test_a_path_is_on_the_disk_that_is_mounted_nearest_above_it(tmp_path: Path) -> None:
    assert mount_point(Path("/")) == Path("/")
    assert mount_point(tmp_path).is_mount()
    assert tmp_path.is_relative_to(mount_point(tmp_path))
    assert mount_point(tmp_path / "not" / "there") == mount_point(tmp_path)


def test_sqlite_without_room_is_a_full_disk(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "store.db")
    try:
        connection.execute("PRAGMA max_page_count = 2")
        connection.execute("CREATE TABLE t (data BLOB)")
        with pytest.raises(sqlite3.OperationalError) as caught:
            connection.execute("INSERT INTO t VALUES (zeroblob(100000))")
    finally:
        connection.close()

    error = database_failure(caught.value, str(tmp_path / "store.db"))

    assert isinstance(error, NoSpace)
    assert error.folder == str(tmp_path)
    assert "full" in error.why


def test_postgresql_without_room_is_a_full_disk_of_its_server() -> None:
    class DiskFull(Exception):
        sqlstate = "53100"

    error = database_failure(DiskFull("could not extend\n  file"), "postgresql://db/hanse")

    assert isinstance(error, NoSpace)
    assert (error.folder, error.why) == ("postgresql://db/hanse", "could not extend file")


def test_another_failure_of_the_database_is_one_line() -> None:
    error = database_failure(RuntimeError("no route\nto host"), "store")

    assert type(error) is StoreFailed
    assert error.reason == "the store failed while using store: no route to host"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a disk of one mebibyte, where this process may."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode != 0:
        if "tmpfs" in os.environ.get("HANSE_TEST_REQUIRE", ""):
            pytest.fail(f"no tmpfs can be mounted: {mounted.stderr}")
        pytest.skip(f"no tmpfs can be mounted: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full_is_named_and_goes_on_when_there_is_room(small_disk: Path) -> None:
    files = TensorFiles(small_disk / "runs" / "digits-1" / "tensors")
    first = files.put(os.urandom(700_000))

    with pytest.raises(NoSpace) as caught:
        files.put(os.urandom(700_000))

    assert (caught.value.disk, caught.value.folder) == (str(small_disk), str(files.root))
    files.path(first).unlink()
    assert files.has(files.put(os.urandom(700_000)))
