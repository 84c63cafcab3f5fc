"""The handlers called directly with messages, as the cell calls them once the gate has let a message pass."""

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest

import hanse.admin
from hanse.admin.commands import MAX_LOG_LINES, MAX_ROUNDS, AdminCommands
from hanse.cell.cell import Cell, Handler
from hanse.cell.frames import MAX_PAYLOAD_BYTES
from hanse.errors import HanseError, ProtocolError, StoreFailed, Unauthenticated, Unauthorized
from hanse.ids import ClientName, Digest, Fqcn, JobId
from hanse.messages import (
    Channel,
    DisableClient,
    Header,
    JobList,
    JobQuery,
    JobView,
    ListClients,
    ListJobs,
    LogQuery,
    LogText,
    Message,
    RoundView,
    StatusQuery,
    SubmitJob,
)

from .world import Deployment, package, wait


class Catching(Cell):
    """A cell that keeps its handlers where a test can call them."""

    def __init__(self) -> None:
        super().__init__(Fqcn("caught"))
        self.caught: dict[str, Handler] = {}

    def on(self, channel: Channel, topic: str, handler: Handler) -> None:
        assert channel is Channel.ADMIN
        self.caught[topic] = handler


@pytest.fixture(scope="module")
def handlers(deployment: Deployment) -> dict[str, Handler]:
    cell = Catching()
    AdminCommands(wall=lambda: 42.0).register(deployment.server, cell)
    return cell.caught


def ask(
    handler: Handler, payload: msgspec.Struct | None, *, who: str = "ada@demo", role: str = "admin"
) -> Message | None:
    stamped = {Header.ORIGIN: f"{who}.cli-1", Header.CLIENT: who, Header.ROLE: role}
    headers = {name: value for name, value in stamped.items() if value}
    return wait(handler(Message(headers, payload)))  # type: ignore[arg-type]  # each of these is a coroutine


def job(deployment: Deployment, folder: Path, name: str = "job", who: str = "ada@demo") -> str:
    with deployment.session(who) as session:
        return session.submit(package(folder / name, name)).job_id


def test_whoever_is_nobody_changes_nothing(
    deployment: Deployment, handlers: dict[str, Handler], tmp_path: Path
) -> None:
    job_id = job(deployment, tmp_path)
    changes = {
        "job.submit": SubmitJob(Digest("0" * 64), 1),
        "job.abort": JobQuery(job_id),
        "client.disable": DisableClient("site-1"),
    }
    before = deployment.audited()
    for topic, request in changes.items():
        with pytest.raises(Unauthenticated):
            ask(handlers[topic], request, who="")
    assert deployment.audited() == before


@pytest.mark.parametrize("role", ["", "emperor", "member", "lead"])
def test_a_role_that_may_not_abort_others_jobs_does_not(
    role: str, deployment: Deployment, handlers: dict[str, Handler], tmp_path: Path
) -> None:
    job_id = job(deployment, tmp_path)
    with pytest.raises(Unauthorized):
        ask(handlers["job.abort"], JobQuery(job_id), who="eve@demo", role=role)
    entry = deployment.audited(1)[0]
    assert (entry.at, entry.actor, entry.action, entry.outcome) == (42.0, "eve@demo", "job.abort", "unauthorized")


def test_another_payload_than_the_topics_is_refused(handlers: dict[str, Handler]) -> None:
    for topic, handler in handlers.items():
        with pytest.raises(ProtocolError, match="payload"):
            ask(handler, None)
        assert topic


def test_numbers_out_of_range_are_brought_into_it(
    deployment: Deployment, handlers: dict[str, Handler], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = job(deployment, tmp_path)
    listed = ask(handlers["job.list"], ListJobs(limit=-5))
    assert listed is not None
    assert isinstance(listed.payload, JobList)
    assert len(listed.payload.jobs) == 1
    asked: list[int] = []

    async def log_of(job_id: str, client: str | None, *, lines: int) -> str:
        asked.append(lines)
        return ""

    monkeypatch.setattr(deployment.server.jobs.board, "log_of", log_of)
    for lines in (-1, 10**9):
        shown = ask(handlers["job.log"], LogQuery(job_id, lines=lines))
        assert shown is not None
        assert shown.payload == LogText("")
    assert asked == [1, MAX_LOG_LINES]


def test_an_answer_holds_what_fits_into_a_message(
    deployment: Deployment, handlers: dict[str, Handler], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = job(deployment, tmp_path)
    view = wait(deployment.server.jobs.board.view(JobId(job_id)))
    answered = tuple(f"site-{number}" for number in range(1000))
    rounds = tuple(RoundView(number, {}, 0.1, 1.0, answered) for number in range(1000))
    large = msgspec.structs.replace(view, reason="x" * 100_000, history=rounds)

    async def large_view(job_id: str, *, history: bool = True) -> JobView:
        return large

    async def large_views(**narrowed: Any) -> list[JobView]:
        return [msgspec.structs.replace(large, history=())] * 1000

    monkeypatch.setattr(deployment.server.jobs.board, "view", large_view)
    monkeypatch.setattr(deployment.server.jobs.board, "views", large_views)
    shown = ask(handlers["job.show"], JobQuery(job_id))
    listed = ask(handlers["job.list"], ListJobs(limit=1000))

    assert shown is not None
    assert isinstance(shown.payload, JobView)
    assert 300 < len(shown.payload.history) < 1000
    assert shown.payload.history[-1].round == 999
    assert listed is not None
    assert isinstance(listed.payload, JobList)
    assert 30 < len(listed.payload.jobs) < 1000
    for payload in (shown.payload, listed.payload):
        assert len(msgspec.msgpack.encode(payload)) <= MAX_PAYLOAD_BYTES


def test_a_long_history_is_shown_by_its_last_rounds(
    deployment: Deployment, handlers: dict[str, Handler], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = job(deployment, tmp_path)
    view = wait(deployment.server.jobs.board.view(JobId(job_id)))
    rounds = tuple(RoundView(number, {"loss": 1.0}, 0.1, 1.0) for number in range(MAX_ROUNDS + 5))

    async def long_view(job_id: str, *, history: bool = True) -> JobView:
        return msgspec.structs.replace(view, history=rounds)

    monkeypatch.setattr(deployment.server.jobs.board, "view", long_view)
    shown = ask(handlers["job.show"], JobQuery(job_id))
    assert shown is not None
    assert isinstance(shown.payload, JobView)
    assert [each.round for each in shown.payload.history] == list(range(5, MAX_ROUNDS + 5))


def test_what_fails_in_the_store_is_not_answered_as_done(
    deployment: Deployment, handlers: dict[str, Handler], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(HanseError):
        pass

    async def broken(*arguments: object, **more: object) -> None:
        raise Broken("the disk is full")

    monkeypatch.setattr(deployment.server.jobs.services.store, "set_disabled", broken)
    with pytest.raises(Broken):
        ask(handlers["client.disable"], DisableClient("site-1"))
    assert deployment.server.clients.disabled_because(ClientName("site-1")) is None
    assert deployment.audited(1)[0].reason == "the disk is full"


def test_what_is_done_is_answered_as_done_although_the_audit_log_cannot_be_written(
    deployment: Deployment,
    handlers: dict[str, Handler],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    async def full(*arguments: object, **more: object) -> None:
        raise StoreFailed("writing", "the disk is full")

    monkeypatch.setattr(deployment.server.jobs.services.store, "audit", full)
    job_id = job(deployment, tmp_path)

    assert job_id in [view.job_id for view in wait(deployment.server.jobs.board.views(limit=1000))]
    (record,) = [record for record in caplog.records if record.message == "a command is not in the audit log"]
    told = vars(record)
    assert (told["actor"], told["action"], told["object"]) == ("ada@demo", "job.submit", job_id)
    assert "the disk is full" in told["failed"]
    with pytest.raises(Unauthorized):  # and what is refused, for its own reason
        ask(handlers["job.abort"], JobQuery(job_id), who="lee@demo", role="lead")


@pytest.mark.parametrize(
    ("topic", "payload"),
    [
        ("job.list", ListJobs()),
        ("job.show", JobQuery("digits")),
        ("client.list", ListClients()),
        ("server.status", StatusQuery()),
    ],
)
def test_a_store_that_does_not_answer_is_told_of_in_time(
    topic: str,
    payload: msgspec.Struct,
    deployment: Deployment,
    handlers: dict[str, Handler],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def never(*arguments: object, **more: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr("hanse.server.job_board.LOOK_S", 0.05)
    for method in ("job", "jobs", "disabled_clients", "standbys"):
        monkeypatch.setattr(deployment.server.jobs.services.store, method, never)
    with pytest.raises(StoreFailed, match=r"has not answered for 0\.05 s"):
        ask(handlers[topic], payload)


def test_the_package_names_its_three_faces_and_no_more() -> None:
    for name in hanse.admin.__all__:
        assert getattr(hanse.admin, name).__name__ == name
    with pytest.raises(AttributeError, match="nothing_like_it"):
        hanse.admin.nothing_like_it  # noqa: B018 - the lookup itself is tested
