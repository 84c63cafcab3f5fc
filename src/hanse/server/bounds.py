"""How much the server keeps of what others say: one site's long word must not be everybody's trouble.

A reason, a log's end or a client's metrics become part of a job's record, of every answer about it and of the events
that its watchers get. Each of these has to fit into one message, and none of them is cut off there.
"""

from collections.abc import Mapping
from typing import Final

from hanse.cell.refusals import MAX_CODE_CHARS, MAX_REASON_CHARS, shortened
from hanse.errors import ProtocolError

__all__ = ["MAX_CODE_CHARS", "MAX_REASON_CHARS", "check_metrics", "shortened"]

MAX_TAIL_CHARS: Final = 8 * 1024
"""What is kept of a log's end, which is its last part."""
TAIL_LINES: Final = 20
"""How many lines of a log's end say how its process ended."""
MAX_STARTS: Final = 1_000_000
"""The greatest number of a start of its process that a client may tell of; the next one must be a number still."""
MAX_METRICS: Final = 1000
MAX_METRIC_NAME_CHARS: Final = 128
MAX_RELEASE_CHARS: Final = 64


def ending(log: str) -> str:
    """Return the end of *log*, as much of it as is kept."""
    return log[-MAX_TAIL_CHARS:]


def check_metrics(metrics: Mapping[str, float]) -> None:
    """Return if *metrics* may be kept and passed on.

    Raises:
        ProtocolError: they are too many, or a name is too long.
    """
    if len(metrics) > MAX_METRICS:
        raise ProtocolError("number of metrics", got=len(metrics), expected=f"at most {MAX_METRICS}")
    longest = max(metrics, key=len, default="")
    if len(longest) > MAX_METRIC_NAME_CHARS:
        expected = f"at most {MAX_METRIC_NAME_CHARS} characters"
        raise ProtocolError("name of a metric", got=longest, expected=expected)
