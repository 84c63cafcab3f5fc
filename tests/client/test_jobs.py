import asyncio
import errno
import os
import shutil
import stat
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from hanse.cell.cell import RemoteError
from hanse.cell.transfer import LocalTransfers, Partial
from hanse.client.process_spec import PROCESS_MODULE
from hanse.client.registration import Registrant
from hanse.client.workspace import JobFolder
from hanse.errors import NotFound, Unauthenticated, Unreachable
from hanse.ids import Digest, Fqcn, JobId
from hanse.launch import long_logs
from hanse.launch.long_logs import TAIL_BYTES
from hanse.launch.memory import KillCounter
from hanse.messages import AbortJob, Channel, DeployJob, Heartbeat, JobEnded
from hanse.settings import SitePolicy
from hanse.storage.packages import MAX_PACKAGE_BYTES

from ..launch.much import MUCH, is_too_long, log_much
from .fake_server import JOB, PROJECT, SITE, FakeServer, fake_server, job_identity, job_spec
from .site import APP, code_folder, site, within

AWAY = Unreachable("server", "it has gone")


async def test_deployed_job_is_started_with_all_that_its_process_needs(tmp_path: Path) -> None:
    async with fake_server(tmp_path / "s") as server, site(server, tmp_path / "w", config={"data": "/d"}) as here:
        await server.up()
        spec = job_spec(seed=3)
        await server.ask("deploy", server.announce(code_folder(tmp_path / "code"), spec))
        assert here.launcher.launched == []
        await server.ask("start", server.start())

        (handle,) = here.launcher.launched
        assert handle.module == PROCESS_MODULE
        told = handle.spec
        assert (told.job_id, told.client, told.project, told.spec) == (JOB, SITE, PROJECT, spec)
        assert (told.identity, told.servers, told.roots) == (job_identity(), ("memory",), b"")
        assert (told.site, told.policy) == ({"data": "/d"}, SitePolicy())
        assert (Path(told.code) / "app.py").read_text().startswith("from hanse.client import ClientApp")
        assert Path(told.tensors).parent == here.workspace / "jobs" / JOB
        assert stat.S_IMODE((here.workspace / "jobs").stat().st_mode) == 0o700


async def test_what_is_asked_twice_is_done_once(tmp_path: Path) -> None:
    async with fake_server(tmp_path / "s") as server, site(server, tmp_path / "w") as here:
        await server.up()
        deploy = server.announce(code_folder(tmp_path / "code"), job_spec())
        for _ in range(2):
            await server.ask("deploy", deploy)
        for _ in range(2):
            await server.ask("start", server.start())
        await server.ask("deploy", deploy)

        assert len(here.launcher.launched) == 1
        assert not here.launcher.launched[0].is_stopped


async def test_job_that_is_deployed_anew_with_other_files_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    async with fake_server(tmp_path / "s") as server, site(server, tmp_path / "w") as here:
        await server.up()
        await server.ask("deploy", server.announce(code_folder(tmp_path / "code"), job_spec()))
        await server.ask("start", server.start())
        await server.ask("deploy", server.announce(code_folder(tmp_path / "code", f"{APP}more = 1\n"), job_spec()))
        (first,) = here.launcher.launched
        assert first.is_stopped
        await server.ask("start", server.start())

        assert len(here.launcher.launched) == 2
        assert "more = 1" in (here.workspace / "jobs" / JOB / "code" / "app.py").read_text()
        assert server.queue(JobEnded).empty(), "it was asked to end"
        here.agent.stop()
        await within(20, here.running)


async def test_next_attempt_takes_the_place_of_a_process_that_the_server_gave_up(tmp_path: Path) -> None:
    async with fake_server(tmp_path / "s") as server, site(server, tmp_path / "w") as here:
        await server.up()
        await server.ask("deploy", server.announce(code_folder(tmp_path / "code"), job_spec()))
        await server.ask("start", server.start(attempt=1))
        await server.ask("start", server.start(attempt=2))

        first, second = here.launcher.launched
        assert first.is_stopped
        assert not second.is_stopped
        assert server.queue(JobEnded).empty(), "it was asked to end"


async def test_start_of_a_job_that_was_not_deployed_is_refused(tmp_path: Path) -> None:
    async with fake_server(tmp_path / "s") as server, site(server, tmp_path / "w"):
        await server.up()
        with pytest.raises(RemoteError, match="there is no deployed job 'digits-1'") as caught:
            await server.ask("start", server.start())
        assert caught.value.error_code == NotFound.code


@pytest.mark.parametrize("job_id", ["../digits", "", "Digits", "a/b"])
async def test_job_whose_id_is_none_is_refused_before_a_file_is_touched(tmp_path: Path, job_id: str) -> None:
    async with fake_server(tmp_path / "s") as server, site(server, tmp_path / "w") as here:
        await server.up()
        deploy = DeployJob(JobId(job_id), "digits", "lead", job_spec(), Digest("0" * 64), 1)
        with pytest.raises(RemoteError, match=r"DeployJob\.job_id"):
            await server.ask("deploy", deploy)

        assert list((here.workspace / "jobs").iterdir()) == []


@pytest.mark.parametrize("size", [-1, 0, MAX_PACKAGE_BYTES + 1, 2**47])
async def test_package_that_is_larger_than_packages_are_is_not_fetched(tmp_path: Path, size: int) -> None:
    async with fake_server(tmp_path / "s") as server, site(server, tmp_path / "w") as here:
        await server.up()
        deploy = DeployJob(JOB, "digits", "lead", job_spec(), Digest("0" * 64), size)
        with pytest.raises(RemoteError, match=r"DeployJob\.package_bytes"):
            await server.ask("deploy", deploy)

        assert list((here.workspace / "jobs").iterdir()) == []


@pytest.mark.parametrize(
    ("policy", "client", "sentence"),
    [
        (SitePolicy(submitters=("ada",)), "app:app", "only jobs of ada may run here, and this one is lead's"),
        (SitePolicy(job_code="deny"), "app:app", "app:app is not installed"),
        (SitePolicy(job_code="deny"), "train.py", "code that comes with a job may not run here, and train.py does"),
    ],
)
async def test_site_refuses_by_its_policy_and_fetches_nothing(
    tmp_path: Path, policy: SitePolicy, client: str, sentence: str
) -> None:
    name = "train.py" if client == "train.py" else "app.py"
    async with fake_server(tmp_path / "s") as server, site(server, tmp_path / "w", policy=policy) as here:
        await server.up()
        deploy = server.announce(code_folder(tmp_path / "code", name=name), job_spec(client))
        with pytest.raises(RemoteError, match="site-1 refused the job: ") as caught:
            await server.ask("deploy", deploy)

        assert sentence in caught.value.reason
        assert list((here.workspace / "jobs").iterdir()) == []


async def test_installed_code_runs_where_a_jobs_own_may_not_and_nothing_of_the_job_can_stand_in_for_it(
    tmp_path: Path,
) -> None:
    policy = SitePolicy(job_code="deny")
    async with fake_server(tmp_path / "s") as server, site(server, tmp_path / "w", policy=policy) as here:
        await server.up()
        code = code_folder(tmp_path / "code", name="sklearn.py")
        await server.ask("deploy", server.announce(code, job_spec("sklearn.federated:app")))
        await server.ask("start", server.start())

        assert here.launcher.launched[0].spec.code == ""


@pytest.mark.parametrize("client", ["absent:app", "absent.deeper:app"])
async def test_client_that_is_neither_in_the_job_nor_installed_is_told_when_it_is_deployed(
    tmp_path: Path, client: str
) -> None:
    async with fake_server(tmp_path / "s") as server, site(server, tmp_path / "w"):
        await server.up()
        deploy = server.announce(code_folder(tmp_path / "code"), job_spec(client))
        with pytest.raises(RemoteError, match="a module of the job, or one installed at the site"):
            await server.ask("deploy", deploy)


async def test_package_that_is_fetched_with_a_token_that_has_just_been_renewed_may_be_had_another_time(
    tmp_path: Path,
) -> None:
    class JustRenewed(LocalTransfers):
        """The first call comes with the token before."""

        is_first = True

        async def download(self, scope: str, digest: Digest, size: int, into: Partial) -> None:
            if self.is_first:
                self.is_first = False
                into.close()
                raise Unauthenticated("the token was revoked")
            await super().download(scope, digest, size, into)

    async with fake_server(tmp_path / "s") as server:
        server.transfers = JustRenewed(server.files)
        async with site(server, tmp_path / "w"):
            await server.up()
            deploy = server.announce(code_folder(tmp_path / "code"), job_spec())
            with pytest.raises(RemoteError, match="the token was revoked") as caught:
                await server.ask("deploy", deploy)
            assert caught.value.retryable
            await server.ask("deploy", deploy)


async def test_package_that_no_token_helps_to_fetch_is_refused_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock_is_right = True

    def require_valid(registrant: Registrant) -> None:
        del registrant
        if not clock_is_right:
            raise Unauthenticated("the certificate of 'site-1' is not valid before tomorrow; compare the clocks")

    class WithoutCertificate(LocalTransfers):
        async def download(self, scope: str, digest: Digest, size: int, into: Partial) -> None:
            into.close()
            raise Unauthenticated("nobody is there whom it could be")

    monkeypatch.setattr(Registrant, "require_valid", require_valid)
    async with fake_server(tmp_path / "s") as server:
        server.transfers = WithoutCertificate(server.files)
        async with site(server, tmp_path / "w"):
            await server.up()
            clock_is_right = False
            with pytest.raises(Unauthenticated, match="compare the clocks"):
                await server.ask("deploy", server.announce(code_folder(tmp_path / "code"), job_spec()))
            clock_is_right = True


async def test_package_must_hold_the_job_that_was_announced(tmp_path: Path) -> None:
    async with fake_server(tmp_path / "s") as server, site(server, tmp_path / "w"):
        await server.up()
        deploy = server.announce(code_folder(tmp_path / "code"), job_spec())
        other = DeployJob(JOB, "digits", "lead", job_spec(seed=9), deploy.package, deploy.package_bytes)
        with pytest.raises(RemoteError, match="another definition of digits"):
            await server.ask("deploy", other)
        with pytest.raises(RemoteError, match="there is no deployed job"):
            await server.ask("start", server.start())


async def test_end_that_nobody_asked_for_is_reported_with_the_logs_last_lines(tmp_path: Path) -> None:
    async with fake_server(tmp_path / "s") as server, site(server, tmp_path / "w") as here:
        await server.up()
        await server.ask("deploy", server.announce(code_folder(tmp_path / "code"), job_spec()))
        await server.ask("start", server.start(attempt=2))
        here.launcher.launched[0].end(-9, "the last line")

        assert await server.next(JobEnded) == JobEnded(JOB, 2, -9, "the last line")


async def test_job_without_a_process_is_told_with_each_heartbeat_until_the_server_is_done_with_it(
    tmp_path: Path,
) -> None:
    async with fake_server(tmp_path / "s", heartbeat_s=0.05) as server, site(server, tmp_path / "w") as here:
        await server.up()
        await server.ask("deploy", server.announce(code_folder(tmp_path / "code"), job_spec()))
        await has_told(server, running=(), idle=(JOB,))
        await server.ask("start", server.start())
        await has_told(server, running=(JOB,), idle=())
        here.launcher.launched[0].end(1)
        await has_told(server, running=(), idle=(JOB,))

        server.abort = (JOB,)
        await has_told(server, running=(), idle=())

        assert [path.name for path in (here.workspace / "jobs" / JOB).iterdir()] == ["job.log"]


async def test_job_that_could_not_be_deployed_is_told_like_one_without_a_process_and_leaves_nothing(
    tmp_path: Path,
) -> None:
    async with fake_server(tmp_path / "s", heartbeat_s=0.05) as server, site(server, tmp_path / "w") as here:
        await server.up()
        with pytest.raises(RemoteError, match="a module of the job, or one installed at the site"):
            await server.ask("deploy", server.announce(code_folder(tmp_path / "code"), job_spec("absent:app")))
        with pytest.raises(RemoteError, match="there is no deployed job"):
            await server.ask("start", server.start())
        await has_told(server, running=(), idle=(JOB,))
        assert (here.workspace / "jobs" / JOB / "package").is_dir()

        server.abort = (JOB,)
        await has_told(server, running=(), idle=())

        assert list((here.workspace / "jobs").iterdir()) == []


async def has_told(server: FakeServer, *, running: tuple[JobId, ...], idle: tuple[JobId, ...]) -> None:
    """Wait for a heartbeat with these jobs."""
    while ((heartbeat := await server.next(Heartbeat)).jobs, heartbeat.idle) != (running, idle):
        continue


async def test_site_decides_how_much_of_its_log_leaves_it(tmp_path: Path) -> None:
    for lines, told in ((0, ""), (1, "the last line")):
        policy = SitePolicy(log_lines=lines)
        async with (
            fake_server(tmp_path / f"s{lines}") as server,
            site(server, tmp_path / f"w{lines}", policy=policy) as here,
        ):
            await server.up()
            await server.ask("deploy", server.announce(code_folder(tmp_path / "code"), job_spec()))
            await server.ask("start", server.start())
            assert here.launcher.launched[0].spec.policy == policy
            here.launcher.launched[0].end(-9, "a patient's name\nthe last line")

            assert (await server.next(JobEnded)).log_tail == told


@pytest.mark.parametrize(("killed_for_memory", "cause"), [(1, "out-of-memory"), (0, "")])
async def test_end_tells_whether_memory_ran_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_for_memory: int, cause: str
) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "cgroup").write_text("0::/site\n")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "memory.events").write_text("oom_kill 4\n")
    monkeypatch.setattr("hanse.client.jobs.KillCounter", partial(KillCounter, proc=tmp_path, groups=tmp_path))
    async with fake_server(tmp_path / "s") as server, site(server, tmp_path / "w") as here:
        await server.up()
        await server.ask("deploy", server.announce(code_folder(tmp_path / "code"), job_spec()))
        await server.ask("start", server.start())
        (tmp_path / "site" / "memory.events").write_text(f"oom_kill {4 + killed_for_memory}\n")
        here.launcher.launched[0].end(-9)

        assert (await server.next(JobEnded)).cause == cause


async def test_end_is_reported_until_the_server_has_heard_of_it(tmp_path: Path) -> None:
    async with fake_server(tmp_path / "s", heartbeat_s=0.05) as server, site(server, tmp_path / "w") as here:
        await server.up()
        await server.ask("deploy", server.announce(code_folder(tmp_path / "code"), job_spec()))
        await server.ask("start", server.start())
        server.refuse["job_ended"] = Unreachable("server", "its store is away")
        here.launcher.launched[0].end(1)

        assert (await server.next(JobEnded)).status == 1
        while (await server.next(Heartbeat)).jobs:
            pass  # until then the job counts as running, so that the server does not believe that it never started


async def test_end_is_told_again_once_the_agent_has_registered_anew_where_its_token_is_not_taken_any_more(
    tmp_path: Path,
) -> None:
    async with fake_server(tmp_path / "s", heartbeat_s=0.05) as server, site(server, tmp_path / "w") as here:
        await server.up()
        await server.ask("deploy", server.announce(code_folder(tmp_path / "code"), job_spec()))
        await server.ask("start", server.start())
        expired = Unauthenticated("the token has expired")
        server.refuse |= {"job_ended": expired, "heartbeat": expired}
        here.launcher.launched[0].end(-9, "the last line")

        assert await server.next(JobEnded) == JobEnded(JOB, 1, -9, "the last line")
        while (await server.next(Heartbeat)).jobs:
            pass
        assert len(server.hellos) == 2


async def test_end_that_the_server_does_not_want_to_hear_of_is_forgotten(tmp_path: Path) -> None:
    async with fake_server(tmp_path / "s", heartbeat_s=0.05) as server, site(server, tmp_path / "w") as here:
        await server.up()
        await server.ask("deploy", server.announce(code_folder(tmp_path / "code"), job_spec()))
        await server.ask("start", server.start())
        server.refuse["job_ended"] = NotFound("running job", JOB)
        here.launcher.launched[0].end(1)
        while (await server.next(Heartbeat)).jobs:
            pass

        assert server.queue(JobEnded).empty()


async def test_aborted_job_is_stopped_and_leaves_its_log(tmp_path: Path) -> None:
    async with fake_server(tmp_path / "s", heartbeat_s=0.05) as server, site(server, tmp_path / "w") as here:
        await server.up()
        await server.ask("deploy", server.announce(code_folder(tmp_path / "code"), job_spec()))
        await server.ask("start", server.start())
        server.cell.tell(Fqcn(SITE), Channel.JOB, "abort", AbortJob(JOB, "the lead wants it so"))
        while (await server.next(Heartbeat)).jobs:
            pass
        await server.ask("deploy", server.announce(code_folder(tmp_path / "code"), job_spec()))

        assert here.launcher.launched[0].is_stopped
        assert server.queue(JobEnded).empty(), "it was asked to end"
        assert JobFolder(here.workspace / "jobs" / JOB).log.read_text() == "a line"


async def test_job_whose_files_the_disk_does_not_let_go_ends_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    other = JobId("other-1")
    async with fake_server(tmp_path / "s", heartbeat_s=0.05) as server, site(server, tmp_path / "w") as here:
        await server.up()
        for job_id in (JOB, other):
            await server.ask("deploy", server.announce(code_folder(tmp_path / "code"), job_spec(), job_id=job_id))
            await server.ask("start", server.start(job_id=job_id))
        with monkeypatch.context() as disk:
            disk.setattr(Path, "unlink", refuse)
            server.cell.tell(Fqcn(SITE), Channel.JOB, "abort", AbortJob(JOB, "the lead wants it so"))
            await has_told(server, running=(other,), idle=())

        first, second = here.launcher.launched
        assert first.is_stopped
        assert not second.is_stopped


async def test_job_whose_process_takes_its_time_to_end_is_told_as_one_without(tmp_path: Path) -> None:
    async with fake_server(tmp_path / "s", heartbeat_s=0.05) as server, site(server, tmp_path / "w") as here:
        await server.up()
        await server.ask("deploy", server.announce(code_folder(tmp_path / "code"), job_spec()))
        await server.ask("start", server.start())
        await has_told(server, running=(JOB,), idle=())
        (handle,) = here.launcher.launched
        handle.may_stop.clear()
        server.cell.tell(Fqcn(SITE), Channel.JOB, "abort", AbortJob(JOB, "the lead wants it so"))
        await has_told(server, running=(), idle=(JOB,))
        assert not handle.is_stopped
        handle.may_stop.set()
        await has_told(server, running=(), idle=())

        assert handle.is_stopped


async def test_stopping_the_agent_ends_its_jobs_and_leaves_only_logs(tmp_path: Path) -> None:
    async with fake_server(tmp_path / "s") as server, site(server, tmp_path / "w") as here:
        await server.up()
        await server.ask("deploy", server.announce(code_folder(tmp_path / "code"), job_spec()))
        await server.ask("start", server.start())
        here.agent.stop()
        await within(20, here.running)

        assert here.launcher.launched[0].is_stopped
        assert [path.name for path in (here.workspace / "jobs" / JOB).iterdir()] == ["job.log"]


@pytest.mark.parametrize("doing", ["unpacking", "noting"])
async def test_job_that_is_being_deployed_or_started_again_when_the_agent_stops_leaves_only_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, doing: str
) -> None:
    loop, begun = asyncio.get_running_loop(), asyncio.Event()
    is_cleared, is_through = threading.Event(), threading.Event()
    clear = JobFolder.clear

    def clear_and_tell(folder: JobFolder) -> None:
        clear(folder)
        is_cleared.set()

    def slowly(work: Callable[..., Any], *arguments: Any) -> Any:
        """Work as a slow disk does: only when the folder has been cleared, if anybody clears it meanwhile."""
        loop.call_soon_threadsafe(begun.set)
        is_cleared.wait(0.5)
        try:
            return work(*arguments)
        finally:
            is_through.set()

    async with fake_server(tmp_path / "s", heartbeat_s=0.05) as server, site(server, tmp_path / "w") as here:
        await server.up()
        deploy = server.announce(code_folder(tmp_path / "code"), job_spec())
        await server.ask("deploy", deploy)
        await server.ask("start", server.start(attempt=1))
        if doing == "unpacking":
            server.abort = (JOB,)
            await has_told(server, running=(), idle=())
            monkeypatch.setattr(shutil, "copyfileobj", partial(slowly, shutil.copyfileobj))
            asking = asyncio.create_task(server.ask("deploy", deploy))
        else:
            note = JobFolder.note
            monkeypatch.setattr(JobFolder, "note", lambda folder, started: slowly(note, folder, started))
            asking = asyncio.create_task(server.ask("start", server.start(attempt=2)))
        await within(20, begun.wait())
        monkeypatch.setattr(JobFolder, "clear", clear_and_tell)
        here.agent.stop()
        await within(20, here.running)
        assert await asyncio.to_thread(is_through.wait, 20)

        with pytest.raises(Unreachable):
            await asking
        assert [path.name for path in (here.workspace / "jobs" / JOB).iterdir()] == ["job.log"]
        assert all(handle.is_stopped for handle in here.launcher.launched)


async def test_agent_that_is_refused_for_good_leaves_no_process(tmp_path: Path) -> None:
    async with fake_server(tmp_path / "s") as server, site(server, tmp_path / "w") as here:
        await server.up()
        await server.ask("deploy", server.announce(code_folder(tmp_path / "code"), job_spec()))
        await server.ask("start", server.start())
        here.running.cancel()
        await within(20, here.launcher.launched[0].wait())

        assert here.launcher.launched[0].is_stopped


async def test_process_goes_on_while_the_server_is_away(tmp_path: Path) -> None:
    async with fake_server(tmp_path / "s") as server, site(server, tmp_path / "w") as here:
        await server.up()
        await server.ask("deploy", server.announce(code_folder(tmp_path / "code"), job_spec()))
        await server.ask("start", server.start())
        await server.go_away(AWAY)
        await server.up()
        while (await server.next(Heartbeat)).jobs != (JOB,):
            pass

        assert not here.launcher.launched[0].is_stopped


async def test_job_whose_certificate_the_server_takes_no_more_is_ended_once_the_agent_has_registered_anew(
    tmp_path: Path,
) -> None:
    async with (
        fake_server(tmp_path / "s", heartbeat_s=0.05, job_authority="old") as server,
        site(server, tmp_path / "w") as here,
    ):
        await server.up()
        deploy = server.announce(code_folder(tmp_path / "code"), job_spec())
        await server.ask("deploy", deploy)
        await server.ask("start", server.start())
        server.job_authority, server.accept_tokens = "new", False
        _forget_heartbeats(server)
        await server.go_away(AWAY)
        await server.up()
        while (await server.next(Heartbeat)).jobs:
            pass
        await server.ask("deploy", deploy)
        await server.ask("start", server.start(attempt=2))

        first, second = here.launcher.launched
        assert first.is_stopped
        assert not second.is_stopped
        assert server.queue(JobEnded).empty(), "it was asked to end"


@pytest.mark.parametrize(("before", "after"), [("same", "same"), ("", "new"), ("old", ""), ("", "")])
async def test_job_whose_certificate_is_good_or_not_needed_goes_on_when_its_agent_registers_anew(
    tmp_path: Path, before: str, after: str
) -> None:
    async with fake_server(tmp_path / "s", job_authority=before) as server, site(server, tmp_path / "w") as here:
        await server.up()
        await server.ask("deploy", server.announce(code_folder(tmp_path / "code"), job_spec()))
        await server.ask("start", server.start())
        server.job_authority, server.accept_tokens = after, False
        _forget_heartbeats(server)
        await server.go_away(AWAY)
        await server.up()

        assert (await server.next(Heartbeat)).jobs == (JOB,)
        assert not here.launcher.launched[0].is_stopped


def _forget_heartbeats(server: FakeServer) -> None:
    while not server.queue(Heartbeat).empty():
        server.queue(Heartbeat).get_nowait()


async def test_log_is_shortened_at_each_heartbeat(tmp_path: Path) -> None:
    async with fake_server(tmp_path / "s", heartbeat_s=0.05) as server, site(server, tmp_path / "w") as here:
        await server.up()
        await server.ask("deploy", server.announce(code_folder(tmp_path / "code"), job_spec()))
        await server.ask("start", server.start())
        log = here.launcher.launched[0].log_path
        for _ in range(2):
            log_much(log)
            while is_too_long(log):
                await server.next(Heartbeat)

        assert log.read_bytes().endswith(MUCH[-TAIL_BYTES:])


async def test_log_is_shortened_at_each_try_to_reach_a_server_that_is_away(tmp_path: Path) -> None:
    tries: asyncio.Queue[str] = asyncio.Queue()

    async def dial(target: str) -> Any:
        tries.put_nowait(target)
        if is_away:
            raise AWAY
        return await server.dial(target)

    is_away = False
    async with fake_server(tmp_path / "s") as server, site(server, tmp_path / "w", dial=dial) as here:
        await server.up()
        await server.ask("deploy", server.announce(code_folder(tmp_path / "code"), job_spec()))
        await server.ask("start", server.start())
        await server.next(Heartbeat)
        is_away = True
        await server.go_away(AWAY)
        log = here.launcher.launched[0].log_path
        for _ in range(2):
            log_much(log)
            while is_too_long(log):
                await within(20, tries.get())

        assert server.queue(Heartbeat).empty()
        assert not here.launcher.launched[0].is_stopped


async def test_slow_disk_holds_up_no_heartbeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, is_through = threading.Event(), threading.Event()

    def slowly(path: Path) -> None:
        begun.set()
        is_through.wait(30)

    monkeypatch.setattr(long_logs, "shorten", slowly)
    async with fake_server(tmp_path / "s", heartbeat_s=0.05) as server, site(server, tmp_path / "w") as here:
        await server.up()
        await server.ask("deploy", server.announce(code_folder(tmp_path / "code"), job_spec()))
        await server.ask("start", server.start())
        try:
            assert await asyncio.to_thread(begun.wait, 20)
            _forget_heartbeats(server)
            for _ in range(3):
                assert (await server.next(Heartbeat)).jobs == (JOB,)
        finally:
            is_through.set()
        assert not here.launcher.launched[0].is_stopped


async def test_what_a_killed_agent_left_behind_is_cleared_away_but_for_logs(tmp_path: Path) -> None:
    left = JobFolder(tmp_path / "w" / "jobs" / "old-1")
    for folder in (left.code, left.tensors, left.package):
        folder.mkdir(parents=True)
        (folder / "file").write_text("old")
    left.log.write_text("what it said")
    async with fake_server(tmp_path / "s") as server, site(server, tmp_path / "w"):
        await server.up()

        assert [path.name for path in left.path.iterdir()] == ["job.log"]


async def test_process_that_cannot_be_started_is_told_to_the_server_and_the_agent_lives(tmp_path: Path) -> None:
    async with fake_server(tmp_path / "s") as server, site(server, tmp_path / "w") as here:
        await server.up()
        await server.ask("deploy", server.announce(code_folder(tmp_path / "code"), job_spec()))
        here.launcher.error = OSError(12, "Cannot allocate memory")
        with pytest.raises(
            RemoteError, match="the job's process at site-1 could not be started: Cannot allocate"
        ) as told:
            await server.ask("start", server.start())
        assert told.value.error_code == "not-started"
        assert told.value.retryable
        here.launcher.error = None
        await server.ask("start", server.start())

        assert len(here.launcher.launched) == 1
