"""Files and folders that only their owner may read, written whole or not at all.

A file gets its mode when it is made, never afterwards, so there is no moment in which others can open it; and its
content comes under a temporary name first, so a crash leaves the old file or none, never half a key. What is made here
is synced with its name: who hands out kits must not lose to a power failure the authority that made them.
"""

import errno
import os
import secrets
from pathlib import Path
from typing import Final

from hanse.errors import ConfigError

PRIVATE_FILE: Final = 0o600
PRIVATE_FOLDER: Final = 0o700
PUBLIC_FILE: Final = 0o644
_OTHERS: Final = 0o077


def make_private_folder(folder: Path) -> Path:
    """Make *folder*, and its parents, where they do not exist yet; *folder* itself with mode 0700.

    Raises:
        ConfigError: it cannot be made, or is not a folder.
    """
    try:
        new = [each for each in (folder, *folder.parents) if not each.exists()]
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=PRIVATE_FOLDER, exist_ok=True)
        for each in new:
            sync_names_in(each.parent)
    except OSError as error:
        raise ConfigError("folder", got=str(folder), expected=f"a folder that can be made ({_why(error)})") from error
    return folder


def replace_file(path: Path, data: bytes, *, mode: int = PRIVATE_FILE) -> None:
    """Write *data* to *path* in one step, in place of what may be there.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        temporary = _write_beside(path, data, mode)
        try:
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        sync_names_in(path.parent)
    except OSError as error:
        raise _not_writable(path, error) from error


def keep_or_create(path: Path, data: bytes) -> bytes:
    """Return what the private file at *path* holds; where there is none, make it with *data*.

    Of several processes that do this at once, one makes the file and all return what it wrote.

    Raises:
        ConfigError: the file cannot be written or read, or others can read it.
    """
    if not path.exists():
        make_private_folder(path.parent)
        try:
            temporary = _write_beside(path, data, PRIVATE_FILE)
        except OSError as error:
            raise _not_writable(path, error) from error
        try:
            path.hardlink_to(temporary)
            sync_names_in(path.parent)
        except FileExistsError:
            pass  # another process was first, and its content is the one that counts
        except OSError as error:
            raise _not_writable(path, error) from error
        finally:
            temporary.unlink()
    require_private(path)
    return read_file(path)


def sync_names_in(folder: Path) -> None:
    """Return when the names in *folder* outlive a power failure, as far as its file system can have them do so."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def read_file(path: Path, *, what: str = "file") -> bytes:
    """Return the bytes of the file at *path*; *what* names it in the error.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(what, got=str(path), expected=f"a readable file ({_why(error)})") from error


def require_private(path: Path, *, what: str = "key file") -> None:
    """Return if nobody but its owner can use the file at *path*.

    Raises:
        ConfigError: others can, or there is no such file.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise ConfigError(what, got=str(path), expected=f"a readable file ({_why(error)})") from error
    if mode & _OTHERS:
        raise ConfigError(
            what,
            got=f"{path} with mode {mode & 0o777:04o}",
            expected="a file that only its owner can read: chmod 600, and make a new one if others have had access",
        )


def _write_beside(path: Path, data: bytes, mode: int) -> Path:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with open(descriptor, "wb") as file:  # noqa: PTH123 - a descriptor, not a path
            file.write(data)
            file.flush()
            os.fsync(descriptor)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def _not_writable(path: Path, error: OSError) -> ConfigError:
    return ConfigError("file", got=str(path), expected=f"a file that can be written ({_why(error)})")


def _why(error: OSError) -> str:
    return error.strerror or type(error).__name__
