"""Who is registered, and who of them is there.

One entry a client, found by token or by name; a name has one token and a token one name. Two clocks run for an entry.
The *stream*: a client is connected while its stream is up, suspect when it breaks, and lost when none came back in
time, which its runs are told. The *heartbeat*: a client that was not heard of for long is dead, and its owner removes
it.

A token that was revoked is remembered until it would have expired, and never forgotten earlier. What bounds the memory
is that a name gets no further token while too many of its former ones are remembered.

Across restarts, and at a server that takes over, more is needed: of each name the one token that counts is known by its
fingerprint, which the store keeps, and any other of that name comes back no more.

Every rule about who may be in the table is checked where the table changes, so that no way in goes round one. What
comes out are copies: changing them changes nothing here.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from hanse.errors import NotInService, Unauthenticated
from hanse.ids import NAME_RULE, SERVER, ClientName, Fqcn, Token, is_name
from hanse.messages import Client

TOKEN_LIFETIME_S: Final = 3600.0

MAX_TOKENS_PER_NAME: Final = 256
"""How many tokens a name may have had within a token's lifetime: far more than one that renews at half of it needs."""


class Presence(StrEnum):
    """Whether a registered client's stream is there."""

    CONNECTED = "connected"
    SUSPECT = "suspect"
    LOST = "lost"


LEGAL: Final[Mapping[Presence, frozenset[Presence]]] = {
    Presence.CONNECTED: frozenset({Presence.SUSPECT}),
    Presence.SUSPECT: frozenset({Presence.CONNECTED, Presence.LOST}),
    Presence.LOST: frozenset({Presence.CONNECTED}),
}
"""What may follow what. A client registers as suspect: it is connected once its stream is known to be up."""


def fingerprint(token: Token) -> str:
    """Return what tells *token* from every other one, and cannot be used in its place."""
    return hashlib.sha256(token.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Registration:
    """A client that has just registered, and the one that held its name before (``None``: nobody did)."""

    client: Client
    replaced: Client | None = None


@dataclass(slots=True)
class _Entry:
    client: Client
    presence: Presence
    since: float
    stream: object = None


class Registry:
    """The registered clients, at most *max_clients*; *disabled* maps the names that may not be there to the reason.

    A revoked token is remembered for *token_lifetime_s* seconds; after that it has expired in any case. A name's
    present token and those remembered are at most *max_tokens_per_name*, 2 or more.
    """

    def __init__(
        self,
        max_clients: int,
        *,
        disabled: Mapping[ClientName, str] | None = None,
        token_lifetime_s: float = TOKEN_LIFETIME_S,
        max_tokens_per_name: int = MAX_TOKENS_PER_NAME,
    ) -> None:
        if max_clients < 1:
            raise ValueError(f"max_clients is {max_clients}; expected 1 or more")
        if max_tokens_per_name < 2:  # with one, nobody could ever renew
            raise ValueError(f"max_tokens_per_name is {max_tokens_per_name}; expected 2 or more")
        self.max_clients = max_clients
        self.max_tokens_per_name = max_tokens_per_name
        self.token_lifetime_s = token_lifetime_s
        self._by_token: dict[Token, _Entry] = {}
        self._tokens: dict[ClientName, Token] = {}
        self._disabled: dict[ClientName, str] = dict(disabled or {})
        # Both oldest first. A token that was nobody's when it was revoked is under no name.
        self._revoked: dict[Token, ClientName | None] = {}
        self._revoked_at: dict[ClientName | None, dict[Token, float]] = {}
        # Since when which token of a name counts, by its fingerprint ("": none does); the oldest first.
        self._counting: dict[ClientName, tuple[str, float]] = {}

    # who comes and goes

    def register(
        self, name: ClientName, token: Token, *, fqcn: Fqcn, now: float, props: Mapping[str, object] | None = None
    ) -> Registration:
        """Register *name* under *token*, in place of an older registration of that name, whose token is revoked.

        The same name and token again refreshes the entry and replaces nothing.

        Raises:
            Unauthenticated: the name cannot be a client's, is disabled, there is no place left, or the token is
                another client's or revoked.
            NotInService: the name has had too many tokens of late; the sentence says how long to wait.
        """
        self._demand_admissible(name, token)
        if token in self._by_token:
            client = self._by_token[token].client
            client.fqcn, client.props = fqcn, deepcopy(dict(props or {}))
            return Registration(self._refresh(token, now))
        self._demand_few_tokens(name, now)
        former = self._tokens.get(name)
        replaced = self.revoke(former, now=now) if former is not None else None
        self._let_count(name, fingerprint(token), now)
        return Registration(self._add(name, token, fqcn=fqcn, now=now, props=props), replaced)

    def reactivate(
        self, name: ClientName, token: Token, *, fqcn: Fqcn, now: float, props: Mapping[str, object] | None = None
    ) -> Client:
        """Take back *name*, whose validly signed *token* this registry does not know: the server was started again.

        A token that is registered under that name is only refreshed, its address and properties stay as they are.

        Raises:
            Unauthenticated: as for ``register``, and when another token holds the name, or has since *token* was given.
            NotInService: as for ``register``.
        """
        self._demand_admissible(name, token)
        if self._tokens.get(name, token) != token:
            raise Unauthenticated(f"Client ID already registered as a client: {name}")
        if token in self._by_token:
            return self._refresh(token, now)
        self._demand_few_tokens(name, now)
        if self.is_superseded(name, token):
            raise Unauthenticated("the token was revoked; register again")
        return self._add(name, token, fqcn=fqcn, now=now, props=props)

    def heard(self, token: Token, *, now: float) -> Client | None:
        """Note that *token*'s client is alive, and return it; ``None`` when no client is registered under it.

        Raises:
            Unauthenticated: the client is disabled.
        """
        entry = self._by_token.get(token)
        if entry is None:
            return None
        self._demand_enabled(entry.client.name)
        return self._refresh(token, now)

    def renew(self, old: Token, new: Token, *, now: float) -> Client:
        """Give the client registered under *old* the token *new*; *old* is revoked.

        Raises:
            Unauthenticated: no client is registered under *old*, the client is disabled, or *new* is another's or
                revoked.
            NotInService: as for ``register``; *old* still counts.
        """
        entry = self._renewable(old, new, now)
        if new != old:
            self._revoke(old, now)
            self._let_count(entry.client.name, fingerprint(new), now)
            del self._by_token[old]
            self._by_token[new] = entry
            self._tokens[entry.client.name] = new
            entry.client.token = new
        return self._refresh(new, now)

    def demand_renewable(self, old: Token, new: Token, *, now: float) -> None:
        """Raise what ``renew`` would, and change nothing."""
        self._renewable(old, new, now)

    def remove(self, token: Token) -> Client | None:
        """Remove and return the client registered under *token*; ``None`` when there is none.

        Its token may come back (``reactivate``): this is for a client that was not heard of and has done nothing wrong.
        """
        entry = self._by_token.pop(token, None)
        if entry is None:
            return None
        del self._tokens[entry.client.name]
        return entry.client

    def revoke(self, token: Token, *, now: float) -> Client | None:
        """Remove and return the client registered under *token*, if any, and never take that token again.

        This is for a client that quit, was replaced or was disabled; it can register, under a new token.
        """
        self._revoke(token, now)
        return self.remove(token)

    def is_revoked(self, token: Token) -> bool:
        """Return whether *token* was revoked, so that it counts no more although it has not expired."""
        return token in self._revoked

    def is_superseded(self, name: ClientName, token: Token) -> bool:
        """Return whether *name* has had another token since *token*, or given up its last, here or elsewhere."""
        counting, _ = self._counting.get(name, (None, 0.0))
        return counting is not None and counting != fingerprint(token)

    def counting(self, name: ClientName) -> str:
        """Return the fingerprint of *name*'s token that counts; empty when none does, or none is known to."""
        return self._counting.get(name, ("", 0.0))[0]

    def count_only(self, counting: Mapping[ClientName, str], *, now: float) -> list[Client]:
        """Have only those tokens count whose fingerprints are *counting*, for names that are there; revoke others.

        What is known of names that are not there stays.

        Returns: The clients that were registered under a token that counts no more, which are removed.
        """
        for name, of_token in counting.items():
            self._let_count(name, of_token, now)
        gone = [token for token, entry in self._by_token.items() if self.is_superseded(entry.client.name, token)]
        removed = []
        for token in gone:
            of_token = self.counting(self._by_token[token].client.name)
            client = self.revoke(token, now=now)
            if client is not None:
                self._let_count(client.name, of_token, now)
                removed.append(client)
        return removed

    def disable(self, name: ClientName, reason: str, *, now: float) -> Client | None:
        """Refuse *name* from now on; return its registered client, whom the caller logs out, or ``None``.

        No token that it had counts any more, wherever it is.
        """
        self._disabled[name] = reason
        self._let_count(name, "", now)
        return self.by_name(name)

    def enable(self, name: ClientName) -> None:
        """Refuse *name* no longer; it must register again."""
        self._disabled.pop(name, None)

    # who is there

    def __len__(self) -> int:
        return len(self._by_token)

    def by_token(self, token: Token) -> Client | None:
        """Return the client registered under *token*, or ``None``."""
        return _copies(self._by_token.get(token))

    def by_name(self, name: ClientName) -> Client | None:
        """Return the client registered as *name*, or ``None``."""
        return _copies(self._entry_named(name))

    def snapshot(self) -> dict[Token, Client]:
        """Return all registered clients by token, as copies."""
        return {token: deepcopy(entry.client) for token, entry in self._by_token.items()}

    def disabled(self) -> dict[ClientName, str]:
        """Return the disabled names, each with the reason."""
        return dict(self._disabled)

    def presence(self, name: ClientName) -> Presence | None:
        """Return whether *name*'s stream is there; ``None`` when it is not registered."""
        entry = self._entry_named(name)
        return entry.presence if entry is not None else None

    def note(self, token: Token, props: Mapping[str, object]) -> None:
        """Set *props* on the client registered under *token*, beside those it has; an unknown token is ignored."""
        entry = self._by_token.get(token)
        if entry is not None:
            entry.client.props.update(deepcopy(dict(props)))

    # time

    def stream_up(self, name: ClientName, *, now: float, stream: object = None) -> Presence | None:
        """Note that *name*'s stream is up; return what its presence was, ``None`` when it is not registered.

        *stream* identifies it, so that the end of the one that it replaced can be told from its own, in either order.
        """
        entry = self._entry_named(name)
        if entry is None:
            return None
        before = entry.presence
        entry.stream = stream
        if before is not Presence.CONNECTED:
            _move(entry, Presence.CONNECTED, now)
        return before

    def stream_down(self, name: ClientName, *, now: float, stream: object = None) -> bool:
        """Note that *name*'s *stream* broke; return whether this made the client suspect.

        It does not when the client is not registered, was not connected, or has another stream by now.
        """
        entry = self._entry_named(name)
        if entry is None or entry.presence is not Presence.CONNECTED or entry.stream is not stream:
            return False
        entry.stream = None
        _move(entry, Presence.SUSPECT, now)
        return True

    def lost(self, now: float, lost_after_s: float) -> list[Client]:
        """Return the clients that are lost since the last call: suspect for *lost_after_s* seconds or longer."""
        newly = [
            entry
            for entry in self._by_token.values()
            if entry.presence is Presence.SUSPECT and entry.since + lost_after_s <= now
        ]
        for entry in newly:
            _move(entry, Presence.LOST, now)
        return _sorted_copies(newly)

    def dead(self, now: float, timeout_s: float) -> list[Client]:
        """Return the clients not heard of for *timeout_s* seconds or longer; the caller removes them."""
        return _sorted_copies(
            entry for entry in self._by_token.values() if entry.client.last_connect_time + timeout_s <= now
        )

    def next_deadline(self, *, timeout_s: float, lost_after_s: float) -> float | None:
        """Return the earliest time at which ``dead`` or ``lost`` will return somebody new if nothing happens first.

        ``None`` when there is nobody to wait for.
        """
        deadlines = [entry.client.last_connect_time + timeout_s for entry in self._by_token.values()]
        deadlines += [e.since + lost_after_s for e in self._by_token.values() if e.presence is Presence.SUSPECT]
        return min(deadlines, default=None)

    # rules

    def _renewable(self, old: Token, new: Token, now: float) -> _Entry:
        entry = self._by_token.get(old)
        if entry is None:
            raise Unauthenticated("the token is not a registered client's; register again")
        self._demand_admissible(entry.client.name, new)
        if new != old:
            self._demand_few_tokens(entry.client.name, now)
        return entry

    def _let_count(self, name: ClientName, of_token: str, now: float) -> None:
        self._counting.pop(name, None)
        self._counting[name] = (of_token, now)

    def _demand_admissible(self, name: ClientName, token: Token) -> None:
        if not is_name(name) or str(name) == SERVER:
            raise Unauthenticated(f"{name!r:.80} cannot be a client's name: {NAME_RULE}, and not {SERVER!r}")
        self._demand_enabled(name)
        if token in self._revoked:
            raise Unauthenticated("the token was revoked; register again")
        holder = self._by_token.get(token)
        if holder is not None and holder.client.name != name:
            raise Unauthenticated("the token is another client's")
        if name not in self._tokens and len(self._by_token) >= self.max_clients:
            raise Unauthenticated(
                f"the server is full: {len(self._by_token)} clients are registered, and it takes {self.max_clients}"
            )

    def _demand_few_tokens(self, name: ClientName, now: float) -> None:
        """Let *name* have one token more, if what it has and had then stays within the bound."""
        self._forget_expired(now)
        revoked = self._revoked_at.get(name, {})
        if len(revoked) + (name in self._tokens) >= self.max_tokens_per_name:
            wait_s = math.ceil(next(iter(revoked.values())) + self.token_lifetime_s - now)
            raise NotInService(
                f"client {name} has had {self.max_tokens_per_name} tokens within {self.token_lifetime_s:g} s, "
                f"as many as it may; try again in {wait_s} s"
            )

    def _demand_enabled(self, name: ClientName) -> None:
        if name in self._disabled:
            reason = self._disabled[name]
            raise Unauthenticated(f"client {name} is disabled{f': {reason}' if reason else ''}")

    def _add(
        self, name: ClientName, token: Token, *, fqcn: Fqcn, now: float, props: Mapping[str, object] | None
    ) -> Client:
        client = Client(name, token, fqcn, last_connect_time=now, props=deepcopy(dict(props or {})))
        self._by_token[token] = _Entry(client, Presence.SUSPECT, now)
        self._tokens[name] = token
        return deepcopy(client)

    def _refresh(self, token: Token, now: float) -> Client:
        client = self._by_token[token].client
        client.last_connect_time = now
        return deepcopy(client)

    def _revoke(self, token: Token, now: float) -> None:
        self._forget_expired(now)
        entry = self._by_token.get(token)
        name = self._forget(token) if token in self._revoked else (entry.client.name if entry is not None else None)
        self._revoked[token] = name
        self._revoked_at.setdefault(name, {})[token] = now
        if entry is not None:
            self._let_count(entry.client.name, "", now)

    def _forget_expired(self, now: float) -> None:
        while self._revoked:
            oldest, name = next(iter(self._revoked.items()))
            if self._revoked_at[name][oldest] + self.token_lifetime_s > now:
                break
            self._forget(oldest)
        while self._counting:
            longest, (_, since) = next(iter(self._counting.items()))
            if since + self.token_lifetime_s > now:
                break
            del self._counting[longest]  # what it was given before has expired, and so has this

    def _forget(self, token: Token) -> ClientName | None:
        name = self._revoked.pop(token)
        of_name = self._revoked_at[name]
        del of_name[token]
        if not of_name:
            del self._revoked_at[name]
        return name

    def _entry_named(self, name: ClientName) -> _Entry | None:
        token = self._tokens.get(name)
        return None if token is None else self._by_token[token]


def _move(entry: _Entry, to: Presence, now: float) -> None:
    if to not in LEGAL[entry.presence]:
        raise ValueError(f"a client that is {entry.presence} cannot become {to}")
    entry.presence, entry.since = to, now


def _copies(entry: _Entry | None) -> Client | None:
    return deepcopy(entry.client) if entry is not None else None


def _sorted_copies(entries: Iterable[_Entry]) -> list[Client]:
    return sorted((deepcopy(entry.client) for entry in entries), key=lambda client: client.name)
