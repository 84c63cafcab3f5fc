"""How a job comes in, and that one which is refused leaves nothing."""

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hanse.errors import JobInvalid, NoSpace, StaleEpoch
from hanse.ids import Digest
from hanse.job import WorkflowSpec
from hanse.server import FederatedServer
from hanse.server.run_folder import RunFolder
from hanse.storage.tensors import TensorFiles

from .job_world import Threads, submit
from .world import args, settings, wait


@pytest.fixture
def server(deployed: Callable[..., FederatedServer], tmp_path: Path) -> FederatedServer:
    return deployed(arguments=args(tmp_path / "ws", launcher=Threads(), settings=settings()))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"workflow": WorkflowSpec("fedavg", {"rounds": 0})}, "rounds"),
        ({"workflow": WorkflowSpec("fedavg", {"turns": 1})}, "turns"),
    ],
)
def test_a_job_that_does_not_hold_is_refused_at_submission(
    server: FederatedServer, tmp_path: Path, fields: dict[str, Any], named: str
) -> None:
    with pytest.raises(JobInvalid, match=named):
        submit(server, tmp_path, **fields)
    assert wait(server.jobs.board.views()) == []
    assert list((tmp_path / "ws" / "runs").iterdir()) == []


def test_what_is_no_package_is_refused(server: FederatedServer, tmp_path: Path) -> None:
    (tmp_path / "job.zip").write_bytes(b"no zip")

    with pytest.raises(JobInvalid, match="zip"):
        wait(server.jobs.submit(tmp_path / "job.zip", submitter="ada@demo"))


def test_a_job_for_whose_package_there_is_no_space_leaves_nothing(
    server: FederatedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(files: TensorFiles, buffer: memoryview) -> None:
        del files, buffer
        raise NoSpace("taking space", disk="/disk", folder="/disk/runs", why="No space left on device")

    monkeypatch.setattr(TensorFiles, "put", no_space)
    with pytest.raises(NoSpace):
        submit(server, tmp_path)

    assert list((tmp_path / "ws" / "runs").iterdir()) == []


def test_a_job_whose_folder_does_not_get_its_name_leaves_nothing(
    server: FederatedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def no_space(path: Path, target: Path) -> Path:
        if path.name.startswith(".incoming-"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", no_space)
    with pytest.raises(NoSpace):
        submit(server, tmp_path)

    assert list((tmp_path / "ws" / "runs").iterdir()) == []


def test_a_job_whose_files_the_next_server_has_deleted_is_refused_for_its_own_reason(
    server: FederatedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def is_succeeded(folder: RunFolder, digest: Digest) -> None:
        shutil.rmtree(folder.path)
        raise StaleEpoch(ours=1, current=2)

    monkeypatch.setattr(RunFolder, "keep_package", is_succeeded)
    with pytest.raises(StaleEpoch):
        submit(server, tmp_path)
