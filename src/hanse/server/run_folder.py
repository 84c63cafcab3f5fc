"""Where a run keeps its things on the server: ``runs/<job>`` of the folder that all servers of a project share.

Package, code, result and log are the run's for good. Its tensors are a tenure's: each has a folder of its own, named
after its epoch, and begins by bringing over what the journal names. So a server whose tenure has ended, and that does
not know it yet, deletes nothing that its successor relies on, and what it still writes is in nobody's way.
"""

import shutil
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hanse.errors import StoreFailed
from hanse.ids import Digest
from hanse.storage.tensors import TensorFiles

_TENSORS: Final = "tensors-"
_FIRST_TENSORS: Final = "tensors"
"""Where release 0.1.0 kept a run's tensors, in all of its tenures."""


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The folder of one run, as the tenure *epoch* sees it."""

    path: Path
    epoch: int = 0

    @property
    def package(self) -> Path:
        """The job's package, under its digest."""
        return self.path / "package"

    @property
    def code(self) -> Path:
        """The job's code, unpacked."""
        return self.path / "code"

    @property
    def tensors(self) -> Path:
        """The run's tensor files in this tenure."""
        return self.path / f"{_TENSORS}{self.epoch}"

    @property
    def result(self) -> Path:
        """The final model, under its digest."""
        return self.path / "result"

    @property
    def log(self) -> Path:
        """What the run's process says."""
        return self.path / "server.log"

    def take_over(self, needed: Collection[Digest]) -> list[Digest]:
        """Bring *needed* over from earlier tenures, delete the rest of theirs, and return what is not to be had.

        Each file's bytes are checked: a disk that lost power, or lies, must not change a model unnoticed.
        """
        files = TensorFiles(self.tensors)
        earlier = self._earlier()
        for digest in needed:
            for folder in reversed(earlier):
                if not files.has(digest):
                    files.take_in(folder / digest)
        missing = [digest for digest in dict.fromkeys(needed) if not files.verify(digest)]
        files.sync(set(needed) - set(missing))
        self.delete_earlier_tensors()
        return missing

    def delete_earlier_tensors(self) -> None:
        """Delete the tensors of earlier tenures, whatever of them can be deleted."""
        for folder in self._earlier():
            shutil.rmtree(folder, ignore_errors=True)

    def delete_tensors(self) -> None:
        """Delete the tensors of this tenure and of all before it."""
        for folder in [*self._earlier(), self.tensors]:
            with suppress(FileNotFoundError):
                _delete(folder)

    def _earlier(self) -> list[Path]:
        found = []
        for folder in self.path.glob(f"{_TENSORS}*"):
            number = folder.name.removeprefix(_TENSORS)
            if number.isdigit() and int(number) < self.epoch:
                found.append((int(number), folder))
        first = self.path / _FIRST_TENSORS
        return [*([first] if first.is_dir() else []), *(folder for _, folder in sorted(found))]


def _delete(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StoreFailed(f"deleting {folder}", error.strerror or str(error)) from error
