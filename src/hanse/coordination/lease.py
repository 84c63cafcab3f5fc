"""When a server that stands by may take the lease: when it has seen it stand still for long enough, by its own clock.

No two clocks are compared. Whoever holds a lease *beats*: it changes a counter in it, several times within the lease's
time to live. Who stands by notes what it has seen and when, on its own monotonic clock; each beat that it sees begins
the wait anew. The holder, for its part, stops serving when its last beat that went through is as old as that, again by
its own clock, and it counts from the moment before the beat was sent. So it has always stopped before another may
begin, however the clocks are set and whoever was paused for how long.
"""

from dataclasses import dataclass
from typing import Final, TypeAlias

Sign: TypeAlias = tuple[int, int, str]
"""What distinguishes one beat from another: epoch, beat and holder."""

BEATS: Final = 3
"""A holder beats this often within the lease's time to live, so that one lost beat costs no lease."""


@dataclass(frozen=True, slots=True)
class Watch:
    """A lease as one server sees it: *sign* stands still since *since* (monotonic seconds); *ttl_s* is how long it may.

    A lease that nobody holds may stand still for 0 seconds, unless it was left to another server, who comes first.
    """

    sign: Sign
    since: float
    ttl_s: float

    def observe(self, sign: Sign, *, ttl_s: float, now: float) -> "Watch":
        """Return the watch after the lease was seen as *sign*, at *now*."""
        return self if (sign, ttl_s) == (self.sign, self.ttl_s) else Watch(sign, now, ttl_s)

    @property
    def doubtful_at(self) -> float:
        """When a beat is overdue: the holder may be gone."""
        return self.since + 1.5 * self.ttl_s / BEATS

    @property
    def may_take_at(self) -> float:
        """When the lease has stood still for so long that its holder has stopped."""
        return self.since + self.ttl_s

    def is_alive(self, now: float) -> bool:
        """Return whether the holder can be believed to serve."""
        return self.sign[2] != "" and now < self.doubtful_at

    def may_take(self, now: float) -> bool:
        """Return whether the lease may be taken."""
        return now >= self.may_take_at

    def wait_s(self, now: float) -> float:
        """Return in how many seconds the next thing is due if the lease goes on standing still."""
        due = self.doubtful_at if now < self.doubtful_at else self.may_take_at
        return max(due - now, 0.0)
