"""What several servers wrote to one store, as each of them saw it, and whether two of them ever committed at once.

A write is an interval: it was asked for, and it was answered. Somewhere in between the store took it. So if a write of
a later tenure had been answered before a write of an earlier one was asked for, and that was taken all the same, two
tenures have overlapped, whatever the order inside the store was.
"""

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Write:
    """A write that the store has taken: under *epoch*, by *server*, within these two moments of one common order."""

    server: str
    epoch: int
    asked: int
    answered: int


@dataclass
class History:
    """The writes of all servers. Moments are drawn from one counter, so that they are in the order of what happened."""

    writes: list[Write] = field(default_factory=list)
    _moments: Iterator[int] = field(default_factory=itertools.count)

    @contextmanager
    def write(self, server: str, epoch: int) -> Iterator[None]:
        """Note a write that is made within the block; one that raises was not taken."""
        asked = next(self._moments)
        yield
        self.writes.append(Write(server, epoch, asked, next(self._moments)))


def overlaps(writes: Iterable[Write]) -> list[tuple[Write, Write]]:
    """Return the pairs of a write and a later one that an earlier tenure should not have been able to make."""
    ordered = list(writes)
    return [
        (later, earlier)
        for later, earlier in itertools.permutations(ordered, 2)
        if earlier.epoch < later.epoch and earlier.asked > later.answered
    ]


def shared_epochs(writes: Iterable[Write]) -> dict[int, set[str]]:
    """Return the epochs under which more than one server has written, and which."""
    by_epoch: dict[int, set[str]] = {}
    for write in writes:
        by_epoch.setdefault(write.epoch, set()).add(write.server)
    return {epoch: servers for epoch, servers in by_epoch.items() if len(servers) > 1}
