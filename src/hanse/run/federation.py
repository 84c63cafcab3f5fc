"""A run's handle on its clients: what ``workflow.round`` gets as ``federation``.

``ask`` names each task by its key *(round, name, sequence, client)*. A workflow that is called again for the same round
after a crash asks the same things in the same order, so its keys are the same: the server hands over the answers that
it has accepted for them, and only the rest reaches a client. The sequence counts the asks of one name to one client
within the round.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Iterable, Sequence

import numpy as np

from hanse.ids import ClientName
from hanse.learning.workflow import Answer, Task, rng_for
from hanse.messages import ClientChanged, IssueTasks, ModelRef, TaskFault, TaskKey, TaskResult
from hanse.model import Model, ModelSpec, Update
from hanse.run.server_link import ServerLink
from hanse.storage.models import allocate, load_model, store_model
from hanse.storage.tensors import TensorFiles

CLIENT_LOST = "client-lost"
CLIENT_FAILED = "client-failed"
DEADLINE = "deadline"
UNANSWERED = frozenset({CLIENT_LOST, CLIENT_FAILED, DEADLINE})
"""Faults that the run makes itself: the client has not answered, and may yet."""


class RunFederation:
    """The clients of one run, as its workflow sees them; implements ``hanse.learning.workflow.Federation``.

    It lives for the whole run; ``enter_round`` begins a round. Answers that come for a task that nobody waits for any
    more are dropped: the server has already refused or journalled them.
    """

    def __init__(
        self,
        link: ServerLink,
        files: TensorFiles,
        *,
        clients: Iterable[ClientName],
        seed: int,
        lost: Iterable[ClientName] = (),
    ) -> None:
        self._link = link
        self._files = files
        self.clients: tuple[ClientName, ...] = tuple(sorted(clients))
        self.seed = seed
        self.round = 0
        self.answered_clients: set[ClientName] = set()
        self._unavailable = {client: TaskFault(CLIENT_LOST, f"{client} was lost") for client in lost}
        self._waiting: dict[TaskKey, asyncio.Queue[TaskResult]] = {}
        self._sequence: Counter[tuple[str, ClientName]] = Counter()
        self._stored: tuple[Model, ModelRef] | None = None

    def enter_round(self, round_number: int) -> None:
        """Begin round *round_number*: sequences count from the start again."""
        self.round = round_number
        self.answered_clients = set()
        self._sequence.clear()

    def rng(self, *purpose: str) -> np.random.Generator:
        """Return a generator that depends on the job's seed, the round and *purpose* alone."""
        return rng_for(self.seed, self.round, *purpose)

    def allocate(self, spec: ModelSpec) -> Model:
        """Return writable arrays like *spec*; large ones lie in mapped files, so they cost no memory."""
        return allocate(spec, self._files)

    async def ask(
        self, task: Task, clients: Sequence[ClientName], *, deadline_s: float | None = None
    ) -> AsyncGenerator[Answer, None]:
        """Give *task* to *clients* and yield one answer for each, in order of arrival.

        A client that is lost or has failed, or has not answered *deadline_s* seconds after the ask, answers with a
        fault that says so. Leaving the iteration early cancels what is still open. Closing matters: iterate under
        ``contextlib.aclosing`` or to the end.
        """
        keys = [self._next_key(task.name, client) for client in clients]
        arrivals: asyncio.Queue[TaskResult] = asyncio.Queue(maxsize=len(keys))
        absent = [(key, self._unavailable[key.client]) for key in keys if key.client in self._unavailable]
        asked = [key for key in keys if key.client not in self._unavailable]
        unanswered = set(asked)
        for key in asked:
            self._waiting[key] = arrivals
        try:
            await self._issue(task, asked)
            for key, fault in absent:
                yield Answer(key.client, None, fault)
            async for result in _until(arrivals, set(asked), deadline_s):
                if result.fault is None or result.fault.code not in UNANSWERED:
                    unanswered.discard(result.key)
                yield await self._answer(result)
        finally:
            for key in asked:
                self._waiting.pop(key, None)
            if unanswered:
                await self._link.cancel(sorted(unanswered, key=lambda key: key.client))

    def answered(self, result: TaskResult) -> None:
        """Take an accepted answer from the server."""
        if (queue := self._waiting.pop(result.key, None)) is not None:
            queue.put_nowait(result)

    def client_changed(self, change: ClientChanged) -> None:
        """Take note that a client was lost, came back, or failed for good: its open tasks get a fault for an answer."""
        if change.change == "back":
            self._unavailable.pop(change.client, None)
            return
        code = CLIENT_LOST if change.change == "lost" else CLIENT_FAILED
        fault = TaskFault(code, change.reason or f"{change.client} was lost")
        self._unavailable[change.client] = fault
        for key in [key for key in self._waiting if key.client == change.client]:
            self._waiting.pop(key).put_nowait(TaskResult(key, fault=fault))

    def _next_key(self, name: str, client: ClientName) -> TaskKey:
        sequence = self._sequence[name, client]
        self._sequence[name, client] += 1
        return TaskKey(self.round, name, sequence, client)

    async def _issue(self, task: Task, keys: Sequence[TaskKey]) -> None:
        if not keys:
            return
        model = None if task.model is None else await self._ref(task.model)
        await self._link.issue(IssueTasks(tuple(keys), model, dict(task.config), task.expects_model))

    async def _ref(self, model: Model) -> ModelRef:
        if self._stored is None or self._stored[0] is not model:
            self._stored = (model, await asyncio.to_thread(store_model, model, self._files))
        return self._stored[1]

    async def _answer(self, result: TaskResult) -> Answer:
        client = result.key.client
        if result.update is None:
            fault = result.fault or TaskFault("no-answer", f"{client} answered with neither an update nor a fault")
            return Answer(client, None, fault)
        reference = result.update
        model = None if reference.model is None else load_model(reference.model, self._files)
        self.answered_clients.add(client)
        return Answer(client, Update(model, reference.num_examples, reference.metrics), None)


async def _until(
    arrivals: asyncio.Queue[TaskResult], open_keys: set[TaskKey], deadline_s: float | None
) -> AsyncGenerator[TaskResult, None]:
    """Yield the first result of each of *open_keys* (removing it), and faults for those left at the deadline."""
    loop = asyncio.get_running_loop()
    deadline = None if deadline_s is None else loop.time() + deadline_s
    while open_keys:
        try:
            async with asyncio.timeout_at(deadline):
                result = await arrivals.get()
        except TimeoutError:
            break
        if result.key in open_keys:
            open_keys.discard(result.key)
            yield result
    for key in sorted(open_keys, key=lambda key: key.client):
        yield TaskResult(key, fault=TaskFault(DEADLINE, f"{key.client} did not answer within {deadline_s:g} s"))
