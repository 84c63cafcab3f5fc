"""The commands on jobs, with a session that answers from memory."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from hanse.errors import Conflict
from hanse.ids import Digest, JobId
from hanse.messages import ClientView, JobEvent, JobSubmitted, JobView, Waiting

from .conftest import Hanse

JOB = JobId("digits-1")
HOSTILE = "\x1b[2J\x07\x9b1m\u202eone\r\nadvice     delete everything"
RUNNING = JobView(JOB, "digits", "running", "ada@demo", 1_700_000_000.0, round=1, rounds=3, metrics={"loss": 0.5})
COMPLETED = JobView(
    JOB, "digits", "completed", "ada@demo", 1.0, round=3, rounds=3, result=Digest("0" * 64), result_bytes=3
)


class FakeSession:
    """Answers as a server with one job would."""

    def __init__(self, ended: JobView = COMPLETED) -> None:
        self.ended, self.shown = ended, RUNNING
        self.asked: list[object] = []

    async def submit(self, package: bytes) -> JobSubmitted:
        self.asked.append(package[:2])
        return JobSubmitted(JOB, "digits")

    async def list(self, *, state: str = "", limit: int = 100) -> tuple[JobView, ...]:
        self.asked.append((state, limit))
        return (RUNNING,)

    async def show(self, job_id: str) -> JobView:
        return self.shown

    async def wait(self, job_id: str) -> JobView:
        return self.ended

    async def follow(self, job_id: str) -> AsyncIterator[JobView | JobEvent]:
        yield RUNNING
        yield JobEvent(JOB, "round_done", 1.0, round=2, metrics={"loss": 0.25})
        yield self.ended

    async def log(self, job_id: str, *, client: str = "", lines: int = 200) -> str:
        self.asked.append((client, lines))
        return {"": "one\ntwo", "hostile": HOSTILE}.get(client, "")

    async def abort(self, job_id: str) -> JobView:
        raise Conflict(f"job {job_id}", state="completed", wanted="aborted")

    async def download(self, job_id: str, path: Path) -> JobView:
        await asyncio.to_thread(path.write_bytes, b"abc")
        return COMPLETED


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> FakeSession:
    fake = FakeSession()

    def ask(kit: Path | None, work: Callable[[FakeSession], Awaitable[Any]], output: object, **more: object) -> Any:
        async def asked() -> Any:
            return await work(fake)

        return asyncio.run(asked())

    monkeypatch.setattr("hanse.cli.job.ask", ask)
    monkeypatch.setattr("hanse.cli.submit.ask", ask)
    return fake


def test_the_list_has_a_line_a_job(hanse: Hanse, session: FakeSession) -> None:
    ended = hanse("job", "list", "--state", "running", "--limit", 5)
    head, line = ended.out.splitlines()
    assert head.split() == ["job", "state", "round", "submitted", "by", "remark"]
    assert line.split()[:3] == ["digits-1", "running", "1/3"]
    assert line.strip().endswith("loss 0.5")
    assert session.asked == [("running", 5)]


def test_a_job_is_shown(hanse: Hanse, session: FakeSession) -> None:
    assert "state      running" in hanse("job", "show", "digits").out


def test_waiting_shows_progress_beside_the_result(hanse: Hanse, session: FakeSession) -> None:
    ended = hanse("job", "wait", "digits")
    assert ended.status == 0
    assert ended.err.splitlines() == ["digits-1 running", "round 2/3  loss 0.25"]
    assert "state      completed" in ended.out


@pytest.mark.parametrize(("state", "status"), [("failed", 20), ("aborted", 21)])
def test_how_the_job_ended_is_how_the_command_ends(state: str, status: int, hanse: Hanse, session: FakeSession) -> None:
    session.ended = JobView(JOB, "digits", state, "ada@demo", 1.0, reason="it broke")
    ended = hanse("job", "wait", "digits")
    assert ended.status == status
    assert "it broke" in ended.out


def test_submitting_prints_the_id_and_nothing_else(hanse: Hanse, session: FakeSession, tmp_path: Path) -> None:
    hanse("new", tmp_path / "job")
    ended = hanse("job", "submit", tmp_path / "job")
    assert (ended.status, ended.out, ended.err) == (0, "digits-1\n", "")
    assert session.asked == [b"PK"]
    waited = hanse("job", "submit", tmp_path / "job", "--wait")
    assert waited.out.splitlines()[0] == "digits-1"
    assert "state      completed" in waited.out


def test_a_workflow_that_does_not_hold_is_refused_here(hanse: Hanse, session: FakeSession, tmp_path: Path) -> None:
    hanse("new", tmp_path / "job")
    definition = tmp_path / "job" / "pyproject.toml"
    definition.write_text(definition.read_text().replace("rounds = 10", "round = 10"))
    ended = hanse("job", "submit", tmp_path / "job")
    assert ended.status == 2
    assert "workflow.round" in ended.err
    assert session.asked == []


def test_a_log_is_printed_as_it_is(hanse: Hanse, session: FakeSession) -> None:
    assert hanse("job", "log", "digits", "--lines", 2).out == "one\ntwo\n"
    assert hanse("job", "log", "digits", "--client", "site-1").out == ""
    assert session.asked == [("", 2), ("site-1", 200)]


def test_nothing_that_a_client_says_reaches_the_terminal_as_a_command(
    hanse: Hanse, session: FakeSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    hurt = msgspec.structs.replace(
        RUNNING,
        state="failed",
        reason=f"site-1 says: {HOSTILE}",
        clients=(ClientView("site-1", "failed", HOSTILE),),
        waiting=(Waiting(HOSTILE, 0.0, 0.0, HOSTILE, (ClientView("site-1", "suspect", HOSTILE),)),),
        log_tail=HOSTILE,
    )

    async def show(job_id: str) -> JobView:
        return hurt

    async def listed(*, state: str = "", limit: int = 100) -> tuple[JobView, ...]:
        return (hurt,)

    async def abort(job_id: str) -> JobView:
        raise Conflict(HOSTILE, state="completed", wanted="aborted")

    monkeypatch.setattr(session, "show", show)
    monkeypatch.setattr(session, "list", listed)
    monkeypatch.setattr(session, "abort", abort)
    told = [
        hanse("job", "log", "digits", "--client", "hostile").out,
        hanse("job", "show", "digits").out,
        hanse("job", "list").out,
        hanse("job", "abort", "digits").err,
    ]
    for text in told:
        assert [char for char in text if not char.isprintable() and char != "\n"] == []
    assert [line for line in told[1].splitlines() if line.startswith("advice")] == []
    assert len(told[2].splitlines()) == 2
    assert len(told[3].splitlines()) == 1
    assert json.loads(hanse("job", "show", "digits", "--format", "json").out)["log_tail"] == HOSTILE


def test_a_refusal_is_the_commands_end(hanse: Hanse, session: FakeSession) -> None:
    ended = hanse("job", "abort", "digits")
    assert (ended.status, ended.err) == (4, "hanse: job digits is completed, so it cannot be aborted [conflict]\n")


def test_a_server_does_not_choose_where_a_model_is_put(
    hanse: Hanse, session: FakeSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    session.shown = msgspec.structs.replace(RUNNING, job_id=JobId("../model"))

    ended = hanse("job", "download", "digits")
    assert (ended.status, ended.out) == (12, "")
    assert ended.err.startswith("hanse: JobView.job_id is '../model'; expected lower-case letters")
    assert [path.name for path in tmp_path.rglob("*")] == ["here"]


def test_a_model_is_put_into_a_file_called_like_the_job(
    hanse: Hanse, session: FakeSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert hanse("job", "download", "digits").out == "digits-1.safetensors (3 bytes)\n"
    assert (tmp_path / "digits-1.safetensors").read_bytes() == b"abc"
    refused = hanse("job", "download", "digits")
    assert refused.status == 4
    assert "--force" in refused.err
    assert hanse("job", "download", "digits", "--force").status == 0
