import io
import stat
import struct
import zipfile
from pathlib import Path

import msgspec
import pytest

from hanse.errors import JobInvalid, StoreFailed
from hanse.storage import packages
from hanse.storage.packages import MAX_PACKAGE_BYTES, build_package, unpack_package

from .samples import SPEC, changed

SPEC_BYTES = msgspec.json.encode(SPEC)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "job"
    for name, content in {
        "app.py": "app = 1\n",
        "pyproject.toml": "[tool.hanse]\n",
        "data/classes.json": "[1, 2]",
        "model.safetensors": "weights",
        "nested/deeper/train.py": "train = 1\n",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


def below(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def zipped(*entries: tuple[str | zipfile.ZipInfo, bytes], spec: bytes = SPEC_BYTES) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in [*entries, ("job.json", spec)]:
            archive.writestr(name, content)
    return buffer.getvalue()


# Building -------------------------------------------------------------------------------------------------------------


def test_a_package_unpacks_to_the_job_and_its_files(folder: Path, tmp_path: Path) -> None:
    package = build_package(folder, SPEC, {"extra/more.txt": b"more"})

    assert unpack_package(package, tmp_path / "code") == SPEC
    unpacked = below(tmp_path / "code")
    assert msgspec.json.decode(unpacked.pop("job.json"), type=type(SPEC)) == SPEC
    assert unpacked == below(folder) | {"extra/more.txt": b"more"}


def test_a_package_unpacks_from_a_file(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "package.zip").write_bytes(build_package(folder, SPEC))

    assert unpack_package(tmp_path / "package.zip", tmp_path / "code") == SPEC


def test_the_same_contents_give_the_same_bytes_whenever_and_wherever(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    for name, content in reversed(below(folder).items()):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(content)
    (copy / "app.py").chmod(0o777)

    assert build_package(folder, SPEC) == build_package(copy, SPEC)
    assert build_package(folder, SPEC) != build_package(folder, changed(SPEC, seed=1))


def test_what_is_hidden_foreign_or_a_link_stays_out(folder: Path, tmp_path: Path) -> None:
    before = build_package(folder, SPEC)
    (tmp_path / "secret.py").write_text("secret")
    (folder / "link.py").symlink_to(tmp_path / "secret.py")
    (folder / "parent").symlink_to(tmp_path)
    for name in (
        ".env.py",
        ".git/config.txt",
        "__pycache__/app.py",
        "venv/lib/x.py",
        "weights.bin",
        "nested/.hidden/a.py",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("stays out")
    (folder / "venv" / "pyvenv.cfg").touch()

    assert build_package(folder, SPEC) == before


def test_extra_files_replace_the_folders(folder: Path, tmp_path: Path) -> None:
    unpack_package(build_package(folder, SPEC, {"app.py": b"other"}), tmp_path / "code")

    assert (tmp_path / "code" / "app.py").read_text() == "other"


def test_a_script_or_model_that_is_not_there_is_named(folder: Path) -> None:
    for field, missing in (("client", "main.py"), ("model", "weights.safetensors")):
        with pytest.raises(JobInvalid, match=f"{field} is '{missing}'"):
            build_package(folder, changed(SPEC, **{field: missing}))
    build_package(folder, changed(SPEC, client="nested/deeper/train.py", model="model.safetensors"))


def test_a_folder_with_too_much_in_it_names_the_largest_file(folder: Path) -> None:
    with (folder / "data.json").open("wb") as file:
        file.truncate(packages.MAX_UNPACKED_BYTES + 1)

    with pytest.raises(JobInvalid, match=r"the largest data\.json"):
        build_package(folder, SPEC)


def test_a_package_that_is_too_large_is_refused(folder: Path) -> None:
    with (folder / "model.safetensors").open("wb") as file:
        file.truncate(MAX_PACKAGE_BYTES + 1)

    with pytest.raises(JobInvalid, match=f"at most {MAX_PACKAGE_BYTES}"):
        build_package(folder, SPEC)


def test_too_many_files_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "MAX_FILES", 5)

    with pytest.raises(JobInvalid, match="6 files"):
        build_package(folder, SPEC)


def test_a_folder_that_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(StoreFailed, match=r"packing .*nowhere"):
        build_package(tmp_path / "nowhere", SPEC)


# Unpacking ------------------------------------------------------------------------------------------------------------


def test_unpacked_files_take_the_place_of_what_was_there(folder: Path, tmp_path: Path) -> None:
    into = tmp_path / "code"
    into.mkdir()
    (into / "stale.py").touch()

    unpack_package(build_package(folder, SPEC), into)

    assert not (into / "stale.py").exists()
    assert stat.S_IMODE(into.stat().st_mode) == 0o700


def link(name: str, target: bytes) -> tuple[zipfile.ZipInfo, bytes]:
    entry = zipfile.ZipInfo(name)
    entry.create_system, entry.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    return entry, target


def packed_by(method: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr("job.json", SPEC_BYTES)
    return buffer.getvalue()


def encrypted() -> bytes:
    package = bytearray(zipped())
    for signature, flags_at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        package[package.index(signature) + flags_at] |= 1
    return bytes(package)


def damaged() -> bytes:
    package = bytearray(zipped(("app.py", bytes(range(256)) * 9)))
    package[package.index(b"app.py") + 20] ^= 1
    return bytes(package)


def lying_about_its_size() -> bytes:
    package = bytearray(zipped(("a.txt", bytes(100_000))))
    real, said = (100_000).to_bytes(4, "little"), (10).to_bytes(4, "little")
    return bytes(package).replace(real, said)


def nameless() -> bytes:
    """A package of which one entry's name is a NUL, of which nothing is left when it is read."""
    return zipped(("X", b"")).replace(b"X", b"\0")


def elsewhere(offset: int) -> bytes:
    """A package that says of its first file that it begins at *offset*, as those of zips beyond 4 GiB are said."""
    package = zipped()
    end = package.rindex(b"PK\x05\x06")
    directory_bytes, at = struct.unpack("<II", package[end + 12 : end + 20])
    entry = bytearray(package[at : at + directory_bytes])
    extra = struct.pack("<HHQ", 1, 8, offset)
    entry[30:32], entry[42:46] = struct.pack("<H", len(extra)), b"\xff" * 4
    tail = bytearray(package[end:])
    tail[12:16] = struct.pack("<I", len(entry) + len(extra))
    return package[:at] + bytes(entry) + extra + bytes(tail)


BAD_PACKAGES: dict[str, bytes] = {
    "nothing": b"",
    "not a zip": b"PK but not a zip",
    "cut short": zipped(("app.py", b"x" * 1000))[:-30],
    "damaged": damaged(),
    "encrypted": encrypted(),
    "bzip2": packed_by(zipfile.ZIP_BZIP2),
    "lzma": packed_by(zipfile.ZIP_LZMA),
    "lying about its size": lying_about_its_size(),
    "parent folder": zipped(("../evil.py", b"")),
    "parent folder inside": zipped(("a/../../evil.py", b"")),
    "absolute": zipped(("/tmp/evil.py", b"")),
    "backslashes": zipped(("..\\evil.py", b"")),
    "a drive": zipped(("C:evil.py", b"")),
    "dot": zipped(("./evil.py", b"")),
    "double slash": zipped(("a//evil.py", b"")),
    "hidden": zipped((".ssh/evil.py", b"")),
    "control character": zipped(("a\n.py", b"")),
    "NUL": zipped(("aXb.py", b"")).replace(b"aXb.py", b"a\0b.py"),
    "too long": zipped(("a" * 300 + ".py", b"")),
    "no name": nameless(),
    "beyond what can be counted": elsewhere(2**64 - 1),
    "beyond what a disk has": elsewhere(2**63 - 1),
    "beyond its end": elsewhere(2**20),
    "another kind of file": zipped(("evil.so", b"")),
    "a folder": zipped(("folder/", b"")),
    "a link": zipped(link("link.py", b"/etc/passwd")),
    "through a file": zipped(("a.py", b""), ("a.py/b.py", b"")),
    "no definition": zipped().replace(b"job.json", b"jab.json"),
    "definition is not JSON": zipped(spec=b"{"),
    "definition is not UTF-8": zipped(spec=b'{"name": "\xff"}'),
    "definition is nested too deep": zipped(spec=b"[" * 100_000),
    "definition is too long": zipped(spec=b'{"name":"' + b"x" * 1_100_000),
}  # fmt: skip


@pytest.mark.parametrize("package", BAD_PACKAGES.values(), ids=BAD_PACKAGES)
def test_a_bad_package_is_refused_and_changes_nothing(tmp_path: Path, package: bytes) -> None:
    into = tmp_path / "room" / "code"
    into.mkdir(parents=True)
    (into / "app.py").write_text("as before")
    file = tmp_path / "package.zip"
    file.write_bytes(package)

    for come in (package, file):
        with pytest.raises(JobInvalid):
            unpack_package(come, into)

    file.unlink()
    assert below(tmp_path) == {"room/code/app.py": b"as before"}
    assert list(into.parent.iterdir()) == [into]


def test_a_small_package_that_unpacks_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "MAX_UNPACKED_BYTES", 1_000_000)
    bomb = zipped(("a.txt", bytes(500_000)), ("b.txt", bytes(500_000)))
    assert len(bomb) < 5000

    with pytest.raises(JobInvalid, match="at most 1000000 bytes of files"):
        unpack_package(bomb, tmp_path / "code")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(JobInvalid, match="two files"):
        unpack_package(zipped(("a.py", b"1"), ("a.py", b"2")), tmp_path / "code")


def test_too_many_files_are_refused_when_unpacking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = zipped(*((f"{n}.py", b"") for n in range(10)))
    monkeypatch.setattr(packages, "MAX_FILES", 10)

    with pytest.raises(JobInvalid, match="11 files"):
        unpack_package(package, tmp_path / "code")


def test_a_definition_that_does_not_hold_is_refused_by_field(tmp_path: Path) -> None:
    definition = msgspec.json.decode(SPEC_BYTES)
    for field, wrong in (("min_clients", 0), ("min_clients", "two"), ("seed", -1), ("name", "no.name")):
        with pytest.raises(JobInvalid) as caught:
            unpack_package(zipped(spec=msgspec.json.encode(definition | {field: wrong})), tmp_path / "code")
        assert caught.value.field == field


def test_a_definition_whose_script_is_not_in_the_package_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JobInvalid, match=r"client is 'train\.py'"):
        unpack_package(zipped(spec=msgspec.json.encode(changed(SPEC, client="train.py"))), tmp_path / "code")


def test_a_place_that_cannot_be_written_is_a_sentence(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(StoreFailed, match="unpacking a job"):
        unpack_package(build_package(folder, SPEC), tmp_path / "file" / "code")
    with pytest.raises(StoreFailed, match="unpacking a job"):
        unpack_package(tmp_path / "missing.zip", tmp_path / "code")
