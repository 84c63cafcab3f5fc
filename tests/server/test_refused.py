"""Who was refused lately is remembered, one refusal a name, and not for ever."""

from hanse.ids import NAME_RULE
from hanse.messages import RefusedClient
from hanse.server.refused import MAX_NAMES, RefusedPeers

from .world import Clock


def test_the_last_refusal_of_a_name_is_told_with_how_long_ago_it_was() -> None:
    clock = Clock()
    refused = RefusedPeers(clock)
    refused.note("site-2", code="unauthenticated", reason="its certificate expired on 1 May")
    clock.advance(5)
    refused.note("site-1", code="unauthenticated", reason="first")
    refused.note("site-1", code="version-mismatch", reason="second")
    clock.advance(3)

    assert refused.views() == (
        RefusedClient("site-1", "version-mismatch", "second", 3),
        RefusedClient("site-2", "unauthenticated", "its certificate expired on 1 May", 8),
    )


def test_who_was_let_in_is_forgotten() -> None:
    refused = RefusedPeers(Clock())
    refused.note("site-1", code="unauthenticated", reason="no")
    refused.forget("site-1")
    refused.forget("site-2")

    assert refused.views() == ()


def test_a_name_that_no_participant_can_have_is_not_remembered() -> None:
    refused = RefusedPeers(Clock())
    for name in ("", "../etc", "x" * 1000, "two words"):
        refused.note(name, code="unauthenticated", reason=NAME_RULE)

    assert refused.views() == ()


def test_a_flood_of_names_makes_room_of_the_oldest_and_long_words_are_cut() -> None:
    refused = RefusedPeers(Clock())
    for number in range(MAX_NAMES):
        refused.note(f"site-{number:03}", code="x" * 1000, reason="y" * 100_000)
    refused.note("site-000", code="again", reason="so it is not the oldest")
    refused.note("another", code="", reason="")

    names = [each.name for each in refused.views()]
    assert len(names) == MAX_NAMES
    assert "site-001" not in names
    assert {"another", "site-000"} <= set(names)
    assert max(len(each.reason) + len(each.code) for each in refused.views()) < 2500
