import asyncio
import contextlib
import io
import os
import signal
import stat
import sys
from pathlib import Path

import psutil
import pytest

from hanse.errors import ProtocolError
from hanse.launch.memory import MADE_LIKELIER, MOST_LIKELY
from hanse.launch.process import MAX_LOG_BYTES, MAX_SPEC_BYTES, ProcessLauncher, RunningProcess, read_spec

HERE = Path(__file__).parent
LAUNCHER = ProcessLauncher()


async def launch(spec: str | bytes, log: Path, **env: str) -> RunningProcess:
    data = spec.encode() if isinstance(spec, str) else spec
    paths = {"PYTHONPATH": str(HERE)}
    return await LAUNCHER.launch("children", spec=data, log_path=log, env={**paths, **env}, name="child")


async def launch_until_ready(spec: str, log: Path) -> RunningProcess:
    """Launch, and return when the child has said that it is ready."""
    ready = log.with_suffix(".ready")
    os.mkfifo(ready)
    process = await launch(spec, log, READY=str(ready))
    await asyncio.to_thread(ready.read_text)
    return process


async def gone(pid: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        await asyncio.to_thread(psutil.Process(pid).wait, timeout=30)


async def test_status_of_a_process_is_what_it_exits_with(tmp_path: Path) -> None:
    process = await launch("exit 3", tmp_path / "log")

    assert await process.wait() == 3
    assert await process.wait() == 3, "waiting again gives the same"
    assert await process.stop() == 3, "stopping what has ended is fine"


async def test_output_and_errors_go_to_a_log_that_its_owner_alone_can_read(tmp_path: Path) -> None:
    log = tmp_path / "jobs" / "log.txt"
    process = await launch("print a b c", log)
    await process.wait()

    assert process.log_tail() == "a\nb\nc"
    assert process.log_tail(lines=1) == "c"
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    assert stat.S_IMODE(log.parent.stat().st_mode) == 0o700


async def test_log_is_kept_across_attempts_but_the_tail_shows_only_ones_own(tmp_path: Path) -> None:
    first = await launch("print first", tmp_path / "log")
    await first.wait()
    second = await launch("print second", tmp_path / "log")
    await second.wait()

    assert (tmp_path / "log").read_text() == "first\nsecond\n"
    assert second.log_tail() == "second"


async def test_log_beyond_the_limit_is_set_aside_in_place_of_an_older_one(tmp_path: Path) -> None:
    log, aside = tmp_path / "log", tmp_path / "log.1"
    aside.write_text("older\n")
    log.write_text("old\n")
    os.truncate(log, MAX_LOG_BYTES + 1)
    process = await launch("print new", log)
    await process.wait()

    assert log.read_text() == "new\n"
    assert process.log_tail() == "new"
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    assert aside.stat().st_size == MAX_LOG_BYTES + 1


async def test_log_of_just_the_limit_is_appended_to(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.touch()
    os.truncate(log, MAX_LOG_BYTES)
    process = await launch("print new", log)
    await process.wait()

    assert process.log_tail() == "new"
    assert log.stat().st_size == MAX_LOG_BYTES + len("new\n")
    assert not (tmp_path / "log.1").exists()


async def test_log_tail_of_a_removed_log_says_so(tmp_path: Path) -> None:
    process = await launch("print a", tmp_path / "log")
    await process.wait()
    (tmp_path / "log").unlink()

    assert "cannot be read" in process.log_tail()


async def test_environment_comes_on_top_and_the_working_directory_is_no_place_to_import_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("INHERITED", "yes")
    process = await launch("environment EXTRA", tmp_path / "log", EXTRA="there")
    await process.wait()

    assert process.log_tail() == f"there {HERE}"


async def test_what_is_withheld_is_not_inherited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "sesame")
    log, env = tmp_path / "log", {"PYTHONPATH": str(HERE)}
    launcher = ProcessLauncher(withheld={"SECRET", "NOT_THERE"})
    process = await launcher.launch("children", spec=b"environment SECRET", log_path=log, env=env, name="child")
    await process.wait()

    assert process.log_tail() == f"None {HERE}"


async def test_sets_have_the_same_order_in_every_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = " ".join(f"site-{number}" for number in range(50))
    orders = set()
    for seed in ("1", "2", "random"):
        monkeypatch.setenv("PYTHONHASHSEED", seed)
        process = await launch(f"set {names}", tmp_path / "log")
        await process.wait()
        orders.add(process.log_tail())

    (order,) = orders
    assert sorted(order.split()) == sorted(names.split())


async def test_process_leads_a_session_of_its_own(tmp_path: Path) -> None:
    process = await launch("group", tmp_path / "log")
    await process.wait()

    assert process.log_tail() == "True True"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has such a score")
async def test_process_is_killed_rather_than_its_parent_when_memory_runs_out(tmp_path: Path) -> None:
    process = await launch_until_ready("polite", tmp_path / "log")
    ours, its = score_of(os.getpid()), score_of(process.pid)
    await process.stop()
    assert its == min(ours + MADE_LIKELIER, MOST_LIKELY)


def score_of(pid: int) -> int:
    return int(Path("/proc", str(pid), "oom_score_adj").read_text())


async def test_large_specification_arrives_whole(tmp_path: Path) -> None:
    process = await launch(b"x" * 1_000_000, tmp_path / "log")
    await process.wait()

    assert process.log_tail() == "got 1000000 bytes"


async def test_child_that_dies_before_it_reads_is_told_by_its_status(tmp_path: Path) -> None:
    process = await LAUNCHER.launch(
        "no_such_module", spec=b"x" * 1_000_000, log_path=tmp_path / "log", env={}, name="child"
    )

    assert await process.wait() == 1
    assert "No module named no_such_module" in process.log_tail()


async def test_specification_above_the_limit_starts_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at most"):
        await launch(bytes(MAX_SPEC_BYTES + 1), tmp_path / "log")

    assert not (tmp_path / "log").exists()


async def test_interpreter_that_does_not_exist_is_an_error_and_leaks_no_pipe(tmp_path: Path) -> None:
    before = psutil.Process().num_fds()
    with pytest.raises(FileNotFoundError):
        await ProcessLauncher("/no/such/python").launch("m", spec=b"", log_path=tmp_path / "log", env={}, name="child")

    assert psutil.Process().num_fds() <= before + 1, "the log and both ends of the pipe are closed"


async def test_stop_lets_a_polite_process_choose_its_status(tmp_path: Path) -> None:
    process = await launch_until_ready("polite", tmp_path / "log")

    assert await process.stop(grace_s=30) == 7


async def test_stop_kills_a_process_that_does_not_listen(tmp_path: Path) -> None:
    process = await launch_until_ready("stubborn", tmp_path / "log")

    assert await process.stop(grace_s=0.05) == -signal.SIGKILL


async def test_cancelling_stop_kills_at_once(tmp_path: Path) -> None:
    process = await launch_until_ready("stubborn", tmp_path / "log")
    stopping = asyncio.ensure_future(process.stop(grace_s=3600))
    await asyncio.sleep(0)
    stopping.cancel()

    assert await process.wait() == -signal.SIGKILL
    with pytest.raises(asyncio.CancelledError):
        await stopping


async def test_what_a_process_leaves_behind_is_killed_and_does_not_delay_the_wait(tmp_path: Path) -> None:
    process = await launch("with-grandchild", tmp_path / "log")
    assert await process.wait() == 0

    await gone(int(process.log_tail().split()[-1]))


async def test_child_sees_its_life_line_end_when_the_parent_is_killed(tmp_path: Path) -> None:
    log, ready = tmp_path / "log", tmp_path / "ready"
    os.mkfifo(ready)
    program = f"""
import asyncio, pathlib, signal, os
from hanse.launch.process import ProcessLauncher
async def main():
    env = {{"PYTHONPATH": {str(HERE)!r}, "READY": {str(ready)!r}}}
    log = pathlib.Path({str(log)!r})
    child = await ProcessLauncher().launch("children", spec=b"until-eof", log_path=log, env=env, name="child")
    pathlib.Path({str(ready)!r}).read_text()
    print(child.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main())
"""
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE)
    output, _ = await parent.communicate()
    await gone(int(output))

    assert log.read_text() == "reading\nlife line ended\n"


async def test_cancelled_launch_leaves_no_process(tmp_path: Path) -> None:
    # The child never reads, so that handing over a specification larger than the pipe's buffer does not return.
    ready = tmp_path / "ready"
    os.mkfifo(ready)
    (tmp_path / "deaf.py").write_text(
        f"import pathlib, threading\npathlib.Path({str(ready)!r}).write_text('deaf')\nthreading.Event().wait()\n"
    )
    env = {"PYTHONPATH": str(tmp_path)}
    launching = asyncio.ensure_future(
        LAUNCHER.launch("deaf", spec=b"x" * 1_000_000, log_path=tmp_path / "log", env=env, name="deaf")
    )
    await asyncio.to_thread(ready.read_text)
    launching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await launching

    assert not [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize(
    "data", [b"", b"\x00\x00", b"\x00\x00\x00\x05four", (MAX_SPEC_BYTES + 1).to_bytes(4, "big")], ids=repr
)
def test_specification_that_is_cut_or_too_long_is_a_protocol_error(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        read_spec(io.BytesIO(data))


def test_specification_is_read_up_to_its_end_and_no_further() -> None:
    stream = io.BytesIO((3).to_bytes(4, "big") + b"abcd")

    assert read_spec(stream) == b"abc"
    assert stream.read() == b"d"
