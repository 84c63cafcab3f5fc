"""What happens in a server or a run, and how handlers hear of it.

Handlers are instances of ``FLComponent``, held by whoever fires the events (a server, a run): nothing is global, and
two instances of one class both receive. They are called in the order given. At a *gate* a handler decides: one that
raises refuses the thing with its reason, and one that crashes refuses too. A *notice* only tells: a handler that raises
is logged and hurts nobody else.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from hanse.ids import JobId
from hanse.messages import Message, Metrics

_log = logging.getLogger(__name__)


class EventType(StrEnum):
    """The events, by the names of the server's contract."""

    CLIENT_REGISTER_RECEIVED = "client_register_received"
    CLIENT_HEARTBEAT_RECEIVED = "client_heartbeat_received"
    JOB_SUBMITTED = "job_submitted"
    BEFORE_JOB_LAUNCH = "before_job_launch"
    BEFORE_TASK_DATA = "before_task_data"
    BEFORE_TASK_RESULT = "before_task_result"

    SYSTEM_START = "system_start"
    SYSTEM_END = "system_end"
    CLIENT_REGISTER_PROCESSED = "client_register_processed"
    CLIENT_HEARTBEAT_PROCESSED = "client_heartbeat_processed"
    CLIENT_QUIT = "client_quit"
    CLIENT_DISCONNECTED = "client_disconnected"
    CLIENT_RECONNECTED = "client_reconnected"
    JOB_DEPLOYED = "job_deployed"
    JOB_STARTED = "job_started"
    JOB_COMPLETED = "job_completed"
    JOB_FAILED = "job_failed"
    JOB_ABORTED = "job_aborted"
    START_RUN = "start_run"
    END_RUN = "end_run"
    ROUND_STARTED = "round_started"
    ROUND_DONE = "round_done"
    TASK_SENT = "task_sent"
    RESULT_ACCEPTED = "result_accepted"


GATES: Final = frozenset(
    {
        EventType.CLIENT_REGISTER_RECEIVED,
        EventType.CLIENT_HEARTBEAT_RECEIVED,
        EventType.JOB_SUBMITTED,
        EventType.BEFORE_JOB_LAUNCH,
        EventType.BEFORE_TASK_DATA,
        EventType.BEFORE_TASK_RESULT,
    }
)


@dataclass(frozen=True, slots=True)
class FLContext:
    """What an event is about. Fields that do not apply are empty.

    ``scope`` is ``server`` or ``run``; ``peer`` names the client concerned; ``message`` is the request at a gate.
    """

    scope: str
    project: str = ""
    peer: str = ""
    job_id: JobId | None = None
    round: int = 0
    message: Message | None = None
    metrics: Metrics | None = None
    reason: str = ""


class FLComponent:
    """Something that handles events; subclass it and override ``handle_event``."""

    def handle_event(self, event_type: EventType, fl_ctx: FLContext) -> None:
        """Hear of an event. The default takes no notice of any."""
        del event_type, fl_ctx


class Refused(Exception):
    """A handler's refusal at a gate; its text is the reason that the peer gets."""


class Handlers:
    """An ordered set of handlers, and the two ways to call them."""

    def __init__(self, components: Iterable[FLComponent] = ()) -> None:
        self._components = tuple(components)
        for position, component in enumerate(self._components):
            if not isinstance(component, FLComponent):
                raise TypeError(f"handlers[{position}] is {component!r}; expected an instance of FLComponent")

    def ask(self, gate: EventType, context: FLContext) -> str | None:
        """Ask every handler at *gate*; return the first one's reason to refuse, or ``None`` when all let it pass.

        A handler that crashes refuses: what guards a gate and does not work must not leave it open.
        """
        for component in self._components:
            try:
                component.handle_event(gate, context)
            except Refused as refused:
                return str(refused) or f"refused by {type(component).__name__}"
            except Exception as error:  # noqa: BLE001 - a crashing handler refuses; the log has its traceback
                _log.exception("handler crashed at a gate", extra={"gate": gate.value})
                return f"{type(component).__name__} failed at {gate.value}: {error}"
        return None

    def tell(self, notice: EventType, context: FLContext) -> None:
        """Tell every handler of *notice*; one that raises is logged, and the others still hear of it."""
        for component in self._components:
            try:
                component.handle_event(notice, context)
            except Exception:  # noqa: BLE001 - one handler's failure must not hurt the others
                _log.exception("handler failed at a notice", extra={"notice": notice.value})

    def extended(self, components: Iterable[FLComponent]) -> "Handlers":
        """Return these handlers with *components* after them."""
        return Handlers((*self._components, *components))


def at(context: FLContext, *, round_number: int) -> FLContext:
    """Return *context* at round *round_number*."""
    return replace(context, round=round_number)
