"""When a lease may be taken: by one clock at a time, whatever the others say."""

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hanse.coordination.lease import Sign, Watch

TTL_S = 3.0
HELD: Sign = (1, 0, "server-1")


def watching(sign: Sign = HELD, *, now: float = 100.0, ttl_s: float = TTL_S) -> Watch:
    return Watch((-1, 0, ""), 0.0, 0.0).observe(sign, ttl_s=ttl_s, now=now)


def test_a_lease_that_stands_still_is_doubtful_first_and_then_to_be_taken() -> None:
    watch = watching()

    assert [watch.is_alive(now) for now in (100.0, 101.4, 101.6, 103.0)] == [True, True, False, False]
    assert [watch.may_take(now) for now in (100.0, 101.6, 102.9, 103.0)] == [False, False, False, True]
    assert [watch.wait_s(now) for now in (100.0, 101.5, 103.5)] == [1.5, 1.5, 0.0]


def test_a_beat_begins_the_wait_anew() -> None:
    watch = watching().observe((1, 1, "server-1"), ttl_s=TTL_S, now=102.0)

    assert not watch.may_take(104.9)
    assert watch.may_take(105.0)


def test_seeing_the_same_again_changes_nothing() -> None:
    watch = watching()

    assert watch.observe(HELD, ttl_s=TTL_S, now=102.0) == watch


def test_a_lease_that_nobody_holds_is_to_be_taken_at_once_and_one_left_to_another_later() -> None:
    assert watching((2, 0, ""), ttl_s=0.0).may_take(100.0)
    left = watching((2, 0, ""), ttl_s=TTL_S)
    assert not left.may_take(102.9)
    assert left.may_take(103.0)
    assert not left.is_alive(100.0)


@given(st.lists(st.tuples(st.floats(0, 10), st.integers(0, 3)), max_size=20))
def test_nothing_may_be_taken_within_the_time_to_live_of_what_was_seen_last(steps: list[tuple[float, int]]) -> None:
    now, watch, last, changed_at = 100.0, watching(), HELD, 100.0
    for pause_s, beat in steps:
        now += pause_s
        sign = (1, beat, "server-1")
        watch = watch.observe(sign, ttl_s=TTL_S, now=now)
        if sign != last:
            last, changed_at = sign, now
        assert watch.may_take(now) == (now >= changed_at + TTL_S)


@dataclass
class Server:
    """A server of the machine below, whose clock is *offset* off the true time."""

    name: str
    offset: float
    watch: Watch = field(default_factory=lambda: Watch((-1, 0, ""), 0.0, 0.0))
    epoch: int = 0
    good_until: float = 0.0

    def clock(self, true_s: float) -> float:
        return self.offset + true_s


class TwoServers(RuleBasedStateMachine):
    """Servers whose clocks say different things, that look, beat, and are paused, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.row: Sign = (0, 0, "")
        self.ttl_s = 0.0
        self.servers = [Server("server-1", 1000.0), Server("server-2", -77.0), Server("server-3", 0.0)]

    @rule(seconds=st.floats(0.01, 2.5))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(which=st.integers(0, 2))
    def one_looks(self, which: int) -> None:
        server = self.servers[which]
        server.watch = server.watch.observe(self.row, ttl_s=self.ttl_s, now=server.clock(self.now))

    @precondition(lambda self: any(each.watch.sign == self.row for each in self.servers))
    @rule(which=st.integers(0, 2))
    def one_takes(self, which: int) -> None:
        """Take the lease if its watch allows it and the row is what it saw: the store compares and sets."""
        server = self.servers[which]
        if server.watch.sign != self.row or not server.watch.may_take(server.clock(self.now)):
            return
        server.epoch = self.row[0] + 1
        server.good_until = server.clock(self.now) + TTL_S
        self.row, self.ttl_s = (server.epoch, 0, server.name), TTL_S
        server.watch = server.watch.observe(self.row, ttl_s=TTL_S, now=server.clock(self.now))

    @rule(which=st.integers(0, 2), late_s=st.floats(0, 2.5))
    def one_beats(self, which: int, late_s: float) -> None:
        """Beat; the write takes *late_s* to arrive, and the holder counts from before it was sent."""
        server, sent = self.servers[which], self.servers[which].clock(self.now)
        self.now += late_s
        if (server.epoch, server.name) == (self.row[0], self.row[2]):
            self.row = (self.row[0], self.row[1] + 1, self.row[2])
            server.good_until = sent + TTL_S

    @invariant()
    def at_most_one_believes_that_it_serves(self) -> None:
        serving = [each.name for each in self.servers if each.epoch and each.clock(self.now) < each.good_until]
        assert len(serving) <= 1, serving


TestTwoServers = TwoServers.TestCase
