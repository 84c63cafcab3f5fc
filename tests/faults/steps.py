"""The steps of a run, as its server tells them to whoever watches the job, and where in them a run is."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from hanse.messages import JobEvent, JobView

ROUNDS: Final = 4
CLIENTS: Final = 2


@dataclass(frozen=True)
class Step:
    """The *nth* event of this *kind* in this *round*."""

    kind: str
    round: int = 0
    nth: int = 1

    def __str__(self) -> str:
        number = f" {self.nth}" if self.kind in ("task_sent", "result_accepted") else ""
        place = f"round {self.round}: " if self.round or self.kind == "round_done" else ""
        return f"{place}{self.kind}{number}"


def _steps_of_round(number: int) -> list[Step]:
    each = range(1, CLIENTS + 1)
    sent = [Step("task_sent", number, nth) for nth in each]
    accepted = [Step("result_accepted", number, nth) for nth in each]
    return [Step("round_started", number), *sent, *accepted, Step("round_done", number)]


STEPS: Final = (
    Step("job_deployed"),
    Step("job_started"),
    Step("round_done"),
    *(step for number in range(1, ROUNDS + 1) for step in _steps_of_round(number)),
    Step("job_completed"),
)
"""All steps of a run of the tests' job, in the order in which they are told."""


def round_of(index: int) -> int:
    """Return the round that the step *index* belongs to."""
    return STEPS[index].round if index + 1 < len(STEPS) else ROUNDS


def steps_of(events: Iterable[JobEvent]) -> list[Step]:
    """Return the steps that *events* are, in their order."""
    seen: Counter[tuple[str, int]] = Counter()
    steps = []
    for event in events:
        seen[event.kind, event.round] += 1
        steps.append(Step(event.kind, event.round, seen[event.kind, event.round]))
    return steps


class Progress:
    """How far a run has come through *steps*: ``index`` is that of the last one told, -1 before the first.

    ``round`` is the last committed round that was told of. Neither goes back.
    """

    def __init__(self, steps: Sequence[Step] = STEPS) -> None:
        self.index = -1
        self.round = 0
        self._steps = steps
        self._index_of = {step: index for index, step in enumerate(steps)}
        self._seen: Counter[tuple[str, int]] = Counter()

    def __str__(self) -> str:
        return str(self._steps[self.index]) if self.index >= 0 else "its submission"

    def take(self, seen: JobView | JobEvent) -> None:
        """Take note of what a watcher was told."""
        for step in self._told(seen):
            self.index = max(self.index, self._index_of.get(step, -1))
            if step.kind == "round_done":
                self.round = max(self.round, step.round)

    def _told(self, seen: JobView | JobEvent) -> list[Step]:
        if isinstance(seen, JobEvent):
            self._seen[seen.kind, seen.round] += 1
            return [Step(seen.kind, seen.round, self._seen[seen.kind, seen.round])]
        committed = [Step("round_done", seen.round)] if seen.round else []
        return [*committed, Step("job_completed")] if seen.state == "completed" else committed
