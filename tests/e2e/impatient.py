"""``hanse``, but whose server waits for seconds only for a run's process that says nothing any more."""

import sys

from hanse.cli import main
from hanse.server import run_process

if __name__ == "__main__":
    run_process.RUN_SILENT_S = 8.0  # type: ignore[misc]
    sys.exit(main())
