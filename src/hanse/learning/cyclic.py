"""Cyclic training: the model travels from client to client, and each trains on from where the last one stopped."""

from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from hanse.errors import JobInvalid
from hanse.ids import ClientName
from hanse.job import Config
from hanse.learning.aggregate import with_metadata
from hanse.learning.participation import Collection, Participation, Verdict, ask_checked
from hanse.learning.training import TRAIN, round_metrics
from hanse.learning.workflow import LONGEST_WAIT_S, Federation, State, Task
from hanse.model import Model

THEN: Final = "it is passed over, and the next client gets the model that it got"
"""What happens to a client at its deadline."""


@dataclass(frozen=True, kw_only=True)
class Cyclic:
    """One round is one lap: every client of the run trains once, one after the other.

    It is called cyclical weight transfer in Chang et al. 2018 (doi:10.1093/jamia/ocy017). A client that fails, is lost
    or misses its deadline is passed over: the next one gets the model that it got.

    Raises:
        JobInvalid: a field is out of range; the error names it.
    """

    rounds: int = 10
    """How many laps the run has."""

    order: Literal["name", "random"] = "name"
    """In which order clients train: by name, or drawn anew for each lap from the job's seed."""

    min_clients: int = 1
    """The fewest clients that must have trained for a lap to count."""

    deadline_s: float = LONGEST_WAIT_S
    """Seconds that each client has before it is passed over; by default a day."""

    config: Config = field(default_factory=dict)
    """What clients' training code reads in ``ctx.config``, over the job's own."""

    def __post_init__(self) -> None:
        Participation(min_clients=self.min_clients, deadline_s=self.deadline_s)  # refuses what is out of range
        if self.rounds < 1:
            raise JobInvalid("workflow.rounds", got=self.rounds, expected="1 or more")

    def start(self, model: Model) -> State:
        """Return the state of round 0."""
        return State(model)

    async def round(self, state: State, federation: Federation) -> State:
        """Return the state after one lap; its metrics are the weighted means of what the clients measured.

        Raises:
            TooFewClients: fewer than ``min_clients`` clients could train.
        """
        everybody = Participation(min_clients=self.min_clients).select(federation.clients, federation.rng("lap"))
        lap = Collection(everybody.asked, aim=len(everybody.asked), needed=self.min_clients)
        model = state.model
        for client in self._lap_order(federation):
            task = Task(TRAIN, model, self.config)
            asking = ask_checked(federation, task, (client,), deadline_s=self.deadline_s, then=THEN)
            async with aclosing(asking) as answers:
                async for answer in answers:
                    lap.add(answer)
                    if answer.update is not None and answer.update.model is not None:
                        model = with_metadata(answer.update.model, state.model)
            if lap.verdict is Verdict.FAILED:
                break
        metrics = round_metrics(tuple(lap.updates().values()))
        return replace(state, model=model, round=state.round + 1, metrics=metrics)

    def _lap_order(self, federation: Federation) -> list[ClientName]:
        ordered = sorted(federation.clients)
        if self.order == "name":
            return ordered
        return [ordered[position] for position in federation.rng("lap order").permutation(len(ordered))]
