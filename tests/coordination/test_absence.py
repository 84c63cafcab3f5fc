"""What is said of a client that is not there."""

from hanse.coordination.absence import NOBODY, Absence, with_absence
from hanse.ids import ClientName

SITE, OTHER = ClientName("site-1"), ClientName("site-2")


def test_what_is_said_of_a_client_that_is_away_ends_with_why_where_that_is_known() -> None:
    absent = {SITE: Absence("version-mismatch", "it is too old")}
    assert with_absence("not connected", SITE, absent) == "not connected: it is too old"
    assert with_absence("", SITE, absent) == "it is too old"
    assert with_absence("not connected", OTHER, absent) == "not connected"
    assert with_absence("not connected", SITE, NOBODY) == "not connected"
