"""The process of one run on the server: started by the server by ``python -m hanse.server.job_process``.

It runs users' code (workflow, aggregation), so it holds no key, no database and no other job's token. It ends with its
run, or at once when its server is gone, with all that it has started: what it had not committed by then, the server's
next start has it do again.
"""

import argparse
import logging
import os
import sys
import threading
from pathlib import Path

import msgspec

from hanse.launch.log_lines import log_to_stderr
from hanse.launch.process import end_with_group, read_spec
from hanse.server.federated_server import FederatedServer
from hanse.server.run_spec import RunProcessSpec

ORPHANED = 3
"""The exit status of a process whose server is gone."""


def main() -> int:
    """Run the one job that standard input describes; return the process's exit status."""
    log_to_stderr(logging.INFO)
    spec = msgspec.msgpack.decode(read_spec(sys.stdin.buffer), type=RunProcessSpec)
    threading.Thread(target=_end_with_parent, name="life line", daemon=True).start()
    server = FederatedServer(
        project_name=spec.project,
        args=argparse.Namespace(workspace=spec.folder),
        check_engine_frequency=spec.check_frequency_s,
    )
    server.create_job_cell(
        spec.job_id, "", spec.parent_url, secure_train=False, server_config={"credentials": spec.credentials}
    )
    try:
        server.start_run(spec.job_id, Path(spec.folder), spec.spec, argparse.Namespace(epoch=spec.epoch), None)
    finally:
        server.stop_run_engine_cell()
    return 0


def _end_with_parent() -> None:
    """Wait for the end of the life line, which the server holds; then there is nobody to work for."""
    # Not by ``sys.stdin``, which a thread that waits in it keeps from being closed: Python aborts then when it ends.
    while os.read(0, 1024):
        continue
    end_with_group(ORPHANED)


if __name__ == "__main__":
    sys.exit(main())
