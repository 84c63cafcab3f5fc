"""Servers on one SQLite file hear of its lease; what lies beside their pipes is nobody's business."""

import asyncio
import errno
import logging
import os
import shutil
import signal
import stat
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

import pytest

from hanse.errors import NoSpace, StoreFailed
from hanse.storage import pipes
from hanse.storage.pipes import Listeners, PipeListener
from hanse.storage.store import SqlStore

from .samples import changed, standby, take

ROOT = Path(__file__).parents[2]


@pytest.fixture
def where(path: Path) -> Path:
    return path


@pytest.fixture
def folder(path: Path) -> Path:
    """Where the pipes are."""
    return path.with_name("store.db-listeners")


def pipes_in(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def mode(path: Path) -> str:
    return stat.filemode(path.stat().st_mode)


@contextmanager
def something_in_the_way(path: Path) -> Iterator[None]:
    path.write_text("no folder")
    yield
    path.unlink()


def link(path: Path, *, to: Path) -> None:
    path.symlink_to(to)


def warnings(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [each for each in caplog.records if each.levelno >= logging.WARNING]


# Two processes --------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def standing_by(path: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run a process that stands by, ready to be told."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.storage.standing_by", str(path), stdout=asyncio.subprocess.PIPE, cwd=ROOT
    )
    try:
        assert await said(process, 1) == ["look"]
        yield process
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def said(process: asyncio.subprocess.Process, lines: int) -> list[str]:
    assert process.stdout is not None
    return [(await process.stdout.readline()).decode().strip() for _ in range(lines)]


async def test_another_process_hears_of_each_move_and_looks_no_more_often_than_it_must(
    store: SqlStore, epoch: int, path: Path
) -> None:
    async with standing_by(path) as process:
        for move, moved in (
            (store.renew_lease(epoch), f"{epoch} 1 server-1"),
            (store.renew_lease(epoch), f"{epoch} 2 server-1"),
            (store.release_lease(epoch, successor="server-2"), f"{epoch + 1} 0 nobody server-2"),
            (take(store, "server-2"), f"{epoch + 2} 0 server-2"),
            (take(store, "server-3", force=True), f"{epoch + 3} 0 server-3"),
        ):
            await move

            # It hears, looks, and has seen it; then it looks once more, with which it waits for the next.
            assert await said(process, 3) == ["look", moved, "look"]


async def test_the_pipe_of_a_process_that_was_killed_is_deleted_with_the_next_word(
    store: SqlStore, other: SqlStore, epoch: int, path: Path, folder: Path
) -> None:
    async with standing_by(path) as process:
        (dead,) = pipes_in(folder)
        process.kill()
        await process.wait()
        waiting = await standby(other)
        assert dead in pipes_in(folder)

        beat = await store.renew_lease(epoch)

        assert await waiting == beat
        assert len(pipes_in(folder)) == 1
        assert dead not in pipes_in(folder)


async def test_a_process_that_is_stopped_and_never_reads_holds_nobody_up(
    store: SqlStore, other: SqlStore, epoch: int, path: Path, folder: Path
) -> None:
    async with standing_by(path) as process:
        (stopped,) = pipes_in(folder)
        process.send_signal(signal.SIGSTOP)
        pipe = os.open(stopped, os.O_WRONLY | os.O_NONBLOCK)
        with suppress(BlockingIOError):
            while True:
                os.write(pipe, bytes(4096))
        os.close(pipe)
        waiting = await standby(other)

        beat = await store.renew_lease(epoch)

        assert await waiting == beat
        process.send_signal(signal.SIGCONT)
        assert await said(process, 2) == ["look", f"{epoch} 1 server-1"]


# Who pays, and what is left -------------------------------------------------------------------------------------------


async def test_where_nobody_listens_nothing_is_made(store: SqlStore, epoch: int, path: Path) -> None:
    await store.renew_lease(epoch)
    await store.release_lease(epoch)

    assert {file.name for file in path.parent.iterdir()} == {"store.db", "store.db-wal", "store.db-shm"}


async def test_pipes_are_nobody_elses_and_gone_with_the_store(
    store: SqlStore, other: SqlStore, epoch: int, folder: Path
) -> None:
    waiting = [await standby(each) for each in (store, other, other)]
    modes = [mode(pipe) for pipe in pipes_in(folder)]

    await other.close()

    assert mode(folder) == "drwx------"
    assert modes == ["prw-------"] * 2, "one for each store, however many wait"
    assert len(pipes_in(folder)) == 1
    await store.close()
    assert pipes_in(folder) == []
    for each in waiting:
        with pytest.raises(StoreFailed, match="not open"):
            await each


async def test_who_comes_to_the_file_by_a_link_hears_too(
    store: SqlStore, epoch: int, path: Path, tmp_path: Path
) -> None:
    link = tmp_path / "link.db"
    link.symlink_to(path)
    async with SqlStore(link) as other:
        waiting = await standby(other)

        assert await store.renew_lease(epoch) == await waiting


# No word is lost ------------------------------------------------------------------------------------------------------


async def test_a_move_whose_caller_has_gone_is_told(store: SqlStore, other: SqlStore, epoch: int) -> None:
    waiting = await standby(other)
    beating = asyncio.create_task(store.renew_lease(epoch), name="a beat that takes too long")
    await asyncio.sleep(0)  # it has been asked for

    beating.cancel()

    assert (await waiting).beat == 1


async def test_a_pipe_that_was_deleted_is_made_anew(store: SqlStore, other: SqlStore, epoch: int, folder: Path) -> None:
    (await standby(other)).cancel()
    shutil.rmtree(folder)

    waiting = await standby(other)

    assert await store.renew_lease(epoch) == await waiting


async def test_a_pipe_that_is_taken_for_a_dead_ones_in_the_making_is_made_anew(
    store: SqlStore, other: SqlStore, epoch: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    mkfifo = os.mkfifo

    def make(name: str, mode: int, *, dir_fd: int) -> None:
        mkfifo(name, mode, dir_fd=dir_fd)
        made.append(name)
        if len(made) < 3:
            Listeners(folder).tell()
            assert pipes_in(folder) == []

    monkeypatch.setattr(pipes.os, "mkfifo", make)
    waiting = await standby(other)

    assert len(set(made)) == 3
    assert len(pipes_in(folder)) == 1
    assert await store.renew_lease(epoch) == await waiting


async def test_a_pipe_that_is_read_just_before_it_is_deleted_as_a_dead_ones_is_made_anew(
    store: SqlStore, other: SqlStore, epoch: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who tells found that nobody reads it, is slow, and deletes it when somebody does."""
    mkfifo, unlink, real_open = os.mkfifo, os.unlink, os.open
    taken_for_dead: list[str] = []
    deleted: list[str] = []

    def make(name: str, mode: int, *, dir_fd: int) -> None:
        mkfifo(name, mode, dir_fd=dir_fd)
        if not deleted:
            Listeners(folder).tell()

    def note(name: str, *, dir_fd: int) -> None:
        taken_for_dead.append(name)

    def open_and_delete(path: str | Path, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        descriptor = real_open(path, flags, mode, dir_fd=dir_fd)
        if flags & os.O_RDWR and path in taken_for_dead:
            unlink(path, dir_fd=dir_fd)
            deleted.append(str(path))
        return descriptor

    with monkeypatch.context() as patch:
        patch.setattr(pipes.os, "mkfifo", make)
        patch.setattr(pipes.os, "unlink", note)
        patch.setattr(pipes.os, "open", open_and_delete)
        waiting = await standby(other)

    assert len(deleted) == len(pipes_in(folder)) == 1
    assert await store.renew_lease(epoch) == await waiting


async def test_a_word_between_the_opening_of_a_pipe_and_its_name_is_heard(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.parent.mkdir()
    heard = asyncio.Event()
    rename = os.rename

    def tell_and_rename(old: str, new: str, *, src_dir_fd: int, dst_dir_fd: int) -> None:
        Listeners(folder).tell()
        rename(old, new, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)

    monkeypatch.setattr(pipes.os, "rename", tell_and_rename)
    listener = PipeListener(folder, heard.set, name="store.db")
    await listener.listen()

    await heard.wait()
    await listener.close()


def test_a_store_that_is_used_in_another_event_loop_listens_there(path: Path, folder: Path) -> None:
    store = SqlStore(path)

    async def begin() -> int:
        await store.open()
        lease = await take(store, "server-1")
        await store.lease_moved(lease, within_s=0.0)
        return lease.epoch

    async def go_on(epoch: int) -> None:
        waiting = await standby(store)
        assert await store.renew_lease(epoch) == await waiting
        assert len(pipes_in(folder)) == 1
        await store.close()

    epoch = asyncio.run(begin())
    asyncio.run(go_on(epoch))
    assert pipes_in(folder) == []


# What else may be in the folder ---------------------------------------------------------------------------------------


async def test_what_is_no_pipe_of_a_listener_is_left_alone(
    store: SqlStore, other: SqlStore, epoch: int, path: Path, folder: Path, tmp_path: Path
) -> None:
    waiting = await standby(other)
    os.mkfifo(tmp_path / "pipe")
    elsewhere = os.open(tmp_path / "pipe", os.O_RDWR | os.O_NONBLOCK)
    (tmp_path / "text").write_text("somebody's")
    (folder / "text").write_text("somebody else's")
    (folder / "to-text").symlink_to(tmp_path / "text")
    (folder / "to-pipe").symlink_to(tmp_path / "pipe")
    (folder / "to-nothing").symlink_to(tmp_path / "nothing")
    (folder / "store.db").hardlink_to(path)
    (folder / "folder").mkdir()
    before = pipes_in(folder)

    beat = await store.renew_lease(epoch)

    assert await waiting == beat
    assert pipes_in(folder) == before
    assert ((tmp_path / "text").read_text(), (folder / "text").read_text()) == ("somebody's", "somebody else's")
    with pytest.raises(BlockingIOError):
        os.read(elsewhere, 1)
    os.close(elsewhere)
    assert not (tmp_path / "nothing").exists()


async def test_the_databases_file_is_not_opened_through_a_link_among_the_pipes(
    store: SqlStore, other: SqlStore, epoch: int, path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = await standby(other)
    (folder / "store.db").hardlink_to(path)
    opened = []
    real_open = os.open

    def noting_open(path: str | Path, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        opened.append(Path(path).name)
        return real_open(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(pipes.os, "open", noting_open)

    await store.renew_lease(epoch)

    await waiting
    assert set(opened) == {folder.name} | {each.name for each in pipes_in(folder)} - {"store.db"}


async def test_a_folder_that_is_a_link_is_not_followed(
    store: SqlStore, other: SqlStore, epoch: int, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    os.mkfifo(tmp_path / "elsewhere" / "a-pipe-that-nobody-reads")
    link(folder, to=tmp_path / "elsewhere")

    with pytest.raises(StoreFailed, match=r"listening to .*: Not a directory"):
        await other.lease_moved(await other.lease(), within_s=3600.0)
    await store.renew_lease(epoch)

    assert [each.name for each in pipes_in(tmp_path / "elsewhere")] == ["a-pipe-that-nobody-reads"]


# What fails -----------------------------------------------------------------------------------------------------------


async def test_a_word_that_cannot_be_said_is_logged_once_and_the_write_goes_through(
    store: SqlStore, epoch: int, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with something_in_the_way(folder):
        for beat in (1, 2, 3):
            assert (await store.renew_lease(epoch)).beat == beat

    (warning,) = warnings(caplog)
    assert (warning.name, warning.reason, warning.folder) == ("hanse.storage.pipes", "Not a directory", str(folder))

    (await standby(store)).cancel()
    await store.renew_lease(epoch)
    shutil.rmtree(folder)
    with something_in_the_way(folder):
        await store.renew_lease(epoch)
    assert len(warnings(caplog)) == 2, "after it had gone well"


async def test_who_cannot_be_told_keeps_nobody_else_from_hearing(
    store: SqlStore, other: SqlStore, epoch: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = [await standby(store), await standby(other)]
    refused = pipes_in(folder)[0].name
    real_open = os.open

    def open_but_one(path: str | Path, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if Path(path).name == refused:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return real_open(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(pipes.os, "open", open_but_one)

    beat = await store.renew_lease(epoch)

    done, late = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    assert [each.result() for each in done] == [beat]
    assert len(late) == 1


@pytest.mark.parametrize(
    ("number", "kind", "sentence"),
    [
        (errno.EPERM, StoreFailed, "its file system has no named pipes, by which servers hear of each other"),
        (errno.ENOSYS, StoreFailed, "its file system has no named pipes, by which servers hear of each other"),
        (errno.EACCES, StoreFailed, r"Permission denied \(in /.*/store.db-listeners\)"),
        (errno.ENOSPC, NoSpace, "is full"),
    ],
)
async def test_who_cannot_listen_learns_why_and_hears_once_it_can(
    store: SqlStore,
    epoch: int,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    kind: type[StoreFailed],
    sentence: str,
) -> None:
    def refuse(name: str, mode: int, *, dir_fd: int) -> None:
        raise OSError(number, os.strerror(number))

    seen = await store.lease()
    with monkeypatch.context() as patch:
        patch.setattr(pipes.os, "mkfifo", refuse)
        with pytest.raises(StoreFailed, match=sentence) as caught:
            await store.lease_moved(seen, within_s=3600.0)
    assert type(caught.value) is kind
    assert caught.value.doing == f"listening to {store._name}"

    assert await store.lease_moved(changed(seen, beat=-1), within_s=3600.0) == seen
