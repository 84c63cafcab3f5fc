"""What some faults need of the machine; where it is missing they are skipped, or fail where it was promised.

``HANSE_TEST_REQUIRE`` promises by name, separated by commas: ``postgres,tmpfs,loop,netns,faketime,memcg``.
"""

import os
from typing import NoReturn

import pytest


def missing(name: str, why: str) -> NoReturn:
    """Skip the present test because the machine has no *name*, for the reason *why*; fail if it was promised."""
    if name in os.environ.get("HANSE_TEST_REQUIRE", "").split(","):
        pytest.fail(f"HANSE_TEST_REQUIRE names {name}, but {why}")
    pytest.skip(f"no {name}: {why}")
