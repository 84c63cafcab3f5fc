"""From every earlier schema to today's: a store of the first release, made by its own code, and what it held."""

import asyncio
import logging
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, inspect

from hanse.errors import StaleEpoch, StoreFailed
from hanse.ids import ClientName, Digest, JobId, Ssid
from hanse.job import JobRecord, JobSpec, JobState, WorkflowSpec, move
from hanse.messages import (
    CommitRound,
    ModelRef,
    RoundView,
    StateRef,
    TaskAssignment,
    TaskFault,
    TaskKey,
    TaskResult,
    TensorRef,
    UpdateRef,
)
from hanse.storage.migrations import migrate
from hanse.storage.records import AuditEntry, Lease, RunState
from hanse.storage.store import SqlStore, database_at
from hanse.storage.tables import SCHEMA_VERSION, metadata, schema_version

FIRST_RELEASE = Path(__file__).with_name("release-0.1.0.sql")
RUNNING = JobId("training-1")
STORE_ID = "0f1e2d3c4b5a6978"

# What the fixture was made of.
DIGEST = Digest("0123456789abcdef" * 4)
SITES = (ClientName("site-1"), ClientName("site-2"), ClientName("site-3"))
W = TensorRef("w", "float32", (2, 3), DIGEST)
B = TensorRef("b", "float32", (1,), DIGEST, inline=b"\0\0\x80?")


def model(number: int) -> ModelRef:
    return ModelRef((W, B), {"round": str(number)})


def key(site: ClientName, name: str = "train", round_number: int = 3) -> TaskKey:
    return TaskKey(round_number, name, 0, site)


TASK_OF_SITE_3 = TaskAssignment(key(SITES[2]), model(2), {"rate": 0.1})
VALIDATE = TaskAssignment(key(SITES[0], "validate"), None, {}, expects_model=False)
FAULT_OF_SITE_1 = TaskResult(key(SITES[0]), fault=TaskFault("training-failed", "it broke"))
ANSWER_OF_SITE_2 = TaskResult(key(SITES[1]), UpdateRef(model(3), 7, {"loss": 0.25}))


def state(number: int) -> StateRef:
    extra = {"momentum": ModelRef((W,))} if number else {}
    return StateRef(number, model(number), metrics={"accuracy": number / 10}, extra=extra, values={"seed": number})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


@pytest.fixture
def old(path: Path) -> Path:
    """The file of a store of the first release."""
    connection = sqlite3.connect(path)
    connection.executescript(FIRST_RELEASE.read_text())
    connection.close()
    return path


@pytest.fixture(params=["a new file", "a file of the first release", "a new database in PostgreSQL"])
def where(request: pytest.FixtureRequest, path: Path) -> Path | str:
    match request.param:
        case "a new file":
            return path
        case "a file of the first release":
            return Path(request.getfixturevalue("old"))
        case _:
            return str(request.getfixturevalue("postgres_url"))


@pytest.fixture
async def upgraded(old: Path) -> AsyncIterator[SqlStore]:
    async with SqlStore(old) as store:
        yield store


# What a store of the first release held ------------------------------------------------------------------------------


async def test_its_jobs_are_all_there_in_their_states(upgraded: SqlStore) -> None:
    jobs = await upgraded.jobs()

    assert [(job.job_id, job.state) for job in jobs] == [
        ("stopped-1", JobState.ABORTED),
        ("broken-1", JobState.FAILED),
        ("done-1", JobState.COMPLETED),
        ("starting-1", JobState.RUNNING),
        ("training-1", JobState.RUNNING),
        ("chosen-1", JobState.SCHEDULED),
        ("waiting-1", JobState.SUBMITTED),
    ]
    spec = JobSpec("digits", WorkflowSpec("fedavg", {"rounds": 5}), client="app:app", model="app:model")
    assert jobs[-1] == JobRecord(JobId("waiting-1"), spec, "lead@demo", 1.0, DIGEST, 1234)
    assert (jobs[2].result, jobs[2].result_bytes, jobs[2].ended_at) == (DIGEST, 77, 200.0)
    assert (jobs[1].code, jobs[1].reason.split(":")[0]) == (
        "too-few-clients",
        "only 1 of the 2 answers that the round needs can come",
    )
    assert jobs[4].clients == SITES
    assert await upgraded.jobs(states=[JobState.SUBMITTED]) == jobs[-1:]


async def test_its_running_job_stands_where_it_stood(upgraded: SqlStore) -> None:
    # The first release handed answers out by their keys, so this is the order in which they were accepted.
    assert await upgraded.snapshot(RUNNING) == RunState(
        state(2), (TASK_OF_SITE_3, VALIDATE), (FAULT_OF_SITE_1, ANSWER_OF_SITE_2)
    )
    assert await upgraded.rounds(RUNNING) == [
        RoundView(n, {"accuracy": n / 10}, 0.5, 100.0 + n, SITES[:2] if n else ()) for n in range(3)
    ]
    assert await upgraded.snapshot(JobId("starting-1")) == RunState(None)
    assert await upgraded.snapshot(JobId("done-1")) == RunState(state(2))


async def test_its_disabled_clients_and_its_audit_log_are_there(upgraded: SqlStore) -> None:
    assert await upgraded.disabled_clients() == {"site-8": "", "site-9": "its laptop was lost"}
    assert await upgraded.audit_log() == [
        AuditEntry(51.0, "member@demo", "job abort", "done-1", "refused", "member@demo may not"),
        AuditEntry(50.0, "lead@demo", "job submit", "waiting-1", "ok"),
    ]


async def test_of_its_clients_tokens_and_certificates_are_known_from_then_on(upgraded: SqlStore) -> None:
    epoch = (await upgraded.take_lease("server:1", name="server", target="", ttl_s=4.0)).epoch
    assert (await upgraded.kept_tokens(), await upgraded.certificate_ends()) == ({}, {})

    await upgraded.keep_token(epoch, "site-1", DIGEST, now_s=300.0, until_s=400.0)
    await upgraded.keep_certificate_ends(epoch, {"site-1": 500.0}, since_s=0.0)

    assert (await upgraded.kept_tokens(), await upgraded.certificate_ends()) == ({"site-1": DIGEST}, {"site-1": 500.0})


async def test_its_lease_is_free_and_the_tenure_of_its_last_server_over(upgraded: SqlStore) -> None:
    assert await upgraded.lease() == Lease(4, "", Ssid(f"{STORE_ID}-4"))
    with pytest.raises(StaleEpoch):
        await upgraded.set_disabled(3, "site-1", True)


async def test_its_running_job_goes_on_to_the_end(upgraded: SqlStore) -> None:
    epoch = (await upgraded.take_lease("server:1", name="server", target="", ttl_s=4.0)).epoch
    late = TaskResult(TASK_OF_SITE_3.key, UpdateRef(model(3), 5, {}))
    assert await upgraded.accept_answer(epoch, RUNNING, ANSWER_OF_SITE_2) == ANSWER_OF_SITE_2
    await upgraded.accept_answer(epoch, RUNNING, late)
    assert (await upgraded.snapshot(RUNNING)).answers == (FAULT_OF_SITE_1, ANSWER_OF_SITE_2, late)

    await upgraded.commit_round(epoch, RUNNING, CommitRound(state(3), carried=(VALIDATE.key,)), now_s=300.0)
    await upgraded.issue_tasks(epoch, RUNNING, [TaskAssignment(key(SITES[0], round_number=4), model(3), {})])
    assert [task.key.round for task in (await upgraded.snapshot(RUNNING)).tasks] == [3, 4]
    await upgraded.commit_round(epoch, RUNNING, CommitRound(state(4)), now_s=301.0)
    completed = move(await upgraded.job(RUNNING), JobState.COMPLETED, at=302.0)
    await upgraded.end_run(epoch, completed, was=JobState.RUNNING)

    assert await upgraded.snapshot(RUNNING) == RunState(state(4))
    assert [view.round for view in await upgraded.rounds(RUNNING)] == [0, 1, 2, 3, 4]


async def test_the_first_release_refuses_the_store_from_then_on(upgraded: SqlStore, old: Path) -> None:
    await upgraded.close()
    connection = sqlite3.connect(old)
    version = connection.execute("SELECT value FROM meta WHERE key = 'schema_version'").fetchone()
    connection.close()

    assert version == ("2",)  # it compares this with its own, '1'


# The way there --------------------------------------------------------------------------------------------------------


async def test_an_upgrade_is_said_once_and_a_new_store_is_none(
    path: Path, old: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "hanse")
    for where in (old, old, tmp_path / "new.db"):
        async with SqlStore(where):
            pass

    assert [(line.message, vars(line)["was"], vars(line)["is"]) for line in caplog.records] == [
        ("the store was migrated", "0001", SCHEMA_VERSION)
    ]


async def test_a_new_store_begins_before_its_first_tenure_with_an_id_that_stays(path: Path) -> None:
    for _ in range(2):
        async with SqlStore(path, new_id=iter(["first", "second"]).__next__) as store:
            assert await store.lease() == Lease(0, "", Ssid("first-0"))
        # The next one has another id to give, and does not.
    async with SqlStore(path, new_id=lambda: "third") as store:
        assert (await store.lease()).ssid == "first-0"


def test_the_migrations_make_the_tables_that_the_code_knows(where: Path | str) -> None:
    asyncio.run(_open_and_close(SqlStore(where)))

    with database_at(where).migrating() as connection:
        context = MigrationContext.configure(connection, opts={"compare_server_default": True})
        differences = compare_metadata(context, metadata)
        version = schema_version(connection)

    assert differences == []
    assert version == SCHEMA_VERSION


def test_a_store_of_the_first_release_and_a_new_one_come_to_the_same_schema(path: Path, tmp_path: Path) -> None:
    def schema(file: Path) -> dict[str, str]:
        asyncio.run(_open_and_close(SqlStore(file)))
        connection = sqlite3.connect(file)
        rows = connection.execute("SELECT name, sql FROM sqlite_schema WHERE sql IS NOT NULL").fetchall()
        connection.close()
        return {name: " ".join(sql.replace('"', "").split()) for name, sql in rows}

    fresh = schema(tmp_path / "new.db")
    connection = sqlite3.connect(path)
    connection.executescript(FIRST_RELEASE.read_text())
    connection.close()

    assert schema(path) == fresh


async def test_a_store_that_a_later_release_made_is_refused_and_left_alone(path: Path) -> None:
    await _open_and_close(SqlStore(path))
    connection = sqlite3.connect(path)
    with connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    before = list(connection.iterdump())

    with pytest.raises(
        StoreFailed, match=f"later release .* 9999, .* up to {SCHEMA_VERSION}; use that release"
    ) as caught:
        await SqlStore(path).open()

    assert str(path) in str(caught.value)
    assert list(connection.iterdump()) == before
    connection.close()


def test_an_upgrade_that_fails_leaves_the_store_as_it_was(old: Path) -> None:
    database = database_at(old)

    def upgrade_and_fail(connection: Connection) -> None:
        migrate(connection, version="0001", name="the store")
        assert schema_version(connection) == SCHEMA_VERSION
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), database.migrating() as connection:
        upgrade_and_fail(connection)
    with database.migrating() as connection:
        assert schema_version(connection) == "0001"
        assert "standbys" not in inspect(connection).get_table_names()
    connection_ = sqlite3.connect(old)
    assert connection_.execute("SELECT epoch, holder, expires_at FROM lease").fetchone() == (3, "host-1:4711", 1012.0)
    connection_.close()


async def test_servers_that_open_a_store_at_once_migrate_it_once(where: Path | str) -> None:
    stores = [SqlStore(where) for _ in range(6)]

    await asyncio.gather(*(store.open() for store in stores))

    leases = [await store.lease() for store in stores]
    assert leases == leases[:1] * 6
    for store in stores:
        await store.close()


# A store that others use meanwhile ------------------------------------------------------------------------------------


@pytest.fixture(params=["a new file", "a new database in PostgreSQL"])
def shared(request: pytest.FixtureRequest, path: Path) -> Path | str:
    """An empty database that several servers use."""
    return path if request.param == "a new file" else str(request.getfixturevalue("postgres_url"))


async def test_a_store_of_this_release_is_opened_while_another_server_hangs_in_opening_it(
    shared: Path | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hanse.storage.postgres.MIGRATION_TIMEOUT_S", 1.0)
    await _open_and_close(SqlStore(shared))

    with database_at(shared).migrating():
        async with SqlStore(shared) as store:
            assert await store.jobs() == []


async def test_an_upgrade_ends_the_tenure_of_a_server_of_an_earlier_release_that_still_runs(
    shared: Path | str,
) -> None:
    async with SqlStore(shared) as older:
        epoch = (await older.take_lease("server:1", name="server", target="here", ttl_s=4.0)).epoch
        _execute(shared, "DROP TABLE certificate_ends", "UPDATE alembic_version SET version_num = '0003'")

        async with SqlStore(shared) as newer:
            assert await newer.lease() == Lease(epoch + 1, "", (await older.lease()).ssid, ttl_s=4.0)
            with pytest.raises(StaleEpoch):
                await older.set_disabled(epoch, "site-1", True)


async def test_a_server_that_runs_does_not_take_the_lease_of_a_store_that_a_later_release_has_upgraded(
    shared: Path | str,
) -> None:
    async with SqlStore(shared) as store:
        _execute(shared, "UPDATE alembic_version SET version_num = '9999'")

        with pytest.raises(StoreFailed, match=r"taking the lease of .*: a later release .* start this server again"):
            await store.take_lease("server:1", name="server", target="", ttl_s=4.0, force=True)
        assert (await store.lease()).epoch == 0


def test_only_an_upgrade_pays_for_alembic(path: Path) -> None:
    program = (
        "import asyncio, sys; from pathlib import Path; from hanse.storage.store import SqlStore\n"
        "async def main():\n"
        "    async with SqlStore(Path(sys.argv[1])): print('alembic' in sys.modules)\n"
        "asyncio.run(main())"
    )
    shown = [
        subprocess.run([sys.executable, "-c", program, path], capture_output=True, check=True).stdout for _ in range(2)
    ]

    assert shown == [b"True\n", b"False\n"]


def _execute(where: Path | str, *statements: str) -> None:
    connection = database_at(where).connect()
    for statement in statements:
        connection.cursor().execute(statement, {})
    connection.commit()
    connection.close()


async def _open_and_close(store: SqlStore) -> None:
    async with store:
        pass
