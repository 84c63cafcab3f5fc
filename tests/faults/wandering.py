"""A workflow as a user might write it in a job's folder, with a memory and chance of its own.

Each round one client, drawn by how well it has done so far, trains the model; the others measure, side by side, what it
was and what it became, and chance decides whether a worse one is taken all the same. What it remembers is a Python
object, which it makes of the state's values and writes back there; the best model so far lies beside the model.
"""

import asyncio
import math
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field, replace

import numpy as np

from hanse import Federation, Model, State, Task


@dataclass
class Memory:
    """What was learnt about the clients, and how well the model and the best one did."""

    luck: dict[str, float] = field(default_factory=dict)
    path: list[str] = field(default_factory=list)
    loss: float = math.inf
    best_loss: float = math.inf

    def note(self, client: str, loss: float, *, taken: bool) -> None:
        self.path.append(f"{client}{'+' if taken else '-'}")
        self.luck[client] = self.luck.get(client, 1.0) * (1.25 if taken else 0.8)
        if taken:
            self.loss = loss
            self.best_loss = min(self.best_loss, loss)


@dataclass(frozen=True)
class Wandering:
    """Go from model to model for *rounds*, the freer the higher the *temperature*."""

    rounds: int = 3
    temperature: float = 1000.0

    def start(self, model: Model) -> State:
        return State(model, extra={"best": model}, values=asdict(Memory()))

    async def round(self, state: State, federation: Federation) -> State:
        memory = Memory(**state.values)
        client = self._drawn(memory, federation)
        candidate = state.model
        async with aclosing(federation.ask(Task("train", state.model), [client])) as answers:
            async for answer in answers:
                candidate = answer.update.model
        others = [other for other in federation.clients if other != client]
        before, loss = await asyncio.gather(  # asks that run side by side
            *(self._measured(model, others, federation) for model in (state.model, candidate))
        )
        worse = max(loss - memory.loss, 0.0)
        taken = federation.rng("take a worse one").random() < math.exp(-worse / self.temperature)
        is_best = taken and loss < memory.best_loss
        memory.note(client, loss, taken=taken)
        return replace(
            state,
            round=state.round + 1,
            model=candidate if taken else state.model,
            extra={"best": candidate if is_best else state.extra["best"]},
            values=asdict(memory),
            metrics={"loss": loss, "gain": before - loss, "steps": float(len(memory.path))},
        )

    async def _measured(self, model: Model, clients: Sequence[str], federation: Federation) -> float:
        losses: dict[str, float] = {}
        async with aclosing(federation.ask(Task("evaluate", model, expects_model=False), clients)) as answers:
            async for answer in answers:
                losses[answer.client] = answer.update.metrics["loss"]
        return float(np.mean([losses[client] for client in sorted(losses)]))

    def _drawn(self, memory: Memory, federation: Federation) -> str:
        luck = np.array([memory.luck.get(client, 1.0) for client in federation.clients])
        return str(federation.rng("who trains").choice(federation.clients, p=luck / luck.sum()))
