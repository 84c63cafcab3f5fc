"""Objects: files under keys, in a place that outlives the machine, such as a bucket that several servers share.

``Objects`` is what is asked of such a place, whatever it is; ``objects_at`` opens the one that a URL names. Its driver
is an extra and is imported only then.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Final, Protocol

from hanse.errors import ConfigError
from hanse.storage.tensors import Partial

MAX_COPY_BYTES: Final = 5 * 2**30
"""What S3 copies by itself in one request; a larger object has to be put anew."""


class Objects(Protocol):
    """Objects in one place; a key is such as ``job/result/digest``. An object is there whole, or not at all.

    What may succeed later, because the place is away or refuses, raises ``StoreFailed``.
    """

    @property
    def url(self) -> str:
        """What errors call the place; it holds no secret."""
        ...

    async def put(self, key: str, path: Path) -> None:
        """Return when the object *key* is what the file at *path* holds.

        Raises:
            NotFound: there is no such file.
        """
        ...

    async def fetch(self, key: str, into: Partial) -> None:
        """Read the object *key* into *into*, from its offset on, and finish it; on failure what came is kept.

        Raises:
            NotFound: there is no such object.
            ProtocolError: it is not what *into* is to become; that is deleted.
        """
        ...

    async def copy(self, source: str, key: str) -> None:
        """Return when the object *key* is what *source*, of at most ``MAX_COPY_BYTES``, is.

        Raises:
            NotFound: there is no object *source*.
        """
        ...

    async def delete(self, keys: Collection[str]) -> None:
        """Return when the objects *keys* are gone; those that are not there are gone already."""
        ...

    async def reach(self) -> None:
        """Return when the place has answered; nothing changes there."""
        ...

    async def sizes(self, folder: str = "") -> dict[str, int]:
        """Return the objects whose keys begin with *folder* and a slash, or all of them, each with its bytes."""
        ...


def objects_at(url: str) -> Objects:
    """Return the objects in the bucket at *url*: ``s3://bucket/prefix``. Nothing is asked of it yet.

    Raises:
        ConfigError: its driver is not installed, or the environment says of it what cannot be.
    """
    try:
        from hanse.storage.bucket import Bucket  # noqa: PLC0415 - its driver is an extra
    except ImportError as missing:
        raise ConfigError(
            "runs", got=url, expected="the driver of buckets to be installed (pip install 'hanse[s3]')"
        ) from missing
    return Bucket.at(url)
