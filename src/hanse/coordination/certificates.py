"""When certificates end, participants' and the server's own, and what that means for whoever holds one.

The server has seen each certificate: at registration, or when TLS verified it for a stream. TLS looks at the end of a
certificate only when a connection opens, and of a peer that it refuses then the server hears nothing, not even the
name; so what is known here is all that can be said of it. What is kept is when the last certificate of each name ends:
here, and by the store, for the server that is next. Times are POSIX seconds.
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Final

from hanse.errors import CertificateExpired
from hanse.ids import ClientName

ENDS_SOON_S: Final = 30 * 86_400.0
"""How long before its end a certificate is warned of."""

EXPECTED_S: Final = 90 * 86_400.0
"""How long after the end of its certificate a client is still said to need a new one: a site that has gone without for
a quarter of a year has left the project."""


class CertificateEnds:
    """When the certificates of some participants end, as far as they have been seen."""

    def __init__(self) -> None:
        self._ends: dict[str, float] = {}
        self._news: dict[str, float] = {}
        self._warned: dict[str, float] = {}

    def note(self, name: str, ends_at: float) -> None:
        """Remember that *name*'s present certificate ends at *ends_at*."""
        if self._ends.get(name) != ends_at:
            self._ends[name] = self._news[name] = ends_at

    def warning(self, name: str, now_s: float) -> str:
        """Return what people should know of *name*'s certificate; empty when that is nothing, or was said before."""
        ends_at = self._ends.get(name)
        remark = remark_on(ends_at, now_s)
        if ends_at is None or not remark or self._warned.get(name) == ends_at:
            return ""
        self._warned[name] = ends_at
        return remark

    def of(self, name: str) -> float | None:
        """Return when *name*'s certificate ends; ``None`` when it has shown none."""
        return self._ends.get(name)

    def has_ended(self, name: str, now_s: float) -> bool:
        """Return whether the certificate that *name* has shown last has ended."""
        end = self._ends.get(name)
        return end is not None and end <= now_s

    def ended(self, now_s: float) -> dict[ClientName, float]:
        """Return the names whose certificate has ended, not longer ago than ``EXPECTED_S``, each with when."""
        return {ClientName(name): end for name, end in self._ends.items() if now_s - EXPECTED_S <= end <= now_s}

    def take_news(self) -> dict[str, float]:
        """Return when those certificates end of which the store has not been told; it is taken for told then."""
        news, self._news = self._news, {}
        return news

    def put_back(self, news: Mapping[str, float]) -> None:
        """Take the store for not told of *news*, as far as they still are."""
        self._news |= {name: end for name, end in news.items() if self._ends.get(name) == end}

    def restore(self, kept: Mapping[str, float]) -> None:
        """Know what the store has *kept*, and that alone but for the news of which it was not told."""
        self._ends = {**kept, **self._news}

    def token_lifetime_s(self, name: str, *, longest_s: float, now_s: float) -> float:
        """Return how long a token of *name* may last: at most *longest_s*, and never beyond its certificate.

        Raises:
            CertificateExpired: that has ended.
        """
        self.demand_valid(name, now_s)
        end = self._ends.get(name)
        return longest_s if end is None else min(longest_s, end - now_s)

    def demand_valid(self, name: str, now_s: float) -> None:
        """Let *name* pass, unless its certificate has ended.

        Raises:
            CertificateExpired: it has.
        """
        if self.has_ended(name, now_s):
            raise CertificateExpired(name, since=datetime.fromtimestamp(self._ends[name], UTC))


def remark_on(ends_at: float | None, now_s: float) -> str:
    """Return what people should know of a certificate that ends at *ends_at*; empty when it lasts for a while yet."""
    if ends_at is None or ends_at - now_s > ENDS_SOON_S:
        return ""
    if ends_at <= now_s:
        return expired_text(ends_at)
    return f"its certificate expires on {_when(ends_at)}, in {_days(ends_at - now_s)}; ask the project for a new one"


def servers_remark(ends_at: float, now_s: float) -> str:
    """Return what people should know of a server's own certificate that ends at *ends_at*; empty as ``remark_on``."""
    if ends_at - now_s > ENDS_SOON_S:
        return ""
    then = "nobody can connect until the server has a new one and is started again"
    if ends_at <= now_s:
        return f"it expired on {_when(ends_at)}, and {then}"
    return f"it expires on {_when(ends_at)}, in {_days(ends_at - now_s)}; from then on {then}"


def expired_text(ended_at: float) -> str:
    """Return what is said of a client whose certificate ended at *ended_at*."""
    return f"its certificate expired on {_when(ended_at)}, and it cannot connect until it has a new one"


def _days(seconds: float) -> str:
    return f"{int(seconds // 86_400)} days"


def _when(at: float) -> str:
    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M} UTC"
