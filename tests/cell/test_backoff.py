import random

from hypothesis import given
from hypothesis import strategies as st

from hanse.cell.backoff import FIRST_S, LONGEST_S, Backoff


@given(st.integers(), st.integers(1, 40))
def test_delays_grow_to_a_bound_and_stay_within_it(seed: int, count: int) -> None:
    backoff = Backoff(random.Random(seed))
    delays = [backoff.next_s() for _ in range(count)]
    for number, delay in enumerate(delays):
        bound = min(FIRST_S * 2**number, LONGEST_S)
        assert bound / 2 <= delay <= bound


def test_after_a_success_delays_are_short_again() -> None:
    backoff = Backoff(random.Random(1))
    for _ in range(10):
        backoff.next_s()
    backoff.reset()
    assert backoff.next_s() <= FIRST_S


def test_two_clients_do_not_wait_in_step() -> None:
    one, other = Backoff(random.Random(1)), Backoff(random.Random(2))
    assert [one.next_s() for _ in range(5)] != [other.next_s() for _ in range(5)]
