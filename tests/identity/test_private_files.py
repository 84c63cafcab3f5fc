import errno
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import pytest

from hanse.errors import ConfigError
from hanse.identity.private_files import keep_or_create, make_private_folder, read_file, replace_file, require_private


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_files_and_folders_are_private_whatever_the_umask(tmp_path: Path):
    before = os.umask(0)
    try:
        folder = make_private_folder(tmp_path / "a" / "b")
        replace_file(folder / "secret", b"x")
        keep_or_create(folder / "kept", b"x")
    finally:
        os.umask(before)

    assert mode(folder) == 0o700
    assert mode(folder / "secret") == mode(folder / "kept") == 0o600


def test_a_replaced_file_has_the_new_content_and_nothing_lies_beside_it(tmp_path: Path):
    replace_file(tmp_path / "file", b"old", mode=0o644)
    replace_file(tmp_path / "file", b"new")

    assert (tmp_path / "file").read_bytes() == b"new"
    assert mode(tmp_path / "file") == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_that_cannot_be_replaced_leaves_nothing_beside_it(tmp_path: Path):
    (tmp_path / "file").mkdir()

    with pytest.raises(ConfigError, match="a file that can be written"):
        replace_file(tmp_path / "file", b"secret")

    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_is_there_is_kept(tmp_path: Path):
    assert keep_or_create(tmp_path / "file", b"first") == b"first"
    assert keep_or_create(tmp_path / "file", b"second") == b"first"


def test_the_names_of_what_is_new_are_synced(tmp_path: Path, synced: list[Path]):
    make_private_folder(tmp_path / "a" / "b")
    assert sorted(synced) == [tmp_path, tmp_path / "a"]
    keep_or_create(tmp_path / "secret", b"x")
    assert synced[-1] == tmp_path
    synced.clear()
    make_private_folder(tmp_path / "a" / "b")
    keep_or_create(tmp_path / "secret", b"x")
    assert synced == []


@pytest.mark.parametrize(("number", "is_told"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_a_file_system_that_can_sync_no_folder_is_no_trouble_and_one_that_fails_is(
    number: int, is_told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def failing(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(ConfigError, match="a file that can be written") if is_told else nullcontext():
        replace_file(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"


def test_of_many_who_create_at_once_all_get_the_same(tmp_path: Path):
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda i: keep_or_create(tmp_path / "file", b"%d" % i * 100), range(32)))

    assert len(set(results)) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("bits", [0o640, 0o620, 0o604, 0o601])
def test_a_key_file_that_anybody_else_can_use_is_refused_with_its_mode(tmp_path: Path, bits: int):
    path = tmp_path / "key.pem"
    path.write_bytes(b"")
    path.chmod(bits)

    with pytest.raises(ConfigError, match=rf"key.pem with mode {bits:04o}'; expected .*chmod 600"):
        require_private(path)
    path.chmod(0o600)
    require_private(path)


def test_what_cannot_be_read_or_written_is_named(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    inside_a_file = tmp_path / "file" / "x"

    for attempt in (
        lambda: read_file(tmp_path / "none", what="root certificate"),
        lambda: require_private(tmp_path / "none"),
        lambda: replace_file(inside_a_file, b""),
        lambda: keep_or_create(inside_a_file, b""),
        lambda: make_private_folder(inside_a_file),
        lambda: make_private_folder(tmp_path / "file"),
    ):
        with pytest.raises(ConfigError, match=str(tmp_path)):
            attempt()
