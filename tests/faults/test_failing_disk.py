"""A disk that cannot write what it has taken, or cannot read it: a real file system on a device that fails.

The device is a file that claims to be larger than the disk that it lies on, as a thinly provisioned volume does. When
that disk is full, the system cannot write out what it has in memory; when the file loses its end, what lay there cannot
be read.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hanse.errors import NoSpace
from hanse.storage.tensors import TensorFiles
from tests.faults.requirements import missing
from tests.faults.small_disk import SmallDisk, small_disk

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

REAL_MEGABYTES = 24
CLAIMED_BYTES = 64 * 2**20
TENSOR = os.urandom(5 * 2**20)

VERIFY = """
import sys
from pathlib import Path
from hanse.errors import StoreFailed
from hanse.storage.tensors import TensorFiles
try:
    TensorFiles(Path(sys.argv[1])).verify(sys.argv[2])
except StoreFailed as failed:
    print(failed.reason)
"""


class ThinDisk:
    """A disk mounted at *folder*, whose blocks lie in the file *image* of the disk *below*."""

    def __init__(self, folder: Path, image: Path, below: SmallDisk) -> None:
        self.folder, self.image, self.below = folder, image, below

    def mount(self) -> None:
        """Mount it, with nothing in memory of what it holds."""
        self.folder.mkdir(exist_ok=True)
        done = subprocess.run(
            ["mount", "-o", "loop", str(self.image), str(self.folder)], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            missing("loop", f"mounting a file needs root, and a loop device: {done.stderr.strip()}")

    def unmount(self) -> None:
        """Write out what is in memory, as far as that can be, and forget it."""
        subprocess.run(["umount", str(self.folder)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[ThinDisk]:
    with small_disk(tmp_path / "below", megabytes=REAL_MEGABYTES) as below:
        image = tmp_path / "below" / "image"
        image.touch()
        os.truncate(image, CLAIMED_BYTES)
        try:
            subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
        except FileNotFoundError:
            missing("loop", "there is no 'mkfs.ext4'")
        made = ThinDisk(tmp_path / "disk", image, below)
        made.mount()
        try:
            yield made
        finally:
            made.unmount()


def test_tensor_that_was_synced_in_the_end_is_on_the_disk(disk: ThinDisk) -> None:
    files = TensorFiles(disk.folder / "tensors")
    os.sync()
    disk.below.fill()
    digest = files.put(TENSOR)
    with pytest.raises(NoSpace):
        files.sync([digest])
    disk.below.give_back()
    files.sync([digest])

    disk.unmount()
    disk.mount()

    assert TensorFiles(disk.folder / "tensors").verify(digest)


def test_tensor_that_cannot_be_read_is_a_sentence_and_no_death(disk: ThinDisk) -> None:
    files = TensorFiles(disk.folder / "tensors")
    digest = files.put(TENSOR)
    files.sync([digest])
    disk.unmount()
    disk.mount()
    os.truncate(disk.image, disk.image.read_bytes().index(TENSOR[-4096:]))

    process = subprocess.run(
        [sys.executable, "-c", VERIFY, files.root, digest], capture_output=True, text=True, check=True
    )

    assert process.stdout.startswith(f"the store failed while reading tensor {digest}: Input/output error")
