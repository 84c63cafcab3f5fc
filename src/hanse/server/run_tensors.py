"""Which tensors a run needs to go on, and how it goes on when some of them are lost."""

import logging
from collections.abc import Collection

from hanse.errors import TensorsLost
from hanse.ids import Digest, JobId
from hanse.messages import TaskResult
from hanse.storage.models import digests_of, state_digests
from hanse.storage.records import RunState, Store

_log = logging.getLogger(__name__)


def needed_tensors(state: RunState) -> set[Digest]:
    """Return the tensors that a run which goes on from *state* needs."""
    needed = set() if state.state is None else state_digests(state.state)
    for task in state.tasks:
        needed |= set() if task.model is None else digests_of(task.model)
    return needed.union(*map(_answer_tensors, state.answers))


async def without_lost(store: Store, epoch: int, job_id: JobId, state: RunState, lost: Collection[Digest]) -> RunState:
    """Return *state* without the answers of which a tensor is *lost*: their clients are to be asked again.

    Raises:
        TensorsLost: the run cannot go on without them.
    """
    _log.error("tensors are lost", extra={"job": job_id, "digests": sorted(lost)})
    gone = set(lost)
    if state.state is not None and (of_state := gone & state_digests(state.state)):
        raise TensorsLost(job_id, state.state.round, min(of_state))
    spoilt = [answer.key for answer in state.answers if _answer_tensors(answer) & gone]
    await store.retract_answers(epoch, job_id, spoilt)
    return await store.snapshot(job_id)


def _answer_tensors(answer: TaskResult) -> set[Digest]:
    model = answer.update.model if answer.update is not None else None
    return set() if model is None else digests_of(model)
