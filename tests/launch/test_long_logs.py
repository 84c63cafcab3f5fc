import asyncio
import logging
import os
import stat
from pathlib import Path

import pytest

from hanse.launch import long_logs
from hanse.launch.long_logs import HEAD_BYTES, TAIL_BYTES, bounded_log, shorten
from hanse.launch.process import MAX_LOG_BYTES, ProcessLauncher, last_lines

HERE = Path(__file__).parent
LINE = b"x" * 99 + b"\n"
LONG = b"first\n" + LINE * (2 * MAX_LOG_BYTES // len(LINE)) + b"last\n"


def occupied_bytes(path: Path) -> int:
    return path.stat().st_blocks * 512


def test_long_log_keeps_its_beginning_and_its_end_where_they_were(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(LONG)
    shorten(log)
    after = log.read_bytes()

    assert occupied_bytes(log) <= MAX_LOG_BYTES
    assert len(after) == len(LONG)
    assert after[:HEAD_BYTES] == LONG[:HEAD_BYTES]
    assert after[-TAIL_BYTES:] == LONG[-TAIL_BYTES:]
    assert last_lines(log, 2, start=len(LONG) - 205) == f"{'x' * 99}\nlast", "offsets into it are good as before"


def test_log_within_the_limit_stays_as_it_is(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(LONG[: MAX_LOG_BYTES - len(LINE)])
    shorten(log)
    assert log.read_bytes() == LONG[: MAX_LOG_BYTES - len(LINE)]


def test_log_that_grows_on_is_shortened_again(tmp_path: Path) -> None:
    log = tmp_path / "log"
    for _ in range(3):
        with log.open("ab") as file:
            file.write(LONG)
        shorten(log)
        assert occupied_bytes(log) <= MAX_LOG_BYTES
    assert log.stat().st_size == 3 * len(LONG)
    assert log.read_bytes()[-TAIL_BYTES:] == LONG[-TAIL_BYTES:]


def test_no_log_is_fine_and_what_is_none_is_left_alone(tmp_path: Path) -> None:
    shorten(tmp_path / "log")
    assert not (tmp_path / "log").exists()
    other, link = tmp_path / "other", tmp_path / "link"
    other.write_bytes(LONG)
    link.symlink_to(other)
    with pytest.raises(OSError, match="symbolic links"):
        shorten(link)
    assert other.read_bytes() == LONG


async def test_log_of_a_process_that_prints_on_and_on_is_bounded_and_appended_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, ready = tmp_path / "log", tmp_path / "ready"
    make_hole, loop, is_made = long_logs._make_hole, asyncio.get_running_loop(), asyncio.Event()

    def told(descriptor: int, start: int, count: int) -> None:
        make_hole(descriptor, start, count)
        loop.call_soon_threadsafe(is_made.set)

    monkeypatch.setattr(long_logs, "_make_hole", told)
    os.mkfifo(ready)
    env = {"PYTHONPATH": str(HERE), "READY": str(ready)}
    process = await ProcessLauncher().launch(
        "children", spec=f"print-much {2 * MAX_LOG_BYTES}".encode(), log_path=log, env=env, name="child"
    )
    try:
        async with bounded_log(log, check_every_s=0.01):
            assert await asyncio.to_thread(ready.read_text) == "last"
            await is_made.wait()
        shorten(log)  # as the next look would have, if the last one came in the middle

        assert occupied_bytes(log) <= MAX_LOG_BYTES < log.stat().st_size
        assert process.log_tail(1) == "last"
        assert log.read_bytes().startswith(b"first\n")
        assert stat.S_IMODE(log.stat().st_mode) == 0o600
    finally:
        await process.stop(0)


async def test_disk_without_holes_is_told_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log, told = tmp_path / "log", asyncio.Event()
    log.write_bytes(LONG)

    class Told(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.set()

    def no_holes(descriptor: int, start: int, count: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(long_logs, "_make_hole", no_holes)
    monkeypatch.setattr(long_logs._log, "handlers", [Told()])
    async with asyncio.timeout(30), bounded_log(log, check_every_s=0.001):
        await told.wait()

    assert log.read_bytes() == LONG
    assert [record.getMessage() for record in caplog.records] == ["a log's size is not limited"]
