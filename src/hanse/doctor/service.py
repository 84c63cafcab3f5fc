"""What a server that can be reached says: which release it is, what time it has, and whether it is who it should be."""

import platform
from dataclasses import dataclass
from typing import Final

from hanse.cell.cell import RemoteError
from hanse.doctor.findings import Check, Finding, fail, ok, skip, warn
from hanse.errors import EnvironmentFault, HanseError, NotInService, ProtocolError, VersionMismatch
from hanse.identity.authorities import BACKDATED
from hanse.messages import Welcome

LOOSE_CLOCK_S: Final = 30.0
"""Clocks that are further apart than this make logs hard to compare."""

WRONG_CLOCK_S: Final = BACKDATED.total_seconds()
"""Clocks that are further apart than this make a fresh certificate not valid yet at the slower one."""


@dataclass(frozen=True, slots=True)
class ClockReading:
    """The server's time of day, told between two of this machine's, all POSIX seconds."""

    before: float
    server: float
    after: float

    @property
    def ahead_s(self) -> float:
        """How far this machine's clock is ahead, at least; negative when it is behind.

        How long the answer took to come is not known, so any difference within that time is none.
        """
        if self.server < self.before:
            return self.before - self.server
        return min(self.after - self.server, 0.0)


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of a stream to the server: its *welcome*, or the *refusal*; then whether it has proven itself.

    *doubt* is why it has not; *is_proven* is false without one where nothing proves anything, without TLS.
    """

    welcome: Welcome | None = None
    refusal: HanseError | None = None
    is_proven: bool = False
    doubt: HanseError | None = None
    clock: ClockReading | None = None


def judge_answer(target: str, answer: Answer) -> Finding:
    """Return whether a server of this project answers, and serves."""
    if answer.welcome is not None:
        return ok(Check.ANSWER, f"{answer.welcome.server!r} answers", about=target)
    refusal = answer.refusal or ProtocolError("answer", got=None, expected="a welcome")
    if isinstance(refusal, RemoteError) and refusal.error_code == VersionMismatch.code:
        why = f"the server at {target} says: {refusal.reason}; update Hanse where it is older"
        told = RemoteError(why, return_code=refusal.return_code, error_code=refusal.error_code)
        return fail(Check.ANSWER, told, about=target)
    if isinstance(refusal, NotInService):
        why = f"the server at {target} starts, stops or stands by for another, and serves nobody now ({refusal.reason})"
        return fail(Check.ANSWER, NotInService(why), about=target)
    return fail(Check.ANSWER, refusal, about=target)


def judge_identity(target: str, answer: Answer) -> Finding:
    """Return whether the server has proven to be the project's, by its key and by nothing that a proxy could have."""
    if answer.doubt is not None:
        return fail(Check.IDENTITY, answer.doubt, about=target)
    if not answer.is_proven:
        return warn(Check.IDENTITY, "nothing is proven without TLS: for loopback and tests only", about=target)
    return ok(Check.IDENTITY, "the server has proven who it is; nothing was registered", about=target)


def judge_clock(target: str, reading: ClockReading | None, *, whose: str = "the server") -> Finding:
    """Return whether this machine and *whose* clock was read at *target* agree on the time of day."""
    if reading is None:
        text = f"{whose} does not tell its time; by this machine's, both certificates are valid"
        return ok(Check.CLOCK, text, about=target)
    apart_s = abs(reading.ahead_s)
    if apart_s <= LOOSE_CLOCK_S:
        return ok(
            Check.CLOCK, f"within {max(apart_s, reading.after - reading.before):.1f} s of {whose}'s", about=target
        )
    text = f"this machine's clock is {apart_s:.0f} s {'ahead of' if reading.ahead_s > 0 else 'behind'} {whose}'s"
    if apart_s <= WRONG_CLOCK_S:
        return warn(Check.CLOCK, f"{text}: set both by NTP, or their logs cannot be compared", about=target)
    error = EnvironmentFault(f"{text}: set both by NTP; certificates that are made now will not be valid at both")
    return fail(Check.CLOCK, error, about=target)


def judge_versions(target: str, release: str, welcome: Welcome | None) -> Finding:
    """Return whether both are of one *release*, and which protocol and Python there is."""
    if welcome is None:
        return skip(Check.VERSIONS, "the server did not answer", about=target)
    here = f"Python {platform.python_version()}, protocol {welcome.version}"
    if welcome.release == release:
        return ok(Check.VERSIONS, f"Hanse {release} on both sides, {here}", about=target)
    theirs = f"Hanse {welcome.release}" if welcome.release else "a release that it does not tell"
    text = f"Hanse {release} here, and {theirs} at the server: update the older one ({here})"
    return warn(Check.VERSIONS, text, about=target)
