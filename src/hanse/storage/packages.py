"""A job's package: one zip of the job's definition and its folder's files, the same bytes for the same contents.

``job.json`` holds the ``JobSpec``; beside it lie the folder's Python, TOML, JSON, text and safetensors files. Hidden
files, caches, virtual environments and symbolic links stay out. A package comes from another machine, so unpacking
believes nothing that it says of itself: not its paths, not its sizes, not its number of files.
"""

import io
import os
import secrets
import shutil
import stat
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

import msgspec

from hanse.errors import JobInvalid, StoreFailed
from hanse.job import JobSpec
from hanse.storage.disk import disk_failure

SPEC_FILE: Final = "job.json"
SUFFIXES: Final = (".py", ".toml", ".json", ".txt", ".md", ".safetensors")
MAX_PACKAGE_BYTES: Final = 64 * 1024 * 1024
MAX_UNPACKED_BYTES: Final = 256 * 1024 * 1024
MAX_SPEC_BYTES: Final = 1024 * 1024
MAX_FILES: Final = 10_000
MAX_PATH_BYTES: Final = 200

_FOREIGN_FOLDERS: Final = frozenset({"__pycache__", "node_modules", "site-packages"})
_VENV_MARK: Final = "pyvenv.cfg"
_BEGINNING_OF_TIME: Final = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip can name
_COPY_BYTES: Final = 1024 * 1024


def build_package(folder: Path, spec: JobSpec, extra: Mapping[str, bytes] | None = None) -> bytes:
    """Return the package of the job *spec* with *folder*'s files; *extra* adds or replaces files, by their path.

    Raises:
        JobInvalid: a file that the job names is missing, files are too many or too large, or a path cannot be
        unpacked everywhere.
        StoreFailed: a file cannot be read.
    """
    try:
        sources: dict[str, Path | bytes] = {path.relative_to(folder).as_posix(): path for path in _files_below(folder)}
        sources |= extra or {}
        sources[SPEC_FILE] = msgspec.json.format(msgspec.json.encode(spec), indent=2)
        _check_paths(sources)
        _check_files_of(spec, sources)
        _check_sizes({name: _size(source) for name, source in sources.items()})
        package = _zipped(sources)
    except OSError as error:
        raise StoreFailed(f"packing {folder}", error.strerror or str(error)) from error
    _check_package_size(len(package))
    return package


def unpack_package(package: bytes | Path, into: Path) -> JobSpec:
    """Return the job that *package* (its bytes, or its file) defines, its files now in the folder *into*.

    The folder appears when all is in it, in place of one that was there.

    Raises:
        JobInvalid: it is not a package, or not one that may be unpacked; nothing has changed.
        StoreFailed: the disk did not take it.
    """
    draft = into.with_name(f".{into.name}.{secrets.token_hex(8)}.tmp")
    try:
        size = len(package) if isinstance(package, bytes) else package.stat().st_size
        _check_package_size(size)
        with zipfile.ZipFile(io.BytesIO(package) if isinstance(package, bytes) else package) as archive:
            _check_paths(entry.filename for entry in archive.infolist())
            entries = {entry.filename: _checked_entry(entry, size) for entry in archive.infolist()}
            if len(entries) != len(archive.infolist()):
                raise JobInvalid("package", got="two files of one name", expected="one")
            _check_sizes({name: entry.file_size for name, entry in entries.items()})
            spec = _read_spec(archive, entries)
            _check_files_of(spec, entries)
            draft.mkdir(mode=0o700, parents=True)
            for entry in entries.values():
                _extract(archive, entry, draft)
        if into.exists():
            shutil.rmtree(into)
        draft.rename(into)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError) as error:
        # Not a zip, damaged, encrypted, or in a way of packing that is unknown here.
        raise JobInvalid("package", got=str(error), expected="an undamaged zip file") from error
    except OSError as error:
        raise disk_failure(f"unpacking a job into {into}", error, into.parent) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return spec


def comes_with(code: Path, module: str) -> bool:
    """Return whether *module*, by its top-level name, is among the files of a job in the folder *code*."""
    top = code / module.partition(".")[0]
    return top.is_dir() or top.with_suffix(".py").is_file()


def _files_below(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.is_symlink():
            continue
        if path.is_dir():
            if path.name not in _FOREIGN_FOLDERS and not (path / _VENV_MARK).exists():
                yield from _files_below(path)
        elif path.suffix in SUFFIXES and path.is_file():
            yield path


def _zipped(sources: Mapping[str, Path | bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in sorted(sources):
            source = sources[name]
            entry = zipfile.ZipInfo(name, _BEGINNING_OF_TIME)
            entry.create_system = 3  # Unix, wherever this runs
            entry.external_attr = (stat.S_IFREG | 0o644) << 16
            # Weights do not get smaller, only slower.
            entry.compress_type = zipfile.ZIP_STORED if name.endswith(".safetensors") else zipfile.ZIP_DEFLATED
            archive.writestr(entry, source if isinstance(source, bytes) else source.read_bytes())
    return buffer.getvalue()


def _size(source: Path | bytes) -> int:
    return len(source) if isinstance(source, bytes) else source.stat().st_size


def _check_package_size(size: int) -> None:
    if size > MAX_PACKAGE_BYTES:
        raise JobInvalid("package", got=f"{size} bytes", expected=f"at most {MAX_PACKAGE_BYTES}")


def _check_sizes(sizes: Mapping[str, int]) -> None:
    total = sum(sizes.values())
    if total > MAX_UNPACKED_BYTES:
        largest = max(sizes, key=lambda name: sizes[name])
        got = f"{total} bytes of files, the largest {largest} with {sizes[largest]}"
        raise JobInvalid("package", got=got, expected=f"at most {MAX_UNPACKED_BYTES} bytes of files")


def _check_paths(names: Iterable[str]) -> None:
    """Raise unless *names* are few enough, and each is a plain path that can exist beside the others."""
    whole = set(names)
    if len(whole) > MAX_FILES:
        raise JobInvalid("package", got=f"{len(whole)} files", expected=f"at most {MAX_FILES}")
    for name in whole:
        parts = name.split("/")
        if not all(_is_plain(part) for part in parts) or len(name.encode()) > MAX_PATH_BYTES:
            raise JobInvalid("package", got=name, expected="relative paths of visible files, '/' between their parts")
        if not name.endswith(SUFFIXES):
            raise JobInvalid("package", got=name, expected=f"files that end in {', '.join(SUFFIXES)}")
        if any("/".join(parts[:depth]) in whole for depth in range(1, len(parts))):
            raise JobInvalid("package", got=name, expected="a path that does not lead through a file")


def _is_plain(part: str) -> bool:
    return bool(part) and not part.startswith(".") and part.isprintable() and not set(part) & set("\\:")


def _check_files_of(spec: JobSpec, names: Iterable[str]) -> None:
    whole = set(names)
    if spec.is_script and spec.client not in whole:
        raise JobInvalid("client", got=spec.client, expected="a script that is in the job's folder")
    if spec.model.endswith(".safetensors") and spec.model not in whole:
        raise JobInvalid("model", got=spec.model, expected="a file that is in the job's folder")


def _checked_entry(entry: zipfile.ZipInfo, package_bytes: int) -> zipfile.ZipInfo:
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if kind not in (0, stat.S_IFREG) or entry.is_dir():
        raise JobInvalid("package", got=entry.filename, expected="plain files only, no links or folders")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise JobInvalid("package", got=entry.filename, expected="files that are stored or deflated")
    if entry.orig_filename != entry.filename:
        raise JobInvalid("package", got=entry.orig_filename, expected="a path without a NUL in it")
    if not 0 <= entry.header_offset < package_bytes:  # which may be beyond what can be looked for at all
        raise JobInvalid("package", got=f"{entry.filename} at {entry.header_offset}", expected="files that lie in it")
    return entry


def _read_spec(archive: zipfile.ZipFile, entries: Mapping[str, zipfile.ZipInfo]) -> JobSpec:
    if SPEC_FILE not in entries:
        raise JobInvalid("package", got="no job.json in it", expected="one, with the job's definition")
    with archive.open(entries[SPEC_FILE]) as file:
        text = file.read(MAX_SPEC_BYTES + 1)
    if len(text) > MAX_SPEC_BYTES:
        raise JobInvalid("package", got="a longer job.json", expected=f"at most {MAX_SPEC_BYTES} bytes of it")
    try:
        return msgspec.json.decode(text, type=JobSpec)
    except msgspec.ValidationError as error:
        what, _, field = str(error).partition(" - at `$.")
        raise JobInvalid(field.rstrip("`") or "definition", got="not that", expected=what) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise JobInvalid("package", got=f"a job.json with this wrong: {error}", expected="JSON") from error


def _extract(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, folder: Path) -> None:
    """Write *entry* below *folder*; ``zipfile`` gives no more bytes than the entry says, and fails if they differ."""
    target = folder / entry.filename
    target.parent.mkdir(parents=True, exist_ok=True)
    with archive.open(entry) as source, target.open("xb") as file:
        shutil.copyfileobj(source, file, _COPY_BYTES)
        os.fchmod(file.fileno(), 0o600)
