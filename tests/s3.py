"""A server that speaks S3, for tests: moto's, on loopback, in threads of this process; what it holds is in memory."""

import os
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

REGION = "us-east-1"


class S3:
    """A server with buckets; ``stop`` it and ``start`` it, and they are as they were."""

    def __init__(self, threaded_server: Any) -> None:
        self._make, self._server, self._buckets = threaded_server, None, 0
        self.port = 0

    def start(self) -> None:
        """Return when the server takes requests."""
        self._server = self._make(ip_address="127.0.0.1", port=self.port, verbose=False)
        self._server.start()
        _, self.port = self._server.get_host_and_port()

    def stop(self) -> None:
        """Return when nobody listens at the server's port any more."""
        if self._server is not None:
            self._server.stop()
            self._server = None

    @property
    def environment(self) -> dict[str, str]:
        """What a server of Hanse finds in its environment to use the buckets."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_REGION": REGION,
            "AWS_ACCESS_KEY_ID": "hanse",
            "AWS_SECRET_ACCESS_KEY": "sesame",
        }

    def new_bucket(self) -> str:
        """Make a bucket and return its name."""
        self._buckets += 1
        name = f"hanse-{self._buckets}"
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/{name}", method="PUT")
        with urllib.request.urlopen(request) as answer:
            assert answer.status == 200
        return name


@contextmanager
def throw_away_s3() -> Iterator[S3]:
    """Run a server while the block lasts; skip the test, or fail it, where moto or obstore is not installed."""
    try:
        import obstore  # noqa: F401, PLC0415 - what is tested needs it, and it is an extra
        from moto.server import ThreadedMotoServer  # noqa: PLC0415 - takes seconds, for the few tests that use it
    except ImportError as missing:
        reason = f"{missing.name} is not installed: pip install 'obstore' 'moto[server]'"
        if "s3" in os.environ.get("HANSE_TEST_REQUIRE", ""):
            pytest.fail(reason)
        pytest.skip(reason)
    server = S3(ThreadedMotoServer)
    server.start()
    try:
        yield server
    finally:
        server.stop()
