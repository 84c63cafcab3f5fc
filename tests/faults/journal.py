"""What a server's database went through, written down by the database itself, and whether that is how it may be.

``record`` gives a store, a SQLite file or PostgreSQL, triggers that note every write of a journal in a table of their
own: what is deleted later, and by whichever process it was written, is still there to be checked. Each is noted with
the epoch of the lease at that moment; an answer with that of the server which accepted it, as its number says.
"""

import itertools
import sqlite3
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import msgspec
import psycopg

from hanse.job import ENDED, LEGAL, JobRecord, JobState
from hanse.storage.store import ANSWERS_BITS

BUSY_S: Final = 30.0

Where: TypeAlias = Path | str
"""A store: a SQLite file, or the URL of a PostgreSQL database."""

_KEY: Final = "NEW.name || '/' || NEW.sequence || '/' || NEW.client"
_NOTE: Final = "INSERT INTO fault_history (what, epoch, job_id, round, text) SELECT"
_NOTED: Final = {
    "fault_lease": ("AFTER UPDATE ON lease", "NEW.epoch <> OLD.epoch", "'lease', NEW.epoch, NULL, NULL, NEW.holder"),
    "fault_job": ("AFTER INSERT ON jobs", "", "'job', epoch, NEW.job_id, NULL, NEW.state FROM lease"),
    "fault_job_moved": (
        "AFTER UPDATE OF state ON jobs",
        "NEW.state <> OLD.state",
        "'job', epoch, NEW.job_id, NULL, NEW.state FROM lease",
    ),
    "fault_task": ("AFTER INSERT ON tasks", "", f"'task', epoch, NEW.job_id, NEW.round, {_KEY} FROM lease"),
    "fault_answer": (
        "AFTER UPDATE OF answer ON tasks",
        "",
        f"'answer', coalesce(NEW.accepted >> {ANSWERS_BITS}, epoch), NEW.job_id, NEW.round, {_KEY} FROM lease",
    ),
    "fault_round": ("AFTER INSERT ON rounds", "", "'round', epoch, NEW.job_id, NEW.round, NULL FROM lease"),
}
"""What is noted, by the name of its trigger: after which writes, if so and so, and the row."""
_COLUMNS: Final = "what TEXT NOT NULL, epoch BIGINT NOT NULL, job_id TEXT, round INTEGER, text TEXT"


@dataclass(frozen=True)
class Entry:
    """One write, in the order of commits: *text* is the state of a job, or the key of a task without its round."""

    what: str
    epoch: int
    job_id: str | None
    round: int | None
    text: str | None


@dataclass(frozen=True)
class Write:
    """A task issued, or its answer accepted: *key* without its *round*, and *since* which committed round."""

    what: str
    round: int
    key: str
    since: int


def record(store: Where) -> None:
    """Have the database *store* write down its history from now on."""
    with _opened(store) as connection:
        for statement in _statements(is_postgres=isinstance(store, str)):
            connection.execute(statement)


def _statements(*, is_postgres: bool) -> Iterator[str]:
    number = "BIGSERIAL" if is_postgres else "INTEGER"
    yield f"CREATE TABLE fault_history (number {number} PRIMARY KEY, {_COLUMNS})"
    for name, (after, condition, row) in _NOTED.items():
        when = f"FOR EACH ROW WHEN ({condition})" if condition else "FOR EACH ROW"
        if is_postgres:
            yield (
                f"CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql"
                f" AS $$ BEGIN {_NOTE} {row}; RETURN NULL; END $$"
            )
            yield f"CREATE TRIGGER {name} {after} {when} EXECUTE FUNCTION {name}()"
        else:
            yield f"CREATE TRIGGER {name} {after} {when} BEGIN {_NOTE} {row}; END"


def history(store: Where) -> list[Entry]:
    """Return what ``record`` had written down, in order."""
    with _opened(store) as connection:
        query = "SELECT what, epoch, job_id, round, text FROM fault_history ORDER BY number"
        return [Entry(*row) for row in connection.execute(query)]


def check_completed(
    store: Where,
    job_id: str,
    *,
    clients: list[str],
    rounds: int,
    may_be_asked_again: bool = False,
    may_be_answered_again: bool = False,
    may_be_unwritten: bool = False,
) -> None:
    """Assert that *job_id*, one task a round to each of *clients*, was journalled as a run without trouble is.

    Each round was committed once, in order; each task issued once and answered once, before its round was committed and
    after the one before it; nothing was written under an epoch that was over; nothing is left but the last state.
    A client that *may be asked again* may have had more tasks, each with one answer; where a task *may be answered
    again*, answers that were taken back are not counted. Where the database broke off a write, an answer *may be
    unwritten* but for what its round's commit, which is written behind it, has made of it.
    """
    own = _completed(store, job_id, rounds)
    if may_be_answered_again:
        own = list({(entry.what, entry.round, entry.text): entry for entry in own}.values())
    seen = _writes(own)
    first: dict[tuple[int, str], str] = {}
    for write in seen:
        name, _, client = write.key.split("/")
        if name == "train":
            first.setdefault((write.round, client), write.key)
    numbers = range(1, rounds + 1)
    keys = {(number, first.get((number, client), f"train/?/{client}")) for number in numbers for client in clients}
    if may_be_asked_again:
        keys |= {(write.round, write.key) for write in seen}
    expected = {Write(what, *key, since=key[0] - 1) for what in ("task", "answer") for key in keys}
    if may_be_unwritten:
        expected -= {write for write in expected - seen.keys() if write.what == "answer"}
    _check_writes(seen, expected)


def check_written(store: Where, job_id: str, writes: Collection[Write], *, rounds: int) -> None:
    """Assert that *job_id* was journalled as a run without trouble whose tasks and answers are *writes*, each once."""
    _check_writes(_writes(_completed(store, job_id, rounds)), writes)


def written(store: Where, job_id: str) -> list[Write]:
    """Return the tasks and answers of *job_id*, in the order of their writes."""
    return list(_writes([entry for entry in history(store) if entry.job_id == job_id]).elements())


def check_epochs(entries: list[Entry]) -> None:
    """Assert that epochs never decrease, over all that was written."""
    epochs = [entry.epoch for entry in entries]
    assert epochs == sorted(epochs), f"an epoch came back: {epochs}"


def check_states(states: list[JobState]) -> None:
    """Assert that a job's *states* followed each other as they may, to its completion."""
    assert (states[0], states[-1]) == (JobState.SUBMITTED, JobState.COMPLETED), states
    assert all(after in LEGAL[before] for before, after in itertools.pairwise(states)), states
    assert sum(state in ENDED for state in states) == 1, f"it ended more than once: {states}"


def _completed(store: Where, job_id: str, rounds: int) -> list[Entry]:
    """Return what was written of *job_id*, which has completed: its states, rounds and epochs are as they must be."""
    entries = history(store)
    check_epochs(entries)
    own = [entry for entry in entries if entry.job_id == job_id]
    check_states([JobState(entry.text or "") for entry in own if entry.what == "job"])
    committed = [entry.round for entry in own if entry.what == "round"]
    assert committed == list(range(rounds + 1)), f"the rounds of {job_id} were committed as {committed}"
    _check_end(store, job_id, rounds)
    return own


def _writes(own: Iterable[Entry]) -> Counter[Write]:
    last = -1
    seen: Counter[Write] = Counter()
    for entry in own:
        if entry.what == "round":
            last = entry.round or 0
        elif entry.what in ("task", "answer"):
            seen[Write(entry.what, entry.round or 0, entry.text or "", since=last)] += 1
    return seen


def _check_writes(seen: Counter[Write], writes: Collection[Write]) -> None:
    expected = Counter(writes)
    assert seen == expected, f"not once each: {seen - expected}; missing: {expected - seen}"


def _check_end(store: Where, job_id: str, rounds: int) -> None:
    of_job = "WHERE job_id = %s" if isinstance(store, str) else "WHERE job_id = ?"
    with _opened(store) as connection:
        query = f"SELECT state, last_round, record FROM jobs {of_job}"
        state, last_round, blob = connection.execute(query, (job_id,)).fetchone()
        left = {
            table: connection.execute(f"SELECT count(*) FROM {table} {of_job}", (job_id,)).fetchone()[0]
            for table in ("tasks", "models")
        }
        is_sound = isinstance(store, str) or connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    record = msgspec.msgpack.decode(blob, type=JobRecord)
    assert (state, record.state) == ("completed", JobState.COMPLETED)
    assert (record.code, record.reason) == ("", "")
    assert record.started_at
    assert record.ended_at
    assert record.result
    assert last_round == rounds
    assert left == {"tasks": 0, "models": 0}, f"the journal of {job_id} still holds {left}"
    assert is_sound, f"{store} is damaged"


@contextmanager
def _opened(store: Where) -> Iterator[Any]:
    """Give a connection that executes each statement by itself."""
    opened = (
        psycopg.connect(store, autocommit=True)
        if isinstance(store, str)
        else sqlite3.connect(store, timeout=BUSY_S, isolation_level=None)
    )
    with closing(opened) as connection:
        yield connection
