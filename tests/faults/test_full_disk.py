"""A disk that fills up in the middle of a run: the job says what it waits for, and goes on when there is space again.

The workspace lies on a disk of a few megabytes. One client is held up until the disk is full, so that it is full for
the rest of the round: for what arrives, for the journal, and for the fold.
"""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from hanse.cell.loop import run
from hanse.codes import CODES
from hanse.messages import JobView
from tests.faults.bench import RUN_WITHIN_S, Bench, Disturbance, Told, job_like, provisioned
from tests.faults.changes import wait_line, wait_none
from tests.faults.small_disk import SmallDisk, small_disk
from tests.faults.steps import STEPS, Step

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

DISK_MB = 24
TENSOR_BYTES = 100 * 200 * 4
FULL = "is full ("
NOTICED_WITHIN_S = 30.0
AFTER_ONE_ANSWER = STEPS.index(Step("result_accepted", 2, 1))


@contextmanager
def bench_on_small_disk(gates: Path, name: str) -> Iterator[tuple[Bench, SmallDisk]]:
    """Give a bench that has begun, with the workspace of *name* on a small disk.

    Heartbeats are ten minutes apart, so whatever is told of a client was told at once.
    """
    settings = "settings = { heartbeat_s = 600.0 }"
    with (
        provisioned(gates, settings=settings) as made,
        small_disk(made.running.workspace(name), megabytes=DISK_MB) as disk,
    ):
        made.begin()
        yield made, disk
        made.running.stop()


@pytest.fixture(scope="module")
def at_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Bench, SmallDisk]]:
    """A server whose workspace is on a small disk, and two clients."""
    with bench_on_small_disk(tmp_path_factory.mktemp("gates"), "server") as made:
        yield made


@pytest.fixture(scope="module")
def at_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Bench, SmallDisk]]:
    """A server and two clients, of which site-1 has its workspace on a small disk."""
    with bench_on_small_disk(tmp_path_factory.mktemp("gates"), "site-1") as made:
        yield made


def shown(made: Bench, told: Told) -> JobView:
    """Return the job as ``hanse job show`` gets it."""

    async def show() -> JobView:
        async with made.session() as session:
            return await session.show(told.job_id)

    return run(show(), NOTICED_WITHIN_S)


@pytest.mark.parametrize(
    "left_bytes",
    [0, TENSOR_BYTES // 2, TENSOR_BYTES + 16_384, 2 * TENSOR_BYTES + 65_536],
    ids=["for-nothing", "for-half-an-update", "for-an-update", "for-the-fold"],
)
def test_server_whose_disk_is_full_says_so_and_goes_on_when_there_is_space(
    at_server: tuple[Bench, SmallDisk], left_bytes: int
) -> None:
    made, disk = at_server
    told, views, log = Told(), list[JobView](), made.running.log("server")

    with closing(made.held("site-1", 2)) as gate:

        def silence() -> list[str]:
            views.append(shown(made, told))
            return [] if any(FULL in each.what for each in views[-1].waiting) else [str(views[-1])]

        def fill_up() -> None:
            said = log.stat().st_size
            disk.fill(but_bytes=left_bytes)
            gate.close()
            wait_line(log, FULL, after=said, within_s=NOTICED_WITHIN_S)
            wait_none(silence, [log], what="the job to show that the disk is full", within_s=NOTICED_WITHIN_S)
            disk.give_back()

        try:
            view = run(made.run([Disturbance(AFTER_ONE_ANSWER, fill_up)], told=told), RUN_WITHIN_S)
        finally:
            disk.give_back()
    assert {each.state for each in views} == {"running"}
    made.check(view)


@pytest.mark.parametrize("retries", [0, 4], ids=["ends-the-run", "is-asked-again"])
def test_client_whose_disk_is_full(at_client: tuple[Bench, SmallDisk], retries: int, tmp_path: Path) -> None:
    made, disk = at_client
    told, waiting_for = Told(), list[str]()

    with closing(made.held("site-2", 2)) as gate:

        def fill_up() -> None:
            # site-1 has answered; the model of the round before goes, and would make room for the next.
            job = made.running.workspace("site-1") / "jobs" / told.job_id
            wait_none(
                lambda: list(map(str, sorted((job / "tensors").iterdir())[1:])),
                [job],
                what="the tensors of the round before to be deleted",
                within_s=NOTICED_WITHIN_S,
            )
            said = (job / "job.log").stat().st_size
            disk.fill()
            gate.close()
            wait_line(job / "job.log", FULL, after=said, within_s=NOTICED_WITHIN_S)
            waiting_for.extend(client.name for each in shown(made, told).waiting for client in each.whom)
            if retries:
                disk.give_back()

        try:
            job = job_like(tmp_path, retries=retries)
            view = run(made.run([Disturbance(AFTER_ONE_ANSWER, fill_up)], told=told, job=job), RUN_WITHIN_S)
        finally:
            disk.give_back()
    assert "site-1" in waiting_for
    if retries:
        made.check(view, may_be_asked_again=True)
        return
    assert (view.state, view.code, view.client, view.cause) == ("failed", "too-few-clients", "site-1", "no-space")
    assert view.reason.startswith("only 1 of the 2 answers that the round needs can come: site-1 (receiving tensor ")
    assert FULL in view.reason
    assert str(disk.folder) in view.reason
    assert view.advice == CODES["no-space"].advice
    assert any(FULL in line for line in view.log_tail.splitlines())
    made.check_processes()
    made.check_files(view.job_id)
