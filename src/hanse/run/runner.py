"""Driving a workflow: load the last committed state, call the step, commit what it returns, until it is done.

Every workflow survives a crash because of this loop and nothing else: the state is committed after each round, and the
round that was interrupted is called again with the same state and finds the answers that were already accepted.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import TypeVar

import msgspec

from hanse.errors import HanseError, WorkflowFailed
from hanse.ids import ClientName, Digest
from hanse.job import JobSpec
from hanse.learning.workflow import State, Workflow, afresh, check_first, check_next, is_over
from hanse.messages import RunSnapshot, StateRef, TaskKey
from hanse.model import Model
from hanse.run.federation import RunFederation, loaded
from hanse.run.server_link import ServerLink
from hanse.storage.models import state_digests, store_model
from hanse.storage.tensors import TensorFiles

T = TypeVar("T")


async def drive(
    workflow: Workflow,
    *,
    spec: JobSpec,
    snapshot: RunSnapshot,
    initial: Callable[[], Model],
    link: ServerLink,
    files: TensorFiles,
    federation: RunFederation,
    is_stopping: Callable[[], bool] = lambda: False,
) -> State:
    """Drive *workflow* from where *snapshot* says to its end, and return its last state.

    *initial* makes the model that round 0 commits; it is not called when a state was committed before. Before each
    round *is_stopping* is asked: if so, the state so far is returned, which is committed but not the last.

    Raises:
        WorkflowFailed: the workflow's code raised, or returned something that is no next state.
        StoreFailed: the disk did not do what the round needs, whatever the workflow's code has made of that.
        HanseError: as the workflow raised it (``TooFewClients``), or the server's refusal to commit.
    """
    if snapshot.state is None:
        began = time.monotonic()
        first = await _guarded(spec, 0, asyncio.to_thread(lambda: afresh(workflow, 0).start(initial())))
        state = check_first(first, workflow=spec.workflow.name)
        reference = await _commit(state, link, files, began=began)
    else:
        reference = snapshot.state
    state = load_state(reference, files)
    while not is_over(workflow, state) and not is_stopping():
        number = state.round + 1
        federation.enter_round(number)
        began = time.monotonic()
        following = await _next(workflow, state, federation, spec)
        state = check_next(state, following, workflow=spec.workflow.name)
        carried = () if is_over(workflow, state) else federation.carried
        answered = sorted(federation.answered_clients)
        read = state_digests(reference) | federation.tensors_read
        reference = await _commit(state, link, files, read=read, began=began, answered=answered, carried=carried)
        state = load_state(reference, files)
    return state


async def _commit(
    state: State,
    link: ServerLink,
    files: TensorFiles,
    *,
    began: float,
    read: Collection[Digest] = (),
    answered: Sequence[ClientName] = (),
    carried: Sequence[TaskKey] = (),
) -> StateRef:
    """Commit *state*, and return it by name, as whoever goes on after a crash reads it: a tuple has become a list.

    Loaded from there it is mapped, and what was in memory is let go.

    Raises:
        TensorDamaged: one of the tensors *read* for it is not as it was, and may have been read so; nothing is
            committed.
    """
    # Afterwards, for what is right now was right whenever it was read.
    reference, _ = await asyncio.gather(
        asyncio.to_thread(store_state, state, files), asyncio.to_thread(files.check, read)
    )
    await link.commit(reference, took_s=time.monotonic() - began, answered=answered, carried=carried)
    return msgspec.msgpack.decode(msgspec.msgpack.encode(reference), type=StateRef)


def store_state(state: State, files: TensorFiles) -> StateRef:
    """Put *state*'s tensors into *files* and return the state by name."""
    return StateRef(
        round=state.round,
        model=store_model(state.model, files),
        extra={name: store_model(model, files) for name, model in state.extra.items()},
        values=dict(state.values),
        metrics=dict(state.metrics),
        done=state.done,
    )


def load_state(reference: StateRef, files: TensorFiles) -> State:
    """Return the state that *reference* names, its arrays mapped from *files*.

    Raises:
        TensorDamaged: the disk has lost one of its tensors, or the end of one.
    """
    return State(
        model=loaded(reference.model, files),
        round=reference.round,
        extra={name: loaded(model, files) for name, model in reference.extra.items()},
        values=reference.values,
        metrics=reference.metrics,
        done=reference.done,
    )


async def _next(workflow: Workflow, state: State, federation: RunFederation, spec: JobSpec) -> object:
    """Return what *workflow* makes of *state*, if the disk does what that needs.

    A workflow may take what an ask raises for a client's fault, and go on without that client's answer.
    """
    try:
        number = state.round + 1
        following = await _guarded(spec, number, afresh(workflow, number).round(state, federation))
    except HanseError:
        if federation.disk_failure is not None:
            raise federation.disk_failure from None
        raise
    if federation.disk_failure is not None:
        raise federation.disk_failure
    return following


async def _guarded(spec: JobSpec, number: int, step: Awaitable[T]) -> T:
    try:
        return await step
    except HanseError:
        raise
    except (Exception, SystemExit) as error:  # which would end the event loop, and the process without a word
        raise WorkflowFailed(spec.workflow.name, number, f"{type(error).__name__}: {error}") from error
