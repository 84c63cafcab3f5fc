from collections.abc import AsyncIterator
from pathlib import Path
from typing import TypeAlias

import pytest

from hanse.storage.store import SqlStore

from .samples import take

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


@pytest.fixture
async def store(where: Where) -> AsyncIterator[SqlStore]:
    async with SqlStore(where) as store:
        yield store


@pytest.fixture
async def other(store: SqlStore, where: Where) -> AsyncIterator[SqlStore]:
    """Another server's store on the same database."""
    async with SqlStore(where) as other:
        yield other


@pytest.fixture
async def epoch(store: SqlStore) -> int:
    """The epoch under which ``store`` may write."""
    return (await take(store, "server-1")).epoch
