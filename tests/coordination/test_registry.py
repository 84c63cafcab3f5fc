"""The registry: who gets in by which way, what a token is good for, and what time does to a client."""

from itertools import product

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from hanse.coordination import registry as registry_module
from hanse.coordination.registry import LEGAL, Presence, Registration, Registry, fingerprint
from hanse.errors import NotInService, Unauthenticated
from hanse.ids import ClientName, Fqcn, Token
from hanse.messages import Client

ONE, TWO, THREE = ClientName("site-1"), ClientName("site-2"), ClientName("site-3")
A, B, C = Token("token-a"), Token("token-b"), Token("token-c")


def fqcn(name: ClientName) -> Fqcn:
    return Fqcn(str(name))


def register(registry: Registry, name: ClientName, token: Token, now: float = 0.0) -> Registration:
    return registry.register(name, token, fqcn=fqcn(name), now=now)


def reactivate(registry: Registry, name: ClientName, token: Token, now: float = 0.0) -> Client:
    return registry.reactivate(name, token, fqcn=fqcn(name), now=now)


# registering


def test_a_registered_client_is_found_by_token_and_by_name() -> None:
    registry = Registry(10)
    registration = registry.register(ONE, A, fqcn=fqcn(ONE), now=7.0, props={"release": "1"})

    expected = Client(ONE, A, fqcn(ONE), 7.0, {"release": "1"})
    assert registration == Registration(expected, replaced=None)
    assert registry.by_token(A) == registry.by_name(ONE) == expected
    assert registry.snapshot() == {A: expected}
    assert len(registry) == 1


def test_who_is_not_registered_is_not_found() -> None:
    registry = Registry(10)

    assert registry.by_token(A) is None
    assert registry.by_name(ONE) is None
    assert registry.presence(ONE) is None


def test_the_same_name_again_replaces_the_older_registration_completely() -> None:
    registry = Registry(10)
    register(registry, ONE, A, now=1)
    registration = register(registry, ONE, B, now=2)

    assert registration.replaced is not None
    assert registration.replaced.token == A
    assert registry.by_token(A) is None
    assert registry.heard(A, now=3) is None
    assert list(registry.snapshot()) == [B]


def test_a_replaced_token_cannot_come_back_even_when_the_name_is_free_again() -> None:
    registry = Registry(10)
    register(registry, ONE, A)
    register(registry, ONE, B)
    registry.remove(B)

    with pytest.raises(Unauthenticated, match="revoked"):
        reactivate(registry, ONE, A)
    assert len(registry) == 0


def test_the_same_name_and_token_again_refreshes_and_replaces_nothing() -> None:
    registry = Registry(1)
    register(registry, ONE, A, now=1)
    registry.stream_up(ONE, now=1)
    registration = registry.register(ONE, A, fqcn=Fqcn("elsewhere"), now=2, props={"release": "2"})

    assert registration == Registration(Client(ONE, A, Fqcn("elsewhere"), 2, {"release": "2"}))
    assert registry.presence(ONE) is Presence.CONNECTED


def test_a_full_server_registers_nobody_else() -> None:
    registry = Registry(2)
    register(registry, ONE, A)
    register(registry, TWO, B)

    with pytest.raises(Unauthenticated, match="the server is full: 2 clients are registered, and it takes 2"):
        register(registry, THREE, C)
    assert list(registry.snapshot()) == [A, B]


def test_a_full_server_still_lets_a_registered_client_register_again() -> None:
    registry = Registry(1)
    register(registry, ONE, A)

    assert register(registry, ONE, B).replaced is not None
    assert len(registry) == 1


def test_a_removed_client_gives_its_place_back() -> None:
    registry = Registry(1)
    register(registry, ONE, A)
    registry.remove(A)

    assert register(registry, TWO, B).client.name == TWO


@pytest.mark.parametrize("name", ["", "server", "site.1", "../etc", "a" * 64, "site 1"])
def test_a_name_that_cannot_be_a_clients_is_refused(name: str) -> None:
    registry = Registry(10)

    with pytest.raises(Unauthenticated, match="cannot be a client's name"):
        register(registry, ClientName(name), A)
    with pytest.raises(Unauthenticated, match="cannot be a client's name"):
        reactivate(registry, ClientName(name), A)
    assert len(registry) == 0


def test_another_clients_token_is_refused_and_changes_nothing() -> None:
    registry = Registry(10)
    register(registry, ONE, A)
    register(registry, TWO, B)

    for attempt in (register, reactivate):
        with pytest.raises(Unauthenticated, match="another client's"):
            attempt(registry, TWO, A)
    with pytest.raises(Unauthenticated, match="another client's"):
        registry.renew(B, A, now=1)
    assert {token: client.name for token, client in registry.snapshot().items()} == {A: ONE, B: TWO}


def test_a_registry_for_nobody_is_refused() -> None:
    with pytest.raises(ValueError, match="max_clients is 0"):
        Registry(0)


# copies


def test_changing_what_comes_out_changes_nothing_inside() -> None:
    registry = Registry(10)
    props: dict[str, object] = {"tags": ["gpu"]}
    given = registry.register(ONE, A, fqcn=fqcn(ONE), now=0, props=props).client
    before = registry.by_token(A)
    table = registry.snapshot()
    copies = [given, table[A], registry.by_token(A), registry.by_name(ONE), registry.heard(A, now=0)]
    copies += registry.dead(1e9, 1)
    for copy in copies:
        assert copy is not None
        copy.token, copy.name, copy.last_connect_time = Token("x"), ClientName("y"), -1.0
        copy.props["tags"].append("mine")  # type: ignore[attr-defined]  # a list, two lines above
    table.clear()
    props.clear()
    registry.disabled()[ONE] = "mine"

    assert registry.by_token(A) == before
    assert registry.disabled() == {}


def test_notes_are_kept_beside_what_the_client_said() -> None:
    registry = Registry(10)
    registry.register(ONE, A, fqcn=fqcn(ONE), now=0, props={"release": "1", "jobs": 0})
    registry.note(A, {"jobs": 2})
    registry.note(B, {"jobs": 3})

    client = registry.by_token(A)
    assert client is not None
    assert client.props == {"release": "1", "jobs": 2}


# heartbeats, reactivation, renewal


def test_hearing_a_client_refreshes_it() -> None:
    registry = Registry(10)
    register(registry, ONE, A, now=1)

    heard = registry.heard(A, now=5)
    assert heard is not None
    assert heard.last_connect_time == 5


def test_a_token_from_before_a_restart_is_taken_back() -> None:
    registry = Registry(10)
    client = registry.reactivate(ONE, A, fqcn=fqcn(ONE), now=3, props={"release": "1"})

    assert client == Client(ONE, A, fqcn(ONE), 3, {"release": "1"})
    assert registry.by_name(ONE) == client


def test_reactivating_a_registered_token_only_refreshes_it() -> None:
    registry = Registry(1)
    registry.register(ONE, A, fqcn=fqcn(ONE), now=1, props={"release": "1"})
    registry.stream_up(ONE, now=1)

    assert reactivate(registry, ONE, A, now=9) == Client(ONE, A, fqcn(ONE), 9, {"release": "1"})
    assert registry.presence(ONE) is Presence.CONNECTED


def test_a_token_does_not_come_back_while_another_holds_its_name() -> None:
    registry = Registry(10)
    register(registry, ONE, B)

    with pytest.raises(Unauthenticated, match="Client ID already registered as a client: site-1"):
        reactivate(registry, ONE, A)
    assert list(registry.snapshot()) == [B]


def test_a_heartbeat_is_no_way_round_the_limit_on_clients() -> None:
    registry = Registry(1)
    register(registry, ONE, A)

    with pytest.raises(Unauthenticated, match="full"):
        reactivate(registry, TWO, B)
    assert len(registry) == 1


def test_a_client_that_was_dead_may_come_back_with_its_token() -> None:
    registry = Registry(10)
    register(registry, ONE, A)
    assert registry.remove(A) is not None

    assert reactivate(registry, ONE, A).token == A


def test_a_client_that_quit_must_register_again() -> None:
    registry = Registry(10)
    register(registry, ONE, A)
    quitter = registry.revoke(A, now=1)

    assert quitter is not None
    assert quitter.name == ONE
    assert registry.is_revoked(A)
    for attempt in (reactivate, register):
        with pytest.raises(Unauthenticated, match="the token was revoked; register again"):
            attempt(registry, ONE, A, now=2)
    assert register(registry, ONE, B, now=2).replaced is None
    assert not registry.is_revoked(B)


def test_removing_or_revoking_an_unknown_token_returns_nobody() -> None:
    registry = Registry(10)
    register(registry, ONE, A)

    assert registry.remove(B) is None
    assert registry.revoke(C, now=0) is None
    assert len(registry) == 1


def test_a_revoked_token_is_remembered_for_its_lifetime_and_no_longer() -> None:
    registry = Registry(10, token_lifetime_s=100)
    registry.revoke(A, now=0)
    registry.revoke(B, now=50)
    registry.revoke(A, now=60)

    registry.revoke(C, now=150)
    assert reactivate(registry, TWO, B, now=150).token == B
    with pytest.raises(Unauthenticated, match="revoked"):
        reactivate(registry, ONE, A, now=159)
    registry.revoke(Token("token-d"), now=160)
    assert reactivate(registry, ONE, A, now=160).token == A


def token(number: int) -> Token:
    return Token(f"token-{number}")


def filled(*, last: int = 3) -> Registry:
    """A registry for 4 tokens a name, where *ONE* has had tokens 0 to *last* at these times, and has the last."""
    registry = Registry(10, token_lifetime_s=100, max_tokens_per_name=4)
    for number in range(last + 1):
        register(registry, ONE, token(number), now=number)
    return registry


def test_a_name_that_has_had_too_many_tokens_gets_none_until_the_oldest_has_expired() -> None:
    registry = filled()
    before = registry.snapshot()
    ways_in = (
        lambda now: register(registry, ONE, token(4), now=now),
        lambda now: registry.renew(token(3), token(4), now=now),
    )

    for now, wait_s in ((10, 91), (100.5, 1)):
        for way_in in ways_in:
            with pytest.raises(NotInService) as refused:
                way_in(now)
            assert refused.value.reason == (
                f"client site-1 has had 4 tokens within 100 s, as many as it may; try again in {wait_s} s"
            )
    assert registry.snapshot() == before
    assert all(registry.is_revoked(token(number)) for number in range(3))
    assert registry.renew(token(3), token(4), now=101).token == token(4)
    with pytest.raises(NotInService, match="try again in 1 s"):
        register(registry, ONE, token(5), now=101.5)


def test_a_name_that_has_had_too_many_tokens_goes_on_with_the_one_it_has() -> None:
    registry = filled()

    assert registry.heard(token(3), now=4) is not None
    assert register(registry, ONE, token(3), now=5).replaced is None
    assert reactivate(registry, ONE, token(3), now=6).token == token(3)
    assert registry.renew(token(3), token(3), now=7).last_connect_time == 7


def test_who_quits_or_is_disabled_again_and_again_is_bounded_too() -> None:
    registry = Registry(10, token_lifetime_s=100, max_tokens_per_name=4)
    for number in range(4):
        register(registry, ONE, token(number), now=number)
        registry.revoke(token(number), now=number)

    for attempt in (register, reactivate):
        with pytest.raises(NotInService, match="try again in 96 s"):
            attempt(registry, ONE, token(4), now=4)
    assert registry.by_name(ONE) is None
    assert register(registry, ONE, token(4), now=100).client.token == token(4)


def test_one_names_tokens_are_not_anothers() -> None:
    registry = filled()

    assert register(registry, TWO, A, now=10).client.name == TWO
    assert registry.renew(A, B, now=11).token == B


def test_a_token_that_is_revoked_again_counts_once_and_for_its_name() -> None:
    registry = filled(last=2)
    for _ in range(5):
        registry.revoke(token(0), now=3)
    for unknown in (A, B, C):
        registry.revoke(unknown, now=3)

    register(registry, ONE, token(3), now=4)
    with pytest.raises(NotInService, match="try again in 98 s"):
        register(registry, ONE, token(4), now=4)


def test_a_bound_that_lets_nobody_renew_is_refused() -> None:
    with pytest.raises(ValueError, match="max_tokens_per_name is 1; expected 2 or more"):
        Registry(10, max_tokens_per_name=1)


def test_renewal_gives_a_new_token_and_revokes_the_old() -> None:
    registry = Registry(10)
    register(registry, ONE, A, now=1)
    registry.stream_up(ONE, now=1)
    renewed = registry.renew(A, B, now=2)

    assert renewed == Client(ONE, B, fqcn(ONE), 2)
    assert registry.snapshot() == {B: renewed}
    assert registry.presence(ONE) is Presence.CONNECTED
    registry.remove(B)
    with pytest.raises(Unauthenticated, match="revoked"):
        reactivate(registry, ONE, A)


def test_renewal_with_the_same_token_only_refreshes() -> None:
    registry = Registry(10)
    register(registry, ONE, A, now=1)

    assert registry.renew(A, A, now=2).last_connect_time == 2
    assert registry.by_token(A) is not None


def test_renewal_needs_a_registered_token() -> None:
    with pytest.raises(Unauthenticated, match="register again"):
        Registry(10).renew(A, B, now=0)


# disabling


def test_a_disabled_client_is_refused_everywhere() -> None:
    registry = Registry(10)
    register(registry, ONE, A)
    to_log_out = registry.disable(ONE, "key stolen", now=1)

    assert to_log_out is not None
    assert to_log_out.token == A
    attempts = (
        lambda: register(registry, ONE, B),
        lambda: reactivate(registry, ONE, A),
        lambda: registry.heard(A, now=1),
        lambda: registry.renew(A, B, now=1),
    )
    for attempt in attempts:
        with pytest.raises(Unauthenticated, match="client site-1 is disabled: key stolen"):
            attempt()
    assert registry.disabled() == {ONE: "key stolen"}


def test_disabling_a_client_that_is_not_registered_holds_for_later() -> None:
    registry = Registry(10)

    assert registry.disable(ONE, "", now=0) is None
    with pytest.raises(Unauthenticated, match=r"is disabled$"):
        register(registry, ONE, A)


def test_a_client_that_was_disabled_while_it_was_away_has_to_register_again() -> None:
    registry = Registry(10)
    register(registry, ONE, A)
    registry.remove(A)  # it was not heard of
    registry.disable(ONE, "", now=1)
    registry.enable(ONE)

    with pytest.raises(Unauthenticated, match="the token was revoked; register again"):
        reactivate(registry, ONE, A, now=2)
    assert register(registry, ONE, B, now=2).client.token == B


def test_clients_that_were_disabled_before_a_restart_stay_so() -> None:
    registry = Registry(10, disabled={ONE: "left the project"})

    with pytest.raises(Unauthenticated, match="left the project"):
        reactivate(registry, ONE, A)


def test_an_enabled_client_may_register_again() -> None:
    registry = Registry(10, disabled={ONE: ""})
    registry.enable(ONE)
    registry.enable(TWO)

    assert register(registry, ONE, A).client.name == ONE


# time


def test_a_client_is_suspect_until_its_stream_is_up() -> None:
    registry = Registry(10)
    register(registry, ONE, A)

    assert registry.presence(ONE) is Presence.SUSPECT
    assert registry.stream_up(ONE, now=1) is Presence.SUSPECT
    assert registry.presence(ONE) is Presence.CONNECTED


def test_a_client_is_lost_after_its_time_and_told_once() -> None:
    registry = Registry(10)
    register(registry, ONE, A)
    registry.stream_up(ONE, now=0)
    assert registry.stream_down(ONE, now=10)

    assert registry.lost(24.9, 15) == []
    assert [client.name for client in registry.lost(25, 15)] == [ONE]
    assert registry.lost(26, 15) == []
    assert registry.presence(ONE) is Presence.LOST
    assert registry.by_token(A) is not None


def test_a_stream_in_time_saves_a_suspect_client() -> None:
    registry = Registry(10)
    register(registry, ONE, A)
    registry.stream_up(ONE, now=0)
    registry.stream_down(ONE, now=10)

    assert registry.stream_up(ONE, now=20) is Presence.SUSPECT
    assert registry.lost(100, 15) == []


def test_a_lost_client_comes_back_with_its_stream() -> None:
    registry = Registry(10)
    register(registry, ONE, A)
    registry.lost(15, 15)

    assert registry.stream_up(ONE, now=20) is Presence.LOST
    assert registry.presence(ONE) is Presence.CONNECTED


def test_a_second_stream_up_changes_nothing_but_which_stream_counts() -> None:
    registry = Registry(10)
    register(registry, ONE, A)
    registry.stream_up(ONE, now=0, stream="old")

    assert registry.stream_up(ONE, now=1, stream="new") is Presence.CONNECTED
    assert not registry.stream_down(ONE, now=2, stream="old")
    assert registry.presence(ONE) is Presence.CONNECTED
    assert registry.stream_down(ONE, now=3, stream="new")


def test_the_end_of_a_stream_counts_once_and_only_for_a_connected_client() -> None:
    registry = Registry(10)
    register(registry, ONE, A)

    assert not registry.stream_down(ONE, now=1)
    registry.stream_up(ONE, now=2)
    assert registry.stream_down(ONE, now=3)
    assert not registry.stream_down(ONE, now=4)
    assert [client.name for client in registry.lost(18, 15)] == [ONE]


def test_streams_of_unregistered_clients_are_ignored() -> None:
    registry = Registry(10)

    assert registry.stream_up(ONE, now=0) is None
    assert not registry.stream_down(ONE, now=0)
    assert len(registry) == 0


def test_a_client_not_heard_of_is_dead_at_its_time_until_it_is_heard_or_removed() -> None:
    registry = Registry(10)
    register(registry, TWO, B, now=0)
    register(registry, ONE, A, now=0)

    assert registry.dead(599.9, 600) == []
    assert [client.name for client in registry.dead(600, 600)] == [ONE, TWO]
    registry.heard(A, now=600)
    assert [client.name for client in registry.dead(601, 600)] == [TWO]
    registry.remove(B)
    assert registry.dead(602, 600) == []


def test_the_next_deadline_is_the_first_of_lost_and_dead() -> None:
    registry = Registry(10)
    assert registry.next_deadline(timeout_s=600, lost_after_s=15) is None

    register(registry, ONE, A, now=0)
    assert registry.next_deadline(timeout_s=600, lost_after_s=15) == 15
    registry.stream_up(ONE, now=1)
    assert registry.next_deadline(timeout_s=600, lost_after_s=15) == 600
    registry.stream_down(ONE, now=590)
    assert registry.next_deadline(timeout_s=600, lost_after_s=15) == 600
    registry.heard(A, now=590)
    assert registry.next_deadline(timeout_s=600, lost_after_s=15) == 605
    registry.lost(605, 15)
    assert registry.next_deadline(timeout_s=600, lost_after_s=15) == 1190


@pytest.mark.parametrize(("state", "to"), list(product(Presence, Presence)))
def test_presence_moves_only_as_the_table_says(state: Presence, to: Presence) -> None:
    entry = registry_module._Entry(Client(ONE, A, fqcn(ONE), 0), state, since=1.0)
    if to in LEGAL[state]:
        registry_module._move(entry, to, 2.0)
        assert (entry.presence, entry.since) == (to, 2.0)
    else:
        with pytest.raises(ValueError, match=f"{state} cannot become {to}"):
            registry_module._move(entry, to, 2.0)
        assert (entry.presence, entry.since) == (state, 1.0)


names = st.sampled_from([ONE, TWO, THREE, ClientName("site-4"), ClientName("server")])
tokens = st.sampled_from([Token(f"token-{letter}") for letter in "abcdefgh"])


class AnyHistory(RuleBasedStateMachine):
    """Whatever arrives in whatever order, the registry's promises hold."""

    LOST_AFTER_S, TIMEOUT_S, LIFETIME_S, MAX_TOKENS = 15.0, 60.0, 1000.0, 4

    def __init__(self) -> None:
        super().__init__()
        self.registry = Registry(3, token_lifetime_s=self.LIFETIME_S, max_tokens_per_name=self.MAX_TOKENS)
        self.now = 0.0
        self.revoked: dict[Token, float] = {}
        self.disabled: set[ClientName] = set()

    def attempt(self, way_in: object, name: ClientName, token: Token) -> None:
        before, holder = self.registry.snapshot(), self.registry.by_name(name)
        try:
            way_in(self.registry, name, token, now=self.now)  # type: ignore[operator]  # register or reactivate
        except (Unauthenticated, NotInService):
            assert self.registry.snapshot() == before
        else:
            assert name not in self.disabled
            assert self.revoked.get(token, -self.LIFETIME_S) + self.LIFETIME_S <= self.now
            if holder is not None and holder.token != token:
                assert way_in is register
                self.revoked[holder.token] = self.now

    @rule(name=names, token=tokens)
    def somebody_registers(self, name: ClientName, token: Token) -> None:
        self.attempt(register, name, token)

    @rule(name=names, token=tokens)
    def a_heartbeat_of_an_unknown_token_arrives(self, name: ClientName, token: Token) -> None:
        self.attempt(reactivate, name, token)

    @rule(token=tokens)
    def a_heartbeat_arrives(self, token: Token) -> None:
        client = self.registry.by_token(token)
        if client is not None and client.name in self.disabled:
            with pytest.raises(Unauthenticated):
                self.registry.heard(token, now=self.now)
        else:
            assert (self.registry.heard(token, now=self.now) is None) == (client is None)

    @rule(old=tokens, new=tokens)
    def a_token_is_renewed(self, old: Token, new: Token) -> None:
        before = self.registry.snapshot()
        try:
            self.registry.renew(old, new, now=self.now)
        except (Unauthenticated, NotInService):
            assert self.registry.snapshot() == before
        else:
            if old != new:
                self.revoked[old] = self.now

    @rule(token=tokens)
    def a_client_is_removed(self, token: Token) -> None:
        self.registry.remove(token)

    @rule(token=tokens)
    def a_client_quits(self, token: Token) -> None:
        self.registry.revoke(token, now=self.now)
        self.revoked[token] = self.now

    @rule(name=names)
    def a_client_is_disabled(self, name: ClientName) -> None:
        client = self.registry.disable(name, "because", now=self.now)
        self.disabled.add(name)
        if client is not None:
            self.registry.revoke(client.token, now=self.now)
            self.revoked[client.token] = self.now

    @rule(name=names)
    def a_client_is_enabled(self, name: ClientName) -> None:
        self.registry.enable(name)
        self.disabled.discard(name)

    @rule(name=names, up=st.booleans(), stream=st.integers(0, 1))
    def a_stream_changes(self, name: ClientName, up: bool, stream: int) -> None:
        if up:
            self.registry.stream_up(name, now=self.now, stream=stream)
        else:
            self.registry.stream_down(name, now=self.now, stream=stream)

    @rule(seconds=st.sampled_from([1.0, 14.9, 15.0, 60.0, 999.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def the_clock_is_looked_at(self) -> None:
        deadline = self.registry.next_deadline(timeout_s=self.TIMEOUT_S, lost_after_s=self.LOST_AFTER_S)
        dead = self.registry.dead(self.now, self.TIMEOUT_S)
        lost = self.registry.lost(self.now, self.LOST_AFTER_S)
        assert bool(dead or lost) == (deadline is not None and deadline <= self.now)
        assert self.registry.lost(self.now, self.LOST_AFTER_S) == []
        for client in dead:
            assert self.registry.remove(client.token) == client

    @invariant()
    def a_name_has_one_token_and_a_token_one_name(self) -> None:
        clients = self.registry.snapshot()
        assert len({client.name for client in clients.values()}) == len(clients)
        for token, client in clients.items():
            assert client.token == token
            assert self.registry.by_token(token) == self.registry.by_name(client.name) == client

    @invariant()
    def what_was_revoked_is_remembered_for_its_lifetime(self) -> None:
        for token, at in self.revoked.items():
            assert self.registry.is_revoked(token) or at + self.LIFETIME_S <= self.now

    @invariant()
    def a_name_never_has_more_tokens_than_it_may(self) -> None:
        for name, revoked in self.registry._revoked_at.items():
            assert revoked
            if name is not None:
                assert len(revoked) + (self.registry.by_name(name) is not None) <= self.MAX_TOKENS
        remembered = {token for revoked in self.registry._revoked_at.values() for token in revoked}
        assert remembered == set(self.registry._revoked)

    @invariant()
    def there_are_never_more_than_may_be(self) -> None:
        assert len(self.registry) == len(self.registry.snapshot()) <= 3

    @invariant()
    def nobody_is_called_as_the_server_is_or_is_disabled(self) -> None:
        names = {client.name for client in self.registry.snapshot().values()}
        assert not names & {ClientName("server"), *self.disabled}


TestAnyHistory = AnyHistory.TestCase
TestAnyHistory.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


# several servers ------------------------------------------------------------------------------------------------------


def test_a_token_that_was_replaced_before_a_restart_does_not_come_back() -> None:
    restarted = Registry(10)
    restarted.count_only({ONE: fingerprint(B), TWO: ""}, now=0)

    for name, given_up in ((ONE, A), (TWO, C)):
        with pytest.raises(Unauthenticated, match="the token was revoked; register again"):
            reactivate(restarted, name, given_up)
    assert reactivate(restarted, ONE, B).token == B


def test_a_client_that_has_another_token_at_another_server_by_now_is_logged_out() -> None:
    registry = Registry(10)
    register(registry, ONE, A)
    register(registry, TWO, C)

    gone = registry.count_only({ONE: fingerprint(B), TWO: fingerprint(C)}, now=1)

    assert [client.name for client in gone] == [ONE]
    assert list(registry.snapshot()) == [C]
    assert reactivate(registry, ONE, B, now=2).token == B


def test_which_token_counts_of_a_client_that_the_store_does_not_know_stays_known() -> None:
    registry = Registry(10)
    register(registry, ONE, A)

    assert registry.count_only({TWO: fingerprint(C)}, now=1) == []

    assert registry.counting(ONE) == fingerprint(A)
    with pytest.raises(Unauthenticated):
        reactivate(registry, ONE, B, now=2)


class AnyServers(RuleBasedStateMachine):
    """Servers follow each other on one store: what a client has given up is taken by none of them, what it has by all.

    The store is a ``dict``; what a server tells it, it tells before it answers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.store: dict[ClientName, str] = {}
        self.servers = [Registry(10), Registry(10)]
        self.primary = self.servers[0]
        self.now = 0.0
        self.holds: dict[ClientName, Token] = {}
        self.given_up: list[tuple[ClientName, Token]] = []

    def keep(self, name: ClientName) -> None:
        self.store[name] = self.primary.counting(name)

    def give_up(self, name: ClientName) -> Token:
        if name in self.holds:
            self.given_up.append((name, self.holds.pop(name)))
        return Token(f"token-{len(self.given_up)}-of-{name}")

    @rule(name=st.sampled_from([ONE, TWO, THREE]))
    def a_client_registers(self, name: ClientName) -> None:
        fresh = self.give_up(name)
        register(self.primary, name, fresh, now=self.now)
        self.holds[name] = fresh
        self.keep(name)

    @rule(name=st.sampled_from([ONE, TWO, THREE]))
    def a_token_is_renewed(self, name: ClientName) -> None:
        former = self.holds.get(name)
        if former is not None and self.primary.by_token(former) is not None:
            fresh = self.give_up(name)
            self.primary.renew(former, fresh, now=self.now)
            self.holds[name] = fresh
            self.keep(name)

    @rule(name=st.sampled_from([ONE, TWO, THREE]))
    def a_client_quits(self, name: ClientName) -> None:
        held = self.holds.get(name)
        if held is not None and self.primary.revoke(held, now=self.now) is not None:
            self.give_up(name)
            self.keep(name)

    @rule(name=st.sampled_from([ONE, TWO, THREE]))
    def a_client_that_is_there_or_not_is_disabled_for_a_while(self, name: ClientName) -> None:
        registered = self.primary.disable(name, "because", now=self.now)
        if registered is not None:
            self.primary.revoke(registered.token, now=self.now)
        self.give_up(name)
        self.keep(name)
        self.primary.enable(name)

    @rule(to=st.integers(0, 1), is_new=st.booleans())
    def a_server_takes_over(self, to: int, is_new: bool) -> None:
        if is_new:
            self.servers[to] = Registry(10)
        self.primary = self.servers[to]
        self.primary.count_only(self.store, now=self.now)

    @rule(seconds=st.sampled_from([1.0, 10.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(name=st.sampled_from([ONE, TWO, THREE]))
    def a_client_goes_on_with_what_it_holds(self, name: ClientName) -> None:
        if name in self.holds:
            assert reactivate(self.primary, name, self.holds[name], now=self.now).token == self.holds[name]

    @invariant()
    def what_was_given_up_is_taken_no_more(self) -> None:
        for name, token in self.given_up:
            assert self.primary.heard(token, now=self.now) is None
            assert self.primary.is_superseded(name, token)
            with pytest.raises(Unauthenticated):
                reactivate(self.primary, name, token, now=self.now)


AnyServers.TestCase.settings = settings(stateful_step_count=30, deadline=None)
TestAnyServers = AnyServers.TestCase
