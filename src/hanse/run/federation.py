"""A run's handle on its clients: what ``workflow.round`` gets as ``federation``.

``ask`` names each task by its key *(round, name, sequence, client)*, of which the sequence follows from what is asked
(``coordination.task_keys``). A workflow that is called again for the same round after a crash asks the same things, so
its keys are the same: it finds the answers that the server has accepted for them, in the order in which they were
accepted, and only the rest reaches a client.

Tasks lie in a ``_Pool``: those of one ask, or of all asks of one name that keep theirs. What is left in the latter when
a round is committed is ``carried`` into the next one.
"""

import asyncio
import heapq
import itertools
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final, NamedTuple

import msgspec
import numpy as np

from hanse.coordination.task_keys import content_of, sequence_of
from hanse.errors import NotFound, ProtocolError, StoreFailed, TrainingFailed
from hanse.ids import ClientName, Digest
from hanse.learning.workflow import (
    CLIENT_FAILED,
    CLIENT_LOST,
    DEADLINE,
    LONGEST_WAIT_S,
    THEN,
    Answer,
    Task,
    check_wait,
    rng_for,
)
from hanse.messages import ClientChanged, IssueTasks, ModelRef, RunSnapshot, TaskFault, TaskKey, TaskResult
from hanse.model import Model, ModelSpec, Update
from hanse.run.server_link import ServerLink
from hanse.storage.models import allocate, digests_of, load_model, store_model
from hanse.storage.tensors import TensorFiles

RUNS_OWN: Final = frozenset({CLIENT_LOST, CLIENT_FAILED, DEADLINE})
"""Faults that the run makes itself, about a client that has not answered; none that a client sends is called so."""


class RunFederation:
    """The clients of one run, as its workflow sees them; implements ``hanse.learning.workflow.Federation``.

    It lives for the whole run; ``enter_round`` begins a round. ``answered_clients`` and ``tensors_read`` are whose
    answers the round has got, and which tensors those were. *carried* are the tasks of earlier rounds that the last
    commit kept, *counted* those of the present one that were asked by a release which counted them. An answer that
    comes before its task was asked, as after a crash, waits for that; one that comes for a task that nobody waits for
    any more is dropped.
    """

    def __init__(
        self,
        link: ServerLink,
        files: TensorFiles,
        *,
        clients: Iterable[ClientName],
        seed: int,
        carried: Iterable[TaskKey] = (),
        counted: Iterable[TaskKey] = (),
    ) -> None:
        self._link = link
        self._files = files
        self.clients: tuple[ClientName, ...] = tuple(sorted(clients))
        self.seed = seed
        self.round = 0
        self.answered_clients: set[ClientName] = set()
        self.tensors_read: set[Digest] = set()
        self.disk_failure: StoreFailed | None = None
        self._began = self._issuing_since = 0.0
        self._issuing = 0
        self._unavailable: dict[ClientName, TaskFault] = {}
        self._kept: dict[str, _Pool] = {}
        self._pool_of: dict[TaskKey, _Pool] = {}
        self._arrivals = itertools.count()
        self._early: dict[TaskKey, _Arrival] = {}
        self._asked: set[TaskKey] = set()
        self._counted = frozenset(counted)
        self._asks: Counter[tuple[str, ClientName, bytes]] = Counter()
        self._stored: tuple[Model, ModelRef] | None = None
        self._storing = asyncio.Lock()
        for key in sorted(carried, key=_order):
            self._enter(key, self._kept.setdefault(key.name, _Pool(keeps=True)))

    # rounds

    def enter_round(self, round_number: int) -> None:
        """Begin round *round_number*: its time and its asks count from the start again."""
        self.round = round_number
        self.answered_clients = set()
        self.tensors_read = set()
        self._began = self._issuing_since = asyncio.get_running_loop().time()
        self._asks.clear()
        self._asked.clear()
        self._stored = None  # the commit has deleted what only the last round needed
        self._early = {key: arrival for key, arrival in self._early.items() if key.round >= round_number}
        self._pool_of = {key: pool for key, pool in self._pool_of.items() if pool.keeps}
        for key in list(self._pool_of):
            self._tell_of_loss(key)

    @property
    def elapsed_s(self) -> float:
        """Seconds since ``enter_round``, but for those in which tasks were being issued."""
        return (self._issuing_since if self._issuing else asyncio.get_running_loop().time()) - self._began

    @property
    def carried(self) -> tuple[TaskKey, ...]:
        """The kept tasks whose answers were not yielded: what a commit now carries into the next round."""
        return tuple(sorted((key for pool in self._kept.values() for key in pool.keys), key=_order))

    def rng(self, *purpose: str) -> np.random.Generator:
        """Return a generator that depends on the job's seed, the round and *purpose* alone."""
        return rng_for(self.seed, self.round, *purpose)

    def allocate(self, spec: ModelSpec) -> Model:
        """Return writable arrays like *spec*; large ones lie in mapped files, so they cost no memory."""
        with self._disk():
            return allocate(spec, self._files)

    # tasks and answers

    async def ask(
        self,
        task: Task,
        clients: Sequence[ClientName],
        *,
        deadline_s: float = LONGEST_WAIT_S,
        then: str = "",
        keep: bool = False,
    ) -> AsyncGenerator[Answer, None]:
        """Give *task* to *clients* and yield one answer for each, in order of arrival; see ``Federation.ask``.

        Closing matters: iterate under ``contextlib.aclosing`` or to the end.
        """
        check_wait(deadline_s)
        pool = self._kept.setdefault(task.name, _Pool(keeps=True)) if keep else _Pool(keeps=False)
        model = None if task.model is None or not clients else await self._ref(task.model)
        wanted = IssueTasks((), model, deadline_s, then or THEN, dict(task.config), task.expects_model, keep)
        content = content_of(model, wanted.config, expects_model=task.expects_model)
        keys = [self._next_key(task.name, client, content) for client in clients]
        for key in keys:
            self._enter(key, pool)
        try:
            await self._issue(wanted, keys, pool)
            deadline = asyncio.get_running_loop().time() + deadline_s
            async for result, is_clients_own in pool.results(deadline, deadline_s):
                yield await self._answer(result, is_clients_own=is_clients_own)
        finally:
            if not keep:
                await self._withdraw(pool.unanswered)

    def outstanding(self, name: str) -> Mapping[ClientName, int]:
        """Return who has a kept task *name* whose answer was not yielded, and how many rounds ago it was asked."""
        ages: dict[ClientName, int] = {}
        for key in self._kept_keys(name):
            ages.setdefault(key.client, self.round - key.round)
        return dict(sorted(ages.items()))

    async def cancel(self, name: str, clients: Collection[ClientName] | None = None) -> None:
        """Want the outstanding answers to kept tasks *name* no longer, of *clients* or of all."""
        keys = [key for key in self._kept_keys(name) if clients is None or key.client in clients]
        if keys:
            unanswered = self._kept[name].unanswered.intersection(keys)
            self._kept[name].forget(keys)
            await self._withdraw(unanswered)

    def answered(self, result: TaskResult) -> None:
        """Take an accepted answer from the server."""
        key = result.key
        if (pool := self._pool_of.pop(key, None)) is not None:
            pool.answered(_Arrival(next(self._arrivals), result))
        elif key not in self._asked and key.round >= self.round and key not in self._early:
            self._early[key] = _Arrival(next(self._arrivals), result)

    def client_changed(self, change: ClientChanged) -> None:
        """Take note that a client was lost, came back, or failed for good: its open tasks get a fault for an answer."""
        client = change.client
        keys = [key for key in self._pool_of if key.client == client]
        if change.change == "back":
            self._unavailable.pop(client, None)
            for key in keys:
                self._pool_of[key].forget_news(key)
            return
        code = CLIENT_LOST if change.change == "lost" else CLIENT_FAILED
        what = "was lost" if code == CLIENT_LOST else "is out of the run"
        self._unavailable[client] = TaskFault(code, change.reason or f"{client} {what}")
        for key in keys:
            self._tell_of_loss(key)

    def attached(self, snapshot: RunSnapshot) -> None:
        """Take note of who was lost, failed, or came back, while nothing could be heard."""
        changes = dict.fromkeys(snapshot.lost_clients, "lost") | dict.fromkeys(snapshot.failed_clients, "failed")
        codes = {"lost": CLIENT_LOST, "failed": CLIENT_FAILED}
        for client in self.clients:
            change, known = changes.get(client, "back"), self._unavailable.get(client)
            if codes.get(change) != (known.code if known is not None else None):
                self.client_changed(ClientChanged(client, change))

    def _kept_keys(self, name: str) -> list[TaskKey]:
        """Return the keys of kept tasks *name* whose answers were not yielded, the oldest first."""
        return sorted(self._kept[name].keys, key=_order) if name in self._kept else []

    def _next_key(self, name: str, client: ClientName, content: bytes) -> TaskKey:
        """Return the key of what is now asked of *client*: no other ask of this round has it."""
        counted = self._following(name, client, b"")
        if (key := TaskKey(self.round, name, counted, client)) in self._counted:
            return key
        while True:
            key = TaskKey(self.round, name, sequence_of(content, self._following(name, client, content)), client)
            if key not in self._asked:  # or two contents have the same number by chance
                return key

    def _following(self, name: str, client: ClientName, content: bytes) -> int:
        number = self._asks[name, client, content]
        self._asks[name, client, content] += 1
        return number

    def _enter(self, key: TaskKey, pool: "_Pool") -> None:
        """Have the answer to *key* go to *pool*; at once, if it has come."""
        self._asked.add(key)
        pool.open(key)
        if (early := self._early.pop(key, None)) is not None:
            pool.answered(early)
        else:
            self._pool_of[key] = pool

    def _tell_of_loss(self, key: TaskKey) -> None:
        """Put a fault in the place of *key*'s answer if its client is not there; a kept task may still be answered."""
        fault, pool = self._unavailable.get(key.client), self._pool_of.get(key)
        if fault is None or pool is None:
            return
        news = _Arrival(next(self._arrivals), TaskResult(key, fault=fault), is_clients_own=False)
        if pool.keeps and fault.code == CLIENT_LOST:
            pool.lost(news)
        else:
            del self._pool_of[key]
            pool.given_up(news)

    async def _withdraw(self, keys: Iterable[TaskKey]) -> None:
        unwanted = sorted(keys, key=_order)
        for key in unwanted:
            self._pool_of.pop(key, None)
        if unwanted:
            await self._link.cancel(unwanted)

    @contextmanager
    def _disk(self) -> Iterator[None]:
        """Use the disk; what it refuses ends this process, and another is to find the round's tasks as they are."""
        try:
            yield
        except StoreFailed as failed:
            self.disk_failure = failed
            self._link.cut_off()
            raise

    async def _issue(self, wanted: IssueTasks, keys: Sequence[TaskKey], pool: "_Pool") -> None:
        """Have those of *keys* that have no answer yet handed out, and the server know until when they are waited for.

        Those of lost clients too: they may come back.
        """
        new = tuple(key for key in keys if key in self._pool_of)
        try:
            with self._untimed():
                await self._link.issue(msgspec.structs.replace(wanted, keys=new, model=wanted.model if new else None))
        except BaseException:
            if pool.keeps:  # none is carried of which the server may not know
                pool.forget(new)
            raise
        for key in new:
            self._tell_of_loss(key)

    @contextmanager
    def _untimed(self) -> Iterator[None]:
        """Have time stand still within the block: a store that is away takes none from those who are to answer."""
        time = asyncio.get_running_loop().time
        if not self._issuing:
            self._issuing_since = time()
        self._issuing += 1
        try:
            yield
        finally:
            self._issuing -= 1
            if not self._issuing:
                self._began += time() - self._issuing_since

    async def _ref(self, model: Model) -> ModelRef:
        async with self._storing:  # what asks side by side hand out is stored once, and not by two threads at a time
            if self._stored is None or self._stored[0] is not model:
                with self._disk():
                    self._stored = (model, await asyncio.to_thread(store_model, model, self._files))
            return self._stored[1]

    async def _answer(self, result: TaskResult, *, is_clients_own: bool) -> Answer:
        client, staleness = result.key.client, self.round - result.key.round
        if result.update is None:
            fault = result.fault or TaskFault("no-answer", f"{client} answered with neither an update nor a fault")
            if is_clients_own and fault.code in RUNS_OWN:
                fault = TaskFault(TrainingFailed.code, fault.reason, fault.retryable)
            return Answer(client, None, fault, staleness)
        reference = result.update
        model = None
        if reference.model is not None:
            self.tensors_read |= digests_of(reference.model)
            with self._disk():
                model = loaded(reference.model, self._files)
        self.answered_clients.add(client)
        return Answer(client, Update(model, reference.num_examples, reference.metrics), None, staleness)


def loaded(reference: ModelRef, files: TensorFiles) -> Model:
    """Return the model that *reference* names.

    Raises:
        TensorDamaged: the disk has lost one of its tensors, or the end of one.
    """
    try:
        return load_model(reference, files)
    except (NotFound, ProtocolError):
        files.check(tensor.digest for tensor in reference.tensors if tensor.inline is None)
        raise


class _Arrival(NamedTuple):
    """The *number*-th thing that came: a client's own answer, or a fault that the run puts in its place."""

    number: int
    result: TaskResult
    is_clients_own: bool = True


class _Pool:
    """Tasks that are asked, and what has come for them: in the order in which it came, each once.

    Of a task whose client was lost, a pool that *keeps* its tasks still expects an answer.
    """

    def __init__(self, *, keeps: bool) -> None:
        self.keeps = keeps
        self.unanswered: set[TaskKey] = set()
        """Tasks that their clients have not answered."""
        self._expected: set[TaskKey] = set()
        self._arrived: list[_Arrival] = []  # a heap: what the journal had already was not told in the order of asking
        self._news: set[TaskKey] = set()
        self._changed = asyncio.Event()

    @property
    def keys(self) -> set[TaskKey]:
        """The tasks of which no answer was taken, and may be: also that a client has failed is one."""
        return self._expected | {arrival.result.key for arrival in self._arrived}

    def open(self, key: TaskKey) -> None:
        """Expect an answer to *key*."""
        self.unanswered.add(key)
        self._expected.add(key)

    def answered(self, arrival: _Arrival) -> None:
        """Take a client's answer; with it, that its client was lost is no news any more."""
        key = arrival.result.key
        self.forget_news(key)
        self.unanswered.discard(key)
        self._expected.discard(key)
        self._push(arrival)

    def lost(self, news: _Arrival) -> None:
        """Take the news that a task's client was lost; told once until somebody has heard it."""
        key = news.result.key
        if key not in self._news:
            self._news.add(key)
            self._push(news)

    def given_up(self, news: _Arrival) -> None:
        """Take the news that a task will not be answered."""
        self._expected.discard(news.result.key)
        self._push(news)

    def forget_news(self, key: TaskKey) -> None:
        """Drop the news that *key*'s client was lost, if nobody has heard it."""
        if key in self._news:
            self._keep_arrivals(lambda arrival: arrival.result.key != key)

    def forget(self, keys: Collection[TaskKey]) -> None:
        """Drop *keys* and whatever came for them."""
        self.unanswered.difference_update(keys)
        self._expected.difference_update(keys)
        self._keep_arrivals(lambda arrival: arrival.result.key not in keys)

    def _push(self, arrival: _Arrival) -> None:
        heapq.heappush(self._arrived, arrival)
        self._changed.set()

    def _keep_arrivals(self, is_kept: Callable[[_Arrival], bool]) -> None:
        self._arrived = [arrival for arrival in self._arrived if is_kept(arrival)]
        self._news.intersection_update([arrival.result.key for arrival in self._arrived])
        heapq.heapify(self._arrived)

    async def results(self, deadline: float, deadline_s: float) -> AsyncGenerator[tuple[TaskResult, bool], None]:
        """Yield what comes until nothing more is expected, and at the *deadline* a fault for each that is missing.

        With each it says whether it is the client's own.
        """
        while self._arrived or self._expected:
            if self._arrived:
                _, result, is_clients_own = heapq.heappop(self._arrived)
                self._news.discard(result.key)
                yield result, is_clients_own
                continue
            self._changed.clear()
            try:
                async with asyncio.timeout_at(deadline):
                    await self._changed.wait()
            except TimeoutError:
                if not self._arrived:
                    break
        for key in sorted(self._expected, key=_order):
            late = TaskFault(DEADLINE, f"{key.client} did not answer within {deadline_s:g} s")
            yield TaskResult(key, fault=late), False


def _order(key: TaskKey) -> tuple[int, str, int, ClientName]:
    return key.round, key.name, key.sequence, key.client
