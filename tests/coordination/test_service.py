"""The service state as a value: all states × requests, all states × states, and what the overseer's word does."""

from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hanse.coordination.service import (
    LEGAL,
    NO_SESSION,
    TABLE,
    UNKNOWN_SSID,
    RequestKind,
    Service,
    ServiceState,
    Verdict,
    message,
    observe,
    parked,
    refusal,
    restored,
    shut_down,
)
from hanse.errors import Conflict
from hanse.ids import Ssid

COLD, COLD2HOT, HOT, HOT2COLD, SHUTDOWN = ServiceState
REGISTER, HEARTBEAT, GET_TASK, SUBMIT = RequestKind
OURS, THEIRS = Ssid("ours"), Ssid("theirs")

# The contract's table, written out a second time on purpose.
CONTRACT = {
    COLD: ("no", "no", "no", "no"),
    COLD2HOT: ("yes", "no", "abort run", "abort run"),
    HOT: ("yes", "yes", "yes", "yes"),
    HOT2COLD: ("no", "no", "no", "no"),
    SHUTDOWN: ("no", "no", "no", "no"),
}
SENTENCES = {"yes": None, "no": "Server not in service", "abort run": "Abort current run"}


def service_in(state: ServiceState) -> Service:
    return Service(state, OURS if state in (COLD2HOT, HOT, HOT2COLD) else NO_SESSION)


@pytest.mark.parametrize(("state", "kind"), list(product(ServiceState, RequestKind)))
def test_each_state_answers_each_request_as_the_contract_says(state: ServiceState, kind: RequestKind) -> None:
    expected = SENTENCES[CONTRACT[state][list(RequestKind).index(kind)]]

    assert message(TABLE[state, kind]) == expected
    assert service_in(state).verdict(kind) is TABLE[state, kind]


def test_a_server_with_an_overseer_begins_cold_and_without_a_session() -> None:
    assert Service() == Service(COLD, NO_SESSION)


@pytest.mark.parametrize(("state", "to"), list(product(ServiceState, ServiceState)))
def test_only_legal_moves_can_be_reached(state: ServiceState, to: ServiceState) -> None:
    reached = {shut_down(service_in(state)).state}
    for word in product((None, NO_SESSION, OURS, THEIRS), (True, False)):
        reached.add(observe(service_in(state), primary_ssid=word[0], is_me=word[1]).state)
    for arrive in (restored, parked):
        try:
            reached.add(arrive(service_in(state)).state)
        except Conflict:
            continue

    assert (to in reached) == (to in LEGAL[state] or to is state)


@pytest.mark.parametrize(
    ("state", "ssid", "is_me", "expected"),
    [
        (COLD, OURS, True, Service(COLD2HOT, OURS)),
        (COLD, OURS, False, Service(COLD, NO_SESSION)),
        (COLD, None, True, Service(COLD, NO_SESSION)),
        (COLD, NO_SESSION, True, Service(COLD, NO_SESSION)),
        (HOT, OURS, True, Service(HOT, OURS)),
        (HOT, THEIRS, True, Service(HOT2COLD, OURS)),
        (HOT, OURS, False, Service(HOT2COLD, OURS)),
        (HOT, THEIRS, False, Service(HOT2COLD, OURS)),
        (HOT, None, True, Service(HOT2COLD, OURS)),
        (HOT, None, False, Service(HOT2COLD, OURS)),
    ],
)
def test_the_overseers_word_moves_a_settled_server(
    state: ServiceState, ssid: Ssid | None, is_me: bool, expected: Service
) -> None:
    assert observe(service_in(state), primary_ssid=ssid, is_me=is_me) == expected


@pytest.mark.parametrize("state", [COLD2HOT, HOT2COLD, SHUTDOWN])
@pytest.mark.parametrize("ssid", [None, OURS, THEIRS])
@pytest.mark.parametrize("is_me", [True, False])
def test_the_overseers_word_changes_nothing_on_the_way_or_after_shutdown(
    state: ServiceState, ssid: Ssid | None, is_me: bool
) -> None:
    assert observe(service_in(state), primary_ssid=ssid, is_me=is_me) == service_in(state)


def test_a_tenure_takes_its_session_when_it_begins_and_loses_it_when_it_is_over() -> None:
    tenure = [Service()]
    tenure.append(observe(tenure[-1], primary_ssid=OURS, is_me=True))
    tenure.append(restored(tenure[-1]))
    tenure.append(observe(tenure[-1], primary_ssid=THEIRS, is_me=False))
    tenure.append(parked(tenure[-1]))

    assert [service.state for service in tenure] == [COLD, COLD2HOT, HOT, HOT2COLD, COLD]
    assert [service.ssid for service in tenure] == ["", OURS, OURS, OURS, ""]


@pytest.mark.parametrize("state", [COLD, HOT, HOT2COLD])
def test_restored_refuses_a_server_that_was_not_becoming_hot(state: ServiceState) -> None:
    with pytest.raises(Conflict, match=f"the service is {state}, so it cannot be hot"):
        restored(service_in(state))


@pytest.mark.parametrize("state", [COLD, COLD2HOT, HOT])
def test_parked_refuses_a_server_that_was_not_becoming_cold(state: ServiceState) -> None:
    with pytest.raises(Conflict, match=f"the service is {state}, so it cannot be cold"):
        parked(service_in(state))


def test_a_shutdown_that_overtakes_a_move_stays() -> None:
    down = shut_down(service_in(COLD2HOT))

    assert down == Service(SHUTDOWN, NO_SESSION)
    assert restored(down) == parked(down) == shut_down(down) == down


def test_a_request_of_this_session_passes() -> None:
    assert refusal(service_in(HOT), Verdict.YES, ssid=OURS) is None


@pytest.mark.parametrize("ssid", [None, NO_SESSION, THEIRS])
def test_a_request_of_another_session_is_refused(ssid: Ssid | None) -> None:
    assert refusal(service_in(HOT), Verdict.YES, ssid=ssid) == UNKNOWN_SSID == "Request from unknown client SSID"


def test_a_request_without_a_session_is_refused_even_by_a_server_without_one() -> None:
    assert refusal(Service(), Verdict.YES, ssid=None) == UNKNOWN_SSID


@pytest.mark.parametrize("verdict", [Verdict.NOT_IN_SERVICE, Verdict.ABORT_RUN])
def test_the_state_speaks_before_the_session(verdict: Verdict) -> None:
    assert refusal(service_in(HOT), verdict, ssid=THEIRS) == message(verdict)
    assert refusal(service_in(HOT), verdict, ssid=OURS) == message(verdict)


words = st.tuples(st.sampled_from([None, NO_SESSION, OURS, THEIRS]), st.booleans())
events = st.lists(st.one_of(words, st.sampled_from(["restored", "parked", "shut down"])))


@given(events)
def test_whatever_happens_a_server_serves_only_under_a_session_that_was_named_primary(history: list[object]) -> None:
    services, named = [Service()], set()
    for event in history:
        service = services[-1]
        try:
            match event:
                case "restored":
                    services.append(restored(service))
                case "parked":
                    services.append(parked(service))
                case "shut down":
                    services.append(shut_down(service))
                case (ssid, is_me):
                    if is_me:
                        named.add(ssid)
                    services.append(observe(service, primary_ssid=ssid, is_me=is_me))
        except Conflict:
            continue

    for before, after in pairwise(services):
        assert after.state is before.state or after.state in LEGAL[before.state]
        assert (after.ssid == NO_SESSION) == (after.state in (COLD, SHUTDOWN))
        assert after.ssid == NO_SESSION or after.ssid in named
