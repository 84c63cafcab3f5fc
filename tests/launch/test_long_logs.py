import asyncio
import os
import stat
import threading
from pathlib import Path

import pytest

from hanse.launch import long_logs
from hanse.launch.long_logs import HEAD_BYTES, TAIL_BYTES, LongLogs, shorten
from hanse.launch.process import MAX_LOG_BYTES, ProcessLauncher, last_lines

from .much import LINE, MUCH, is_too_long, log_much, occupied_bytes

HERE = Path(__file__).parent


def test_long_log_keeps_its_beginning_and_its_end_where_they_were(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(MUCH)
    shorten(log)
    after = log.read_bytes()

    assert not is_too_long(log)
    assert len(after) == len(MUCH)
    assert after[:HEAD_BYTES] == MUCH[:HEAD_BYTES]
    assert after[-TAIL_BYTES:] == MUCH[-TAIL_BYTES:]
    assert last_lines(log, 2, start=len(MUCH) - 205) == f"{'x' * 99}\nlast", "offsets into it are good as before"


def test_log_within_the_limit_stays_as_it_is(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(MUCH[: MAX_LOG_BYTES - len(LINE)])
    shorten(log)
    assert log.read_bytes() == MUCH[: MAX_LOG_BYTES - len(LINE)]


def test_log_that_grows_on_is_shortened_again(tmp_path: Path) -> None:
    log = tmp_path / "log"
    for _ in range(3):
        log_much(log)
        shorten(log)
        assert not is_too_long(log)
    assert log.stat().st_size == 3 * len(MUCH)
    assert log.read_bytes()[-TAIL_BYTES:] == MUCH[-TAIL_BYTES:]


def test_no_log_is_fine_and_what_is_none_is_left_alone(tmp_path: Path) -> None:
    shorten(tmp_path / "log")
    assert not (tmp_path / "log").exists()
    other, link = tmp_path / "other", tmp_path / "link"
    other.write_bytes(MUCH)
    link.symlink_to(other)
    with pytest.raises(OSError, match="symbolic links"):
        shorten(link)
    assert other.read_bytes() == MUCH


async def test_log_of_a_process_that_prints_on_and_on_is_bounded_and_appended_to(tmp_path: Path) -> None:
    log, ready, logs = tmp_path / "log", tmp_path / "ready", LongLogs()
    os.mkfifo(ready)
    env = {"PYTHONPATH": str(HERE), "READY": str(ready)}
    process = await ProcessLauncher().launch(
        "children", spec=f"print-much {2 * MAX_LOG_BYTES}".encode(), log_path=log, env=env, name="child"
    )
    try:
        said = asyncio.create_task(asyncio.to_thread(ready.read_text))
        while not said.done():
            await logs.shorten([log])
        await logs.shorten([log])  # the last beat may have come in the middle

        assert said.result() == "last"
        assert occupied_bytes(log) <= MAX_LOG_BYTES < log.stat().st_size
        assert process.log_tail(1) == "last"
        assert log.read_bytes().startswith(b"first\n")
        assert stat.S_IMODE(log.stat().st_mode) == 0o600
    finally:
        await process.stop(0)


async def test_disk_without_holes_is_told_of_once_and_keeps_no_other_log_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    without, other, logs = tmp_path / "without", tmp_path / "other", LongLogs()

    def no_holes_in_one(path: Path) -> None:
        if path == without:
            raise OSError(95, "Operation not supported")
        shorten(path)

    monkeypatch.setattr(long_logs, "shorten", no_holes_in_one)
    for _ in range(2):
        for log in (without, other):
            log.write_bytes(MUCH)
        await logs.shorten([without, other])

        assert without.read_bytes() == MUCH
        assert not is_too_long(other)
    (warning,) = caplog.records
    assert (warning.getMessage(), warning.__dict__["path"]) == ("a log's size is not limited", str(without))


async def test_beat_that_comes_while_a_slow_disk_is_at_an_earlier_one_does_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, is_through, asked = asyncio.Event(), threading.Event(), []
    loop, logs = asyncio.get_running_loop(), LongLogs()

    def slowly(path: Path) -> None:
        asked.append(path.name)
        loop.call_soon_threadsafe(begun.set)
        is_through.wait(30)

    monkeypatch.setattr(long_logs, "shorten", slowly)
    first = asyncio.create_task(logs.shorten([tmp_path / "first"]))
    try:
        await begun.wait()
        await logs.shorten([tmp_path / "second"])
        assert asked == ["first"]
    finally:
        is_through.set()
        await first
    await logs.shorten([tmp_path / "third"])
    assert asked == ["first", "third"]
