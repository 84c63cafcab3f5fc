"""Two servers on one store, one of which is killed, paused, or told to leave: the runs go on at the other.

The store is a SQLite file, and for some of the faults PostgreSQL, which is also stopped and cut off; either writes down
every write (``journal.record``). The one that was killed is started again and stands by for the next fault, so one
deployment lasts for all.
"""

import dataclasses
import os
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import msgspec
import psutil
import pytest
from benchmarks.deployment import Deployment, two_servers

from hanse.admin.session import AdminSession
from hanse.cell.loop import run
from hanse.errors import HanseError, StaleEpoch
from hanse.identity.kits import Kit
from hanse.identity.servers_secret import SERVERS_SECRET_FILE, ServersSecret
from hanse.messages import JobView
from hanse.settings import AdminSettings
from tests.e2e.loop import on_the_loop
from tests.faults import journal
from tests.faults.at_writes import REFUSED, VARIABLE
from tests.faults.bench import RUN_WITHIN_S, Bench, Disturbance, Told
from tests.faults.changes import wait_line, wait_none
from tests.faults.proxy import FAIR, SPLIT, FaultyNetwork
from tests.faults.steps import STEPS, Step
from tests.postgres import Postgres

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

SERVERS = ("server", "standby")
AT = (2, 3, 5, 6, 8, 11)
"""The steps at which a server is disturbed: before, in and after a round."""
AFTER_ROUND_1 = STEPS.index(Step("round_done", 1))
HELD_ROUND = 3


class Pair(Bench):
    """A bench with two servers on the database *where*."""

    def __init__(self, running: Deployment, gates: Path, where: journal.Where) -> None:
        super().__init__(running, gates)
        self.where = where

    @property
    def store(self) -> journal.Where:
        """The servers' database."""
        return self.where

    @property
    def hot(self) -> str:
        """The server that serves."""
        return str(self.running.hanse("server", "status")["name"])

    @property
    def cold(self) -> str:
        """The one that stands by."""
        (other,) = set(SERVERS) - {self.hot}
        return other

    def pause(self, name: str) -> psutil.Process:
        """Stop a server's process (SIGSTOP) at a moment at which it writes nothing, and return it.

        One that is stopped while it writes keeps the file's lock, and nobody else writes until it is gone or goes on.
        """
        assert isinstance(self.where, Path)
        process = self.running.process(name)
        stop(process)
        while holds_write_lock(process.pid, self.where):
            process.resume()
            stop(process)
        return process

    def registrations(self, site: str) -> int:
        """Return how often *site* has registered."""
        return self.running.log(site).read_text().count("INFO hanse.client.agent registered")

    def disturbed(self, step: int, act: Callable[[], object]) -> tuple[JobView, float]:
        """Run the job, do *act* at *step*, and return how it ended and the seconds from then to the next answer."""
        began: list[float] = []
        told = Told()

        def start() -> None:
            began.append(time.time())
            act()

        try:
            view = run(self.run([Disturbance(step, start)], told=told), RUN_WITHIN_S)
        except BaseException:
            print(f"told: {told}\n{self.logs()}")  # noqa: T201 - what pytest shows of a test that failed
            raise
        accepted = [event.at for event in told.events if event.kind == "result_accepted" and event.at > began[0]]
        return view, min(accepted, default=began[0]) - began[0]


@contextmanager
def pair(running: Deployment, gates: Path, url: str = "") -> Iterator[Pair]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HANSE_TEST_GATES", str(gates))
        running.start("server")
        running.start("standby", *running.names)
        made = Pair(running, gates, url or running.shared / "store.db")
        journal.record(made.store)
        view = run(made.run(), RUN_WITHIN_S)
        made.undisturbed = view.result
        made.check(view)
        yield made


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with two_servers() as running, pair(running, tmp_path_factory.mktemp("gates")) as made:
        yield made


def stop(process: psutil.Process) -> None:
    """Stop a process, a child of this one, and return when it has stopped."""
    process.suspend()
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)


def holds_write_lock(pid: int, store: Path) -> bool:
    """Return whether a process is writing to an SQLite file: the lock for that is byte 120 of its ``-shm`` file."""
    inode = store.with_name(f"{store.name}-shm").stat().st_ino
    locks = [line.split() for line in Path("/proc/locks").read_text().splitlines() if "->" not in line]
    return any(lock[3:5] == ["WRITE", str(pid)] and _is_byte(lock[5:8], inode, 120) for lock in locks)


def _is_byte(place: Sequence[str], inode: int, byte: int) -> bool:
    file, first, last = place
    return file.rpartition(":")[2] == str(inode) and int(first) <= byte and (last == "EOF" or byte <= int(last))


@pytest.fixture(scope="module")
def on_postgres(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    url = postgres.url(postgres.empty_database())
    with two_servers(url) as running, pair(running, tmp_path_factory.mktemp("gates"), url) as made:
        yield made


@pytest.mark.parametrize("step", AT, ids=lambda step: str(STEPS[step]).replace(" ", "-"))
def test_a_killed_server_is_succeeded_and_the_run_goes_on(bench: Pair, note: Callable[..., None], step: int) -> None:
    before, names = bench.hot, bench.running.names
    registered = [bench.registrations(site) for site in names]

    view, took_s = bench.disturbed(step, lambda: bench.running.kill(before))

    assert bench.hot != before
    bench.check(view)
    bench.check_worked_once(view.job_id)
    assert [bench.registrations(site) for site in names] == registered, "nobody had to register anew"
    note("failover: kill -9 of the hot server to the next accepted answer", str(STEPS[step]), f"{took_s:.1f} s")
    bench.running.start(before)


def test_a_server_that_was_paused_through_its_lease_commits_nothing_and_serves_nobody(bench: Pair) -> None:
    before = bench.hot
    paused: list[psutil.Process] = []

    try:
        view, _ = bench.disturbed(5, lambda: paused.append(bench.pause(before)))
        assert bench.hot != before
        written = len(journal.history(bench.store))
    finally:
        for process in paused:
            process.resume()
    bench.check(view)
    with pytest.raises(HanseError, match="Server not in service"):
        run(_asked_directly(bench, before), 30)
    run(bench.run(), RUN_WITHIN_S)
    entries = journal.history(bench.store)
    journal.check_epochs(entries)
    assert {each.epoch for each in entries[written:]} == {entries[written - 1].epoch}, "only the new tenure has written"
    assert bench.running.process(before).is_running(), "it stands by"


@pytest.mark.parametrize("write", ["issue_tasks 2", "accept_answer 3", "commit_round 3"])
def test_a_write_at_which_a_server_was_paused_through_its_lease_is_refused(bench: Pair, write: str) -> None:
    """It goes on while its successor is in the middle of the run, and would write what is of its own tenure."""
    name, successor = bench.cold, bench.hot
    bench.running.end(name)
    bench.running.programs[name] = [sys.executable, "-m", "tests.faults.at_writes"]
    bench.running.environments[name] = {VARIABLE: f"{write} before stop-server"}
    bench.running.start(name)
    bench.running.hanse("server", "promote", name)
    log = bench.running.log(name)
    said = log.stat().st_size
    process = bench.running.process(name)

    try:
        with closing(bench.held("site-1", HELD_ROUND)) as gate:
            go_on = Disturbance(AFTER_ROUND_1, process.resume, once_back=True)  # told by the successor
            view = run(bench.run([go_on, Disturbance(AFTER_ROUND_1, gate.close, once_back=True)]), RUN_WITHIN_S)
        wait_line(log, f"{REFUSED} {StaleEpoch.code}", after=said, within_s=RUN_WITHIN_S)
        assert bench.hot == successor
        bench.check(view)
        with pytest.raises(HanseError, match="Server not in service"):
            run(_asked_directly(bench, name), 30)
    finally:
        process.resume()
        del bench.running.programs[name], bench.running.environments[name]
        bench.running.end(name)
        bench.running.start(name)


@pytest.mark.parametrize("step", AT[:4], ids=lambda step: str(STEPS[step]).replace(" ", "-"))
def test_a_server_hands_over_in_the_middle_of_a_run(bench: Pair, note: Callable[..., None], step: int) -> None:
    successor = bench.cold
    promoted: list[float] = []

    def promote() -> None:
        promoted.append(bench.running.hanse("server", "promote", successor)["took_s"])

    view, took_s = bench.disturbed(step, promote)

    bench.check(view)
    assert bench.hot == successor
    note("handover: hanse server promote", str(STEPS[step]), f"{promoted[0]:.2f} s", f"next answer {took_s:.2f} s")


def test_a_server_that_shuts_down_in_order_is_succeeded_at_once(bench: Pair) -> None:
    before = bench.hot

    view, _ = bench.disturbed(6, lambda: bench.running.end(before))

    bench.check(view)
    assert bench.hot != before
    bench.running.start(before)


def test_both_servers_killed_at_once_go_on_when_one_is_back(bench: Pair) -> None:
    def kill() -> None:
        for name in SERVERS:
            bench.running.kill(name)
        bench.running.start("standby")

    view, _ = bench.disturbed(8, kill)

    bench.check(view)
    assert bench.hot == "standby"
    bench.running.start("server")


@pytest.mark.parametrize("held_round", [1, 2])
def test_servers_that_get_a_new_secret_go_on_with_clients_that_register_anew(bench: Pair, held_round: int) -> None:
    names = bench.running.names
    registered = [bench.registrations(site) for site in names]

    def replace() -> None:
        for name in (bench.cold, bench.hot):  # the standby first, or it would take over
            bench.running.end(name)
        secret = ServersSecret.new()
        for name in SERVERS:
            secret.save(bench.running.kit(name) / SERVERS_SECRET_FILE)
        bench.running.start(*SERVERS)
        gate.close()

    with closing(bench.held("site-1", held_round)) as gate:
        view, _ = bench.disturbed(AT[held_round], replace)

    bench.check(view)
    assert [bench.registrations(site) for site in names] == [before + 1 for before in registered]


@pytest.mark.parametrize("step", [3, 6])
def test_a_killed_server_is_succeeded_on_postgresql(on_postgres: Pair, note: Callable[..., None], step: int) -> None:
    before = on_postgres.hot

    view, took_s = on_postgres.disturbed(step, lambda: on_postgres.running.kill(before))

    on_postgres.check(view)
    assert on_postgres.hot != before
    note("failover on PostgreSQL", str(STEPS[step]), f"{took_s:.1f} s")
    on_postgres.running.start(before)


def test_a_server_hands_over_on_postgresql(on_postgres: Pair, note: Callable[..., None]) -> None:
    successor = on_postgres.cold
    promoted: list[float] = []

    def promote() -> None:
        promoted.append(on_postgres.running.hanse("server", "promote", successor)["took_s"])

    view, took_s = on_postgres.disturbed(6, promote)

    on_postgres.check(view)
    note("handover on PostgreSQL", str(STEPS[6]), f"{promoted[0]:.2f} s", f"next answer {took_s:.2f} s")


@pytest.mark.parametrize("step", [3, 7])
def test_a_database_that_goes_away_and_comes_back(on_postgres: Pair, postgres: Postgres, step: int) -> None:
    def away() -> None:
        postgres.stop(immediate=True)
        postgres.start()

    view, _ = on_postgres.disturbed(step, away)

    on_postgres.check(view, may_be_unwritten=True)


def test_a_database_that_is_away_for_longer_than_a_lease(on_postgres: Pair, postgres: Postgres) -> None:
    """Nobody can know who is primary meanwhile, so nobody serves; then one of them does."""

    def away() -> None:
        hot = on_postgres.hot
        before = on_postgres.running.log(hot).read_text().count("this server's tenure has ended")
        postgres.stop(immediate=True)
        try:
            _wait_for_word(on_postgres.running.log(hot), "this server's tenure has ended", more_than=before)
        finally:
            postgres.start()

    view, _ = on_postgres.disturbed(6, away)

    on_postgres.check(view, may_be_unwritten=True)


def test_a_server_that_is_cut_off_from_the_database_is_succeeded(
    on_postgres: Pair, postgres: Postgres, note: Callable[..., None]
) -> None:
    """Its clients still reach it, and the other server the database."""
    bench, name = on_postgres, "server"
    network = FaultyNetwork(postgres.port)
    with on_the_loop(network.serving()) as port:
        bench.running.end(name)
        bench.running.configure(name, store=str(bench.store).replace(f":{postgres.port}/", f":{port}/"))
        bench.running.start(name)
        bench.running.hanse("server", "promote", name)
        written = len(journal.history(bench.store))

        view, took_s = bench.disturbed(6, lambda: run(network.become(SPLIT), RUN_WITHIN_S))

        assert bench.hot == "standby"
        run(network.become(FAIR), RUN_WITHIN_S)
        bench.check(view, may_be_unwritten=True)
        with pytest.raises(HanseError, match="Server not in service"):
            run(_asked_directly(bench, name), 30)
        epochs = [each.epoch for each in journal.history(bench.store)[written:]]
        assert len(set(epochs)) == 2, f"one tenure after the other has written: {epochs}"
        bench.running.end(name)
        bench.running.configure(name, store=str(bench.store))
    note("failover: the hot server is cut off from PostgreSQL", str(STEPS[6]), f"{took_s:.1f} s")
    bench.running.start(name)


def _wait_for_word(log: Path, word: str, *, more_than: int) -> None:
    wait_none(
        lambda: [] if log.read_text().count(word) > more_than else [word],
        [log.parent],
        what=f"{log.name} to tell of {word!r}",
        within_s=60.0,
    )


async def _asked_directly(bench: Pair, name: str) -> None:
    """Ask the server *name*, and no other, as an administrator."""
    kit = Kit.load(bench.running.kit("admin@bench"), AdminSettings)
    address = tomllib.loads((bench.running.kit(name) / "settings.toml").read_text())["address"]
    settings = msgspec.structs.replace(kit.settings, servers=(address,), server_names=(name,))
    alone = dataclasses.replace(kit, settings=settings)
    async with AdminSession(alone, patience_s=5):
        raise AssertionError(f"{name} serves")
