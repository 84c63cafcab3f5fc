from pathlib import Path

import pytest

from hanse.storage.tensors import TensorFiles


@pytest.fixture
def files(tmp_path: Path) -> TensorFiles:
    return TensorFiles(tmp_path / "tensors")
