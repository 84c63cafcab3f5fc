"""A project's kits and a server of it, made once: tests tell their jobs apart by what ``submit`` gives them."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from .world import Deployment, deployed, make_kits


@pytest.fixture(scope="session")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_kits(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def deployment(kits: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with deployed(kits, tmp_path_factory.mktemp("workspace") / "ws") as running:
        yield running
