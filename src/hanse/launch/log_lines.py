"""How a process's log lines look: time, level, where from, the sentence, and the fields that belong to it.

The code logs a constant sentence with fields beside it (``extra``); a person reads both on one line, as in
``12:00:01.250 INFO client.job_cell: task received job=digits-1 task=train round=3``.
"""

import logging
from collections.abc import Mapping, MutableMapping
from typing import Any, Final

_STANDARD: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class FieldFormatter(logging.Formatter):
    """Formats a record with its fields behind the sentence, as ``name=value``; a traceback follows on its own lines."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s.%(msecs)03d %(levelname)s %(name)s: %(message)s", "%Y-%m-%d %H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the name is the library's
        """Return the line for *record*, without its traceback."""
        fields = [f"{name}={_shown(value)}" for name, value in vars(record).items() if name not in _STANDARD]
        return " ".join([super().formatMessage(record), *fields])


class FieldLogger(logging.LoggerAdapter[logging.Logger]):
    """A logger that adds the same *fields* to each of its lines, beside the line's own."""

    def __init__(self, logger: logging.Logger, fields: Mapping[str, object]) -> None:
        super().__init__(logger, fields)

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        """Return the line with both; the library's own adapter would drop the line's."""
        return msg, {**kwargs, "extra": {**(self.extra or {}), **kwargs.get("extra", {})}}


def log_to_stderr(level: int = logging.INFO) -> None:
    """Have this process's log lines of *level* and above go to its standard error, in place of what was set before."""
    handler = logging.StreamHandler()
    handler.setFormatter(FieldFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)


def _shown(value: object) -> str:
    text = str(value)
    return repr(text) if " " in text or "\n" in text or not text else text
