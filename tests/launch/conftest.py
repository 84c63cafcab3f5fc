from collections.abc import Iterator
from pathlib import Path

import pytest
from benchmarks import marked


@pytest.fixture(autouse=True)
def no_process_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kill whatever the test has started, however it has ended: also what goes on when its parent has died."""
    monkeypatch.setenv(marked.VARIABLE, str(tmp_path))
    yield
    marked.kill(str(tmp_path))
