from pathlib import Path
from typing import TypeAlias

import pytest

Where: TypeAlias = Path | str
"""A database, as ``SqlStore`` is told it."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A SQLite file that there is not yet, in a folder that there is not yet."""
    return tmp_path / "workspace" / "store.db"


@pytest.fixture(params=["sqlite", "postgres"])
def where(request: pytest.FixtureRequest, path: Path) -> Where:
    """An empty database that several stores can open at once."""
    return path if request.param == "sqlite" else str(request.getfixturevalue("postgres_url"))
