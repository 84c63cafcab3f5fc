"""How a command that did not do what it was asked ends: a sentence on standard error, and an exit status.

An error of Hanse's own has its exit status in its class. One that a server answered with ends the command as the same
error would have here. Whatever else is raised is a bug, and says so.
"""

import json
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from hanse.cli.terminal import printable
from hanse.codes import advice
from hanse.errors import ConfigError, EnvironmentFault, HanseError, InternalError

USAGE: Final = ConfigError.exit_status
"""The arguments are not what the command takes."""

INTERRUPTED: Final = 130
"""Ctrl-C, by the shells' convention: 128 and the signal's number."""


@dataclass(frozen=True, slots=True)
class Failure:
    """What went wrong: a stable code, a sentence, and the exit status."""

    code: str
    reason: str
    status: int

    def tell(self, *, as_json: bool) -> int:
        """Write it to standard error and return the exit status."""
        document = {"error": {"code": self.code, "reason": self.reason, "advice": advice(self.code)}}
        line = json.dumps(document) if as_json else printable(f"hanse: {self.reason} [{self.code}]")
        sys.stderr.write(f"{line}\n")
        return self.status


def failure_of(error: Exception, *, with_traceback: bool = False) -> Failure:
    """Return how the command ends that raised *error*; the traceback is written to standard error if asked for."""
    if with_traceback:
        traceback.print_exception(error)
    if isinstance(error, HanseError):
        code = getattr(error, "error_code", "") or error.code  # a server's answer: what was raised there
        return Failure(code, error.reason, _statuses().get(code, error.exit_status))
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        return Failure(EnvironmentFault.code, f"{place}{error.strerror or error}", EnvironmentFault.exit_status)
    what = f"Hanse failed: {type(error).__name__}: {error}; this is a bug (--verbose shows where)"
    return Failure(InternalError.code, what, InternalError.exit_status)


def wants_json(tokens: Sequence[str]) -> bool:
    """Return whether *tokens* ask for JSON; they may be such as cannot be parsed."""
    return "--format=json" in tokens or ("--format", "json") in pairwise(tokens)


def wants_log(tokens: Sequence[str]) -> bool:
    """Return whether *tokens* ask to see more of what happens."""
    return "--verbose" in tokens


def _statuses() -> Mapping[str, int]:
    return {kind.code: kind.exit_status for kind in _tree(HanseError)}


def _tree(kind: type[HanseError]) -> Iterator[type[HanseError]]:
    yield kind
    for below in kind.__subclasses__():
        yield from _tree(below)
