"""Nothing in the product sleeps and looks: whoever pauses says beside it what for, as for a time when work is due."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "hanse"
NO_REASON = "sleeps, and does not say beside it why that is no event to wait for"


def pauses(text: str) -> Iterator[int]:
    """Yield the line of each call of a ``sleep``, whosever it is."""
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Call(func=ast.Attribute(attr="sleep") | ast.Name(id="sleep"), end_lineno=int(line)):
                yield line


def unexplained(text: str) -> list[int]:
    lines = text.splitlines()
    return [line for line in pauses(text) if not lines[line - 1].partition("  # ")[2]]


def test_whoever_sleeps_says_why() -> None:
    files = {path: path.read_text(encoding="utf-8") for path in SOURCE.rglob("*.py")}
    assert sum(len(list(pauses(text))) for text in files.values()) > 5
    assert [f"{path}:{line} {NO_REASON}" for path, text in files.items() for line in unexplained(text)] == []


def test_nobody_sleeps_with_the_whole_process() -> None:
    found = [path for path in SOURCE.rglob("*.py") if "time.sleep" in path.read_text(encoding="utf-8")]
    assert found == [], "it blocks the event loop, or a thread that nothing can wake"


@pytest.mark.parametrize(("line", "found"), [("await asyncio.sleep(1)", [1]), ("sleep(1)  # it is a time", [])])
def test_a_pause_without_a_reason_is_found(line: str, found: list[int]) -> None:
    assert unexplained(line) == found
