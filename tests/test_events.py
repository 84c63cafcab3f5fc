"""Handlers at gates and notices: order, refusal, and whom a crash hurts."""

import logging

import pytest

from hanse.events import GATES, EventType, FLComponent, FLContext, Handlers, Refused, at
from hanse.ids import JobId

GATE, NOTICE = EventType.CLIENT_REGISTER_RECEIVED, EventType.CLIENT_QUIT
CONTEXT = FLContext("server", project="demo", peer="site-1")


class Recorder(FLComponent):
    """Writes down what it hears, and then raises *error* if it has one."""

    def __init__(self, heard: list[tuple[str, EventType, FLContext]], name: str, error: BaseException | None = None):
        self.heard, self.name, self.error = heard, name, error

    def handle_event(self, event_type: EventType, fl_ctx: FLContext) -> None:
        self.heard.append((self.name, event_type, fl_ctx))
        if self.error is not None:
            raise self.error


def test_the_gates_are_those_of_the_contract() -> None:
    assert {gate.name for gate in GATES} == {
        "CLIENT_REGISTER_RECEIVED", "CLIENT_HEARTBEAT_RECEIVED", "JOB_SUBMITTED", "BEFORE_JOB_LAUNCH",
        "BEFORE_TASK_DATA", "BEFORE_TASK_RESULT",
    }  # fmt: skip


def test_the_notices_are_those_of_the_contract() -> None:
    assert {event.name for event in EventType if event not in GATES} == {
        "SYSTEM_START", "SYSTEM_END", "CLIENT_REGISTER_PROCESSED", "CLIENT_HEARTBEAT_PROCESSED", "CLIENT_QUIT",
        "CLIENT_DISCONNECTED", "CLIENT_RECONNECTED", "JOB_DEPLOYED", "JOB_STARTED", "JOB_COMPLETED", "JOB_FAILED",
        "JOB_ABORTED", "START_RUN", "END_RUN", "ROUND_STARTED", "ROUND_DONE", "TASK_SENT", "RESULT_ACCEPTED",
    }  # fmt: skip


def test_a_gate_without_handlers_is_open() -> None:
    assert Handlers().ask(GATE, CONTEXT) is None
    Handlers().tell(NOTICE, CONTEXT)


def test_all_handlers_are_asked_in_order_and_may_let_it_pass() -> None:
    heard: list[tuple[str, EventType, FLContext]] = []
    handlers = Handlers([Recorder(heard, "first"), FLComponent(), Recorder(heard, "second")])

    assert handlers.ask(GATE, CONTEXT) is None
    assert heard == [("first", GATE, CONTEXT), ("second", GATE, CONTEXT)]


def test_the_first_refusal_decides_and_nobody_is_asked_after_it() -> None:
    heard: list[tuple[str, EventType, FLContext]] = []
    handlers = Handlers(
        [Recorder(heard, "a"), Recorder(heard, "b", Refused("not today")), Recorder(heard, "c", Refused("never"))]
    )

    assert handlers.ask(GATE, CONTEXT) == "not today"
    assert [name for name, _, _ in heard] == ["a", "b"]


def test_a_refusal_without_a_reason_says_who_refused() -> None:
    assert Handlers([Recorder([], "a", Refused())]).ask(GATE, CONTEXT) == "refused by Recorder"


def test_a_handler_that_crashes_at_a_gate_refuses_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    handlers = Handlers([Recorder([], "a", KeyError("quota"))])

    assert handlers.ask(GATE, CONTEXT) == "Recorder failed at client_register_received: 'quota'"
    assert [(record.levelno, record.gate) for record in caplog.records] == [(logging.ERROR, GATE.value)]  # type: ignore[attr-defined]  # a field of the log line
    assert caplog.records[0].exc_info is not None


def test_a_handler_that_fails_at_a_notice_hurts_nobody_else(caplog: pytest.LogCaptureFixture) -> None:
    heard: list[tuple[str, EventType, FLContext]] = []
    errors = [ValueError("x"), Refused("no"), None]
    handlers = Handlers(Recorder(heard, str(number), error) for number, error in enumerate(errors))

    handlers.tell(NOTICE, CONTEXT)
    assert [name for name, _, _ in heard] == ["0", "1", "2"]
    assert [record.levelno for record in caplog.records] == [logging.ERROR] * 2


@pytest.mark.parametrize("interruption", [KeyboardInterrupt(), SystemExit(1)])
def test_an_interruption_is_not_a_handlers_failure(interruption: BaseException) -> None:
    handlers = Handlers([Recorder([], "a", interruption)])

    with pytest.raises(type(interruption)):
        handlers.ask(GATE, CONTEXT)
    with pytest.raises(type(interruption)):
        handlers.tell(NOTICE, CONTEXT)


def test_two_instances_of_one_class_both_hear() -> None:
    heard: list[tuple[str, EventType, FLContext]] = []
    Handlers([Recorder(heard, "one"), Recorder(heard, "two")]).tell(NOTICE, CONTEXT)

    assert [name for name, _, _ in heard] == ["one", "two"]


def test_added_handlers_come_after_and_leave_the_first_set_as_it_was() -> None:
    heard: list[tuple[str, EventType, FLContext]] = []
    first = Handlers([Recorder(heard, "one")])
    both = first.extended([Recorder(heard, "two")])

    both.tell(NOTICE, CONTEXT)
    first.tell(NOTICE, CONTEXT)
    assert [name for name, _, _ in heard] == ["one", "two", "one"]


def test_a_handler_is_an_instance_of_a_component() -> None:
    with pytest.raises(TypeError, match=r"handlers\[1\] is .*expected an instance of FLComponent"):
        Handlers([FLComponent(), FLComponent])  # type: ignore[list-item]  # the mistake that is tested


def test_a_context_is_taken_to_a_round() -> None:
    context = FLContext("run", job_id=JobId("j1"))

    assert at(context, round_number=3) == FLContext("run", job_id=JobId("j1"), round=3)
    assert context.round == 0
