"""Commands called in this process, and what they write."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from hanse.cli import main


@dataclass(frozen=True)
class Ended:
    """How a command ended, and what it wrote."""

    status: int
    out: str
    err: str


Hanse = Callable[..., Ended]


@pytest.fixture
def hanse(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Hanse]:
    """``hanse("job", "list")``: run a command here; what it does to logging is undone at the end."""
    monkeypatch.setenv("GRPC_VERBOSITY", "NONE")
    monkeypatch.delenv("HANSE_KIT", raising=False)
    root, ours = logging.getLogger(), logging.getLogger("hanse")
    before = root.handlers[:], root.level, ours.level
    # Not among the root's while the command runs: it replaces those, and closes them.
    root.handlers = []

    def run(*arguments: object) -> Ended:
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        written = capsys.readouterr()
        return Ended(status, written.out, written.err)

    yield run
    root.handlers, level, our_level = before
    root.setLevel(level)
    ours.setLevel(our_level)
