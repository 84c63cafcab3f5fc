"""How statements are run: compiled once by SQLAlchemy, and given to the driver as they are.

SQLAlchemy writes the SQL of either database. It could run it, too, but takes ten times as long for that as SQLite does
for the work, and a run waits for each of its transactions.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol

from sqlalchemy import ClauseElement, Dialect

_NOTHING: Final[Mapping[str, Any]] = {}


class Cursor(Protocol):
    """What runs statements, as every Python driver of a database has it."""

    @property
    def rowcount(self) -> int:
        """How many rows the last statement changed."""
        ...

    def execute(self, text: str, parameters: Mapping[str, Any], /) -> object:
        """Run one statement."""
        ...

    def executemany(self, text: str, rows: Sequence[Mapping[str, Any]], /) -> object:
        """Run one statement for each of *rows*."""
        ...

    def fetchone(self) -> Any:
        """Return the next row, or ``None``."""
        ...

    def fetchall(self) -> list[Any]:
        """Return the other rows."""
        ...


class DriverConnection(Protocol):
    """A connection, as every Python driver of a database has it."""

    def cursor(self) -> Cursor:
        """Return a new cursor."""
        ...

    def commit(self) -> None:
        """Commit the transaction, if one has begun."""
        ...

    def rollback(self) -> None:
        """Undo the transaction, if one has begun."""
        ...

    def close(self) -> None:
        """Close."""
        ...


class Statement:
    """One statement with named parameters, for any database; *core* is it in SQLAlchemy's terms."""

    def __init__(self, core: ClauseElement) -> None:
        self._core = core
        self._texts: dict[str, tuple[str, dict[str, Any]]] = {}

    def compiled(self, dialect: Dialect) -> tuple[str, dict[str, Any]]:
        """Return the text, and the parameters whose values are part of the statement."""
        found = self._texts.get(dialect.name)
        if found is None:
            compiled = self._core.compile(dialect=dialect)
            constants = {name: value for name, value in (compiled.params or {}).items() if value is not None}
            found = self._texts[dialect.name] = str(compiled), constants
        return found


class Transaction:
    """A transaction that has begun, in which statements run."""

    def __init__(self, cursor: Cursor, dialect: Dialect) -> None:
        self._cursor, self._dialect = cursor, dialect
        self._calls: list[Callable[[], None]] = []

    def call_when_committed(self, call: Callable[[], None]) -> None:
        """Have *call* called once this transaction is committed, if it is; it must neither wait nor raise."""
        self._calls.append(call)

    def make_calls(self) -> None:
        """Make those calls; whoever commits does so afterwards."""
        for call in self._calls:
            call()

    def run(self, statement: Statement, parameters: Mapping[str, Any] = _NOTHING) -> int:
        """Run *statement* and return how many rows it changed."""
        text, constants = statement.compiled(self._dialect)
        self._cursor.execute(text, {**constants, **parameters} if constants else parameters)
        return self._cursor.rowcount

    def run_many(self, statement: Statement, rows: Sequence[Mapping[str, Any]]) -> None:
        """Run *statement* for each of *rows*, whose keys are its parameters."""
        if rows:
            text, constants = statement.compiled(self._dialect)
            self._cursor.executemany(text, [{**constants, **row} for row in rows] if constants else rows)

    def rows(self, statement: Statement, parameters: Mapping[str, Any] = _NOTHING) -> Sequence[Any]:
        """Return all rows that the query *statement* finds, as tuples."""
        self.run(statement, parameters)
        return self._cursor.fetchall()

    def row(self, statement: Statement, parameters: Mapping[str, Any] = _NOTHING) -> Any:
        """Return the one row that the query *statement* finds, ``None`` when there is none."""
        self.run(statement, parameters)
        return self._cursor.fetchone()

    def values(self, statement: Statement, parameters: Mapping[str, Any] = _NOTHING) -> list[Any]:
        """Return the only column of all rows that the query *statement* finds."""
        return [value for (value,) in self.rows(statement, parameters)]

    def value(self, statement: Statement, parameters: Mapping[str, Any] = _NOTHING) -> Any:
        """Return the only column of the one row that the query *statement* finds, ``None`` when there is none."""
        row = self.row(statement, parameters)
        return None if row is None else row[0]
