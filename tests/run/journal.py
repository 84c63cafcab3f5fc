"""A run's link without a server: what is asked is kept, and answers come from plain functions."""

import asyncio
from collections.abc import Callable, Sequence

from hanse.errors import HanseError
from hanse.ids import ClientName
from hanse.messages import ClientChanged, IssueTasks, RunEnded, StateRef, TaskKey, TaskResult, UpdateRef
from hanse.model import Model
from hanse.run.federation import RunFederation
from hanse.run.server_link import RunListener
from hanse.storage.models import load_model, store_model
from hanse.storage.tensors import TensorFiles

Client = Callable[[TaskKey, Model], Model | None]
"""What a client makes of a model; ``None``: it does not answer."""


class Journal:
    """``ServerLink`` in small: answers come in client-name order as soon as a task is issued."""

    def __init__(self, files: TensorFiles, clients: dict[str, Client] | None = None) -> None:
        self.files = files
        self.clients = clients or {}
        self.issued: list[IssueTasks] = []
        self.was_asked = asyncio.Event()
        self.cancelled: list[TaskKey] = []
        self.commits: list[tuple[StateRef, tuple[ClientName, ...]]] = []
        self.carried: list[tuple[TaskKey, ...]] = []
        self.ends: list[RunEnded] = []
        self.answers: dict[TaskKey, TaskResult] = {}
        self.asked: list[TaskKey] = []
        self.out: dict[TaskKey, IssueTasks] = {}
        self.refuses: HanseError | None = None
        self.listener: RunListener | None = None

    def listen(self, listener: RunListener) -> None:
        self.listener = listener

    async def issue(self, tasks: IssueTasks) -> None:
        if self.refuses is not None:
            raise self.refuses
        self.issued.append(tasks)
        self.was_asked.set()
        for key in sorted(tasks.keys, key=lambda key: key.client):
            if key not in self.answers:
                self.asked.append(key)
                self.out[key] = tasks
                self.work(key)
            elif self.listener is not None:
                self.listener.answered(self.answers[key])

    def work(self, key: TaskKey) -> None:
        """Have *key*'s client work on its task, and accept its answer if it gives one."""
        tasks, client = self.out[key], self.clients.get(key.client)
        model = load_model(tasks.model, self.files) if tasks.model is not None else Model({})
        made = client(key, model) if client is not None else None
        if made is not None:
            reference = store_model(made, self.files) if tasks.expects_model else None
            self.accept(TaskResult(key, UpdateRef(reference, 1, {"loss": 0.5})))

    def accept(self, result: TaskResult) -> None:
        """Journal an answer, and tell the run."""
        self.answers[result.key] = result
        if self.listener is not None:
            self.listener.answered(result)

    def attach(self, run: RunFederation) -> None:
        """Have *run*, of a process that was started again, hear what is in the journal."""
        self.listen(run)
        for result in list(self.answers.values()):
            run.answered(result)

    async def cancel(self, keys: Sequence[TaskKey]) -> None:
        self.cancelled.extend(keys)

    async def commit(
        self, state: StateRef, *, took_s: float, answered: Sequence[ClientName], carried: Sequence[TaskKey] = ()
    ) -> None:
        if self.refuses is not None:
            raise self.refuses
        assert took_s >= 0
        self.commits.append((state, tuple(answered)))
        self.carried.append(tuple(carried))

    async def ended(self, end: RunEnded) -> None:
        self.ends.append(end)


def federation(
    journal: Journal,
    *names: str,
    seed: int = 7,
    lost: Sequence[str] = (),
    failed: Sequence[str] = (),
    carried: Sequence[TaskKey] = (),
    counted: Sequence[TaskKey] = (),
    round_number: int = 1,
) -> RunFederation:
    made = RunFederation(
        journal,  # type: ignore[arg-type]
        journal.files,
        clients=map(ClientName, names),
        seed=seed,
        carried=carried,
        counted=counted,
    )
    journal.attach(made)
    for client in lost:
        made.client_changed(changed(client, "lost"))
    for client in failed:
        made.client_changed(changed(client, "failed"))
    made.enter_round(round_number)
    return made


def changed(client: str, change: str, reason: str = "") -> ClientChanged:
    return ClientChanged(ClientName(client), change, reason)
