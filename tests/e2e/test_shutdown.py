"""Stopping and starting again in order, with clients connected."""

import time

from benchmarks.deployment import deployment


def test_server_that_is_stopped_does_not_wait_for_clients_that_have_heard_its_goodbye() -> None:
    with deployment() as running:
        running.start("server", *running.names)
        began = time.monotonic()
        assert running.end("server") == 0
        took_s = time.monotonic() - began
        log = (running.root / "server.log").read_text()
        assert "clients did not leave in time" not in log
        assert took_s < 25, "the default shutdown period alone would be 30 s"
        running.start("server")
        status = running.hanse("job", "list")
        assert status == {"jobs": []}
