"""What one client may add to a run's tensor files: the tensors of its answers, and no more of them than it may need.

A client's process is the site's, and the disk is everybody's. So tensors are taken from who has a task to answer with
them, in sizes that the task's model has, and together not more than a few answers' worth a round.
"""

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from hanse.errors import NotInService, StoreFailed, UpdateRejected
from hanse.ids import ClientName, Digest
from hanse.messages import TaskAssignment
from hanse.storage.tensors import Partial, Reading, TensorFiles

MAX_ANSWERS_PER_TASK: Final = 8
"""How many different answers' tensors are taken for one task: a process that died before it answered trains again."""


class Inbox:
    """The tensor files of a run, as *client* may use them for its next answer. ``expect`` comes before ``begin``.

    *on_trouble* hears, in any thread, of what the disk does not take, or give.
    """

    def __init__(
        self, files: TensorFiles, client: ClientName, *, on_trouble: Callable[[StoreFailed], None] = lambda _: None
    ) -> None:
        self._files, self._client, self._on_trouble = files, client, on_trouble
        self._tasks: tuple[TaskAssignment, ...] = ()
        self._sizes: frozenset[int] = frozenset()
        self._most, self._most_bytes = 0, 0
        self._may_be_ahead = False
        self._begun: dict[Digest, int] = {}
        self._lock = threading.Lock()

    def expect(self, tasks: Sequence[TaskAssignment], *, may_be_ahead: bool = False) -> None:
        """Take what answers to *tasks*, those that the client has to answer now, consist of.

        With *may_be_ahead* it may have a task more, which will be known here when it has been issued again.
        """
        self._may_be_ahead = may_be_ahead
        expecting = tuple(task for task in tasks if task.expects_model and task.model is not None)
        if expecting == self._tasks:
            return
        sizes = [tensor.size_bytes for task in expecting if task.model is not None for tensor in task.model.tensors]
        with self._lock:
            self._tasks, self._sizes = expecting, frozenset(sizes)
            self._most, self._most_bytes = MAX_ANSWERS_PER_TASK * len(sizes), MAX_ANSWERS_PER_TASK * sum(sizes)

    @property
    def begun(self) -> frozenset[Digest]:
        """The tensors that the client has begun to send."""
        with self._lock:
            return frozenset(self._begun)

    def has(self, digest: Digest) -> bool:
        """See ``TensorFiles``."""
        return self._files.has(digest)

    def missing(self, digests: Iterable[Digest]) -> list[Digest]:
        """See ``TensorFiles``."""
        return self._files.missing(digests)

    def map(self, digest: Digest) -> memoryview:
        """See ``TensorFiles``."""
        return self._files.map(digest)

    def open(self, digest: Digest) -> Reading:
        """See ``TensorFiles``."""
        return self._files.open(digest, on_trouble=self._on_trouble)

    def begin(self, digest: Digest, size: int) -> Partial:
        """Begin to take a tensor, or go on with one begun before; from any thread.

        Raises:
            UpdateRejected: no task of the client asks for such a tensor, or it has sent enough for its answer.
            NotInService: its task may still have to be issued again.
            StoreFailed: the disk has no place for it.
        """
        with self._lock:
            if size not in self._sizes and self._may_be_ahead:
                raise NotInService(f"Server not in service: it has not taken up the task of {self._client} yet")
            if size not in self._sizes:
                raise UpdateRejected(self._client, f"a tensor of {size} bytes, which no task that it has asks for")
            if digest not in self._begun and sum(self._begun.values()) + size > self._most_bytes:
                raise UpdateRejected(self._client, f"more than the {self._most_bytes} bytes that its answers may need")
            if digest not in self._begun and len(self._begun) >= self._most:
                raise UpdateRejected(self._client, f"more than the {self._most} tensors that its answers may need")
            self._begun[digest] = size
        return self._files.begin(digest, size, on_trouble=self._on_trouble)
