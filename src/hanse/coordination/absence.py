"""Why clients are not there, where that is known: a certificate that has ended, a refusal."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from hanse.ids import ClientName


@dataclass(frozen=True, slots=True)
class Absence:
    """Why a client cannot come: a stable *code*, and what is said of it."""

    code: str
    why: str


NOBODY: Final[Mapping[ClientName, Absence]] = MappingProxyType({})
"""There is no client of which it is known why it is absent."""


def disabled_text(name: ClientName, reason: str) -> str:
    """Return what is said of *name*, which is refused because of *reason*, wherever it is waited for."""
    return f"it is disabled{f' ({reason})' if reason else ''}; 'hanse client enable {name}' lets it in again"


def with_absence(reason: str, name: ClientName, absent: Mapping[ClientName, Absence]) -> str:
    """Return *reason*, what is known of *name*, which is not there, with why it is *absent*, if that is known."""
    if name not in absent:
        return reason
    return f"{reason}: {absent[name].why}" if reason else absent[name].why
