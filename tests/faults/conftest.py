"""What the faults have in common: a seed that can be given again, and tables of what was disturbed and how it ended."""

import os
import secrets
from collections.abc import Callable

import pytest

SEED_VARIABLE = "HANSE_FAULTS_SEED"
SEED = int(os.environ.get(SEED_VARIABLE) or secrets.randbelow(2**32))
"""What the random faults of this session follow from."""

_ROWS: dict[str, list[tuple[str, ...]]] = {}
_GRIDS: dict[str, dict[tuple[str, str], str]] = {}


@pytest.fixture(scope="session")
def note() -> Callable[..., None]:
    """Return what adds a row to the table of a title, which is printed when all tests have run."""

    def note_row(title: str, *cells: str) -> None:
        _ROWS.setdefault(title, []).append(cells)

    return note_row


@pytest.fixture(scope="session")
def mark() -> Callable[[str, str, str, str], None]:
    """Return what fills the cell at a row and a column of the table of a title, printed when all tests have run."""

    def mark_cell(title: str, row: str, column: str, text: str) -> None:
        _GRIDS.setdefault(title, {})[row, column] = text

    return mark_cell


def pytest_report_header() -> str:
    """Tell the seed before anything runs."""
    return f"{SEED_VARIABLE}={SEED}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the tables."""
    tables = _ROWS | {title: _rows_of(grid) for title, grid in _GRIDS.items()}
    for title, rows in tables.items():
        terminalreporter.section(title)
        widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
        for row in rows:
            line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            terminalreporter.write_line(line.rstrip())
    if tables:
        terminalreporter.write_line(f"to repeat the random faults: {SEED_VARIABLE}={SEED}")


def _rows_of(grid: dict[tuple[str, str], str]) -> list[tuple[str, ...]]:
    rows, columns = dict.fromkeys(row for row, _ in grid), dict.fromkeys(column for _, column in grid)
    return [("", *columns), *((row, *(grid.get((row, column), "") for column in columns)) for row in rows)]
