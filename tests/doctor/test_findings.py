import pytest

from hanse.doctor.findings import Check, Finding, Verdict, fail, first_failure, ok, skip, warn, with_spares
from hanse.errors import ConfigError, NotInService, Unauthenticated, Unreachable

HERE, THERE = "here:1", "there:1"
GONE = Unreachable(HERE, "connection refused")
STRANGE = Unauthenticated("another project's certificate")
UP = [ok(Check.PORT, "open", about=THERE), ok(Check.ANSWER, "answers", about=THERE)]


def test_a_failure_says_what_its_error_says():
    finding = fail(Check.PORT, GONE, about=HERE)

    assert finding == Finding(
        Check.PORT, Verdict.FAIL, "cannot reach here:1: connection refused", about=HERE, error=GONE
    )


def test_a_check_that_was_not_made_says_why():
    assert skip(Check.TLS, "'port' failed").text == "not checked: 'port' failed"


def test_the_first_failure_is_the_one_that_counts():
    config = ConfigError("name", got="", expected="one")
    found = [ok(Check.KEY, ""), fail(Check.PORT, GONE), fail(Check.TLS, STRANGE), fail(Check.KEY, config)]

    assert first_failure(found) is GONE
    assert first_failure(found[2:]) is STRANGE


def test_warnings_and_skipped_checks_are_no_failures():
    assert first_failure([ok(Check.KEY, ""), warn(Check.DISK, ""), skip(Check.TLS, "")]) is None


def test_an_address_that_is_not_reached_is_a_warning_while_another_answers():
    first, second = with_spares([[fail(Check.PORT, GONE, about=HERE), skip(Check.TLS, "", about=HERE)], UP])

    assert (first[0].verdict, first[0].error) == (Verdict.WARN, None)
    assert first[0].text == f"{GONE.reason}; another address answers, and this one is missing once that does not"
    assert first[1].verdict is Verdict.SKIP
    assert second == UP
    assert first_failure([*first, *second]) is None


def test_a_server_that_stands_by_is_a_warning_while_another_serves():
    (first, _) = with_spares([[fail(Check.ANSWER, NotInService(), about=HERE)], UP])

    assert first[0].verdict is Verdict.WARN


def test_a_refusal_that_ends_whoever_meets_it_stays_a_failure():
    ways = [[fail(Check.TLS, STRANGE, about=HERE)], UP]

    assert with_spares(ways) == ways


@pytest.mark.parametrize(
    "second",
    [
        [fail(Check.NAME, GONE)],
        [ok(Check.ANSWER, "answers"), fail(Check.IDENTITY, STRANGE)],
        [ok(Check.PORT, "open"), skip(Check.TLS, "the kit does not hold together")],
    ],
)
def test_where_no_server_is_found_good_nothing_is_spared(second: list[Finding]):
    ways = [[fail(Check.PORT, GONE, about=HERE)], second]

    assert with_spares(ways) == ways
