"""Registrations under way: what a challenge left behind until the second half arrives.

One session per origin, used once, gone after ``max_duration_s``, and bounded in number, because whoever opens one has
proven nothing yet. An origin is the connection that the challenge came over, not the name it claims: otherwise anybody
could replace the session of the client that they name.
"""

from dataclasses import dataclass
from typing import Final

from hanse.errors import NotInService, ProtocolError, Unauthenticated
from hanse.ids import ClientName

NONCE_BYTES: Final = 32


@dataclass(frozen=True, slots=True)
class Session:
    """Both halves' part of the transcript, as far as the challenge settled it.

    Raises:
        ProtocolError: a nonce does not have ``NONCE_BYTES`` bytes.
    """

    client: ClientName
    project: str
    client_nonce: bytes
    server_nonce: bytes
    client_certificate: bytes = b""

    def __post_init__(self) -> None:
        for field, nonce in (("client_nonce", self.client_nonce), ("server_nonce", self.server_nonce)):
            if len(nonce) != NONCE_BYTES:
                raise ProtocolError(field, got=f"{len(nonce)} bytes", expected=f"{NONCE_BYTES} bytes")


class Admission:
    """The open registration sessions, at most *max_sessions*, each for at most *max_duration_s* seconds."""

    def __init__(self, max_sessions: int = 1024, max_duration_s: float = 60.0) -> None:
        if max_sessions < 1 or not max_duration_s > 0:
            raise ValueError(f"{max_sessions} sessions of {max_duration_s} s; expected at least 1, of more than 0 s")
        self.max_sessions = max_sessions
        self.max_duration_s = max_duration_s
        # In the order in which they were opened, which is the order in which they expire: all last equally long.
        self._sessions: dict[str, tuple[Session, float]] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    def open(self, origin: str, session: Session, *, now: float) -> None:
        """Remember *session* for *origin*, in place of an older one of the same origin.

        Raises:
            NotInService: too many others are open; the sentence says for how long.
        """
        self._evict(now)
        self._sessions.pop(origin, None)
        if len(self._sessions) >= self.max_sessions:
            oldest = next(iter(self._sessions.values()))[1]
            raise NotInService(
                f"Server not in service: {len(self._sessions)} registrations are under way, the most it takes; "
                f"try again in {oldest - now:.0f} s"
            )
        self._sessions[origin] = (session, now + self.max_duration_s)

    def take(self, origin: str, *, now: float) -> Session:
        """Return *origin*'s session and forget it: a second registration needs a challenge of its own.

        Raises:
            Unauthenticated: it has none, or it has expired.
        """
        self._evict(now)
        if origin not in self._sessions:
            raise Unauthenticated("no registration session: it was used, has expired, or there was no challenge")
        return self._sessions.pop(origin)[0]

    def _evict(self, now: float) -> None:
        while self._sessions:
            origin, (_, expires_at) = next(iter(self._sessions.items()))
            if expires_at > now:
                return
            del self._sessions[origin]
