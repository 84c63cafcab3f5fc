"""Logs on standard error: a line an event, with the fields that its ``extra`` gave it, as text or as JSON."""

import json
import logging
import sys
import time
from typing import Final

_OWN: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
"""What every record has; the rest are fields of this event."""


class TextFormatter(logging.Formatter):
    """``2026-01-31 12:00:00 INFO hanse.server client registered client=site-1``."""

    def format(self, record: logging.LogRecord) -> str:
        """Return *record* as a line; a traceback follows in further ones."""
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        fields = "".join(f" {name}={_plain(value)}" for name, value in fields_of(record).items())
        line = f"{when} {record.levelname} {record.name} {record.getMessage()}{fields}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ``time`` (POSIX seconds), ``level``, ``logger``, ``message``, and the event's fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Return *record* as a line."""
        entry: dict[str, object] = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields_of(record) | entry, default=str)


def fields_of(record: logging.LogRecord) -> dict[str, object]:
    """Return the fields that the event was logged with, in their order."""
    return {name: value for name, value in vars(record).items() if name not in _OWN}


def show_logs(level: int, *, as_json: bool, verbose: bool) -> None:
    """Show on standard error what Hanse logs at *level* and above; all of it if *verbose*."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if as_json else TextFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("hanse").setLevel(logging.DEBUG if verbose else level)


def _plain(value: object) -> str:
    text = str(value)
    return json.dumps(text) if not text.isprintable() or not text or any(mark in text for mark in ' "=') else text
