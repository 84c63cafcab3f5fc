"""How long to wait before trying again: longer each time, never longer than a bound, and never in step with others."""

import random
from typing import Final

FIRST_S: Final = 0.1
LONGEST_S: Final = 5.0


class Backoff:
    """Delays in seconds: the n-th is drawn from the upper half of ``first_s * 2**n``, bounded by *longest_s*.

    The draw keeps many clients of one server that went away from coming back all at once.
    """

    def __init__(self, rng: random.Random, *, first_s: float = FIRST_S, longest_s: float = LONGEST_S) -> None:
        self._rng, self._first_s, self._longest_s = rng, first_s, longest_s
        self._bound_s = first_s

    def next_s(self) -> float:
        """Return the next delay."""
        bound, self._bound_s = self._bound_s, min(2 * self._bound_s, self._longest_s)
        return self._rng.uniform(bound / 2, bound)

    def reset(self) -> None:
        """Begin anew: what was tried has worked."""
        self._bound_s = self._first_s
