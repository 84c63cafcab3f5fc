from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hanse.cell.cell import RemoteError
from hanse.doctor.findings import Verdict
from hanse.doctor.service import (
    LOOSE_CLOCK_S,
    WRONG_CLOCK_S,
    Answer,
    ClockReading,
    judge_answer,
    judge_clock,
    judge_identity,
    judge_versions,
)
from hanse.errors import EnvironmentFault, NotInService, TimedOut, Unauthenticated, VersionMismatch
from hanse.ids import Ssid
from hanse.messages import ReturnCode, Welcome

TARGET = "fl.example.org:6007"
WELCOME = Welcome(1, "server", Ssid("7"), "0.1.0")
DAY_S = 86400.0


def read_at(server: float, *, before: float = 1000.0, after: float = 1000.5) -> ClockReading:
    return ClockReading(before, server, after)


@pytest.mark.parametrize(
    ("server", "ahead_s"), [(1000.0, 0.0), (1000.25, 0.0), (1000.5, 0.0), (990.0, 10.0), (1010.5, -10.0)]
)
def test_clocks_differ_by_what_the_time_on_the_way_does_not_explain(server: float, ahead_s: float):
    assert read_at(server).ahead_s == ahead_s


times = st.floats(min_value=0, max_value=4e9)


@given(times, st.floats(min_value=0, max_value=10), st.floats(min_value=0, max_value=10), st.floats(-1e6, 1e6))
def test_a_clock_is_never_said_to_be_further_off_than_it_is(now: float, out_s: float, back_s: float, off_s: float):
    reading = ClockReading(now + off_s, now + out_s, now + out_s + back_s + off_s)

    assert abs(reading.ahead_s) <= abs(off_s) + 1e-5
    assert reading.ahead_s * off_s >= 0


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("apart_s", "verdict"),
    [
        (0, Verdict.OK),
        (LOOSE_CLOCK_S, Verdict.OK),
        (LOOSE_CLOCK_S + 1, Verdict.WARN),
        (WRONG_CLOCK_S, Verdict.WARN),
        (WRONG_CLOCK_S + 1, Verdict.FAIL),
        (DAY_S, Verdict.FAIL),
    ],
)
def test_clocks_far_apart_are_a_warning_and_then_a_failure(sign: int, apart_s: float, verdict: Verdict):
    now = 10 * DAY_S

    assert judge_clock(TARGET, ClockReading(now, now - sign * apart_s, now)).verdict is verdict


def test_a_clock_off_by_a_day_says_which_way_and_what_to_do():
    ahead = judge_clock(TARGET, ClockReading(2 * DAY_S, DAY_S, 2 * DAY_S))

    assert isinstance(ahead.error, EnvironmentFault)
    assert ahead.text == (
        "this machine's clock is 86400 s ahead of the server's: set both by NTP; certificates that are made now will "
        "not be valid at both"
    )
    assert "86400 s behind the server's" in judge_clock(TARGET, ClockReading(DAY_S, 2 * DAY_S, DAY_S)).text


def test_another_clock_than_the_servers_is_called_what_it_is():
    assert judge_clock("db", read_at(1000.0), whose="the database").text == "within 0.5 s of the database's"
    assert "60 s ahead of the database's" in judge_clock("db", read_at(940.0), whose="the database").text


def test_a_server_that_does_not_tell_its_time_is_judged_by_its_certificate():
    finding = judge_clock(TARGET, None)

    assert finding.verdict is Verdict.OK
    assert finding.text == "the server does not tell its time; by this machine's, both certificates are valid"


def test_a_welcome_is_an_answer():
    assert judge_answer(TARGET, Answer(WELCOME)).text == "'server' answers"


@pytest.mark.parametrize(
    ("refusal", "text"),
    [
        (Unauthenticated("this server serves project 'other'"), "this server serves project 'other'"),
        (TimedOut(TARGET, "hello", 10.0), "fl.example.org:6007 did not answer 'hello' within 10 s"),
        (
            NotInService(),
            "the server at fl.example.org:6007 starts, stops or stands by for another, and serves nobody now "
            "(Server not in service)",
        ),
    ],
)
def test_a_refusal_is_told_as_the_server_told_it(refusal: Any, text: str):
    finding = judge_answer(TARGET, Answer(refusal=refusal))

    assert finding.text == text
    assert type(finding.error) is type(refusal)
    assert finding.error.retryable is refusal.retryable


def test_a_server_that_speaks_no_common_version_is_called_that():
    here = VersionMismatch("site-1", release="0.1", versions=(1,), our_release="0.9", our_versions=(8, 9))
    told = RemoteError(here.reason, return_code=ReturnCode.INVALID_REQUEST, error_code=here.code)
    finding = judge_answer(TARGET, Answer(refusal=told))

    assert finding.text == f"the server at {TARGET} says: {here.reason}; update Hanse where it is older"
    assert finding.error is not None
    assert not finding.error.retryable
    assert judge_answer(TARGET, Answer(refusal=here)).error is here


def test_a_server_has_proven_itself_or_it_is_doubted_or_nothing_is_proven():
    assert judge_identity(TARGET, Answer(WELCOME, is_proven=True)).verdict is Verdict.OK
    doubted = judge_identity(TARGET, Answer(WELCOME, doubt=Unauthenticated("the signature does not prove it")))
    assert isinstance(doubted.error, Unauthenticated)
    assert judge_identity(TARGET, Answer(WELCOME)).verdict is Verdict.WARN


def test_one_release_on_both_sides_is_good_and_two_are_a_warning():
    same = judge_versions(TARGET, "0.1.0", WELCOME)
    assert same.verdict is Verdict.OK
    assert same.text.startswith("Hanse 0.1.0 on both sides, Python 3.")
    older = judge_versions(TARGET, "0.2.0", WELCOME)
    assert older.verdict is Verdict.WARN
    assert "Hanse 0.2.0 here, and Hanse 0.1.0 at the server: update the older one" in older.text
    untold = judge_versions(TARGET, "0.2.0", Welcome(1, "server", Ssid("7")))
    assert "a release that it does not tell at the server" in untold.text
    assert judge_versions(TARGET, "0.2.0", None).verdict is Verdict.SKIP
