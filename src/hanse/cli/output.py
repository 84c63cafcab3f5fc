"""What a command prints: text for people, or one JSON document for scripts, on standard output; all else elsewhere.

Every command takes an ``Output``, which gives all of them the same options. Progress and logs go to standard error, so
that standard output holds the result and nothing else.
"""

import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Final, Literal

import msgspec
from cyclopts import Group, Parameter
from rich.console import Console
from rich.table import Table

from hanse.cli.terminal import printable

_GROUP: Final = Group("Output", sort_key=100)
_PIPE_COLUMNS: Final = 200
"""How wide a table may be where there is no terminal that would break its lines."""
_LAST_S: Final = datetime(9999, 12, 30, tzinfo=UTC).timestamp()
"""What is later than this may have no date in some time zone."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Output:
    """How a command prints."""

    format: Annotated[Literal["text", "json"], Parameter(group=_GROUP, help="Text for people, JSON for scripts.")] = (
        "text"
    )
    verbose: Annotated[bool, Parameter(group=_GROUP, negative=(), help="Show the log, and where errors are from.")] = (
        False
    )

    @property
    def is_json(self) -> bool:
        """Whether one JSON document is wanted."""
        return self.format == "json"

    def document(self, value: object) -> None:
        """Print *value*, a struct or plain data, as the JSON document that is this command's output."""
        _write(json.dumps(msgspec.to_builtins(value, enc_hook=str), indent=2))

    def line(self, value: object) -> None:
        """Print *value* as a JSON document in one line, for scripts that read on while the command runs."""
        _write(json.dumps(msgspec.to_builtins(value, enc_hook=str)))

    def say(self, *lines: str) -> None:
        """Print *lines*, a line each, without what a terminal would obey."""
        _write(*map(printable, lines))

    def table(self, heads: Sequence[str], rows: Iterable[Sequence[str]], *, nothing: str) -> None:
        """Print a table for people; *nothing* stands for one without rows."""
        table = Table(*heads, box=None, header_style="bold", pad_edge=False)
        for row in rows:
            table.add_row(*map(printable, row))
        console_on(sys.stdout.isatty()).print(table if table.row_count else nothing)


TEXT: Final = Output()
"""What a command is called with by default."""


def console_on(is_terminal: bool, *, stderr: bool = False) -> Console:
    """Return where formatted text goes: standard output, or standard error."""
    return Console(stderr=stderr, highlight=False, markup=False, width=None if is_terminal else _PIPE_COLUMNS)


def _write(*lines: str) -> None:
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()


def time_text(posix_s: float) -> str:
    """Return a time for people, in the time zone of this machine; a dash where it has not come, or cannot be one."""
    if posix_s >= _LAST_S:  # a deadline may be set so that it never comes
        return "after the year 9999"
    return f"{datetime.fromtimestamp(posix_s, UTC).astimezone():%Y-%m-%d %H:%M:%S}" if posix_s > 0 else "-"


def duration_text(seconds: float) -> str:
    """Return a duration for people: ``0.42 s``, ``3 min 05 s``, ``2 h 10 min``; a dash where it cannot be one.

    As between two times of which the clock was set back.
    """
    if not 0 <= seconds < math.inf:
        return "-"
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def metrics_text(metrics: dict[str, float]) -> str:
    """Return metrics for people, by name."""
    return "  ".join(f"{name} {value:.4g}" for name, value in sorted(metrics.items()))
