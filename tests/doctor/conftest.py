"""A project's kits, made once, and what tests do to copies of them."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ..admin.world import make_kits

Copy = Callable[..., Path]


@pytest.fixture(scope="session")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_kits(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="session")
def others_kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kits of another project with the same names: only its authority is another."""
    return make_kits(tmp_path_factory.mktemp("other"))


@pytest.fixture
def copy_of(tmp_path: Path) -> Copy:
    """``copy_of(kit, target="127.0.0.1:6007", more='tls = false')``: a kit of one's own, with its settings changed."""

    def copy(kit: Path, *, target: str = "", more: str = "") -> Path:
        made = tmp_path / kit.name
        shutil.copytree(kit, made)
        settings = made / "settings.toml"
        lines = [line for line in settings.read_text().splitlines() if line and not line.startswith("#")]
        if target:
            key = "target" if any(line.startswith("target") for line in lines) else "servers"
            value = f'"{target}"' if key == "target" else f'["{target}"]'
            lines = [f"{key} = {value}" if line.startswith(key + " ") else line for line in lines]
        settings.write_text("\n".join([*lines, more]) + "\n")
        return made

    return copy
