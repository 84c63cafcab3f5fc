"""Registration sessions: one per origin, used once, expiring, bounded."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hanse.coordination.admission import NONCE_BYTES, Admission, Session
from hanse.errors import NotInService, ProtocolError, Unauthenticated
from hanse.ids import ClientName


def session(client: str = "site-1", nonce: int = 0) -> Session:
    return Session(ClientName(client), "demo", bytes([nonce]) * NONCE_BYTES, b"s" * NONCE_BYTES, b"PEM")


def test_a_session_is_taken_by_its_origin() -> None:
    admission = Admission()
    admission.open("link-1", session(), now=0)

    assert admission.take("link-1", now=59.9) == session()


def test_a_session_is_used_once() -> None:
    admission = Admission()
    admission.open("link-1", session(), now=0)
    admission.take("link-1", now=1)

    with pytest.raises(Unauthenticated, match="no registration session"):
        admission.take("link-1", now=1)


def test_registration_without_a_challenge_is_refused() -> None:
    admission = Admission()
    admission.open("link-1", session(), now=0)

    with pytest.raises(Unauthenticated, match="no registration session"):
        admission.take("link-2", now=1)
    assert admission.take("link-1", now=1) == session()


def test_a_session_ends_after_its_time() -> None:
    admission = Admission(max_duration_s=60)
    admission.open("link-1", session(), now=5)

    with pytest.raises(Unauthenticated, match="has expired"):
        admission.take("link-1", now=65)
    assert len(admission) == 0


def test_a_second_challenge_replaces_the_first() -> None:
    admission = Admission(max_sessions=1)
    admission.open("link-1", session(nonce=1), now=0)
    admission.open("link-1", session(nonce=2), now=1)

    assert len(admission) == 1
    assert admission.take("link-1", now=2) == session(nonce=2)


def test_a_replaced_session_lives_as_long_as_a_new_one() -> None:
    admission = Admission(max_duration_s=60)
    admission.open("link-1", session(), now=0)
    admission.open("link-2", session("site-2"), now=10)
    admission.open("link-1", session(), now=30)

    assert admission.take("link-1", now=89) == session()
    with pytest.raises(Unauthenticated):
        admission.take("link-2", now=89)


def test_when_full_a_further_origin_is_told_when_to_try_again_and_nobody_is_evicted() -> None:
    admission = Admission(max_sessions=2, max_duration_s=60)
    admission.open("link-1", session(), now=0)
    admission.open("link-2", session("site-2"), now=10)

    with pytest.raises(NotInService, match=r"2 registrations are under way.*try again in 40 s"):
        admission.open("link-3", session("site-3"), now=20)
    assert admission.take("link-1", now=20) == session()


def test_expired_sessions_make_room() -> None:
    admission = Admission(max_sessions=1, max_duration_s=60)
    admission.open("link-1", session(), now=0)
    admission.open("link-2", session("site-2"), now=60)

    assert admission.take("link-2", now=61) == session("site-2")


@pytest.mark.parametrize("length", [0, 31, 33])
def test_a_nonce_of_another_length_is_refused_with_its_name(length: int) -> None:
    with pytest.raises(ProtocolError, match=f"client_nonce is '{length} bytes'; expected 32 bytes"):
        Session(ClientName("site-1"), "demo", b"x" * length, b"s" * NONCE_BYTES)
    with pytest.raises(ProtocolError, match="server_nonce"):
        Session(ClientName("site-1"), "demo", b"x" * NONCE_BYTES, b"s" * length)


@pytest.mark.parametrize(("sessions", "duration_s"), [(0, 60.0), (1, 0.0), (1, float("nan"))])
def test_limits_that_admit_nobody_are_refused(sessions: int, duration_s: float) -> None:
    with pytest.raises(ValueError, match="expected at least 1, of more than 0 s"):
        Admission(sessions, duration_s)


steps = st.lists(
    st.tuples(st.sampled_from(["open", "take"]), st.integers(0, 5), st.floats(0, 40, allow_nan=False)),
    max_size=60,
)


@given(steps)
def test_sessions_behave_as_a_plain_list_of_them_would(history: list[tuple[str, int, float]]) -> None:
    admission, now = Admission(max_sessions=3, max_duration_s=60), 0.0
    model: dict[str, tuple[int, float]] = {}
    for number, (step, origin_number, after_s) in enumerate(history):
        now += after_s
        origin, nonce = f"link-{origin_number}", number % 256
        model = {key: kept for key, kept in model.items() if kept[1] > now}
        match step:
            case "open" if origin in model or len(model) < 3:
                admission.open(origin, session(nonce=nonce), now=now)
                model[origin] = (nonce, now + 60)
            case "open":
                with pytest.raises(NotInService):
                    admission.open(origin, session(nonce=nonce), now=now)
            case "take" if origin in model:
                assert admission.take(origin, now=now) == session(nonce=model.pop(origin)[0])
            case _:
                with pytest.raises(Unauthenticated):
                    admission.take(origin, now=now)
        assert len(admission) <= 3
