import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest

from hanse.doctor.findings import Finding, Verdict
from hanse.doctor.machine import (
    DESCRIPTORS_PER_JOB,
    LEAST_FREE_BYTES,
    LOW_FREE_BYTES,
    OWN_DESCRIPTORS,
    FolderFacts,
    first_bytes_of,
    judge_descriptors,
    judge_disk,
    judge_listen,
    judge_listening,
    judge_runs,
    judge_store_file,
    judge_workspace,
    look_at_folder,
    reachable,
)
from hanse.errors import ConfigError, EnvironmentFault, StoreFailed, Unreachable
from hanse.settings import ServerSettings

PLACE = Path("/srv/hanse")
FOLDER = FolderFacts(PLACE, PLACE, owner=1000, user=1000)


def test_a_workspace_that_is_there_and_private_is_good(tmp_path: Path):
    (tmp_path / "ws").mkdir(mode=0o700)

    assert judge_workspace(look_at_folder(tmp_path / "ws", None)).text == str(tmp_path / "ws")
    used = judge_workspace(look_at_folder(tmp_path / "ws", 42))
    assert (used.verdict, used.text) == (Verdict.OK, f"{tmp_path / 'ws'}, used by what runs as process 42")
    assert judge_workspace(replace(FOLDER, process=0)).text == "/srv/hanse, used by what runs"


def test_a_workspace_that_is_not_there_would_be_made_and_is_not(tmp_path: Path):
    facts = look_at_folder(tmp_path / "deep" / "ws", None)

    assert facts.nearest == tmp_path
    assert judge_workspace(facts).text == f"{tmp_path / 'deep' / 'ws'} will be made"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("below", ["", "deep/ws"])
def test_a_file_in_its_place_is_no_workspace(tmp_path: Path, below: str):
    (tmp_path / "ws").write_text("")
    finding = judge_workspace(look_at_folder(tmp_path / "ws" / below, None))

    assert isinstance(finding.error, ConfigError)
    assert finding.text.endswith(f"expected a folder, and {tmp_path / 'ws'} is none")


def test_a_workspace_that_this_user_may_not_make_is_found():
    finding = judge_workspace(replace(FOLDER, nearest=Path("/srv"), is_usable=False))

    assert isinstance(finding.error, ConfigError)
    assert finding.text.endswith("expected a folder that can be written to; user 1000 may not write in /srv")


def test_a_workspace_of_another_user_is_found():
    finding = judge_workspace(replace(FOLDER, owner=1001))

    assert finding.verdict is Verdict.FAIL
    assert "it belongs to user 1001, and this is user 1000" in finding.text


def test_root_may_use_anybodys_workspace_and_should_not():
    finding = judge_workspace(replace(FOLDER, user=0))

    assert finding.verdict is Verdict.WARN
    assert "belongs to user 1000: run what uses it as that user, not as root" in finding.text


def test_a_workspace_that_others_can_look_into_is_a_warning(tmp_path: Path):
    (tmp_path / "ws").mkdir()
    (tmp_path / "ws").chmod(0o750)
    finding = judge_workspace(look_at_folder(tmp_path / "ws", None))

    assert finding.verdict is Verdict.WARN
    assert finding.text.endswith("which has mode 0750: chmod 700")


def test_the_folder_for_runs_may_be_anybodys_that_can_be_written_to(tmp_path: Path):
    assert judge_runs(look_at_folder(tmp_path)).text == str(tmp_path)
    assert judge_runs(look_at_folder(tmp_path / "runs")).text == f"{tmp_path / 'runs'} will be made"
    assert judge_runs(replace(FOLDER, owner=1001, mode=0o770)).verdict is Verdict.OK

    barred = judge_runs(replace(FOLDER, is_usable=False))
    assert barred.text == (
        "runs is '/srv/hanse'; expected a folder that can be written to; user 1000 may not write in /srv/hanse"
    )
    (tmp_path / "file").write_text("")
    assert judge_runs(look_at_folder(tmp_path / "file")).text.endswith(f"and {tmp_path / 'file'} is none")


@pytest.mark.parametrize(
    ("free", "verdict"),
    [
        (LOW_FREE_BYTES, Verdict.OK),
        (LOW_FREE_BYTES - 1, Verdict.WARN),
        (LEAST_FREE_BYTES, Verdict.WARN),
        (LEAST_FREE_BYTES - 1, Verdict.FAIL),
        (0, Verdict.FAIL),
    ],
)
def test_too_little_disk_is_a_warning_and_then_a_failure(free: int, verdict: Verdict):
    assert judge_disk(PLACE, free).verdict is verdict


def test_the_disk_is_told_in_sizes_for_people():
    assert judge_disk(PLACE, 3_200_000_000).text == "3.2 GB free where /srv/hanse is"
    full = judge_disk(PLACE, 12_000_000)
    assert isinstance(full.error, EnvironmentFault)
    assert full.text == ("12.0 MB free where /srv/hanse is, less than 250.0 MB; make room, or move the workspace")
    assert judge_disk(PLACE, 512).text.startswith("512 bytes free")


def test_a_server_that_may_open_too_few_files_for_its_clients_is_found():
    settings = ServerSettings(project="demo", min_num_clients=10, max_num_clients=100, max_running_jobs=2)
    each = 1 + 2 * DESCRIPTORS_PER_JOB
    least, most = OWN_DESCRIPTORS + 10 * each, OWN_DESCRIPTORS + 100 * each

    assert judge_descriptors(most, settings).verdict is Verdict.OK
    warned = judge_descriptors(most - 1, settings)
    assert (warned.verdict, f"may need {most}" in warned.text) == (Verdict.WARN, True)
    assert judge_descriptors(least, settings).verdict is Verdict.WARN
    failed = judge_descriptors(least - 1, settings)
    assert isinstance(failed.error, EnvironmentFault)
    assert failed.text.endswith(f"raise the limit (ulimit -n, LimitNOFILE) to {most}")


def store_at(path: Path) -> Finding:
    return judge_store_file(path, first_bytes_of(path), look_at_folder(path.parent))


def test_a_store_is_a_database_or_is_not_there_yet(tmp_path: Path):
    path = tmp_path / "store.db"

    assert store_at(path).text == f"{path} will be made"
    path.write_bytes(b"SQLite format 3\0and more")
    assert store_at(path).verdict is Verdict.OK
    path.write_bytes(b"something else")
    finding = store_at(path)
    assert isinstance(finding.error, StoreFailed)
    path.unlink()
    path.mkdir()
    finding = store_at(path)
    assert finding.text == f"the store failed while opening {path}: Is a directory"
    path.rmdir()
    path.write_bytes(b"")  # what a server leaves that was killed when it had just made the file
    assert store_at(path).verdict is Verdict.OK


def test_a_store_that_can_never_be_made_is_found(tmp_path: Path):
    (tmp_path / "nowhere").symlink_to("/no/such/folder")
    path = tmp_path / "nowhere" / "store.db"

    finding = store_at(path)
    assert isinstance(finding.error, StoreFailed)
    assert finding.text == f"the store failed while opening {path}: {tmp_path / 'nowhere'} is no folder"
    barred = judge_store_file(path, FileNotFoundError(), replace(FOLDER, is_usable=False))
    assert barred.text == f"the store failed while opening {path}: user 1000 may not write in /srv/hanse"


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EADDRINUSE, "an address that is free on this machine; another program listens there"),
        (errno.EADDRNOTAVAIL, "an address that is one of this machine's"),
        (errno.EACCES, "an address that this user may listen on; take a port above 1023"),
        (errno.EIO, f"an address that can be listened on ({os.strerror(errno.EIO)})"),
    ],
)
def test_an_address_that_cannot_be_listened_on_says_why(number: int, words: str):
    finding = judge_listen("127.0.0.1:6007", OSError(number, os.strerror(number)))

    assert isinstance(finding.error, ConfigError)
    assert finding.text == f"target is '127.0.0.1:6007'; expected {words}"


def test_a_running_server_that_does_not_answer_is_found():
    finding = judge_listening("127.0.0.1:6007", 42, None, b"certificate")

    assert isinstance(finding.error, Unreachable)
    assert "the server runs as process 42 and does not answer there" in finding.text


def test_a_running_server_with_an_older_certificate_should_be_restarted():
    assert judge_listening("127.0.0.1:6007", 42, b"older", b"newer").verdict is Verdict.WARN
    assert (
        judge_listening("127.0.0.1:6007", 0, b"newer", b"newer").text == "the server runs and answers at 127.0.0.1:6007"
    )
    assert judge_listening("127.0.0.1:6007", 42, b"", None).verdict is Verdict.OK


@pytest.mark.parametrize(
    ("host", "dialled"),
    [("0.0.0.0", "127.0.0.1"), ("[::]", "::1"), ("10.0.0.7", "10.0.0.7"), ("localhost", "localhost")],
)
def test_a_server_that_listens_everywhere_is_dialled_by_loopback(host: str, dialled: str):
    assert reachable(host) == dialled
