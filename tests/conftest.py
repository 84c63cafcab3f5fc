"""What all tests share."""

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.postgres import Postgres, throw_away_server
from tests.s3 import S3, throw_away_s3

# pytest-asyncio asks for "the current loop" before it sets its own; Python 3.11 makes one for whoever asks, which
# nobody then closes, and that is a ResourceWarning. Once the current loop has been set to none, none is made.
asyncio.set_event_loop(None)

# Properties are tried on the same examples each time, and however long a busy machine takes for one.
settings.register_profile(
    "hanse", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("hanse")


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL server of these tests' own; a test that stops it starts it again."""
    with throw_away_server() as server:
        yield server


@pytest.fixture
def postgres_url(postgres: Postgres) -> str:
    """An empty database in it."""
    return postgres.url(postgres.empty_database())


@pytest.fixture(scope="session")
def s3() -> Iterator[S3]:
    """A server of these tests' own that speaks S3; a test that stops it starts it again."""
    with throw_away_s3() as server:
        yield server


@pytest.fixture
def bucket_url(s3: S3, monkeypatch: pytest.MonkeyPatch) -> str:
    """A new bucket in it, with a prefix; the environment says how it is used."""
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://{s3.new_bucket()}/demo/runs"


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files and folders that were synced, as they are."""
    seen: list[Path] = []
    fsync = os.fsync

    def record(descriptor: int) -> None:
        seen.append(Path(f"/proc/self/fd/{descriptor}").readlink())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    return seen
