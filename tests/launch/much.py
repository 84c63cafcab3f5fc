"""Logs that are longer than they may be."""

from pathlib import Path

from hanse.launch.process import MAX_LOG_BYTES

LINE = b"x" * 99 + b"\n"
MUCH = b"first\n" + LINE * (2 * MAX_LOG_BYTES // len(LINE)) + b"last\n"


def log_much(log: Path) -> None:
    """Append to *log*, as its process would."""
    with log.open("ab") as file:
        file.write(MUCH)


def occupied_bytes(log: Path) -> int:
    return log.stat().st_blocks * 512


def is_too_long(log: Path) -> bool:
    return occupied_bytes(log) > MAX_LOG_BYTES
