"""A bucket of S3, or of what speaks its protocol, through obstore.

Region, endpoint and credentials come from the environment, in the variables that S3's other clients read (``AWS_…``),
or from the machine's role: settings hold nothing secret. Files go out and come in by parts, a few at once, so that
memory does not grow with them. obstore tries a request again a few times, for seconds; whoever wanted it then hears
``StoreFailed``, and may ask again for as long as it likes.
"""

import asyncio
import os
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Final, Self
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import BaseError
from obstore.store import LocalStore, MemoryStore, S3Store

from hanse.errors import ConfigError, NotFound, ProtocolError, StoreFailed
from hanse.storage.disk import disk_failure
from hanse.storage.tensors import Partial

PART_BYTES: Final = 8 * 1024 * 1024
MAX_PARTS: Final = 10_000
"""In how many parts S3 takes an object."""
PARTS_AT_ONCE: Final = 2
"""Of one file."""
LARGE_AT_ONCE: Final = 4
"""Files: with their parts they take 64 MiB of memory."""
SMALL_BYTES: Final = 1024 * 1024
SMALL_AT_ONCE: Final = 32
"""Of small files, and of requests that move nothing through this machine: what these take is time, not memory."""
CONNECT_WITHIN_S: Final = 5.0
PART_WITHIN_S: Final = 60.0
"""A request that takes longer has failed."""
MAX_RETRIES: Final = 4
RETRY_FOR_S: Final = 10.0
"""After this long a request that fails is not tried again here."""
ENDPOINTS: Final = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
METADATA_SERVICE: Final = "169.254.169.254"
"""Who is asked for a machine's role where the environment has no credentials."""
NO_BUCKET: Final = "NoSuchBucket"

_CODE: Final = re.compile(r"<Code>(\w+)</Code>|\(code: (\w+)\)")
_STATUS: Final = re.compile(r"status code: (\d{3}[A-Za-z ]*)")
_NO_MORE: Final = re.compile(r"status code: 416|Requested range was invalid")
"""How S3, and a folder, say that an object ends before what is asked for begins."""
_SYSTEM: Final = re.compile(r'(?:message|error): "([^"]+)"')


class Bucket:
    """The objects of *store*, which errors call *url*; all on one event loop."""

    def __init__(self, store: S3Store | LocalStore | MemoryStore, url: str) -> None:
        self.url = url
        self._store = store
        self._large, self._small = asyncio.Semaphore(LARGE_AT_ONCE), asyncio.Semaphore(SMALL_AT_ONCE)

    @classmethod
    def at(cls, url: str) -> Self:
        """Return the bucket at *url*, ``s3://bucket/prefix``.

        Raises:
            ConfigError: what the environment says of it cannot be.
        """
        parts = urlsplit(url)
        endpoint = next((os.environ[name] for name in ENDPOINTS if os.environ.get(name)), "")
        try:
            store = S3Store(
                parts.netloc,
                prefix=parts.path.strip("/") or None,
                client_options={
                    "allow_http": endpoint.startswith("http://"),  # whoever names such an endpoint means it
                    "connect_timeout": timedelta(seconds=CONNECT_WITHIN_S),
                    "timeout": timedelta(seconds=PART_WITHIN_S),
                },
                retry_config={"max_retries": MAX_RETRIES, "retry_timeout": timedelta(seconds=RETRY_FOR_S)},
            )
        except BaseError as error:
            raise ConfigError("runs", got=url, expected=f"a bucket that can be used ({_first_line(error)})") from error
        return cls(store, url.rstrip("/"))

    async def put(self, key: str, path: Path) -> None:
        """See ``Objects``."""
        size = await asyncio.to_thread(_size_of, path)
        part_bytes = max(PART_BYTES, -(-size // MAX_PARTS))
        async with self._place_for(size):
            with self._using("writing", key):
                await obstore.put_async(self._store, key, path, chunk_size=part_bytes, max_concurrency=PARTS_AT_ONCE)

    async def fetch(self, key: str, into: Partial) -> None:
        """See ``Objects``."""
        async with self._place_for(into.missing_bytes):
            while into.missing_bytes:
                too_short = ProtocolError(f"{self.url}/{key}", got=f"{into.offset} bytes", expected=f"{into.size}")
                with self._using("reading", key):
                    try:
                        part = await obstore.get_range_async(
                            self._store, key, start=into.offset, length=min(PART_BYTES, into.missing_bytes)
                        )
                    except BaseError as error:
                        if _NO_MORE.search(str(error)) is None:
                            raise
                        raise too_short from error
                if not len(part):
                    raise too_short
                await _in_thread(into.write, memoryview(part))
            await _in_thread(into.finish)

    async def copy(self, source: str, key: str) -> None:
        """See ``Objects``."""
        async with self._small:
            with self._using("copying", source):
                await obstore.copy_async(self._store, source, key)

    async def delete(self, keys: Collection[str]) -> None:
        """See ``Objects``."""
        if not keys:
            return
        async with self._small:
            with self._using("deleting", min(keys)):
                try:
                    await obstore.delete_async(self._store, list(keys))
                except FileNotFoundError:  # S3 does not tell of those that are gone, others do, and leave the rest
                    for key in keys:
                        await self._delete_one(key)

    async def reach(self) -> None:
        """See ``Objects``."""
        async with self._small:
            with self._using("looking into", ""):
                async for _ in obstore.list(self._store, chunk_size=1):
                    return

    async def sizes(self, folder: str = "") -> dict[str, int]:
        """See ``Objects``."""
        async with self._small:
            with self._using("listing", folder):
                found = await obstore.list(self._store, folder or None).collect_async()
        return {each["path"]: each["size"] for each in found}

    async def _delete_one(self, key: str) -> None:
        try:
            await obstore.delete_async(self._store, key)
        except FileNotFoundError as error:
            if NO_BUCKET in str(error):
                raise

    def _place_for(self, size: int) -> asyncio.Semaphore:
        return self._small if size <= SMALL_BYTES else self._large

    @contextmanager
    def _using(self, doing: str, key: str) -> Iterator[None]:
        """Say what fails in the block, in the words of whoever can mend it."""
        name = f"{self.url}/{key}".rstrip("/")
        try:
            yield
        except FileNotFoundError as error:
            if NO_BUCKET not in str(error):
                raise NotFound("object", name) from error
            raise StoreFailed(f"{doing} {name}", _why(error)) from error
        except (BaseError, OSError) as error:
            raise StoreFailed(f"{doing} {name}", _why(error)) from error


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        raise NotFound("file", str(path)) from None
    except OSError as error:
        raise disk_failure(f"reading {path}", error, path.parent) from error


async def _in_thread(work: Callable[..., object], *arguments: object) -> None:
    """Do *work* in a thread, and be done with it before this returns, also when it is cancelled: a file is in use."""
    working = asyncio.ensure_future(asyncio.to_thread(work, *arguments))
    try:
        await asyncio.shield(working)
    except asyncio.CancelledError:
        await asyncio.wait([working])
        raise


def _why(error: Exception) -> str:
    """Return what *error* of obstore's is about, and what to look at; its text has a line, and then all details."""
    text = str(error)
    said, status = _CODE.search(text), _STATUS.search(text)
    code = next(filter(None, said.groups()), "") if said else ""
    answer = ", ".join(part for part in (status[1].strip() if status else "", code) if part)
    if METADATA_SERVICE in text:
        return (
            "there are no credentials for it; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the server's "
            "environment, or give the machine a role that may use it"
        )
    if code == NO_BUCKET:
        return "there is no such bucket; check its name in the setting 'runs', and AWS_REGION and AWS_ENDPOINT_URL"
    if "redirect without LOCATION" in text:
        return "it is in another region; set AWS_REGION to that"
    if code == "RequestTimeTooSkewed":
        return "by its clock this machine's is wrong; set it by NTP"
    if answer[:3] in ("401", "403") or code == "AccessDenied":
        return (
            f"it refuses this server ({answer}); check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and what they may do "
            "there"
        )
    if answer:
        return f"it answered {answer}"
    if "kind: Timeout" in text:
        return "it does not answer in time; check the network and AWS_ENDPOINT_URL"
    if "error sending request" in text:
        system = _SYSTEM.search(text)
        why = system[1] if system is not None else "the connection broke"
        return f"it cannot be reached ({why}); check the network and AWS_ENDPOINT_URL"
    return _first_line(error)


def _first_line(error: Exception) -> str:
    return " ".join(str(error).partition("\n\nDebug source:")[0].split())
