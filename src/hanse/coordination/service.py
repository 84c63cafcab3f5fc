"""Whether this server serves now, and which requests it answers meanwhile.

A server is one value, ``Service``: a state and the service session id (SSID) of its tenure. ``observe`` takes the
overseer's word on who is primary; ``restored``, ``parked`` and ``shut_down`` report what the server itself has done.
``LEGAL`` is the table of what may follow what and ``TABLE`` the one of what each state answers; the documentation's
table and the tests come from both.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from hanse.errors import Conflict
from hanse.ids import Ssid

NO_SESSION: Final = Ssid("")
UNKNOWN_SSID: Final = "Request from unknown client SSID"


class ServiceState(StrEnum):
    """Where a server is between serving and not serving."""

    COLD = "cold"
    COLD2HOT = "cold2hot"
    HOT = "hot"
    HOT2COLD = "hot2cold"
    SHUTDOWN = "shutdown"


LEGAL: Final[Mapping[ServiceState, frozenset[ServiceState]]] = {
    ServiceState.COLD: frozenset({ServiceState.COLD2HOT, ServiceState.SHUTDOWN}),
    ServiceState.COLD2HOT: frozenset({ServiceState.HOT, ServiceState.SHUTDOWN}),
    ServiceState.HOT: frozenset({ServiceState.HOT2COLD, ServiceState.SHUTDOWN}),
    ServiceState.HOT2COLD: frozenset({ServiceState.COLD, ServiceState.SHUTDOWN}),
    ServiceState.SHUTDOWN: frozenset(),
}
"""What may follow what."""


class RequestKind(StrEnum):
    """The kinds of request that a service state decides about."""

    REGISTER = "register"
    HEARTBEAT = "heartbeat"
    GET_TASK = "get_task"
    SUBMIT = "submit"


class Verdict(StrEnum):
    """What a service state says to a request."""

    YES = "yes"
    NOT_IN_SERVICE = "not_in_service"
    ABORT_RUN = "abort_run"


_MESSAGES: Final[Mapping[Verdict, str | None]] = {
    Verdict.YES: None,
    Verdict.NOT_IN_SERVICE: "Server not in service",
    Verdict.ABORT_RUN: "Abort current run",
}

_ANSWERS: Final[Mapping[ServiceState, tuple[Verdict, Verdict, Verdict, Verdict]]] = {
    # in the order of RequestKind: register, heartbeat, get task, submit result
    ServiceState.COLD: (Verdict.NOT_IN_SERVICE,) * 4,
    ServiceState.COLD2HOT: (Verdict.YES, Verdict.NOT_IN_SERVICE, Verdict.ABORT_RUN, Verdict.ABORT_RUN),
    ServiceState.HOT: (Verdict.YES,) * 4,
    ServiceState.HOT2COLD: (Verdict.NOT_IN_SERVICE,) * 4,
    ServiceState.SHUTDOWN: (Verdict.NOT_IN_SERVICE,) * 4,
}

TABLE: Final[Mapping[tuple[ServiceState, RequestKind], Verdict]] = {
    (state, kind): verdict
    for state, verdicts in _ANSWERS.items()
    for kind, verdict in zip(RequestKind, verdicts, strict=True)
}
"""What each state answers to each kind of request."""


@dataclass(frozen=True, slots=True)
class Service:
    """A server's state and the session of its tenure, which is ``NO_SESSION`` while it has none.

    A server with an overseer begins as ``Service()``, cold; one without begins as
    ``Service(ServiceState.HOT, ssid)``.
    """

    state: ServiceState = ServiceState.COLD
    ssid: Ssid = NO_SESSION

    def verdict(self, kind: RequestKind) -> Verdict:
        """Return what this service says to a request of *kind*."""
        return TABLE[self.state, kind]


def message(verdict: Verdict) -> str | None:
    """Return the sentence that answers a request with *verdict*; ``None`` when it may pass."""
    return _MESSAGES[verdict]


def refusal(service: Service, verdict: Verdict, *, ssid: Ssid | None) -> str | None:
    """Return why a request with *verdict* and *ssid* may not pass, or ``None`` when it may.

    The state speaks first, so that a client of an earlier session learns that the server is not in service before it
    is asked to register anew.
    """
    refused = message(verdict)
    if refused is not None:
        return refused
    return None if ssid is not None and ssid == service.ssid else UNKNOWN_SSID


def observe(service: Service, *, primary_ssid: Ssid | None, is_me: bool) -> Service:
    """Return *service* after the overseer's word that the session *primary_ssid* is primary, and whether it *is_me*.

    ``None`` or an empty SSID says that nobody is: a hot server that hears it has lost its lease. While a move is under
    way, and after shutdown, the word changes nothing; ask the overseer again once the move is done.
    """
    is_primary = is_me and bool(primary_ssid)
    if service.state is ServiceState.COLD and is_primary and primary_ssid is not None:
        return _moved(service, ServiceState.COLD2HOT, primary_ssid)
    if service.state is ServiceState.HOT and not (is_primary and primary_ssid == service.ssid):
        return _moved(service, ServiceState.HOT2COLD, service.ssid)
    return service


def restored(service: Service) -> Service:
    """Return *service* once the committed runs are restored: hot. A shutdown that came first stays.

    Raises:
        Conflict: the server was not on its way to hot.
    """
    return _arrived(service, ServiceState.HOT, service.ssid)


def parked(service: Service) -> Service:
    """Return *service* once its runs are parked: cold, with no session. A shutdown that came first stays.

    Raises:
        Conflict: the server was not on its way to cold.
    """
    return _arrived(service, ServiceState.COLD, NO_SESSION)


def shut_down(service: Service) -> Service:
    """Return *service* shut down, for good; twice is once."""
    if service.state is ServiceState.SHUTDOWN:
        return service
    return _moved(service, ServiceState.SHUTDOWN, NO_SESSION)


def _arrived(service: Service, to: ServiceState, ssid: Ssid) -> Service:
    if service.state is ServiceState.SHUTDOWN:
        return service
    return _moved(service, to, ssid)


def _moved(service: Service, to: ServiceState, ssid: Ssid) -> Service:
    if to not in LEGAL[service.state]:
        raise Conflict("the service", state=service.state.value, wanted=to.value)
    return Service(to, ssid)
