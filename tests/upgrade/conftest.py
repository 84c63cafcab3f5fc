import pytest

from tests.upgrade.release import Release, unpacked


@pytest.fixture(scope="session")
def old(tmp_path_factory: pytest.TempPathFactory) -> Release:
    """Return the release before this one."""
    return unpacked(tmp_path_factory.mktemp("old-release", numbered=False))
