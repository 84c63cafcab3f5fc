"""When certificates end: what a token's life is bounded by, and what is said of one that has ended or will soon."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hanse.coordination.certificates import (
    ENDS_SOON_S,
    EXPECTED_S,
    CertificateEnds,
    remark_on,
    servers_remark,
)
from hanse.errors import CertificateExpired
from hanse.ids import ClientName

END = 1_741_080_600.0  # 2025-03-04 09:30 UTC
DAY = 86_400.0
SITE = ClientName("site-1")


def seen(*ends: tuple[str, float]) -> CertificateEnds:
    certificates = CertificateEnds()
    for name, end in ends:
        certificates.note(name, end)
    return certificates


def test_a_name_passes_until_its_certificate_ends_and_not_from_then_on() -> None:
    certificates = seen((SITE, END))
    certificates.demand_valid(SITE, END - 0.001)
    assert certificates.ended(END - 0.001) == {}

    with pytest.raises(CertificateExpired, match=r"^the certificate of 'site-1' expired on 2025-03-04 09:30 UTC"):
        certificates.demand_valid(SITE, END)
    assert certificates.ended(END) == {SITE: END}


def test_a_name_that_has_shown_no_certificate_passes() -> None:
    certificates = seen(("site-2", END))
    certificates.demand_valid(SITE, END + DAY)
    assert certificates.of(SITE) is None
    assert certificates.token_lifetime_s(SITE, longest_s=3600.0, now_s=END + DAY) == 3600.0


def test_the_certificate_that_was_shown_last_counts() -> None:
    certificates = seen((SITE, END), (SITE, END + DAY))
    certificates.demand_valid(SITE, END)
    assert certificates.of(SITE) == END + DAY


def test_who_has_gone_without_a_certificate_for_long_is_not_expected_any_more_and_does_not_pass_either() -> None:
    certificates = seen((SITE, END))
    assert certificates.ended(END + EXPECTED_S) == {SITE: END}
    assert certificates.ended(END + EXPECTED_S + 1) == {}

    assert certificates.has_ended(SITE, END + EXPECTED_S + 1)
    with pytest.raises(CertificateExpired):
        certificates.demand_valid(SITE, END + EXPECTED_S + 1)


def test_what_a_certificate_calls_for_is_said_once_of_each() -> None:
    certificates = seen((SITE, END))
    assert certificates.warning(SITE, END - ENDS_SOON_S - 1) == ""
    assert certificates.warning(SITE, END - DAY) == remark_on(END, END - DAY)
    assert certificates.warning(SITE, END - 1) == ""

    certificates.note(SITE, END + DAY)
    assert certificates.warning(SITE, END) == remark_on(END + DAY, END)
    assert certificates.warning("site-2", END) == ""


# what the store is told -----------------------------------------------------------------------------------------------


def test_the_store_is_told_of_each_certificate_once() -> None:
    certificates = seen((SITE, END), ("site-2", END))
    assert certificates.take_news() == {SITE: END, "site-2": END}

    certificates.note(SITE, END)
    assert certificates.take_news() == {}
    certificates.note(SITE, END + DAY)
    assert certificates.take_news() == {SITE: END + DAY}


def test_what_the_store_did_not_keep_is_told_again_unless_there_is_a_newer_certificate() -> None:
    certificates = seen((SITE, END), ("site-2", END))
    news = certificates.take_news()
    certificates.note(SITE, END + DAY)

    certificates.put_back(news)

    assert certificates.take_news() == {SITE: END + DAY, "site-2": END}
    certificates.note("site-2", END + DAY)
    assert certificates.take_news() == {"site-2": END + DAY}


def test_what_was_told_after_the_newer_certificate_is_not_put_back() -> None:
    certificates = seen((SITE, END))
    older = certificates.take_news()
    certificates.note(SITE, END + DAY)
    certificates.take_news()

    certificates.put_back(older)

    assert certificates.take_news() == {}


def test_a_server_knows_what_the_store_has_kept_and_what_it_has_seen_itself_and_not_told_yet() -> None:
    certificates = seen((SITE, END), ("site-2", END))
    certificates.take_news()
    certificates.note(SITE, END + DAY)

    certificates.restore({SITE: END - DAY, "site-3": END})

    assert (certificates.of(SITE), certificates.of("site-2"), certificates.of("site-3")) == (END + DAY, None, END)
    assert certificates.take_news() == {SITE: END + DAY}
    certificates.note("site-3", END)  # which the store has
    assert certificates.take_news() == {}
    assert certificates.warning("site-3", END - 1) == remark_on(END, END - 1)  # this server has not said it yet


@given(now_s=st.floats(END - 10 * DAY, END - 1e-3), longest_s=st.floats(1e-3, 20 * DAY))
def test_no_token_outlives_its_certificate(now_s: float, longest_s: float) -> None:
    lifetime_s = seen((SITE, END)).token_lifetime_s(SITE, longest_s=longest_s, now_s=now_s)
    assert 0 < lifetime_s <= longest_s
    assert now_s + lifetime_s <= END + 1e-6  # which is what a float of that size can tell


def test_no_token_is_given_once_the_certificate_has_ended() -> None:
    with pytest.raises(CertificateExpired):
        seen((SITE, END)).token_lifetime_s(SITE, longest_s=3600.0, now_s=END)


@pytest.mark.parametrize(
    ("ends_at", "remark"),
    [
        (None, ""),
        (END + ENDS_SOON_S + 1.0, ""),
        (END + 9.5 * DAY, "its certificate expires on 2025-03-13 21:30 UTC, in 9 days; ask the project for a new one"),
        (END, "its certificate expired on 2025-03-04 09:30 UTC, and it cannot connect until it has a new one"),
    ],
)
def test_people_are_told_of_a_certificate_that_has_ended_or_will_soon(ends_at: float | None, remark: str) -> None:
    assert remark_on(ends_at, END) == remark


@pytest.mark.parametrize(
    ("now_s", "remark"),
    [
        (END - ENDS_SOON_S - 1, ""),
        (END - 11.5 * DAY, "it expires on 2025-03-04 09:30 UTC, in 11 days; from then on nobody can connect"),
        (END - 1, "it expires on 2025-03-04 09:30 UTC, in 0 days; from then on nobody can connect"),
        (END, "it expired on 2025-03-04 09:30 UTC, and nobody can connect"),
        (END + EXPECTED_S + DAY, "it expired on 2025-03-04 09:30 UTC, and nobody can connect"),
    ],
)
def test_of_a_servers_certificate_people_hear_what_its_end_means(now_s: float, remark: str) -> None:
    advice = " until the server has a new one and is started again"
    assert servers_remark(END, now_s) == (f"{remark}{advice}" if remark else "")
