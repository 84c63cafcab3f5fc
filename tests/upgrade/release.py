"""The release before this one, unpacked: how to run it."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

HERE = Path(__file__).parent
WHEEL = HERE / "hanse-0.1.0-py3-none-any.whl"
OLD = "0.1.0"


class Release:
    """A release of Hanse unpacked in *folder*."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def environment(self) -> dict[str, str]:
        """The variables with which a process, and those that it starts, run this release."""
        return {"PYTHONPATH": str(self.folder)}

    def python(self, *arguments: str, given: str = "") -> str:
        """Return what ``python ARGUMENTS`` prints, with this release installed and *given* as its input."""
        # -P: the present folder is this release's.
        command = [sys.executable, "-P", *arguments]
        environment = {**os.environ, **self.environment}
        done = subprocess.run(command, env=environment, input=given, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout


def unpacked(folder: Path) -> Release:
    """Return release 0.1.0, unpacked in *folder*."""
    with zipfile.ZipFile(WHEEL) as wheel:
        wheel.extractall(folder)
    return Release(folder)
